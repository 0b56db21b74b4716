"""Heads: from hidden states to logits. None owns an encoder; what one ties to, its caller hands it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualenc.models.text_encoder import ACTIVATIONS, Activation, Pool, TextConfig, TextEncoder, layer_norm
from dualenc.tokens import Tokens


@dataclass(frozen=True)
class HeadConfig:
    """What a head is, and what it is for.

    Attributes:
        kind: "mlm" guesses hidden tokens; "rtd" tells which tokens were replaced (ELECTRA); "classification" gives a
            text, or a pair of them, its labels or a number; "embedding" compares the vectors of texts, and has no
            weights; "pooler" is what a pretrained classification head leaves when its labels are taken away.
        labels: of a classification, in the order of its logits; one, for its name, where the problem is a regression.
        problem: one label a text ("single_label"), any number of labels ("multi_label"), or a number ("regression").
            For "embedding": the other texts of the batch are negatives ("negatives"), or the label is the cosine
            ("cosine").
        pool: which vector of a text is taken; absent, that of the encoder's `pool`.
        activation: between the two layers of a classification head; null for a head of one layer. "mlm" and "rtd" have
            the encoder's.
        norm: LayerNorm after the activation of a classification head (ModernBERT).
        tied: the logits of "mlm" are products with the word embedding, and not with weights of the head's own.
        scale: of the cosines of an embedding with negatives, absent 20; of a cosine problem, the label that means a
            cosine of 1, absent 1.
        weight: of its loss, where several heads are trained together.
    """

    kind: Literal["mlm", "rtd", "classification", "embedding", "pooler"]
    labels: tuple[str, ...] = ()
    problem: Literal["single_label", "multi_label", "regression", "negatives", "cosine"] = "single_label"
    pool: Pool | None = None
    activation: Activation | None = "tanh"
    norm: bool = False
    tied: bool = True
    scale: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        kinds = {"classification": ("single_label", "multi_label", "regression"), "embedding": ("negatives", "cosine")}
        if self.kind in kinds and self.problem not in kinds[self.kind]:
            raise ValueError(f"a head for {self.kind}: set its problem to {' or '.join(kinds[self.kind])}")
        if self.kind == "classification":
            least = 1 if self.problem == "regression" else 2
            if len(self.labels) < least or len(set(self.labels)) < len(self.labels):
                raise ValueError(f"a head for {self.problem} classification needs {least} or more labels, each once")
            if self.problem == "regression" and len(self.labels) != 1:
                raise ValueError("a head for regression has one label, the name of its number")
        elif self.labels:
            raise ValueError(f"a head for {self.kind} has no labels")
        if (self.scale is not None and not self.scale > 0) or not self.weight > 0:
            raise ValueError(f"scale {self.scale} and weight {self.weight} of a head must be positive")


def _linear(wide: int, out: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(wide, out, bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class MaskedLanguageHead(nn.Module):
    """Which word stands at a place (BERT, Devlin et al. 2019, section 3.1): a layer, a norm, the word embedding.

    Args:
        config: of the text encoder.
        tied: whether the word embedding is the last layer.
    """

    def __init__(self, config: TextConfig, tied: bool = True) -> None:
        super().__init__()
        width = config.embed_width or config.width
        self.dense = _linear(config.width, width, config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.norm = layer_norm(config, width)
        self.output_embeddings = None if tied else nn.Parameter(torch.randn(config.vocab_size, width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, token_embeddings: Tensor) -> Tensor:
        """Logits (M, V) of hidden states (M, D), by the weight (V, width) of the token embeddings."""
        weight = token_embeddings if self.output_embeddings is None else self.output_embeddings
        return F.linear(self.norm(self.activation(self.dense(hidden))), weight, self.bias)


class ReplacedTokenHead(nn.Module):
    """Whether a token was replaced (ELECTRA, Clark et al. 2020, section 2): a layer and one logit.

    Args:
        config: of the text encoder.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = _linear(config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]()
        self.out = _linear(config.width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (N,) of hidden states (N, D)."""
        return self.out(self.activation(self.dense(hidden))).squeeze(-1)


class ClassificationHead(nn.Module):
    """From a text's vector to logits: one layer, or two with an activation between, as BERT's pooler and classifier.

    Args:
        config: of the text encoder.
        outputs: number of logits; 0 for the hidden layer alone.
        activation: of the hidden layer; None for none.
        norm: LayerNorm after it.
    """

    def __init__(self, config: TextConfig, outputs: int, activation: Activation | None = "tanh", norm: bool = False):
        super().__init__()
        hidden = activation is not None
        self.dense = _linear(config.width, config.width, config.bias) if hidden else nn.Identity()
        self.activation = ACTIVATIONS[activation]() if activation is not None else nn.Identity()
        self.norm = layer_norm(config) if norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.out = _linear(config.width, outputs) if outputs else nn.Identity()

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits (B, C) of vectors (B, D)."""
        return self.out(self.dropout(self.norm(self.activation(self.dense(pooled)))))


def make_head(config: TextConfig, head: HeadConfig) -> nn.Module:
    """A head with random weights.

    Args:
        config: of the text encoder.
        head: what it is.
    """
    if head.kind == "mlm":
        return MaskedLanguageHead(config, head.tied)
    if head.kind == "rtd":
        return ReplacedTokenHead(config)
    if head.kind == "embedding":
        return nn.Identity()
    return ClassificationHead(config, len(head.labels), head.activation, head.norm)


def answers(head: HeadConfig, logits: Tensor) -> list[dict[str, Any]]:
    """What a classification says, in words.

    Args:
        head: of kind "classification".
        logits: (B, C).

    Returns:
        For one label a text "label", its "score" and the "scores" of all labels, which sum to 1; for several "labels"
        of a score of 0.5 or more, and "scores"; for a regression "value".
    """
    logits = logits.detach().float().cpu()
    if head.problem == "regression":
        return [{"value": value} for value in logits[:, 0].tolist()]
    several = head.problem == "multi_label"
    out: list[dict[str, Any]] = []
    for row in (logits.sigmoid() if several else logits.softmax(-1)).tolist():
        scores = dict(zip(head.labels, row, strict=True))
        if several:
            out.append({"labels": [label for label, score in scores.items() if score >= 0.5], "scores": scores})
        else:
            best = max(scores, key=scores.__getitem__)
            out.append({"label": best, "score": scores[best], "scores": scores})
    return out


class TextModel(nn.Module):
    """A text encoder and heads by name.

    Args:
        config: of the encoder.
        heads: what they are; one encoder may have none or many.
    """

    def __init__(self, config: TextConfig, heads: Mapping[str, HeadConfig] | None = None) -> None:
        super().__init__()
        for name in heads or {}:
            if not name or "." in name or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"model.heads.{name}: a head cannot be called so")
        self.config, self.head_configs = config, dict(heads or {})
        self.encoder = TextEncoder(config)
        self.heads = nn.ModuleDict({name: make_head(config, head) for name, head in self.head_configs.items()})

    def forward(self, tokens: Tokens, head: str, masked_positions: Tensor | None = None) -> Tensor:
        """What one head says of texts; see `head`."""
        return self.head(head, self.encoder(tokens), tokens, masked_positions)

    @torch.no_grad()
    def load_pretrained(self, other: "TextModel") -> list[str]:
        """Takes the weights of an encoder of the same architecture, and of its heads what fits.

        Heads for the same task, and of the same name where they have labels, are taken whole; of a pooler, or a
        classification with other labels, the hidden layer.

        Args:
            other: where from.

        Returns:
            What was taken besides the encoder, in words.
        """
        self.encoder.load_state_dict(other.encoder.state_dict())
        taken = []
        for name, mine in self.head_configs.items():
            for key, theirs in other.head_configs.items():
                words = mine.kind == theirs.kind and mine.kind in ("mlm", "rtd")
                same = replace(theirs, weight=mine.weight, scale=mine.scale, pool=mine.pool) == mine
                if words or (same and key == name):
                    given = other.heads[key].state_dict()
                    if mine.tied:  # what was untied is from here on the word embedding
                        given.pop("output_embeddings", None)
                    elif "output_embeddings" in self.heads[name].state_dict():
                        given.setdefault("output_embeddings", other.encoder.embeddings.token_embeddings.weight)
                    self.heads[name].load_state_dict(given)
                    taken.append(f"head {name}")
                    break
            else:
                layers = [
                    other.heads[key]
                    for key, theirs in other.head_configs.items()
                    if theirs.kind in ("pooler", "classification")
                    and (theirs.activation, theirs.norm) == (mine.activation, mine.norm)
                ]
                if mine.kind == "classification" and mine.activation is not None and layers:
                    for part in ("dense", "norm"):
                        getattr(self.heads[name], part).load_state_dict(getattr(layers[0], part).state_dict())
                    taken.append(f"the first layer of head {name}")
        return taken

    def head(self, name: str, hidden: Tensor, tokens: Tokens, masked_positions: Tensor | None = None) -> Tensor:
        """What a head says of hidden states.

        Args:
            name: of the head.
            hidden: (N, D), of the encoder.
            tokens: B texts.
            masked_positions: (M,) of the tokens that "mlm" guesses and "rtd" judges; absent, all N.

        Returns:
            "mlm": logits (M, V); "rtd": logits (M,); "classification": logits (B, C) in the caller's order;
            "embedding": unit vectors (B, D); "pooler": (B, D).
        """
        config, module = self.head_configs[name], self.heads[name]
        if config.kind in ("mlm", "rtd"):
            hidden = hidden if masked_positions is None else hidden[masked_positions]
            return (
                module(hidden, self.encoder.embeddings.token_embeddings.weight)
                if config.kind == "mlm"
                else module(hidden)
            )
        pooled = self.encoder.pool(hidden, tokens, config.pool)
        if config.kind == "embedding":
            return F.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)), dim=-1)
        return module(pooled)
