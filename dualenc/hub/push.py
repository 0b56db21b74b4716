"""Upload of models to the hub, with the card of `dualenc.hub.card`.

A push is one commit, so that the repository never has the weights of one model and the card of another.
"""

import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from dualenc.formats.model_folder import EXPORT, POSSIBLE_FILES, ModelFolder, detect
from dualenc.hub.card import Subject, card, check_measured, read_measured
from dualenc.inference.embedder import facts_of, load
from dualenc.inference.text_model import FILES as TEXT_FILES
from dualenc.inference.text_model import example_calls, facts_of_text, load_text
from dualenc.interop.export_format import IMAGES_AND_TEXTS, ExportFormat
from dualenc.interop.exporting import FORMATS, find_format
from dualenc.report.card import ModelSource, dual_encoder_program, text_model_program
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json, write_text
from dualenc.utils.text import one_line

# Keys of an export's configuration that the card lists, and keys of the parts that describe its towers.
SIZES = (
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
    """Failure of the hub; the message names the repository and the way out."""


class Pushed(NamedTuple):
    """Result of a push.

    Attributes:
        url: page of the commit.
        spec: model spec of the commit.
    """

    url: str
    spec: str


def push(
    model: str | os.PathLike[str],
    repo: str,
    revision: str | None = None,
    private: bool = False,
    results: Iterable[str | os.PathLike[str]] = (),
    license: str | None = None,
    message: str | None = None,
    format: str | ExportFormat | None = None,
) -> Pushed:
    """Upload a model to the hub in one commit, and compare the files that the hub then lists with those sent.

    Only the files that belong to such a model are uploaded, without checkpoints and hidden files. The same commit
    deletes files of an earlier push that this one does not have; other files in the repository stay.

    Args:
        model: a model directory, a run directory (its `best/`, or else `last/`), a folder of `TextPredictor.save`, or
            a folder that `dualenc export` wrote. A model of dualenc is loaded before the upload.
        repo: `owner/name`, created if it does not exist.
        revision: a branch, created from main if it does not exist; None for main.
        private: create a private repository.
        results: files that an evaluation of this model wrote, for the card.
        license: the hub's name of a license.
        message: message of the commit.
        format: format of an export, if dualenc does not have it; see `dualenc.interop.exporting.find_format`. No code
            is ever imported because a file of the folder names it.

    Raises:
        ModelError: If the folder is not a model, a result is damaged or of another model, an argument is malformed, or
            nobody is logged in.
        HubError: If the hub cannot be reached, refuses the push, or then lists other files.
    """
    from huggingface_hub import get_token

    _check_names(repo, revision, license)
    subject = open_subject(model, format)
    measured = [one for path in results for one in read_measured(path)]
    check_measured(subject, measured)
    text = card(subject, repo, measured, license, revision)
    if get_token() is None:
        raise ModelError(f"pushing to {repo} needs a token: run `hf auth login`, or set HF_TOKEN")
    with TemporaryDirectory(prefix="dualenc-push-") as name:
        folder = Path(name)
        stage(subject, folder, repo, revision)
        write_text(folder / "README.md", text)
        patterns = {
            *TEXT_FILES,
            *POSSIBLE_FILES,
            *subject.uploaded,
            *(x for one in FORMATS.values() for x in _uploaded(one)),
        }
        with _as_hub_errors(repo):
            message = message or f"{subject.title} {version('dualenc')}"
            return _upload(folder, repo, revision, private, message, patterns)


def _check_names(repo: str, revision: str | None, license: str | None) -> None:
    """Raise if an argument is malformed."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, re.ASCII) or re.search(r"--|\.\.|\.git$|[.-]$|[.-]/", repo):
        raise ModelError(f"repository {repo!r} must be owner/name, of letters, digits, -, _ and .")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ModelError(f"license {license!r} must be the hub's name of a license, such as apache-2.0, or other")
    if revision is not None and not re.fullmatch(r"(?![0-9a-f]{40}$)[\w][\w./-]*", revision, re.ASCII):
        raise ModelError(f"revision {revision!r} must be the name of a branch, of letters, digits, -, _, . and /")


def _upload(
    folder: Path, repo: str, revision: str | None, private: bool, message: str, patterns: Collection[str]
) -> Pushed:
    """Upload a folder in one commit, and compare the files that the hub then lists.

    Args:
        folder: the staged files.
        repo, revision, private, message: see `push`.
        patterns: files that any push may have written; others of an earlier push are deleted.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(library_name="dualenc", library_version=version("dualenc"))
    try:
        known = api.model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)  # The later calls take no timeout.
    except RepositoryNotFoundError:
        known = None
    if private and known is not None and not known.private:
        raise HubError(f"{repo} exists and is public: name another, or make this one private on the hub")
    _validate((folder / "README.md").read_text("utf-8"), repo)  # A refused card must not leave an empty repository.
    if known is None:
        api.create_repo(repo, private=private or None)
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    listed = api.list_repo_files(repo, revision=revision)
    old = [name for name in listed if name not in files and _is_uploaded(name, patterns)]
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        commit_message=message,
        revision=revision,
        delete_patterns=[glob.escape(name) for name in old],
    )
    found = {one.path: one for one in api.get_paths_info(repo, list(files), revision=commit.oid)}
    for name, path in files.items():
        if name not in found or not _same(path, found[name]):
            raise HubError(f"{repo} has another {name} at commit {commit.oid} than the one sent: push again")
    return Pushed(commit.commit_url, f"hf-hub:{repo}@{commit.oid}")


