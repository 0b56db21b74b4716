"""The base of heads that judge tokens one by one, by layers on the hidden state of each."""

from collections.abc import Collection
from typing import ClassVar

from torch import Tensor, nn

from dualenc.models.heads.base import Head
from dualenc.models.heads.classification import ClassificationHead
from dualenc.models.text_encoder import TextConfig, TextEncoder
from dualenc.tokens import Tokens


class TokenHead(Head):
    """Judgments of tokens by one linear layer; with `HeadConfig.norm` after a hidden layer, as in ModernBERT."""

    needs_training_data = False
    own_settings: ClassVar[Collection[str]]  # those of the kind, see `settings`

    def settings(self) -> Collection[str]:
        """See `Head.settings`."""
        return "activation", "norm", *self.own_settings

    def check(self) -> None:
        """See `Head.check`."""
        super().check()
        if self.config.norm and self.config.activation is None:
            raise ValueError(f"a head of kind {self.config.kind} with norm has a hidden layer: name its activation")

    def layers(self, text: TextConfig, outputs: int) -> nn.Module:
        """Return the layers of `build` with some number of logits a token."""
        activation = self.config.activation if self.config.norm else None
        return ClassificationHead(text, outputs, activation, self.config.norm)

    def logits(
        self, module: nn.Module, encoder: TextEncoder, hidden: Tensor, tokens: Tokens, positions: Tensor | None
    ) -> Tensor:
        """Return logits (t, C) of the tokens at `positions`, or of all, see `Head.logits`."""
        return module(hidden if positions is None else hidden[positions])

    def matches(self, other: Head, same_name: bool) -> bool:
        """See `Head.matches`: the layers have the same form, and their logits mean the same labels."""
        mine, theirs = self.config, other.config
        layers = [(one.kind, one.norm, one.activation if one.norm else None, one.labels) for one in (mine, theirs)]
        return layers[0] == layers[1] and (same_name or not mine.labels)
