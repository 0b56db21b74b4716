"""The card of a model that is pushed: what evaluations measured of it, and what its run says of data and settings."""

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dualenc.evaluation import KINDS
from dualenc.report.card import EXPORTS, Card, Published, program, render_card
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json
from dualenc.utils.text import one_line

TITLES = {"dualenc": "A model directory of dualenc", "text": "A text model of dualenc"} | {
    name: f"An export of dualenc in the format of {name}" for name in EXPORTS
}
# What a key calls a secret, and where a value names one itself.
_SECRET = re.compile(
    r"(?:^|[\W_])(?:key|pass|pw|sig)$|(?:(?:api|access|account|private|secret)_?key(?:_?id)?|token|passw(?:or)?d|pwd|"
    r"passphrase|secret|credential|auth(?:entication|orization)?|cookie|bearer)s?$",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer\s+|authorization\s*[:=]\s*(?:\w+\s+)?)\S+", re.IGNORECASE)


@dataclass(frozen=True)
class SetResult:
    """One set's figures, as an evaluation wrote them."""

    dataset: str
    kind: str
    model: str
    fingerprint: str
    split: str
    n: int
    problems: tuple[str, ...]
    metrics: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Subject:
    """What is pushed.

    Attributes:
        kind: a key of `TITLES`.
        folder: where its files are.
        run: the run directory that it is of, if any.
        facts: what it is, as pairs of a word and its value.
        fingerprint: of the model; of an export, that of the model which was exported.
        task: the hub's name of what it is for.
        readers: the libraries that read the folder.
        pinned: whether all that they read is of the commit that is asked for; else some of it is of the branch main.
        notes: what an export could not keep.
    """

    kind: str
    folder: Path
    run: Path | None
    facts: Sequence[tuple[str, Any]]
    fingerprint: str
    task: str
    readers: Sequence[str]
    pinned: bool = True
    notes: Sequence[str] = ()


# What was measured


def read_measured(path: str | os.PathLike[str]) -> list[SetResult]:
    """Reads a `<command>.json` of an evaluation.

    Raises:
        ModelError: it is none.
    """
    path = Path(path)
    found = []
    try:
        for one in json.loads(path.read_text("utf-8")):
            words = [one[key] for key in ("dataset", "kind", "model", "fingerprint")]
            if not all(isinstance(word, str) for word in words):
                raise ValueError(f"{words!r} should be texts")
            dataset, kind, model, mark = map(one_line, words)
            metrics = {one_line(name): float(x) for name, x in one["metrics"].items() if x is not None}
            intervals = {one_line(name): [float(low), float(high)] for name, (low, high) in one["intervals"].items()}
            problems = tuple(f"{problem['what']}: {problem['count']}" for problem in one["problems"])
            split, n = one_line(one.get("split") or ""), int(one["n"])
            found.append(SetResult(dataset, kind, model, mark, split, n, problems, metrics, intervals))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ModelError(
            f"{path} cannot be read as a result ({why}): name a .json that --out of an evaluation wrote, or measure "
            "anew"
        ) from None
    if not found:
        raise ModelError(f"{path} holds no result: name another one")
    return found


def check_measured(subject: Subject, measured: Sequence[SetResult]) -> None:
    """Refuses figures of another model: names and paths may be reused, fingerprints are of the weights themselves.

    Raises:
        ModelError: names the set and the model that was measured.
    """
    seen = set()
    for one in measured:
        if one.fingerprint != subject.fingerprint:
            raise ModelError(
                f"the result for {one.dataset} is of another model, {one.model} (fingerprint {one.fingerprint}, not "
                f"{subject.fingerprint}): leave it out, or measure this one"
            )
        if (one.dataset, one.kind, one.split) in seen:
            raise ModelError(f"there are two results for {one.dataset} ({one.kind}): leave one out")
        seen.add((one.dataset, one.kind, one.split))


def measured_in_training(run: Path, name: str) -> tuple[int, dict[str, float]]:
    """The step and the figures of a run's `best` or `last` from its `metrics.csv`; those of training are left out.

    Those of `best` are of the step at which the monitored metric was largest.

    Raises:
        ModelError: a file of the run cannot be read.
    """
    path = run / "metrics.csv"
    if not path.is_file():
        return 0, {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [(int(one["step"]), one["metric"], float(one["value"])) for one in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ModelError(f"{path} cannot be read ({one_line(error)})") from None
    rows = [row for row in rows if not row[1].startswith("train/")]
    if name == "best":
        path = run / "run.json"
        monitor = _part(_part(_object(read_json(path), path), "config", path), "run", path).get("monitor", "")
        values = [(value, -step) for step, metric, value in rows if metric == monitor and not math.isnan(value)]
        step = -max(values)[1] if values else 0
    else:
        step = max((row[0] for row in rows), default=0)
    return step, {metric: value for at, metric, value in rows if at == step}


def _object(value: Any, path: Path, what: str = "it") -> dict[str, Any]:
    """What must be an object in the record of a run."""
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} is no record of a run ({what} must be an object): restore it, or push a copy of the model"
        )
    return value


