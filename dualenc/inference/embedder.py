"""The embedder, which joins model, tokenizer and preprocessing, and the model directory that stores them."""

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualenc.data.images import Preprocess
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats import format_1
from dualenc.formats.model_folder import (
    OWN_FILES,
    POSSIBLE_FILES,
    check_tokenizer,
    open_folder,
    other_content,
    spec_name,
)
from dualenc.inference.image_inputs import image_batches
from dualenc.inference.open_clip import OpenClip, OpenClipTokenizer, OpenClipTransform, check_open_clip, load_open_clip
from dualenc.inference.precision import embedding
from dualenc.metrics import zero_shot_classifier
from dualenc.models.dual_encoder import DualConfig, DualEncoder
from dualenc.models.heads import TextModel
from dualenc.models.image_encoder import ImageEncoder
from dualenc.report.card import Card, dual_encoder_program, write_card
from dualenc.utils.arguments import Precision, check_batch_size, check_precision, shown_value, strings, usable_device
from dualenc.utils.errors import ModelError
from dualenc.utils.files import FORMAT, atomic_folder, from_dict, read_json, take_format, write_json
from dualenc.utils.progress import progress as progress_bar
from dualenc.utils.text import millions, plural

Score = Literal["softmax", "sigmoid", "cosine"]
TEMPLATES = ("a photo of a {c}.",)


