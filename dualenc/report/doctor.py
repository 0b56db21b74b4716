"""Findings of the doctor, in the terminal and as a page."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualenc.report.formatting import figure, percent
from dualenc.report.html import write_page
from dualenc.report.plots import histogram
from dualenc.utils.text import plural


def print_examination(result: Mapping[str, Any]) -> None:
    """Print the result of `dualenc.data.doctor.checks`: facts about the data, then the problems found.

    Args:
        result: facts and findings.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:  # Lines are not wrapped, so that a program can search them.
        console.width = 100_000
    facts = _facts(result["facts"])
    for name, value in facts:
        console.print(Text(f"{name:{max(len(name) for name, _ in facts)}}  {value}"))
    if quantiles := result["facts"].get("quantiles"):
        table = Table("", *next(iter(quantiles.values())), box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, values in quantiles.items():
            table.add_row(name, *map(figure, values.values()))
        console.print("", table)
    console.print()
    for finding in result["findings"]:
        style = {"error": "bold red", "warning": "bold yellow", "info": "bold blue"}[finding["severity"]]
        head = f"{finding['what']}: {_count(finding)}"
        console.print(Text.assemble((f"{finding['severity']:9}", style), head))
        shown = finding["examples"] if finding["unit"].startswith("shards") else finding["examples"][:3]
        for example in shown:
            console.print(Padding.indent(Text(example, style="dim"), 11))
        console.print(Padding.indent(Text(finding["advice"]), 9))
    if not result["findings"]:
        console.print("no problems found")


def write_examination(
    folder: str | os.PathLike[str],
    title: str,
    result: Mapping[str, Any],
    distributions: Mapping[str, np.ndarray],
    galleries: Mapping[str, Sequence[Sequence[tuple[str, bytes]]]],
    about: Mapping[str, Any] | None = None,
    marks: Mapping[str, float] | None = None,
) -> Path:
    """Write `report.html` with the result of `dualenc.data.doctor.checks`; see `write_report`.

    Args:
        folder: folder of the page.
        title: title of the page.
        result: facts and findings.
        distributions: values of each plot, by name.
        galleries: groups of images that are shown side by side, by title; each image with its caption.
        about: further facts of the run, by name.
        marks: value that is marked in a plot, by the plot's name.
    """
    facts = result["facts"]
    severities = Counter(finding["severity"] for finding in result["findings"])
    plots = [
        {"title": name, "svg": histogram(values, (marks or {}).get(name))}
        for name, values in distributions.items()
        if len(values) and values.min() < values.max()
    ]
    return write_page(
        "doctor.jinja",
        folder,
        title,
        {**dict(_facts(facts)), **(about or {})},
        counts=[(severities[name], name) for name in ("error", "warning")],
        facts=facts,
        findings=[{**finding, "counted": _count(finding)} for finding in result["findings"]],
        plots=plots,
        galleries={title: groups for title, groups in galleries.items() if groups},
    )


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the facts as lines: a name and a text."""
    shards = plural(facts["shards"], "shard")
    if facts["shards that can be read"] < facts["shards"]:
        shards += f", {facts['shards that can be read']:,} of which can be read"
    if "samples" not in facts:
        return [("examined", shards)]
    rest = (
        f", {facts['samples']:,} samples, {facts['pairs']:,} pairs of image and caption, {facts['bytes'] / 1e6:,.1f} MB"
    )
    inspected = f"{facts['looked at']:,} of {facts['pairs']:,} pairs"
    if facts["seed"] is not None:
        inspected += (
            f", drawn with seed {facts['seed']}: findings about images and captions refer to these pairs; --all "
            "inspects every pair"
        )
    lines = [("examined", shards + rest), ("looked at", inspected)]
    if facts["images"]:
        lines.append(("images", ", ".join(f"{n:,} .{name}" for name, n in facts["images"].items())))
    for item in facts["against"]:
        images, captions = item["of these among those looked at"], item["of these captions in both"]
        shared = f"{images:,} of {item['images']:,} images and {captions:,} of {item['different captions']:,}"
        lines.append((f"in {item['name']} too", f"{shared} different captions"))
    return lines


def _count(finding: Mapping[str, Any]) -> str:
    """Return the count of a finding, its share, and an estimate for the whole data set if a sample was drawn."""
    text = f"{finding['count']:,} of {finding['of']:,} {finding['unit']} ({percent(finding['share'])})"
    if finding["estimate"]:
        estimate, low, high = finding["estimate"]
        text += f", about {estimate:,} of all pairs (95% interval {low:,} to {high:,})"
    return text
