"""Values of the page's template for one evaluation set."""

from typing import Any

import numpy as np

from dualenc.report.formatting import is_share, lower_is_better
from dualenc.report.model import Description, Points, Result, Section
from dualenc.report.plots import COLORS, embedding_map


def of_section(section: Section) -> dict[str, Any]:
    """Return what the template shows of a set."""
    return {
        "result": section.result,
        "rows": rows(section.result, section.description),
        "measured": measured(section.result, section.description),
        "findings": "" if section.findings is None else section.findings.html(),
        "map": None if section.points is None else _map(section.points),
    }


def rows(result: Result, description: Description) -> list[dict[str, Any]]:
    """Return the metrics of a set as rows of a table; a missing interval or chance is None.

    Args:
        result: metrics of one model.
        description: explanation of the metrics.
    """
    return [
        {
            "name": name,
            "value": value,
            "interval": result["intervals"].get(name),
            "chance": result["chance"].get(name),
            **reading(name, description),
        }
        for name, value in result["metrics"].items()
    ]


def reading(name: str, description: Description) -> dict[str, bool]:
    """Return how to read a metric: if it lies in 0 to 1, if lower is better, and if it is a headline.

    Args:
        name: name of the metric.
        description: explanation of the metrics.
    """
    return {
        "share": is_share(name) and name not in description.unbounded,
        "lower": lower_is_better(name) or name in description.lower_is_better,
        "headline": name in description.headlines,
    }


def measured(result: Result, description: Description) -> str:
    """Return how many units were measured, and what was measured on them."""
    count = f"{result['n']:,} {description.unit}"
    return f"{count}: {description.measures}" if description.measures else count


def _map(points: Points) -> dict[str, Any] | None:
    if len(points.xy) < 2:
        return None
    classes = len(np.unique(points.label))
    return {
        "plot": embedding_map(points),
        "note": points.note,
        "explained": points.explained,
        "gray": 0 if classes <= COLORS else classes - COLORS,
        "pairs": points.pairs is not None and len(points.pairs) > 0,
    }
