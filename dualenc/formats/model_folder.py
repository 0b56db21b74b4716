"""Folders of models: detection of their kind, and of the model in a run directory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.download import hub_folder
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.arguments import shown_value
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json, similar_paths
from dualenc.utils.text import printable, quoted

CONFIG = "config.json"
TEXT_MODEL = "dualenc.json"
OPEN_CLIP = "open_clip_config.json"
MODULES = "modules.json"
EXPORT = "export.json"  # written by `dualenc export`: format, fingerprint of the model, notes
OWN_FILES = ("config.json", "model.safetensors", "tokenizer.json", "preprocess.json")  # files of a model directory
# Files that a model directory may have. The last but one says of a tokenizer what tokenizer.json cannot say.
POSSIBLE_FILES = (*OWN_FILES, "tokenizer_config.json", "README.md")

Kind = Literal["dual_encoder", "text_model", "open_clip", "sentence_transformers", "transformers"]


@dataclass(frozen=True)
class ModelFolder:
    """Folder of a model, and the kinds of model that it holds.

    Attributes:
        path: the folder; of a run directory its `best/`, or else its `last/`.
        kinds: the kinds. "dual_encoder" is a model directory, "text_model" a folder of `TextPredictor.save`; the
            others are formats of other libraries. A folder from the hub may hold several.
        config: the parsed `config.json`; empty without one.
        run: the run directory of a `best/` or `last/`; None for other folders.
    """

    path: Path
    kinds: tuple[Kind, ...]
    config: dict[str, Any]
    run: Path | None

    @property
    def ours(self) -> bool:
        """True for a folder in a format of dualenc."""
        return bool({"dual_encoder", "text_model"} & set(self.kinds))

    def first(self, *wanted: Kind) -> Kind | None:
        """Return the first of the wanted kinds that the folder holds, or None."""
        return next((kind for kind in wanted if kind in self.kinds), None)


def detect(path: str | os.PathLike[str]) -> ModelFolder:
    """Detect the kinds of model in a folder, or in the `best/` or `last/` of a run directory.

    Returns:
        The folder with its kinds, which are empty if it does not hold a model.

    Raises:
        ModelError: If its `config.json` cannot be read.
    """
    path = Path(path)
    for inside in (path, path / "best", path / "last"):
        if kinds := _kinds(inside):
            config = read_json(inside / CONFIG) if (inside / CONFIG).is_file() else {}
            parents = (path, inside.resolve().parent) if inside.resolve().name in ("best", "last") else ()
            run = next((one for one in parents if (one / "run.json").is_file()), None)
            return ModelFolder(inside, kinds, config if isinstance(config, dict) else {}, run)
    return ModelFolder(path, (), {}, None)


def _kinds(folder: Path) -> tuple[Kind, ...]:
    """Return the kinds of model in a folder, known by its configuration files."""
    marks: dict[str, Kind] = {
        TEXT_MODEL: "text_model",
        OPEN_CLIP: "open_clip",
        MODULES: "sentence_transformers",
    }
    kinds: list[Kind] = [kind for name, kind in marks.items() if (folder / name).is_file()]
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        kinds.append("dual_encoder" if isinstance(config, dict) and "format" in config else "transformers")
    return tuple(kinds)


def open_folder(spec: str | os.PathLike[str], patterns: Sequence[str], what: str = "model") -> ModelFolder:
    """Open the folder that a spec names, or download files of `hf-hub:owner/name[@revision]`.

    Args:
        spec: the spec.
        patterns: patterns of the files to download.
        what: what the error calls the spec.

    Raises:
        ModelError: If there is no such folder or repository.
    """
    name = spec_name(spec)
    path = hub_folder(name, patterns) if name.startswith("hf-hub:") else Path(name)
    if path.is_file():
        raise ModelError(
            f"{what} {quoted(name)} is a file: pass the folder of a model or of a run; for a checkpoint of open_clip "
            "pass open_clip:ARCH/FILE"
        )
    if not path.is_dir():
        more = " or open_clip:ARCH/PRETRAINED" if what == "model" else ""
        found = [printable(str(one)) for one in similar_paths(path) if one.is_dir()]
        near = f"; did you mean {' or '.join(found)}?" if found else ""
        raise ModelError(f"{what} {quoted(name)} must be a folder that exists, or hf-hub:owner/name{more}{near}")
    return detect(path)


def spec_name(spec: str | os.PathLike[str]) -> str:
    """Return a spec as a string.

    Raises:
        ModelError: If it is something else.
    """
    if not isinstance(spec, str | os.PathLike):
        raise ModelError(f"a model cannot be {shown_value(spec)}: pass the path of its folder, or hf-hub:owner/name")
    return os.fspath(spec)


def other_content(path: Path) -> str | None:
    """Return what a folder without a model holds instead, and the way out, as the end of a message; None if unknown."""
    if (path / EXPORT).is_file():
        kind = read_json(path / EXPORT).get("format", "another format")
        return f"an export to {printable(str(kind))}, which dualenc does not run: load the model that was exported"
    if (path / "run.json").is_file():
        return "a run without a model yet: its best/ and last/ are missing"
    inside = sorted(one for one in path.iterdir() if one.is_dir())
    if models := [str(one) for one in inside if detect(one).kinds]:
        return f"a folder of models: pass one of them, such as {printable(models[0])}"
    if next(path.glob("*.tar"), None) is not None:
        return "a folder of shards: pass the model that was trained on them"
    return None


def check_tokenizer(tokenizer: Tokenizer, text: TextConfig, where: str = "") -> None:
    """Refuse a tokenizer whose output a text encoder does not take.

    Args:
        tokenizer: the tokenizer.
        text: the encoder's architecture.
        where: start of the error message.

    Raises:
        ModelError: If its vocabulary is larger than the encoder's, or it makes longer texts.
    """
    start = f"{where}: " if where else ""
    if tokenizer.vocab_size > text.vocab_size:
        raise ModelError(
            f"{start}the tokenizer has {tokenizer.vocab_size} entries, the model's vocab_size {text.vocab_size}"
        )
    if tokenizer.context_length > text.context_length:
        raise ModelError(
            f"{start}the tokenizer gives {tokenizer.context_length} tokens, the model takes {text.context_length}"
        )
