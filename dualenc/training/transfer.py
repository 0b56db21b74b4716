"""Copies of batches to a GPU next to the computation."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def copy_beside(copy: Callable[[], T], device: torch.device) -> T:
    """Copy a batch to a device on a stream of its own, so that a GPU copies it while it computes the step before.

    The host asks for a batch when it has given the GPU the whole step before, so no batch is read ahead of its turn.

    Args:
        copy: function that copies the batch and does not wait; on a GPU from pinned memory.
        device: device of the copies.

    Returns:
        The batch, as nested tuples, lists and dicts of tensors, ready for the device's current stream.
    """
    if device.type != "cuda":
        return copy()
    beside, current = _stream_beside(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        batch = copy()
    current.wait_stream(beside)
    for part in tree_leaves(batch):
        if isinstance(part, Tensor) and part.device.type == "cuda":
            part.record_stream(current)  # Otherwise the next copy may take its memory before the step has read it.
    return batch


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
