"""Results to a table, to JSON and to a page that stands by itself."""

import csv
import io
import json
import os
import platform
import shlex
import sys
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

# dataset, model, n, complete, metrics, intervals, chance: see Embedder.evaluate
Result = dict[str, Any]

CURVES = ("acc1", "acc5", "mean_average_precision", "image_retrieval_recall@1", "image_retrieval_recall@10")
HEADLINES = ("acc1", "mean_average_precision", "image_retrieval_recall@1", "image_retrieval_recall@10")
WHOLE_MATRIX = 50  # classes; beyond, an overview and the worst of it
ALL_BARS, WORST, BEST = 60, 20, 10  # classes with a bar of their own; of more, so many of the two ends
LINES = ("#4a90d9", "#e08a3c", "#3fa66b", "#b867c6", "#d05a5a", "#8a8f98")  # seen on white and on black
INK = "#010203"  # becomes the colour of the text around a plot, whatever the page's is


@dataclass(frozen=True)
class Classes:
    """What each image was taken for.

    Attributes:
        names: of the classes.
        truth, predicted: (N,) class of each image.
        picture: a picture for the page, as JPEG or PNG.
    """

    names: Sequence[str]
    truth: np.ndarray
    predicted: np.ndarray
    picture: Callable[[int], bytes]


@dataclass(frozen=True)
class Labels:
    """One figure for each label, where an image has several."""

    names: Sequence[str]
    counts: np.ndarray  # (C,) images that have the label
    precision: np.ndarray  # (C,) average precision


@dataclass(frozen=True)
class Answers:
    """Some queries and what they found, by "text" (which look for an image) and by "image"."""

    captions: Sequence[str]
    answers: Mapping[str, Sequence[Any]]  # see dualenc.evaluation.Answer
    picture: Callable[[int], bytes]


@dataclass(frozen=True)
class Section:
    """One evaluation set: its figures, and what stands behind them."""

    result: Result
    findings: Classes | Labels | Answers


def print_table(results: Sequence[Result]) -> None:
    """Prints the metrics of each data set, with intervals and what chance would give."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for result in results:
        console.print(f"[bold]{escape(result['dataset'])}[/bold], {result['n']:,} images", highlight=False)
        table = Table("metric", "value", "95% interval", "by chance", box=None, pad_edge=False)
        for name, value in result["metrics"].items():
            low_high = result["intervals"].get(name)
            interval = "{} to {}".format(*map(_number, low_high)) if low_high else ""
            table.add_row(name, _number(value), interval, _number(result["chance"][name]))
        console.print(table)


def write_json(folder: str | os.PathLike[str], command: str, results: Sequence[Result] | Mapping[str, Any]) -> None:
    """Writes `<command>.json` into a folder, made if missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{command}.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")


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
    return _write_page(
        "report_sets.jinja",
        folder,
        title,
        {**({"model": sections[0].result["model"]} if sections else {}), **(about or {})},
        sections=[_section(section) for section in sections],
        headlines=[headline for section in sections for headline in _headlines(section.result)],
        curves=_curves(Path(curves)) if curves is not None and Path(curves).exists() else [],
    )


