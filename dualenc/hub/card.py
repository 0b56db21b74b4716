"""The card of a model on the hub: results of evaluations, and the data and configuration of its run."""

import csv
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dualenc.evaluation import RESULT_KINDS
from dualenc.interop.export_format import IMAGES_AND_TEXTS, ExportFormat
from dualenc.report.card import Card, ModelSource, Published, render_card
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json
from dualenc.utils.text import one_line

# Keys whose values are secrets, and values that hold a secret themselves.
_SECRET = re.compile(
    r"(?:^|[\W_])(?:key|pass|pw|sig)$|(?:(?:api|access|account|private|secret)_?key(?:_?id)?|token|passw(?:or)?d|pwd|"
    r"passphrase|secret|credential|auth(?:entication|orization)?|cookie|bearer)s?$",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer\s+|authorization\s*[:=]\s*(?:\w+\s+)?)\S+", re.IGNORECASE)


@dataclass(frozen=True)
class SetResult:
    """Metrics of one evaluation set, as an evaluation wrote them."""

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
    """Model to push.

    Attributes:
        title: description of the folder, such as "A model directory of dualenc".
        library: the hub's name of the library that reads the folder.
        folder: folder of its files.
        run: run directory of the model, if any.
        facts: pairs of a label and a value.
        fingerprint: fingerprint of the model; of an export, that of the exported model.
        task: the hub's name of the task that the model is for.
        programs: for each library that reads the folder, a function that returns the program for the card.
        uploaded: patterns of the files that go up.
        weights: patterns of the files with weights.
        notes: differences from the model that was exported.
        offers: formats that the card shows how to export to.
        format: format of an export; None for a model of dualenc.
    """

    title: str
    library: str
    folder: Path
    run: Path | None
    facts: Sequence[tuple[str, Any]]
    fingerprint: str
    task: str
    programs: Mapping[str, Callable[[ModelSource], str]]
    uploaded: Sequence[str]
    weights: Sequence[str] = ("*.safetensors",)
    notes: Sequence[str] = ()
    offers: Sequence[ExportFormat] = ()
    format: ExportFormat | None = None


# Results of evaluations


def read_measured(path: str | os.PathLike[str]) -> list[SetResult]:
    """Read a `<command>.json` of an evaluation.

    Raises:
        ModelError: If the file is something else.
    """
    path = Path(path)
    found = []
    try:
        for one in json.loads(path.read_text("utf-8")):
            words = [one[key] for key in ("dataset", "kind", "model", "fingerprint")]
            if not all(isinstance(word, str) for word in words):
                raise ValueError(f"{words!r} must be strings")
            dataset, kind, model, fingerprint = map(one_line, words)
            metrics = {one_line(name): float(x) for name, x in one["metrics"].items() if x is not None}
            intervals = {one_line(name): [float(low), float(high)] for name, (low, high) in one["intervals"].items()}
            problems = tuple(f"{problem['what']}: {problem['count']}" for problem in one["problems"])
            split, n = one_line(one.get("split") or ""), int(one["n"])
            found.append(SetResult(dataset, kind, model, fingerprint, split, n, problems, metrics, intervals))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ModelError(
            f"{path} cannot be read as a result ({reason}): name a .json that --out of an evaluation wrote, or "
            "evaluate again"
        ) from None
    if not found:
        raise ModelError(f"{path} does not hold a result: name another one")
    return found


def check_measured(subject: Subject, measured: Sequence[SetResult]) -> None:
    """Refuse results of another model, which the fingerprint shows even where a name or path was reused.

    Raises:
        ModelError: If there is one, or two results of one set; the message names the set and the model.
    """
    seen = set()
    for one in measured:
        if one.fingerprint != subject.fingerprint:
            raise ModelError(
                f"the result for {one.dataset} is of another model, {one.model} (fingerprint {one.fingerprint}, not "
                f"{subject.fingerprint}): leave it out, or evaluate this model"
            )
        if (one.dataset, one.kind, one.split) in seen:
            raise ModelError(f"there are two results for {one.dataset} ({one.kind}): leave one out")
        seen.add((one.dataset, one.kind, one.split))


