"""Percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13)."""

import torch
from torch import Tensor


def bootstrap_mean(
    values: Tensor, group: Tensor | None = None, *, level: float = 0.95, replicates: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean of `values`, whole groups drawn with replacement.

    Args:
        values: (N,).
        group: (N,) number of the group that each value belongs to (the captions of one image stand or fall together);
            absent, each value is its own.
        level: coverage.
        replicates: bootstrap samples.
        seed: of the draw; the same values give the same interval.

    Returns:
        Lower and upper bound.
    """
    values = values.double().cpu()
    group = torch.arange(len(values)) if group is None else group.cpu()
    groups = int(group.max()) + 1
    sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, values)
    sizes = torch.bincount(group, minlength=groups).double()
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(replicates, dtype=torch.float64)
    for r in range(replicates):
        drawn = torch.bincount(torch.randint(groups, (groups,), generator=generator), minlength=groups).double()
        means[r] = (drawn @ sums) / (drawn @ sizes)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
