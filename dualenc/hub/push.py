"""Pushing models to the hub: which files of a folder go there, with the card of `dualenc.hub.card`.

A push is one commit, so that no state of the repository has the weights of one model and the card of another.
"""

import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from dualenc.formats.huggingface.tokenizers import TOKENIZER_FILES
from dualenc.formats.model_folder import EXPORT, ONNX, OPEN_CLIP, OWN_FILES, Kind, detect
from dualenc.hub.card import TITLES, Subject, card, check_measured, read_measured
from dualenc.inference.embedder import facts_of, load
from dualenc.inference.text_model import FILES as TEXT_FILES
from dualenc.inference.text_model import facts_of_text, load_text
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json, write_json, write_text
from dualenc.utils.text import one_line

# What is uploaded of a folder of each kind, where it is there; the card is made anew.
UPLOADED = {
    "dualenc": OWN_FILES,
    "text": TEXT_FILES,
    "open_clip": (
        EXPORT,
        OPEN_CLIP,
        "open_clip_model.safetensors",
        "config.json",
        "spiece.model",
        *TOKENIZER_FILES,
    ),
    "transformers": (
        EXPORT,
        "config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        *TOKENIZER_FILES,
        *(f"text/{name}" for name in TEXT_FILES),  # the text tower alone
    ),
    "sentence-transformers": (
        EXPORT,
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
    "onnx": (EXPORT, ONNX, "*.onnx", "*.onnx.data", "tokenizer.json", "preprocess.json"),
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
    license: str | None = None,
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
        license: the hub's name of a license.
        message: of the commit.

    Raises:
        ModelError: the folder is no model, a result is none or another model's, an argument is malformed, or nobody is
            logged in.
        HubError: the hub cannot be reached, refuses, or has not got what was sent.
    """
    from huggingface_hub import get_token

    _check_names(repo, revision, license)
    subject = open_subject(model)
    measured = [one for path in results for one in read_measured(path)]
    check_measured(subject, measured)
    text = card(subject, repo, measured, license, revision)
    if get_token() is None:
        raise ModelError(f"nobody is logged in who could write to {repo}: `hf auth login`, or set HF_TOKEN")
    with TemporaryDirectory(prefix="dualenc-push-") as name:
        folder = Path(name)
        stage(subject, folder, repo, revision)
        write_text(folder / "README.md", text)
        with _said(repo):
            return _upload(folder, repo, revision, private, message or f"{TITLES[subject.kind]} {version('dualenc')}")


def _check_names(repo: str, revision: str | None, license: str | None) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, re.ASCII) or re.search(r"--|\.\.|\.git$|[.-]$|[.-]/", repo):
        raise ModelError(f"repository {repo!r} must be owner/name, of letters, digits, -, _ and .")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ModelError(f"license {license!r} must be a name that the hub has for one, such as apache-2.0, or other")
    if revision is not None and not re.fullmatch(r"(?![0-9a-f]{40}$)[\w][\w./-]*", revision, re.ASCII):
        raise ModelError(f"revision {revision!r} must be the name of a branch, of letters, digits, -, _, . and /")


def _upload(folder: Path, repo: str, revision: str | None, private: bool, message: str) -> Pushed:
    """Upload a folder in one commit, which deletes what an earlier push left; compare what the hub then has."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(library_name="dualenc", library_version=version("dualenc"))
    try:
        there = api.model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)  # what follows waits for ever
    except RepositoryNotFoundError:
        there = None
    if private and there is not None and not there.private:
        raise HubError(f"{repo} is there and public: name another, or make this one private on the hub")
    _validate((folder / "README.md").read_text("utf-8"), repo)  # before anything is made that would stay empty
    if there is None:
        api.create_repo(repo, private=private or None)
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    gone = [name for name in api.list_repo_files(repo, revision=revision) if name not in files and _uploaded(name)]
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        commit_message=message,
        revision=revision,
        delete_patterns=[glob.escape(name) for name in gone],
    )
    found = {one.path: one for one in api.get_paths_info(repo, list(files), revision=commit.oid)}
    for name, path in files.items():
        if name not in found or not _same(path, found[name]):
            raise HubError(f"{repo} has another {name} at commit {commit.oid} than was sent: push again")
    return Pushed(commit.commit_url, f"hf-hub:{repo}@{commit.oid}")


