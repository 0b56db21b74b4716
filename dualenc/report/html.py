"""Pages that stand by themselves."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment

from dualenc.report import formatting as words
from dualenc.report.comparison import of_comparison
from dualenc.report.model import Comparison, Section
from dualenc.report.plots import curves as plot_curves
from dualenc.report.sections import headlines, of_section
from dualenc.report.templates import templates
from dualenc.utils.files import write_text


def write_report(
    folder: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    about: Mapping[str, Any] | None = None,
    curves: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes `report.html`, one file that needs nothing else, into a folder, made if missing.

    Args:
        folder: where to.
        title: of the page.
        sections: the evaluation sets.
        about: what else was run, by name.
        curves: a run's `metrics.csv`.

    Returns:
        The file.
    """
    return write_page(
        "sets.jinja",
        folder,
        title,
        {**({"model": sections[0].result["model"]} if sections else {}), **(about or {})},
        sections=[of_section(section) for section in sections],
        headlines=[headlines(section.result) for section in sections],
        curves=plot_curves(Path(curves)) if curves is not None and Path(curves).exists() else [],
    )


def write_comparison(
    folder: str | os.PathLike[str],
    title: str,
    comparisons: Sequence[Comparison],
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `report.html` on the difference of two models; see `write_report`.

    Args:
        folder: where to.
        title: of the page.
        comparisons: of the same two models, one for each evaluation set.
        about: what else was run, by name.
    """
    models = {"A": comparisons[0].result["first"], "B": comparisons[0].result["second"]} if comparisons else {}
    pages = [of_comparison(comparison) for comparison in comparisons]
    return write_page("comparison.jinja", folder, title, {**models, **(about or {})}, comparisons=pages)


def write_page(
    template: str, folder: str | os.PathLike[str], title: str, about: Mapping[str, Any], **values: Any
) -> Path:
    """Fills a template of this folder and writes `report.html`."""
    html = (
        _templates()
        .get_template(template)
        .render(
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
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / "report.html"
    write_text(path, html)
    return path


@cache
def _templates() -> Environment:
    environment = templates(autoescape=True)
    environment.filters |= {
        name: getattr(words, name) for name in ("number", "change", "uri", "breakable", "figure", "percent")
    }
    return environment
