"""Loaders that spread work over processes, and the watchdog that names the sample at which a process hangs."""

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

POLL_SECONDS = 1.0  # between checks of the workers during the wait for a batch
GRACE_SECONDS = 3.0  # in which workers may end by themselves before they are killed
# A terminal or SLURM sends these to all processes of a run, but only the trainer should act on them.
TRAINER_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def item_loader(dataset: Dataset[Any], order: Sequence[Any], workers: int, **options: Any) -> DataLoader[Any]:
    """Return a loader of a dataset's items, one by one and without collation.

    Args:
        dataset: dataset that is indexed with one item of `order` at a time.
        order: indices in the order in which they are read.
        workers: number of processes; 0 to read in this process.
        options: further options of the `DataLoader`.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_identity,
        generator=torch.Generator(),  # without it the loader draws from the global generator
        **{"worker_init_fn": ignore_trainer_signals, **options},
    )


def _identity(item: Any) -> Any:  # not a lambda: processes that are spawned have to pickle it
    return item


def ignore_trainer_signals(worker: int) -> None:
    """Make a worker ignore the signals that are meant for the trainer.

    SIGTERM is excepted: Python sends it to the workers that are left when it exits, and waits for them.
    """
    for number in TRAINER_SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)


class CurrentSample:
    """The sample that a process is reading, published to the process that waits for its batch.

    Attributes:
        record: (2,) row of the sample that was started last, and when it was started in seconds of `time.monotonic`;
            infinity once the batch is ready.
    """

    def __init__(self) -> None:
        self.record = np.array([-1, np.inf])

    def start(self, row: int) -> None:
        """Record that sample `row` is read from now on."""
        self.record[:] = row, time.monotonic()

    def finish(self) -> None:
        """Record that the batch is ready."""
        self.record[1] = np.inf


class WatchedDataset(Protocol):
    """A dataset of batches that publishes the sample it is reading."""

    current_sample: CurrentSample

    def __getitem__(self, request: Any) -> Any:
        """Return the requested batch."""
        ...

    def locate(self, row: int) -> tuple[str, str]:
        """Return a sample's shard, and its shard with its key, as printed in messages."""
        ...