@contextmanager
def _as_hub_errors(repo: str) -> Iterator[None]:
    """Turn errors of the hub's client into one line.

    Raises:
        HubError: If the block raises an error.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HubError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException = error
        while type(cause) is RuntimeError and cause.__cause__ is not None:  # raised in an upload thread
            cause = cause.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        if status == 401:
            raise HubError(f"the hub does not accept this token for {repo}: run `hf auth login`") from None
        if status == 403:
            raise HubError(
                f"this token may not write to {repo}: run `hf auth login` with another token, or name another owner"
            ) from None
        if isinstance(cause, HTTPError | ConnectionError) and not status:
            raise HubError(f"the hub at {constants.ENDPOINT} cannot be reached ({one_line(cause)})") from None
        raise HubError(f"the push to {repo} failed ({one_line(cause)})") from None


def _validate(text: str, repo: str) -> None:
    """Ask the hub to validate a card.

    Raises:
        HubError: If the hub refuses the card; the message has its reason.
    """
    from huggingface_hub import RepoCard

    try:
        RepoCard(text).validate("model")
    except ValueError as error:
        try:
            reason = "; ".join(one["message"] for one in json.loads(str(error))["errors"])
        except (ValueError, LookupError, TypeError):
            reason = str(error)
        raise HubError(f"the hub refuses the card of {repo} ({one_line(reason)}): correct it") from None


def _is_uploaded(name: str, patterns: Collection[str]) -> bool:
    """Return whether a file is not hidden and matches a pattern, folder by folder."""
    parts = name.split("/")
    return not parts[-1].startswith(".") and any(
        len(parts) == pattern.count("/") + 1 and all(map(fnmatchcase, parts, pattern.split("/")))
        for pattern in patterns
    )


def _same(path: Path, listed: Any) -> bool:
    """Return whether the hub lists the same content: by SHA-256 for a large file, else by git's hash."""
    size, large = path.stat().st_size, listed.lfs is not None
    digest = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return size == listed.size and digest.hexdigest() == (listed.lfs.sha256 if large else listed.blob_id)


# The model to push


def open_subject(model: str | os.PathLike[str], format: str | ExportFormat | None = None) -> Subject:
    """Detect the model in a folder.

    Args:
        model: the folder; see `push`.
        format: format of an export, if dualenc does not have it.

    Raises:
        ModelError: If the folder cannot be pushed or read.
    """
    found = detect(os.path.realpath(model))  # "." may be the best/ of a run
    if (found.path / EXPORT).is_file():
        return _open_export(found.path, format)
    if format is not None:
        raise ModelError(f"{model} does not have an {EXPORT}, and --format is for exports only: leave it out")
    match found.first("text_model", "dual_encoder"):
        case "text_model":
            return _open_text_model(found)
        case "dual_encoder":
            return _open_dual_encoder(found)
    raise ModelError(
        f"{model} is not a model: name a model directory, run directory, text model, or a folder that `dualenc export` "
        f"wrote with its {EXPORT}; repeat an export of an earlier dualenc, and import a model of another library first"
    )


