"""Two models on one evaluation set: their differences, and the evidence behind them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from dualenc.report.findings import draw, item
from dualenc.report.model import Comparison, Picture
from dualenc.report.render import render
from dualenc.report.sections import measured
from dualenc.report.verdict import better, reading

SIDES = ("a", "b")


@dataclass(frozen=True)
class TwoAnswers:
    """Predicted class of each image, by two models.

    Attributes:
        names: names of the classes.
        truth: (N,) class of each image.
        answers: (N,) predicted classes of the first and of the second model.
        confidence: (N,) probability of the predicted class, of both.
        picture: picture of image i.
    """

    names: Sequence[str]
    truth: np.ndarray
    answers: tuple[np.ndarray, np.ndarray]
    confidence: tuple[np.ndarray, np.ndarray]
    picture: Picture

    def html(self) -> Markup:
        """See `Findings`."""
        first, second = (answers == self.truth for answers in self.answers)
        return render("two_answers.jinja", part=_part(first, second, self._case))

    def _case(self, i: int) -> dict[str, Any]:
        return {
            "picture": self.picture(i),
            "truth": self.names[int(self.truth[i])],
            "answers": [
                (side, self.names[int(answers[i])], float(confidence[i]), bool(answers[i] == self.truth[i]))
                for side, answers, confidence in zip(SIDES, self.answers, self.confidence)
            ],
        }


@dataclass(frozen=True)
class Ranked:
    """Ranking by one model: ranks and first candidates for T captions and I images.

    Attributes:
        rank_by_text: (T,) rank of each caption's image, 0-based.
        best_by_text: (T, K) images with the highest scores for each caption.
        rank_by_image: (I,) rank of each image's best caption, 0-based.
        best_by_image: (I, K) captions with the highest scores for each image.
    """

    rank_by_text: np.ndarray
    best_by_text: np.ndarray
    rank_by_image: np.ndarray
    best_by_image: np.ndarray

    def ranks(self, query: str) -> np.ndarray:
        """Return the ranks for the queries of one modality, "text" or "image"."""
        return self.rank_by_text if query == "text" else self.rank_by_image

    def best(self, query: str) -> np.ndarray:
        """Return the first candidates for the queries of one modality, "text" or "image"."""
        return self.best_by_text if query == "text" else self.best_by_image


@dataclass(frozen=True)
class TwoRankings:
    """Candidates that two models find in a retrieval set.

    Attributes:
        captions: T texts.
        owner: (T,) image that each caption belongs to.
        found: ranks and first candidates of the first and of the second model.
        picture: picture of image i.
    """

    captions: Sequence[str]
    owner: np.ndarray
    found: tuple[Ranked, Ranked]
    picture: Picture

    def html(self) -> Markup:
        """See `Findings`."""
        parts = []
        for query, other in (("text", "image"), ("image", "text")):
            first, second = (side.ranks(query) == 0 for side in self.found)
            parts.append({"query": query} | _part(first, second, lambda i, q=query, o=other: self._case(q, o, i)))
        return render("two_rankings.jinja", parts=parts)

    def _case(self, query: str, other: str, i: int) -> dict[str, Any]:
        owner = np.asarray(self.owner)
        own = {int(owner[i])} if query == "text" else set(np.flatnonzero(owner == i).tolist())
        sides = [
            (
                side,
                int(ranked.ranks(query)[i]),
                [
                    item(other, candidate, self.captions, self.picture) | {"right": candidate in own}
                    for candidate in ranked.best(query)[i].tolist()
                ],
            )
            for side, ranked in zip(SIDES, self.found)
        ]
        return {"query": item(query, i, self.captions, self.picture), "sides": sides}


def of_comparison(comparison: Comparison) -> dict[str, Any]:
    """Return what the template shows of a set."""
    result = comparison.result
    drawn = differences(comparison)
    shares = [row for row in drawn if row["share"]]
    reach = _reach(max((max(map(abs, row["interval"])) for row in shares), default=0.0))
    for row in shares:
        left, right = (50 + 50 * bound / reach for bound in row["interval"])
        row["band"] = (left, right - left, 50 + 50 * row["difference"] / reach)
    return {
        "result": result,
        "rows": drawn,
        "reach": reach,
        "measured": measured(result, comparison.description),
        "findings": "" if comparison.findings is None else comparison.findings.html(),
    }


def differences(comparison: Comparison) -> list[dict[str, Any]]:
    """Return each metric of both models with their difference, its interval, and the model that is clearly better."""
    found = []
    for name, (a, b, difference, low, high) in comparison.result["differences"].items():
        values = {"a": a, "b": b, "difference": difference, "interval": (low, high)}
        winner = better(name, (difference, low, high), comparison.description)
        found.append({"name": name, **values, "better": winner, **reading(name, comparison.description)})
    return found


def _reach(largest: float) -> float:
    """Round the end of a scale up to 1, 2 or 5 times a power of ten, and to 1 at most."""
    steps = (digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5))
    return next((step for step in steps if step >= largest), 1.0) if largest < 1 else 1.0


def _part(a: np.ndarray, b: np.ndarray, show: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """Count which of two models is right, and draw examples of the cases in which one alone is."""
    counts = [("both right", "both", a & b), ("only A", "a", a & ~b), ("only B", "b", b & ~a), ("neither", "", ~a & ~b)]
    return {
        "n": len(a),
        "counts": [(name, kind, int(where.sum())) for name, kind, where in counts],
        "galleries": [
            (f"{right} right, {wrong} wrong", [show(i) for i in draw(where)])
            for right, wrong, where in (("A", "B", a & ~b), ("B", "A", b & ~a))
            if where.any()
        ],
    }
