"""Parameter groups and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups for an optimizer: with its weight decay, and without.

    Without decay are vectors and scalars (biases, norms, temperature), embeddings of words and positions, and what a
    submodule names in `no_weight_decay()`, as timm's models do.
    """
    spared = set()
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        if isinstance(module, nn.Embedding):
            spared.add(f"{start}weight")
        if callable(named := getattr(module, "no_weight_decay", None)):
            spared.update(f"{start}{name}" for name in cast(Iterable[str], named()))
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or name in spared else decay).append(parameter)
    return [{"params": decay}, {"params": plain, "weight_decay": 0.0}]


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine (Loshchilov and Hutter 2017) down to `final` times the learning rate.

    Args:
        optimizer: whose learning rates are the peaks.
        total_steps: of the whole run.
        warmup: share of the steps, if below 1; else their number.
        final: factor at the last step.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05, final: float = 0.0, last_epoch: int = -1
    ) -> None:
        if warmup < 0 or total_steps < 1:
            raise ValueError(f"warmup {warmup} must not be negative, total_steps {total_steps} must be at least 1")
        rising = max(1, round(warmup * total_steps if warmup < 1 else warmup))

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            done = min(1.0, (step - rising) / max(1, total_steps - rising))
            return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

        super().__init__(optimizer, factor, last_epoch)
