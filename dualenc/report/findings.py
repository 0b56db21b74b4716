"""The evidence behind the metrics of one model: predictions, labels, retrieved candidates and choices."""

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from dualenc.report.model import Picture
from dualenc.report.plots import reliability, spread
from dualenc.report.render import render

WHOLE_MATRIX = 50  # most classes of a confusion matrix with numbers
FEW = 12  # most classes of a matrix with large cells, which a phone has room for
SHOWN_CLASSES = 24  # of more classes, those with most confusions in such a matrix, next to an overview of all
ALL_BARS = 60  # largest number of classes that all have a bar; of more classes, some at both ends have one
WORST, BEST = 20, 10  # number of bars at each end then
CONFIDENT = 8  # mistakes that are shown, those with the highest confidence
CONFUSIONS, EXAMPLES = 8, 4  # pairs of confused classes that are shown, and pictures of each
AROUND = 120  # characters of a text that are shown on each side of the part that matters
DRAWN = 4  # examples of each sort, such as right and wrong, that are drawn for a gallery


@dataclass(frozen=True)
class Classes:
    """Predicted class of each image, or of each text.

    Attributes:
        names: names of the classes.
        truth: (N,) class of each image.
        predicted: (N,) predicted class of each image.
        example: function that returns the thumbnail of image i, or text i.
        confidence: (N,) probability of the predicted class.
        calibration: confidence, accuracy and number of images of each bin.
        ece: expected calibration error.
        unit: what is classified, in the plural.
    """

    names: Sequence[str]
    truth: np.ndarray
    predicted: np.ndarray
    example: Callable[[int], bytes | str]
    confidence: np.ndarray | None = None
    calibration: Sequence[Sequence[float]] = ()
    ece: float | None = None
    unit: str = "images"

    def html(self) -> Markup:
        """See `Findings`."""
        names, count = list(self.names), len(self.names)
        pairs = Counter(zip(self.truth.tolist(), self.predicted.tolist()))
        total = np.bincount(self.truth, minlength=count)
        bars = [
            {"name": name, "value": pairs[c, c] / max(1, int(total[c])), "n": int(total[c])}
            for c, name in enumerate(names)
        ]
        # The most frequent mistakes first; among equally frequent ones, those of the smallest classes.
        wrong = sorted(
            ((n, int(total[a]), a, b) for (a, b), n in pairs.items() if a != b), key=lambda item: (-item[0], item[1])
        )
        confused = list(dict.fromkeys(c for _, _, a, b in wrong for c in (a, b)))
        matrix, overview = sorted(confused[:SHOWN_CLASSES]), None
        if count <= WHOLE_MATRIX:
            matrix = list(range(count))
        else:
            overview = _overview(pairs, total)
        return render(
            "classes.jinja",
            reliability=reliability(self.calibration) if any(row[2] for row in self.calibration) else None,
            ece=self.ece,
            confusions=[self._confusion(n, size, a, b) for n, size, a, b in wrong[:CONFUSIONS]],
            confident=self._confident_mistakes(),
            matrix_names=[names[c] for c in matrix],
            few=count <= FEW,
            matrix_rows=[
                (names[a], [(pairs[a, b], pairs[a, b] / total[a]) for b in matrix]) for a in matrix if total[a]
            ],
            overview=overview,
            classes=count,
            bars=worst_first(bars),
            unit=self.unit,
        )

    def _confusion(self, count: int, total: int, truth: int, predicted: int) -> dict[str, Any]:
        """Return what the template shows of a confusion: `count` of the `total` images of class `truth`."""
        rows = np.flatnonzero((self.truth == truth) & (self.predicted == predicted))[:EXAMPLES]
        return {
            "truth": self.names[truth],
            "predicted": self.names[predicted],
            "n": count,
            "total": total,
            "examples": [self._example(int(i)) for i in rows],
        }

    def _confident_mistakes(self) -> list[dict[str, Any]]:
        """Return the mistakes with the highest confidence: some of them show a wrong label."""
        if self.confidence is None:
            return []
        wrong = np.flatnonzero(self.truth != self.predicted)
        wrong = wrong[np.argsort(-self.confidence[wrong], kind="stable")][:CONFIDENT]
        return [
            self._example(i)
            | {"truth": self.names[int(self.truth[i])], "predicted": self.names[int(self.predicted[i])]}
            for i in wrong.tolist()
        ]

    def _example(self, i: int) -> dict[str, Any]:
        """Return the thumbnail of image i, or text i, and the confidence of its prediction."""
        example = self.example(i)
        shown = {"caption": example} if isinstance(example, str) else {"picture": example}
        return {**shown, "confidence": None if self.confidence is None else self.confidence[i]}


