"""Dual encoders of others on disk: open_clip's and Hugging Face's, read as one of ours."""

import os
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.data.images import Preprocess
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.download import hub_folder
from dualenc.formats.huggingface import dual as hugging_face
from dualenc.formats.huggingface.family import Config
from dualenc.formats.huggingface.text_checkpoint import open_text
from dualenc.formats.huggingface.tokenizers import TOKENIZER_FILES, longest, padding_token, read_tokenizer
from dualenc.formats.model_folder import CONFIG, OPEN_CLIP, detect, open_folder
from dualenc.formats.open_clip import config as open_clip
from dualenc.formats.open_clip.tokenizer import open_clip_tokenizer, tokenizer_folder
from dualenc.formats.state_dict import PICKLED, SAFE, Rule, Weights, read_state
from dualenc.inference.embedder import Embedder
from dualenc.inference.open_clip import load_open_clip
from dualenc.models.dual_encoder import DualConfig, DualEncoder
from dualenc.models.image_encoder import ImageConfig
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json

OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", *SAFE, *PICKLED,
)  # fmt: skip
HUB_WEIGHTS = {
    True: [(file,) for file in OPEN_CLIP_WEIGHTS[:4]],
    False: [(SAFE[0],), (SAFE[1], "model-*.safetensors"), (PICKLED[0],), (PICKLED[1], "pytorch_model-*.bin")],
}
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
OF_ARCHIVES = ("input_resolution", "context_length", "vocab_size")  # numbers in the state of OpenAI's archives
TEXT_OF_OLD = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")


@dataclass(frozen=True)
class DualCheckpoint:
    """A dual encoder of others, of which only the configuration has been read.

    Attributes:
        spec: as it was asked for.
        config: the architecture.
        preprocess: the evaluation transform.
        peers: the libraries to check it with, and what each of them loads.
        notes: what becomes another than it was, in words.
    """

    spec: str
    config: DualConfig
    preprocess: Preprocess
    peers: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    _tokenizer: Callable[[], Tokenizer] = field(repr=False)
    _state: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Tensor]] = field(repr=False)

    def embedder(self) -> Embedder:
        """The model with its weights, on the CPU, in single precision and eval mode.

        Raises:
            ModelError: the tensors are not those of the configuration (names ten of them), or the tokenizer does not
                fit.
        """
        with sense(self.spec):
            tokenizer = self._tokenizer()
        with sense(self.spec), torch.device("meta"):  # no memory before it is known that the tensors are there
            shapes = {name: tuple(x.shape) for name, x in DualEncoder.from_config(self.config).state_dict().items()}
        state = self._state(shapes)
        with sense(self.spec):
            model = DualEncoder.from_config(self.config)
        model.load_state_dict(state)
        return Embedder(model.eval(), tokenizer, self.preprocess, self.spec)


def open_dual(spec: str | os.PathLike[str]) -> DualCheckpoint:
    """Reads the configuration of a dual encoder that another library wrote.

    Args:
        spec: `open_clip:ARCH/WEIGHTS`, where WEIGHTS is a tag of open_clip's or a local file; `open_clip:ARCH` for its
            random weights; a folder with open_clip_config.json, or with a config.json of Hugging Face's CLIPModel,
            SiglipModel or VisionTextDualEncoderModel; or `hf-hub:owner/name[@revision]` with one of these.

    Raises:
        ModelError: it is none of these, or asks for what dualenc does not compute; names the file and the key.
    """
    name = os.fspath(spec)
    if name.startswith("open_clip:"):
        inside = name.removeprefix("open_clip:")
        if not inside.startswith(("hf-hub:", "local-dir:")):
            return _architecture(name, inside)
        name = inside.removeprefix("local-dir:")
    if Path(name).is_file():
        raise ModelError(f"{name} does not say of what architecture it is: write open_clip:ARCH/{name}")
    found = open_folder(name, [OPEN_CLIP, CONFIG, *PROCESSORS, *TOKENIZER_FILES])
    kind = found.first("open_clip", "dual_encoder", "transformers")
    if name.startswith("hf-hub:"):
        for files in HUB_WEIGHTS[kind == "open_clip"]:  # one of the copies that there may be
            folder = hub_folder(name, files)
            if any(next(folder.glob(pattern), None) for pattern in files):
                break
    if kind == "open_clip":
        return _open_clip_folder(name, found.path)
    if kind == "dual_encoder":
        raise ModelError(f"{found.path} is a model of dualenc already: load it as it is")
    if kind is None:
        raise ModelError(f"{found.path} is no model to import: it has neither {OPEN_CLIP} nor {CONFIG}")
    return _hugging_face(name, found.path, found.config)


