"""Plots as inline SVG of a page, readable on a light and on a dark background."""

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from markupsafe import Markup

from dualenc.report.formatting import number
from dualenc.report.model import Points

# Metrics that share one plot for each evaluation set, since their values are of about the same size.
CURVES = (
    "acc1", "acc5", "mean_average_precision", "image_retrieval_recall@1", "image_retrieval_recall@10", "accuracy",
    "baseline_accuracy", "spearman", "auroc", "first_recall@1",
)  # fmt: skip
LINE_COLORS = ("#4a90d9", "#e08a3c", "#3fa66b", "#b867c6", "#d05a5a", "#8a8f98")  # Visible on white and on black.
INK = "#010203"  # Placeholder that is replaced by the page's text color.
COLORS = 10  # Classes with their own color on a map; style.css defines the same number.
PAIRS = 200  # Most lines between pairs on a map; more would blur into a gray area.
ROUNDS = 8  # Number of rounds over all classes in which points are drawn, so that no class covers the others.


def curves(path: Path, metrics: Mapping[str, bool] = MappingProxyType({})) -> list[dict[str, Any]]:
    """Plot a run's `metrics.csv`: the loss, then the metrics of each set, then the rest of training.

    Args:
        path: Path of `metrics.csv`.
        metrics: metrics of the sets to plot besides `CURVES`; the value is False for one that needs its own plot.

    Returns:
        `title` and `svg` of each plot.
    """
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            series[row["metric"]].append((int(row["step"]), float(row["value"])))
    plots = []
    for title, names in _groups(list(series), metrics).items():
        own = [name for name in names if name in series]
        lines = [(name if title == "loss" else name.rpartition("/")[2], series[name]) for name in own]
        parts = [lines[i : i + len(LINE_COLORS)] for i in range(0, len(lines), len(LINE_COLORS))]
        for i, part in enumerate(parts, 1):
            shown = title if len(parts) == 1 else f"{title}, {i} of {len(parts)}"
            plots.append({"title": shown, "svg": _svg(partial(_lines, dict(part)), 4.4, 2.9)})
    return plots


def _groups(series: Sequence[str], metrics: Mapping[str, bool]) -> dict[str, list[str]]:
    """Return the names of the series that share a plot, by the plot's title; see `curves`."""
    shares_plot = {"perplexity": False, **metrics, **dict.fromkeys(CURVES, True)}
    sets = dict.fromkeys(name.rpartition("/")[0] for name in series if not name.startswith(("train/", "test/")))
    groups = {"loss": ["train/loss", "val/loss"]}
    for name in sets:
        own = [m for m in series if m.rpartition("/")[0] == name]
        title = "held-out pairs" if name == "val" else f"{name[4:]}, held out" if name.startswith("val/") else name
        groups[title] = [m for m in own if shares_plot.get(m.rpartition("/")[2])]
        for metric in (metric for metric, together in shares_plot.items() if not together):
            groups[f"{title}: {metric}"] = [m for m in own if m.endswith(f"/{metric}")]
        # The loss of a head next to the one that training logs of it.
        own_losses = [m for m in own if m.endswith("/loss") and m not in groups["loss"]]
        groups["loss"] += [m for one in own_losses for m in (f"train/{one.removeprefix('val/')}", one) if m in series]
    groups["learning rate"] = ["train/lr"]
    groups["temperature (logit scale)"] = ["train/logit_scale"]
    groups["gradient norm before clipping"] = ["train/grad_norm"]
    groups["samples per second"] = ["train/samples_per_second"]
    return groups


