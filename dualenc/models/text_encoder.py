"""The text encoder: a transformer encoder on packed texts, for every family that people use.

Decisions:

- One implementation; what differs between families (BERT, RoBERTa, ALBERT, DistilBERT, ELECTRA, ModernBERT, the text
  towers of CLIP and SigLIP) is data in `TextConfig`.
- `forward` takes `Tokens`: the linear layers see the N real tokens as one matrix, attention stays inside each text.
- `forward_padded` runs the same weights on (B, T) for export and as the oracle of the packed path.
- Post-norm (BERT, Devlin et al. 2019), or pre-norm with a last LayerNorm; positions learned or rotary (Su et al. 2021).
- A tower that sees its padding (SigLIP) has no special path: its tokenizer makes the padding, as tokens like others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

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
    """x * sigmoid(1.702 x), as CLIP has it (Hendrycks and Gimpel 2016, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
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
        vocab_size: rows of the word embedding; the tokenizer may use fewer, never more.
        width: hidden size D.
        layers: number of transformer blocks that a text passes.
        heads: attention heads; must divide `width`.
        mlp_width: hidden size of the feed-forward part; 4 * width when absent.
        context_length: longest text in tokens, closing token included.
        types: number of segment embeddings; 0 for none.
        norm: LayerNorm after each residual sum ("post") or before each branch ("pre").
        pool: the text's vector is its first token's ("cls"), its last token's ("last"), or the mean over its tokens.
        activation: of the feed-forward part.
        dropout: on embeddings and on both branches of a block, in training.
        norm_eps: epsilon of every LayerNorm.
        embed_width: width of the embeddings, from which a linear map leads to `width` (ALBERT, Lan et al. 2020, section
            3.1); absent, they have `width` and no map.
        groups: blocks with weights of their own, each for layers / groups layers one after the other (ALBERT); absent,
            every layer has its own.
        group_size: blocks of a group, that each of its layers passes one after the other.
        positions: "learned", or "rotary" on queries and keys.
        position_offset: number of the first position (2 for RoBERTa, whose first two are never used).
        theta: base of the rotary angles where the whole text is seen.
        local_theta: base where a window is seen; absent, `theta`.
        window: tokens at most window // 2 apart see each other in local layers (ModernBERT, Warner et al. 2024, section
            2.1.1); absent, all layers see the whole text.
        global_every: of the layers every so many-th, from the first on, sees the whole text in spite of `window`.
        gated: the feed-forward part is a gated linear unit (GEGLU, Shazeer 2020).
        bias: whether linear layers and LayerNorms have a bias.
        embed_norm: whether the embeddings are normalized; absent, as `norm` is "post". Where a pre-norm encoder does
            so, its first attention has no LayerNorm of its own (ModernBERT).
        causal: a token sees those before it and itself (CLIP).
        pad_to: the tokenizer fills shorter texts up to this length, with tokens that are seen like others (SigLIP).
        pad_id: of the token that does.
        family: `model_type` of Hugging Face that a checkpoint is written as; absent, the first that has this
            architecture.
    """

    # What the first files had; they lack the rest, whose defaults mean what was then.
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
                raise ValueError(f"text.{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if self.width % self.heads:
            raise ValueError(f"text.width {self.width} is not divisible by text.heads {self.heads}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"text.width {self.width} / text.heads {self.heads} must be even for rotary positions")
        if self.groups is not None and not 1 <= self.groups <= self.layers:
            raise ValueError(f"text.groups {self.groups} must lie between 1 and text.layers {self.layers}")
        if self.group_size < 1 or (self.group_size > 1 and self.groups is None):
            raise ValueError(f"text.group_size {self.group_size} must be 1, or more where there are text.groups")
        if self.global_every < 1 or (self.window is not None and self.window < 0):
            raise ValueError(f"text.global_every {self.global_every} must be 1 or more, text.window not negative")
        if self.pad_to is not None and not 1 <= self.pad_to <= self.context_length:
            raise ValueError(f"text.pad_to {self.pad_to} must lie between 1 and context_length {self.context_length}")

    @property
    def normalizes_embeddings(self) -> bool:
        """`embed_norm`, or what stands for it."""
        return self.norm == "post" if self.embed_norm is None else self.embed_norm

    @property
    def schedule(self) -> list[int]:
        """Number of the block that each step of a text's way through the layers uses."""
        if self.groups is None:
            return list(range(self.layers))
        groups = [layer * self.groups // self.layers for layer in range(self.layers)]
        return [group * self.group_size + i for group in groups for i in range(self.group_size)]

    def sees_all(self, layer: int) -> bool:
        """Whether a layer, counted from 0, sees the whole text."""
        return self.window is None or layer % self.global_every == 0


class Attention(nn.Module):
    """Multi-head self-attention; which tokens meet is the caller's `attend`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, config.bias)
        self.out = nn.Linear(config.width, config.width, config.bias)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(..., D) to (..., D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (..., H, Dh) each
        return self.out(attend(q, k, v).flatten(-2))


class Gated(nn.Module):
    """The first half of the features, activated, times the second."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2H) to (..., H)."""
        value, gate = x.chunk(2, -1)
        return self.activation(value) * gate


class MLP(nn.Sequential):
    """The feed-forward part of a block."""

    def __init__(self, config: TextConfig) -> None:
        hidden = config.mlp_width or 4 * config.width
        activation = ACTIVATIONS[config.activation]()
        super().__init__(
            nn.Linear(config.width, 2 * hidden if config.gated else hidden, config.bias),
            Gated(activation) if config.gated else activation,
            nn.Linear(hidden, config.width, config.bias),
        )


def layer_norm(config: TextConfig, width: int | None = None) -> nn.LayerNorm:
    """A LayerNorm as the encoder has them."""
    return nn.LayerNorm(width or config.width, config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """One transformer layer on (..., D)."""

    def __init__(self, config: TextConfig, first: bool = False) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = Attention(config)
        done = first and self.pre_norm and config.normalizes_embeddings
        self.attention_norm = nn.Identity() if done else layer_norm(config)
        self.mlp = MLP(config)
        self.mlp_norm = layer_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(..., D) to (..., D)."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), attend))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, attend)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class TextEmbeddings(nn.Module):
    """Sum of word, position and segment embeddings, normalized where the family does so, and brought to `width`."""

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
        """Ids (...) to vectors (..., D)."""
        x = self.token_embeddings(ids)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(positions + self.offset)
        if self.segment_embeddings is not None:
            alone = (
                types is None or self.segment_embeddings.num_embeddings == 1
            )  # as RoBERTa, whatever a tokenizer says
            x = x + self.segment_embeddings(torch.zeros_like(ids) if alone else types)
        return self.projection(self.dropout(self.norm(x)))


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turns pairs of features (i, i + Dh/2) by angles that grow with the place (RoFormer, Su et al. 2021, section 3.4).

    Args:
        x: (..., H, Dh).
        positions: (...) of each token in its text.
        theta: feature pair i turns by position / theta ** (2 i / Dh).
    """
    size = x.shape[-1]
    speed = theta ** -(torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)  # (Dh/2,)
    angle = positions[..., None, None].float() * speed  # (..., 1, Dh/2)
    cos, sin = angle.cos(), angle.sin()
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
        """Number of blocks that a text passes, those of shared weights counted each time."""
        return len(self.schedule)

    def depths(self) -> dict[str, int]:
        """See `Tower.depths`; the last LayerNorm of a pre-norm encoder is above the blocks.

        A block that several layers share counts as the highest of them: it is trained where any of them is.
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
        """Hidden states (N, D) of the real tokens, in the order of `tokens.ids`.

        Raises:
            ValueError: a text is longer than there are positions.
        """
        config = self.config
        self._check_length(tokens.max_len)

        def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
            return ragged_attention(q, k, v, tokens.offsets, tokens.max_len, causal=config.causal, window=window)

        return self._encode(self.embeddings(tokens.ids, tokens.positions, tokens.types), tokens.positions, attend)

    def forward_padded(self, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of a padded batch: the same weights, for export and as the packed path's oracle.

        Args:
            ids: (B, T), padded on the right; what stands in the padding has no influence.
            mask: (B, T), true or 1 where a token is real.
            types: (B, T) segments.

        Raises:
            ValueError: T is more than there are positions.
        """
        self._check_length(ids.shape[1])
        mask = mask.bool()
        place = torch.arange(ids.shape[1], device=ids.device)
        positions = place.expand_as(ids)
        x = self.embeddings(ids, positions, types)
        x = x.masked_fill(~mask[..., None], 0)  # a non-finite padding embedding must not reach a sum
        whole = mask[:, None, None, :] & torch.ones_like(mask)[:, None, :, None]  # (B, 1, T, T)
        if self.config.causal:
            whole = whole & (place <= place[:, None])

        def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
            seen = whole
            if window is not None:  # what stands in the padding sees itself: a row of nothing is not a number
                near = (place - place[:, None]).abs() <= window
                seen = whole & near | (place == place[:, None])
            heads_first = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, Dh)
            return F.scaled_dot_product_attention(*heads_first, attn_mask=seen).transpose(1, 2)

        return self._encode(x, positions, attend)

    def _check_length(self, length: int) -> None:
        most = self.config.context_length
        if length > most and self.config.positions == "learned":
            raise ValueError(f"a text of {length} tokens: the encoder has {most} positions; cut it (context_length)")

    def _encode(self, x: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        config = self.config

        def layer(whole: bool) -> Attend:
            window = None if whole or config.window is None else config.window // 2
            if config.positions == "learned":
                return partial(attend, window=window)
            theta = config.theta if whole or config.local_theta is None else config.local_theta
            turned = partial(rotated, positions=positions, theta=theta)
            return lambda q, k, v: attend(turned(q), turned(k), v, window)

        seen = {whole: layer(whole) for whole in (True, False)}
        for step, number in enumerate(self.schedule):
            block, attend_here = self.blocks[number], seen[config.sees_all(step)]
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, attend_here, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, attend_here)
        return self.norm(x)

    def pool(self, hidden: Tensor, tokens: Tokens, how: Pool | None = None) -> Tensor:
        """One vector a text, (B, D), in the order in which the caller gave the texts; by `config.pool` unless said."""
        how = how or self.config.pool
        if how == "cls":
            return hidden[tokens.offsets[:-1][tokens.rows]]
        if how == "last":
            return hidden[tokens.offsets[1:][tokens.rows] - 1]
        sums = torch.segment_reduce(hidden, "mean", offsets=tokens.offsets.long(), axis=0)
        return sums[tokens.rows]

    def pool_padded(self, hidden: Tensor, mask: Tensor, how: Pool | None = None) -> Tensor:
        """`pool` for the (B, T, D) of `forward_padded`."""
        how = how or self.config.pool
        if how == "cls":
            return hidden[:, 0]
        if how == "last":
            rows = torch.arange(hidden.shape[0], device=hidden.device)  # not len: it would fix the batch of an export
            return hidden[rows, mask.long().sum(1) - 1]
        weight = mask.to(hidden.dtype)[..., None]  # (B, T, 1)
        return (hidden * weight).sum(1) / weight.sum(1)