@contextmanager
def sense(where: str) -> Iterator[None]:
    """What cannot be computed with the numbers of a config is its author's mistake, and one line."""
    try:
        yield
    except ModelError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ModelError(f"{where}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _architecture(spec: str, name: str) -> DualCheckpoint:
    """One of open_clip's own architectures, with weights by tag or of a file."""
    import open_clip as library

    architecture, _, weights = name.partition("/")
    model_cfg: Config | None = library.get_model_config(architecture)
    file = Path(weights) if weights and Path(weights).is_file() else None
    known: Any = {} if file or not weights else library.get_pretrained_cfg(architecture, weights)
    if model_cfg is None or (weights and not file and not known):
        with sense(spec):
            load_open_clip(name)  # which says what open_clip has instead
        raise ModelError(f"open_clip has no {name}")
    quick = known.get("quick_gelu", False)
    if quick != bool(model_cfg.get("quick_gelu")) and known:
        better = f"{architecture}-quickgelu" if quick else architecture.removesuffix("-quickgelu")
        raise ModelError(
            f"{spec}: these weights were trained {'with' if quick else 'without'} quick_gelu, which {architecture} "
            f"{'does not have' if quick else 'has'}: name open_clip:{better}/{weights}"
        )
    if known:
        try:
            file = Path(library.download_pretrained(known))
        except Exception as error:  # of the hub's client, or of urllib
            raise ModelError(f"{spec} cannot be had ({(str(error).splitlines() or [''])[0]})") from None
    return _open_clip(spec, f"{architecture}/{weights}" if weights else architecture, model_cfg, known, None, file)


def _open_clip_folder(spec: str, folder: Path) -> DualCheckpoint:
    fields = read_json(folder / OPEN_CLIP)
    if not isinstance(fields, dict) or not isinstance(fields.get("model_cfg"), dict):
        raise ModelError(f"{folder / OPEN_CLIP} has no model_cfg")
    files = [folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()]
    if not files:
        raise ModelError(f"{folder} holds no weights: neither {' nor '.join(OPEN_CLIP_WEIGHTS[:3])}")
    preprocess = fields.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise ModelError(f"{folder / OPEN_CLIP}: preprocess_cfg must be an object, not {preprocess!r}")
    return _open_clip(spec, f"local-dir:{folder}", fields["model_cfg"], preprocess, folder, files[0])


def _open_clip(
    spec: str, peer: str, model_cfg: Config, preprocess: Config, folder: Path | None, file: Path | None
) -> DualCheckpoint:
    where = str(folder / OPEN_CLIP if folder else spec)
    positions: list[int] = []

    def of_hub(name: str) -> Config:
        inside = Path(name) if Path(name).is_dir() else hub_folder(f"hf-hub:{name}", ["config.json"])
        config = read_json(inside / "config.json")
        positions.append(config.get("max_position_embeddings", 0))
        return config

    with sense(where):
        config = open_clip.read_config(model_cfg, where, of_hub)
        rules = open_clip.rules_of(model_cfg, config)
        read_preprocess = open_clip.read_preprocess(preprocess, config.image.img_size, where)
        config = replace(config, text=_padded(config.text, model_cfg["text_cfg"], folder))

    def state(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
        if file is None:
            with sense(spec):
                theirs: Mapping[str, Tensor] = load_open_clip(peer)[0].model.state_dict()
            return _read(theirs, rules, shapes, spec, bool(positions))
        weights = Weights(file)
        try:
            named = _as_today(weights, custom=any("text." in rule.theirs[0][:5] for rule in rules))
            return _read(named, rules, shapes, str(file), bool(positions))
        finally:
            weights.close()

    return DualCheckpoint(
        spec,
        config,
        read_preprocess,
        (("open_clip", peer),),
        (),
        partial(open_clip_tokenizer, model_cfg["text_cfg"], folder, config.text),
        state,
    )


def _padded(text: TextConfig, text_cfg: Config, folder: Path | None) -> TextConfig:
    """With the padding that its tokenizer makes, where it sees that; `pad_id` of the config is of no weight there."""
    name = text_cfg.get("hf_tokenizer_name")
    if text.pad_to is None or not name:
        return text
    found = padding_token(tokenizer_folder(folder, name))
    return text if found is None else replace(text, pad_id=found)


def _as_today(weights: Mapping[str, Tensor], custom: bool) -> Mapping[str, Tensor]:
    """Tensors of a checkpoint of open_clip's under the names of today.

    Training under DDP put "module." before all, and the first versions had no "text." before those of a text tower.
    """
    names = {name: name.removeprefix("module.") for name in weights}
    if custom and "positional_embedding" in names.values():
        names = {old: f"text.{new}" if new.startswith(TEXT_OF_OLD) else new for old, new in names.items()}
    return _Renamed(weights, {new: old for old, new in names.items()})


class _Renamed(Mapping[str, Tensor]):
    """Tensors under other names, read when asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _read(
    weights: Mapping[str, Tensor],
    rules: list[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    cut: bool,
) -> Mapping[str, Tensor]:
    """The state; `cut` where texts are shorter than the tower has positions, of which the rest are left."""
    name = "text.embeddings.position_embeddings.weight"
    found = [rule.theirs[0] for rule in rules if rule.ours == (name,)]
    if cut and found and found[0] in weights:
        weights = ChainMap({found[0]: weights[found[0]][: shapes[name][0]]}, weights)  # type: ignore[arg-type]
    wanted = {ours: shapes[ours] for rule in rules for ours in rule.ours}
    return open_clip.complete(read_state(weights, rules, wanted, where, OF_ARCHIVES), shapes)


def _hugging_face(spec: str, folder: Path, fields: Config) -> DualCheckpoint:
    path = folder / CONFIG
    with sense(str(path)):
        config, form = hugging_face.read_config(fields, str(path), partial(longest, folder))
        text = config.text
        if text.pad_to is not None and (pad_id := padding_token(folder)) is not None:
            config = replace(config, text=replace(text, pad_id=pad_id, pad_to=text.context_length))
            form = replace(form, text=config.text)
    with sense(str(folder / PROCESSORS[0])):
        preprocess = hugging_face.read_preprocess(folder, config.image.img_size)

    def state(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
        weights = Weights(folder)
        try:
            rules = hugging_face.rules_of(form, config, weights.keys())
            return _read(weights, rules, shapes, str(weights.path), cut=True)
        finally:
            weights.close()

    tokenizer = partial(read_tokenizer, folder, config.text, config.text.context_length)
    return DualCheckpoint(spec, config, preprocess, (("transformers", str(folder)),), (), tokenizer, state)


def join(image: str, text: str, embed_dim: int, seed: int) -> DualCheckpoint:
    """A timm tower and a text tower, each with its weights, and projections that nobody has trained.

    Args:
        image: `timm:NAME` for timm's own weights of this name, or `timm:NAME/FILE` for those of a file.
        text: a text checkpoint, see `dualenc.load_text`.
        embed_dim: dimensions of the common space.
        seed: of the projections.

    Raises:
        ModelError: timm has no such model or weights, or the text tower cannot be read.
    """
    name, _, weights = image.removeprefix("timm:").partition("/")
    found = open_text(text)
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(name)
    size = known.input_size[-1] if known is not None else 224
    config = DualConfig(ImageConfig(name, size), found.config, embed_dim)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DualEncoder.from_config(config)
        model.image.load_pretrained(weights or None)
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"{image}: {(str(error).splitlines() or [''])[0]}") from None
    model.text.load_state_dict(found.model().encoder.state_dict())
    state = model.state_dict()
    said: Any = model.image.vit.pretrained_cfg  # how timm crops, which other libraries have no word for
    squash = said.get("crop_mode") == "squash"
    preprocess = Preprocess(size, **model.image.data_config, resize="squash" if squash else "shortest")
    notes = []
    if not squash and (share := said.get("crop_pct") or 1.0) != 1:
        notes.append(f"of a resized image all is seen, where timm cuts out {share:.3g} of each side")
    peers = [("timm", f"{name}/{weights}" if weights else name)]
    if "transformers" in detect(found.folder).kinds:  # a text tower of ours is loaded by nobody else
        peers.append(("transformers_text", str(found.folder)))
    return DualCheckpoint(
        f"{image} and {text}", config, preprocess, tuple(peers), tuple(notes), found.tokenizer, lambda shapes: state
    )