class Embedder:
    """Embedder of images and texts into one space.

    Args:
        model: the dual encoder, or a model of open_clip.
        tokenizer: a tokenizer for the model's vocabulary.
        preprocess: preprocessing to the image encoder's size.
        name: name of the model in messages and on its card.
        precision: "bf16" to compute the towers in bf16; embeddings are normalized and returned in fp32 even so.

    Raises:
        ModelError: If the parts do not fit together.
        ValueError: If the precision is unknown.

    Example:
        >>> import dualenc
        >>> tokenizer = dualenc.Tokenizer.train(["a cat", "a dog"], vocab_size=40, context_length=8)
        >>> image = dualenc.ImageConfig(
        ...     "vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
        ... )
        >>> text = dualenc.TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=8)
        >>> model = dualenc.DualEncoder(image, text, embed_dim=8)
        >>> embedder = dualenc.Embedder(model.eval(), tokenizer, dualenc.Preprocess(32))
        >>> embedder.embed_texts(["a cat", "a dog"]).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        model: DualEncoder | OpenClip,
        tokenizer: Tokenizer | OpenClipTokenizer,
        preprocess: Preprocess | OpenClipTransform,
        name: str = "model",
        precision: Precision = "fp32",
    ) -> None:
        self.model, self.tokenizer, self.preprocess, self.name = model, tokenizer, preprocess, name
        check_precision(precision)
        self.precision: Precision = precision
        if isinstance(model, OpenClip) or isinstance(tokenizer, OpenClipTokenizer):
            return  # open_clip creates both for one model
        text, image = model.config.text, model.config.image
        check_tokenizer(tokenizer, text)
        if preprocess.size != image.img_size:
            raise ModelError(
                f"preprocess.json has size {preprocess.size}, but the image encoder takes {image.img_size}: make them "
                "equal"
            )

    @property
    def dual_encoder(self) -> DualEncoder:
        """The dual encoder of dualenc.

        Raises:
            ModelError: If the model is one of open_clip.
        """
        if isinstance(self.model, OpenClip):
            raise ModelError(f"{self.name} is a model of open_clip, which dualenc only evaluates: import it first")
        return self.model

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> "Embedder":
        """Move the weights to a device, and return this embedder.

        Raises:
            ValueError: If this machine does not have the device.
        """
        self.model.to(usable_device(device))
        return self

    def __repr__(self) -> str:
        weights = f"{parameters_of(self.model)}, on {self.device}{' in bf16' if self.precision == 'bf16' else ''}"
        if isinstance(self.model, OpenClip):
            return f"Embedder({self.name}: {self.model.embed_dim} dimensions, {weights}, run by open_clip)"
        facts = dict(facts_of(self))
        towers = f"images by {facts['image tower']}, texts by {facts['text tower']}"
        return f"Embedder({self.name}: {towers}, {self.model.embed_dim} dimensions, {weights})"

    @overload
    def embed_images(
        self, images: Any, batch_size: int = 64, *, numpy: Literal[False] = False, progress: bool = False
    ) -> Tensor: ...
    @overload
    def embed_images(
        self, images: Any, batch_size: int = 64, *, numpy: Literal[True], progress: bool = False
    ) -> np.ndarray: ...
    def embed_images(
        self, images: Any, batch_size: int = 64, *, numpy: bool = False, progress: bool = False
    ) -> Tensor | np.ndarray:
        """Embed images as (N, E) of unit length, on the CPU.

        Args:
            images: one image, or an iterable of images in any of these forms: a path; a Pillow image; an array (H, W,
                3), (H, W, 4) or (H, W) uint8; bytes or an open binary file of a JPEG, PNG or WebP; a tensor (3, H, W)
                uint8. Or batches of tensors (B, 3, H, W) uint8, one or an iterable of them, such as a loader. Float
                tensors must be normalized already. Images become upright, and are put on white where they are
                transparent. 16-bit gray is scaled to 8 bits.
            batch_size: images per forward pass, for single images.
            numpy: return an array in place of a tensor.
            progress: show a progress bar, on a terminal or in a notebook.

        Raises:
            ImageError: If an image cannot be decoded or has another form, or if a Pillow image has the mode I or F,
                whose range is not defined: scale its values to 0 to 255 and convert it to mode L, or to 0 to 65,535 and
                mode I;16.
            ValueError: If there are no images.
        """
        check_batch_size(batch_size)
        track = progress_bar("images", stderr=True) if progress else iter
        with embedding(self.model, self.precision):
            parts = [
                self.model.encode_image(self._normalized(batch)).float().cpu()
                for batch in image_batches(images, self.preprocess, batch_size, track)
            ]
        if not parts:
            raise ValueError("there are no images to embed")
        found = torch.cat(parts)
        return found.numpy() if numpy else found

    @overload
    def embed_texts(
        self, texts: Iterable[str], batch_size: int = 256, *, numpy: Literal[False] = False, progress: bool = False
    ) -> Tensor: ...
    @overload
    def embed_texts(
        self, texts: Iterable[str], batch_size: int = 256, *, numpy: Literal[True], progress: bool = False
    ) -> np.ndarray: ...
    def embed_texts(
        self, texts: Iterable[str], batch_size: int = 256, *, numpy: bool = False, progress: bool = False
    ) -> Tensor | np.ndarray:
        """Embed texts as (N, E) of unit length, on the CPU.

        Args:
            texts: N strings, or one.
            batch_size: texts per forward pass.
            numpy: return an array in place of a tensor.
            progress: show a progress bar, on a terminal or in a notebook.

        Raises:
            ValueError: If there are no texts, or they are not strings.
        """
        texts = strings(texts, "texts", one=True)
        check_batch_size(batch_size)
        if not texts:
            raise ValueError("there are no texts to embed")
        model, tokenizer = typing.cast(Any, self.model), typing.cast(Any, self.tokenizer)  # of open_clip or of dualenc
        ids = tokenizer.encode(texts)
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))  # batches of similar lengths need less padding
        out = torch.empty(len(texts), self.model.embed_dim)
        track = progress_bar("batches of texts", stderr=True) if progress else iter
        with embedding(self.model, self.precision):
            for start in track(range(0, len(order), batch_size)):
                part = order[start : start + batch_size]
                out[part] = model.encode_text(tokenizer.pack([ids[i] for i in part]).to(self.device)).float().cpu()
        return out.numpy() if numpy else out

    @overload
    def classify(
        self,
        images: Any,
        names: Iterable[str],
        templates: Iterable[str] = TEMPLATES,
        *,
        scores: Score | None = None,
        numpy: Literal[False] = False,
        progress: bool = False,
    ) -> Tensor: ...
    @overload
    def classify(
        self,
        images: Any,
        names: Iterable[str],
        templates: Iterable[str] = TEMPLATES,
        *,
        scores: Score | None = None,
        numpy: Literal[True],
        progress: bool = False,
    ) -> np.ndarray: ...
    def classify(
        self,
        images: Any,
        names: Iterable[str],
        templates: Iterable[str] = TEMPLATES,
        *,
        scores: Score | None = None,
        numpy: bool = False,
        progress: bool = False,
    ) -> Tensor | np.ndarray:
        """Classify images by the names of classes.

        Args:
            images: N images; see `embed_images`.
            names: C names of classes.
            templates: texts in which `{c}` stands for the name; their embeddings are averaged.
            scores: "softmax" for probabilities that sum to 1 over the classes: softmax(scale * cosine). "sigmoid" for a
                probability of each class by itself: sigmoid(scale * cosine + bias), see SigLIP (Zhai et al. 2023), for
                models that have learned a bias. "cosine" for the cosines. None for "sigmoid" if the model has a bias,
                otherwise "softmax".
            numpy: return an array in place of a tensor.
            progress: show a progress bar, on a terminal or in a notebook.

        Returns:
            Scores (N, C), on the CPU.

        Raises:
            ValueError: If names or templates are not lists of strings, a template lacks `{c}`, or `scores` is
                "sigmoid" and the model does not have a bias.
            ImageError: See `embed_images`.
        """
        scale, bias = (None if x is None else x.detach().float().cpu() for x in self.model.logits())
        assert scale is not None
        scores = scores or ("softmax" if bias is None else "sigmoid")
        if scores not in get_args(Score):
            raise ValueError(f"scores is {shown_value(scores)}: choose one of {', '.join(get_args(Score))}")
        if scores == "sigmoid" and bias is None:
            raise ValueError(
                f"{self.name} lacks the bias without which a sigmoid is not a probability: use scores='softmax'"
            )
        classifier = zero_shot_classifier(self, names, templates)
        found = self.embed_images(images, progress=progress) @ classifier.T  # (N, C) cosines
        if scores == "softmax":
            found = torch.softmax(scale * found, dim=-1)
        elif scores == "sigmoid":
            found = torch.sigmoid(scale * found + typing.cast(Tensor, bias))
        return found.numpy() if numpy else found

    @property
    def fingerprint(self) -> str:
        """A hash of architecture, weights to the bit, preprocessing and tokenizer, which determine exact embeddings."""
        return fingerprint(self.model, self.preprocess, self.tokenizer.fingerprint)

    def save(self, path: str | os.PathLike[str], weights: Mapping[str, Tensor] | None = None) -> None:
        """Write a model directory; an older one is replaced once the new one is complete.

        Args:
            path: path of the model directory.
            weights: weights to write instead of the model's own, such as those gathered from several processes.

        Raises:
            ModelError: If the path holds something other than a model directory, or the model is one of open_clip.
        """
        model = self.dual_encoder
        with atomic_folder(path, POSSIBLE_FILES) as folder:
            write_json(folder / "config.json", {"format": FORMAT, **dataclasses.asdict(model.config)})
            write_json(folder / "preprocess.json", dataclasses.asdict(self.preprocess))
            typing.cast(Tokenizer, self.tokenizer).save(folder / "tokenizer.json")
            weights = model.state_dict() if weights is None else weights
            state = {name: x.detach().cpu().contiguous() for name, x in weights.items()}
            save_file(state, folder / "model.safetensors")
            write_card(folder, self._card())

    def _card(self) -> Card:
        """Return the card of the model directory."""
        config = self.dual_encoder.config
        return Card(
            title=self.name,
            library="dualenc",
            summary=f"A dual encoder of images and texts with {config.embed_dim} dimensions in common.",
            facts=facts_of(self),
            programs=[("dualenc", dual_encoder_program())],
            task="zero-shot-image-classification",
            images=True,
        )

    def _normalized(self, batch: Tensor) -> Tensor:
        """Preprocess and normalize a batch on the model's device."""
        resized = isinstance(self.preprocess, Preprocess) and batch.shape[-2:] == (self.preprocess.size,) * 2
        if not batch.is_floating_point() and not resized:
            batch = torch.stack([self.preprocess(image) for image in batch])
        batch = batch.to(self.device, non_blocking=True)
        dtype = next(self.model.parameters()).dtype
        if isinstance(self.preprocess, Preprocess) and not batch.is_floating_point():
            return self.preprocess.normalize(batch, dtype)
        return batch.to(dtype)


