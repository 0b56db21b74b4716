"""The input of a report: results as they stand in JSON, and the findings behind them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from markupsafe import Markup

# dataset, kind, n (units), complete, problems (a list of {"what", "count", "names"}). A result of one model also holds
# model, and by metric: metrics, intervals, chance (for some). A comparison holds first and second, the models' names,
# and differences, by metric: the value of the first, of the second, second minus first, and the interval of that.
# Both may hold verdict (see `verdict.py`), notes (sentences) and prompts (the prompts of class names). With baseline, a
# text, chance holds the values of a baseline: what it answers. `dualenc.evaluation` makes both.
Result = dict[str, Any]

Picture = Callable[[int], bytes]  # number of an image -> a small JPEG or PNG


class Findings(Protocol):
    """Evidence behind the metrics of a set, such as the most frequent mistakes; it renders itself."""

    def html(self) -> Markup:
        """Return the part of the page that shows the findings; a class outside this package may bring its own."""
        ...


@dataclass(frozen=True)
class Description:
    """Explanation of a result: what it counts, what it measures, and how to read its metrics.

    Attributes:
        unit: what `n` counts, in the plural.
        measures: what was measured, for the line below the name of the set.
        headlines: metrics that stand at the top of the page, the primary one first.
        lower_is_better: metrics whose smaller value is better, besides those of `formatting.lower_is_better`.
        unbounded: metrics that may lie outside 0 to 1, besides those that `formatting.is_share` excludes.
    """

    unit: str = "images"
    measures: str = ""
    headlines: tuple[str, ...] = ()
    lower_is_better: tuple[str, ...] = ()
    unbounded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Points:
    """Embeddings drawn in the plane; 2,000 of them keep a page small and a plot readable.

    Attributes:
        xy: (M, 2), both axes in the same unit.
        label: (M,) index into the names.
        names: names of the classes; or ("images", "captions").
        explained: share of the variance along each axis.
        pairs: (P, 2) rows of `xy` that a line joins.
        note: one sentence on the choice of the points and of the plane.
    """

    xy: np.ndarray
    label: np.ndarray
    names: Sequence[str]
    explained: tuple[float, float] | None = None
    pairs: np.ndarray | None = None
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One evaluation set on the page: its metrics, and the evidence behind them.

    Attributes:
        result: metrics of the set.
        findings: evidence; None shows the metrics alone.
        points: map of the embeddings.
        description: explanation of the metrics.
    """

    result: Result
    findings: Findings | None = None
    points: Points | None = None
    description: Description = field(default_factory=Description)


@dataclass(frozen=True)
class Comparison:
    """Two models on one evaluation set, the first called A and the second B.

    Attributes:
        result: metrics of both, and their differences.
        findings: answers of both; None shows the metrics alone.
        description: explanation of the metrics.
    """

    result: Result
    findings: Findings | None = None
    description: Description = field(default_factory=Description)
