"""The loader of training and validation batches, of pairs and of texts: in the order of a plan, resumable anywhere."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np

from dualenc.data.loading.bad_samples import BadSampleLog
from dualenc.data.loading.epoch_plan import EpochPlan, RoundRobinPlan
from dualenc.data.loading.prefetch import Prefetch
from dualenc.data.workers import PREFETCH, WatchedDataset, WorkerLoader, prefetch_that_fits, usable_workers
from dualenc.utils.errors import DataError

Request = tuple[int, int, np.ndarray]  # epoch, position in the epoch of the first sample, (B,) sample numbers
Mix = Literal["together", "round_robin"]


class BatchDataset(WatchedDataset, Protocol):
    """A dataset of which a `Loader` requests batches."""

    index: Any  # of the samples; has a length, `counts()`, `parts` and `fingerprint`

    def __getitem__(self, request: Request) -> Any:
        """Return the batch of the requested samples; its `bad` lists the bad samples that were replaced."""
        ...

    def sample_bytes(self) -> int:
        """Return the size of a sample's image in a batch; texts and features are small."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return the plain values, other than the plan, on which the batches depend.

        A run that resumes must have the same values.
        """
        ...


class Loader:
    """Batches for one rank, in an order that depends on (seed, epoch) alone, resumable at any batch.

    Each pass of `for batch in loader` runs from the current state to the end of one epoch (unshuffled: always from the
    start). Every rank has the same number of batches, and rank r gets its part of each global batch.

    Args:
        dataset: dataset of the samples that the plan numbers.
        batch_size: global batch size, over all ranks; a multiple of `world`.
        micro_batch_size: largest number of samples of a micro-batch; each batch is then a list of micro-batches, which
            workers make one by one.
        seed: seed of the order.
        window: number of shards that are shuffled together; see `EpochPlan`.
        sources: (number of shards, weight) of each source; see `EpochPlan`.
        mix: "together" for batches of all sources, in proportion to their weights; "round_robin" for batches of one
            source each, which take turns evenly.
        shuffle: false for validation: batches of nearly `batch_size` in the order of the shards, with no sample left
            out. Every rank gets a part of every batch, since the other ranks would wait for it.
        rank: number of this process.
        world: world size, the number of processes.
        workers: number of processes that decode, at most one for each core; 0 for none.
        timeout: seconds that the next batch may take, with workers.
        pin_memory: use pinned memory, for a fast copy to a GPU.
        bad_sample_log: log that counts and writes the bad samples; without it they are counted in memory only.

    Raises:
        DataError: If the batch is larger than the data or not a multiple of `world`, there are fewer unshuffled samples
            than ranks, `timeout` is not positive, or shared memory is too small for the workers. From the iteration, if
            a worker hangs or was killed.
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
        # Not `or`: an empty log is false.
        self.bad_sample_log = BadSampleLog(len(dataset.index)) if bad_sample_log is None else bad_sample_log
        self.mix, self.shuffle, self.rank, self.world = mix, shuffle, rank, world
        self.workers, self.timeout, self.pin_memory = usable_workers(workers, rank), timeout, pin_memory
        self.epoch, self.batch = 0, 0
        if batch_size % world:
            raise DataError(f"batch_size {batch_size} (over all ranks) must be a multiple of the {world} ranks")
        if not timeout > 0:
            raise DataError(f"data.timeout {timeout} must be more than 0 seconds")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise DataError(f"micro_batch_size {micro_batch_size} must be at least 1")
        self.micro_batch_size = micro_batch_size
        self._length = len(self._plan(0))
        self._requests = _Requests(rank, world, batch_size, micro_batch_size)
        self._memory = self._memory_needs()
        prefetch_that_fits(prefetch=PREFETCH, **self._memory)  # raises now and not when training has started
        self._loader: WorkerLoader | None = None  # kept from epoch to epoch because its workers live on

    def __repr__(self) -> str:
        of = f"{len(self):,} batches of {self.batch_size:,}{'' if self.shuffle else ' at most'}"
        return f"Loader({of} an epoch, of {self.dataset!r}; next is batch {self.batch} of epoch {self.epoch})"

    def _memory_needs(self) -> dict[str, Any]:
        """Return the arguments of `prefetch_that_fits`."""
        of_rank = -(-self.batch_size // self.world)
        size = min(self.micro_batch_size or of_rank, of_rank)
        on_machine = os.environ.get("LOCAL_WORLD_SIZE") or self.world // int(os.environ.get("SLURM_NNODES", 1))
        return {
            "batch_bytes": size * self.dataset.sample_bytes() if self.workers else 0,
            "workers": self.workers,
            "held": 2 * -(-of_rank // size),  # the trainer holds a batch while it asks for the next one
            "ranks": max(1, int(on_machine)),
        }

    def _plan(self, epoch: int) -> Sequence[np.ndarray]:
        if not self.shuffle:
            rows = np.arange(len(self.dataset.index))
            if len(rows) < self.world:
                raise DataError(f"{len(rows)} held-out samples are fewer than the {self.world} ranks")
            # Every batch holds at least one sample for each rank.
            return np.array_split(rows, min(-(-len(rows) // self.batch_size), len(rows) // self.world))
        try:
            plan = EpochPlan if self.mix == "together" else RoundRobinPlan
            counts = self.dataset.index.counts()
            return plan(counts, self.seed, epoch, self.batch_size, self.window, self.sources)  # type: ignore[return-value]
        except ValueError as error:
            raise DataError(str(error)) from None

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, whatever the current state."""
        return self._length

    def __iter__(self) -> Iterator[Any]:
        """Iterate over this rank's batches, or over lists of micro-batches if `micro_batch_size` is set."""
        if not self.shuffle:
            self.batch = 0  # the trainer's sanity check or a limit may have left the last pass early
        plan = self._plan(self.epoch)
        if self._loader is None:
            self._loader = WorkerLoader(
                self.dataset,
                timeout=self.timeout,
                persistent=True,
                sampler=self._requests,
                pin_memory=self.pin_memory,
                rank=self.rank,
                **self._memory,
            )
        self._requests.reset(plan, self.epoch, self.batch)
        try:
            micro_batches = iter(self._loader)  # starts the workers in the first epoch, before there are threads
            with Prefetch(plan, self.dataset.index, self.batch) as prefetch:
                for count in self._requests.micro_batch_counts():
                    batch = list(islice(micro_batches, count))
                    for micro_batch in batch:
                        self.bad_sample_log.add(micro_batch.bad)
                    prefetch.advance_to(self.batch)
                    self.batch += 1  # counted when it is handed out, not when a worker reads ahead
                    if self.batch == self._length:
                        self.epoch, self.batch = self.epoch + 1, 0
                    yield batch if self.micro_batch_size else batch[0]
        except BaseException:  # also when the epoch is left early: the workers have read batches that nobody wants
            self.close()
            raise

    def close(self) -> None:
        """End the workers, which otherwise wait for the next epoch. Another epoch may still follow."""
        if self._loader is not None:
            self._loader.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loader, which is equal on all ranks."""
        mix = {} if self.mix == "together" else {"mix": self.mix}
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "window": self.window,
            "sources": [[number, weight] for number, weight in self.sources],
            **mix,
            **self.dataset.facts(),
        }

    def changes(self, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the settings in which another loader's data or order differ: name -> its value and this one's."""
        own = self.state_dict()
        pairs = {name: (state.get(name), own.get(name)) for name in {**state, **own} if name not in ("epoch", "batch")}
        return {name: (before, now) for name, (before, now) in pairs.items() if before != now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the state of another loader.

        Raises:
            DataError: If that loader read other data or in another order; names the setting.
        """
        for name, (before, now) in self.changes(state).items():
            raise DataError(f"the checkpoint's data loader had {name} {before}, this run has {now}")
        self.epoch, self.batch = state["epoch"], state["batch"]


class _Requests:
    """Sampler of a rank's requests to the dataset, from a batch of a plan to the end of the epoch."""

    def __init__(self, rank: int, world: int, batch_size: int, micro_batch_size: int | None) -> None:
        self.rank, self.world, self.batch_size, self.micro_batch_size = rank, world, batch_size, micro_batch_size

    def reset(self, plan: Sequence[np.ndarray], epoch: int, start: int) -> None:
        self.plan, self.epoch, self.start = plan, epoch, start

    def micro_batch_counts(self) -> Iterator[int]:
        """Yield the number of requests of each batch."""
        for k in range(self.start, len(self.plan)):
            yield self._micro_batches(self._rank_rows(k)[0])

    def __iter__(self) -> Iterator[Request]:
        for k in range(self.start, len(self.plan)):
            rows, position = self._rank_rows(k)
            for micro_batch in np.array_split(rows, self._micro_batches(rows)):  # sizes differ by at most one
                yield self.epoch, position, micro_batch
                position += len(micro_batch)

    def _micro_batches(self, rows: np.ndarray) -> int:
        return -(-len(rows) // self.micro_batch_size) if self.micro_batch_size else 1

    def _rank_rows(self, k: int) -> tuple[np.ndarray, int]:
        """Return this rank's rows of batch k, and the position in the epoch of the first of them."""
        parts = np.array_split(self.plan[k], self.world)  # equal, except for unshuffled samples
        return parts[self.rank], k * self.batch_size + sum(map(len, parts[: self.rank]))
