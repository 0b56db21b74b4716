"""The text encoder: a bidirectional transformer on packed texts.

Decisions:

- One implementation; what differs between encoders is data in `TextConfig`.
- `forward` takes `Tokens`: the linear layers see the N real tokens as one matrix, attention stays inside each text.
- `forward_padded` runs the same weights on (B, T) for export and as the oracle of the packed path.
- Learned absolute positions; post-norm (BERT, Devlin et al. 2019) or pre-norm with a last LayerNorm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualenc.models.attention import ragged_attention
from dualenc.models.tower import Tower
from dualenc.tokens import Tokens

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (..., H, Dh) -> (..., H, Dh)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
}


@dataclass(frozen=True)
class TextConfig:
    """Architecture of a `TextEncoder`.

    Attributes:
        vocab_size: rows of the word embedding; the tokenizer may use fewer, never more.
        width: hidden size D.
        layers: number of transformer blocks.
        heads: attention heads; must divide `width`.
        mlp_width: hidden size of the feed-forward part; 4 * width when absent.
        context_length: longest text in tokens, closing token included.
        types: number of segment embeddings; 0 for none.
        norm: LayerNorm after each residual sum ("post") or before each branch ("pre").
        pool: the text's vector is its first token's ("cls") or the mean over its tokens ("mean").
        activation: of the feed-forward part.
        dropout: on embeddings and on both branches of a block, in training.
        norm_eps: epsilon of every LayerNorm.
    """

    vocab_size: int = 30522
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int | None = None
    context_length: int = 77
    types: int = 0
    norm: Literal["post", "pre"] = "post"
    pool: Literal["cls", "mean"] = "cls"
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    dropout: float = 0.0
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for name, known in (("norm", ("post", "pre")), ("pool", ("cls", "mean")), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"text.{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if self.width % self.heads:
            raise ValueError(f"text.width {self.width} is not divisible by text.heads {self.heads}")


class Attention(nn.Module):
    """Multi-head self-attention; which tokens meet is the caller's `attend`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(..., D) to (..., D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (..., H, Dh) each
        return self.out(attend(q, k, v).flatten(-2))


class MLP(nn.Sequential):
    """The feed-forward part of a block."""

    def __init__(self, config: TextConfig) -> None:
        hidden = config.mlp_width or 4 * config.width
        super().__init__(
            nn.Linear(config.width, hidden), ACTIVATIONS[config.activation](), nn.Linear(hidden, config.width)
        )


class Block(nn.Module):
    """One transformer layer on (..., D)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(..., D) to (..., D)."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), attend))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, attend)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Embeddings(nn.Module):
    """Sum of word, position and segment embeddings; post-norm encoders normalise it (BERT)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(config.context_length, config.width)
        self.segments = nn.Embedding(config.types, config.width) if config.types else None
        self.norm = nn.LayerNorm(config.width, config.norm_eps) if config.norm == "post" else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """Ids (...) to vectors (..., D)."""
        x = self.words(ids) + self.places(positions)
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(ids) if types is None else types)
        return self.dropout(self.norm(x))


class TextEncoder(Tower):
    """Bidirectional transformer encoder on packed texts."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps) if config.norm == "pre" else nn.Identity()
        self.apply(self._init)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.config.layers

    def depths(self) -> dict[str, int]:
        """See `Tower.depths`; the last LayerNorm of a pre-norm encoder is above the blocks."""
        depths = {}
        for name, _ in self.named_parameters():
            part, number = name.split(".")[:2]
            depths[name] = int(number) + 1 if part == "blocks" else 0 if part == "embeddings" else self.layers + 1
        return depths

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tokens) -> Tensor:
        """Hidden states (N, D) of the real tokens, in the order of `tokens.ids`."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ragged_attention(q, k, v, tokens.offsets, tokens.max_len)

        return self._encode(self.embeddings(tokens.ids, tokens.positions, tokens.types), attend)

    def forward_padded(self, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of a padded batch: the same weights, for export and as the packed path's oracle.

        Args:
            ids: (B, T), padded on the right; what stands in the padding has no influence.
            mask: (B, T), true or 1 where a token is real.
            types: (B, T) segments.
        """
        mask = mask.bool()
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.embeddings(ids, positions, types)
        x = x.masked_fill(~mask[..., None], 0)  # a non-finite padding embedding must not reach a sum

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads_first = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, Dh)
            return F.scaled_dot_product_attention(*heads_first, attn_mask=mask[:, None, None, :]).transpose(1, 2)

        return self._encode(x, attend)

    def _encode(self, x: Tensor, attend: Attend) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, attend, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, attend)
        return self.norm(x)

    def pool(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """One vector a text, (B, D), in the order in which the caller gave the texts."""
        if self.config.pool == "cls":
            return hidden[tokens.offsets[:-1][tokens.rows]]
        sums = torch.segment_reduce(hidden, "mean", offsets=tokens.offsets.long(), axis=0)
        return sums[tokens.rows]

    def pool_padded(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """`pool` for the (B, T, D) of `forward_padded`."""
        if self.config.pool == "cls":
            return hidden[:, 0]
        weight = mask.to(hidden.dtype)[..., None]  # (B, T, 1)
        return (hidden * weight).sum(1) / weight.sum(1)