class TimeoutDataLoader(DataLoader[Any]):
    """A loader whose next batch may take `timeout` seconds, and whose error then names the sample.

    Its workers live from epoch to epoch, ignore the signals that are meant for the trainer, and must be ended by
    `close`. The death of a worker is reported by the wait for the next batch. Torch alone raises it wherever the
    program happens to be, even in the middle of a step.

    Args:
        dataset: dataset that is asked for one batch at a time.
        workers: number of processes; 0 for none.
        timeout: seconds that the next batch may take.
        options: further options of the `DataLoader`.

    Raises:
        DataError: From the iteration, if no batch arrived in time or a worker was killed.
    """

    def __init__(self, dataset: WatchedDataset, *, workers: int, timeout: float, **options: Any) -> None:
        self.locate = dataset.locate
        # (W, 2), the `CurrentSample.record` of each worker
        self.records = torch.tensor([[-1, torch.inf]] * workers, dtype=torch.float64).share_memory_()
        super().__init__(
            cast(Dataset[Any], dataset),
            batch_size=None,
            num_workers=workers,
            timeout=timeout if workers else 0,
            worker_init_fn=partial(_start_worker, self.records),
            generator=torch.Generator(),  # without it the loader draws a base seed from the global generator
            persistent_workers=workers > 0,
            **options,
        )

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        # A worker starts with the trainer's handlers. The signals stay blocked in it until it ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, TRAINER_SIGNALS)
        try:
            return _Iterator(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """End the workers, even those that hang; the next epoch starts new ones."""
        iterator: Any = self._iterator
        self._iterator = None
        if iterator is None:
            return
        killer = threading.Timer(GRACE_SECONDS, _kill, [iterator._workers])
        # When Python exits no worker is alive, and then no thread may be started.
        if any(worker.is_alive() for worker in iterator._workers):
            killer.start()
        try:
            iterator._shutdown_workers()
        finally:
            killer.cancel()
            _kill(iterator._workers)
            if killer.ident is not None:
                killer.join()


def _start_worker(records: Tensor, worker: int) -> None:
    for number in TRAINER_SIGNALS:  # SIGTERM too: `close` and a finalizer kill these workers
        signal.signal(number, signal.SIG_IGN)
    info = get_worker_info()
    assert info is not None
    cast(WatchedDataset, info.dataset).current_sample.record = records[worker].numpy()


def _kill(workers: Sequence[BaseProcess]) -> None:
    """Kill processes, which may ignore every other signal."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    for worker in workers:
        worker.join(1)


class _Iterator(_MultiProcessingDataLoaderIter):
    """Torch's iterator, with other errors when no batch arrives."""

    def __init__(self, loader: TimeoutDataLoader) -> None:
        self._locate, self._records = loader.locate, loader.records.numpy()
        super().__init__(loader)
        # Torch raises in the handler of SIGCHLD as long as these process ids are registered.
        signal_handling._remove_worker_pids(id(self))
        self._worker_pids_set = False
        # When Python exits, torch would send SIGTERM, which the workers ignore, and would wait for them. A finalizer
        # runs before that. It also runs when this object is garbage collected, where torch would wait as well.
        Finalize(self, _kill, [self._workers], exitpriority=0)

    def _get_data(self) -> Any:
        until = time.monotonic() + self._timeout
        while True:
            try:
                got, data = self._try_get_data(min(POLL_SECONDS, self._timeout))
            except (RuntimeError, OSError, EOFError):
                time.sleep(0.1)  # a dying process closes its files before it counts as dead
                self._raise_if_worker_died()
                raise
            if got:
                return data
            if self._pin_memory and not self._pin_memory_thread.is_alive():
                raise RuntimeError("Pin memory thread exited unexpectedly")
            if time.monotonic() > until:
                error = self._timeout_error()
                _kill(self._workers)
                raise error

    def _raise_if_worker_died(self) -> None:
        for number, worker in enumerate(self._workers):
            if worker.is_alive():
                continue
            code = worker.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            row, since = self._records[number]
            sample = f" at {self._locate(int(row))[1]}" if since < torch.inf else ""
            use_less = "lower data.workers or data.batch_size"
            way_out = {
                -signal.SIGKILL: f"the kernel's out-of-memory killer is likely; {use_less}",
                -signal.SIGBUS: f"/dev/shm is likely full; {use_less}, or give the container more of it (--shm-size)",
            }.get(
                code,
                "leave the sample out with data.select if it happens there again" if sample else "start the run again",
            )
            raise DataError(f"data worker {number} (pid {worker.pid}) {how}{sample}: {way_out}") from None

    def _timeout_error(self) -> DataError:
        late = f"no batch for {self._timeout:g} s"
        waited = time.monotonic() - self._records[:, 1]  # -inf where a worker is idle
        hanging = [number for number in np.argsort(-waited).tolist() if waited[number] > self._timeout / 2]
        rows = self._records[:, 0].astype(int).tolist()
        if hanging:
            at = [f"worker {n} has been at {self._locate(rows[n])[1]} for {waited[n]:.0f} s" for n in hanging[:3]]
            more = f" and {len(hanging) - 3} more workers at others" if len(hanging) > 3 else ""
            way_out = "raise data.timeout if this is expected, or leave the sample out with data.select"
            return DataError(f"{late}: {', '.join(at)}{more}; {way_out}")
        shards = list(dict.fromkeys(self._locate(row)[0] for row in rows if row >= 0))
        at = f" ({', '.join(shards[:3])}{' and others' if len(shards) > 3 else ''})" if shards else ""
        return DataError(
            f"{late}, and no worker hangs: the storage{at} is likely slow; raise data.timeout if this is expected"
        )