def _lines(lines: Mapping[str, list[tuple[int, float]]], axes: Any) -> None:
    """Draw lines through (step, value) by name; few points are marked, and a single one shows its value.

    Args:
        lines: one line for each of `LINE_COLORS` at most.
        axes: axes to draw on.
    """
    for (name, points), color in zip(lines.items(), LINE_COLORS, strict=False):
        x, y = zip(*points)
        mark = {"marker": "o", "markersize": 5 if len(x) == 1 else 3} if len(x) < 25 else {}
        label = f"{name}  {number(y[0])}" if len(x) == 1 and len(lines) > 1 else name
        axes.plot(x, y, color=color, label=label, linewidth=1.6, **mark)
        if len(lines) == len(points) == 1:
            axes.annotate(number(points[0][1]), points[0], (0, 7), textcoords="offset points", ha="center", color=INK)
    if len(steps := {step for points in lines.values() for step, _ in points}) == 1:
        axes.set_xticks(list(steps))
        axes.set_xlim(min(steps) - 1, min(steps) + 1)
    axes.set_xlabel("step")
    values = [value for points in lines.values() for _, value in points if math.isfinite(value)]
    if values and min(values) >= 0:
        axes.set_ylim(0, 1.1 * max(values) or 1)
    if len(lines) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def histogram(values: np.ndarray, mark: float | None = None, part: np.ndarray | None = None) -> Markup:
    """Plot the histogram of some values, on a logarithmic axis if they span more than a factor of 100.

    Args:
        values: the values (N,).
        mark: value at which a vertical line is drawn; None for no line.
        part: values (K,) of those that a filter keeps, which are drawn in front; None for no filter.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    def draw(axes: Any) -> None:
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
        if part is None:
            axes.hist(values, bins=bins, color=LINE_COLORS[0])
        else:
            axes.hist(values, bins=bins, color=LINE_COLORS[5], alpha=0.45, label="before")
            axes.hist(part, bins=bins, color=LINE_COLORS[0], label="after")
            axes.legend(frameon=False, labelcolor=INK, fontsize=9)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if mark is not None:
            axes.axvline(mark, color=LINE_COLORS[1], linewidth=1.6, label=f"cut at {mark:,.0f}")
            axes.legend(frameon=False, labelcolor=INK, fontsize=9)

    return _svg(draw, 4.4, 2.2)


def spread(values: Sequence[float]) -> Markup:
    """Plot the histogram of the accuracies of classes, which shows how far they spread."""

    def draw(axes: Any) -> None:
        axes.hist(values, bins=20, range=(0, 1), color=LINE_COLORS[0])
        axes.set_xlabel("accuracy")
        axes.set_ylabel("classes")

    return _svg(draw, 4.4, 1.9)


def reliability(bins: Sequence[Sequence[float]]) -> Markup:
    """Plot accuracy over confidence (Guo et al. 2017, figure 1); a calibrated model lies on the diagonal.

    Args:
        bins: confidence, accuracy and count of each bin; the area of a dot shows the count.
    """
    confidence, accuracy, count = np.array([row for row in bins if row[2]], dtype=float).T

    def draw(axes: Any) -> None:
        axes.plot((0, 1), (0, 1), color=INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 3)))
        axes.vlines(confidence, confidence, accuracy, color=LINE_COLORS[1], linewidth=1.4)
        axes.scatter(
            confidence, accuracy, s=10 + 110 * count / count.max(), color=LINE_COLORS[0], zorder=3, clip_on=False
        )
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="confidence", ylabel="accuracy")
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.set_yticks(np.linspace(0, 1, 6))

    return _svg(draw, 3.3, 3.1)


def embedding_map(points: Points) -> Markup:
    """Draw points in the colors of their classes, and the name of each class near the center of its points.

    Only the `COLORS` classes with the most points have a color and a name.

    The SVG is written by hand. A point takes 11 bytes and its color from the page; a plotting library takes 150 bytes,
    with one color for light and dark pages.
    """
    label, xy = np.asarray(points.label), np.asarray(points.xy, dtype=float)
    count = np.bincount(label, minlength=len(points.names))
    colored = np.argsort(-count, kind="stable")[:COLORS]
    colored = np.sort(colored[count[colored] > 0])
    low, size = xy.min(0), np.maximum(np.ptp(xy, axis=0), 1e-12)
    # The map is 1000 units wide, with a margin of 30 on each side. Both axes have the same scale; the limits on the
    # height keep the plot from becoming a strip.
    height = int(np.clip(940 * size[1] / size[0], 440, 740)) + 60
    scale = min(940 / size[0], (height - 60) / size[1])
    middle = np.array([500, height / 2])
    at = (xy - low - size / 2) * (scale, -scale) + middle  # (M, 2), y points down
    coords = np.rint(at).astype(int).tolist()

    svg = [Markup('<svg viewBox="0 0 1000 {}" role="img" aria-label="embeddings in the plane">').format(height)]
    if points.pairs is not None and len(points.pairs):
        shown = np.asarray(points.pairs)[:: math.ceil(len(points.pairs) / PAIRS)].tolist()
        lines = "".join("M{} {}L{} {}".format(*coords[i], *coords[j]) for i, j in shown)
        svg.append(Markup('<path class="pair" d="{}"/>').format(lines))
    classes = [(color, np.flatnonzero(label == c)) for color, c in enumerate(colored)]
    rest = np.flatnonzero(~np.isin(label, colored))
    if len(rest):
        svg.append(Markup('<path class="rest" d="{}"/>').format(_dots(coords, rest)))
    for part in range(ROUNDS):
        for color, rows in classes:
            if len(share := rows[part::ROUNDS]):
                svg.append(Markup('<path class="c{}" d="{}"/>').format(color, _dots(coords, share)))
    names = [points.names[int(c)] for c in colored]
    centers = [tuple(at[rows].mean(0).tolist()) for _, rows in classes]
    positions = _label_positions(names, centers, height)
    for color, (center, (x, y)) in enumerate(zip(centers, positions)):
        if math.dist(center, (x, y)) > 30:  # A line connects a name with points that are far from it.
            line = "M{:.0f} {:.0f}L{:.0f} {:.0f}".format(*center, x, y)
            svg.append(Markup('<path class="c{} leader" d="{}"/>').format(color, line))
    svg.append(Markup("</svg>"))
    for color, (name, (x, y)) in enumerate(zip(names, positions)):
        svg.append(
            Markup('<span class="c{}" style="left:{:.1f}%;top:{:.1f}%" title="{}">{}</span>').format(
                color, x / 10, 100 * y / height, name, name
            )
        )
    return Markup('<div class="map">{}</div>').format(Markup("").join(svg))


def _dots(coords: list[list[int]], rows: np.ndarray) -> str:
    """Return an SVG path of lines of length 0, which a round line cap draws as dots."""
    return "".join("M{} {}h0".format(*coords[i]) for i in rows.tolist())


def _label_positions(
    names: Sequence[str], centers: Sequence[tuple[float, float]], height: int
) -> list[tuple[float, float]]:
    """Place names near their centers such that none covers another on a map that is as narrow as a phone."""
    pixel = 1000 / 340  # units of the map per pixel, on a phone that shows it 340 pixels wide
    line = 16 * pixel  # height of a line of text
    moves = [(across * 2 * line, down * line / 2) for across in range(-4, 5) for down in range(-12, 13)]
    moves.sort(key=lambda move: math.hypot(*move))
    placed: list[tuple[float, float, float]] = []  # x, y, half the width
    for name, (x, y) in zip(names, centers):
        # A letter is about 7 pixels wide.
        half = min(len(name) * 7 + 6, 120) / 2 * pixel  # style.css has the same limit.
        for across, down in moves:
            at = min(max(x + across, half), 1000 - half), min(max(y + down, line / 2), height - line / 2)
            if all(abs(at[0] - x) >= half + wide or abs(at[1] - y) >= line for x, y, wide in placed):
                break
        else:
            at = x, y
        placed.append((*at, half))
    return [(x, y) for x, y, _ in placed]


def _svg(draw: Callable[[Any], None], width: float, height: float) -> Markup:
    """Return a plot as inline SVG, its text and axes in the color of the page's text.

    Args:
        draw: function that draws on the axes.
        width: width in inches.
        height: height in inches.
    """
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
    # Inline SVG needs neither the namespaces, which look like links, nor the metadata with program and date.
    text = re.sub(r"<metadata>.*?</metadata>| xmlns(:\w+)?=\"[^\"]*\"", "", text[text.index("<svg") :], flags=re.DOTALL)
    return Markup(text.replace(INK, "currentColor"))