@contextmanager
def _said(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line.

    Raises:
        HubError: anything failed.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HubError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
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


def _same(path: Path, there: Any) -> bool:
    """Whether the hub lists this file: a large one by its SHA-256, another by git's hash of it."""
    size, large = path.stat().st_size, there.lfs is not None
    digest = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return size == there.size and digest.hexdigest() == (there.lfs.sha256 if large else there.blob_id)


# What is pushed


KINDS: dict[Kind, str] = {  # of folders, by the names of `TITLES`
    "open_clip": "open_clip",
    "onnx": "onnx",
    "sentence_transformers": "sentence-transformers",
    "text_model": "text",
    "dual_encoder": "dualenc",
    "transformers": "transformers",
}


def open_subject(model: str | os.PathLike[str]) -> Subject:
    """Recognises a folder by its files.

    Raises:
        ModelError: it is nothing that can be pushed, or cannot be read.
    """
    found = detect(os.path.realpath(model))  # `.` may be a run's best/
    first = found.first(*KINDS)
    if first is None:
        raise ModelError(
            f"{model} is no model: name a model directory, run directory, text model, or what `dualenc export` wrote"
        )
    kind, folder = KINDS[first], found.path
    if kind == "dualenc":
        embedder = load(folder, "cpu")
        facts = [*facts_of(embedder), ("fingerprint", embedder.fingerprint)]
        task, mark = "zero-shot-image-classification", embedder.fingerprint
        return Subject(kind, folder, found.run, facts, mark, task, ["dualenc"])
    if kind == "text":
        predictor = load_text(folder, "cpu")
        mark = predictor.fingerprint
        tasks = [task for task in ("text-classification", "fill-mask") if predictor.model.heads_for(task)]
        task = tasks[0] if tasks else ""
        readers = ["dualenc", *(["transformers"] if found.config else [])]
        facts = [*facts_of_text(predictor), ("fingerprint", mark)]
        return Subject(kind, folder, found.run, facts, mark, task or "feature-extraction", readers)
    return _export(kind, folder, found.config)


def _export(kind: str, folder: Path, config: Mapping[str, Any]) -> Subject:
    """A folder that `dualenc export` wrote."""
    path = folder / EXPORT
    about = read_json(path) if path.is_file() else None
    if not isinstance(about, dict) or about.get("format") != kind or not isinstance(about.get("fingerprint"), str):
        raise ModelError(
            f"{folder} is no export of dualenc, which its {EXPORT} would say: push what `dualenc export` or "
            "`dualenc import` wrote, and export again what an earlier dualenc exported"
        )
    task = {"sentence-transformers": "sentence-similarity"}.get(kind, "zero-shot-image-classification")
    if kind == "transformers" and "vision_config" not in config:
        task = "feature-extraction"
    if kind == "onnx" and not (folder / "image.onnx").is_file():
        task = "feature-extraction"
    pinned = kind != "open_clip" or not _open_clip_config(folder)[1].get("hf_model_name")
    mark, notes = about["fingerprint"], [str(note) for note in about.get("notes") or ()]
    facts = [*_facts_of_export(kind, folder), ("fingerprint", mark)]
    return Subject(kind, folder, None, facts, mark, task, [kind], pinned, notes)


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
        facts.append(("parameters", f"{sum(sizes) / 1e6:.1f} M"))
    name = {"open_clip": OPEN_CLIP, "onnx": ONNX}.get(kind, "config.json")
    config = read_json(folder / name) if (folder / name).is_file() else {}
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg", {}), dict):
        raise ModelError(f"{folder / name} must be an object")
    config = config.get("model_cfg", config)
    towers = [(words, config.get(key)) for key, words in TOWERS.items()]
    for words, part in [("model", config), *towers]:
        if isinstance(part, dict):
            told = [f"{key} {part[key]}" for key in TOLD if isinstance(part.get(key), str | int | float)]
            facts += [(words, ", ".join(told))] if told else []
    return facts


def _open_clip_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a folder for open_clip, and what in it is of the text tower."""
    path = folder / OPEN_CLIP
    config = read_json(path)
    model = config.get("model_cfg") if isinstance(config, dict) else None
    text = model.get("text_cfg") if isinstance(model, dict) else None
    if not isinstance(text, dict):
        raise ModelError(f"{path}: model_cfg and its text_cfg must be objects: export it anew")
    return config, text


def stage(subject: Subject, out: Path, repo: str, revision: str | None = None) -> None:
    """Link what is uploaded into an empty folder.

    A folder that open_clip reads may name itself where a tokenizer or a text tower is looked up; there it is `repo`.

    Raises:
        ModelError: there are no weights, or open_clip could not read them on this branch.
    """
    folder = subject.folder
    found = {
        path.relative_to(folder).as_posix(): path
        for pattern in UPLOADED[subject.kind]
        for path in sorted(folder.glob(pattern))
        if path.is_file() and not path.name.startswith(".") and path.name != "README.md"
    }
    if not any(name.endswith((".safetensors", ".onnx")) for name in found):
        raise ModelError(f"{folder} has no weights: write it anew")
    for name, path in found.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(path.resolve())
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
        (out / OPEN_CLIP).unlink()
        write_json(out / OPEN_CLIP, config)
