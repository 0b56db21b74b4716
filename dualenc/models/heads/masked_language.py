"""Masked language modeling: a head that guesses masked tokens."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualenc.data.loading.epoch_plan import permutation
from dualenc.data.text.dataset import Part, Texts
from dualenc.metrics.text import pseudo_perplexity, unigram_perplexity
from dualenc.models.heads.base import HEADLINES, Examples, Head, HeldOut, Measured, linear
from dualenc.models.text_encoder import ACTIVATIONS, TextConfig, TextEncoder, layer_norm
from dualenc.report import Description
from dualenc.tokens import Tokens


class MaskedLanguageHead(nn.Module):
    """Layers that guess masked tokens (BERT, Devlin et al. 2019, section 3.1): linear, LayerNorm, token embeddings.

    Args:
        config: architecture of the text encoder.
        tied: the token embeddings are the last layer.
    """

    def __init__(self, config: TextConfig, tied: bool = True) -> None:
        super().__init__()
        width = config.embed_width or config.width
        self.dense = linear(config.width, width, config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.norm = layer_norm(config, width)
        self.output_embeddings = None if tied else nn.Parameter(torch.randn(config.vocab_size, width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, token_embeddings: Tensor) -> Tensor:
        """Return logits (M, V) of hidden states (M, D), by the weight (V, width) of the token embeddings."""
        weight = token_embeddings if self.output_embeddings is None else self.output_embeddings
        return F.linear(self.norm(self.activation(self.dense(hidden))), weight, self.bias)


class MaskedLanguage(Head):
    """Masked language modeling: cross entropy of the masked tokens, perplexity."""

    pairs = "none"
    masking = (0.8, 0.1)  # The rest is unchanged (Devlin et al. 2019, section 3.1).
    labeled = False
    task = "fill-mask"
    result_kind = "mlm"
    description = Description("tokens", "prediction of masked tokens", HEADLINES)

    def build(self, text: TextConfig) -> nn.Module:
        """See `Head.build`."""
        return MaskedLanguageHead(text, self.config.tied)

    def logits(
        self, module: nn.Module, encoder: TextEncoder, hidden: Tensor, tokens: Tokens, positions: Tensor | None
    ) -> Tensor:
        """Return logits (M, V) of the masked tokens, see `Head.logits`."""
        hidden = hidden if positions is None else hidden[positions]
        return module(hidden, encoder.embeddings.token_embeddings.weight)

    def examples(self, logits: Tensor, batch: Texts, part: Part) -> Examples:
        """See `Head.examples`."""
        assert batch.masked is not None
        return Examples(logits, batch.masked.labels, len(batch.masked.masked_positions))

    def loss(self, logits: Tensor, labels: Tensor | None, group: Any = None) -> Tensor:
        """Return the sum of the cross entropy of M tokens, see `Head.loss`."""
        assert labels is not None
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    def observe(self, examples: Examples) -> tuple[float, int, int]:
        """Return the sums of losses and of right guesses, and the number of tokens."""
        logits, labels = examples.logits, examples.labels
        assert labels is not None
        return self.loss(logits, labels).item(), int((logits.float().argmax(-1) == labels).sum()), examples.number

    def metrics(self, states: Sequence[tuple[float, int, int]], held_out: HeldOut) -> Measured:
        """Compute loss, perplexity and accuracy; in `test` also pseudo-perplexity and unigrams, see `Head.metrics`."""
        loss, right, number = (sum(column) for column in zip(*states))
        loss, right = (loss / number, right / number) if number else (math.nan, math.nan)
        metrics = {"loss": loss, "perplexity": math.exp(loss), "accuracy": right}
        if held_out.stage != "test":
            return Measured(metrics, {}, {}, int(number))
        metrics["pseudo_perplexity"], unigrams = pseudo_perplexity_with_baseline(held_out)
        chance = {"pseudo_perplexity": unigrams}
        return Measured(metrics, {}, chance, int(number), "a unigram model of the training texts")

    def metric_names(self) -> Sequence[str]:
        """See `Head.metric_names`."""
        return ("loss", "perplexity", "accuracy")

    def matches(self, other: Head, same_name: bool) -> bool:
        """See `Head.matches`; the name does not matter."""
        return other.config.kind == self.config.kind

    def copy_weights(self, module: nn.Module, source: nn.Module, encoder: TextEncoder) -> None:
        """See `Head.copy_weights`; output embeddings and token embeddings stand for each other."""
        state = source.state_dict()
        if self.config.tied:
            state.pop("output_embeddings", None)
        else:
            state.setdefault("output_embeddings", encoder.embeddings.token_embeddings.weight)
        module.load_state_dict(state)


def pseudo_perplexity_with_baseline(held_out: HeldOut) -> tuple[float, float]:
    """Compute the pseudo-perplexity of some held-out texts, and the perplexity of unigrams of the training texts."""
    tokenizer = held_out.tokenizer
    special = list(tokenizer.special.values())
    train, measured = (tokenizer.encode(list(held_out.texts(part))) for part in ("train", "held_out"))
    chosen: list[list[int]] = []
    for number in permutation(len(measured), held_out.seed).tolist():
        if sum(map(len, chosen)) < held_out.scored_tokens:
            chosen.append(measured[number])
    assert tokenizer.mask_id is not None
    return (
        pseudo_perplexity(held_out.logits, chosen, tokenizer.mask_id, special),
        unigram_perplexity(train, chosen, tokenizer.vocab_size, special),
    )
