"""The dual encoder: an image and a text tower that project into one space (CLIP, Radford et al. 2021)."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dualenc.models.image_encoder import ImageConfig, ImageEncoder
from dualenc.models.text_encoder import TextConfig, TextEncoder
from dualenc.tokens import Tokens

MAX_SCALE = 100.0  # Radford et al. 2021, section 2.5


@dataclass(frozen=True)
class Projection:
    """Linear layers from a tower's features to embeddings.

    Attributes:
        hidden: widths between the layers; an activation follows each.
        bias: whether each layer has a bias; one flag a layer. Empty for no layers: the features are the embeddings.
        activation: "gelu", or "tanh" as in BERT's pooler.
    """

    hidden: tuple[int, ...] = ()
    bias: tuple[bool, ...] = (False,)
    activation: Literal["gelu", "tanh"] = "gelu"

    def __post_init__(self) -> None:
        if len(self.bias) != len(self.hidden) + 1 and (self.hidden or self.bias):
            raise ValueError(
                f"a projection with hidden {self.hidden} needs {len(self.hidden) + 1} bias flags, found {self.bias}"
            )
        if self.activation not in PROJECTION_ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(PROJECTION_ACTIVATIONS)}")


PROJECTION_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class DualConfig:
    """Architecture of a `DualEncoder`, stored as `config.json` of a model directory.

    Attributes:
        image: architecture of the image tower.
        text: architecture of the text tower.
        embed_dim: E, the size of the embeddings.
        projection: of both towers: one linear layer without bias ("linear"), or two with a GELU between ("mlp").
        logit_bias: whether the model learns a bias in addition to the scale, as a sigmoid loss needs it.
        image_projection: projection of the image tower, in place of `projection`, for imported models.
        text_projection: projection of the text tower, in place of `projection`, for imported models.
    """

    # The keys that files of the first release have. Later keys are optional when a file is read.
    REQUIRED: ClassVar = ("image", "text", "embed_dim", "projection", "logit_bias")

    image: ImageConfig
    text: TextConfig
    embed_dim: int = 512
    projection: Literal["linear", "mlp"] = "linear"
    logit_bias: bool = False
    image_projection: Projection | None = None
    text_projection: Projection | None = None

    def __post_init__(self) -> None:
        if self.projection not in ("linear", "mlp"):
            raise ValueError(f"projection must be 'linear' or 'mlp', not {self.projection!r}")
        for name in ("image_projection", "text_projection"):
            # Equal architectures have equal configs: a projection that `projection` already describes is left out.
            if self.projection == "linear" and getattr(self, name) == Projection():
                object.__setattr__(self, name, None)

    def projection_of(self, own: Projection | None, width: int) -> Projection:
        """Return the projection of a tower.

        Args:
            own: `image_projection` or `text_projection`; None for the one that `projection` names.
            width: width of the tower's features.
        """
        return own or (Projection((width,), (True, True)) if self.projection == "mlp" else Projection())


class Embeddings(NamedTuple):
    """Embeddings of a batch of pairs, and the scale and bias of their scores: the inputs of a contrastive loss."""

    image: Tensor  # (B, E), unit length
    text: Tensor  # (B, E), unit length
    scale: Tensor  # (1,), the factor itself, not its logarithm
    bias: Tensor | None  # (1,)


class Logits(nn.Module):
    """The learned scale, which is 1 / temperature, and the learned bias of a sigmoid loss (SigLIP, Zhai et al. 2023).

    Args:
        bias: whether to learn a bias; without one the scale is at most `MAX_SCALE`.
        init_scale: initial scale.
        init_bias: initial bias.
    """

    def __init__(self, bias: bool, init_scale: float, init_bias: float) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(init_scale)))
        # SigLIP does not bound the scale, and its published models exceed 100.
        self.bound = math.inf if bias else math.log(MAX_SCALE)
        self.logit_bias = nn.Parameter(torch.full((1,), init_bias)) if bias else None

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Return scale and bias, (1,) each."""
        # The bias is copied, because FSDP frees the memory of a gathered parameter when this method returns.
        bias = None if self.logit_bias is None else self.logit_bias.clone()
        # clamp would have gradient 0 at the bound itself, and the scale could never decrease again.
        return torch.where(self.logit_scale > self.bound, self.bound, self.logit_scale).exp(), bias

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Set the scale to its bound where an optimizer step has exceeded it; there `forward` has no gradient."""
        self.logit_scale.clamp_(max=self.bound)


class DualEncoder(nn.Module):
    """Image and text encoder with projections into one space of `embed_dim` dimensions.

    Args:
        image: architecture of the image tower.
        text: architecture of the text tower.
        embed_dim: E, the size of the embeddings.
        projection: see `DualConfig`.
        logit_bias: whether to learn a bias for the sigmoid loss.
        image_projection: see `DualConfig`.
        text_projection: see `DualConfig`.
        init_scale: initial scale of the scores; None for CLIP's 1/0.07, or with `logit_bias` for SigLIP's 10.
        init_bias: initial bias, with `logit_bias`.
        patch_dropout: see `ImageEncoder`; not a part of the architecture.

    Example:
        >>> import torch
        >>> from dualenc import DualEncoder, ImageConfig, TextConfig, Tokens
        >>> image = ImageConfig("vit_tiny_patch16_224", 32, {"depth": 1, "embed_dim": 16, "num_heads": 2})
        >>> text = TextConfig(vocab_size=100, width=16, layers=1, heads=2)
        >>> model = DualEncoder(image, text, embed_dim=8)
        >>> out = model(torch.randn(2, 3, 32, 32), Tokens.pack([[5, 6, 7], [8, 9]]))
        >>> out.image.shape, out.text.shape, round(out.scale.item(), 2)
        (torch.Size([2, 8]), torch.Size([2, 8]), 14.29)
    """

    def __init__(
        self,
        image: ImageConfig,
        text: TextConfig,
        embed_dim: int = 512,
        projection: Literal["linear", "mlp"] = "linear",
        logit_bias: bool = False,
        *,
        image_projection: Projection | None = None,
        text_projection: Projection | None = None,
        init_scale: float | None = None,
        init_bias: float = -10.0,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = DualConfig(image, text, embed_dim, projection, logit_bias, image_projection, text_projection)
        self.image = ImageEncoder(image, patch_dropout)
        self.text = TextEncoder(text)
        self.image_projection = self._projection("image", image_projection, self.image.width)
        self.text_projection = self._projection("text", text_projection, text.width)
        self.logits = Logits(logit_bias, init_scale or (10.0 if logit_bias else 1 / 0.07), init_bias)
        draw_blocks(self.text)
        if "weight_init" not in image.overrides:
            draw_blocks(self.image)

    @classmethod
    def from_config(cls, config: DualConfig) -> "DualEncoder":
        """Build a model of this architecture with random weights."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(config)})

    def load_pretrained(self, other: "DualEncoder") -> None:
        """Copy all weights of another model; the image position embeddings are resampled to this model's size.

        Args:
            other: a model that differs at most in `image.img_size` and dropout, and may lack the bias.
        """
        self.image.load_pretrained(other.image.vit.state_dict())
        rest = {name: x for name, x in other.state_dict().items() if not name.startswith("image.")}
        self.load_state_dict({**self.state_dict(), **rest})

    def _projection(self, tower: str, own: Projection | None, width: int) -> nn.Module:
        """Build the projection of a tower, with CLIP's initialization: standard deviation width**-0.5."""
        shape = self.config.projection_of(own, width)
        if not shape.bias:
            if width != self.embed_dim:
                raise ValueError(
                    f"embed_dim must be {width}, the width of the {tower} tower, which has no projection; "
                    f"found {self.embed_dim}"
                )
            return nn.Identity()
        layers: list[nn.Module] = []
        widths = [width, *shape.hidden, self.embed_dim]
        for before, after, bias in zip(widths, widths[1:], shape.bias):
            layers += [PROJECTION_ACTIVATIONS[shape.activation]()] if layers else []
            linear = nn.Linear(before, after, bias)
            nn.init.normal_(linear.weight, std=before**-0.5)
            layers.append(linear)
        return layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    @property
    def embed_dim(self) -> int:
        """E, the size of the embeddings."""
        return self.config.embed_dim

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: normalized images (B, 3, S, S), or image features (B, D) that `image` has computed from them.

        Returns:
            (B, E) of unit length.
        """
        return unit(self.image_projection(images if images.dim() == 2 else self.image(images)))

    def encode_text(self, tokens: Tokens) -> Tensor:
        """Embed texts: (B, E) of unit length, in the order in which the caller gave the texts."""
        return unit(self.text_projection(self.text.pool(self.text(tokens), tokens)))

    def forward(self, images: Tensor, tokens: Tokens) -> Embeddings:
        """Embed a batch of pairs; see `encode_image` and `encode_text`."""
        return Embeddings(self.encode_image(images), self.encode_text(tokens), *self.logits())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save memory in both towers by recomputing activations in the backward pass."""
        self.image.set_grad_checkpointing(enable)
        self.text.grad_checkpointing = enable


