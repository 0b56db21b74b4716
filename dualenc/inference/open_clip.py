"""Models of the open_clip library, with the calls of a `DualEncoder`, its own transform and its own tokenizer."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.v2.functional import to_pil_image

from dualenc.models.dual_encoder import unit

SCHEMES = ("hf-hub:", "local-dir:")  # of names that open_clip resolves by itself


@dataclass(frozen=True)
class OpenClipTransform:
    """The evaluation transform that open_clip makes for a model: resized, cropped, normalized."""

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
        """(3, H, W) uint8 -> (3, S, S) float32, normalized."""
        return self._transform(to_pil_image(image))


class OpenClipTokenizer:
    """open_clip's tokenizer of a model; texts to ids without the padding that the model can do without.

    Args:
        tokenizer: as `open_clip.get_tokenizer` gives it.
        trims: whether what follows the largest id of a text, the one that closes it, is padding without effect.
    """

    def __init__(self, tokenizer: Any, trims: bool) -> None:
        self.tokenizer, self.trims = tokenizer, trims

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Ids (L,) of each text."""
        rows = self.tokenizer(list(texts))  # (B, T)
        lengths = rows.argmax(1) + 1 if self.trims else torch.full((len(rows),), rows.shape[1])
        return [row[:length] for row, length in zip(rows, lengths.tolist())]

    def pack(self, ids: Sequence[Tensor]) -> Tensor:
        """(B, L) padded to the longest."""
        return pad_sequence(list(ids), batch_first=True)

    @property
    def fingerprint(self) -> str:
        """Of what it makes of texts, as far as one text of many letters tells."""
        probe = self.tokenizer(["The QUICK brown fox, 1234567890 !?#&'(){} Ünïcödé 漢字 naïve's"])
        return hashlib.blake2b(probe.numpy().tobytes() + type(self.tokenizer).__name__.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class OpenClipConfig:
    """What an open_clip model is, beside its weights."""

    architecture: str
    modules: str  # as they print, with what no weight shows: activations, heads
    version: str  # of open_clip


class OpenClip(nn.Module):
    """A model of open_clip.

    Where its text tower is causal and pools at the token that closes a text, what follows that token changes nothing:
    such a tower is given texts without their padding.

    Args:
        model: as `open_clip.create_model` gives it.
        architecture: its name.
    """

    model: Any

    def __init__(self, model: nn.Module, architecture: str) -> None:
        super().__init__()
        self.model = model
        heads = [
            getattr(module, name)
            for module in model.modules()
            for name in ("num_heads", "heads")
            if hasattr(module, name)
        ]
        self.config = OpenClipConfig(architecture, f"{model} {heads}", version("open_clip_torch"))
        text = self._text
        mask = getattr(text, "attn_mask", None)
        self.trims = (
            isinstance(mask, Tensor)
            and bool(torch.isneginf(mask[torch.ones_like(mask, dtype=torch.bool).triu(1)]).all())
            and getattr(text, "text_pool_type" if text is model else "pool_type", None) == "argmax"
            and getattr(text, "cls_emb", None) is None
        )

    @property
    def _text(self) -> Any:
        """The text tower, which in CLIP is the model itself."""
        return getattr(self.model, "text", self.model)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalized -> (B, E) of unit length."""
        return unit(self.model.encode_image(images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) ids -> (B, E) of unit length."""
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
        """Scale factor and bias."""
        scale = self.model.logit_scale.exp().reshape(1)
        return scale, getattr(self.model, "logit_bias", None)

    @cached_property
    def embed_dim(self) -> int:
        """E."""
        tokens = torch.zeros(1, self._text.context_length, dtype=torch.long, device=self.model.logit_scale.device)
        with torch.no_grad():
            return self.encode_text(tokens).shape[1]


def load_open_clip(name: str) -> tuple[OpenClip, OpenClipTokenizer, OpenClipTransform]:
    """A model of open_clip with its tokenizer and transform, in eval mode on the CPU.

    Args:
        name: `ARCH/PRETRAINED`, where PRETRAINED is a tag that open_clip knows or the path of a checkpoint; `ARCH`
            alone for random weights, always the same; or a name that open_clip resolves itself, `hf-hub:owner/name`
            or `local-dir:path`.

    Raises:
        ValueError: open_clip knows no such architecture or weights, or cannot have or read them; says which.
    """
    import open_clip

    whole = name.startswith(SCHEMES)
    architecture, _, pretrained = (name, "", "") if whole else name.partition("/")
    if not whole and architecture not in open_clip.list_models():
        raise ValueError(
            f"open_clip has no architecture {architecture!r}{_near(architecture, open_clip.list_models())}"
        )
    tags = [] if whole else open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained and not os.path.isfile(pretrained) and open_clip.get_pretrained_cfg(architecture, pretrained) == {}:
        raise ValueError(
            f"{pretrained!r} is no file, and no weights that open_clip has for {architecture}: "
            f"{', '.join(tags) or 'it has none'}"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(architecture, pretrained or None, require_pretrained=whole)
        tokenizer = open_clip.get_tokenizer(architecture)
    except UnpicklingError:
        raise ValueError(f"{pretrained or name} holds more than weights, and is not run: save its state_dict") from None
    except Exception as error:  # the library and the hub's client have no common one
        raise ValueError(
            f"open_clip cannot make {name}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    wrapped = OpenClip(model.eval(), architecture)
    settings: dict[str, Any] = {
        key: tuple(x) if isinstance(x, list) else x for key, x in wrapped.model.visual.preprocess_cfg.items()
    }
    return wrapped, OpenClipTokenizer(tokenizer, wrapped.trims), OpenClipTransform(**settings)


def _near(name: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; it has {', '.join(found)}" if found else f"; it has {len(known)}, listed by open_clip.list_models()"
