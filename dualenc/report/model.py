"""What a caller hands over for the page: results as they go to JSON, and the findings behind them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# dataset, kind, n (units), complete, problems (a list of {"what", "count", "names"}). Of one model: model, and by name
# metrics, intervals, chance (of some). Of two: first and second, their names, and differences, by name the figure of
# the first, of the second, second less first, and the interval of that. As `dualenc.evaluation` makes them.
Result = dict[str, Any]

Picture = Callable[[int], bytes]  # picture i as JPEG or PNG, small


@dataclass(frozen=True)
class Classes:
    """What each image was taken for.

    Attributes:
        names: of the classes.
        truth, predicted: (N,) class of each image.
        picture: of image i.
        confidence: (N,) probability of the answer.
        calibration: confidence, share right and number of images of each bin.
    """

    names: Sequence[str]
    truth: np.ndarray
    predicted: np.ndarray
    picture: Picture
    confidence: np.ndarray | None = None
    calibration: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Labels:
    """One figure for each label, where an image has several."""

    names: Sequence[str]
    counts: np.ndarray  # (C,) images that have the label
    precision: np.ndarray  # (C,) average precision


@dataclass(frozen=True)
class Answers:
    """Some queries and what they found, by "text" (which look for an image) and by "image"."""

    captions: Sequence[str]
    answers: Mapping[str, Sequence[Any]]  # see dualenc.metrics.Answer
    picture: Picture


@dataclass(frozen=True)
class ChoiceScores:
    """Instances of a few images and captions to be told apart; the page draws some of them.

    Attributes:
        captions: of each instance; caption i belongs to image i, those after the last image belong to none.
        images: of each instance the numbers of its images.
        scores: of each instance (images, captions).
        picture: of image i.
    """

    captions: Sequence[Sequence[str]]
    images: Sequence[Sequence[int]] | np.ndarray
    scores: Sequence[np.ndarray] | np.ndarray
    picture: Picture


@dataclass(frozen=True)
class Points:
    """Embeddings drawn in the plane; 2,000 of them keep a page small and a plot readable.

    Attributes:
        xy: (M, 2), both axes in the same unit.
        label: (M,) index into the names.
        names: of the classes; or ("images", "captions").
        explained: share of the variance that each axis holds.
        pairs: (P, 2) rows of `xy` to be joined by a line.
        note: one sentence on what was drawn and how.
    """

    xy: np.ndarray
    label: np.ndarray
    names: Sequence[str]
    explained: tuple[float, float] | None = None
    pairs: np.ndarray | None = None
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One evaluation set: its figures, and what stands behind them."""

    result: Result
    findings: Classes | Labels | Answers | ChoiceScores | None  # none: the page has the figures only
    points: Points | None = None


@dataclass(frozen=True)
class TwoAnswers:
    """What two models took each image for.

    Attributes:
        names: of the classes.
        truth: (N,) class of each image.
        answers: of the first and of the second model, (N,) each.
        confidence: of both, (N,) each: probability of the answer.
        picture: of image i.
    """

    names: Sequence[str]
    truth: np.ndarray
    answers: tuple[np.ndarray, np.ndarray]
    confidence: tuple[np.ndarray, np.ndarray]
    picture: Picture


@dataclass(frozen=True)
class Ranked:
    """What one model found for T captions and I images.

    Attributes:
        rank_by_text: (T,) rank of its image for each caption, 0-based.
        best_by_text: (T, K) the images that each caption found first.
        rank_by_image: (I,) rank of its best caption for each image, 0-based.
        best_by_image: (I, K) the captions that each image found first.
    """

    rank_by_text: np.ndarray
    best_by_text: np.ndarray
    rank_by_image: np.ndarray
    best_by_image: np.ndarray


@dataclass(frozen=True)
class TwoRankings:
    """What two models found in a retrieval set.

    Attributes:
        captions: (T,).
        owner: (T,) the image that each caption belongs to.
        found: by the first and by the second model.
        picture: of image i.
    """

    captions: Sequence[str]
    owner: np.ndarray
    found: tuple[Ranked, Ranked]
    picture: Picture


@dataclass(frozen=True)
class Comparison:
    """Two models on one evaluation set, the first as A and the second as B; without findings the figures only."""

    result: Result
    findings: TwoAnswers | TwoRankings | None = None
