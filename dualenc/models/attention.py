"""Attention over packed texts: each token attends to the tokens of its own text only, and nothing else is computed.

There are three implementations, chosen by the device and dtype of the tensors:

- CPU: texts of equal length (neighbors, since `Tokens` sorts them) share one SDPA call. This is a custom op, because
  the loop over groups depends on the data: torch.compile sees one node and never a graph break.
- CUDA, fp16 or bf16: torch's kernel of FlashAttention for packed texts, which has its own backward and meta kernel.
- All others (CUDA fp32, older GPUs, odd head sizes): padding to the longest text, inside the attention only.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dualenc.tokens import padding_index

FLASH_TEXTS = (1 << 16) - 1  # texts that a call of the kernel can take: it counts them in a dimension of CUDA's grid


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_len: int, *, causal: bool = False, window: int | None = None
) -> Tensor:
    """Compute softmax attention inside each text of a packed batch (Vaswani et al. 2017, section 3.2.1).

    Args:
        q: (N, H, Dh) queries of the N tokens of B texts.
        k: (N, H, Dh) keys.
        v: (N, H, Dh) values.
        offsets: (B+1,) int32; text r has the tokens offsets[r] to offsets[r+1].
        max_len: length of the longest text.
        causal: a token attends only to itself and to tokens before it.
        window: largest distance in positions to a token that is attended to; absent, all tokens are.

    Returns:
        (N, H, Dh) outputs.
    """
    if window is not None and window >= max_len - 1:
        window = None
    if q.device.type == "cpu":
        return grouped_attention(q, k, v, offsets, causal, window)
    if _flash_supports(q):
        return flash_attention(q, k, v, offsets, max_len, causal, window)
    return padded_attention(q, k, v, offsets, max_len, causal, window)


def _flash_supports(q: Tensor) -> bool:
    """Check what the kernel of FlashAttention needs: Ampere or newer, half precision, head sizes of 8 to 256."""
    size = q.shape[-1]
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_len: int, causal: bool = False, window: int | None = None
) -> Tensor:
    """Compute `ragged_attention` by the kernel of FlashAttention for packed texts (Dao 2023)."""
    if len(offsets) - 1 > FLASH_TEXTS:
        # The host waits for the device here. A batch of this size takes the device much longer.
        bounds = [*offsets[:-1:FLASH_TEXTS].tolist(), len(q)]
        sizes = [end - start for start, end in pairwise(bounds)]
        starts = range(0, len(offsets) - 1, FLASH_TEXTS)
        owns = [offsets[start : start + FLASH_TEXTS + 1] - offsets[start] for start in starts]
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), owns, strict=True)
        return torch.cat([flash_attention(*part, max_len, causal, window) for part in parts])
    left = -1 if window is None else window
    return _flash_kernel(q, k, v, offsets, max_len, causal, (left, 0 if causal else left))


def _flash_kernel(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_len: int, causal: bool, window: tuple[int, int]
) -> Tensor:
    """Call the kernel, with the largest distances to the left and to the right; -1 sets none.

    `torch.nn.attention.varlen` would take cuDNN on Hopper and Blackwell, which makes a new plan for every number of
    texts and tokens. Its custom op costs the host 0.1 ms a call, forward and backward each, and this call 0.01 ms.
    """
    out, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        offsets,
        offsets,
        max_len,
        max_len,
        dropout_p=0.0,
        is_causal=causal,
        return_debug_mask=False,
        window_size_left=window[0],
        window_size_right=window[1],
    )
    return out


def _attention_mask(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Return the mask (T, T) of the keys that each query of a text attends to; None for all."""
    if not causal and (window is None or window >= length - 1):
        return None
    position = torch.arange(length, device=device)
    distance = position - position[:, None]  # from the query to the key
    mask = torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() <= window
    return mask & (distance <= 0) if causal else mask


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_len: int, causal: bool = False, window: int | None = None
) -> Tensor:
    """Compute `ragged_attention` by padding to (B, H, T, Dh) around one SDPA call."""
    index, mask = padding_index(offsets, max_len)  # (B, T)
    padded = (x[index].transpose(1, 2) for x in (q, k, v))
    mask = mask[:, None, None, :]
    if (allowed := _attention_mask(max_len, causal, window, q.device)) is not None:
        # Padding attends to itself, since a row of the mask without any key gives NaN, in the gradient too.
        mask = mask & allowed | torch.eye(max_len, dtype=torch.bool, device=q.device)
    out = F.scaled_dot_product_attention(*padded, attn_mask=mask)
    # Pack by arithmetic on the offsets: indexing with a boolean mask would wait for the device to count its entries.
    token = torch.arange(len(q), device=q.device)
    row = torch.searchsorted(offsets[1:].long(), token, right=True)
    return out.transpose(1, 2)[row, token - offsets[row]]