def _write_page(
    template: str, folder: str | os.PathLike[str], title: str, about: dict[str, Any], **values: Any
) -> Path:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"number": _number, "uri": _uri, "breakable": _breakable, "figure": _figure}
    html = environment.get_template(template).render(
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
    path.write_text(html, "utf-8")
    return path


def print_examination(result: Mapping[str, Any]) -> None:
    """Prints what `dualenc.data.doctor` found: what the data is, then what is the matter with it.

    Args:
        result: facts and findings.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:  # lines stay whole for those who search in them
        console.width = 100_000
    facts = _facts(result["facts"])
    for name, value in facts:
        console.print(Text(f"{name:{max(len(name) for name, _ in facts)}}  {value}"))
    if quantiles := result["facts"].get("quantiles"):
        table = Table("", *next(iter(quantiles.values())), box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, values in quantiles.items():
            table.add_row(name, *map(_figure, values.values()))
        console.print("", table)
    console.print()
    for finding in result["findings"]:
        style = {"error": "bold red", "warning": "bold yellow", "info": "bold blue"}[finding["severity"]]
        head = f"{finding['what']}: {_counted(finding)}"
        console.print(Text.assemble((f"{finding['severity']:9}", style), head))
        shown = finding["examples"] if finding["unit"].startswith("shards") else finding["examples"][:3]
        for example in shown:
            console.print(Padding.indent(Text(example, style="dim"), 11))
        console.print(Padding.indent(Text(finding["advice"]), 9))
    if not result["findings"]:
        console.print("nothing found that would hurt a run")


def write_examination(
    folder: str | os.PathLike[str],
    title: str,
    result: Mapping[str, Any],
    distributions: Mapping[str, np.ndarray],
    galleries: Mapping[str, Sequence[Sequence[tuple[str, bytes]]]],
    about: Mapping[str, Any] | None = None,
    marks: Mapping[str, float] | None = None,
) -> Path:
    """Writes `report.html` on what `dualenc.data.doctor` found; see `write_report`.

    Args:
        folder: where to.
        title: of the page.
        result: facts and findings.
        distributions: values by name.
        galleries: by title, groups of pictures to be seen together, each with what to say of it.
        about: what else was run, by name.
        marks: a value of a distribution to be marked.
    """
    facts = result["facts"]
    severities = Counter(finding["severity"] for finding in result["findings"])
    plots = [
        {"title": name, "svg": _svg(partial(_plot_histogram, values, (marks or {}).get(name)), 4.4, 2.2)}
        for name, values in distributions.items()
        if len(values) and values.min() < values.max()
    ]
    return _write_page(
        "report_doctor.jinja",
        folder,
        title,
        {**dict(_facts(facts)), **(about or {})},
        counts=[(severities[name], name) for name in ("error", "warning")],
        facts=facts,
        findings=[{**finding, "counted": _counted(finding)} for finding in result["findings"]],
        plots=plots,
        galleries={title: groups for title, groups in galleries.items() if groups},
    )


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures in words."""
    shards = f"{facts['shards']:,} shard{'s' * (facts['shards'] != 1)}"
    if facts["shards that can be read"] < facts["shards"]:
        shards += f", {facts['shards that can be read']:,} of which can be read"
    if "samples" not in facts:
        return [("examined", shards)]
    rest = (
        f", {facts['samples']:,} samples, {facts['pairs']:,} pairs of image and caption, {facts['bytes'] / 1e6:,.1f} MB"
    )
    looked = f"{facts['looked at']:,} of {facts['pairs']:,} pairs"
    if facts["seed"] is not None:
        looked += (
            f", drawn by seed {facts['seed']}: what is said of images and captions is of these; --all looks at all"
        )
    lines = [("examined", shards + rest), ("looked at", looked)]
    if facts["images"]:
        lines.append(("images", ", ".join(f"{n:,} .{name}" for name, n in facts["images"].items())))
    for item in facts["against"]:
        of_images, of_captions = item["of these among those looked at"], item["of these captions in both"]
        both = f"{of_images:,} of {item['images']:,} images and {of_captions:,} of {item['different captions']:,}"
        lines.append((f"in {item['name']} too", f"{both} different captions"))
    return lines


def _counted(finding: Mapping[str, Any]) -> str:
    """How many of how many, and how many that makes of all."""
    text = f"{finding['count']:,} of {finding['of']:,} {finding['unit']} ({_percent(finding['share'])})"
    if finding["estimate"]:
        about, low, high = finding["estimate"]
        text += f", of all pairs about {about:,} (95% interval {low:,} to {high:,})"
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def _figure(value: float) -> str:
    """Whole numbers as such, others with two decimals while they are small."""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:,.2f}"


