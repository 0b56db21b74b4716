"""Dual encoders of open_clip and Hugging Face on disk, read as dual encoders of dualenc."""

import os
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.data.images import Preprocess
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.download import hub_folder, hub_or_cache
from dualenc.formats.huggingface import dual as hugging_face
from dualenc.formats.huggingface.family import Config
from dualenc.formats.huggingface.text_checkpoint import open_text
from dualenc.formats.huggingface.tokenizers import (
    TOKENIZER_FILES,
    check_closing,
    longest,
    padding_token,
    read_tokenizer,
)
from dualenc.formats.model_folder import CONFIG, OPEN_CLIP, detect, open_folder
from dualenc.formats.open_clip import config as open_clip
from dualenc.formats.open_clip.tokenizer import open_clip_tokenizer, tokenizer_folder
from dualenc.formats.state_dict import PICKLED, SAFE, Rule, Weights, plain_copy, read_state
from dualenc.formats.timm import load_image_weights
from dualenc.inference.embedder import Embedder
from dualenc.inference.open_clip import check_name, load_open_clip
from dualenc.interop import references
from dualenc.interop.references import Reference
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
ARCHIVE_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # in the state dict of OpenAI's archives
OLD_TEXT_NAMES = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")


@dataclass(frozen=True)
class DualCheckpoint:
    """Dual encoder of another library, of which only the configuration has been read.

    Attributes:
        spec: the spec that names it.
        config: the architecture.
        preprocess: the evaluation transform.
        peers: the references to check it with, each with what it loads.
        notes: differences from the model that is read.
        weights: file or folder of the weights, and the folder that the references read, if it is not this file alone;
            None for weights that the references find themselves.
    """

    spec: str
    config: DualConfig
    preprocess: Preprocess
    peers: tuple[tuple[Reference, str], ...]
    notes: tuple[str, ...]
    weights: tuple[Path, Path | None] | None
    _tokenizer: Callable[[], Tokenizer] = field(repr=False)
    _state: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Tensor]] = field(repr=False)

    def embedder(self) -> Embedder:
        """Load the model with its weights, on the CPU, in single precision and eval mode.

        Raises:
            ModelError: If the tensors do not match the configuration, up to ten of which are named, or the tokenizer
                does not match.
        """
        with one_line_errors(self.spec):
            tokenizer = self._tokenizer()
        with (
            one_line_errors(self.spec),
            torch.device("meta"),
        ):  # Memory is allocated after the tensors have been checked.
            shapes = {name: tuple(x.shape) for name, x in DualEncoder.from_config(self.config).state_dict().items()}
        state = self._state(shapes)
        with one_line_errors(self.spec):
            model = DualEncoder.from_config(self.config)
        model.load_state_dict(state)
        return Embedder(model.eval(), tokenizer, self.preprocess, self.spec)

    @contextmanager
    def readable_peers(self) -> Iterator[tuple[tuple[Reference, str], ...]]:
        """Give the references with what they load: plain copies of weights that they could not read."""
        if self.weights is None:
            yield self.peers
            return
        path, folder = self.weights
        read = str(folder or path)
        with plain_copy(path, folder) as copy:
            yield tuple(
                (one, f"{model.removesuffix(read)}{copy}" if model.endswith(read) else model)
                for one, model in self.peers
            )


def open_dual(spec: str | os.PathLike[str]) -> DualCheckpoint:
    """Read the configuration of a dual encoder that another library wrote.

    Args:
        spec: `open_clip:ARCH/WEIGHTS`, where WEIGHTS is a tag of open_clip or a local file; `open_clip:ARCH` for random
            weights of open_clip; a folder with open_clip_config.json, or with a config.json of a CLIPModel,
            SiglipModel or VisionTextDualEncoderModel of Hugging Face; or `hf-hub:owner/name[@revision]` with one of
            these.

    Raises:
        ModelError: If it is something else, or dualenc cannot compute it; the message names the file and the key.
    """
    name = os.fspath(spec)
    if name.startswith("open_clip:"):
        inside = name.removeprefix("open_clip:")
        if not inside.startswith(("hf-hub:", "local-dir:")):
            return _architecture(name, inside)
        name = inside.removeprefix("local-dir:")
    if Path(name).is_file():
        raise ModelError(f"{name} does not name its architecture: write open_clip:ARCH/{name}")
    found = open_folder(name, [OPEN_CLIP, CONFIG, *PROCESSORS, *TOKENIZER_FILES])
    kind = found.first("open_clip", "dual_encoder", "transformers")
    if name.startswith("hf-hub:"):
        for files in HUB_WEIGHTS[kind == "open_clip"]:  # A repository may have the same weights in several files.
            folder = hub_folder(name, files)
            if any(next(folder.glob(pattern), None) for pattern in files):
                break
    if kind == "open_clip":
        return _open_clip_folder(name, found.path)
    if kind == "dual_encoder":
        raise ModelError(f"{found.path} is a model of dualenc already: load it without an import")
    if kind is None:
        raise ModelError(f"{found.path} is not a model to import: it has neither {OPEN_CLIP} nor {CONFIG}")
    return _hugging_face(name, found.path, found.config)


