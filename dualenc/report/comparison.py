"""From what two models found in a set to what the page says of their difference."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from dualenc.report.formatting import is_share, less_is_better, measured
from dualenc.report.model import Comparison, Result, TwoAnswers, TwoRankings
from dualenc.report.sections import HEADLINES, draw, item

SIDES = ("a", "b")


def of_comparison(comparison: Comparison) -> dict[str, Any]:
    """What the template asks of a set."""
    result, found = comparison.result, comparison.findings
    drawn = differences(result)
    shares = [row for row in drawn if row["share"]]
    reach = _reach(max((max(map(abs, row["interval"])) for row in shares), default=0.0))
    for row in shares:
        left, right = (50 + 50 * bound / reach for bound in row["interval"])
        row["band"] = (left, right - left, 50 + 50 * row["difference"] / reach)
    page: dict[str, Any] = {"result": result, "rows": drawn, "reach": reach, "measured": measured(result), "parts": []}
    if isinstance(found, TwoAnswers):
        right = [answers == found.truth for answers in found.answers]
        page["parts"] = [{"asked": "class"} | _part(right[0], right[1], partial(_answer, found))]
    if isinstance(found, TwoRankings):
        for asked in ("text", "image"):
            ranks = [side.rank_by_text if asked == "text" else side.rank_by_image for side in found.found]
            page["parts"].append({"asked": asked} | _part(ranks[0] == 0, ranks[1] == 0, partial(_query, found, asked)))
    return page


def differences(result: Result) -> list[dict[str, Any]]:
    """Each metric of both models, their difference with its interval, and which is better beyond that."""
    found = []
    for name, (a, b, difference, low, high) in result["differences"].items():
        better = ""
        if low > 0 or high < 0:
            better = "B" if (low > 0) != less_is_better(name) else "A"
        found.append(
            {
                "name": name, "a": a, "b": b, "difference": difference, "interval": (low, high), "better": better,
                "share": is_share(name), "lower": less_is_better(name), "headline": name in HEADLINES,
            }
        )  # fmt: skip
    return found


def _reach(largest: float) -> float:
    """The end of a scale that starts at 0: the next of 1, 2, 5 times a power of ten, and 1 at most."""
    steps = (digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5))
    return next((step for step in steps if step >= largest), 1.0) if largest < 1 else 1.0


def _part(a: np.ndarray, b: np.ndarray, show: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """How often which of the two was right, and some of the cases in which one was, drawn blindly."""
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


def _answer(found: TwoAnswers, i: int) -> dict[str, Any]:
    return {
        "picture": found.picture(i),
        "truth": found.names[int(found.truth[i])],
        "answers": [
            (side, found.names[int(answers[i])], float(confidence[i]), bool(answers[i] == found.truth[i]))
            for side, answers, confidence in zip(SIDES, found.answers, found.confidence)
        ],
    }


def _query(found: TwoRankings, asked: str, i: int) -> dict[str, Any]:
    owner = np.asarray(found.owner)
    own = {int(owner[i])} if asked == "text" else set(np.flatnonzero(owner == i).tolist())
    other = "image" if asked == "text" else "text"
    sides = []
    for side, ranked in zip(SIDES, found.found):
        best, ranks = ranked.best_by_image, ranked.rank_by_image
        if asked == "text":
            best, ranks = ranked.best_by_text, ranked.rank_by_text
        shown = [
            item(other, candidate, found.captions, found.picture) | {"right": candidate in own}
            for candidate in best[i].tolist()
        ]
        sides.append((side, int(ranks[i]), shown))
    return {"query": item(asked, i, found.captions, found.picture), "sides": sides}
