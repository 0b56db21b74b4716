"""The plan: which samples stand in which batch of an epoch. Pure arithmetic; it knows no files.

Shards are put in a random order and taken in windows of W; the samples of a window are shuffled together. So a batch
touches at most a few shards, and where the n-th sample of the epoch lies is a function of (seed, epoch, n) alone:
neither ranks nor workers have a part in it, and resuming in the middle is a multiplication.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class EpochPlan:
    """Order of one epoch.

    Args:
        counts: samples in each shard; sample numbers count through the shards in this order.
        seed: of the whole run.
        epoch: number of the epoch.
        batch: global batch size G, over all ranks.
        window: number of shards shuffled together.

    Raises:
        ValueError: the batch is larger than the data.
    """

    def __init__(self, counts: Sequence[int], seed: int, epoch: int, batch: int, window: int = 64) -> None:
        total = int(sum(counts))
        if batch < 1 or window < 1:
            raise ValueError(f"batch size {batch} and window {window} must be at least 1")
        if batch > total:
            raise ValueError(f"batch size {batch} is larger than the data, which has {total} samples")
        self.seed, self.epoch, self.batch = seed, epoch, batch
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        order = permutation(len(counts), seed, epoch, 0)
        self._windows = [
            (starts[part], np.asarray(counts, dtype=np.int64)[part])
            for part in np.split(order, range(window, len(order), window))
        ]
        self._bounds = np.cumsum([0, *(int(sizes.sum()) for _, sizes in self._windows)])  # (windows+1,)
        self._window = lru_cache(maxsize=3)(self._shuffled)  # a batch rarely spans more

    def __len__(self) -> int:
        """Batches of the epoch; the samples past the last full one are left out of it."""
        return int(self._bounds[-1]) // self.batch

    def __getitem__(self, k: int) -> np.ndarray:
        """Sample numbers (G,) of global batch k."""
        if not 0 <= k < len(self):
            raise IndexError(k)
        start, stop = k * self.batch, (k + 1) * self.batch
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        parts = []
        while start < stop:
            left, right = int(self._bounds[first]), int(self._bounds[first + 1])
            parts.append(self._window(first)[start - left : stop - left])
            start, first = max(start, min(stop, right)), first + 1
        return np.concatenate(parts)

    def _shuffled(self, number: int) -> np.ndarray:
        starts, sizes = self._windows[number]
        samples = np.repeat(starts - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes) + np.arange(sizes.sum())
        return samples[permutation(len(samples), self.seed, self.epoch, number + 1)]


def permutation(n: int, *key: int) -> np.ndarray:
    """A random order of 0 .. n-1 that depends on the key alone, in every version of numpy.

    Sorts the raw output of the counter-based generator Philox (Salmon et al. 2011), a stream that numpy keeps.
    """
    return np.argsort(stream(*key).random_raw(n), kind="stable")


def stream(*key: int) -> np.random.Philox:
    """The counter-based generator of a key of non-negative integers."""
    return np.random.Philox(np.random.SeedSequence(key))


def draw(*key: int) -> int:
    """A 63-bit number that depends on the key alone: the seed of a sample's own generator."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
