"""Heads compared with those of transformers, every parameter random."""

import pytest
import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLMPredictionHead

from dualenc.models import MaskedLanguageHead, TextConfig

NAMES = {
    "dense.weight": "transform.dense.weight",
    "dense.bias": "transform.dense.bias",
    "norm.weight": "transform.LayerNorm.weight",
    "norm.bias": "transform.LayerNorm.bias",
    "bias": "bias",
}


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_masked_language_head_equals_bert(activation):
    config = TextConfig(50, width=16, layers=1, heads=2, activation=activation, norm_eps=1e-6)
    head = MaskedLanguageHead(config).double()
    peer = BertLMPredictionHead(
        BertConfig(vocab_size=50, hidden_size=16, hidden_act=activation, layer_norm_eps=1e-6)
    ).double()
    words, hidden = torch.randn(50, 16, dtype=torch.float64), torch.randn(9, 16, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
        state = {NAMES[name]: parameter for name, parameter in head.named_parameters()}
        peer.load_state_dict({**state, "decoder.weight": words, "decoder.bias": head.bias}, strict=False)
        torch.testing.assert_close(head(hidden, words), peer(hidden), rtol=1e-10, atol=1e-10)
        for name, parameter in head.named_parameters():  # control: each of them counts
            before = parameter.clone()
            parameter.add_(0.1 * torch.randn_like(parameter))
            assert not torch.allclose(head(hidden, words), peer(hidden), rtol=1e-4, atol=1e-4), name
            parameter.copy_(before)
