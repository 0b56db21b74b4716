"""A text encoder together with its heads, the task-specific last layers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dualenc.models.dual_encoder import unit
from dualenc.models.heads.base import HeadConfig, make_head
from dualenc.models.heads.vectors import EmbeddingConfig
from dualenc.models.text_encoder import TextConfig, TextEncoder
from dualenc.tokens import Tokens


@dataclass(frozen=True)
class LoadedHeads:
    """Result of `TextModel.load_pretrained`, as names of heads.

    Attributes:
        whole: heads of which all weights were copied.
        first_layer: heads of which only the first layer was copied; the rest stays random.
        random: heads of which nothing was copied.
    """

    whole: tuple[str, ...] = ()
    first_layer: tuple[str, ...] = ()
    random: tuple[str, ...] = ()


class TextModel(nn.Module):
    """A text encoder and heads by name.

    Args:
        config: architecture of the encoder.
        heads: configurations of the heads; one encoder may have none or many.

    Attributes:
        head_configs: configuration of each head by name.
        kinds: `Head` object of each head by name, which knows its loss and metrics but holds no weights.
        heads: layers of each head by name, which hold the weights.
    """

    def __init__(self, config: TextConfig, heads: Mapping[str, HeadConfig] | None = None) -> None:
        super().__init__()
        for name in heads or {}:
            if not name or "." in name or hasattr(nn.ModuleDict(), name):
                raise ValueError(
                    f"model.heads.{name}: a head cannot be called {name!r}: choose a name without dots that is not an "
                    "attribute of torch.nn.ModuleDict"
                )
        self.config, self.head_configs = config, dict(heads or {})
        self.kinds = {name: make_head(head) for name, head in self.head_configs.items()}
        self.encoder = TextEncoder(config)
        self.heads = nn.ModuleDict({name: kind.build(config) for name, kind in self.kinds.items()})

    def forward(self, tokens: Tokens, head: str, masked_positions: Tensor | None = None) -> Tensor:
        """Return the logits of one head, see `head`."""
        return self.head(head, self.encoder(tokens), tokens, masked_positions)

    def head(self, name: str, hidden: Tensor, tokens: Tokens, masked_positions: Tensor | None = None) -> Tensor:
        """Return the logits of a head.

        Args:
            name: name of the head.
            hidden: (N, D) hidden states of the encoder.
            tokens: B texts.
            masked_positions: (M,) positions of the tokens that the head guesses or judges; None for all N.

        Returns:
            By kind of the head, for "mlm" logits (M, V); for "rtd" logits (M,); for "token_classification" logits
            (M, C); for "classification" logits (B, C) in the caller's order; for "embedding" unit vectors (B, D); for
            "pooler" features (B, D).
        """
        return self.kinds[name].logits(self.heads[name], self.encoder, hidden, tokens, masked_positions)

    def heads_for(self, task: str) -> list[str]:
        """Return the names of the heads for a task by its name on the Hugging Face Hub, see `Head.task`."""
        return [name for name, kind in self.kinds.items() if kind.task == task]

    @property
    def embedding_head(self) -> str | None:
        """The name of the head that makes sentence embeddings, the first embedding head; None if there is none."""
        return next(iter(self.heads_for("sentence-similarity")), None)

    @property
    def vectors(self) -> EmbeddingConfig:
        """The settings of sentence embeddings."""
        name = self.embedding_head
        return (None if name is None else self.head_configs[name].embedding) or EmbeddingConfig()

    @property
    def embedding_width(self) -> int:
        """The dimensions of sentence embeddings before any are left out."""
        return self.vectors.width(self.config.width)

    def embed(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """Return sentence embeddings (B, E) of unit length and all dimensions.

        They are those of the first embedding head, or else the vectors that the encoder pools.

        Args:
            hidden: (N, D) hidden states of the encoder.
            tokens: B texts.
        """
        if (name := self.embedding_head) is not None:
            return self.head(name, hidden, tokens)
        return unit(self.encoder.pool(hidden, tokens))

    @torch.no_grad()
    def load_pretrained(self, other: "TextModel") -> LoadedHeads:
        """Copy the weights of an encoder of the same architecture, and those of its heads that fit.

        A head is copied whole from a head for the same task; if it has labels, both must also have the same name. From
        a pooler, or from a classification head with other labels, only the first layer is copied.

        Args:
            other: model to copy from.

        Returns:
            Names of the heads by how much was copied.
        """
        self.encoder.load_state_dict(other.encoder.state_dict())
        whole, first_layer, random = [], [], []
        for name, kind in self.kinds.items():
            module = self.heads[name]
            same = next((key for key, theirs in other.kinds.items() if kind.matches(theirs, key == name)), None)
            if same is not None:
                kind.copy_weights(module, other.heads[same], other.encoder)
                whole.append(name)
            elif any(kind.copy_first_layer(module, theirs, other.heads[key]) for key, theirs in other.kinds.items()):
                first_layer.append(name)
            elif list(module.parameters()):
                random.append(name)
        return LoadedHeads(tuple(whole), tuple(first_layer), tuple(random))
