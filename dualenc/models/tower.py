"""The base class of both towers: a depth for each parameter, and frozen layers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import nn


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