def _number(value: float) -> str:
    """Shares with three decimals, small ones with two digits that count, ranks with one decimal."""
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:,.1f}"


def _breakable(name: str) -> Markup:
    """May go on in a new line after an underscore, as on a phone it must."""
    return escape(name).replace("_", Markup("_<wbr>"))


def _uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{b64encode(picture).decode()}"


def _headlines(result: Result) -> list[dict[str, Any]]:
    return [{"dataset": result["dataset"], **row} for row in _rows(result) if row["name"] in HEADLINES]


def _rows(result: Result) -> list[dict[str, Any]]:
    """Each metric with its interval, and where it lies on a scale from 0 to 1."""
    return [
        {
            "name": name,
            "value": value,
            "interval": result["intervals"].get(name),
            "chance": result["chance"][name],
            "share": name != "median_rank",
        }
        for name, value in result["metrics"].items()
    ]


def _section(section: Section) -> dict[str, Any]:
    found = section.findings
    page: dict[str, Any] = {"result": section.result, "rows": _rows(section.result)}
    if isinstance(found, Classes):
        return page | _classes(found)
    if isinstance(found, Labels):
        bars = [
            {"name": name, "value": float(value), "n": int(n)}
            for name, value, n in zip(found.names, found.precision, found.counts)
        ]
        return page | {"bars": _worst_first(bars), "of": "average precision"}
    galleries = [_gallery(found, asked) for asked in ("text", "image")]
    return page | {"galleries": [gallery for gallery in galleries if gallery["answers"]]}


def _worst_first(bars: list[dict[str, Any]]) -> dict[str, Any]:
    """All bars in order, and those to show at once; classes without images are only counted."""
    known = sorted((bar for bar in bars if bar["n"]), key=lambda bar: bar["value"])
    few = len(known) <= ALL_BARS
    return {
        "all": known,
        "worst": known if few else known[:WORST],
        "best": [] if few else known[-BEST:],
        "without": len(bars) - len(known),
        "spread": _spread([bar["value"] for bar in known]) if not few else None,
    }


def _classes(found: Classes) -> dict[str, Any]:
    names, count = list(found.names), len(found.names)
    pairs = Counter(zip(found.truth.tolist(), found.predicted.tolist()))
    total = np.bincount(found.truth, minlength=count)
    bars = [
        {"name": name, "value": pairs[c, c] / max(1, int(total[c])), "n": int(total[c])} for c, name in enumerate(names)
    ]
    # The most frequent mistakes; of equally frequent ones those of the smallest classes.
    wrong = sorted(
        ((n, -int(total[a]), a, b) for (a, b), n in pairs.items() if a != b), key=lambda item: (-item[0], -item[1])
    )
    confusions = [
        {
            "truth": names[a],
            "predicted": names[b],
            "n": n,
            "of": -of,
            "pictures": [
                found.picture(int(i)) for i in np.flatnonzero((found.truth == a) & (found.predicted == b))[:4]
            ],
        }
        for n, of, a, b in wrong[:8]
    ]
    if count <= WHOLE_MATRIX:
        shown, overview = list(range(count)), None
    else:
        shown = sorted(list(dict.fromkeys(c for _, _, a, b in wrong for c in (a, b)))[:24])
        overview = _overview(pairs, total)
    matrix = {
        "names": [names[c] for c in shown],
        "rows": [(names[a], [(pairs[a, b], pairs[a, b] / total[a]) for b in shown]) for a in shown if total[a]],
        "overview": overview,
        "classes": count,
    }
    return {"bars": _worst_first(bars), "of": "right", "confusions": confusions, "matrix": matrix if shown else None}


