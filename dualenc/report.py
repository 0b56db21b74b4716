"""Results to a table, to JSON and to a page that stands by itself."""

import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment

Result = dict[str, Any]  # dataset, model, n, complete, metrics, intervals: see Embedder.evaluate

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ command }}: {{ results[0].model }}</title>
<style>
:root { color-scheme: light dark; --line: #8886; --soft: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; }
td.number { text-align: right; }
img { max-width: 100%; background: #fff; border-radius: .4rem; }
.soft, footer { color: var(--soft); font-size: .9rem; }
code { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ command }}</h1>
<p class="soft">Model <code>{{ results[0].model }}</code></p>
{% for result in results %}
<h2>{{ result.dataset }}</h2>
<p>{{ "{:,}".format(result.n) }} images{% if not result.complete %}, <strong>not complete</strong>{% endif %}.</p>
<div class="scroll"><table>
<tr><th>metric</th><th>value</th><th>95% interval</th></tr>
{% for name, value in result.metrics.items() %}
<tr><td>{{ name }}</td><td class="number">{{ "%.4g"|format(value) }}</td>
<td>{% if name in result.intervals %}{{ "%.4g"|format(result.intervals[name][0]) }} to
{{ "%.4g"|format(result.intervals[name][1]) }}{% endif %}</td></tr>
{% endfor %}
</table></div>
{% if plots[loop.index0] %}<p><img alt="metrics of {{ result.dataset }} with 95% intervals"
src="data:image/png;base64,{{ plots[loop.index0] }}"></p>{% endif %}
{% endfor %}
<footer><p>Intervals are percentile bootstrap over images. Made by <code>{{ line }}</code> with dualenc {{ version }},
Python {{ python }}, {{ date }}.</p></footer>
</body>
</html>
"""


def print_table(results: Sequence[Result]) -> None:
    """Prints the metrics of each data set, with intervals."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for result in results:
        console.print(f"[bold]{escape(result['dataset'])}[/bold], {result['n']:,} images", highlight=False)
        table = Table("metric", "value", "95% interval", box=None, pad_edge=False)
        for name, value in result["metrics"].items():
            low_high = result["intervals"].get(name)
            table.add_row(name, f"{value:.4g}", "{:.4g} to {:.4g}".format(*low_high) if low_high else "")
        console.print(table)


def write_json(folder: str | os.PathLike[str], command: str, results: Sequence[Result]) -> None:
    """Writes `<command>.json` into a folder, made if missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{command}.json").write_text(json.dumps(list(results), indent=2) + "\n", "utf-8")


def write_report(folder: str | os.PathLike[str], command: str, results: Sequence[Result]) -> None:
    """Writes `report.html`, one file that needs nothing else, into a folder, made if missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    page = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    html = page.render(
        command=command,
        results=results,
        plots=[_plot(result) for result in results],
        line=shlex.join(["dualenc", *sys.argv[1:]]),
        version=version("dualenc"),
        python=platform.python_version(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    (Path(folder) / "report.html").write_text(html, "utf-8")


def _plot(result: Result) -> str | None:
    """The metrics that have an interval, as a PNG in base64."""
    from base64 import b64encode

    from matplotlib.figure import Figure

    names = [name for name in result["metrics"] if name in result["intervals"]]
    if not names:
        return None
    values = [result["metrics"][name] for name in names]
    bounds = [result["intervals"][name] for name in names]
    figure = Figure(figsize=(8, 0.6 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    errors = [
        [max(0.0, v - b[0]) for v, b in zip(values, bounds)],
        [max(0.0, b[1] - v) for v, b in zip(values, bounds)],
    ]
    axes.barh(names, values, xerr=errors, color="#4c78a8", ecolor="#222", capsize=3, height=0.6)
    axes.invert_yaxis()
    axes.set_xlim(0, min(1.0, 1.1 * max(b[1] for b in bounds)) or 1.0)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return b64encode(buffer.getvalue()).decode()
