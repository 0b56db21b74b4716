"""Replaced-token detection (ELECTRA, Clark et al. 2020): a head that tells replaced tokens from original ones."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dualenc.models.heads.base import HEADLINES, Head, linear
from dualenc.models.text_encoder import ACTIVATIONS, TextConfig, TextEncoder
from dualenc.report import Description
from dualenc.tokens import Tokens


class ReplacedTokenHead(nn.Module):
    """Layers of `ReplacedToken`: a linear layer, an activation and a linear layer to one logit (ELECTRA, section 2).

    Args:
        config: architecture of the text encoder.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = linear(config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]()
        self.out = linear(config.width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (N,) of hidden states (N, D), above 0 for "replaced"."""
        return self.out(self.activation(self.dense(hidden))).squeeze(-1)


class ReplacedToken(Head):
    """Head for replaced-token detection, trained by binary cross entropy over all tokens.

    `ReplacedTokenTask` trains it together with a generator: a masked-language model whose guesses replace tokens.
    """

    pairs = "none"
    masking = (0.85, 0.0)  # The generator guesses all chosen tokens; ELECTRA masks 85% of them and keeps the others.
    labeled = False
    task = ""  # The Hugging Face Hub has no task for it, so `TextPredictor` does not offer this head.
    result_kind = "rtd"
    description = Description("tokens", "detection of replaced tokens", HEADLINES)
    trained_by = "ReplacedTokenTask"

    def build(self, text: TextConfig) -> nn.Module:
        """See `Head.build`."""
        return ReplacedTokenHead(text)

    def logits(
        self, module: nn.Module, encoder: TextEncoder, hidden: Tensor, tokens: Tokens, positions: Tensor | None
    ) -> Tensor:
        """Return logits (M,) of the tokens at `positions`, or of all, see `Head.logits`."""
        return module(hidden if positions is None else hidden[positions])

    def loss(self, logits: Tensor, labels: Tensor | None, group: Any = None) -> Tensor:
        """Return the sum of the binary cross entropy of N tokens, see `Head.loss`.

        Args:
            logits: (N,).
            labels: (N,), 1 for replaced tokens and 0 for original ones, of any dtype.
            group: not used.
        """
        assert labels is not None
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")

    def matches(self, other: Head, same_name: bool) -> bool:
        """See `Head.matches`; the name does not matter."""
        return other.config.kind == self.config.kind