def parameters_of(model: torch.nn.Module) -> str:
    """Return the number of parameters of a model as text."""
    count = sum(p.numel() for p in model.parameters())
    return f"{millions(count) if count >= 100_000 else f'{count:,}'} parameters"


def facts_of(embedder: Embedder) -> list[tuple[str, str]]:
    """Return facts about a dual encoder for its card, as pairs of a label and a value."""
    config = embedder.dual_encoder.config
    text, size = config.text, config.image.img_size
    return [
        ("parameters", millions(sum(p.numel() for p in embedder.model.parameters()))),
        ("image tower", f"{config.image.name} at {size} x {size} pixels"),
        ("text tower", f"{plural(text.layers, 'layer')} of width {text.width}"),
        ("longest text", f"{text.context_length} tokens of a vocabulary of {text.vocab_size:,}"),
        ("embeddings", f"{config.embed_dim} dimensions, unit length"),
    ]


def load(
    spec: str | os.PathLike[str], device: str | torch.device | None = None, precision: Precision = "fp32"
) -> Embedder:
    """Load a dual encoder.

    Args:
        spec: a model directory; a run directory (its `best/`, or else `last/`); `hf-hub:owner/name[@revision]`; or a
            model of open_clip, `open_clip:ARCH/PRETRAINED`, see `dualenc.inference.open_clip.load_open_clip`.
        device: device of the weights; None for CUDA if available, else the CPU.
        precision: see `Embedder`.

    Raises:
        ModelError: If a file is missing, has a newer format or does not match the others, or open_clip does not have
            the model; the message names it.
        ValueError: If the precision is unknown, or this machine lacks the device.

    Example:
        >>> import tempfile
        >>> import dualenc
        >>> tokenizer = dualenc.Tokenizer.train(["a cat", "a dog"], vocab_size=40, context_length=8)
        >>> image = dualenc.ImageConfig(
        ...     "vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
        ... )
        >>> text = dualenc.TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=8)
        >>> model = dualenc.DualEncoder(image, text, embed_dim=8)
        >>> embedder = dualenc.Embedder(model.eval(), tokenizer, dualenc.Preprocess(32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     embedder.save(f"{folder}/model")
        ...     loaded = dualenc.load(f"{folder}/model", "cpu")
        >>> loaded.fingerprint == embedder.fingerprint
        True
    """
    check_precision(precision)
    device, name = usable_device(device), spec_name(spec)
    if name.startswith("open_clip:"):
        try:
            peer, peer_tokenizer, transform = load_open_clip(name.removeprefix("open_clip:"))
        except ModelError:  # names the file or the spec itself
            raise
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from None
        return Embedder(peer.to(device), peer_tokenizer, transform, name, precision)
    path, config, preprocess = read_config(spec)
    text = config.text
    tokenizer = Tokenizer.from_file(path / "tokenizer.json", text.context_length, text.pad_to, text.pad_id)
    try:
        state = {format_1.tensor_name(name): x for name, x in load_file(path / "model.safetensors").items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path / 'model.safetensors'} cannot be read ({error})") from None
    try:
        model = DualEncoder.from_config(config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ModelError(f"{path / 'config.json'}: {error}") from None
    _load_state(model, state, path / "model.safetensors")
    return Embedder(model.to(device).eval(), tokenizer, preprocess, name, precision)


def check_spec(spec: str | os.PathLike[str]) -> None:
    """Refuse a spec of `load` whose model is missing or unknown, before its weights are read.

    Raises:
        ModelError: If there is no such model, or a file of it is missing or invalid.
    """
    name = spec_name(spec)
    if not name.startswith("open_clip:"):
        read_config(spec)
        return
    try:
        check_open_clip(name.removeprefix("open_clip:"))
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from None


def read_config(spec: str | os.PathLike[str]) -> tuple[Path, DualConfig, Preprocess]:
    """Read the configuration of the model directory that a spec names.

    Returns:
        The model directory, the architecture and the preprocessing.

    Raises:
        ModelError: If there is no model directory, or a file is missing or invalid.
    """
    path = model_directory(spec)
    fields = read_json(path / "config.json")
    take_format(fields, path / "config.json")
    config: DualConfig = from_dict(DualConfig, fields, str(path / "config.json"))
    where = path / "preprocess.json"
    return path, config, from_dict(Preprocess, read_json(where), str(where))


def model_directory(spec: str | os.PathLike[str]) -> Path:
    """Return the model directory that a spec names, after a download if it is on the hub.

    Raises:
        ModelError: If there is no model directory, or a file is missing.
    """
    folder = open_folder(spec, POSSIBLE_FILES)
    if missing := [name for name in OWN_FILES if not (folder.path / name).is_file()]:
        if other := "" if folder.kinds else other_content(folder.path):
            raise ModelError(f"{folder.path} is {other}")
        if folder.first("text_model"):
            raise ModelError(f"{folder.path} is a text model, without an image tower: load it with dualenc.load_text")
        foreign = folder.first("open_clip", "transformers", "dual_encoder") is not None
        hint = f"; import a model of another library by dualenc import {quote(os.fspath(spec))} OUT" if foreign else ""
        raise ModelError(f"{folder.path} is not a complete model directory: {', '.join(missing)} missing{hint}")
    return folder.path


@torch.no_grad()
def image_features(tower: ImageEncoder, preprocess: Preprocess, images: Tensor) -> Tensor:
    """Compute the features (B, D) before the projection, in fp32 on the CPU, of uint8 images (B, 3, S, S)."""
    weight = next(tower.parameters())
    return tower(preprocess.normalize(images.to(weight.device, non_blocking=True), weight.dtype)).float().cpu()


def fingerprint(
    model: DualEncoder | OpenClip | ImageEncoder | TextModel,
    preprocess: Preprocess | OpenClipTransform | None,
    more: str = "",
) -> str:
    """Hash everything that determines embeddings or features: architecture, weights to the bit, preprocessing.

    Args:
        model: a dual encoder, or one tower.
        preprocess: preprocessing of the model; None for a text model.
        more: further content of the hash, such as the tokenizer's fingerprint.
    """
    digest = hashlib.blake2b(digest_size=16)
    about = [dataclasses.asdict(model.config), preprocess and dataclasses.asdict(preprocess), more]
    digest.update(json.dumps(about, sort_keys=True).encode())
    # The names of format 1 keep the fingerprints, and the caches under them, that were made before format 2.
    state = {format_1.name_in_format_1(name): x for name, x in model.state_dict().items()}
    for name, x in sorted(state.items()):
        digest.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def difference(first: Embedder, second: Embedder, apart: Collection[str] = ()) -> str | None:
    """Name the first field of architecture or preprocessing in which two models differ, with both values.

    Args:
        first: a model.
        second: the model to compare it with.
        apart: fields that may differ, such as "image.img_size".
    """

    def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                yield from fields(value, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}", value

    for part, prefix in ((lambda one: one.dual_encoder.config, ""), (lambda one: one.preprocess, "preprocess.")):
        for (name, x), (_, y) in zip(fields(part(first), prefix), fields(part(second), prefix), strict=True):
            if x != y and name not in apart:
                return f"{name} {x!r} and {y!r}"
    return None


def _load_state(model: DualEncoder, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict, or name up to five tensors that do not match the architecture."""
    wanted = model.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in wanted]
    wrong += [
        f"{name} has shape {tuple(x.shape)}, expected {tuple(wanted[name].shape)}"
        for name, x in state.items()
        if name in wanted and x.shape != wanted[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ModelError(f"{path} does not fit config.json: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict(state)