@dataclass(frozen=True)
class Labels:
    """Average precision of each label, where an image may have several.

    Attributes:
        names: names of the labels.
        counts: (C,) number of images with each label.
        precision: (C,) average precision.
    """

    names: Sequence[str]
    counts: np.ndarray
    precision: np.ndarray

    def html(self) -> Markup:
        """See `Findings`."""
        bars = [
            {"name": name, "value": float(value), "n": int(n)}
            for name, value, n in zip(self.names, self.precision, self.counts)
        ]
        return render("labels.jinja", bars=worst_first(bars))


@dataclass(frozen=True)
class Answers:
    """Some queries of a retrieval set with their first candidates.

    Attributes:
        captions: texts of the set.
        answers: kind of the query, "text" or "image" -> some queries with their first candidates, which are of the
            other kind; see `dualenc.metrics.Answer`.
        picture: function that returns the thumbnail of image i.
    """

    captions: Sequence[str]
    answers: Mapping[str, Sequence[Any]]
    picture: Picture

    def html(self) -> Markup:
        """See `Findings`."""
        galleries = [self._gallery(query, other) for query, other in (("text", "image"), ("image", "text"))]
        return render("answers.jinja", galleries=[gallery for gallery in galleries if gallery["answers"]])

    def _gallery(self, query: str, other: str) -> dict[str, Any]:
        """Return what the template shows of the queries of one kind, whose candidates are of the other kind."""

        def show(modality: str, i: int) -> dict[str, Any]:
            return item(modality, i, self.captions, self.picture)

        return {
            "query": query,
            "answers": [
                {
                    "query": show(query, answer.query),
                    "rank": answer.rank,
                    "best": [
                        show(other, i) | {"score": score, "right": i in answer.right}
                        for i, score in zip(answer.best, answer.scores)
                    ],
                    "missed": None if answer.rank < len(answer.best) else show(other, answer.right[0]),
                }
                for answer in self.answers[query]
            ],
        }


@dataclass(frozen=True)
class ChoiceScores:
    """Instances of a few images and captions that a model must match, with their scores; the page shows some of them.

    Attributes:
        captions: captions of each instance; caption i belongs to image i, captions after the last image to no image.
        images: numbers of each instance's images.
        scores: scores of each instance, (images, captions).
        picture: function that returns the thumbnail of image i.
    """

    captions: Sequence[Sequence[str]]
    images: Sequence[Sequence[int]] | np.ndarray
    scores: Sequence[np.ndarray] | np.ndarray
    picture: Picture

    def html(self) -> Markup:
        """See `Findings`."""
        verdicts = [_verdict(np.asarray(scores)) for scores in self.scores]
        right = np.array([all(map(all, verdict.values())) for verdict in verdicts], dtype=bool)
        choices = [
            {
                "right": bool(right[i]),
                "counts": {name: (sum(flags), len(flags)) for name, flags in verdicts[i].items()},
                "pictures": [self.picture(int(image)) for image in self.images[i]],
                "captions": self._rows(i),
            }
            for i in draw(~right) + draw(right)
        ]
        return render("choices.jinja", choices=choices)

    def _rows(self, i: int) -> list[dict[str, Any]]:
        """Return the rows of the table of instance i: each caption with its scores for the images."""
        scores = np.asarray(self.scores[i])  # (images, captions)
        highest = scores == scores.max(1, keepdims=True)
        chosen = highest & (highest.sum(1, keepdims=True) == 1)  # A tie chooses no caption.
        return [
            {
                "caption": caption,
                "scores": [
                    {"score": scores[image, row], "own": row == image, "chosen": chosen[image, row]}
                    for image in range(len(scores))
                ],
            }
            for row, caption in enumerate(self.captions[i])
        ]


