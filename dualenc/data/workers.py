"""Loaders that spread work over processes, and the watchdog that names the sample at which a process hangs."""

import errno
import math
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dualenc.utils.errors import DataError
from dualenc.utils.limits import file_limit, hits_file_limit, require_spare_files
from dualenc.utils.text import plural, print_message

POLL_SECONDS = 1.0  # between checks of the workers during the wait for a batch
GRACE_SECONDS = 3.0  # in which workers may end by themselves before they are killed
PREFETCH = 4  # batches that each worker makes ahead
SMALL = 16_384  # bytes of a tensor up to which it is copied through the pipe of a worker
SPARE_FILES = 8  # that a worker must be able to open after it has made a batch
SHARED_MEMORY = "/dev/shm"  # file system through which Linux shares the memory of tensors
# A terminal or SLURM sends these to all processes of a run, but only the trainer should act on them.
TRAINER_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def usable_cores() -> int:
    """Return the number of cores that this process may use, which on shared machines are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_workers(workers: int, rank: int = 0) -> int:
    """Return the number of workers, at most one for each core; a line on standard error says if there are fewer.

    More workers than cores decode nothing faster, and take memory. What they read does not depend on their number.

    Args:
        workers: number that was asked for.
        rank: number of this process; the first one prints.
    """
    cores = usable_cores()
    if workers <= cores:
        return workers
    if not rank:
        _tell_lowered(workers, cores)
    return cores


@cache  # one line for each number, however many loaders there are
def _tell_lowered(workers: int, cores: int) -> None:
    print_message(f"workers: {cores} instead of {workers}, since this process may use {plural(cores, 'core')}")


def item_loader(dataset: Any, order: Sequence[Any], workers: int, **options: Any) -> "WorkerLoader":
    """Return a loader of a data set's items, one by one and without collation.

    Args:
        dataset: data set that is indexed with one item of `order` at a time.
        order: indices in the order in which they are read.
        workers: number of processes; 0 to read in this process.
        options: further options of the `WorkerLoader`.
    """
    return WorkerLoader(dataset, workers=workers, sampler=order, **options)


def tensor_bytes(transform: Callable[[Tensor], Tensor]) -> int:
    """Return the size of the tensor that a transform makes of an image, found on a black one; 0 if it fails."""
    state = random.getstate()
    try:
        with torch.random.fork_rng([]):
            return transform(torch.zeros(3, 64, 64, dtype=torch.uint8)).nbytes
    except Exception:  # the user's code may raise anything, and raises it again at the first image
        return 0
    finally:
        random.setstate(state)


def prefetch_that_fits(batch_bytes: int, workers: int, prefetch: int, held: int, ranks: int = 1) -> int:
    """Return the number of batches that each worker may make ahead, so that shared memory holds them.

    Args:
        batch_bytes: size of the tensors of the largest batch.
        workers: number of workers; 0 for none.
        prefetch: number of batches that each worker would make ahead.
        held: number of batches that the consumer holds at a time.
        ranks: number of processes on this machine that have such workers.

    Raises:
        DataError: If one batch ahead is too much.
    """
    free = _free_shared_memory()
    needs = {ahead: batch_bytes * (workers * ahead + held) * ranks for ahead in range(prefetch, 0, -1)}
    fitting = [ahead for ahead, need in needs.items() if not workers or need <= free]
    if not fitting:
        raise DataError(
            f"{SHARED_MEMORY} has {free / 1e6:,.1f} MB free, {plural(workers * ranks, 'data worker')} with batches of "
            f"{batch_bytes / 1e6:,.1f} MB need {needs[1] / 1e6:,.1f} MB: give the container more of it (docker run "
            f"--shm-size={math.ceil(2 * needs[1] / 1e9)}g), use smaller batches, or workers 0"
        )
    return fitting[0]


def _free_shared_memory() -> float:
    """Return the free bytes of shared memory; infinity where it does not exist."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return math.inf
    return status.f_bavail * status.f_frsize