def _groups(offsets: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Yield the groups of neighboring texts of equal length, as (slice of tokens, number of texts, length)."""
    bounds = offsets.tolist()
    start, rows = bounds[0], 0
    for left, right, after in zip(bounds, bounds[1:], [*bounds[2:], None], strict=False):
        rows, length = rows + 1, right - left
        if after is None or after - right != length:
            yield slice(start, right), rows, length
            start, rows = right, 0


@torch.library.custom_op("dualenc::grouped_attention", mutates_args=())
def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool = False, window: int | None = None
) -> Tensor:
    """Compute `ragged_attention` by one SDPA call for each group of texts of equal length."""
    out = torch.empty(q.shape, dtype=q.dtype)  # (N, H, Dh)
    for tokens, rows, length in _groups(offsets):
        queries, keys, values = (_group_view(x, tokens, rows, length) for x in (q, k, v))
        mask = _attention_mask(length, causal, window, q.device)
        part = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        _group_view(out, tokens, rows, length).copy_(part)
    return out


@torch.library.custom_op("dualenc::grouped_attention_backward", mutates_args=())
def grouped_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, causal: bool = False, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `grouped_attention`, recomputing the probabilities (Dao et al. 2022, appendix B)."""
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    dtype = torch.promote_types(q.dtype, torch.float32)  # Half-precision sums would lose digits that the forward kept.
    for tokens, rows, length in _groups(offsets):
        g, queries, keys, values = (_group_view(x, tokens, rows, length).to(dtype) for x in (grad, q, k, v))
        scores = queries @ keys.mT * scale  # (rows, H, T, T)
        if (mask := _attention_mask(length, causal, window, q.device)) is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        p = torch.softmax(scores, dim=-1)
        dp = g @ values.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        for out, x in zip(grads, (ds @ keys, ds.mT @ queries, p.mT @ g), strict=True):
            _group_view(out, tokens, rows, length).copy_(x)
    return grads[0], grads[1], grads[2]


def _group_view(x: Tensor, tokens: slice, rows: int, length: int) -> Tensor:
    """Return a view of the packed texts of a group (rows * length, H, Dh) as (rows, H, length, Dh)."""
    return x[tokens].unflatten(0, (rows, length)).transpose(1, 2)


@grouped_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


@grouped_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.causal, ctx.window = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.dualenc.grouped_attention_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.window)
    return (*grads, None, None, None)


grouped_attention.register_autograd(_backward, setup_context=_setup)


def _product_flops(q: Tensor, offsets: Tensor) -> int:
    """Count the FLOPs of one (T, Dh) x (Dh, T) product for every head of every text."""
    return sum(2 * rows * length**2 for _, rows, length in _groups(offsets)) * q.shape[1] * q.shape[2]


@register_flop_formula(torch.ops.dualenc.grouped_attention, get_raw=True)
def _(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _product_flops(q, offsets)


@register_flop_formula(torch.ops.dualenc.grouped_attention_backward, get_raw=True)
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *args: Any, **kwargs: Any) -> int:
    return 5 * _product_flops(q, offsets)
