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
from jinja2 import Environment, StrictUndefined
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


def write_json(folder: str | os.PathLike[str], command: str, results: Sequence[Result]) -> None:
    """Writes `<command>.json` into a folder, made if missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{command}.json").write_text(json.dumps(list(results), indent=2) + "\n", "utf-8")


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
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"number": _number, "uri": _uri, "breakable": _breakable}
    page = environment.from_string(Path(__file__).with_name("report.jinja").read_text("utf-8"))
    html = page.render(
        title=title,
        about={
            "command": shlex.join(["dualenc", *sys.argv[1:]]),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            **({"model": sections[0].result["model"]} if sections else {}),
            **(about or {}),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
            "versions": ", ".join(f"{name} {version(name)}" for name in ("dualenc", "torch", "timm"))
            + f", Python {platform.python_version()}",
        },
        sections=[_section(section) for section in sections],
        headlines=[headline for section in sections for headline in _headlines(section.result)],
        curves=_curves(Path(curves)) if curves is not None and Path(curves).exists() else [],
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / "report.html"
    path.write_text(html, "utf-8")
    return path


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
