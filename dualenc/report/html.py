"""Pages of one file each."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dualenc.report.comparison import of_comparison
from dualenc.report.model import Comparison, Section
from dualenc.report.plots import curves as plot_curves
from dualenc.report.render import render
from dualenc.report.sections import of_section
from dualenc.utils.files import write_text


def write_report(
    folder: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    about: Mapping[str, Any] | None = None,
    curves: str | os.PathLike[str] | None = None,
) -> Path:
    """Write `report.html`, one file that loads nothing else, into a folder, made if missing.

    Args:
        folder: folder of the page.
        title: title of the page.
        sections: evaluation sets.
        about: further facts about the work, by name.
        curves: `metrics.csv` of a run.

    Returns:
        Path of the file.
    """
    pages = [of_section(section) for section in sections]
    if len({section.result["model"] for section in sections}) > 1:
        for page in pages:
            page["model"] = page["result"]["model"]
    headlines = {row["name"]: row["share"] for page in pages for row in page["rows"] if row["headline"]}
    return write_page(
        "sets.jinja",
        folder,
        title,
        {**({"model": sections[0].result["model"]} if sections else {}), **(about or {})},
        sections=pages,
        curves=plot_curves(Path(curves), headlines) if curves is not None and Path(curves).exists() else [],
    )


def write_comparison(
    folder: str | os.PathLike[str],
    title: str,
    comparisons: Sequence[Comparison],
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write `report.html` on the differences of two models; see `write_report`.

    Args:
        folder: folder of the page.
        title: title of the page.
        comparisons: evaluation sets, all of the same two models.
        about: further facts about the work, by name.
    """
    models = {"A": comparisons[0].result["first"], "B": comparisons[0].result["second"]} if comparisons else {}
    pages = [of_comparison(comparison) for comparison in comparisons]
    return write_page("comparison.jinja", folder, title, {**models, **(about or {})}, comparisons=pages)


def write_page(
    template: str, folder: str | os.PathLike[str], title: str, about: Mapping[str, Any], **values: Any
) -> Path:
    """Fill a template of this package and write `report.html`.

    Args:
        template: name of the template.
        folder: folder of the page, made if missing.
        title: title of the page.
        about: facts below the title, by name.
        values: further variables of the template.

    Returns:
        Path of the file.
    """
    html = render(
        template,
        title=title,
        about={
            "command": shlex.join(["dualenc", *sys.argv[1:]]),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            **about,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
            "versions": ", ".join(f"{name} {version(name)}" for name in ("dualenc", "torch", "timm"))
            + f", Python {platform.python_version()}",
        },
        **values,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / "report.html"
    write_text(path, html)
    return path