def _overview(pairs: Mapping[tuple[int, int], int], total: np.ndarray, most: int = 250) -> bytes:
    """Shares of each class's images, truth down, answer across; of many classes the largest share in each cell."""
    cells = min(most, len(total))
    at = np.arange(len(total)) * cells // len(total)
    share = np.zeros((cells, cells))
    for (a, b), n in pairs.items():
        share[at[a], at[b]] = max(share[at[a], at[b]], n / total[a])
    pixels = np.zeros((cells, cells, 4), np.uint8)
    pixels[..., :3] = (74, 144, 217)  # opacity says how much, so that it reads on light and on dark
    pixels[..., 3] = np.sqrt(share) * 255  # single mistakes would not be seen otherwise
    side = max(1, round(480 / cells))
    return _png(Image.fromarray(pixels).resize((cells * side, cells * side), Image.Resampling.NEAREST))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _gallery(found: Answers, asked: str) -> dict[str, Any]:
    """Queries with what they found; each item is a caption or a picture."""

    def item(i: int, kind: str) -> dict[str, Any]:
        return {"picture": found.picture(i)} if kind == "image" else {"caption": found.captions[i]}

    other = "text" if asked == "image" else "image"
    return {
        "asked": asked,
        "answers": [
            {
                "query": item(answer.query, asked),
                "rank": answer.rank,
                "best": [
                    item(i, other) | {"score": score, "right": i in answer.right}
                    for i, score in zip(answer.best, answer.scores)
                ],
                "right": None if answer.rank < len(answer.best) else item(answer.right[0], other),
            }
            for answer in found.answers[asked]
        ],
    }


def _curves(path: Path) -> list[dict[str, Any]]:
    """Plots of a run's `metrics.csv`: loss, then what was measured on each set, then the rest of training."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            series[row["metric"]].append((int(row["step"]), float(row["value"])))
    sets = dict.fromkeys(name.rpartition("/")[0] for name in series if not name.startswith(("train/", "test/")))
    groups = {"loss": ["train/loss", "val/loss"]}
    for name in sets:
        shares = [m for m in series if m.rpartition("/")[0] == name and m.rpartition("/")[2] in CURVES]
        groups["held-out pairs" if name == "val" else name] = shares
    groups["learning rate"] = ["train/lr"]
    groups["temperature (logit scale)"] = ["train/logit_scale"]
    groups["gradient norm before clipping"] = ["train/grad_norm"]
    groups["samples a second"] = ["train/samples_per_second"]
    plots = []
    for title, names in groups.items():
        lines = {name.rpartition("/")[2] if title != "loss" else name: series[name] for name in names if series[name]}
        if lines:
            plots.append({"title": title, "svg": _svg(partial(_plot_lines, lines), 4.4, 2.9)})
    return plots


def _plot_lines(lines: Mapping[str, list[tuple[int, float]]], axes: Any) -> None:
    for (name, points), colour in zip(lines.items(), LINES):
        x, y = zip(*points)
        axes.plot(x, y, color=colour, label=name, linewidth=1.6, marker="o" if len(x) < 25 else None, markersize=3)
    axes.set_xlabel("step")
    if min(value for points in lines.values() for _, value in points) >= 0:
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def _plot_histogram(values: np.ndarray, mark: float | None, axes: Any) -> None:
    """How many there are of each size; of what spans more than a factor of 100, on a logarithmic scale."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iu"
    if low > 0 and high / low > 100:
        bins = np.geomspace(low, high, 40)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 1000 else (1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        bins = np.arange(low, high + 2) - 0.5 if whole and high - low < 60 else np.linspace(low, high, 40)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    axes.hist(values, bins=bins, color=LINES[0])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.10g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if mark is not None:
        axes.axvline(mark, color=LINES[1], linewidth=1.6, label=f"cut at {mark:,.0f}")
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def _spread(values: Sequence[float]) -> Markup:
    def plot(axes: Any) -> None:
        axes.hist(values, bins=20, range=(0, 1), color=LINES[0])
        axes.set_xlabel("share right")
        axes.set_ylabel("classes")

    return _svg(plot, 4.4, 1.9)


def _svg(draw: Callable[[Any], None], width: float, height: float) -> Markup:
    """A plot to stand in the page, its text and axes in the colour of the page's text."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.12,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :].replace(INK, "currentColor"))
