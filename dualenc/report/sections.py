"""Values of the page's template for one evaluation set."""

from typing import Any

import numpy as np

from dualenc.report.model import Description, Points, Result, Section
from dualenc.report.plots import COLORS, embedding_map
from dualenc.report.verdict import against_chance, reading

_TONES = {"above": "yes", "better": "yes", "below": "no", "worse": "no"}  # styles by the first word of a verdict


def of_section(section: Section) -> dict[str, Any]:
    """Return what the template shows of a set."""
    return {
        "result": section.result,
        "model": "",  # named where a page has several
        "reference": "baseline" if section.result.get("baseline") else "chance",
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
    verdicts = {name: against_chance(name, result, description) for name in result["metrics"]}
    return [
        {
            "name": name,
            "value": value,
            "interval": result["intervals"].get(name),
            "chance": result["chance"].get(name),
            "verdict": verdicts[name],
            "tone": _TONES.get(verdicts[name].split(" ")[0], "soft"),
            **reading(name, description),
        }
        for name, value in result["metrics"].items()
    ]


def measured(result: Result, description: Description) -> str:
    """Return how many units were measured, what was measured on them, and what a baseline answers."""
    count = f"{result['n']:,} {description.unit}"
    measured = f"{count}: {description.measures}" if description.measures else count
    return f"{measured}; baseline: {result['baseline']}" if result.get("baseline") else measured


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
