"""The dual encoder: an image and a text tower that project into one space (CLIP, Radford et al. 2021)."""

import math
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
    """Maps from a tower's features to embeddings.

    Attributes:
        hidden: widths between the maps, with an activation after each.
        bias: of each map whether it has one; empty for no map at all, where the features are the embeddings.
        activation: "gelu", or "tanh" as BERT's pooler has it.
    """

    hidden: tuple[int, ...] = ()
    bias: tuple[bool, ...] = (False,)
    activation: Literal["gelu", "tanh"] = "gelu"

    def __post_init__(self) -> None:
        if len(self.bias) != len(self.hidden) + 1 and (self.hidden or self.bias):
            raise ValueError(f"a projection with hidden {self.hidden} has {len(self.hidden) + 1} bias, not {self.bias}")
        if self.activation not in PROJECTION_ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {', '.join(PROJECTION_ACTIVATIONS)}")


PROJECTION_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class DualConfig:
    """Architecture of a `DualEncoder`: what `config.json` of a model directory holds.

    Attributes:
        image, text: of the towers.
        embed_dim: E.
        projection: of both towers: one linear map without bias ("linear"), or two with a GELU between ("mlp").
        logit_bias: whether there is a bias beside the temperature.
        image_projection, text_projection: of one tower, in place of `projection`, as models of others have them.
    """

    REQUIRED: ClassVar = ("image", "text", "embed_dim", "projection", "logit_bias")  # what the first files had

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
        for name in ("image_projection", "text_projection"):  # one way to say what `projection` says already
            if self.projection == "linear" and getattr(self, name) == Projection():
                object.__setattr__(self, name, None)

    def projection_of(self, own: Projection | None, width: int) -> Projection:
        """The projection of a tower of this width, whose `own` one may be absent."""
        return own or (Projection((width,), (True, True)) if self.projection == "mlp" else Projection())


class Embeddings(NamedTuple):
    """What a step of contrastive training compares."""

    image: Tensor  # (B, E), unit length
    text: Tensor  # (B, E), unit length
    scale: Tensor  # (1,), the factor itself, not its logarithm
    bias: Tensor | None  # (1,)


class Logits(nn.Module):
    """The learned temperature, and a bias where the loss is a sigmoid (SigLIP, Zhai et al. 2023).

    Args:
        bias: whether there is a bias; without one the factor is at most `MAX_SCALE`.
        init_scale: the factor at the start.
        init_bias: the bias at the start.
    """

    def __init__(self, bias: bool, init_scale: float, init_bias: float) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(init_scale)))
        self.bound = math.inf if bias else math.log(MAX_SCALE)  # SigLIP has none, and the published ones are past 100
        self.logit_bias = nn.Parameter(torch.full((1,), init_bias)) if bias else None

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Scale factor and bias, (1,) each."""
        # A copy: of a parameter that lies spread over ranks the memory is gone when this returns.
        bias = None if self.logit_bias is None else self.logit_bias.clone()
        # Not clamp: its gradient at the bound itself is 0, and the scale could never come down again.
        return torch.where(self.logit_scale > self.bound, self.bound, self.logit_scale).exp(), bias

    @torch.no_grad()
    def project(self) -> None:
        """Brings the parameter back to the bound after a step; past it `forward` gives no gradient."""
        self.logit_scale.clamp_(max=self.bound)


class DualEncoder(nn.Module):
    """Image and text encoder with projections into one space of `embed_dim` dimensions.

    Args:
        image, text: architectures of the towers.
        embed_dim: E.
        projection: one linear map without bias a tower ("linear"), or two with a GELU between ("mlp").
        logit_bias: learn a bias for the sigmoid loss.
        image_projection, text_projection: see `DualConfig`.
        init_scale, init_bias: temperature factor and bias before training; absent, CLIP's 1/0.07, or SigLIP's 10 and
            -10 where there is a bias.
        patch_dropout: see `ImageEncoder`; no part of the architecture.
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

    @classmethod
    def from_config(cls, config: DualConfig) -> "DualEncoder":
        """A model of this architecture with random weights."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(config)})

    def load_pretrained(self, other: "DualEncoder") -> None:
        """Takes all weights of a model that differs in `image.img_size` and dropout at most, and may lack the bias.

        Position embeddings are resampled to this model's size.
        """
        self.image.load_pretrained(other.image.vit.state_dict())
        rest = {name: x for name, x in other.state_dict().items() if not name.startswith("image.")}
        self.load_state_dict({**self.state_dict(), **rest})

    def _projection(self, tower: str, own: Projection | None, width: int) -> nn.Module:
        shape = self.config.projection_of(own, width)
        if not shape.bias:
            if width != self.embed_dim:
                raise ValueError(f"the {tower} tower has width {width} and no projection: embed_dim cannot be another")
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
        """E."""
        return self.config.embed_dim

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, E) of unit length of normalized images (B, 3, S, S), or of their features (B, D).

        These are what `image` gives, computed before.
        """
        return unit(self.image_projection(images if images.dim() == 2 else self.image(images)))

    def encode_text(self, tokens: Tokens) -> Tensor:
        """Embeddings (B, E) of unit length, in the order in which the caller gave the texts."""
        return unit(self.text_projection(self.text.pool(self.text(tokens), tokens)))

    def forward(self, images: Tensor, tokens: Tokens) -> Embeddings:
        """Embeddings of a batch of pairs, with the temperature and bias that scale their products."""
        return Embeddings(self.encode_image(images), self.encode_text(tokens), *self.logits())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades computation for memory in both towers."""
        self.image.set_grad_checkpointing(enable)
        self.text.grad_checkpointing = enable


def embed_pieces(embed: Callable[..., Embeddings], pieces: Sequence[tuple[Any, ...]]) -> Embeddings:
    """Embeddings of a batch that comes in pieces, with the memory that the largest of them takes.

    Of several pieces only the embeddings are kept; what the gradient of one needs is computed again when it is its turn
    (gradient caching, Gao et al. 2021, as activation checkpointing), with the same dropout. Values and gradients are
    those of the pieces with all of their graphs kept, whatever is computed of the embeddings.

    Args:
        embed: of the parts of a piece.
        pieces: its arguments, one by one.
    """
    parts = in_pieces(embed, pieces)
    image, text = (torch.cat(x) for x in zip(*(part[:2] for part in parts)))
    return Embeddings(image, text, *parts[0][2:])


def in_pieces(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What a function gives of each piece; where there are several, it is called again for its gradient."""
    if len(pieces) == 1:
        return [function(*pieces[0])]
    return [checkpoint(_without_cache, function, *piece, use_reentrant=False) for piece in pieces]


def _without_cache(function: Callable[..., Any], *piece: Any) -> Any:
    # Autocast would keep one copy of each weight in half precision for all pieces, and sum up their gradients in that.
    device = next(part.device.type for part in tree_leaves(piece) if isinstance(part, Tensor))
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype, enabled, cache_enabled=False):
        return function(*piece)


def unit(x: Tensor) -> Tensor:
    """Rows (B, E) of unit length, in fp32 at least."""
    # fp32 at least: a half-precision unit vector is off by 1e-3, and the loss multiplies that by up to 100.
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
