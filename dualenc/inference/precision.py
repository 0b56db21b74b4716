"""The precision in which models compute embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dualenc.models.tower import evaluating
from dualenc.utils.arguments import Precision


@contextmanager
def embedding(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Set a model to eval mode without gradients, and compute in a precision, until the end of the block.

    In bf16 the weights do not change. Matrix products read bf16 copies of weights and activations, and what needs
    more digits, such as unit vectors, is computed in fp32, as in training with `bf16-mixed`.

    Args:
        model: a model on one device.
        precision: "bf16", or "fp32" for the precision of the weights.
    """
    with evaluating(model):
        if precision == "fp32":
            yield
            return
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
            yield
