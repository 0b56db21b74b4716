"""Weights of labels in a loss: those that a configuration names, or those that balance the training labels."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ClassWeights = tuple[float, ...] | Literal["balanced"] | None  # see `HeadConfig.class_weights`


def check_class_weights(weights: ClassWeights, labels: Sequence[str]) -> None:
    """Raise ValueError if weights do not fit the labels."""
    if weights is None:
        return
    if weights != "balanced" and (len(weights) != len(labels) or not all(0 < one < float("inf") for one in weights)):
        raise ValueError(
            f"class_weights {weights} must be a number above 0 for each of the {len(labels)} labels {', '.join(labels)}"
        )


def balanced_weights(train_labels: Tensor, labels: Sequence[str]) -> Tensor:
    """Return weights (C,) under which the labels of a training set matter equally.

    Args:
        train_labels: (M,) the label of each text, or (M, C) 1 for each label that a text has.
        labels: names of the C labels.

    Returns:
        For one label a text M / (C * texts with the label), after King and Zeng 2001, as scikit-learn does; for several
        the texts without the label / texts with it.

    Raises:
        ValueError: If no text has a label, or every text has it where texts have several.
    """
    several = train_labels.dim() == 2
    counts = train_labels.sum(0) if several else torch.bincount(train_labels, minlength=len(labels))
    counts, total = counts.double(), len(train_labels)
    for name, count in zip(labels, counts.tolist(), strict=True):
        if count == 0 or (several and count == total):
            raise ValueError(
                f"class_weights balanced: {'every' if count else 'no'} training text has the label {name}: name the "
                "weights, or remove the label"
            )
    weights = (total - counts) / counts if several else total / (len(labels) * counts)
    return weights.float()


def cross_entropy_sums(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Return the weighted sum of the cross entropy and the sum of the weights, whose quotient is the weighted mean.

    Args:
        logits: (n, C).
        labels: (n,) int64.
        weights: (C,); None for weights of 1.
    """
    if weights is None:
        return F.cross_entropy(logits, labels, reduction="sum"), len(labels)
    return F.cross_entropy(logits, labels, weights, reduction="sum"), weights[labels].sum()
