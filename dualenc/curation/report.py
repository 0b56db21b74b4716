"""The report of a filter: a page with what each rule removes, and pictures of the pairs that it concerns."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from dualenc.curation.filter import FilterResult
from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.data.images import thumbnail
from dualenc.data.pairs import AUTO, captions_of, decode_sample
from dualenc.report.formatting import percent
from dualenc.report.html import write_page
from dualenc.report.plots import histogram
from dualenc.utils.errors import BadSample, DataError

SCORE = "clip_score"
PLOTTED = (SCORE, "tokens", "captions", "width", "height", "aspect")  # and the scores of further models
LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # quantiles of the score that have pictures
ROW = 6  # pictures at a quantile
GROUPS, MEMBERS = 12, 5  # groups of near duplicates that are shown, and pictures of each
LEAKS = 24  # pairs of a training and an evaluation picture that are shown
SHARE = 0.3  # of the pairs that two scorers are asked to agree on, as DataComp's best filter keeps
Show = Callable[[int, str], dict[str, Any]]  # a row and its label -> what the template shows
SIMILAR = 0.9  # near duplicates are shown from this similarity on where the filter removes none


def write_report(result: FilterResult, folder: str | os.PathLike[str], captions: str = AUTO) -> Path:
    """Write `report.html` about a filter into a folder, made if missing, and return its path.

    Args:
        result: result of the filter.
        folder: folder of the page.
        captions: source of the captions; see `captions_of`.
    """
    show = partial(_sample, result, captions)
    total, kept = len(result.kept), int(result.kept.sum())
    removed = total - kept
    cards = [
        ("pairs before", f"{total:,}"),
        ("pairs after", f"{kept:,}"),
        ("kept", percent(kept / total) if total else "none"),
    ]
    if result.leaks:
        cards.append(("pictures of evaluation sets", f"{len({leak.row for leak in result.leaks}):,}"))
    return write_page(
        "filter.jinja",
        folder,
        f"Filter of {Path(result.table).name}",
        {"table": result.table, **{name: value for name, value in result.threshold.items() if value is not None}},
        cards=cards,
        rules=[
            {"name": name, "removed": count, "share": count / max(total, 1), "alone": alone}
            for name, count, alone in result.removed()
        ],
        total=removed,
        share=removed / max(total, 1),
        plots=_plots(result),
        quantiles=_quantiles(result, show),
        scorers=[_scorers(result, name, show) for name in _further_scores(result.columns)],
        duplicates=_duplicates(result, show),
        leaks=_leaks(result, show),
    )


def _further_scores(columns: Mapping[str, np.ndarray]) -> list[str]:
    return [name for name in columns if name.startswith(f"{SCORE}_")]


def _plots(result: FilterResult) -> list[dict[str, Any]]:
    """Return a histogram of each column, before and after the filter."""
    plots = []
    for name in (*PLOTTED, *_further_scores(result.columns)):
        if name not in result.columns:
            continue
        values = result.columns[name]
        having = np.isfinite(values)
        before, after = values[having], values[having & result.kept]
        if name in ("tokens", "captions", "width", "height"):
            before, after = before.astype(np.int64), after.astype(np.int64)
        if len(before) and before.min() < before.max():
            plots.append({"title": name, "svg": histogram(before, part=after)})
    return plots


def _sample(result: FilterResult, captions: str, row: int, label: str) -> dict[str, Any]:
    """Return the picture of a sample with a label and its first caption; without a picture if it is broken."""
    sample, picture, text = result.shards[row], None, ""
    with suppress(BadSample):
        picture = thumbnail(decode_sample(sample))
    with suppress(BadSample, IndexError):
        text = captions_of(sample, captions)[0]
    return {"picture": picture, "label": label, "caption": text, "tone": "yes" if result.kept[row] else "no"}


def _state(result: FilterResult, row: int) -> str:
    return "kept" if result.kept[row] else "removed"


def _quantiles(result: FilterResult, show: Show) -> list[dict[str, Any]]:
    """Return the samples around each of the `LEVELS` of the score."""
    scores = result.columns.get(SCORE)
    if scores is None or not np.isfinite(scores).any():
        return []
    order = np.argsort(scores, kind="stable")[: int(np.isfinite(scores).sum())]  # NaN come last
    found = []
    for level in LEVELS:
        middle = round(level * (len(order) - 1))
        start = min(max(0, middle - ROW // 2), max(0, len(order) - ROW))
        rows = order[start : start + ROW].tolist()
        name = {0.0: "lowest", 0.5: "median", 1.0: "highest"}.get(level, f"quantile {level:g}")
        samples = [show(row, f"{scores[row]:.3f} {_state(result, row)}") for row in rows]
        found.append({"name": f"{name}: {scores[order[middle]]:.3f}", "samples": samples})
    return found


def _scorers(result: FilterResult, name: str, show: Show) -> dict[str, Any]:
    """Return how far two scores agree, and pairs on which they do not."""
    first, second = result.columns[SCORE], result.columns[name]
    rows = np.flatnonzero(np.isfinite(first) & np.isfinite(second))
    ranks = [np.argsort(np.argsort(values[rows], kind="stable")) for values in (first, second)]
    top = round(SHARE * len(rows))
    best = [rank >= len(rows) - top for rank in ranks]
    both = int((best[0] & best[1]).sum())
    difference = ranks[0] - ranks[1]
    ends = np.argsort(difference, kind="stable")
    sides = [rows[ends[::-1][:ROW]], rows[ends[:ROW]]]
    varies = len(rows) > 1
    return {
        "name": name,
        "correlation": float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if varies else 0.0,
        "n": max(len(rows), 1),
        "top": top,
        "both": both,
        "chance": round(SHARE * top),
        "counts": [
            ("best by both", "both", both),
            (f"best by {SCORE} alone", "a", top - both),
            (f"best by {name} alone", "b", top - both),
            ("neither", "", len(rows) - 2 * top + both),
        ],
        "samples": [[show(row, f"{first[row]:.3f}, {second[row]:.3f}") for row in side.tolist()] for side in sides],
    }


def find_groups(duplicate: np.ndarray, linked: np.ndarray) -> list[np.ndarray]:
    """Return the groups of rows that are linked to an earlier duplicate, the largest first.

    Args:
        duplicate: (N,) row of which each row is a duplicate, -1 for none.
        linked: (N,) bool, the links that count.
    """
    root = np.where(linked & (duplicate >= 0), duplicate, np.arange(len(duplicate))).astype(np.int64)
    while (root[root] != root).any():  # each step halves the length of the chains
        root = root[root]
    order = np.argsort(root, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(root[order])) + 1)
    return sorted((group for group in groups if len(group) > 1), key=len, reverse=True)


def _duplicates(result: FilterResult, show: Show) -> dict[str, Any] | None:
    """Return groups of near duplicates: the largest, and some of each similarity."""
    if not {"duplicate_row", "duplicate_similarity"} <= result.columns.keys():
        return None
    similarity = result.columns["duplicate_similarity"]
    cut = result.threshold.get("dedup")
    linked = np.nan_to_num(similarity, nan=-1.0) >= (SIMILAR if cut is None else cut)
    duplicate = np.nan_to_num(result.columns["duplicate_row"], nan=-1.0).astype(np.int64)
    groups = find_groups(duplicate, linked)
    if not groups:
        return None
    shown = groups[: GROUPS // 2]
    rest = groups[GROUPS // 2 :]
    shown += [rest[i] for i in np.unique(np.linspace(0, len(rest) - 1, GROUPS - len(shown)).astype(int)) if rest]
    samples = []
    for group in shown:
        rows = sorted(group.tolist(), key=lambda row: (linked[row], -similarity[row] if linked[row] else 0.0))
        labels = [
            f"{similarity[row]:.3f} {_state(result, row)}" if linked[row] else _state(result, row) for row in rows
        ]
        samples.append([show(row, label) for row, label in list(zip(rows, labels))[:MEMBERS]])
    count, least = sum(len(group) - 1 for group in groups), SIMILAR if cut is None else cut
    note = (
        f"{count:,} pairs are as similar as {least:g} or more to a better one, in {len(groups):,} groups, of which "
        f"{len(shown)} are shown with up to {MEMBERS} pictures each. The first of a group has the best score, the "
        "others have their similarity to a better one."
    )
    return {"note": note, "samples": samples}


def _leaks(result: FilterResult, show: Show) -> dict[str, Any] | None:
    """Return training pictures next to the pictures of evaluation sets that they repeat."""
    if not result.leaks:
        return None
    opened = cache(_open)
    leaks = sorted(result.leaks, key=lambda leak: (leak.equal, leak.similarity))
    # The least similar ones show whether the threshold is right; they come first.
    shown = [leaks[i] for i in np.unique(np.linspace(0, len(leaks) - 1, LEAKS).astype(int))]
    samples = []
    for leak in shown:
        what = "the same file" if leak.equal else f"similarity {leak.similarity:.3f}"
        other = {"picture": _evaluation_picture(opened(leak.set), leak.item), "caption": leak.key, "tone": "soft"}
        name = Path(leak.set).name
        samples.append([show(leak.row, f"{what}, {_state(result, leak.row)}"), {**other, "label": name}])
    rows, equal = len({leak.row for leak in result.leaks}), sum(leak.equal for leak in result.leaks)
    note = (
        f"{rows:,} training pictures are in an evaluation set: {equal:,} pairs are the same file, "
        f"{len(leaks) - equal:,} are similar. Each training picture is next to the one of the set, the least similar "
        f"first; {len(shown):,} of {len(leaks):,} pairs are shown."
    )
    return {"note": note, "samples": samples}


def _open(path: str) -> BenchmarkSet | None:
    try:
        return BenchmarkSet.open(path)
    except DataError:
        return None


def _evaluation_picture(data: BenchmarkSet | None, item: int) -> bytes | None:
    try:
        return None if data is None else thumbnail(data.source.decode(item))
    except BadSample:
        return None