# Linear layers of a block, by the ends of their names in timm's towers and in ours.
_QKV = re.compile(r"(^|\.)blocks\.\d+\.(attn|attention)\.qkv$")
_HIDDEN = re.compile(r"(^|\.)blocks\.\d+\.mlp\.(fc1|0)$")
_TO_RESIDUAL = re.compile(r"(^|\.)blocks\.\d+\.(attn\.proj|attention\.out|mlp\.(fc2|2))$")


def draw_blocks(tower: ImageEncoder | TextEncoder) -> None:
    """Draw the weights of a tower's blocks as CLIP does: the smaller the width, the larger they are.

    The standard deviations for width D and L blocks are D**-0.5 for queries, keys and values, (2 D)**-0.5 for the first
    layer of the MLP, and (2 L D)**-0.5 for the layers whose output is added to the residual stream (Radford et al.
    2021, the published code). Position embeddings of the image tower get D**-0.5. The 0.02 of BERT and timm, with which
    the towers begin, suits widths of about 768; with smaller ones a dual encoder learns less from each sample.

    Args:
        tower: the tower, whose weights are replaced.
    """
    for name, module in tower.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if _QKV.search(name):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif _HIDDEN.search(name):
            nn.init.normal_(module.weight, std=(2 * module.in_features) ** -0.5)
        elif _TO_RESIDUAL.search(name):
            nn.init.normal_(module.weight, std=(2 * tower.layers * module.out_features) ** -0.5)
    positions = getattr(getattr(tower, "vit", None), "pos_embed", None)
    if isinstance(positions, nn.Parameter):
        nn.init.normal_(positions, std=positions.shape[-1] ** -0.5)


