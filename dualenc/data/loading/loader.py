"""Batches in the order of a plan, for one rank, resumable at any of them: of pairs and of texts alike."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np

from dualenc.data.loading.bad_samples import BadSampleLog
from dualenc.data.loading.epoch_plan import EpochPlan, InTurn
from dualenc.data.loading.prefetch import Prefetch
from dualenc.data.workers import TimeoutDataLoader, Watched
from dualenc.utils.errors import DataError

Request = tuple[int, int, np.ndarray]  # epoch, place in it of the first sample, (B,) sample numbers
Mix = Literal["together", "round_robin"]


class BatchDataset(Watched, Protocol):
    """What a `Loader` makes batches of."""

    index: Any  # the samples: a length, `counts()`, `parts` and `fingerprint`

    def __getitem__(self, request: Request) -> Any:
        """The batch of an epoch's samples; it has `bad`, the samples that were met and could not be used."""
        ...

    def facts(self) -> dict[str, Any]:
        """Plain values on which the batches depend, besides the plan; a run that continues must have the same."""
        ...


class Loader:
    """Batches for one rank, in an order that depends on (seed, epoch) alone, resumable at any batch.

    Each pass of `for batch in loader` is one epoch, from where the state stands (unshuffled: always the start) to its
    end. Every rank has the same number of batches; rank r gets its part of each global batch.

    Args:
        dataset: what the plan's numbers mean.
        batch_size: global, over all ranks; a multiple of `world`.
        micro_batch_size: the most samples of a piece; each batch is then a list of pieces, that workers make one by
            one.
        seed: of the order.
        window: shards shuffled together; see `EpochPlan`.
        sources: (number of shards, weight) of each source; see `EpochPlan`.
        mix: "together" for batches of all sources, in proportion to their weights; "round_robin" for batches of one
            source each, in an even order.
        shuffle: false for the order of the shards in batches of nearly `batch_size`, nothing left out (validation);
            no rank goes without a part of any batch, since the others would wait for it.
        rank, world: this process and how many there are.
        workers: processes that decode; 0 for none.
        timeout: seconds that the next batch may take, with workers.
        pin_memory: for a fast copy to a GPU.
        bad_sample_log: where bad samples are written down and counted; absent, nowhere but in memory.

    Raises:
        DataError: the batch is larger than the data, or no multiple of `world`; fewer unshuffled samples than ranks; no
            time for a batch. From the iteration: a worker hangs, or was killed.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        batch_size: int,
        *,
        micro_batch_size: int | None = None,
        seed: int = 0,
        window: int = 64,
        sources: Sequence[tuple[int, float]] | None = None,
        mix: Mix = "together",
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        timeout: float = 300.0,
        pin_memory: bool = False,
        bad_sample_log: BadSampleLog | None = None,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.window = dataset, batch_size, seed, window
        self.sources = [(len(dataset.index.parts), 1.0)] if sources is None else list(sources)
        self.bad_sample_log = (
            BadSampleLog(len(dataset.index)) if bad_sample_log is None else bad_sample_log
        )  # an empty one is false
        self.mix, self.shuffle, self.rank, self.world = mix, shuffle, rank, world
        self.workers, self.timeout, self.pin_memory = workers, timeout, pin_memory
        self.epoch, self.batch = 0, 0
        if batch_size % world:
            raise DataError(f"batch_size {batch_size} (over all ranks) is no multiple of the {world} ranks")
        if not timeout > 0:
            raise DataError(f"data.timeout {timeout} must be more than 0 seconds")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise DataError(f"micro_batch_size {micro_batch_size} must be 1 at least")
        self.micro_batch_size = micro_batch_size
        self._length = len(self._plan(0))
        self._requests = _Requests(rank, world, batch_size, micro_batch_size)
        self._loader: TimeoutDataLoader | None = None  # kept from epoch to epoch with its workers

    def _plan(self, epoch: int) -> Sequence[np.ndarray]:
        if not self.shuffle:
            rows = np.arange(len(self.dataset.index))
            if len(rows) < self.world:
                raise DataError(f"{len(rows)} held-out samples are fewer than the {self.world} ranks")
            # As many batches as it takes, but none smaller than the ranks that share it.
            return np.array_split(rows, min(-(-len(rows) // self.batch_size), len(rows) // self.world))
        try:
            plan = EpochPlan if self.mix == "together" else InTurn
            counts = self.dataset.index.counts()
            return plan(counts, self.seed, epoch, self.batch_size, self.window, self.sources)  # type: ignore[return-value]
        except ValueError as error:
            raise DataError(str(error)) from None

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the state stands."""
        return self._length

    def __iter__(self) -> Iterator[Any]:
        """The dataset's batches; or, of micro-batches, lists of them."""
        if not self.shuffle:
            self.batch = 0  # a trainer's sanity check or limit may have left the last pass early
        plan = self._plan(self.epoch)
        if self._loader is None:
            self._loader = TimeoutDataLoader(
                self.dataset,
                workers=self.workers,
                timeout=self.timeout,
                sampler=self._requests,
                pin_memory=self.pin_memory,
                prefetch_factor=4 if self.workers else None,
            )
        self._requests.begin(plan, self.epoch, self.batch)
        try:
            pieces = iter(self._loader)  # starts the workers in the first epoch, before there are threads
            with Prefetch(plan, self.dataset.index, self.batch) as prefetch:
                for count in self._requests.pieces():
                    batch = list(islice(pieces, count))
                    for piece in batch:
                        self.bad_sample_log.add(piece.bad)
                    prefetch.reached(self.batch)
                    self.batch += 1  # counted when handed over, not when a worker reads ahead
                    if self.batch == self._length:
                        self.epoch, self.batch = self.epoch + 1, 0
                    yield batch if self.micro_batch_size else batch[0]
        except BaseException:  # an epoch that is left, too: what the workers read ahead is of no use
            self.close()
            raise

    def close(self) -> None:
        """Ends the workers, which otherwise wait for the next epoch; it may still come."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, equal on all ranks."""
        mixed = {} if self.mix == "together" else {"mix": self.mix}
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "window": self.window,
            "sources": [[number, weight] for number, weight in self.sources],
            **mixed,
            **self.dataset.facts(),
        }

    def changes(self, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return in what another loader read other data, or in another order: names with its value and this one's."""
        mine = self.state_dict()
        pairs = {
            name: (state.get(name), mine.get(name)) for name in {**state, **mine} if name not in ("epoch", "batch")
        }
        return {name: (then, now) for name, (then, now) in pairs.items() if then != now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where another loader stood.

        Raises:
            DataError: that loader read other data, or in another order; names the field.
        """
        for name, (then, now) in self.changes(state).items():
            raise DataError(f"the checkpoint's data loader had {name} {then}, this run has {now}")
        self.epoch, self.batch = state["epoch"], state["batch"]


class _Requests:
    """What a dataset is asked for, from some batch to the epoch's end, for one rank."""

    def __init__(self, rank: int, world: int, size: int, most: int | None) -> None:
        self.rank, self.world, self.size, self.most = rank, world, size, most

    def begin(self, plan: Sequence[np.ndarray], epoch: int, start: int) -> None:
        self.plan, self.epoch, self.start = plan, epoch, start

    def pieces(self) -> Iterator[int]:
        """How many each batch is asked for in."""
        for k in range(self.start, len(self.plan)):
            yield self._number(self._own(k)[0])

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        for k in range(self.start, len(self.plan)):
            own, place = self._own(k)
            for piece in np.array_split(own, self._number(own)):  # as equal as can be
                yield self.epoch, place, piece
                place += len(piece)

    def _number(self, own: np.ndarray) -> int:
        return -(-len(own) // self.most) if self.most else 1

    def _own(self, k: int) -> tuple[np.ndarray, int]:
        """This rank's rows of a batch, and the place of the first of them in the epoch."""
        parts = np.array_split(self.plan[k], self.world)  # equal, but for unshuffled samples
        return parts[self.rank], k * self.size + sum(map(len, parts[: self.rank]))
