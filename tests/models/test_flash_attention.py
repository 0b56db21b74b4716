"""Packed attention by the kernel of FlashAttention, without a device: the choice of the kernel, and split calls."""

import pytest
import torch
import torch._dynamo

import dualenc.models.attention as attention
from dualenc.models.attention import flash_attention, grouped_attention


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

    def kernel(q, k, v, offsets, max_len, causal, window):
        assert int(offsets[0]) == 0
        assert int(offsets[-1]) == len(q) == len(k) == len(v)
        calls.append(len(offsets) - 1)
        left, right = window
        assert right == (0 if causal else left)
        return grouped_attention(q, k, v, offsets, causal, None if left < 0 else left)

    monkeypatch.setattr(attention, "_flash_kernel", kernel)
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


def test_the_compiled_graph_has_flash_attention():
    """torch would take cuDNN on Hopper; the graph is one, has FlashAttention in it, and serves texts of all lengths."""
    q, k, v, offsets = pack([3, 3, 5], torch.bfloat16)
    found = []

    def backend(graph, inputs):
        found.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return lambda *args: (torch.zeros_like(q),)

    torch._dynamo.reset()
    torch.compile(flash_attention, fullgraph=True, dynamic=True, backend=backend)(q, k, v, offsets, 5)
    assert found.count(torch.ops.aten._flash_attention_forward) == 1
    torch._dynamo.reset()
