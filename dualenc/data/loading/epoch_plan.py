"""Plans of an epoch: which samples each batch holds. They are pure arithmetic and do not open files.

A source is a list of shards with a weight: the number of passes that an epoch makes over them. Each epoch continues
each source where the last epoch stopped, so that no sample is left out or repeated more often than another. The samples
that an epoch takes are cut at the ends of shards and of passes into chunks: ranges of consecutive samples of one shard.
The chunks of each pass are put in a random order, and those of all sources are spread evenly over the epoch. Then each
window of W chunks is shuffled sample by sample.

So a batch touches only a few shards. The n-th sample of an epoch is a function of (seed, epoch, n) alone: ranks and
workers do not affect it, and resuming in the middle of an epoch takes one multiplication.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

# These numbers in the keys of the generators keep their streams apart. 4 is used by `Masking`.
_SHARDS, _CHUNKS, _WINDOW, _ROUND_ROBIN = 1, 2, 3, 5


class EpochPlan:
    """Plan of one epoch: the sample numbers of each global batch.

    Memory and time grow with the number of shards and the size of one window, not with the number of samples.

    Args:
        counts: number of samples in each shard; sample numbers count through the shards in this order.
        seed: seed of the whole run.
        epoch: number of the epoch.
        batch: global batch size G, over all ranks.
        window: number of shards that are shuffled together.
        sources: (number of shards, weight) of each source, in the order of the shards; without it, one source of
            weight 1.

    Raises:
        ValueError: If the batch is larger than an epoch, or a weight is not positive.

    Example:
        >>> from dualenc import EpochPlan
        >>> plan = EpochPlan(counts=[5, 3, 4], seed=0, epoch=0, batch=4)
        >>> len(plan)
        3
        >>> sorted(int(number) for batch in plan for number in batch) == list(range(12))
        True
        >>> plan[2].shape  # a resumed run computes its next batch without the earlier ones
        (4,)
    """

    def __init__(
        self,
        counts: Sequence[int],
        seed: int,
        epoch: int,
        batch: int,
        window: int = 64,
        sources: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        if batch < 1 or window < 1:
            raise ValueError(f"batch size {batch} and window {window} must be at least 1")
        sizes = np.asarray(counts, dtype=np.int64)
        sources = [(len(sizes), 1.0)] if sources is None else sources
        if sum(number for number, _ in sources) != len(sizes):
            found = sum(number for number, _ in sources)
            raise ValueError(f"the sources have {found} shards together, expected {len(sizes)}")
        if wrong := [weight for _, weight in sources if not 0 < weight < 1e6]:
            raise ValueError(f"weight {wrong[0]} of a source must be positive and below 1e6")
        bounds = np.cumsum([0, *(number for number, _ in sources)])
        totals = [int(sizes[a:b].sum()) for a, b in pairwise(bounds)]
        wanted = [round(weight * total) for total, (_, weight) in zip(totals, sources)]
        if batch > sum(wanted):
            raise ValueError(f"batch size {batch} is larger than the data, which has {sum(wanted)} samples")
        self.seed, self.epoch, self.batch = seed, epoch, batch
        self._length = sum(wanted) // batch
        # The samples that do not fill a last batch are taken off all sources in proportion. Python's integers are used
        # because the products may be too large for int64.
        edges = [sum(wanted[:i]) * self._length * batch // sum(wanted) for i in range(len(wanted) + 1)]
        starts = np.cumsum([0, *sizes])
        chunks = []
        for i, (a, b) in enumerate(pairwise(bounds)):
            chunks.append(self._chunks(i, np.arange(a, b), starts, sizes, edges[i + 1] - edges[i]))
        time, shard, first, count = (np.concatenate(column) for column in zip(*chunks))
        order = np.lexsort((shard, time))
        self._shard, self._first, self._count = shard[order], first[order], count[order]
        self._windows = [slice(i, i + window) for i in range(0, len(order), window)]  # of chunks
        # (windows+1,) position in the epoch of the first sample of each window
        self._bounds = np.cumsum([0, *(int(self._count[chunks].sum()) for chunks in self._windows)])
        self._window = lru_cache(maxsize=3)(self._shuffled_window)  # a batch rarely spans more windows

    def __repr__(self) -> str:
        return f"EpochPlan(epoch {self.epoch}: {self._length:,} batches of {self.batch:,}, seed {self.seed})"

    def _chunks(
        self, source: int, shards: np.ndarray, starts: np.ndarray, sizes: np.ndarray, take: int
    ) -> tuple[np.ndarray, ...]:
        """Cut the `take` samples that this epoch takes from a source into chunks.

        Returns:
            Four arrays with one entry per chunk: its time in the epoch (0 to 1), shard, first sample and count.
        """
        shards = shards[permutation(len(shards), self.seed, _SHARDS, source)]  # the same order in every epoch
        ends = np.cumsum(sizes[shards])
        total = int(ends[-1]) if len(ends) else 0
        found = []
        left, passes, begin = take, 0, self.epoch * take % max(1, total)
        while left:
            # Each pass runs over the whole source, from the sample at which the epoch begins. The last may be shorter.
            stop = begin + min(left, total)
            ranges = []
            for base in (0, total):  # the pass may wrap around at the end of the source
                low = np.clip(begin - base, ends - sizes[shards], ends)
                high = np.clip(stop - base, ends - sizes[shards], ends)
                used = high > low
                ranges.append((shards[used], (starts[shards] + low - ends + sizes[shards])[used], (high - low)[used]))
            shard, first, count = (np.concatenate(column) for column in zip(*ranges))
            rank = np.argsort(permutation(len(shard), self.seed, _CHUNKS, self.epoch, source, passes))
            span = min(left, total) / take
            time = passes * total / take + span * (rank + 0.5) / len(shard)
            found.append((time, shard, first, count))
            left, passes = left - min(left, total), passes + 1
        empty = np.zeros(0, dtype=np.int64)
        return tuple(np.concatenate(column) for column in zip((empty.astype(float), empty, empty, empty), *found))

    def __len__(self) -> int:
        """Return the number of batches of the epoch."""
        return self._length

    def __getitem__(self, k: int) -> np.ndarray:
        """Return the sample numbers (G,) of global batch k."""
        if not 0 <= k < len(self):
            raise IndexError(k)
        start, stop = k * self.batch, (k + 1) * self.batch
        window = self.window_of(k)
        parts = []
        while start < stop:
            left, right = int(self._bounds[window]), int(self._bounds[window + 1])
            parts.append(self._window(window)[start - left : stop - left])
            start, window = max(start, min(stop, right)), window + 1
        return np.concatenate(parts)

    @property
    def windows(self) -> int:
        """The number of windows."""
        return len(self._windows)

    def window_of(self, k: int) -> int:
        """Return the number of the window in which batch k begins."""
        return int(np.searchsorted(self._bounds, k * self.batch, side="right")) - 1

    def shards_of(self, window: int) -> np.ndarray:
        """Return the shards of a window in the order of the plan, each once; empty past the last window."""
        found = self._shard[self._windows[window]] if window < len(self._windows) else self._shard[:0]
        return found[np.sort(np.unique(found, return_index=True)[1])]

    def _shuffled_window(self, window: int) -> np.ndarray:
        chunks = self._windows[window]
        first, count = self._first[chunks], self._count[chunks]
        samples = np.repeat(first - np.concatenate([[0], np.cumsum(count)[:-1]]), count) + np.arange(count.sum())
        return samples[permutation(len(samples), self.seed, _WINDOW, self.epoch, window)]


class RoundRobinPlan:
    """Plan of one epoch in which each batch holds samples of one source, such as the data of one of several heads.

    Each source has its own `EpochPlan` with its weight. Samples that do not fill a batch of their source wait for the
    next epoch. The epoch is divided into N equal intervals for a source of N batches, and each interval gets one of
    them at a random time. The arguments are those of `EpochPlan`.

    Raises:
        ValueError: If the batch is larger than what an epoch takes of a source, or a weight is not positive.
    """

    def __init__(
        self,
        counts: Sequence[int],
        seed: int,
        epoch: int,
        batch: int,
        window: int = 64,
        sources: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        sources = [(len(counts), 1.0)] if sources is None else sources
        bounds = np.cumsum([0, *(number for number, _ in sources)]).tolist()
        self._plans = []
        for i, ((a, b), (_, weight)) in enumerate(zip(pairwise(bounds), sources)):
            source_seed = derive_seed(seed, _ROUND_ROBIN, i)
            try:
                self._plans.append(EpochPlan(counts[a:b], source_seed, epoch, batch, window, [(b - a, weight)]))
            except ValueError as error:
                raise ValueError(f"source {i + 1} of {len(sources)}, which has its own batches: {error}") from None
        self._starts = [int(sum(counts[:a])) for a in bounds]
        lengths = [len(plan) for plan in self._plans]
        source = np.repeat(np.arange(len(lengths)), lengths)
        number = np.concatenate([np.arange(length) for length in lengths])
        within = [philox(seed, _ROUND_ROBIN, epoch, i).random_raw(length) / 2.0**64 for i, length in enumerate(lengths)]
        time = (number + np.concatenate(within)) / np.array(lengths)[source]
        order = np.argsort(time, kind="stable")
        self._source, self._number = source[order], number[order]

    def __len__(self) -> int:
        """Return the number of batches of the epoch."""
        return len(self._source)

    def __getitem__(self, k: int) -> np.ndarray:
        """Return the sample numbers (G,) of global batch k."""
        if not 0 <= k < len(self):
            raise IndexError(k)
        source = int(self._source[k])
        return self._plans[source][int(self._number[k])] + self._starts[source]


def permutation(n: int, *key: int) -> np.ndarray:
    """Return a random order of 0 .. n-1 that depends on the key alone, in every version of numpy.

    The raw output of the counter-based generator Philox (Salmon et al. 2011) is sorted, because numpy guarantees that
    this output does not change.
    """
    return np.argsort(philox(*key).random_raw(n), kind="stable")


def philox(*key: int) -> np.random.Philox:
    """Return the counter-based generator of a key of non-negative integers."""
    return np.random.Philox(np.random.SeedSequence(key))


def derive_seed(*key: int) -> int:
    """Return a 63-bit number that depends on the key alone, as the seed of another generator."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
