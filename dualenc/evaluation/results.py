"""Results as files, and the comparison of two results item by item."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualenc.evaluation.base import Evaluated, ResultKind, SavedResult
from dualenc.evaluation.kinds import RESULT_KINDS
from dualenc.report import Comparison, verdict_on_two
from dualenc.utils.arguments import Precision
from dualenc.utils.errors import DataError
from dualenc.utils.files import atomic_write, write_json
from dualenc.utils.urls import is_remote

ITEMS = ".items.safetensors"
REPORT = "report.html"


class Data(Protocol):
    """Data that a model is measured on."""

    @property
    def name(self) -> str:
        """The name of the data in results."""
        ...

    @property
    def path(self) -> str:
        """The file, folder or URL."""
        ...

    @property
    def split(self) -> str:
        """The name of the split."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of the content."""
        ...


def place(kind: ResultKind, data: Data, model: str, precision: Precision = "fp32") -> dict[str, Any]:
    """Return the entries of a result that say where it comes from, by names and paths.

    Args:
        kind: what is measured.
        data: data that it is measured on.
        model: name of the model.
        precision: precision in which the model computes embeddings.
    """
    given = kind.options(data)
    return {
        "dataset": data.name,
        "kind": kind.name,
        "model": model,
        "precision": precision,
        "data": data.path if is_remote(data.path) else os.path.abspath(data.path),
        "split": data.split,
        **({"options": given} if given else {}),
    }


def origin(kind: ResultKind, data: Data, model: str, fingerprint: str, precision: Precision = "fp32") -> dict[str, Any]:
    """Return the entries of a result that say what was measured, by names and by fingerprints of the content.

    Args:
        kind: what is measured.
        data: data that it is measured on.
        model: name of the model.
        fingerprint: fingerprint of the model, since its name may later belong to another model.
        precision: precision in which the model computes embeddings.
    """
    settings = kind.settings(data) | ({} if precision == "fp32" else {"precision": precision})
    content = {"fingerprint": fingerprint, "data_fingerprint": data.fingerprint, "settings": settings}
    return place(kind, data, model, precision) | content


def with_origin(found: Evaluated, described: Mapping[str, Any]) -> Evaluated:
    """Return an outcome whose result also says what was measured, as files of results need it.

    Args:
        found: the outcome.
        described: see `origin`.
    """
    return found._replace(section=replace(found.section, result={**found.section.result, **described}))


def write_results(folder: str | os.PathLike[str], command: str, found: Sequence[Evaluated]) -> None:
    """Write `<command>.json` and, for comparisons, `<command>.items.safetensors`.

    Args:
        folder: folder of the files, made if missing.
        command: name of the command that measured.
        found: outcome on each set, see `with_origin`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / f"{command}.json", [one.section.result for one in found])
    items = {f"{i}/{name}": x.clone() for i, one in enumerate(found) for name, x in one.items.items()}
    with atomic_write(Path(folder) / f"{command}{ITEMS}") as temporary:
        save_file(items, temporary)


def check_out(
    folder: Path,
    command: str,
    new: Sequence[Mapping[str, Any]],
    fields: Sequence[str] = ("model", "precision", "data", "split", "kind"),
) -> None:
    """Refuse a folder that holds another result than the one that a command will write into it.

    Args:
        folder: output folder, which may be missing.
        command: name of the command, and of its `.json`.
        new: what the results will say.
        fields: entries of the results that must be the same, besides the options of their sets.

    Raises:
        DataError: If another result would be lost.
    """
    way_out = "name another folder by --out, or remove this one"
    path = folder / f"{command}.json"
    if other := sorted(file for file in folder.glob(f"*{ITEMS}") if file.name != f"{command}{ITEMS}"):
        name = other[0].name.removesuffix(ITEMS)
        raise DataError(f"{folder} holds the results of dualenc {name}: {way_out}")
    if not path.exists():
        if (folder / REPORT).exists():
            raise DataError(f"{folder} holds a {REPORT} of something else: {way_out}")
        return
    try:
        old = [_entries(result, fields) for result in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} is not a result of dualenc {command}: {way_out}") from None
    wanted = [_entries(result, fields) for result in new]
    if lost := [result for result in old if result not in wanted]:
        raise DataError(f"{folder} holds the result of {_described(lost[0])}: {way_out}")
    if more := [result for result in wanted if result not in old]:
        raise DataError(f"{folder} holds results without {_described(more[0])}: {way_out}")


def _entries(result: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Return entries of a result, and the options of its set as a text, such as "templates simple"."""
    given = result.get("options", {}).items()  # of which the command chooses `kind`
    options = ", ".join(f"{name} {value}" for name, value in sorted(given) if name != "kind")
    known = {"precision": "fp32", **result}  # Results of the first release do not name it.
    return {name: known[name] for name in fields} | {"options": options}


def _described(entries: Mapping[str, Any]) -> str:
    """Return entries of a result for a message."""
    named = ", ".join(f"{name} {value}" for name, value in entries.items() if name != "options")
    return f"{named}, {entries['options'] or 'without options'}"


