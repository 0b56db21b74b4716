"""The model card of a push: what a model is, how good, of what data, under which licence, and how it is loaded.

Whatever users wrote stands in it as text, never as markup or a link, and without the secrets of its URLs.
"""

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dualenc.utils.errors import ModelError, one_line
from dualenc.utils.files import read_json

EXPORTS = ("open_clip", "transformers", "sentence-transformers", "onnx")
TITLES = {"dualenc": "A model directory of dualenc", "text": "A text model of dualenc"} | {
    name: f"An export of dualenc in the format of {name}" for name in EXPORTS
}
# The hub's names of tasks, and ours of kinds of evaluation.
TASKS = {
    "classification": ("zero-shot-image-classification", "zero-shot classification"),
    "multilabel": ("zero-shot-image-classification", "zero-shot classification with several labels"),
    "retrieval": ("image-text-retrieval", "retrieval"),
    "choice": ("image-text-matching", "compositional choice"),
    "probe": ("image-classification", "probes on frozen embeddings"),
    "text-text": ("text-retrieval", "retrieval among captions"),
    "image-image": ("image-to-image-retrieval", "retrieval among images"),
}
# What a key calls a secret, and where a value names one itself.
_SECRET = re.compile(
    r"(?:^|[\W_])(?:key|pass|pw|sig)$|(?:(?:api|access|account|private|secret)_?key(?:_?id)?|token|passw(?:or)?d|pwd|"
    r"passphrase|secret|credential|auth(?:entication|orization)?|cookie|bearer)s?$",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer\s+|authorization\s*[:=]\s*(?:\w+\s+)?)\S+", re.IGNORECASE)
# What renderers make links of, and GitHub mentions, in the midst of a text.
_LINK = re.compile(r"\w://|\bwww\.|\b(?:mailto|xmpp):|@[\w-]+\.[a-z]|(?<!\w)@\w", re.IGNORECASE)


