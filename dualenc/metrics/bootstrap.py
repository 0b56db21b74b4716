"""Metrics as functions of the units' weights, from which values, intervals and paired differences are computed.

A unit is what was drawn when the data was collected, such as an image with its captions. With weights of one a
statistic is the metric. With the counts of a sample drawn with replacement it is a bootstrap replicate (Efron and
Tibshirani 1993, chapter 13). The same counts for two models give a paired difference.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Statistic = Callable[[Tensor], Tensor]  # weights (R, N) float64 of N units -> (R,)
_CELLS = 1 << 19  # weights held at a time, 4 MiB in float64


class BootstrapMetrics(NamedTuple):
    """The metrics of an evaluation, each a function of its units' weights.

    Attributes:
        statistics: the metrics by name.
        units: N, the number of units.
        strata: (N,) int64 stratum of each unit, such as a class; every sample keeps the sizes of the strata.
    """

    statistics: Mapping[str, Statistic]
    units: int
    strata: Tensor | None = None

    def values(self) -> dict[str, float]:
        """Compute each metric on the data itself, where each unit has weight one."""
        ones = torch.ones(1, self.units, dtype=torch.float64)
        return {name: statistic(ones).item() for name, statistic in self.statistics.items()}

    def intervals(
        self, *, level: float = 0.95, replicates: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Compute the percentile bootstrap interval of each metric.

        Args:
            level: coverage of the interval, such as 0.95.
            replicates: number of bootstrap samples; 0 for no intervals.
            seed: seed of the samples; the same units and seed give the same samples.
        """
        if not replicates:
            return {}
        found: dict[str, list[Tensor]] = {name: [] for name in self.statistics}
        for weights in self._draw(replicates, seed):
            for name, statistic in self.statistics.items():
                found[name].append(statistic(weights))
        return {name: _bounds(torch.cat(parts), level) for name, parts in found.items()}

    def differences(
        self, other: "BootstrapMetrics", *, level: float = 0.95, replicates: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float, float]]:
        """Compute the paired difference of each metric that both have: the other's minus this one's.

        Args:
            other: metrics of the same units.
            level: see `intervals`.
            replicates: see `intervals`.
            seed: see `intervals`.

        Returns:
            Difference, and lower and upper bound of its interval.

        Raises:
            ValueError: If the units are not the same.
        """
        same = (self.strata is None) == (other.strata is None) and (
            self.strata is None or other.strata is None or torch.equal(self.strata, other.strata)
        )
        if self.units != other.units or not same:
            raise ValueError(
                f"paired differences need the same units and strata, found {self.units} and {other.units} units: "
                "evaluate both models on the same set"
            )
        names = [name for name in self.statistics if name in other.statistics]
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for weights in self._draw(replicates, seed):
            for name in names:
                found[name].append(other.statistics[name](weights) - self.statistics[name](weights))
        own, others = self.values(), other.values()
        return {name: (others[name] - own[name], *_bounds(torch.cat(found[name]), level)) for name in names}

    def _draw(self, replicates: int, seed: int) -> Iterator[Tensor]:
        """Draw bootstrap samples; yield weights (r, N), the counts of the units in r samples of N units."""
        generator = torch.Generator().manual_seed(seed)
        groups = [torch.arange(self.units)]
        if self.strata is not None:
            order = torch.argsort(self.strata, stable=True)
            sizes = torch.bincount(self.strata)
            groups = list(order.split(sizes[sizes > 0].tolist()))
        at_once = max(1, _CELLS // max(1, self.units))
        for start in range(0, replicates, at_once):
            rows = min(at_once, replicates - start)
            weights = torch.zeros(rows, self.units, dtype=torch.float64)
            for members in groups:
                drawn = members[torch.randint(len(members), (rows, len(members)), generator=generator)]
                weights.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(drawn.shape))
            yield weights


def mean(values: Tensor, unit: Tensor | None = None) -> Statistic:
    """Return the weighted mean of values, each with the weight of its unit.

    Args:
        values: (M,) numbers or booleans.
        unit: (M,) number of the unit that each value belongs to; absent, the values are the units.
    """
    values = values.double().cpu()
    if unit is None:
        return lambda weights: weights @ values / weights.sum(1)
    unit = unit.cpu()

    def statistic(weights: Tensor) -> Tensor:
        sums = torch.zeros(weights.shape[1], dtype=torch.float64).index_add_(0, unit, values)
        sizes = torch.bincount(unit, minlength=weights.shape[1]).double()
        return (weights @ sums) / (weights @ sizes)

    return statistic


def _bounds(replicates: Tensor, level: float) -> tuple[float, float]:
    """Return the quantiles of the replicates (R,) between which the share `level` of them lies."""
    tail = (1 - level) / 2
    low, high = replicates.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