def _part(fields: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """An object in another one; an empty one, where there is none."""
    return _object({} if fields.get(key) is None else fields[key], path, key)


# The card


def card(
    subject: Subject,
    repo: str,
    measured: Sequence[SetResult] = (),
    license: str | None = None,
    revision: str | None = None,
) -> str:
    """Return the model card, `README.md`; see `dualenc.report.card`.

    Args:
        subject: what it is about.
        repo: where it will be.
        measured: figures of the model.
        license: the hub's name of it.
        revision: the branch; absent, main.

    Raises:
        ModelError: a file of the run cannot be read.
    """
    branch, images = revision or "main", subject.task.startswith("zero-shot-image")
    step, in_training = measured_in_training(subject.run, subject.folder.name) if subject.run is not None else (0, {})
    data, config = _record(subject.run) if subject.run is not None else ([], {})
    spec = f"hf-hub:{repo}" + (f"@{branch}" if branch != "main" else "")
    programs = [
        (reader, program(subject.kind if reader == "dualenc" else reader, images, repo=repo, revision=branch))
        for reader in subject.readers
    ]
    formats = {"dualenc": EXPORTS, "text": ("sentence-transformers", "onnx")}.get(subject.kind, ())
    pin = f"hf-hub:{repo}@HASH" if "dualenc" in subject.readers else 'revision="HASH"'
    published = Published(
        results=[result for one in measured for result in _results(one)],
        figures=[row for one in measured for row in _rows(one)],
        incomplete=[(one.dataset, "; ".join(one.problems)) for one in measured if one.problems],
        step=step,
        in_training=[(name, f"{value:.4g}") for name, value in in_training.items()],
        data=data,
        sources=_yaml(_sources(config)),
        config=_yaml(config),
        license=license,
        branch=branch,
        pin=pin if subject.pinned else "",
        others=[(f"dualenc export {spec} OUT --format {name}", program(name, images, "OUT")) for name in formats],
    )
    about = Card(
        title=repo.partition("/")[2],
        library="dualenc" if subject.kind == "text" else subject.kind,
        summary=f"{TITLES[subject.kind]}.",
        facts=subject.facts,
        programs=programs,
        notes=subject.notes,
        task=subject.task,
        images=images,
    )
    return render_card(about, published)


def _rows(one: SetResult) -> list[tuple[str, ...]]:
    """Return the figures of a set as rows of a table."""
    name, task = one.dataset + (f" ({one.split})" if one.split else ""), _task(one.kind)[1]
    bounds = {metric: "{:.4g} to {:.4g}".format(*interval) for metric, interval in one.intervals.items()}
    return [
        (name, task, metric, f"{value:.4g}", bounds.get(metric, ""), f"{one.n:,}")
        for metric, value in one.metrics.items()
    ]


def _results(one: SetResult) -> list[dict[str, Any]]:
    """Return the figures of a set as arguments of `EvalResult`; intervals are `metric_args`, which have any keys."""
    task, words = _task(one.kind)
    return [
        {
            "task_type": task,
            "task_name": words,
            "dataset_type": re.sub(r"[^a-z0-9_.]+", "-", one.dataset.lower()).strip("-") or "set",
            "dataset_name": one.dataset,
            "dataset_split": one.split or None,
            "metric_type": name,
            "metric_value": value,
            "metric_args": {"n": one.n} | ({"interval_95": list(one.intervals[name])} if name in one.intervals else {}),
        }
        for name, value in one.metrics.items()
        if math.isfinite(value)
    ]


def _task(kind: str) -> tuple[str, str]:
    """Return the hub's name and the plain name of what an evaluation kind measures; of an unknown kind its own name."""
    known = KINDS.get(kind)
    return (kind, kind) if known is None else (known.hub_task, known.task_name)


def _record(run: Path) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """Return what a run says of its data, as pairs of a word and its value, and its configuration without secrets."""
    path = run / "run.json"
    record = _object(read_json(path), path)
    told = {
        "train_pairs": "pairs to train on",
        "train_texts": "texts to train on",
        "held_out_pairs": "pairs held out",
        "held_out_texts": "texts held out",
        "bad_samples": "samples that could not be used",
        "samples_seen": "samples seen",
        "step": "steps",
        "fingerprint": "fingerprint of the data",
    }
    facts = [(words, record[key]) for key, words in told.items() if key in record]
    facts = [(words, f"{x:,}" if isinstance(x, int) else x) for words, x in facts]
    return facts or [("the record of the run", "says nothing of it")], _public(_part(record, "config", path))


def _sources(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of the training data."""
    data = config.get("data")
    data = data.get("init_args", data) if isinstance(data, dict) else {}
    data = data if isinstance(data, dict) else {}
    return {key: data[key] for key in ("train", "val", "captions", "select") if data.get(key) is not None}


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120).rstrip("\n") if value else ""


def _public(value: Any, key: str = "") -> Any:
    """A configuration without secrets: those of URLs, and what a key calls one, whatever is in it.

    What is true, false or nothing is none, and a number of `tokens` is a size.
    """
    number = isinstance(value, int | float) and key.lower().endswith("tokens")
    if _SECRET.search(key) and value is not None and not isinstance(value, bool) and not number:
        return "..."
    if isinstance(value, dict):
        return {one_line(name): _public(part, str(name)) for name, part in value.items()}
    if isinstance(value, list):
        return [_public(part) for part in value]
    return _BEARER.sub(r"\1...", one_line(value)) if isinstance(value, str) else value
