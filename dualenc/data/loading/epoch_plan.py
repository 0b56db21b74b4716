"""The plan: which samples stand in which batch of an epoch. Pure arithmetic; it knows no files.

A source is some shards with a weight: how often an epoch goes through them. Each epoch takes up each source where the
last one left it, so that no sample is left out or repeated more often than another. What it takes is cut at the bounds
of shards and of passes into pieces; the pieces of each pass are put in a random order, those of all sources are spread
evenly over the epoch, and windows of W of them are shuffled sample by sample. So a batch touches at most a few shards,
and where the n-th sample of the epoch lies is a function of (seed, epoch, n) alone: neither ranks nor workers have a
part in it, and resuming in the middle is a multiplication.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

_SHARDS, _PIECES, _WINDOW = 1, 2, 3  # what a permutation is of; 4 is what `Masking` draws
_TURNS = 5


class EpochPlan:
    """Order of one epoch. Memory and time grow with the shards and one window, not with the samples.

    Args:
        counts: samples in each shard; sample numbers count through the shards in this order.
        seed: of the whole run.
        epoch: number of the epoch.
        batch: global batch size G, over all ranks.
        window: number of shards shuffled together.
        sources: (number of shards, weight) of each source, in the order of the shards; absent, one of weight 1.

    Raises:
        ValueError: the batch is larger than an epoch, or a weight is not positive.
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
            raise ValueError(f"sources of {sum(number for number, _ in sources)} shards for {len(sizes)}")
        if wrong := [weight for _, weight in sources if not 0 < weight < 1e6]:
            raise ValueError(f"weight {wrong[0]} of a source must be positive")
        bounds = np.cumsum([0, *(number for number, _ in sources)])
        totals = [int(sizes[a:b].sum()) for a, b in pairwise(bounds)]
        wanted = [round(weight * total) for total, (_, weight) in zip(totals, sources)]
        if batch > sum(wanted):
            raise ValueError(f"batch size {batch} is larger than the data, which has {sum(wanted)} samples")
        self.seed, self.epoch, self.batch = seed, epoch, batch
        self._length = sum(wanted) // batch
        # What fills no batch is taken off all sources alike. In Python's integers: the products may be large.
        edges = [sum(wanted[:i]) * self._length * batch // sum(wanted) for i in range(len(wanted) + 1)]
        starts = np.cumsum([0, *sizes])
        pieces = []
        for i, (a, b) in enumerate(pairwise(bounds)):
            pieces.append(self._pieces(i, np.arange(a, b), starts, sizes, edges[i + 1] - edges[i]))
        when, shard, first, count = (np.concatenate(column) for column in zip(*pieces))
        order = np.lexsort((shard, when))
        self._shard, self._first, self._count = shard[order], first[order], count[order]
        self._windows = [slice(i, i + window) for i in range(0, len(order), window)]
        self._bounds = np.cumsum([0, *(int(self._count[part].sum()) for part in self._windows)])  # (windows+1,)
        self._window = lru_cache(maxsize=3)(self._shuffled)  # a batch rarely spans more

    def _pieces(
        self, source: int, shards: np.ndarray, starts: np.ndarray, sizes: np.ndarray, take: int
    ) -> tuple[np.ndarray, ...]:
        """When in the epoch (0 to 1), shard, first sample and count of each piece that it takes from a source."""
        shards = shards[permutation(len(shards), self.seed, _SHARDS, source)]  # the same order in every epoch
        ends = np.cumsum(sizes[shards])
        total = int(ends[-1]) if len(ends) else 0
        found = []
        left, passes, place = take, 0, self.epoch * take % max(1, total)
        while left:
            # One pass, over all of the source from where the epoch begins; the last one may be a part of it.
            stop = place + min(left, total)
            here = []
            for base in (0, total):  # the source may have to be begun again within the pass
                low = np.clip(place - base, ends - sizes[shards], ends)
                high = np.clip(stop - base, ends - sizes[shards], ends)
                some = high > low
                here.append((shards[some], (starts[shards] + low - ends + sizes[shards])[some], (high - low)[some]))
            shard, first, count = (np.concatenate(column) for column in zip(*here))
            rank = np.argsort(permutation(len(shard), self.seed, _PIECES, self.epoch, source, passes))
            span = min(left, total) / take
            when = passes * total / take + span * (rank + 0.5) / len(shard)
            found.append((when, shard, first, count))
            left, passes = left - min(left, total), passes + 1
        empty = np.zeros(0, dtype=np.int64)
        return tuple(np.concatenate(column) for column in zip((empty.astype(float), empty, empty, empty), *found))

    def __len__(self) -> int:
        """Batches of the epoch."""
        return self._length

    def __getitem__(self, k: int) -> np.ndarray:
        """Sample numbers (G,) of global batch k."""
        if not 0 <= k < len(self):
            raise IndexError(k)
        start, stop = k * self.batch, (k + 1) * self.batch
        number = self.window_of(k)
        parts = []
        while start < stop:
            left, right = int(self._bounds[number]), int(self._bounds[number + 1])
            parts.append(self._window(number)[start - left : stop - left])
            start, number = max(start, min(stop, right)), number + 1
        return np.concatenate(parts)

    @property
    def windows(self) -> int:
        """How many there are."""
        return len(self._windows)

    def window_of(self, k: int) -> int:
        """The window in which batch k begins."""
        return int(np.searchsorted(self._bounds, k * self.batch, side="right")) - 1

    def shards_of(self, window: int) -> np.ndarray:
        """The shards of a window in the order of the plan, each once; none past the last one."""
        found = self._shard[self._windows[window]] if window < len(self._windows) else self._shard[:0]
        return found[np.sort(np.unique(found, return_index=True)[1])]

    def _shuffled(self, number: int) -> np.ndarray:
        part = self._windows[number]
        first, count = self._first[part], self._count[part]
        samples = np.repeat(first - np.concatenate([[0], np.cumsum(count)[:-1]]), count) + np.arange(count.sum())
        return samples[permutation(len(samples), self.seed, _WINDOW, self.epoch, number)]


class InTurn:
    """Order of one epoch whose batches are of one source each: what one head learns from, where there are several.

    Each source has a plan of its own, with weight and shuffling as there; what fills no batch of it waits for the next
    epoch. Its batches are spread evenly over the epoch, one at a random place in each of as many equal stretches.

    Args:
        counts, seed, epoch, batch, window, sources: see `EpochPlan`.

    Raises:
        ValueError: the batch is larger than what an epoch takes of a source, or a weight is not positive.
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
            own = draw(seed, _TURNS, i)
            try:
                self._plans.append(EpochPlan(counts[a:b], own, epoch, batch, window, [(b - a, weight)]))
            except ValueError as error:
                raise ValueError(f"source {i + 1} of {len(sources)}, whose batches are its own: {error}") from None
        self._starts = [int(sum(counts[:a])) for a in bounds]
        lengths = [len(plan) for plan in self._plans]
        source = np.repeat(np.arange(len(lengths)), lengths)
        number = np.concatenate([np.arange(length) for length in lengths])
        within = [stream(seed, _TURNS, epoch, i).random_raw(length) / 2.0**64 for i, length in enumerate(lengths)]
        when = (number + np.concatenate(within)) / np.array(lengths)[source]
        order = np.argsort(when, kind="stable")
        self._source, self._number = source[order], number[order]

    def __len__(self) -> int:
        """Batches of the epoch."""
        return len(self._source)

    def __getitem__(self, k: int) -> np.ndarray:
        """Sample numbers (G,) of global batch k."""
        if not 0 <= k < len(self):
            raise IndexError(k)
        source = int(self._source[k])
        return self._plans[source][int(self._number[k])] + self._starts[source]


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
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1
