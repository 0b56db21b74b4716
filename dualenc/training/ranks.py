"""Coordination of the ranks of a run: stop signals, flags that all ranks share, and a watchdog for stalled ranks."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dualenc.utils.errors import DataError
from dualenc.utils.text import one_line

STOPPED = 75  # exit status of a run that a signal stopped: EX_TEMPFAIL, since it can be resumed
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(BaseException):
    """Stop of a run by a signal. The run can be resumed: this is not a failure, and `except Exception` lets it pass."""


class Signals:
    """Handler that records the signals that stop a run, so that they do not end the process at once.

    Attributes:
        received: name of the first signal, empty before it.
    """

    def __init__(self) -> None:
        self.received = ""
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Install the handler. Python allows it in the main thread only: in others this does nothing."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = signal.Signals(number).name
            # Not by `print`: a handler may interrupt another `print`, whose buffer must not be entered twice.
            os.write(2, f"\n{self.received} received: saving a checkpoint after this step, then stopping\n".encode())

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def block(self) -> None:
        """Block the signals, so that a second one cannot disturb the stop that the first one has begun."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class RankFlags:
    """Boolean flags that all ranks share: when any rank sets one, all ranks see it after the same step.

    The flags are all-reduced between the hosts while the devices compute the next step, so no rank waits: flags of one
    step are known after the next one.

    Args:
        world: number of ranks.
        timeout: longest wait for another rank; see `collective_timeout`.
    """

    def __init__(self, world: int, timeout: timedelta) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if world > 1 else None
        self._flags: Tensor | None = None
        self._work: Any = None

    def start(self, *flags: bool) -> None:
        """Start an all-reduce of this rank's flags. Every rank must call it."""
        self._flags = torch.tensor(flags, dtype=torch.uint8)
        if self._group is not None:
            self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def wait(self) -> list[bool]:
        """Return for each flag whether any rank has set it in the last all-reduce; empty before the first one."""
        if self._flags is None:
            return []
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._flags.bool().tolist()

    def reduce(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any rank sets it now, or has set it in the last all-reduce. All ranks wait."""
        before = self.wait()
        self.start(*flags)
        found = self.wait()
        self._flags = None
        return [any(pair) for pair in zip(before or found, found)]


def use_new_store_after_restart() -> None:
    """Let processes that torchrun has restarted form their process group with a new store.

    Torch 2.15 gives them the store of torchrun's agent, which still holds the addresses of the processes before the
    restart: gloo then waits for these until its timeout of half an hour. Tested on one machine.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        key = f"dualenc-port-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        agent = dist.TCPStore(host, port, is_master=False)
        if os.environ["RANK"] == "0":
            with socket.socket() as free:
                free.bind(("", 0))
                agent.set(key, str(free.getsockname()[1]))
        os.environ["MASTER_PORT"] = agent.get(key).decode()
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def all_gather_object(value: Any, world: int) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks, on every rank."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def raise_together(error: str, world: int) -> None:
    """End all ranks if one has failed; the first rank prints the error.

    Args:
        error: error of this rank; empty if it has none.
        world: number of ranks.

    Raises:
        DataError: If a rank has failed, on the first rank.
        SystemExit: If a rank has failed, on the others.
    """
    if found := next(filter(None, all_gather_object(error, world)), None):
        if world > 1 and dist.get_rank():
            raise SystemExit(1)
        raise DataError(found)


def mean_over_ranks(total: Tensor, numbers: Sequence[float | Tensor], world: int) -> Tensor:
    """Compute the mean over the summands of all ranks, for a loss whose gradient is averaged over the ranks.

    The host does not wait for the device.

    Args:
        total: (S,) sums of this rank; or 0-d, a single one.
        numbers: S numbers of summands of each sum, or sums of their weights; tensors are 0-d and on the device.
        world: number of ranks.

    Returns:
        The mean over the summands of all ranks, 0 where there are none. Its gradient is this rank's share times
        `world`, which the averaging over the ranks divides by.
    """
    # The device fills a tensor with a number. Copying a tensor from the host would wait for the work that runs there.
    filled = [n.to(total.dtype) if isinstance(n, Tensor) else total.new_full((), n) for n in numbers]
    both = torch.stack([total.detach(), torch.stack(filled).view_as(total)])
    if world > 1:
        dist.all_reduce(both)
    number = both[1].masked_fill(both[1] == 0, 1)
    return both[0] / number + (total - total.detach()) * world / number


class Watchdog(threading.Thread):
    """Thread that ends this process when another rank is dead or all ranks stall, and says which rank at which step.

    Each rank writes heartbeats with its step and phase to a store in memory, which torch keeps in the process of rank 0
    or of torchrun. A second thread talks to the store; this one checks the heartbeats and never waits for the network.

    Args:
        rank: rank of this process.
        world: number of ranks.
        seconds: time without a step after which a run is stalled; `SLOW_PHASES` times as long outside of training.
    """

    SLOW_PHASES = 6  # evaluation and saving may take longer than a step
    HEARTBEAT_TIMEOUT = 60.0  # seconds without a heartbeat that mean a dead or suspended process; at most `seconds`

    def __init__(self, rank: int, world: int, seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.world, self.seconds = rank, world, seconds
        self.timeout, self.period = min(self.HEARTBEAT_TIMEOUT, seconds), min(2.0, seconds / 8)
        self._closed, self._wake = threading.Event(), threading.Event()
        self._step, self._phase, self._since = 0, "starting", time.monotonic()
        self._beats = 0
        self._heartbeats: dict[int, tuple[dict[str, Any], float]] = {}  # the last one of each rank, and when it was new
        self._store_answered, self._store_failed = time.monotonic(), False
        # A connection of its own: one on which a thread waits, such as the main thread's, serves no other thread.
        store = dist.distributed_c10d._get_default_store().clone()
        self._store = dist.PrefixStore(f"dualenc-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def report(self, step: int, phase: str) -> None:
        """Report the progress of the main thread.

        Args:
            step: number of steps that are done.
            phase: "loading", "training", "evaluating" or "saving".
        """
        self._step, self._phase, self._since = step, phase, time.monotonic()
        self._wake.set()

    def close(self) -> None:
        """End the watchdog, since this rank is done."""
        self._phase = "done"
        self._closed.set()
        self._wake.set()
        with suppress(Exception):  # the store raises many kinds when its process has ended
            self._send_heartbeat()

    def run(self) -> None:
        """Check the heartbeats, which another thread exchanges."""
        threading.Thread(target=self._exchange_heartbeats, name="watchdog-store", daemon=True).start()
        while not self._closed.wait(self.period / 4):
            if self._store_failed or time.monotonic() - self._store_answered > self.timeout:
                self._end(f"{self._store_lost()}; this is rank {self.rank}, {self._progress()}")
            if failed := self._failure():
                self._closed.wait(5 * self.period)  # the main thread may fail for the same reason, and say more
                self._end(failed)
            if silent := self._silent_ranks(self.timeout):
                self._end(self._no_heartbeat(silent))
            waited = time.monotonic() - self._since
            if waited > self.seconds * (1 if self._phase in ("loading", "training") else self.SLOW_PHASES):
                self._end_stalled(waited)

    def fail(self, error: BaseException) -> NoReturn:
        """End this rank because of an error: its own, or one that another rank's end has caused.

        The rank that failed first prints its whole error, the others name it in one line.
        """
        until = time.monotonic() + (10 * self.period if _is_network_error(error) else 0)
        while time.monotonic() < until:
            if failed := self._failure():
                self._end(failed)
            if self._store_failed:
                self._end(self._store_lost())
            if silent := self._silent_ranks(3.5 * self.period):
                self._end(self._no_heartbeat(silent))
            time.sleep(self.period / 4)
        if not isinstance(error, SystemExit):  # a rank that ends with SystemExit leaves the message to another one
            if not isinstance(error, DataError):
                traceback.print_exception(error)
            line = f"rank {self.rank} failed {self._progress()}: {type(error).__name__}: {one_line(error)[:1000]}"
            print(f"dualenc: error: {line}", file=sys.stderr, flush=True)
            self._closed.set()
            with suppress(Exception):
                self._send_heartbeat(failed=line)
            time.sleep(2 * self.period)  # rank 0 may hold the store, which the others still have to read
        _exit()

    def _exchange_heartbeats(self) -> None:
        try:
            while not self._closed.is_set():
                self._beats += 1
                self._send_heartbeat()
                self._read_heartbeats()
                self._store_answered = time.monotonic()
                self._wake.wait(self.period)
                self._wake.clear()
                self._closed.wait(self.period * max(0.1, self.world / 64))  # one process answers all ranks
        except Exception:  # the store raises many kinds when its process has ended
            self._store_failed = True

    def _send_heartbeat(self, **more: str) -> None:
        heartbeat = {"beat": self._beats, "step": self._step, "phase": self._phase, **more}
        self._store.set(str(self.rank), json.dumps(heartbeat))

    def _read_heartbeats(self) -> None:
        others = [rank for rank in range(self.world) if rank != self.rank]
        present = [rank for rank in others if rank in self._heartbeats or self._store.check([str(rank)])]
        texts = self._store.multi_get([str(rank) for rank in present]) if present else []
        for rank, text in zip(present, texts, strict=True):
            new = json.loads(text)
            if rank not in self._heartbeats or self._heartbeats[rank][0] != new:
                self._heartbeats[rank] = new, time.monotonic()

    def _progress(self) -> str:
        return f"after step {self._step} while {self._phase}"

    def _last_step(self, rank: int) -> str:
        found = self._heartbeats.get(rank)
        return f"after step {found[0]['step']}" if found else "before its first step"

    def _store_lost(self) -> str:
        where = f"rank 0, last seen {self._last_step(0)}"
        return f"the process that holds the store of the process group is dead or suspended: {where}"

    def _failure(self) -> str:
        """Return the error line of a rank that has failed; empty if none has."""
        return next((beat["failed"] for beat, _ in list(self._heartbeats.values()) if "failed" in beat), "")

    def _silent_ranks(self, seconds: float) -> list[int]:
        """Return the ranks that are not done and have sent no new heartbeat for `seconds`."""
        now = time.monotonic()
        heartbeats = list(self._heartbeats.items())
        return [rank for rank, (beat, since) in heartbeats if now - since > seconds and beat["phase"] != "done"]

    def _no_heartbeat(self, ranks: list[int]) -> str:
        where = "; ".join(f"rank {rank}, last seen {self._last_step(rank)}" for rank in ranks[:8])
        return f"no heartbeat (killed, suspended or unreachable): {where}"

    def _end_stalled(self, waited: float) -> NoReturn:
        """End a stalled run, which all ranks find at about the same time. The rank that is behind prints its stack."""
        # Ranks that wait for another one are in the middle of a step, and as far as any rank.
        beats = {rank: beat for rank, (beat, _) in list(self._heartbeats.items())}
        progress = {rank: (beat["step"], beat["phase"] == "training") for rank, beat in beats.items()}
        progress[self.rank] = self._step, self._phase == "training"
        last = min(progress.values())
        behind = [rank for rank, place in sorted(progress.items()) if place == last]
        if len(behind) == len(progress):
            what = f"all {self.world} ranks stalled after step {self._step}"
        else:
            what = "; ".join(f"rank {rank} stalled after step {last[0]}" for rank in behind[:8])
        if self.rank in behind:
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            stack = "".join(traceback.format_stack(frame)[-6:]) if frame else ""
            print(f"stack of rank {self.rank}:\n{stack}", file=sys.stderr)
        if self.rank == 0:
            time.sleep(3 * self.period)  # rank 0 may hold the store, which the others still have to read
        self._end(f"{what}: no progress for {waited:.0f} s (run.stall_seconds)")

    def _end(self, why: str) -> NoReturn:
        print(f"dualenc: error: {why}; resume with --ckpt_path auto", file=sys.stderr, flush=True)
        _exit()


def collective_timeout(stall_seconds: float) -> timedelta:
    """Return a timeout of collectives that lets the watchdog end a stalled run first, since it names the stalled rank.

    Args:
        stall_seconds: see `Watchdog`.
    """
    return timedelta(seconds=Watchdog.SLOW_PHASES * stall_seconds + 60)  # The watchdog needs some seconds to end a run.


def _is_network_error(error: BaseException) -> bool:
    """Return whether an error is of the kind that a rank gets when another rank has ended."""
    words = ("gloo", "nccl", "connection", "socket", "store", "peer", "broken pipe", "process group")
    return isinstance(error, RuntimeError | ConnectionError) and any(word in str(error).lower() for word in words)


def _exit() -> NoReturn:
    """End the process at once: an orderly exit would wait for the other ranks."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
