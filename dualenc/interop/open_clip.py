"""The export format of open_clip."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dualenc.formats.huggingface.architecture import fitted, with_segment
from dualenc.formats.huggingface.tokenizers import TOKENIZER_FILES, tokenizer_config
from dualenc.formats.model_folder import OPEN_CLIP
from dualenc.formats.open_clip import config as open_clip_config
from dualenc.formats.open_clip.tokenizer import open_clip_tokenizer_config
from dualenc.formats.state_dict import write_state
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor, hub_config
from dualenc.interop import references
from dualenc.interop.export_format import ExportFormat, read_object
from dualenc.interop.inputs import Inputs, parts_of
from dualenc.interop.verify import Check
from dualenc.report.card import ModelSource
from dualenc.utils.errors import ModelError
from dualenc.utils.files import write_json

WEIGHTS = "open_clip_model.safetensors"


class OpenClipFormat(ExportFormat):
    """Format of the folders that open_clip loads as "local-dir:FOLDER"; for dual encoders only."""

    name = "open_clip"
    files = (OPEN_CLIP, WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json")
    uploaded = (OPEN_CLIP, WEIGHTS, "config.json", "spiece.model", *TOKENIZER_FILES)
    reference = references.OPEN_CLIP
    offered_for = ("dual encoder",)

    def write(self, model: Embedder | TextPredictor, folder: Path) -> list[str]:
        """Write a dual encoder; see `ExportFormat.write`."""
        if not isinstance(model, Embedder):
            raise ModelError(f"{model.name} is a text model, but open_clip loads dual encoders only")
        text_cfg = write_open_clip(model, folder, str(folder))["text_cfg"]
        notes = []
        if "hf_tokenizer_name" in text_cfg:
            notes.append(
                "open_clip cleans texts (blanks, entities, curly quotes) and reads the name of a special token in a "
                "text as that token: such texts may get other ids there"
            )
        if "hf_model_name" in text_cfg:
            notes.append(
                "open_clip finds the text encoder by the folder or repository that hf_model_name in "
                f"{OPEN_CLIP} names: change it if you move the folder"
            )
        return notes

    def checks(self, model: Embedder | TextPredictor, folder: Path, inputs: Inputs) -> list[Check]:
        """Return the comparison of all outputs, with the folder under the name that open_clip takes."""
        return [check._replace(model=f"local-dir:{folder}") for check in super().checks(model, folder, inputs)]

    def finish(self, folder: Path, out: Path) -> None:
        """Write the final path into `hf_model_name`, which open_clip looks up as the text encoder."""
        fields = read_object(folder / OPEN_CLIP)
        if "hf_model_name" in fields["model_cfg"]["text_cfg"]:
            fields["model_cfg"]["text_cfg"]["hf_model_name"] = str(out.resolve())
            write_json(folder / OPEN_CLIP, fields)

    def snippet(self, source: ModelSource, images: bool) -> str:
        """Return a program that loads model, preprocessing and tokenizer."""
        return source.with_folder(
            "import open_clip",
            'model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")\n'
            "model.eval()  # open_clip returns it in training mode, with dropout\n"
            'tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")',
        )

    def settings(self, folder: Path) -> dict[str, Any]:
        """Return `model_cfg` of `open_clip_config.json`."""
        return read_config(folder)["model_cfg"]

    def is_pinned(self, folder: Path) -> bool:
        """Return False for a text encoder of Hugging Face: open_clip always reads its configuration from main."""
        return not self.settings(folder)["text_cfg"].get("hf_model_name")

    def prepare_upload(self, staged: Path, folder: Path, repo: str, revision: str | None) -> None:
        """Replace the path of this folder by the repository in the keys of tokenizer and text encoder.

        Raises:
            ModelError: If open_clip could not read the text encoder from this branch.
        """
        config = read_config(folder)
        text_cfg = config["model_cfg"]["text_cfg"]
        for key in ("hf_model_name", "hf_tokenizer_name"):
            name = text_cfg.get(key)
            if not isinstance(name, str) or not name:
                continue
            # A path can only mean this folder, since an export names no other; any other name is on the hub.
            if os.path.isabs(name) or name.startswith(".") or (folder / name).exists():
                text_cfg[key] = repo
        if text_cfg.get("hf_model_name") == repo and revision not in (None, "main"):
            raise ModelError(
                f"--revision {revision}: open_clip reads the configuration of a text encoder of Hugging Face from "
                "main: leave --revision out, or name another repository"
            )
        (staged / OPEN_CLIP).unlink()
        write_json(staged / OPEN_CLIP, config)


def write_open_clip(embedder: Embedder, folder: Path, name: str) -> dict[str, Any]:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads.

    Args:
        embedder: the dual encoder.
        folder: an empty folder.
        name: folder or repository in which open_clip finds the configuration of a text encoder of Hugging Face.

    Returns:
        The `model_cfg` that was written.

    Raises:
        ModelError: If open_clip cannot express a part of the model; the message names the part.
    """
    model, (tokenizer, preprocess) = embedder.dual_encoder, parts_of(embedder)
    ids = tokenizer.backend.encode("").ids  # the special tokens alone, of which the last one closes a text
    model_cfg = open_clip_config.write_config(model.config, ids[-1] if ids else None, name)
    text_cfg, config = model_cfg["text_cfg"], model.config
    found = fitted(config.text, open_clip_config.HUGGING_FACE) if "hf_model_name" in text_cfg else None
    if found is not None:
        config = dataclasses.replace(config, text=found[1])
        write_json(folder / "config.json", hub_config(*found, {}, tokenizer))
    text_cfg |= open_clip_tokenizer_config(tokenizer, config.text)
    # `fitted` may have given the text tower a segment embedding, which the format requires.
    state = with_segment(model.state_dict(), config.text)
    if "timm_model_name" not in model_cfg["vision_cfg"]:
        state = open_clip_config.fold(state)
    save_file(write_state(state, open_clip_config.rules_of(model_cfg, config)), folder / WEIGHTS)
    preprocess_cfg = {
        "size": preprocess.size,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize,
    }
    write_json(folder / OPEN_CLIP, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, config.text))
    return model_cfg


def read_config(folder: Path) -> dict[str, Any]:
    """Read `open_clip_config.json`.

    Raises:
        ModelError: If the file, its `model_cfg` or the `text_cfg` in that is not a JSON object.
    """
    config = read_object(folder / OPEN_CLIP)
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not isinstance(model.get("text_cfg"), dict):
        raise ModelError(f"{folder / OPEN_CLIP}: model_cfg and its text_cfg must be objects: export it again")
    return config
