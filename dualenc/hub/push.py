"""Pushing models to the hub: which files of a folder go there, with the card of `dualenc.hub.card`.

A push is one commit, so that no state of the repository has the weights of one model and the card of another.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from dualenc.formats.huggingface.text_checkpoint import OWN
from dualenc.formats.huggingface.tokenizers import TOKENIZER_FILES
from dualenc.hub.card import TITLES, Subject, card, check_measured, read_measured
from dualenc.inference.embedder import FILES, fingerprint, load
from dualenc.inference.text_model import FILES as TEXT_FILES
from dualenc.inference.text_model import load_text
from dualenc.utils.errors import ModelError, one_line
from dualenc.utils.files import read_json

# What is uploaded of a folder of each kind, where it is there; the card is made anew.
UPLOADED = {
    "dualenc": FILES,
    "text": TEXT_FILES,
    "open_clip": (
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "config.json",
        "spiece.model",
        *TOKENIZER_FILES,
    ),
    "transformers": (
        OWN,
        "config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        *TOKENIZER_FILES,
        *(f"text/{name}" for name in TEXT_FILES),  # the text tower alone
    ),
    "sentence-transformers": (
        OWN,
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        *TOKENIZER_FILES,
        "[0-9]_*/config.json",
        "[0-9]_*/model.safetensors",
    ),
    "onnx": ("onnx.json", "*.onnx", "*.onnx.data", "tokenizer.json", "preprocess.json"),
}

# What is told of an export: of its configuration, and of the parts for its towers.
TOLD = (
    "model_type", "timm_model_name", "embed_dim", "projection_dim", "image_size", "patch_size", "layers",
    "num_hidden_layers", "width", "hidden_size", "heads", "num_attention_heads", "context_length", "vocab_size",
    "opset",
)  # fmt: skip
TOWERS = {
    "vision_cfg": "image tower",
    "vision_config": "image tower",
    "text_cfg": "text tower",
    "text_config": "text tower",
}


class HubError(RuntimeError):
    """What the hub refused or did not do; the message says which repository and the way out."""


class Pushed(NamedTuple):
    """What a push made."""

    url: str  # of the commit
    spec: str  # that loads it again: pinned


def push(
    model: str | os.PathLike[str],
    repo: str,
    revision: str | None = None,
    private: bool = False,
    results: Iterable[str | os.PathLike[str]] = (),
    licence: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Uploads a model to the hub in one commit, and compares what the hub then lists with what was sent.

    Only the files that such a model is made of go there: no checkpoints, nothing hidden, nothing else. What is there of
    an earlier push and not of this one is deleted by the same commit; other files stay.

    Args:
        model: a model directory, a run directory (its `best/`, or else `last/`), a folder of `TextPredictor.save`, or
            an export to open_clip, transformers, sentence-transformers or ONNX. One of ours is read whole before.
        repo: `owner/name`; made where there is none.
        revision: a branch, made from main where there is none; absent, main.
        private: whether the repository is to be private.
        results: files that an evaluation of this model wrote, for the card.
        licence: the hub's name of a licence.
        message: of the commit.

    Raises:
        ModelError: the folder is no model, a result is none or another model's, an argument is malformed, or nobody is
            logged in.
        HubError: the hub cannot be reached, refuses, or has not got what was sent.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, re.ASCII) or re.search(r"--|\.\.|\.git$|[.-]$|[.-]/", repo):
        raise ModelError(f"repository {repo!r} must be owner/name, of letters, digits, -, _ and .")
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise ModelError(f"licence {licence!r} must be a name that the hub has for one, such as apache-2.0, or other")
    if revision is not None and not re.fullmatch(r"(?![0-9a-f]{40}$)[\w][\w./-]*", revision, re.ASCII):
        raise ModelError(f"revision {revision!r} must be the name of a branch, of letters, digits, -, _, . and /")
    subject = open_subject(model)
    measured = [one for path in results for one in read_measured(path)]
    check_measured(subject, measured)
    files = files_of(subject, repo, revision)
    text = card(subject, repo, measured, licence, revision)
    files["README.md"] = text.encode()
    if get_token() is None:
        raise ModelError(f"nobody is logged in who could write to {repo}: `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="dualenc", library_version=version("dualenc"))
    try:
        try:
            there = api.model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)  # what follows waits for ever
        except RepositoryNotFoundError:
            there = None
        if private and there is not None and not there.private:
            raise HubError(f"{repo} is there and public: name another, or make this one private on the hub")
        _validate(text, repo)  # before anything is made that would stay empty
        if there is None:
            api.create_repo(repo, private=private or None)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        gone = [name for name in api.list_repo_files(repo, revision=revision) if name not in files and _uploaded(name)]
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(name, content) for name, content in files.items()]
            + [CommitOperationDelete(name, is_folder=False) for name in gone],
            commit_message=message or f"{TITLES[subject.kind]} {version('dualenc')}",
            revision=revision,
        )
        listed = api.get_paths_info(repo, list(files), revision=commit.oid)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, HubError):
            raise
        cause: BaseException = error
        while type(cause) is RuntimeError and cause.__cause__ is not None:  # of a thread that uploads
            cause = cause.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        if status == 401:
            raise HubError(f"the hub does not take this token for {repo}: `hf auth login`") from None
        if status == 403:
            raise HubError(
                f"this token may not write to {repo}: `hf auth login` with one that may, or name another owner"
            ) from None
        if isinstance(cause, HTTPError | ConnectionError) and not status:
            raise HubError(f"the hub at {constants.ENDPOINT} cannot be reached ({one_line(cause)})") from None
        raise HubError(f"the push to {repo} failed ({one_line(cause)})") from None
    found = {one.path: one for one in listed}
    for name, content in files.items():
        if name not in found or not _same(content, found[name]):
            raise HubError(f"{repo} has another {name} at commit {commit.oid} than was sent: push again")
    return Pushed(commit.commit_url, f"hf-hub:{repo}@{commit.oid}")


def _validate(text: str, repo: str) -> None:
    """Asks the hub whether it takes a card.

    Raises:
        HubError: it does not; says why.
    """
    from huggingface_hub import RepoCard

    try:
        RepoCard(text).validate("model")
    except ValueError as error:
        try:
            said = "; ".join(one["message"] for one in json.loads(str(error))["errors"])
        except (ValueError, LookupError, TypeError):
            said = str(error)
        raise HubError(f"the hub does not take the card of {repo} ({one_line(said)}): correct it") from None


def _uploaded(name: str) -> bool:
    """Whether a push may have written a file of this name, of whatever kind its model was."""
    parts = name.split("/")
    patterns = [pattern.split("/") for kind in UPLOADED.values() for pattern in kind]
    return not parts[-1].startswith(".") and any(
        len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)) for pattern in patterns
    )


def _same(content: Path | bytes, there: Any) -> bool:
    """Whether the hub lists this content: a large file by its SHA-256, another by git's hash of it."""
    data = content if isinstance(content, bytes) else None
    size = len(data) if data is not None else os.path.getsize(content)
    large = there.lfs is not None
    digest = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % size)
    if data is not None:
        digest.update(data)
    else:
        with open(content, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return size == there.size and digest.hexdigest() == (there.lfs.sha256 if large else there.blob_id)


# What is pushed


def open_subject(model: str | os.PathLike[str]) -> Subject:
    """Recognises a folder by its files.

    Raises:
        ModelError: it is nothing that can be pushed, or cannot be read.
    """
    path = Path(os.path.realpath(model))  # `.` may be a run's best/
    folder = next((one for one in (path, path / "best", path / "last") if _kind(one)), None)
    if folder is None:
        raise ModelError(
            f"{model} is no model: name a model directory, run directory, text model, or what `dualenc export` wrote"
        )
    kind = _kind(folder)
    run = next((one for one in (path, path.parent) if (one / "run.json").is_file()), None)
    run = run if folder.name in ("best", "last") else None
    if kind == "dualenc":
        embedder = load(folder, "cpu")
        config, mark = embedder.dual_encoder.config, embedder.fingerprint
        text = config.text
        facts = [
            ("parameters", _millions(p.numel() for p in embedder.model.parameters())),
            ("image tower", f"{config.image.name} at {config.image.img_size} x {config.image.img_size} pixels"),
            ("text tower", f"{text.layers} layer{'s' * (text.layers != 1)} of width {text.width}"),
            ("longest text", f"{text.context_length} tokens of a vocabulary of {text.vocab_size:,}"),
            ("embeddings", f"{config.embed_dim} dimensions, unit length"),
            ("fingerprint", mark),
        ]
        return Subject(kind, folder, run, facts, mark, "zero-shot-image-classification", ["dualenc"])
    if kind == "text":
        predictor = load_text(folder, "cpu")
        text, mark = predictor.model.config, fingerprint(predictor.model, None, predictor.tokenizer.fingerprint)
        heads = predictor.model.head_configs
        facts = [
            ("parameters", _millions(p.numel() for p in predictor.model.parameters())),
            ("text tower", f"{text.layers} layer{'s' * (text.layers != 1)} of width {text.width}"),
            ("longest text", f"{predictor.tokenizer.context_length} tokens of a vocabulary of {text.vocab_size:,}"),
            *((f"head {name}", f"{one.kind} {', '.join(one.labels)}".strip()) for name, one in heads.items()),
            ("fingerprint", mark),
        ]
        kinds = {one.kind for one in heads.values()}
        task = "text-classification" if "classification" in kinds else "fill-mask" if "mlm" in kinds else ""
        readers = ["dualenc", *(["transformers"] if (folder / "config.json").is_file() else [])]
        return Subject(kind, folder, run, facts, mark, task or "feature-extraction", readers)
    about = folder / "README.md"
    if not about.is_file() or not re.search(r"\b[Ww]ritten by dualenc \d", about.read_text("utf-8", "replace")):
        raise ModelError(
            f"{folder} is no export of dualenc, which its {about.name} would say: push what `dualenc export` or "
            "`dualenc import` wrote"
        )
    task = {"sentence-transformers": "sentence-similarity"}.get(kind, "zero-shot-image-classification")
    if kind == "transformers" and "vision_config" not in read_json(folder / "config.json"):
        task = "feature-extraction"
    if kind == "onnx" and not (folder / "image.onnx").is_file():
        task = "feature-extraction"
    pinned = kind != "open_clip" or not _open_clip_config(folder)[1].get("hf_model_name")
    return Subject(kind, folder, None, _facts_of_export(kind, folder), None, task, [kind], pinned)


def _kind(folder: Path) -> str:
    """The key of `UPLOADED` that a folder is of; nothing, where it is of none."""
    for name, kind in (
        ("open_clip_config.json", "open_clip"),
        ("onnx.json", "onnx"),
        ("modules.json", "sentence-transformers"),
        (OWN, "text"),
    ):
        if (folder / name).is_file():
            return kind
    if not (folder / "config.json").is_file():
        return ""
    config = read_json(folder / "config.json")
    keys = config if isinstance(config, dict) else {}
    return "dualenc" if "format" in keys else "transformers" if "model_type" in keys else ""


def _facts_of_export(kind: str, folder: Path) -> list[tuple[str, Any]]:
    """What the files of an export say of it."""
    facts: list[tuple[str, Any]] = []
    sizes = []
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("[0-9]_*/*.safetensors")]):
        try:
            with safe_open(path, "pt") as file:
                sizes += [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read ({one_line(error)})") from None
    if sizes:
        facts.append(("parameters", _millions(sizes)))
    name = {"open_clip": "open_clip_config.json", "onnx": "onnx.json"}.get(kind, "config.json")
    config = read_json(folder / name) if (folder / name).is_file() else {}
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg", {}), dict):
        raise ModelError(f"{folder / name} must be an object")
    config = config.get("model_cfg", config)
    towers = [(words, config.get(key)) for key, words in TOWERS.items()]
    for words, part in [("model", config), *towers]:
        if isinstance(part, dict):
            told = [f"{key} {part[key]}" for key in TOLD if isinstance(part.get(key), str | int | float)]
            facts += [(words, ", ".join(told))] if told else []
    card = folder / "README.md"
    lines = card.read_text("utf-8", "replace").splitlines() if card.is_file() else []
    mark = "Not as it was: "  # what the exporter could not keep
    return facts + [(mark[:-2].lower(), line.removeprefix(mark)) for line in lines if line.startswith(mark)]


def _open_clip_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a folder for open_clip, and what in it is of the text tower."""
    path = folder / "open_clip_config.json"
    config = read_json(path)
    model = config.get("model_cfg") if isinstance(config, dict) else None
    text = model.get("text_cfg") if isinstance(model, dict) else None
    if not isinstance(text, dict):
        raise ModelError(f"{path}: model_cfg and its text_cfg must be objects: export it anew")
    return config, text


def _millions(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 1e6:.1f} M"


def files_of(subject: Subject, repo: str, revision: str | None = None) -> dict[str, Path | bytes]:
    """What is uploaded, by its name there.

    A folder that open_clip reads may name itself where a tokenizer or a text tower is looked up; there it is `repo`.

    Raises:
        ModelError: there are no weights, or open_clip could not read them on this branch.
    """
    folder = subject.folder
    found: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for pattern in UPLOADED[subject.kind]
        for path in sorted(folder.glob(pattern))
        if path.is_file() and not path.name.startswith(".") and path.name != "README.md"
    }
    if not any(name.endswith((".safetensors", ".onnx")) for name in found):
        raise ModelError(f"{folder} has no weights: write it anew")
    if subject.kind == "open_clip":
        config, text = _open_clip_config(folder)
        for key in ("hf_model_name", "hf_tokenizer_name"):
            name = text.get(key)
            # Of the folder, wherever it lies and this program was started; else of the hub.
            if not isinstance(name, str) or not name:
                continue
            if os.path.isabs(name) or name.startswith(".") or (folder / name).exists():
                text[key] = repo
        if text.get("hf_model_name") == repo and revision not in (None, "main"):
            raise ModelError(
                f"--revision {revision}: open_clip reads the configuration of such a text encoder from main: leave it "
                "out, or name a repository of its own"
            )
        found["open_clip_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return found
