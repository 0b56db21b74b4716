"""Models, transforms and tokenizers of the open_clip library behind the interface of a `DualEncoder`."""

import hashlib
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.v2.functional import to_pil_image

from dualenc.formats.download import hub_or_cache
from dualenc.formats.state_dict import plain_copy
from dualenc.models.dual_encoder import unit
from dualenc.utils.text import did_you_mean, one_line

SCHEMES = ("hf-hub:", "local-dir:")  # prefixes of names that open_clip resolves itself


@dataclass(frozen=True)
class OpenClipTransform:
    """Evaluation transform of an open_clip model: resize, crop, normalize."""

    size: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    fill_color: int
    mode: str = "RGB"

    @cached_property
    def _transform(self) -> Any:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(**asdict(self)), False)

    def __call__(self, image: Tensor) -> Tensor:
        """Preprocess an image (3, H, W) uint8 to (3, S, S) float32, normalized."""
        return self._transform(to_pil_image(image))


class OpenClipTokenizer:
    """Tokenizer of an open_clip model, without padding that has no effect on the model.

    Args:
        tokenizer: return value of `open_clip.get_tokenizer`.
        trims: whether the ids after the largest one, which closes a text, are padding without effect.
    """

    def __init__(self, tokenizer: Any, trims: bool) -> None:
        self.tokenizer, self.trims = tokenizer, trims

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the ids (L,) of each text."""
        rows = self.tokenizer(list(texts))  # (B, T)
        lengths = rows.argmax(1) + 1 if self.trims else torch.full((len(rows),), rows.shape[1])
        return [row[:length] for row, length in zip(rows, lengths.tolist())]

    def pack(self, ids: Sequence[Tensor]) -> Tensor:
        """Pad the ids of B texts to the longest, (B, L)."""
        return pad_sequence(list(ids), batch_first=True)

    @property
    def fingerprint(self) -> str:
        """A hash of the ids of one text with many kinds of characters."""
        probe = self.tokenizer(["The QUICK brown fox, 1234567890 !?#&'(){} Ünïcödé 漢字 naïve's"])
        return hashlib.blake2b(probe.numpy().tobytes() + type(self.tokenizer).__name__.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class OpenClipConfig:
    """Facts about an open_clip model that its weights do not show.

    Attributes:
        architecture: name of the architecture.
        modules: the printed modules, with activations and numbers of heads.
        version: version of open_clip.
    """

    architecture: str
    modules: str
    version: str


class OpenClip(nn.Module):
    """Model of open_clip.

    If its text tower is causal and pools at the token that closes a text, later tokens have no effect: such a tower
    gets texts without padding.

    Args:
        model: return value of `open_clip.create_model`.
        architecture: name of the architecture.
    """

    model: Any

    def __init__(self, model: nn.Module, architecture: str) -> None:
        super().__init__()
        self.model = model
        # Printed modules do not show the numbers of heads, in which two models may differ.
        heads = [
            getattr(module, name)
            for module in model.modules()
            for name in ("num_heads", "heads")
            if hasattr(module, name)
        ]
        self.config = OpenClipConfig(architecture, f"{model} {heads}", version("open_clip_torch"))
        text = self._text
        mask = getattr(text, "attn_mask", None)
        # The mask must hide every later token, and the tower must pool at the largest id.
        self.trims = (
            isinstance(mask, Tensor)
            and bool(torch.isneginf(mask[torch.ones_like(mask, dtype=torch.bool).triu(1)]).all())
            and getattr(text, "text_pool_type" if text is model else "pool_type", None) == "argmax"
            and getattr(text, "cls_emb", None) is None
        )

    @property
    def _text(self) -> Any:
        """The text tower, which for CLIP is the model itself."""
        return getattr(self.model, "text", self.model)

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed normalized images (B, 3, S, S) as (B, E) of unit length."""
        return unit(self.model.encode_image(images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed ids (B, L) as (B, E) of unit length."""
        if not self.trims:
            return unit(self.model.encode_text(tokens))
        text, length = self._text, tokens.shape[1]
        shorter = {
            "positional_embedding": text.positional_embedding[:length],
            "attn_mask": text.attn_mask[:length, :length],
        }
        if text is self.model:
            out = functional_call(text, shorter, (None, tokens))
            return unit(out["text_features"] if isinstance(out, dict) else out[1])
        out = functional_call(text, shorter, tokens)
        return unit(out[0] if isinstance(out, tuple) else out)

    def logits(self) -> tuple[Tensor, Tensor | None]:
        """Return the scale and the bias of the logits."""
        scale = self.model.logit_scale.exp().reshape(1)
        return scale, getattr(self.model, "logit_bias", None)

    @cached_property
    def embed_dim(self) -> int:
        """Number of dimensions E of the embeddings."""
        tokens = torch.zeros(1, self._text.context_length, dtype=torch.long, device=self.model.logit_scale.device)
        with torch.no_grad():
            return self.encode_text(tokens).shape[1]


def load_open_clip(name: str) -> tuple[OpenClip, OpenClipTokenizer, OpenClipTransform]:
    """Load a model of open_clip with its tokenizer and transform, in eval mode on the CPU.

    Args:
        name: `ARCH/PRETRAINED`, where PRETRAINED is a tag of open_clip or the path of a checkpoint; `ARCH` alone for
            random weights of a fixed seed; or a name that open_clip resolves itself, `hf-hub:owner/name` or
            `local-dir:path`.

    Raises:
        ValueError: If open_clip does not know the architecture or weights, or cannot download or read them; the message
            names them.
    """
    import open_clip

    whole = name.startswith(SCHEMES)
    architecture, _, pretrained = (name, "", "") if whole else name.partition("/")
    file = Path(pretrained) if pretrained and Path(pretrained).is_file() else None
    check_open_clip(name)
    text = {} if whole else (open_clip.get_model_config(architecture) or {}).get("text_cfg", {})
    asks = whole or (pretrained and not file) or any(key.startswith("hf_") for key in text)
    with ExitStack() as stack:
        if asks:
            stack.enter_context(hub_or_cache(f"open_clip:{name}"))
        if file and file.suffix not in (".npz", ".npy"):  # open_clip reads those of big_vision itself
            pretrained = str(stack.enter_context(plain_copy(file, known=("state_dict", "module."))))
        try:
            if pretrained and not file:  # asked for again below, where open_clip would print what fails
                open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, pretrained))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = open_clip.create_model(architecture, pretrained or None, require_pretrained=whole)
            tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:  # open_clip and the hub's client do not share a base class of errors
            raise ValueError(f"open_clip cannot load {name}: {_misfit(error)}") from error
    wrapped = OpenClip(model.eval(), architecture)
    settings: dict[str, Any] = {
        key: tuple(x) if isinstance(x, list) else x for key, x in wrapped.model.visual.preprocess_cfg.items()
    }
    return wrapped, OpenClipTokenizer(tokenizer, wrapped.trims), OpenClipTransform(**settings)


def check_open_clip(name: str) -> None:
    """Refuse a name that `load_open_clip` refuses before it builds or downloads anything.

    Raises:
        ValueError: If open_clip does not have the architecture or the weights.
    """
    architecture, _, pretrained = name.partition("/")
    if not name.startswith(SCHEMES):
        check_name(architecture, "" if Path(pretrained).is_file() else pretrained)


def check_name(architecture: str, tag: str) -> None:
    """Refuse an architecture or weights that open_clip does not have, or weights of another activation.

    open_clip itself builds a model that computes something else than the one that was trained, and warns.

    Args:
        architecture: name of the architecture.
        tag: name of the weights; empty for none.

    Raises:
        ValueError: If open_clip does not have them, or they belong to the architecture with the other activation; the
            message names what to write.
    """
    import open_clip

    models = open_clip.list_models()
    if architecture not in models:
        hint = did_you_mean(architecture, models, f"open_clip.list_models() lists the {len(models)} that it has")
        raise ValueError(f"open_clip does not have the architecture {architecture!r}: {hint}")
    known: Any = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    if tag and not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "it does not have any"
        raise ValueError(f"{tag!r} must be a file, or weights that open_clip has for {architecture}: {tags}")
    quick = bool(known.get("quick_gelu", False))
    better = f"{architecture}-quickgelu" if quick else architecture.removesuffix("-quickgelu")
    # The only architecture of its kind was trained as its configuration says, whatever is noted for the weights.
    differs = tag and quick != bool((open_clip.get_model_config(architecture) or {}).get("quick_gelu"))
    if differs and better != architecture and better in models:
        raise ValueError(
            f"these weights were trained {'with' if quick else 'without'} quick_gelu, and {architecture} is "
            f"{'without' if quick else 'with'} it: write open_clip:{better}/{tag}"
        )


def _misfit(error: Exception) -> str:
    """Return the names that a checkpoint lacks and those that the model lacks, or the first line of another error."""
    parts = []
    for title, word in (("Missing", "missing"), ("Unexpected", "unknown")):
        listed = re.search(rf"{title} key\(s\) in state_dict: (.*)", str(error))
        names = re.findall(r'"([^"]+)"', listed[1]) if listed else []
        parts += [f"{name} is {word}" for name in names[:5]]
        parts += [f"{len(names) - 5} more {'are' if len(names) > 6 else 'is'} {word}"] if len(names) > 5 else []
    return one_line("; ".join(parts) or (str(error).splitlines() or [type(error).__name__])[0])
