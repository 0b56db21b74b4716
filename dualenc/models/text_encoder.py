"""The text encoder: a transformer encoder on packed texts, for all common families of encoders.

Decisions:

- There is one implementation. The differences between families (BERT, RoBERTa, ALBERT, DistilBERT, ELECTRA, ModernBERT,
  the text towers of CLIP and SigLIP) are data in `TextConfig`.
- `forward` takes `Tokens`: the linear layers run on the N real tokens as one matrix, and attention stays inside each
  text.
- `forward_padded` runs the same weights on (B, T), for export and as the oracle of the packed path.
- Blocks are post-norm (BERT, Devlin et al. 2019), or pre-norm with a last LayerNorm. Positions are learned or rotary
  (Su et al. 2021).
- A tower that attends to its padding (SigLIP) has no special path: its tokenizer adds the padding as ordinary tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualenc.models.attention import ragged_attention
from dualenc.models.tower import Tower
from dualenc.tokens import Tokens

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (..., H, Dh) -> (..., H, Dh)
Pool = Literal["cls", "mean", "last"]


class QuickGELU(nn.Module):
    """CLIP's activation x * sigmoid(1.702 x) (Hendrycks and Gimpel 2016, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to a tensor of any shape."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "tanh"]


@dataclass(frozen=True)
class TextConfig:
    """Architecture of a `TextEncoder`.

    Attributes:
        vocab_size: number of token embeddings; the tokenizer may use fewer, never more.
        width: hidden size D.
        layers: number of transformer layers.
        heads: number of attention heads; must divide `width`.
        mlp_width: hidden size of the feed-forward part; absent, 4 * width.
        context_length: length of the longest text in tokens, closing token included.
        types: number of segment embeddings; 0 for none.
        norm: place of the LayerNorms: after each residual sum ("post") or before each branch ("pre").
        pool: the text's vector: the hidden state of its first token ("cls") or its last token ("last"), or the mean
            over its tokens ("mean").
        activation: activation of the feed-forward part.
        dropout: dropout rate on the embeddings and on both branches of a block.
        norm_eps: epsilon of every LayerNorm.
        embed_width: width of the embeddings, with a linear layer from there to `width` (ALBERT, Lan et al. 2020,
            section 3.1); absent, `width` and no linear layer.
        groups: number of groups of consecutive layers that share their weights (ALBERT); absent, no weights are shared.
        group_size: number of blocks that each layer of a group consists of.
        positions: "learned", or "rotary" on queries and keys.
        position_offset: number of the first position (2 for RoBERTa, which never uses its first two embeddings).
        theta: base of the rotary angles in layers that attend to the whole text.
        local_theta: base of the rotary angles in local layers; absent, `theta`.
        window: width of the local layers, where a token attends to tokens at most window // 2 positions away
            (ModernBERT, Warner et al. 2024, section 2.1.1); absent, all layers attend to the whole text.
        global_every: n, where layers 0, n, 2n, ... attend to the whole text in spite of `window`.
        gated: whether the feed-forward part is a gated linear unit (GEGLU, Shazeer 2020).
        bias: whether linear layers and LayerNorms have a bias.
        embed_norm: whether the embeddings are normalized; absent, only with post-norm. In a pre-norm encoder the first
            attention then has no LayerNorm of its own (ModernBERT).
        causal: whether a token attends only to itself and to tokens before it (CLIP).
        pad_to: length to which the tokenizer pads shorter texts with tokens that are attended to (SigLIP).
        pad_id: id of the token used for `pad_to`.
        family: Hugging Face `model_type` to export as; absent, the first family that has this architecture.

    Example:
        >>> from dualenc import TextConfig
        >>> config = TextConfig(vocab_size=1000, width=64, layers=2, heads=4)
        >>> config.pool, config.context_length
        ('cls', 77)
    """

    # The keys of the first files. Later keys are optional, and their defaults describe the architecture of that time.
    REQUIRED: ClassVar = (
        "vocab_size", "width", "layers", "heads", "mlp_width", "context_length", "types", "norm", "pool", "activation",
        "dropout", "norm_eps",
    )  # fmt: skip

    vocab_size: int = 30522
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int | None = None
    context_length: int = 77
    types: int = 0
    norm: Literal["post", "pre"] = "post"
    pool: Pool = "cls"
    activation: Activation = "gelu"
    dropout: float = 0.0
    norm_eps: float = 1e-12
    embed_width: int | None = None
    groups: int | None = None
    group_size: int = 1
    positions: Literal["learned", "rotary"] = "learned"
    position_offset: int = 0
    theta: float = 10000.0
    local_theta: float | None = None
    window: int | None = None
    global_every: int = 1
    gated: bool = False
    bias: bool = True
    embed_norm: bool | None = None
    causal: bool = False
    pad_to: int | None = None
    pad_id: int = 0
    family: str | None = None

    def __post_init__(self) -> None:
        choices = {"norm": ("post", "pre"), "pool": ("cls", "mean", "last"), "activation": tuple(ACTIVATIONS)}
        for name, known in {**choices, "positions": ("learned", "rotary")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"text.{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.width % self.heads:
            raise ValueError(f"text.width {self.width} is not divisible by text.heads {self.heads}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"text.width {self.width} / text.heads {self.heads} must be even for rotary positions")
        if self.groups is not None and not 1 <= self.groups <= self.layers:
            raise ValueError(f"text.groups {self.groups} must lie between 1 and text.layers {self.layers}")
        if self.group_size < 1 or (self.group_size > 1 and self.groups is None):
            raise ValueError(f"text.group_size {self.group_size} must be 1, or more with text.groups")
        if self.global_every < 1 or (self.window is not None and self.window < 0):
            raise ValueError(
                f"text.global_every {self.global_every} must be 1 or more, and text.window {self.window} 0 or more"
            )
        if self.pad_to is not None and not 1 <= self.pad_to <= self.context_length:
            raise ValueError(f"text.pad_to {self.pad_to} must lie between 1 and context_length {self.context_length}")

    @property
    def normalizes_embeddings(self) -> bool:
        """`embed_norm`, or its default."""
        return self.norm == "post" if self.embed_norm is None else self.embed_norm

    @property
    def schedule(self) -> list[int]:
        """The numbers of the blocks that a text passes, in order; a shared block occurs several times."""
        if self.groups is None:
            return list(range(self.layers))
        groups = [layer * self.groups // self.layers for layer in range(self.layers)]
        return [group * self.group_size + i for group in groups for i in range(self.group_size)]

    def sees_all(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, attends to the whole text."""
        return self.window is None or layer % self.global_every == 0

    def theta_of(self, whole: bool) -> float:
        """Return the base of the rotary angles in layers that attend to the whole text, or in local ones."""
        return self.theta if whole or self.local_theta is None else self.local_theta


class Attention(nn.Module):
    """Multi-head self-attention; the caller's `attend` decides which tokens attend to each other."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, config.bias)
        self.out = nn.Linear(config.width, config.width, config.bias)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map (..., D) to (..., D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (..., H, Dh) each
        return self.out(attend(q, k, v).flatten(-2))


class GatedActivation(nn.Module):
    """Product of the activated first half of the features and the second half (Shazeer 2020)."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., 2H) to (..., H)."""
        value, gate = x.chunk(2, -1)
        return self.activation(value) * gate


class MLP(nn.Sequential):
    """The feed-forward part of a block."""

    def __init__(self, config: TextConfig) -> None:
        hidden = config.mlp_width or 4 * config.width
        activation = ACTIVATIONS[config.activation]()
        super().__init__(
            nn.Linear(config.width, 2 * hidden if config.gated else hidden, config.bias),
            GatedActivation(activation) if config.gated else activation,
            nn.Linear(hidden, config.width, config.bias),
        )


def layer_norm(config: TextConfig, width: int | None = None) -> nn.LayerNorm:
    """Build a LayerNorm of this architecture."""
    return nn.LayerNorm(width or config.width, config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """One transformer layer on (..., D)."""

    def __init__(self, config: TextConfig, first: bool = False) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = Attention(config)
        already_normalized = first and self.pre_norm and config.normalizes_embeddings
        self.attention_norm = nn.Identity() if already_normalized else layer_norm(config)
        self.mlp = MLP(config)
        self.mlp_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map (..., D) to (..., D)."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), attend))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, attend)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class TextEmbeddings(nn.Module):
    """Sum of token, position and segment embeddings, normalized and projected to `width` where the config says so."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, self.offset = config.embed_width or config.width, config.position_offset
        self.token_embeddings = nn.Embedding(config.vocab_size, width)
        learned = config.positions == "learned"
        self.position_embeddings = nn.Embedding(config.context_length + self.offset, width) if learned else None
        self.segment_embeddings = nn.Embedding(config.types, width) if config.types else None
        self.norm = layer_norm(config, width) if config.normalizes_embeddings else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(width, config.width) if config.embed_width else nn.Identity()

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """Embed ids (...) as vectors (..., D)."""
        x = self.token_embeddings(ids)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions + self.offset)
        if self.segment_embeddings is not None:
            # A single segment, as in RoBERTa, serves all tokens, whatever segments the tokenizer gives.
            single = types is None or self.segment_embeddings.num_embeddings == 1
            x = x + self.segment_embeddings(torch.zeros_like(ids) if single else types)
        return self.projection(self.dropout(self.norm(x)))


class Rotation(NamedTuple):
    """Cosine and sine of the angles of each token, in fp32; see `rotary_angles`."""

    cos: Tensor  # (..., 1, Dh/2)
    sin: Tensor  # (..., 1, Dh/2)


def rotary_angles(positions: Tensor, theta: float, size: int) -> Rotation:
    """Compute the angles by which `rotate` rotates, proportional to the position (Su et al. 2021, section 3.4).

    Args:
        positions: (...) position of each token in its text.
        theta: base of the angles; feature pair i is rotated by position / theta ** (2 i / Dh).
        size: Dh, the size of a head.
    """
    frequency = theta ** -(torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)  # (Dh/2,)
    angle = positions[..., None, None].float() * frequency  # (..., 1, Dh/2)
    return Rotation(angle.cos(), angle.sin())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate pairs of features (i, i + Dh/2) of queries or keys (..., H, Dh)."""
    cos, sin = rotation
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class TextEncoder(Tower):
    """Transformer encoder on packed texts."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.embeddings = TextEmbeddings(config)
        self.schedule = config.schedule
        self.blocks = nn.ModuleList(Block(config, first=i == 0) for i in range(max(self.schedule) + 1))
        self.norm = layer_norm(config) if config.norm == "pre" else nn.Identity()
        self.apply(self._init)

    @property
    def layers(self) -> int:
        """Number of blocks that a text passes; a shared block counts each time."""
        return len(self.schedule)

    def depths(self) -> dict[str, int]:
        """See `Tower.depths`; the last LayerNorm of a pre-norm encoder is above the blocks.

        A block that several layers share has the depth of the highest: it is trained where any of them is.
        """
        last = {block: step + 1 for step, block in enumerate(self.schedule)}
        depths = {}
        for name, _ in self.named_parameters():
            part, number = name.split(".")[:2]
            depths[name] = last[int(number)] if part == "blocks" else 0 if part == "embeddings" else self.layers + 1
        return depths

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tokens) -> Tensor:
        """Compute the hidden states (N, D) of the real tokens, in the order of `tokens.ids`.

        Raises:
            ValueError: If a text has more tokens than there are learned positions.
        """
        config = self.config
        self._check_length(tokens.max_len)

        def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
            return ragged_attention(q, k, v, tokens.offsets, tokens.max_len, causal=config.causal, window=window)

        return self._encode(self.embeddings(tokens.ids, tokens.positions, tokens.types), tokens.positions, attend)

    def forward_padded(self, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> Tensor:
        """Compute the hidden states (B, T, D) of a padded batch, for export and as the oracle of the packed path.

        Args:
            ids: (B, T), padded on the right; the ids of the padding have no influence.
            mask: (B, T), true or 1 where a token is real.
            types: (B, T) segments.

        Raises:
            ValueError: If T is more than the number of learned positions.
        """
        self._check_length(ids.shape[1])
        mask = mask.bool()
        position = torch.arange(ids.shape[1], device=ids.device)
        positions = position.expand_as(ids)
        x = self.embeddings(ids, positions, types)
        x = x.masked_fill(~mask[..., None], 0)  # A non-finite embedding of padding must not reach any sum.
        allowed = mask[:, None, None, :] & torch.ones_like(mask)[:, None, :, None]  # (B, 1, T, T)
        if self.config.causal:
            allowed = allowed & (position <= position[:, None])

        def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
            attn_mask = allowed
            if window is not None:
                # Padding attends to itself, since a row of the mask without any key gives NaN.
                near = (position - position[:, None]).abs() <= window
                attn_mask = allowed & near | (position == position[:, None])
            heads_first = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, Dh)
            return F.scaled_dot_product_attention(*heads_first, attn_mask=attn_mask).transpose(1, 2)

        return self._encode(x, positions, attend)

    def _check_length(self, length: int) -> None:
        most = self.config.context_length
        if length > most and self.config.positions == "learned":
            raise ValueError(
                f"a text has {length} tokens, and the encoder has {most} positions: truncate it (context_length)"
            )

    def _encode(self, x: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Run the blocks; `attend(q, k, v, window)` computes attention inside each text."""
        config = self.config

        def attend_in(whole: bool) -> Attend:
            window = None if whole or config.window is None else config.window // 2
            if config.positions == "learned":
                return partial(attend, window=window)
            rotation = rotations[config.theta_of(whole)]
            return lambda q, k, v: attend(rotate(q, rotation), rotate(k, rotation), v, window)

        kinds = [config.sees_all(step) for step in range(len(self.schedule))]
        rotations: dict[float, Rotation] = {}
        if config.positions == "rotary":
            # Once for all layers: an encoder has one base of the angles or two.
            for theta in {config.theta_of(whole) for whole in kinds}:
                rotations[theta] = rotary_angles(positions, theta, config.width // config.heads)
        attend_of = {whole: attend_in(whole) for whole in kinds}
        for number, whole in zip(self.schedule, kinds):
            block, block_attend = self.blocks[number], attend_of[whole]
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, block_attend, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, block_attend)
        return self.norm(x)

    def pool(self, hidden: Tensor, tokens: Tokens, how: Pool | None = None) -> Tensor:
        """Pool the hidden states of each text.

        Args:
            hidden: (N, D) hidden states of the real tokens.
            tokens: the texts.
            how: as `config.pool`, the default.

        Returns:
            (B, D), in the order in which the caller gave the texts.
        """
        how = how or self.config.pool
        if how == "cls":
            return hidden[tokens.offsets[:-1][tokens.rows]]
        if how == "last":
            return hidden[tokens.offsets[1:][tokens.rows] - 1]
        means = torch.segment_reduce(hidden, "mean", offsets=tokens.offsets.long(), axis=0)
        return means[tokens.rows]

    def pool_padded(self, hidden: Tensor, mask: Tensor, how: Pool | None = None) -> Tensor:
        """Pool the hidden states (B, T, D) of `forward_padded`; see `pool`."""
        how = how or self.config.pool
        if how == "cls":
            return hidden[:, 0]
        if how == "last":
            rows = torch.arange(hidden.shape[0], device=hidden.device)  # len would fix the batch size of an export.
            return hidden[rows, mask.long().sum(1) - 1]
        weight = mask.to(hidden.dtype)[..., None]  # (B, T, 1)
        return (hidden * weight).sum(1) / weight.sum(1)