def draw(among: np.ndarray, count: int = DRAWN) -> list[int]:
    """Draw the numbers of some true entries at random; the same entries give the same draw.

    Args:
        among: (N,) bool.
        count: how many to draw at most.
    """
    where = np.flatnonzero(among)
    return where[np.random.default_rng(0).permutation(len(where))[:count]].tolist()


def item(modality: str, i: int, captions: Sequence[str], picture: Picture) -> dict[str, Any]:
    """Return what a template shows of an item: the picture of an image, or the caption that a text is.

    Args:
        modality: "image" or "text".
        i: number of the image or of the caption.
        captions: texts of the set.
        picture: picture of image i.
    """
    return {"picture": picture(i)} if modality == "image" else {"caption": captions[i]}


def worst_first(bars: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sort the bars of classes and choose those that are shown; classes without images are only counted.

    Args:
        bars: name, value and n (number of images) of each class.
    """
    known = sorted((bar for bar in bars if bar["n"]), key=lambda bar: bar["value"])
    few = len(known) <= ALL_BARS
    return {
        "all": known,
        "worst": known if few else known[:WORST],
        "best": [] if few else known[-BEST:],
        "without": len(bars) - len(known),
        "spread": None if few else spread([bar["value"] for bar in known]),
    }


def _overview(pairs: Mapping[tuple[int, int], int], total: np.ndarray, most: int = 250) -> bytes:
    """Draw the confusion matrix of many classes as a PNG: truth down, prediction across.

    A matrix has at most `most` cells on a side. A cell that stands for several classes shows the largest share among
    them.
    """
    cells = min(most, len(total))
    at = np.arange(len(total)) * cells // len(total)
    share = np.zeros((cells, cells))
    for (a, b), n in pairs.items():
        share[at[a], at[b]] = max(share[at[a], at[b]], n / total[a])
    pixels = np.zeros((cells, cells, 4), np.uint8)
    pixels[..., :3] = (74, 144, 217)  # Opacity holds the share, so that it reads on light and on dark.
    pixels[..., 3] = np.sqrt(share) * 255  # The root makes single mistakes visible.
    side = max(1, round(480 / cells))  # pixels of a cell, for a picture of about 480 pixels
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((cells * side, cells * side), Image.Resampling.NEAREST).save(
        buffer, "PNG", optimize=True
    )
    return buffer.getvalue()


def _verdict(scores: np.ndarray) -> dict[str, list[bool]]:
    """Decide for each image if its own caption scores above the others, and for each such caption if its image does."""
    own = np.diag(scores)  # (I,)
    others = ~np.eye(*scores.shape, dtype=bool)
    found = {"captions": [bool((row[other] < score).all()) for row, other, score in zip(scores, others, own)]}
    if len(scores) > 1:
        found["images"] = [bool((row[other] < score).all()) for row, other, score in zip(scores.T, others.T, own)]
    return found


def around(text: str, start: int, stop: int) -> tuple[str, str]:
    """Return what stands before and after the part of a text from `start` to `stop`, at most `AROUND` characters."""
    first, last = max(0, start - AROUND), stop + AROUND
    return f"{'…' if first else ''}{text[first:start]}", f"{text[stop:last]}{'…' if last < len(text) else ''}"
