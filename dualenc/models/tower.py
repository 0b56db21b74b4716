"""What both towers have: layers that are counted, and can be frozen."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the model's own mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class Tower(nn.Module, ABC):
    """An encoder of a stem and blocks, whose lower part can be frozen."""

    _frozen = 0  # depths below this

    @property
    @abstractmethod
    def layers(self) -> int:
        """Number of blocks."""

    @abstractmethod
    def depths(self) -> dict[str, int]:
        """The depth of each parameter: 0 for the stem, i for block i from 1, `layers` + 1 for what is above them."""

    def freeze(self, below: int) -> None:
        """Freezes the parameters of a depth below this one; `layers` + 2 freezes all.

        They get no gradient, and what they belong to stays in eval mode whatever `train` says: no dropout in it, no
        drop path. Patch dropout comes after the stem but is for the blocks: it goes on while any is trained.
        """
        self._frozen = below
        depths = self.depths()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(depths[name] >= below)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of all but the frozen parts."""
        super().train(mode)
        for module in self.modules() if self._frozen else ():
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                for part in module.modules():
                    part.training = False
        return self
