"""Results as files, and two of them compared item by item."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualenc.data import BenchmarkSet
from dualenc.evaluation.score import Evaluated, measures
from dualenc.report import Comparison, Ranked, TwoAnswers, TwoRankings
from dualenc.utils.errors import DataError
from dualenc.utils.files import atomic_write, write_json
from dualenc.utils.urls import is_remote

ITEMS = ".items.safetensors"
# What says which items these are, and what is right.
SAME = ("ids", "text_ids", "owner", "target", "targets", "classes", "group", "query", "unit")


class Result(NamedTuple):
    """One set's figures, and the items that they come from."""

    figures: dict[str, Any]
    items: dict[str, Tensor]


def write_results(
    folder: str | os.PathLike[str],
    command: str,
    found: Sequence[Evaluated],
    sets: Sequence[BenchmarkSet],
    fingerprint: str,
) -> None:
    """Writes `<command>.json` and, for comparisons, `<command>.items.safetensors`.

    Args:
        folder: where to; made if missing.
        command: that has measured.
        found: what it has found.
        sets: on which.
        fingerprint: of the model; its name may be another's tomorrow.
    """
    figures = [
        {
            **one.section.result,
            "fingerprint": fingerprint,
            "data": data.path if is_remote(data.path) else os.path.abspath(data.path),
            "split": data.split,
        }
        for one, data in zip(found, sets, strict=True)
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / f"{command}.json", figures)
    items = {f"{i}/{name}": x.clone() for i, one in enumerate(found) for name, x in one.items.items()}
    with atomic_write(Path(folder) / f"{command}{ITEMS}") as beside:
        save_file(items, beside)


def read_results(path: str | os.PathLike[str]) -> dict[tuple[str, str], Result]:
    """All results of a folder, or of one file, by kind and data set.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    path = Path(path)
    items_of = sorted(path.glob(f"*{ITEMS}")) if path.is_dir() else []
    files = [path] if path.suffix == ".json" else [path / f"{file.name.removesuffix(ITEMS)}.json" for file in items_of]
    if not files:
        raise DataError(f"{path} holds no result: name a folder that --out of an evaluation named, or a .json in it")
    found = {}
    for file in files:
        beside = file.with_suffix(ITEMS)
        try:
            figures = json.loads(file.read_text("utf-8"))
            items = load_file(beside)
            for i, one in enumerate(figures):
                own = {name.partition("/")[2]: x for name, x in items.items() if name.startswith(f"{i}/")}
                found[one["kind"], one["dataset"]] = Result(one, own)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"{file} and {beside.name} cannot be read as a result ({error})") from None
    return found


def compare(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> list[Comparison]:
    """The second result's figures less the first's, on the same items, with paired bootstrap intervals.

    Args:
        first, second: folders that `--out` of an evaluation named, or one `.json` in each.

    Returns:
        One for each set that both have measured, its `result` with `dataset`, `kind`, `n`, `complete`, `problems`,
        `first` and `second` (the models), and `differences` (name to first, second, difference, lower and upper 95%
        bound); with what they answered, if the set is still where it was.

    Raises:
        DataError: they have no set in common, or its items are not the same.
    """
    one, other = read_results(first), read_results(second)
    common = [key for key in one if key in other]
    if not common:
        names = [", ".join(f"{name} ({kind})" for kind, name in part) for part in (one, other)]
        raise DataError(f"{first} and {second} have no set in common: {names[0]}; and {names[1]}")
    found = []
    for key in common:
        figures, name = one[key].figures, key[1]
        if wrong := _unlike(one[key].items, other[key].items):
            raise DataError(f"{name}: {first} and {second} have not measured the same items: {wrong}")
        here, there = (measures(key[0], result.items) for result in (one[key], other[key]))
        before, after = here.values(), there.values()
        both = [figures, other[key].figures]
        result = {
            "dataset": name,
            "kind": key[0],
            "n": figures["n"],
            "first": figures["model"],
            "second": other[key].figures["model"],
            "complete": all(part["complete"] for part in both),
            "problems": list({problem["what"]: problem for part in both for problem in part["problems"]}.values()),
            "differences": {
                metric: [before[metric], after[metric], *change]
                for metric, change in here.differences(there).items()
                if metric in figures["intervals"]
            },
        }
        found.append(Comparison(result, _answers(key[0], one[key], other[key])))
    for path, which in ((first, "first"), (second, "second")):
        if len(models := sorted({comparison.result[which] for comparison in found})) > 1:
            raise DataError(f"{path} holds results of several models: {', '.join(models)}; name one of its .json files")
    return found


def _answers(kind: str, one: Result, other: Result) -> TwoAnswers | TwoRankings | None:
    """What both models answered, for the page; nothing where the set's pictures are no longer what they were."""
    if kind not in ("classification", "probe", "retrieval"):
        return None
    try:
        data = BenchmarkSet.open(one.figures["data"], one.figures["split"])
        row_of = {int(x): i for i, x in enumerate(data.item_ids.view(np.int64))}
        rows = [row_of[int(x)] for x in one.items["ids"]]
    except (DataError, KeyError):
        return None

    def picture(i: int) -> bytes:
        return data.thumbnail(rows[i])

    def of(name: str) -> tuple[np.ndarray, np.ndarray]:
        return one.items[name].numpy(), other.items[name].numpy()

    if kind == "retrieval":
        number = np.full(len(data), -1)
        number[rows] = np.arange(len(rows))
        texts, owner = data.captions
        captions = [text for text, own in zip(texts, number[owner.numpy()]) if own >= 0]
        names = ("rank_by_text", "best_by_text", "rank_by_image", "best_by_image")
        if len(captions) != len(one.items["owner"]):
            return None
        found = [Ranked(*(result.items[name].numpy() for name in names)) for result in (one, other)]
        return TwoRankings(captions, one.items["owner"].numpy(), (found[0], found[1]), picture)
    prefix = "linear_" if kind == "probe" else ""
    answers, confidence = of(f"{prefix}answer"), of(f"{prefix}confidence")
    return TwoAnswers(data.classnames, one.items[f"{prefix}target"].numpy(), answers, confidence, picture)


def _unlike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """In what two lists of items differ, in words."""
    words = {
        "ids": "pictures",
        "text_ids": "captions",
        "owner": "captions' pictures",
        "target": "pictures' classes",
        "classes": "classes",
    }
    for name, x in one.items():
        if name not in SAME and name.rpartition("_")[2] not in SAME:
            continue
        y, what = other.get(name), words.get(name.rpartition("_")[2] if name not in words else name, "labels")
        if y is None or x.shape != y.shape:
            return f"{len(x):,} and {0 if y is None else len(y):,} {what}"
        if not torch.equal(x, y):
            if not x.dim():
                return f"{int(x):,} and {int(y):,} {what}"
            n = int((x != y).reshape(len(x), -1).any(1).sum())
            return f"{n:,} of {len(x):,} {what} are others"
    return ""
