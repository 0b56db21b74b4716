"""The reading of a metric and the verdict on it, derived from its interval and from chance, a baseline or a model."""

from collections.abc import Sequence
from typing import Literal

from dualenc.report.formatting import change, is_share, lower_is_better, number
from dualenc.report.model import Description, Result

TAIL = 0.025  # probability of each side outside of a 95% interval
Side = Literal["", "above", "not above", "below"]
# The words where a higher value is better, and where a lower one is.
_WORDS: dict[tuple[Side, bool], str] = {
    ("above", False): "above", ("not above", False): "not above", ("below", False): "below",
    ("above", True): "worse than", ("not above", True): "not better than", ("below", True): "better than",
}  # fmt: skip


def reading(name: str, description: Description) -> dict[str, bool]:
    """Return the reading of a metric: if it lies in 0 to 1, if lower is better, and if it is a headline.

    Args:
        name: name of the metric.
        description: explanation of the metrics.
    """
    return {
        "share": is_share(name) and name not in description.unbounded,
        "lower": lower_is_better(name) or name in description.lower_is_better,
        "headline": name in description.headlines,
    }


def against_chance(name: str, result: Result, description: Description) -> str:
    """Return the words on a metric and chance, or the baseline of the result, such as "above chance".

    Args:
        name: name of the metric.
        result: metrics of one model.
        description: explanation of the metrics.

    Returns:
        The words; empty if the interval or the value of chance is missing, or if the interval says nothing.
    """
    if name not in result["intervals"] or name not in result["chance"]:
        return ""
    how = reading(name, description)
    found = side(result["intervals"][name], result["chance"][name], result["n"], how["share"])
    other = "the baseline" if result.get("baseline") else "chance"
    return f"{_WORDS[found, how['lower']]} {other}" if found else ""


def side(interval: Sequence[float], chance: float, n: int, share: bool) -> Side:
    """Return on which side of chance a metric lies: "not above" if its interval contains chance.

    The bootstrap cannot move n equal outcomes. For a share of 0 or 1 the exact interval (Clopper and Pearson 1934)
    then replaces one without width. Any other interval without width says nothing: nothing could move, as in a set
    with one image for each class.

    Args:
        interval: lower and upper bound.
        chance: value of chance, or of a baseline.
        n: number of units.
        share: True if the metric lies between 0 and 1.

    Returns:
        The side; empty if it is not known.
    """
    low, high = interval
    if low == high and chance != low:
        if not share or low not in (0, 1):
            return ""
        least = TAIL ** (1 / max(1, n))  # the smallest share for which n of n outcomes are not too rare
        low, high = (least, 1.0) if low == 1 else (0.0, 1 - least)
    if low > chance:
        return "above"
    return "below" if high < chance else "not above"


def verdict(result: Result, description: Description) -> str:
    """Return one sentence on the primary metric of a result, which is the first headline; see `against_chance`.

    Args:
        result: metrics of one model.
        description: explanation of the metrics.

    Returns:
        The sentence, such as "acc1 is above chance: 0.612, 0.555 to 0.668; chance is 0.100"; or an empty text.
    """
    name = next(iter(description.headlines), "")
    words = against_chance(name, result, description)
    if not words:
        return ""
    low, high = map(number, result["intervals"][name])
    value, chance = number(result["metrics"][name]), number(result["chance"][name])
    other = f"{result['baseline']} gives {chance}" if result.get("baseline") else f"chance is {chance}"
    return f"{name} is {words}: {value}, {low} to {high}; {other}"


def better(name: str, difference: Sequence[float], description: Description) -> str:
    """Return which of two models is better, "A" or "B"; empty if the interval of the difference contains 0.

    An interval without width says nothing about a share; see `side`.

    Args:
        name: name of the metric.
        difference: second minus first, and the bounds of its interval.
        description: explanation of the metrics.
    """
    value, low, high = difference
    how = reading(name, description)
    if low <= 0 <= high or (low == high and how["share"] and abs(value) < 1):
        return ""
    return "B" if (low > 0) != how["lower"] else "A"


def verdict_on_two(result: Result, description: Description) -> str:
    """Return one sentence on which of two models is better by the primary metric, which is the first headline.

    Args:
        result: differences of two models.
        description: explanation of the metrics.

    Returns:
        The sentence, such as "acc1: the second model (B) is better than the first (A) by 0.043, 0.011 to 0.075"; empty
        without a headline among the differences.
    """
    name = next((name for name in description.headlines if name in result["differences"]), "")
    if not name:
        return ""
    difference = result["differences"][name][2:]
    winner = better(name, difference, description)
    if not winner:
        value, low, high = map(change, difference)
        return f"{name}: no clear difference: {value}, {low} to {high}"
    one, other = ("second model (B)", "first (A)") if winner == "B" else ("first model (A)", "second (B)")
    size, (least, most) = abs(difference[0]), sorted(map(abs, difference[1:]))
    by = f"{number(size)}, {number(least)} to {number(most)}"
    return f"{name}: the {one} is better than the {other} by {by}"