def measured_in_training(run: Path, name: str) -> tuple[int, dict[str, float]]:
    """Return the step and the metrics of a run's `best` or `last` from its `metrics.csv`, without those of training.

    The step of `best` is in the run's record; a record of an older version lacks it: there it is the step at which the
    monitored metric was largest.

    Args:
        run: the run directory.
        name: "best" or "last".

    Raises:
        ModelError: If a file of the run cannot be read.
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
        record = _object(read_json(path), path)
        best = _part(record, "best", path)
        if isinstance(best.get("step"), int):
            step = best["step"]
        else:  # a run of an older version
            monitor = _part(_part(record, "config", path), "run", path).get("monitor")
            values = [(value, -step) for step, metric, value in rows if metric == monitor and math.isfinite(value)]
            step = -max(values)[1] if values else 0
    else:
        step = max((row[0] for row in rows), default=0)
    return step, {metric: value for at, metric, value in rows if at == step}


def _object(value: Any, path: Path, what: str = "it") -> dict[str, Any]:
    """Return a part of the record of a run, which must be an object."""
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} is not the record of a run ({what} must be an object): restore it, or push a copy of the model"
        )
    return value


def _part(fields: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """Return an object in another one, or an empty one if the key is missing."""
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
        subject: the model.
        repo: `owner/name` on the hub.
        measured: results of the model.
        license: the hub's name of the license.
        revision: the branch; None for main.

    Raises:
        ModelError: If a file of the run cannot be read.
    """
    source, images = ModelSource(repo=repo, revision=revision or "main"), subject.task == IMAGES_AND_TEXTS
    step, in_training = measured_in_training(subject.run, subject.folder.name) if subject.run is not None else (0, {})
    data, config = _record(subject.run) if subject.run is not None else ([], {})
    own, exported = subject.format is None, ModelSource("OUT")
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
        branch=source.revision,
        pin="" if not _is_pinned(subject) else f"hf-hub:{repo}@HASH" if own else 'revision="HASH"',
        others=[
            (f"dualenc export {source.spec} OUT --format {one.name}", one.snippet(exported, images))
            for one in subject.offers
        ],
    )
    about = Card(
        title=repo.partition("/")[2],
        library=subject.library,
        summary=f"{subject.title}.",
        facts=subject.facts,
        programs=[(library, program(source)) for library, program in subject.programs.items()],
        notes=subject.notes,
        task=subject.task,
        images=images,
    )
    return render_card(about, published)


def _is_pinned(subject: Subject) -> bool:
    """Return whether a commit hash fixes all files that the reading library loads."""
    return subject.format is None or subject.format.is_pinned(subject.folder)


def _rows(one: SetResult) -> list[tuple[str, ...]]:
    """Return the metrics of a set as rows of a table."""
    name, task = one.dataset + (f" ({one.split})" if one.split else ""), _task(one.kind)[1]
    bounds = {metric: "{:.4g} to {:.4g}".format(*interval) for metric, interval in one.intervals.items()}
    return [
        (name, task, metric, f"{value:.4g}", bounds.get(metric, ""), f"{one.n:,}")
        for metric, value in one.metrics.items()
    ]


def _results(one: SetResult) -> list[dict[str, Any]]:
    """Return the metrics of a set as arguments of `EvalResult`; `metric_args`, whose keys are free, has intervals."""
    task, label = _task(one.kind)
    return [
        {
            "task_type": task,
            "task_name": label,
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
    known = RESULT_KINDS.get(kind)
    return (kind, kind) if known is None else (known.hub_task, known.task_name)


def _record(run: Path) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """Return facts about the data of a run, as pairs of a label and a value, and its configuration without secrets."""
    path = run / "run.json"
    record = _object(read_json(path), path)
    labels = {
        "train_pairs": "training pairs",
        "train_texts": "training texts",
        "held_out_pairs": "held-out pairs",
        "held_out_texts": "held-out texts",
        "bad_samples": "bad samples",
        "samples_seen": "samples seen",
        "step": "steps",
        "fingerprint": "fingerprint of the data",
    }
    facts = [(label, record[key]) for key, label in labels.items() if key in record]
    facts = [(label, f"{x:,}" if isinstance(x, int) else x) for label, x in facts]
    return facts or [("record of the run", "without facts about the data")], _public(_part(record, "config", path))


def _sources(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the training data in a configuration."""
    data = config.get("data")
    data = data.get("init_args", data) if isinstance(data, dict) else {}
    data = data if isinstance(data, dict) else {}
    return {key: data[key] for key in ("train", "val", "captions", "select") if data.get(key) is not None}


def _yaml(value: Any) -> str:
    """Return a value as YAML, or an empty string for an empty one."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120).rstrip("\n") if value else ""


def _public(value: Any, key: str = "") -> Any:
    """Return a configuration without secrets: those of URLs, and all content of a key whose name means a secret.

    A boolean or None is not a secret, and a number under a key that ends with `tokens` is a size.
    """
    number = isinstance(value, int | float) and key.lower().endswith("tokens")
    if _SECRET.search(key) and value is not None and not isinstance(value, bool) and not number:
        return "..."
    if isinstance(value, dict):
        return {one_line(name): _public(part, str(name)) for name, part in value.items()}
    if isinstance(value, list):
        return [_public(part) for part in value]
    return _BEARER.sub(r"\1...", one_line(value)) if isinstance(value, str) else value
