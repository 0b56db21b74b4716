"""Folders of models: what kind of folder is this, asked here only, and where in a run directory a model lies."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.download import hub_folder
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json

CONFIG = "config.json"
TEXT_MODEL = "dualenc.json"
OPEN_CLIP = "open_clip_config.json"
MODULES = "modules.json"
ONNX = "onnx.json"
EXPORT = "export.json"  # what `dualenc export` says of a folder: format, fingerprint of the model, notes
OWN_FILES = ("config.json", "model.safetensors", "tokenizer.json", "preprocess.json")  # of a model directory

Kind = Literal["dual_encoder", "text_model", "open_clip", "sentence_transformers", "transformers", "onnx"]


@dataclass(frozen=True)
class ModelFolder:
    """A folder and the formats in which it holds a model.

    Attributes:
        path: the folder; of a run directory its `best/`, or else its `last/`.
        kinds: the formats. "dual_encoder" is a model directory, "text_model" a folder of `TextPredictor.save`, the
            others are those of other libraries. A folder from the hub may hold several.
        config: the parsed `config.json`; empty where there is none.
        run: the run directory, where this is its `best/` or `last/`.
    """

    path: Path
    kinds: tuple[Kind, ...]
    config: dict[str, Any]
    run: Path | None

    @property
    def ours(self) -> bool:
        """Whether dualenc wrote it for itself."""
        return bool({"dual_encoder", "text_model"} & set(self.kinds))

    def first(self, *wanted: Kind) -> Kind | None:
        """Return the first of the formats that it holds, or None."""
        return next((kind for kind in wanted if kind in self.kinds), None)


def detect(path: str | os.PathLike[str]) -> ModelFolder:
    """Return what a folder holds, or the `best/` or `last/` of a run directory; without any kind where it is no model.

    Raises:
        ModelError: its `config.json` cannot be read.
    """
    path = Path(path)
    for inside in (path, path / "best", path / "last"):
        if kinds := _kinds(inside):
            config = read_json(inside / CONFIG) if (inside / CONFIG).is_file() else {}
            near = (path, inside.resolve().parent) if inside.resolve().name in ("best", "last") else ()
            run = next((one for one in near if (one / "run.json").is_file()), None)
            return ModelFolder(inside, kinds, config if isinstance(config, dict) else {}, run)
    return ModelFolder(path, (), {}, None)


def _kinds(folder: Path) -> tuple[Kind, ...]:
    marks: dict[str, Kind] = {
        TEXT_MODEL: "text_model",
        OPEN_CLIP: "open_clip",
        MODULES: "sentence_transformers",
        ONNX: "onnx",
    }
    kinds: list[Kind] = [kind for name, kind in marks.items() if (folder / name).is_file()]
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        kinds.append("dual_encoder" if isinstance(config, dict) and "format" in config else "transformers")
    return tuple(kinds)


def open_folder(spec: str | os.PathLike[str], patterns: Sequence[str], what: str = "model") -> ModelFolder:
    """Return what a spec names: a folder, or `hf-hub:owner/name[@revision]`, of which files are fetched.

    Args:
        spec: the spec.
        patterns: of the files that are fetched.
        what: for the error.

    Raises:
        ModelError: there is no such folder or repository.
    """
    name = os.fspath(spec)
    path = hub_folder(name, patterns) if name.startswith("hf-hub:") else Path(name)
    if not path.is_dir():
        more = " or open_clip:ARCH/PRETRAINED" if what == "model" else ""
        raise ModelError(f"{what} {name!r} is no folder, and no hf-hub:owner/name{more}")
    return detect(path)


def check_tokenizer(tokenizer: Tokenizer, text: TextConfig, where: str = "") -> None:
    """Refuse a tokenizer that gives what a text encoder does not take.

    Args:
        tokenizer: the tokenizer.
        text: the encoder's architecture.
        where: what the error begins with.

    Raises:
        ModelError: it has more entries, or makes longer texts.
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
