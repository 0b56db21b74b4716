"""Packed attention by the kernel of FlashAttention, without a device: the choice of the kernel, and split calls."""

import pytest
import torch
import torch._dynamo
import torch.nn.attention.varlen as varlen
from torch import Tensor
from torch.nn.attention import SDPBackend

import dualenc.models.attention as attention
from dualenc.models.attention import flash_attention, grouped_attention

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION.value, getattr(varlen, "_CUDNN_ATTENTION_BACKEND", None)


def pack(lengths, dtype=torch.float64):
    """Draw queries, keys and values (N, H, Dh) and the offsets of texts of these lengths."""
    qkv = [torch.randn(sum(lengths), 2, 8, dtype=dtype).requires_grad_() for _ in range(3)]
    return *qkv, torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("number", [1, 6, 7, 8, 12, 13, 20])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": 2}])
def test_texts_are_split_over_calls(monkeypatch, number, mask):
    """Values and gradients are those of one call, and no call has more texts than the kernel takes."""
    q, k, v, offsets = pack(torch.randint(1, 6, (number,)).tolist())
    calls = []

    def kernel(q, k, v, offsets, same, max_len, max_len_of_keys, window_size):
        assert offsets is same
        assert int(offsets[0]) == 0
        assert int(offsets[-1]) == len(q) == len(k) == len(v)
        calls.append(len(offsets) - 1)
        left, right = window_size
        return grouped_attention(q, k, v, offsets, right == 0, None if left < 0 else left)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "FLASH_TEXTS", 6)
    got = flash_attention(q, k, v, offsets, 5, **mask)
    want = grouped_attention(q, k, v, offsets, mask.get("causal", False), mask.get("window"))
    weight = torch.randn_like(want)
    torch.testing.assert_close(got, want)
    for x, y in zip(*(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, want)), strict=True):
        torch.testing.assert_close(x, y)
    assert sum(calls) == number
    assert max(calls) <= 6
    assert len(calls) == -(-number // 6)


@pytest.mark.skipif(CUDNN is None, reason="this torch has one kernel for varlen attention")
def test_flash_is_chosen_where_torch_takes_another_kernel(monkeypatch):
    """On Hopper torch takes cuDNN; the compiled graph is one, and has flash in it."""
    monkeypatch.setattr(varlen, "_cudnn_rejection_reasons", lambda *args, **kwargs: [])
    q, k, v, offsets = pack([3, 3, 5], torch.bfloat16)
    sides = {"window_size": (-1, -1)}

    def chosen(function) -> list[int]:
        """Return the kernels of the graph of a function."""
        found = []

        def backend(graph, inputs):
            nodes = [node for node in graph.graph.nodes if node.target is torch.ops.torch_attn._varlen_attn]
            found.extend(node.args[-1] for node in nodes)
            return lambda *args: (torch.zeros_like(q),)

        torch._dynamo.reset()
        torch.compile(function, fullgraph=True, dynamic=True, backend=backend)(q, k, v, offsets)
        return found

    def plain(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor):
        return varlen.varlen_attn(q, k, v, offsets, offsets, 5, 5, **sides)

    assert chosen(plain) == [CUDNN]  # control
    assert chosen(lambda *args: flash_attention(*args, 5)) == [FLASH]
    torch._dynamo.reset()