def embed_micro_batches(embed: Callable[..., Embeddings], micro_batches: Sequence[tuple[Any, ...]]) -> Embeddings:
    """Embed a batch that is split into micro-batches, with the memory of the largest of them.

    With several micro-batches only the embeddings are kept. The backward pass computes each micro-batch again, with the
    same dropout (gradient caching, Gao et al. 2021, as activation checkpointing). Values and gradients equal those of
    the micro-batches with all graphs kept, whatever is computed from the embeddings.

    Args:
        embed: embeds a micro-batch, given its arguments.
        micro_batches: the arguments of each.
    """
    parts = map_micro_batches(embed, micro_batches)
    image, text = (torch.cat(x) for x in zip(*(part[:2] for part in parts)))
    return Embeddings(image, text, *parts[0][2:])


def map_micro_batches(function: Callable[..., Any], micro_batches: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call a function on each micro-batch; with several, the backward pass calls it again instead of keeping graphs."""
    if len(micro_batches) == 1:
        return [function(*micro_batches[0])]
    return [checkpoint(_without_autocast_cache, function, *args, use_reentrant=False) for args in micro_batches]


def _without_autocast_cache(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function under the caller's autocast settings, but without autocast's cache of weights."""
    # The cache would keep one half-precision copy of each weight for all micro-batches, and sum their gradients in it.
    device = next(arg.device.type for arg in tree_leaves(args) if isinstance(arg, Tensor))
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype, enabled, cache_enabled=False):
        return function(*args)


def unit(x: Tensor) -> Tensor:
    """Normalize the rows of (B, E) to unit length, in fp32 at least."""
    # The length of a half-precision unit vector is wrong by up to 1e-3, which the scale multiplies by up to 100.
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
