"""The tables of evaluation kinds, and how a kind and its sets are found."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from glob import escape, glob
from types import MappingProxyType
from typing import NamedTuple, get_args

from dualenc.data.eval_sets.base import NO_OPTIONS, Kind, SetOptions
from dualenc.data.eval_sets.beir import is_document_folder
from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.evaluation.base import EvaluationKind, ResultKind
from dualenc.evaluation.choice import CompositionalChoice
from dualenc.evaluation.classification import ZeroShotClassification
from dualenc.evaluation.documents import DocumentRetrieval
from dualenc.evaluation.multilabel import MultilabelClassification
from dualenc.evaluation.probe import FrozenProbes
from dualenc.evaluation.retrieval import CrossModalRetrieval
from dualenc.evaluation.text_probe import TextProbe
from dualenc.evaluation.within import CaptionRetrieval, ImageRetrieval
from dualenc.utils.errors import DataError
from dualenc.utils.imports import import_by_path
from dualenc.utils.text import did_you_mean
from dualenc.utils.urls import is_remote

KINDS: Mapping[str, EvaluationKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            ZeroShotClassification(),
            MultilabelClassification(),
            CrossModalRetrieval(),
            CompositionalChoice(),
            FrozenProbes(),
            CaptionRetrieval(),
            ImageRetrieval(),
        )
    }
)
TEXT_KINDS: Mapping[str, ResultKind] = MappingProxyType(
    {kind.name: kind for kind in (DocumentRetrieval(), TextProbe())}
)
RESULT_KINDS: Mapping[str, ResultKind] = MappingProxyType({**KINDS, **TEXT_KINDS})


class OpenSet(NamedTuple):
    """An evaluation set with the kind that measures it."""

    kind: EvaluationKind
    data: BenchmarkSet


def find_kind(name: str) -> EvaluationKind:
    """Return an evaluation kind of this package by its name, or any other by its import path.

    Importing a module runs its code: the name must come from the user, never from a file of a data set or result.

    Args:
        name: key of `KINDS`, or `package.module.Name` of a subclass of `EvaluationKind` or of an instance of one.

    Raises:
        DataError: If there is no such kind, or its name is taken.
    """
    if name in KINDS:
        return KINDS[name]
    if name in TEXT_KINDS:
        command = TEXT_KINDS[name].command
        raise DataError(f"evaluation kind {name} follows from the data: leave it out, or use `dualenc {command}`")
    if "." not in name:
        every = f"name one of {', '.join(KINDS)}, or the import path of a class, such as my_module.MyKind"
        raise DataError(f"evaluation kind {name!r} is unknown: {did_you_mean(name, KINDS, every)}")
    try:
        found = import_by_path(name)
        kind = found() if isinstance(found, type) and issubclass(found, EvaluationKind) else found
    except (ImportError, TypeError) as error:  # a TypeError of a class that lacks a method or needs arguments
        raise DataError(f"evaluation kind {name} cannot be used: {error}") from None
    if not isinstance(kind, EvaluationKind) or not isinstance(getattr(kind, "name", None), str):
        raise DataError(
            f"evaluation kind {name} must be a subclass of dualenc.evaluation.EvaluationKind with a name, or an "
            "instance of one"
        )
    if type(RESULT_KINDS.get(kind.name, kind)) is not type(kind):
        raise DataError(f"evaluation kind {name} has the name {kind.name!r} of one of dualenc's kinds: rename it")
    return kind


def own_kinds() -> list[EvaluationKind]:
    """Return the kinds by which sets are measured if no other is asked for, one for each kind of set."""
    return [KINDS[name] for name in get_args(Kind)]


def kinds_of_command(command: str) -> list[EvaluationKind]:
    """Return the kinds that are measured by a command of `dualenc`."""
    return [kind for kind in KINDS.values() if kind.command == command]


def open_sets(
    sources: Iterable[str],
    kinds: Sequence[EvaluationKind] | None = None,
    split: str | None = None,
    options: SetOptions = NO_OPTIONS,
) -> list[OpenSet]:
    """Open evaluation sets, each with the first kind that can measure it.

    Args:
        sources: what `BenchmarkSet.open` takes; shards of one folder that are named in full are one set.
        kinds: kinds to choose from; None for `own_kinds`.
        split: split of all sets; None for "test", or the only one.
        options: what the user says about the sets; each set takes the options that it has a use for.

    Raises:
        DataError: If a set cannot be opened, no kind can measure it, two sets have the same name, or no set has a use
            for an option.
    """
    kinds = own_kinds() if kinds is None else kinds
    wanted = {name for kind in kinds for name in kind.sets} & {"classification", "retrieval"}
    if options.kind is None and len(wanted) == 1:
        options = replace(options, kind=wanted.pop())
    found: list[OpenSet] = []
    for source in _join_shards(sources):
        if is_document_folder(source):
            raise DataError(f"{source} is a folder of documents: use `dualenc retrieval`")
        data = BenchmarkSet.open(source, split, options)
        kind = next((kind for kind in kinds if data.kind in kind.sets), None)
        if kind is None:
            raise DataError(f"{data.path} is a {data.kind} set: {_way_out(data, kinds)}")
        if any(data.name == other.name for _, other in found):
            raise DataError(
                f"two evaluation sets are called {data.name!r}, so their results would be mixed up: rename a folder"
            )
        found.append(OpenSet(kind, kind.prepare(data, source)))
    taken = {name for _, data in found for name in (*data.takes, "kind")}
    for name, value in options.given().items():
        if name not in taken:
            raise DataError(f"option {name} {value!r} has no use here: it is for {_USES[name]}")
    return found


_USES = {
    "captions": "plain shards with captions",
    "classnames": "sets with classes",
    "templates": "sets with classes",
    "images": "tables of captions whose images are files",
    "image": "plain shards",
}


def _join_shards(sources: Iterable[str]) -> list[str]:
    """Replace local shards of one folder that are named in full, as a shell expands a glob, by one pattern."""
    joined: list[str | list[str]] = []  # a list holds the shards of a folder
    folders: dict[str, list[str]] = {}
    for source in sources:
        folder = os.path.dirname(source)
        if not source.lower().endswith(".tar") or is_remote(source) or not os.path.isfile(source):
            joined.append(source)
        elif folder in folders:
            folders[folder].append(source)
        else:
            folders[folder] = [source]
            joined.append(folders[folder])
    return [one if isinstance(one, str) else one[0] if len(one) == 1 else _pattern(one) for one in joined]


def _pattern(shards: Sequence[str]) -> str:
    """Return a pattern that names exactly these shards of one folder."""
    folder = escape(os.path.dirname(shards[0]))
    every = os.path.join(folder, "*.tar")
    if set(glob(every)) == set(shards):
        return every
    names = ",".join(os.path.basename(shard) for shard in shards)
    return os.path.join(folder, f"{{{names}}}")


def _way_out(data: BenchmarkSet, kinds: Sequence[EvaluationKind]) -> str:
    own = KINDS[data.kind]
    if own.command not in {kind.command for kind in kinds}:
        return f"use `dualenc {own.command}`"
    return f"name a set of another kind: {', '.join(dict.fromkeys(name for kind in kinds for name in kind.sets))}"