def _open_dual_encoder(found: ModelFolder) -> Subject:
    """Load a model directory."""
    embedder = load(found.path, "cpu")
    return Subject(
        title="A model directory of dualenc",
        library="dualenc",
        folder=found.path,
        run=found.run,
        facts=[*facts_of(embedder), ("fingerprint", embedder.fingerprint)],
        fingerprint=embedder.fingerprint,
        task=IMAGES_AND_TEXTS,
        programs={"dualenc": dual_encoder_program},
        uploaded=POSSIBLE_FILES,
        offers=[one for one in FORMATS.values() if "dual encoder" in one.offered_for],
    )


def _open_text_model(found: ModelFolder) -> Subject:
    """Load a text model."""
    predictor = load_text(found.path, "cpu")
    tasks = ("text-classification", "token-classification", "question-answering", "fill-mask")
    task = next((task for task in tasks if predictor.model.heads_for(task)), None)
    program = partial(text_model_program, calls=example_calls(predictor.model))
    programs: dict[str, Callable[[ModelSource], str]] = {"dualenc": program}
    if found.config:  # of a family that transformers reads from the same folder
        programs["transformers"] = partial(FORMATS["transformers"].snippet, images=False)
    return Subject(
        title="A text model of dualenc",
        library="dualenc",
        folder=found.path,
        run=found.run,
        facts=[*facts_of_text(predictor), ("fingerprint", predictor.fingerprint)],
        fingerprint=predictor.fingerprint,
        task=task or "feature-extraction",
        programs=programs,
        uploaded=TEXT_FILES,
        offers=[one for one in FORMATS.values() if "text model" in one.offered_for],
    )


def _open_export(folder: Path, format: str | ExportFormat | None) -> Subject:
    """Read a folder that `dualenc export` wrote."""
    about = read_json(folder / EXPORT)
    if not isinstance(about, dict) or not all(isinstance(about.get(key), str) for key in ("format", "fingerprint")):
        raise ModelError(f"{folder / EXPORT} must name a format and a fingerprint: repeat the export")
    name = about["format"]
    # The format comes from the table or from the user, never from an import path in a file.
    chosen = FORMATS.get(name) if format is None else find_format(format)
    if chosen is None:
        raise ModelError(
            f"{folder} is an export in the format {name!r}, which dualenc does not have: name the class of the format "
            "with --format my_package.my_module.MyFormat"
        )
    if chosen.name != name:
        raise ModelError(f"{folder} is an export in the format {name!r}, and --format names {chosen.name}")
    task = chosen.task(folder)
    return Subject(
        title=f"An export of dualenc in the format of {name}",
        library=chosen.library or name,
        folder=folder,
        run=None,
        facts=[*_facts_of_export(chosen, folder), ("fingerprint", about["fingerprint"])],
        fingerprint=about["fingerprint"],
        task=task,
        programs={name: partial(chosen.snippet, images=task == IMAGES_AND_TEXTS)},
        uploaded=_uploaded(chosen),
        weights=chosen.weights,
        notes=[str(note) for note in about.get("notes") or ()],
        format=chosen,
    )


def _uploaded(chosen: ExportFormat) -> tuple[str, ...]:
    """Return the patterns of the files of an export that go up."""
    return (EXPORT, *(chosen.uploaded or chosen.files))


def _facts_of_export(chosen: ExportFormat, folder: Path) -> list[tuple[str, Any]]:
    """Return the number of parameters and the sizes in the configuration of an export."""
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
    settings = chosen.settings(folder)
    for label, part in [("model", settings), *((label, settings.get(key)) for key, label in TOWERS.items())]:
        if isinstance(part, dict):
            values = [f"{key} {part[key]}" for key in SIZES if isinstance(part.get(key), str | int | float)]
            facts += [(label, ", ".join(values))] if values else []
    return facts


def stage(subject: Subject, out: Path, repo: str, revision: str | None = None) -> None:
    """Stage links to the files that go up in an empty folder, and adjust them to the repository.

    Args:
        subject: the model.
        out: an empty folder.
        repo, revision: repository and branch on the hub.

    Raises:
        ModelError: If there are no weights, or the format cannot be loaded from this branch.
    """
    folder = subject.folder
    found = {
        path.relative_to(folder).as_posix(): path
        for pattern in subject.uploaded
        for path in sorted(folder.glob(pattern))
        if path.is_file() and not path.name.startswith(".") and path.name != "README.md"
    }
    if not any(fnmatchcase(name, pattern) for name in found for pattern in subject.weights):
        raise ModelError(f"{folder} does not have weights: write it again")
    for name, path in found.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(path.resolve())
    if subject.format is not None:
        subject.format.prepare_upload(out, folder, repo, revision)
