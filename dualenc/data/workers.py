"""Work spread over processes, by torch's loader."""

import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dualenc.utils.errors import DataError

LOOK_EVERY = 1.0  # seconds between looks at the workers while one waits for a batch
GRACE = 3.0  # seconds that workers have to end by themselves
# What a terminal or SLURM sends to all processes of a run, for the one that trains.
NOT_FOR_WORKERS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def each(dataset: Dataset[Any], order: Sequence[Any], workers: int, **options: Any) -> DataLoader[Any]:
    """What a dataset gives for each item of an order, as it is.

    Args:
        dataset: asked for one item at a time.
        order: the items.
        workers: processes; 0 for none.
        options: further ones of the `DataLoader`.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # or the loader draws from the global one
        **{"worker_init_fn": deaf, **options},
    )


def _as_it_is(item: Any) -> Any:  # a function with a name, which goes to processes that are started anew
    return item


def deaf(worker: int) -> None:
    """What a worker does first: signals for the trainer are not for it.

    But for SIGTERM, by which Python ends those that are left when it ends, and waits.
    """
    for number in NOT_FOR_WORKERS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)


class Progress:
    """The sample that a process is at, for the one that waits for its batch.

    Attributes:
        note: row of the sample that was begun last, and when; infinity once the batch is ready.
    """

    def __init__(self) -> None:
        self.note = np.array([-1, np.inf])

    def begin(self, row: int) -> None:
        """Note that sample `row` comes now."""
        self.note[:] = row, time.monotonic()

    def done(self) -> None:
        """Note that the batch is ready."""
        self.note[1] = np.inf


class Watched(Protocol):
    """A data set of batches that tells which of its samples it is at."""

    progress: Progress

    def __getitem__(self, request: Any) -> Any:
        """The batch that is asked for."""
        ...

    def where(self, row: int) -> tuple[str, str]:
        """A sample's shard, and its shard and key, for people."""
        ...


class TimeoutDataLoader(DataLoader[Any]):
    """A loader of which the next batch may take `timeout` seconds, and whose error then names the sample.

    Its workers stay from epoch to epoch, do not hear the signals that are for the trainer, and must be ended by
    `close`. A worker's death is reported where the next batch is waited for; torch does so wherever the program
    happens to be, as in the middle of a step.

    Args:
        dataset: asked for one batch at a time.
        workers: processes; 0 for none.
        timeout: seconds.
        options: further ones of the `DataLoader`.

    Raises:
        DataError: (from the iteration) no batch came in time; or a worker was killed.
    """

    def __init__(self, dataset: Watched, *, workers: int, timeout: float, **options: Any) -> None:
        self.where = dataset.where
        self.notes = torch.tensor([[-1, torch.inf]] * workers, dtype=torch.float64).share_memory_()  # (W, 2)
        super().__init__(
            cast(Dataset[Any], dataset),
            batch_size=None,
            num_workers=workers,
            timeout=timeout if workers else 0,
            worker_init_fn=partial(_begin, self.notes),
            generator=torch.Generator(),  # or the loader draws a base seed from the global one
            persistent_workers=workers > 0,
            **options,
        )

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        # Until a worker ignores them: it starts with the handlers of the trainer.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
        try:
            return _Iterator(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """Ends the workers, those that hang too; the next epoch starts new ones."""
        iterator: Any = self._iterator
        self._iterator = None
        if iterator is None:
            return
        killer = threading.Timer(GRACE, _kill, [iterator._workers])
        if any(worker.is_alive() for worker in iterator._workers):  # none is when Python ends: no thread may start then
            killer.start()
        try:
            iterator._shutdown_workers()
        finally:
            killer.cancel()
            _kill(iterator._workers)
            if killer.ident is not None:
                killer.join()


def _begin(notes: Tensor, worker: int) -> None:
    for number in NOT_FOR_WORKERS:  # `close` and a finalizer end them otherwise
        signal.signal(number, signal.SIG_IGN)
    info = get_worker_info()
    assert info is not None
    cast(Watched, info.dataset).progress.note = notes[worker].numpy()


def _kill(workers: Sequence[BaseProcess]) -> None:
    """Ends processes that may hear nothing else."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    for worker in workers:
        worker.join(1)


class _Iterator(_MultiProcessingDataLoaderIter):
    """Torch's, but for what happens when no batch comes."""

    def __init__(self, loader: TimeoutDataLoader) -> None:
        self._where, self._notes = loader.where, loader.notes.numpy()
        super().__init__(loader)
        # With these torch raises in the handler of SIGCHLD.
        signal_handling._remove_worker_pids(id(self))
        self._worker_pids_set = False
        # At Python's end it would send SIGTERM, which they ignore, and wait. A finalizer is called before that, and
        # when the collector takes this, whose end would wait as well.
        Finalize(self, _kill, [self._workers], exitpriority=0)

    def _get_data(self) -> Any:
        until = time.monotonic() + self._timeout
        while True:
            try:
                got, data = self._try_get_data(min(LOOK_EVERY, self._timeout))
            except (RuntimeError, OSError, EOFError):
                time.sleep(0.1)  # what dies has closed its files before it is dead
                self._refuse_the_dead()
                raise
            if got:
                return data
            if self._pin_memory and not self._pin_memory_thread.is_alive():
                raise RuntimeError("Pin memory thread exited unexpectedly")
            if time.monotonic() > until:
                error = self._late()
                _kill(self._workers)
                raise error

    def _refuse_the_dead(self) -> None:
        for number, worker in enumerate(self._workers):
            if worker.is_alive():
                continue
            code = worker.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            row, since = self._notes[number]
            where = f" at {self._where(int(row))[1]}" if since < torch.inf else ""
            less = "lower data.workers or data.batch_size"
            way_out = {
                -signal.SIGKILL: f"the kernel's out-of-memory killer is likely; {less}",
                -signal.SIGBUS: f"/dev/shm is likely full; {less}, or give the container more of it (--shm-size)",
            }.get(
                code,
                "leave the sample out by data.select if it happens there again" if where else "start the run again",
            )
            raise DataError(f"data worker {number} (pid {worker.pid}) {how}{where}: {way_out}") from None

    def _late(self) -> DataError:
        late = f"no batch for {self._timeout:g} s"
        waited = time.monotonic() - self._notes[:, 1]
        hang = [number for number in np.argsort(-waited).tolist() if waited[number] > self._timeout / 2]
        rows = self._notes[:, 0].astype(int).tolist()
        if hang:
            at = [f"worker {n} has been at {self._where(rows[n])[1]} for {waited[n]:.0f} s" for n in hang[:3]]
            more = f" and {len(hang) - 3} more workers at others" if len(hang) > 3 else ""
            way_out = "raise data.timeout if this may be, or leave the sample out by data.select"
            return DataError(f"{late}: {', '.join(at)}{more}; {way_out}")
        shards = list(dict.fromkeys(self._where(row)[0] for row in rows if row >= 0))
        at = f" ({', '.join(shards[:3])}{' and others' if len(shards) > 3 else ''})" if shards else ""
        return DataError(
            f"{late}, and no worker hangs: the storage{at} is likely slow; raise data.timeout if this may be"
        )
