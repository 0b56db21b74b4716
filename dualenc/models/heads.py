"""Heads: from hidden states to logits. None owns an encoder; what one ties to, its caller hands it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualenc.models.text import ACTIVATIONS, TextConfig


class MaskedLanguageHead(nn.Module):
    """Which word stands at a place (BERT, Devlin et al. 2019, section 3.1): a layer, a norm, the word embedding.

    Args:
        config: of the text encoder.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]()
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.trunc_normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """Logits (M, V) of hidden states (M, D), by the weight (V, D) of the word embedding."""
        return F.linear(self.norm(self.activation(self.dense(hidden))), words, self.bias)