def read_results(path: str | os.PathLike[str]) -> dict[tuple[str, str], SavedResult]:
    """Read all results of a folder, or of one file, by kind and data set.

    Raises:
        DataError: If there are none, or they cannot be read.
    """
    path = Path(path)
    items_of = sorted(path.glob(f"*{ITEMS}")) if path.is_dir() else []
    files = [path] if path.suffix == ".json" else [path / f"{file.name.removesuffix(ITEMS)}.json" for file in items_of]
    if not files:
        raise DataError(f"{path} does not hold results: name a folder that an evaluation wrote by --out, or its .json")
    found = {}
    for file in files:
        items_file = file.with_suffix(ITEMS)
        try:
            results = json.loads(file.read_text("utf-8"))
            items = load_file(items_file)
            for i, one in enumerate(results):
                own = {name.partition("/")[2]: x for name, x in items.items() if name.startswith(f"{i}/")}
                key = one["kind"], one["dataset"]
                if key in found and found[key].result["model"] != one["model"]:
                    models = f"{found[key].result['model']} and {one['model']}"
                    raise DataError(
                        f"{path} holds results of several models, {models}: measure each with an --out of its own"
                    )
                found[key] = SavedResult(one, own)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file} and {items_file.name} cannot be read as a result ({error})") from None
    return found


def compare(
    first: str | os.PathLike[str], second: str | os.PathLike[str], kinds: Sequence[ResultKind] = ()
) -> list[Comparison]:
    """Compare two results on the same items: differences of the metrics with paired bootstrap intervals.

    Args:
        first: folder that an evaluation wrote by `--out`, or one `.json` in it.
        second: another one, of another model or other prompts.
        kinds: evaluation kinds of the results besides `RESULT_KINDS`.

    Returns:
        A comparison for each set that both measured. Its `result` holds `dataset`, `kind`, `n`, `complete`, `problems`,
        `first` and `second` (names of the models), `same_model` (true if their fingerprints are equal), and
        `differences` (metric to first, second, difference, lower and upper 95% bound), `changed` (noun of the units to
        the number of those with another answer, and of all; see `ResultKind.answers`), and `prompts` and `precision` if
        theirs differ. It holds the answers of both if the set still lies where it was.

    Raises:
        DataError: If they have no set in common, its items differ, or its kind is unknown.
    """
    known = {**RESULT_KINDS, **{kind.name: kind for kind in kinds}}
    one, other = read_results(first), read_results(second)
    common = [key for key in one if key in other]
    if not common:
        names = [", ".join(f"{name} ({kind})" for kind, name in part) for part in (one, other)]
        raise DataError(f"{first} and {second} have no set in common: {names[0]}; and {names[1]}")
    found = []
    for name, dataset in common:
        if name not in known:
            raise DataError(
                f"{dataset}: evaluation kind {name!r} is unknown: name its class by --kinds, such as my_module.MyKind"
            )
        pair = one[name, dataset], other[name, dataset]
        if wrong := _unlike(known[name].identity, pair[0].items, pair[1].items):
            raise DataError(f"{dataset}: {first} and {second} were not measured on the same items: {wrong}")
        found.append(_comparison(known[name], *pair))
    for path, which in ((first, "first"), (second, "second")):
        if len(models := sorted({comparison.result[which] for comparison in found})) > 1:
            raise DataError(f"{path} holds results of several models: {', '.join(models)}; name one of its .json files")
    return found


def _comparison(kind: ResultKind, first: SavedResult, second: SavedResult) -> Comparison:
    here, there = (kind.metrics_of_items(saved.items) for saved in (first, second))
    before, after = here.values(), there.values()
    both = [first.result, second.result]
    fingerprints = {part.get("fingerprint") for part in both}
    result = {
        "dataset": first.result["dataset"],
        "kind": kind.name,
        "n": first.result["n"],
        "first": first.result["model"],
        "second": second.result["model"],
        "same_model": None not in fingerprints and len(fingerprints) == 1,
        "complete": all(part["complete"] for part in both),
        "problems": list({problem["what"]: problem for part in both for problem in part["problems"]}.values()),
        "differences": {
            metric: [before[metric], after[metric], *change]
            for metric, change in here.differences(there).items()
            if metric in first.result["intervals"]
        },
        "changed": _changed(kind.answers(first.items), kind.answers(second.items)),
    }
    result["verdict"] = verdict_on_two(result, kind.description)
    prompts = [part.get("prompts") for part in both]
    if prompts[0] != prompts[1] and all(prompts):
        result["prompts"] = f"A {prompts[0]}, B {prompts[1]}"
    precisions = [part.get("precision") for part in both]
    if precisions[0] != precisions[1] and all(precisions):
        result["precision"] = f"A {precisions[0]}, B {precisions[1]}"
    return Comparison(result, kind.compared(first, second), kind.description)


def _changed(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return by noun the number of units whose answers differ, and the number of all; see `ResultKind.answers`."""
    return {noun: [int((x != other[noun]).reshape(len(x), -1).any(1).sum()), len(x)] for noun, x in one.items()}


def _unlike(identity: Mapping[str, str], one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """Return how the items of two results differ; an empty text if they are the same."""
    for name, noun in identity.items():
        x, y = one.get(name), other.get(name)
        if x is None or y is None or x.shape != y.shape:
            if x is not None or y is not None:
                counts = [f"{0 if part is None else part.shape[0] if part.dim() else 1:,}" for part in (x, y)]
                return f"{' and '.join(counts)} {noun}"
        elif not torch.equal(x, y):
            if not x.dim():
                return f"{int(x):,} and {int(y):,} {noun}"
            n = int((x != y).reshape(len(x), -1).any(1).sum())
            return f"{n:,} of {len(x):,} {noun} differ"
    return ""