@contextmanager
def _naming_limits() -> Iterator[None]:
    """Turn an error of exhausted shared memory or open files into one that names the limit.

    Raises:
        DataError: In place of such an error.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if hits_file_limit(error):
            raise DataError(f"data workers: too many open files; {file_limit()}") from None
        # An error that names a file comes from another file system.
        if os.strerror(errno.ENOSPC) in str(error) and getattr(error, "filename", None) is None:
            raise DataError(
                f"{SHARED_MEMORY} is full, through which data workers pass their batches: give the container more of "
                "it (docker run --shm-size), use fewer workers or smaller batches, or workers 0"
            ) from None
        raise


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


class WorkerLoader(DataLoader[Any]):
    """A loader whose workers fail in one line: those that hang, that die, and those that exhaust memory or files.

    Workers ignore the signals that are meant for the trainer. Their death is reported by the wait for the next batch.
    Torch alone raises it wherever the program happens to be, even in the middle of a step.

    Tensors are passed in shared memory, of which containers have little. If it is too small for what the workers
    prefetch, they prefetch less, and a line on standard error says so.

    Args:
        dataset: dataset that is asked for one batch at a time. If it is a `WatchedDataset`, errors name its samples.
        workers: number of processes, at most one for each core; 0 for none.
        timeout: seconds that the next batch may take, for a `WatchedDataset`.
        persistent: whether workers live from epoch to epoch, until `close` ends them.
        prefetch: batches that each worker makes ahead.
        batch_bytes: size of the tensors of the largest batch; 0 if unknown or without tensors.
        held: number of batches that the consumer holds at a time.
        ranks: number of processes on this machine with such a loader; the first one prints.
        rank: number of this process.
        waiting: whether the workers wait for storage and not for a core; then there may be more of them than cores.
        worker_init_fn: function of the worker's number that each worker calls first.
        options: further options of the `DataLoader`.

    Raises:
        DataError: If shared memory is too small. From the iteration, if no batch arrived in time, a worker was killed,
            or shared memory or open files are exhausted.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        workers: int,
        timeout: float = math.inf,
        persistent: bool = False,
        prefetch: int = PREFETCH,
        batch_bytes: int = 0,
        held: int = 2,
        ranks: int = 1,
        rank: int = 0,
        waiting: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
        **options: Any,
    ) -> None:
        workers = workers if waiting else usable_workers(workers, rank)
        lowered = prefetch_that_fits(batch_bytes, workers, prefetch, held, ranks)
        if lowered < prefetch and not rank:
            print_message(
                f"data workers prefetch {lowered} of {prefetch} batches: {SHARED_MEMORY} has "
                f"{_free_shared_memory() / 1e6:,.1f} MB free, and a batch takes {batch_bytes / 1e6:,.1f} MB"
            )
        self.longest_wait = timeout  # torch's own `timeout` would end the wait without a look at the workers
        self.locate: Any = getattr(dataset, "locate", None)  # None for a dataset that is not watched
        with _naming_limits():
            # (W, 2), the `CurrentSample.record` of each worker
            records = torch.tensor([[-1, torch.inf]] * workers, dtype=torch.float64)
            self.records = records.share_memory_() if workers and self.locate else records
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=workers,
            collate_fn=_Shared if workers else _identity,
            worker_init_fn=partial(_start_worker, self.records if self.locate else None, worker_init_fn),
            generator=torch.Generator(),  # without it the loader draws a base seed from the global generator
            persistent_workers=persistent and workers > 0,
            prefetch_factor=lowered if workers else None,
            **options,
        )

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        self.records[:] = torch.tensor([-1, torch.inf])  # ended workers may have left theirs
        # A worker starts with the trainer's handlers. The signals stay blocked in it until it ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, TRAINER_SIGNALS)
        try:
            with _naming_limits():
                return _Iterator(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """End the workers, even those that hang; the next epoch starts new ones."""
        iterator = _take_iterator(self)
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


def _identity(item: Any) -> Any:  # not a lambda: processes that are spawned have to pickle it
    return item


def _start_worker(records: Tensor | None, then: Callable[[int], None] | None, worker: int) -> None:
    for number in TRAINER_SIGNALS:  # SIGTERM too: `close` and a finalizer kill these workers
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _handle_thread_error
    info = get_worker_info()
    assert info is not None
    if records is not None:
        cast(WatchedDataset, info.dataset).current_sample.record = records[worker].numpy()
    if then is not None:
        then(worker)


def _handle_thread_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Handle an error of the thread in which multiprocessing passes memory on; nothing else in a worker calls this.

    The main process may be gone. If the thread cannot open a file, the main process would wait for ever.
    """
    if hits_file_limit(error):
        os._exit(errno.EMFILE)


class BatchPickler(ForkingPickler):
    """Pickler that copies small tensors: each one in shared memory takes a file and a connection to its worker."""

    def reducer_override(self, item: Any) -> Any:
        """Return how to copy a small tensor; other objects are passed as usual."""
        plain = type(item) is Tensor and item.layout == torch.strided
        if plain and item.nbytes <= SMALL and item.is_contiguous():  # a copy of others would have other strides
            with suppress(TypeError, RuntimeError):  # numpy lacks some dtypes, and gradients
                return torch.from_numpy, (item.numpy(),)
        return NotImplemented


class _Shared:
    """A batch whose large tensors have been moved to shared memory; unpickling this object returns the batch.

    Torch moves them in a thread of the queue, where an error is printed and the batch never comes. Here the error is
    raised where the batch is made, and reaches the main process.
    """

    def __init__(self, batch: Any) -> None:
        with _naming_limits():
            self.content = bytes(BatchPickler.dumps(batch))
            # A thread of multiprocessing opens files to pass the memory on.
            require_spare_files(SPARE_FILES)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.content,)  # of our own worker's batch, never of foreign bytes


def _kill(workers: Sequence[BaseProcess]) -> None:
    """Kill processes, which may ignore every other signal."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    for worker in workers:
        worker.join(1)


def _take_iterator(loader: DataLoader[Any]) -> Any:
    """Return the running iterator of a loader, which forgets it and starts another one next time; None without one."""
    iterator, loader._iterator = loader._iterator, None
    return iterator


def _forget_worker_pids(iterator: _MultiProcessingDataLoaderIter) -> None:
    """Keep torch from raising the death of a worker in the handler of SIGCHLD."""
    signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False


def _abandon(iterator: _MultiProcessingDataLoaderIter) -> None:
    """Kill the workers of an iterator of which only a part exists, and keep torch from ending it in its own way."""
    iterator._shutdown = True
    with suppress(ValueError):  # torch may not have registered them yet
        _forget_worker_pids(iterator)
    _kill(getattr(iterator, "_workers", []))


class _Iterator(_MultiProcessingDataLoaderIter):
    """Torch's iterator, with other errors when no batch arrives."""

    def __init__(self, loader: WorkerLoader) -> None:
        self._locate_row, self._records, self._longest_wait = loader.locate, loader.records.numpy(), loader.longest_wait
        self._waits_since: float | None = None
        try:
            super().__init__(loader)
        except BaseException:
            _abandon(self)
            raise
        _forget_worker_pids(self)
        # When Python exits, torch would send SIGTERM, which the workers ignore, and would wait for them. A finalizer
        # runs before that. It also runs when this object is garbage collected, where torch would wait as well.
        Finalize(self, _kill, [self._workers], exitpriority=0)

    def _try_get_data(self, timeout: float = POLL_SECONDS) -> Any:
        self._waits_since = self._waits_since or time.monotonic()
        try:
            with _naming_limits():
                got, data = super()._try_get_data(min(timeout, self._longest_wait))
        except (RuntimeError, OSError, EOFError):
            time.sleep(0.1)  # a dying process closes its files before it counts as dead
            self._raise_if_worker_died()
            raise
        if got:
            self._waits_since = None
        elif time.monotonic() - self._waits_since > self._longest_wait:
            error = self._timeout_error()
            _kill(self._workers)
            raise error
        return got, data

    def _raise_if_worker_died(self) -> None:
        for number, worker in enumerate(self._workers):
            if worker.is_alive():
                continue
            code = worker.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            row, since = self._records[number]
            sample = f" at {self._locate_row(int(row))[1]}" if since < torch.inf else ""
            use_less = "use fewer workers or smaller batches"
            way_out = {
                errno.EMFILE: f"too many open files; {file_limit()}",
                -signal.SIGKILL: f"the kernel's out-of-memory killer is likely; {use_less}",
                -signal.SIGBUS: f"/dev/shm is likely full; {use_less}, or give the container more of it (--shm-size)",
            }.get(
                code,
                "leave the sample out with data.select if it happens there again" if sample else "start the run again",
            )
            raise DataError(f"data worker {number} (pid {worker.pid}) {how}{sample}: {way_out}") from None

    def _timeout_error(self) -> DataError:
        late = f"no batch for {self._longest_wait:g} s"
        waited = time.monotonic() - self._records[:, 1]  # -inf where a worker is idle
        hanging = [number for number in np.argsort(-waited).tolist() if waited[number] > self._longest_wait / 2]
        rows = self._records[:, 0].astype(int).tolist()
        if hanging:
            at = [f"worker {n} has been at {self._locate_row(rows[n])[1]} for {waited[n]:.0f} s" for n in hanging[:3]]
            more = f" and {len(hanging) - 3} more workers at others" if len(hanging) > 3 else ""
            way_out = "raise data.timeout if this is expected, or leave the sample out with data.select"
            return DataError(f"{late}: {', '.join(at)}{more}; {way_out}")
        shards = list(dict.fromkeys(self._locate_row(row)[0] for row in rows if row >= 0))
        at = f" ({', '.join(shards[:3])}{' and others' if len(shards) > 3 else ''})" if shards else ""
        return DataError(
            f"{late}, and no worker hangs: the storage{at} is likely slow; raise data.timeout if this is expected"
        )