@contextmanager
def one_line_errors(where: str) -> Iterator[None]:
    """Turn errors about the values of a config, which its author must correct, into one line.

    Args:
        where: file or spec that the message names.

    Raises:
        ModelError: If the block raises an error.
    """
    try:
        yield
    except ModelError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ModelError(f"{where}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _architecture(spec: str, name: str) -> DualCheckpoint:
    """Read an architecture of open_clip, with weights by tag or from a file."""
    import open_clip as library

    architecture, _, weights = name.partition("/")
    file = Path(weights) if weights and Path(weights).is_file() else None
    with one_line_errors(spec):
        check_name(architecture, "" if file else weights)
    model_cfg: Any = library.get_model_config(architecture)
    known: Any = {} if file or not weights else library.get_pretrained_cfg(architecture, weights)
    if known:
        try:
            with hub_or_cache(spec):
                file = Path(library.download_pretrained(known))
        except ModelError:
            raise
        except Exception as error:  # errors of the hub's client and of urllib
            raise ModelError(f"{spec} cannot be downloaded ({(str(error).splitlines() or [''])[0]})") from None
    return _open_clip(spec, f"{architecture}/{weights}" if weights else architecture, model_cfg, known, None, file)


def _open_clip_folder(spec: str, folder: Path) -> DualCheckpoint:
    """Read a folder with open_clip_config.json."""
    fields = read_json(folder / OPEN_CLIP)
    if not isinstance(fields, dict) or not isinstance(fields.get("model_cfg"), dict):
        raise ModelError(f"{folder / OPEN_CLIP} does not have a model_cfg")
    files = [folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()]
    if not files:
        raise ModelError(f"{folder} does not hold weights: it has neither {' nor '.join(OPEN_CLIP_WEIGHTS[:3])}")
    preprocess = fields.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise ModelError(f"{folder / OPEN_CLIP}: preprocess_cfg must be an object, found {preprocess!r}")
    return _open_clip(spec, f"local-dir:{folder}", fields["model_cfg"], preprocess, folder, files[0])


def _open_clip(
    spec: str, peer: str, model_cfg: Config, preprocess: Config, folder: Path | None, file: Path | None
) -> DualCheckpoint:
    """Read an open_clip model, whose weights are loaded later.

    Args:
        spec: the spec that names it.
        peer: what open_clip loads to check it.
        model_cfg: configuration of the model.
        preprocess: configuration of the preprocessing.
        folder: folder of the tokenizer; None for an architecture of open_clip.
        file: weights; None for random ones.
    """
    where = str(folder / OPEN_CLIP if folder else spec)
    positions: list[int] = []

    def of_hub(name: str) -> Config:
        inside = Path(name) if Path(name).is_dir() else hub_folder(f"hf-hub:{name}", ["config.json"])
        config = read_json(inside / "config.json")
        positions.append(config.get("max_position_embeddings", 0))
        return config

    with one_line_errors(where):
        config = open_clip.read_config(model_cfg, where, of_hub)
        rules = open_clip.rules_of(model_cfg, config)
        read_preprocess = open_clip.read_preprocess(preprocess, config.image.img_size, where)
        config = replace(config, text=_padded(config.text, model_cfg["text_cfg"], folder))

    def state(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
        if file is None:
            with one_line_errors(spec):
                theirs: Mapping[str, Tensor] = load_open_clip(peer)[0].model.state_dict()
            return _read(theirs, rules, shapes, spec, bool(positions))
        with closing(Weights(file)) as weights:
            named = _current_names(weights, custom=any("text." in rule.theirs[0][:5] for rule in rules))
            return _read(named, rules, shapes, str(file), bool(positions))

    return DualCheckpoint(
        spec,
        config,
        read_preprocess,
        ((references.OPEN_CLIP, peer),),
        (),
        None if file is None or not peer.endswith(str(folder or file)) else (file, folder),
        partial(open_clip_tokenizer, model_cfg["text_cfg"], folder, config.text),
        state,
    )


def _padded(text: TextConfig, text_cfg: Config, folder: Path | None) -> TextConfig:
    """Return the text config with the padding token of its tokenizer, if the tower attends to padding.

    open_clip ignores the `pad_id` of the config there.
    """
    name = text_cfg.get("hf_tokenizer_name")
    if text.pad_to is None or not name:
        return text
    found = padding_token(tokenizer_folder(folder, name))
    return text if found is None else replace(text, pad_id=found)


def _current_names(weights: Mapping[str, Tensor], custom: bool) -> Mapping[str, Tensor]:
    """Return the tensors of an open_clip checkpoint under the current names.

    The first versions did not write "text." before the names of a text tower.
    """
    if not custom or "positional_embedding" not in weights:
        return weights
    return _Renamed(weights, {f"text.{x}" if x.startswith(OLD_TEXT_NAMES) else x: x for x in weights})


class _Renamed(Mapping[str, Tensor]):
    """Tensors under other names, read on access."""

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
    """Return the state dict.

    Args:
        weights: tensors of the checkpoint.
        rules: names of the tensors.
        shapes: shapes of the model's tensors.
        where: file that messages name.
        cut: drop positions beyond the model's longest text.
    """
    name = "text.embeddings.position_embeddings.weight"
    found = [rule.theirs[0] for rule in rules if rule.ours == (name,)]
    if cut and found and found[0] in weights:
        weights = ChainMap({found[0]: weights[found[0]][: shapes[name][0]]}, weights)  # type: ignore[arg-type]
    wanted = {ours: shapes[ours] for rule in rules for ours in rule.ours}
    return open_clip.complete(read_state(weights, rules, wanted, where, ARCHIVE_NUMBERS), shapes)


def _hugging_face(spec: str, folder: Path, fields: Config) -> DualCheckpoint:
    """Read a folder of Hugging Face."""
    path = folder / CONFIG
    with one_line_errors(str(path)):
        config, form = hugging_face.read_config(fields, str(path), partial(longest, folder))
        text = config.text
        if text.pad_to is not None and (pad_id := padding_token(folder)) is not None:
            config = replace(config, text=replace(text, pad_id=pad_id, pad_to=text.context_length))
            form = replace(form, text=config.text)
    with one_line_errors(str(folder / PROCESSORS[0])):
        preprocess = hugging_face.read_preprocess(folder, config.image.img_size)

    def state(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
        with closing(Weights(folder)) as weights:
            rules = hugging_face.rules_of(form, config, weights.keys())
            return _read(weights, rules, shapes, str(weights.path), cut=True)

    def tokenizer() -> Tokenizer:
        read = read_tokenizer(folder, config.text, config.text.context_length)
        eos_id = (fields.get("text_config") or {}).get("eos_token_id")
        check_closing(form.family.name, eos_id, read, config.text, str(path))
        return read

    peers = ((references.TRANSFORMERS, str(folder)),)
    return DualCheckpoint(spec, config, preprocess, peers, (), (folder, folder), tokenizer, state)


def join(image: str, text: str, embed_dim: int, seed: int) -> DualCheckpoint:
    """Join a timm tower and a text tower, each with its weights, by random projections.

    Args:
        image: `timm:NAME` for timm's weights of this name, or `timm:NAME/FILE` for the weights of a file.
        text: a text checkpoint, see `dualenc.load_text`.
        embed_dim: dimensions of the common space.
        seed: random seed of the projections.

    Raises:
        ModelError: If timm does not have the model or its weights, or the text tower cannot be read.
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
        load_image_weights(model.image, weights or None)
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"{image}: {(str(error).splitlines() or [''])[0]}") from None
    model.text.load_state_dict(found.model().encoder.state_dict())
    state = model.state_dict()
    timm_cfg: Any = model.image.vit.pretrained_cfg  # with timm's cropping, which other libraries cannot express
    squash = timm_cfg.get("crop_mode") == "squash"
    preprocess = Preprocess(size, **model.image.data_config, resize="squash" if squash else "shortest")
    notes = []
    if not squash and (share := timm_cfg.get("crop_pct") or 1.0) != 1:
        notes.append(f"a resized image is used whole, and timm crops it to {share:.3g} of each side")
    peers = [(references.TIMM, f"{name}/{weights}" if weights else name)]
    if "transformers" in detect(found.folder).kinds:  # No other library loads a text tower of dualenc.
        peers.append((references.TRANSFORMERS_TEXT, str(found.folder)))
    return DualCheckpoint(
        f"{image} and {text}",
        config,
        preprocess,
        tuple(peers),
        tuple(notes),
        (Path(weights), None) if weights else None,
        found.tokenizer,
        lambda shapes: state,
    )
