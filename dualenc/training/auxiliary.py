"""Auxiliary losses, which the contrastive task adds to its own loss."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualenc.data import Pairs
from dualenc.data.text.masking import Masked
from dualenc.models import DualEncoder, HeadConfig, TextConfig, map_micro_batches
from dualenc.models.heads import make_head
from dualenc.tokens import Tokens
from dualenc.training.ranks import mean_over_ranks


class AuxiliaryLoss(ABC):
    """A loss that the contrastive task adds to its own.

    The task registers `module` under `name`: its parameters are trained and are in checkpoints as `NAME.*`, but not in
    model directories. The loss of a step is logged as `train/NAME_loss`.

    Args:
        module: layers of the loss.
        weight: factor of the loss.

    Attributes:
        name: name of the loss.
        option: option of the command line that sets the weight, for errors.
        masked: share of the tokens that the data must mask; 0 for none.
        latest: loss of the last step; None before the first.
    """

    name: ClassVar[str]
    option: ClassVar[str]
    masked: ClassVar[float] = 0.0

    def __init__(self, module: nn.Module, weight: float) -> None:
        self.module, self.weight = module, weight
        self.latest: Tensor | None = None

    def check_data(self, data: Any) -> None:
        """Check the data module.

        Raises:
            ValueError: If it does not mask tokens where the loss needs them.
        """
        if self.masked and not getattr(data, "mask", 0):
            raise ValueError(f"{self.option} needs data that mask tokens: pass mask={self.masked} to PairData")

    @abstractmethod
    def compute(self, model: DualEncoder, pieces: Sequence[Pairs], world: int) -> Tensor:
        """Return the loss of a batch, the mean over all ranks.

        Args:
            model: model that is trained.
            pieces: the micro-batches of this rank.
            world: number of ranks.
        """


class MaskedLanguageLoss(AuxiliaryLoss):
    """Cross entropy of masked tokens (BERT, Devlin et al. 2019), with the text tower and a head.

    Args:
        text: architecture of the text tower.
        weight: factor of the loss.
    """

    name = "mlm"
    option = "model.mlm_weight"
    masked = 0.15

    def __init__(self, text: TextConfig, weight: float) -> None:
        self.head = make_head(HeadConfig("mlm"))
        super().__init__(self.head.build(text), weight)

    def compute(self, model: DualEncoder, pieces: Sequence[Pairs], world: int) -> Tensor:
        """Return the mean over the masked tokens of all ranks, see `AuxiliaryLoss.compute`."""

        def summed_loss(tokens: Tokens, masked: Masked) -> Tensor:
            """Return the sum of the loss over the masked tokens of a micro-batch."""
            hidden = model.text(tokens._replace(ids=masked.ids))
            logits = self.head.logits(self.module, model.text, hidden, tokens, masked.masked_positions)
            return self.head.loss(logits, masked.labels)

        masked = [(piece.tokens, piece.masked) for piece in pieces if piece.masked is not None]
        number = sum(len(one.masked_positions) for _, one in masked)
        mean = mean_over_ranks(torch.stack(map_micro_batches(summed_loss, masked)).sum(), [number], world)
        self.latest = mean.detach()
        return mean


def auxiliary_losses(text: TextConfig, text_locked: bool, mlm_weight: float) -> list[AuxiliaryLoss]:
    """Return the auxiliary losses that a run asks for.

    Args:
        text: architecture of the text tower.
        text_locked: True if the text tower is not trained.
        mlm_weight: weight of `MaskedLanguageLoss`; 0 for none.

    Raises:
        ValueError: If a weight is negative, or the loss would train a tower that is locked.
    """
    if mlm_weight < 0 or (mlm_weight and text_locked):
        raise ValueError(
            f"{MaskedLanguageLoss.option} {mlm_weight} must not be negative, and must be 0 if "
            "model.text_tuning.locked is true"
        )
    return [MaskedLanguageLoss(text, mlm_weight)] if mlm_weight else []