@dataclass(frozen=True)
class Measured:
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
        fingerprint: of a model of ours, which has been read whole; none of an export.
        task: the hub's name of what it is for.
        readers: the libraries that read the folder.
        pinned: whether all that they read is of the commit that is asked for; else some of it is of the branch main.
    """

    kind: str
    folder: Path
    run: Path | None
    facts: Sequence[tuple[str, Any]]
    fingerprint: str | None
    task: str
    readers: Sequence[str]
    pinned: bool = True


# What was measured


def read_measured(path: str | os.PathLike[str]) -> list[Measured]:
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
            found.append(Measured(dataset, kind, model, mark, split, n, problems, metrics, intervals))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ModelError(
            f"{path} cannot be read as a result ({why}): name a .json that --out of an evaluation wrote, or measure "
            "anew"
        ) from None
    if not found:
        raise ModelError(f"{path} holds no result: name another one")
    return found


def check_measured(subject: Subject, measured: Sequence[Measured]) -> None:
    """Refuses figures of another model: names and paths may be reused, fingerprints are of the weights themselves.

    An export has no fingerprint: its figures must be of one model, and the card says that it was another folder.

    Raises:
        ModelError: names the set and the model that was measured.
    """
    expected = subject.fingerprint or (measured[0].fingerprint if measured else "")
    seen = set()
    for one in measured:
        if one.fingerprint != expected:
            raise ModelError(
                f"the result for {one.dataset} is of another model, {one.model} (fingerprint {one.fingerprint}, not "
                f"{expected}): leave it out, or measure this one"
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
    measured: Sequence[Measured] = (),
    licence: str | None = None,
    revision: str | None = None,
) -> str:
    """The model card, `README.md`.

    Its metadata are as the hub has them (https://github.com/huggingface/hub-docs/blob/main/modelcard.md).

    Args:
        subject: what it is about.
        repo: where it will be.
        measured: figures of the model.
        licence: the hub's name of it.
        revision: the branch; absent, main.

    Raises:
        ModelError: a file of the run cannot be read.
    """
    title = repo.partition("/")[2]
    about = {
        "license": licence,
        "library_name": "dualenc" if subject.kind == "text" else subject.kind,
        "pipeline_tag": subject.task,
        "tags": ["dualenc", *(["image-text"] if subject.task.startswith("zero-shot-image") else [])],
        "model-index": [{"name": title, "results": [_indexed(one) for one in measured]}] if measured else None,
    }
    lines = ["---", _yaml({key: value for key, value in about.items() if value is not None}), "---", ""]
    lines += [f"# {_text(title)}", "", f"{TITLES[subject.kind]}.", "", *_table(("", ""), subject.facts)]
    figures = _figures(subject, measured)
    lines += ["## How good it is", "", *(figures or ["It comes without measurements.", ""])]
    lines += _training(subject)
    lines += ["## Licence", "", f"{licence}." if licence else "No licence was named.", ""]
    lines += _loading(subject, repo, revision or "main")
    return "\n".join([*lines, f"Written by dualenc {version('dualenc')}.", ""])


def _figures(subject: Subject, measured: Sequence[Measured]) -> list[str]:
    """What was measured, with intervals, and what a run measured while it trained."""
    lines = []
    if measured:
        rows = [
            (
                one.dataset + (f" ({one.split})" if one.split else ""),
                TASKS.get(one.kind, ("", one.kind))[1],
                metric,
                f"{value:.4g}",
                "{:.4g} to {:.4g}".format(*one.intervals[metric]) if metric in one.intervals else "",
                f"{one.n:,}",
            )
            for one in measured
            for metric, value in one.metrics.items()
        ]
        lines += _table(("set", "task", "metric", "value", "95% interval", "n"), rows)
        for one in measured:
            if one.problems:
                lines += [f"The set {_text(one.dataset)} was not complete: {_text('; '.join(one.problems))}.", ""]
        if subject.fingerprint is None:
            lines += [
                f"These are figures of the model {_text(measured[0].model)} with the fingerprint "
                f"{_text(measured[0].fingerprint)}. That this folder was exported from it was not checked.",
                "",
            ]
    if subject.run is not None:
        step, figures = measured_in_training(subject.run, subject.folder.name)
        if figures:
            lines += [f"While it was trained, after step {step:,}, without intervals:", ""]
            lines += _table(("metric", "value"), [(name, f"{value:.4g}") for name, value in figures.items()])
    return lines


def _training(subject: Subject) -> list[str]:
    """The data of a run, and its configuration."""
    if subject.run is None:
        return ["## Data", "", "It comes without the record of a run: what it was trained on is not known here.", ""]
    path = subject.run / "run.json"
    record = _object(read_json(path), path)
    config = _part(record, "config", path)
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
    lines = ["## Data", "", *_table(("", ""), [(words, f"{x:,}" if isinstance(x, int) else x) for words, x in facts])]
    data = config.get("data")
    data = data.get("init_args", data) if isinstance(data, dict) else {}
    data = data if isinstance(data, dict) else {}
    if sources := {key: data[key] for key in ("train", "val", "captions", "select") if data.get(key) is not None}:
        lines += ["As the run's configuration names it:", "", *_block("yaml", _yaml(_public(sources))), ""]
    if config:
        lines += ["## Configuration", "", "<details><summary>of the run</summary>", ""]
        lines += [*_block("yaml", _yaml(_public(config))), "", "</details>", ""]
    return lines


def _loading(subject: Subject, repo: str, revision: str) -> list[str]:
    spec = f"hf-hub:{repo}" + (f"@{revision}" if revision != "main" else "")
    both = subject.task.startswith("zero-shot-image")  # images and texts
    own = {
        "dualenc": f'import dualenc\n\nembedder = dualenc.load("{spec}")\n'
        'images = embedder.embed_images(["photo.jpg"])  # (1, E), unit length\n'
        'texts = embedder.embed_texts(["a dog on a beach"])\nprint(images @ texts.T)',
        "text": f'import dualenc\n\nmodel = dualenc.load_text("{spec}")\nprint(model.embed(["a sentence"]))',
    }
    lines = ["## How to load it", ""]
    for reader in subject.readers:
        code = own[subject.kind] if reader == "dualenc" else _code(reader, both, repo, revision)
        lines += [f"With {reader}:", "", *_block("python", code), ""]
    lines.append(f"This takes what the branch {_text(revision)} is when it is fetched.")
    if subject.pinned:
        pinned = f"`hf-hub:{repo}@HASH`" if "dualenc" in subject.readers else '`revision="HASH"`'
        lines.append(f"{pinned}, with the hash of a commit of this repository's history, is the same for good.")
    lines.append("")
    if subject.fingerprint is not None:
        others = EXPORTS if subject.kind == "dualenc" else ("sentence-transformers", "onnx")
        lines += ["Other libraries read what `dualenc export` writes, where they have such an architecture:", ""]
        for name in others:
            lines += [*_block("sh", f"dualenc export {spec} OUT --format {name}"), ""]
            lines += [*_block("python", _code(name, both)), ""]
    return lines


def _code(library: str, both: bool, repo: str = "", revision: str = "") -> str:
    """A program that loads a model with a library: of a repository, or of the folder OUT."""
    where = f'"{repo}", revision="{revision}"' if repo else '"OUT"'
    fetching = ["import huggingface_hub"] if repo else []
    folder = f"folder = huggingface_hub.snapshot_download({where})" if repo else f"folder = {where}"
    images = ['image = onnxruntime.InferenceSession(f"{folder}/image.onnx")'] if both else []
    processor = [f"processor = AutoImageProcessor.from_pretrained({where})"] if both else []
    return "\n".join(
        {
            "open_clip": [
                *fetching,
                "import open_clip",
                "",
                folder,
                'model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")',
                "model.eval()  # it comes ready to be trained, dropout and all",
                'tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")',
            ],
            "transformers": [
                f"from transformers import {'AutoImageProcessor, ' * both}AutoModel, AutoTokenizer",
                "",
                f"model = AutoModel.from_pretrained({where})",
                f"tokenizer = AutoTokenizer.from_pretrained({where})",
                *processor,
            ],
            "sentence-transformers": [
                "from sentence_transformers import SentenceTransformer",
                "",
                f"model = SentenceTransformer({where})",
                'print(model.encode(["a sentence"]))',
            ],
            "onnx": [
                *fetching,
                "import onnxruntime",
                "import tokenizers",
                "",
                folder,
                *images,
                'text = onnxruntime.InferenceSession(f"{folder}/text.onnx")',
                'tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")',
                "tokenizer.encode_special_tokens = True  # the name of one in a text is text",
            ],
        }[library]
    )


def _indexed(one: Measured) -> dict[str, Any]:
    """A set's figures in the hub's metadata; intervals are `args`, for which it has no other place."""
    task, words = TASKS.get(one.kind, (one.kind, one.kind))
    metrics = []
    for name, value in one.metrics.items():
        if math.isfinite(value):
            args = {"n": one.n, "interval_95": list(one.intervals[name])} if name in one.intervals else {"n": one.n}
            metrics.append({"type": name, "value": value, "args": args})
    dataset = {"type": re.sub(r"[^a-z0-9_.]+", "-", one.dataset.lower()).strip("-") or "set", "name": one.dataset}
    return {
        "task": {"type": task, "name": words},
        "dataset": {**dataset, **({"split": one.split} if one.split else {})},
        "metrics": metrics,
    }


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120).rstrip("\n")


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


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(map(_text, row)) + " |" for row in rows), ""]


def _block(language: str, text: str) -> list[str]:
    """A fenced block, with a fence that is not in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return [f"{fence}{language}", text, fence]


def _text(value: Any) -> str:
    """Words of anybody's in one line, with all that would be markup escaped; a link is code, and leads nowhere."""
    words = re.split(r"([`|\s]+)", one_line(value))
    return "".join(f"`{word}`" if _LINK.search(word) else _escaped(word) for word in words)


def _escaped(text: str) -> str:
    return re.sub(r"[\\`*\[\]<>|~$&!#]|(?<![^\W_])_|_(?![^\W_])", lambda found: f"\\{found[0]}", text)
