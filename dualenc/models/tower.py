"""The base class of both towers: a depth for each parameter, frozen layers, and compiled blocks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Self

import torch
from timm.layers import DropPath
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode without gradients, and restore its mode at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class Tower(nn.Module, ABC):
    """An encoder of a stem and blocks, whose lower part can be frozen."""

    _frozen_below = 0  # parameters of a smaller depth are frozen

    @property
    @abstractmethod
    def layers(self) -> int:
        """Number of blocks."""

    @abstractmethod
    def depths(self) -> dict[str, int]:
        """Return the depth of each parameter: 0 in the stem, i in block i from 1, `layers` + 1 above the blocks."""

    def freeze(self, below: int) -> None:
        """Freeze the parameters whose depth is less than `below`; `layers` + 2 freezes all.

        Frozen parameters get no gradient. Their modules stay in eval mode whatever `train` sets, without dropout and
        drop path. Patch dropout comes after the stem but belongs to the blocks: it stays active while any is trained.
        """
        self._frozen_below = below
        depths = self.depths()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(depths[name] >= below)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules except the frozen ones."""
        super().train(mode)
        for module in self.modules() if self._frozen_below else ():
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                for part in module.modules():
                    part.training = False
        return self


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks of all towers of a model by `torch.compile`, for training.

    Blocks of one tower share their compiled code, which serves all numbers of samples, tokens and positions. It is
    compiled by the first step. Names of parameters stay. Without gradients, as in evaluation, nothing is compiled.

    Args:
        model: model, changed in place.
        backend: see `torch.compile`.

    Raises:
        ValueError: If a tower has no blocks, as some models of timm.
    """
    for tower in model.modules():
        if not isinstance(tower, Tower):
            continue
        blocks = getattr(tower, "blocks", None)
        if blocks is None:
            raise ValueError("model.compile needs towers of plain blocks, which this one lacks: set it to false")
        for block in blocks:
            for part in block.modules():
                if isinstance(part, DropPath):
                    part.forward = MethodType(_drop_path, part)  # type: ignore[method-assign]
            # Not `block.compile()`, which would compile the hooks of FSDP2 with it.
            block.forward = _InTraining(block.forward, torch.compile(block.forward, dynamic=True, backend=backend))


class _InTraining:
    """A forward method that is compiled where gradients are computed."""

    def __init__(self, plain: Any, compiled: Any) -> None:
        self.plain, self.compiled = plain, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.plain)(*args, **kwargs)


def _drop_path(self: DropPath, x: Tensor) -> Tensor:
    """Drop samples as timm does, by code that does not depend on the rate, which each block has for itself."""
    if not self.training or not self.drop_prob:
        return x
    keep = 1 - self.drop_prob
    kept = (torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) < keep).to(x.dtype)
    return x * (kept / keep if self.scale_by_keep else kept)
