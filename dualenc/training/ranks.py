"""The ranks of a run among each other: what one is told all hear of; one that is gone or stands still is named."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dualenc.utils.errors import DataError
from dualenc.utils.text import one_line

STOPPED = 75  # exit status of a run that a signal stopped: EX_TEMPFAIL, it can go on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal stopped the run, which can go on; no failure, and nothing that catches failures should catch it."""


class Signals:
    """Takes note of the signals that stop a run, in place of dying of them."""

    def __init__(self) -> None:
        self.seen = ""
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """From now on they are noted. Only the main thread of a process can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.seen:
            self.seen = signal.Signals(number).name
            os.write(2, f"\n{self.seen}: saves after this step, and stops\n".encode())

    def restore(self) -> None:
        """From now on they mean what they meant before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def block(self) -> None:
        """From now on they do nothing: what was begun with the first one is not spoilt by a second."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class StopConsensus:
    """What any rank asks for, all ranks hear of after the same step, and none waits for the others at it.

    The answer to what is asked after one step is there after the next one: in between, it crosses the network beside
    the computation, from host to host.
    """

    def __init__(self, world: int) -> None:
        self._group: Any = dist.new_group(backend="gloo") if world > 1 else None
        self._asked: Tensor | None = None
        self._work: Any = None

    def hear(self) -> list[bool]:
        """What any rank has asked for last; nothing before the first question."""
        if self._asked is None:
            return []
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._asked.bool().tolist()

    def now(self, *flags: bool) -> list[bool]:
        """What any rank asks for at this moment, or has before; all of them wait for it."""
        before = self.hear()
        self.ask(*flags)
        found = self.hear()
        self._asked = None
        return [any(pair) for pair in zip(before or found, found)]

    def ask(self, *flags: bool) -> None:
        """Begins to ask; every rank has to."""
        self._asked = torch.tensor(flags, dtype=torch.uint8)
        if self._group is not None:
            self._work = dist.all_reduce(self._asked, dist.ReduceOp.MAX, group=self._group, async_op=True)


def meet_anew() -> None:
    """Lets the processes that torchrun has started again meet in a store that nobody has used.

    Torch 2.15 lets them meet in the agent's, where the addresses of the processes before them still are; gloo then
    waits for the dead until its timeout of half an hour. Tested on one machine.
    """
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        key = f"dualenc-port-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        agent = dist.TCPStore(host, port, is_master=False)
        if os.environ["RANK"] == "0":
            with socket.socket() as free:
                free.bind(("", 0))
                agent.set(key, str(free.getsockname()[1]))
        os.environ["MASTER_PORT"] = agent.get(key).decode()
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def gathered(value: Any, world: int) -> list[Any]:
    """A value of each rank, on all of them."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def mean_over_ranks(total: Tensor, number: float | Tensor, world: int) -> Tensor:
    """The mean of what all ranks have summed up, for a loss whose gradient is averaged over the ranks.

    Args:
        total: sums of this rank, of any shape.
        number: how many summands each has.
        world: ranks.

    Returns:
        As value the mean over all ranks' summands, 0 where there are none; as gradient this rank's share, times what
        averaging over the ranks divides by.
    """
    both = torch.stack([total.detach(), torch.as_tensor(number, device=total.device).to(total.dtype).expand_as(total)])
    if world > 1:
        dist.all_reduce(both)
    number = both[1].clamp(min=1)
    return both[0] / number + (total - total.detach()) * world / number


class Watchdog(threading.Thread):
    """Ends this process where another rank is dead or none goes on, and says which one and where.

    Each rank tells a store in memory, which torch keeps with the first rank or with torchrun, that it lives and how far
    it is. One thread talks with the store; this one judges, and waits for nothing.

    Args:
        rank, world: this process and how many there are.
        seconds: without a step, or for anything else than steps `PATIENCE` times as many, that mean a standstill.
    """

    PATIENCE = 6  # evaluation and saving may take longer than a step
    SILENCE = 60.0  # seconds without a sign of life that mean a process is dead or halted, if `seconds` are not fewer

    def __init__(self, rank: int, world: int, seconds: float) -> None:
        super().__init__(name="watch", daemon=True)
        self.rank, self.world, self.seconds = rank, world, seconds
        self.silence, self.period = min(self.SILENCE, seconds), min(2.0, seconds / 8)
        self._stop, self._news = threading.Event(), threading.Event()
        self._step, self._doing, self._since = 0, "begins", time.monotonic()
        self._beat = 0
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}  # what each rank told last, and when it was new
        self._talked, self._gone = time.monotonic(), False  # with the store: when last; whether it is gone
        # Of its own connection: one that waits, such as the main thread's, would let no other in.
        store = dist.distributed_c10d._get_default_store().clone()
        self._store = dist.PrefixStore(f"dualenc-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def at(self, step: int, doing: str) -> None:
        """Tells where the main thread is: after so many steps, and what it does now."""
        self._step, self._doing, self._since = step, doing, time.monotonic()
        self._news.set()

    def close(self) -> None:
        """Ends watching, since this rank is done."""
        self._doing = "done"
        self._stop.set()
        self._news.set()
        with suppress(Exception):  # whatever the store raises where its process is gone
            self._tell()

    def run(self) -> None:
        """Judges by what the other thread hears."""
        threading.Thread(target=self._talk, name="watch-talk", daemon=True).start()
        while not self._stop.wait(self.period / 4):
            if self._gone or time.monotonic() - self._talked > self.silence:
                self._end(f"{self._keeper_gone()}; this is rank {self.rank}, {self._place()}")
            if failed := self._failure():
                self._stop.wait(5 * self.period)  # the main thread has the same to tell, and may do it better
                self._end(failed)
            if gone := self._silent(self.silence):
                self._end(self._last_seen(gone))
            waited = time.monotonic() - self._since
            if waited > self.seconds * (1 if self._doing in ("loads", "trains") else self.PATIENCE):
                self._standstill(waited)

    def failed(self, error: BaseException) -> NoReturn:
        """Ends this rank because of an error: its own, or the one that another rank's end has caused.

        The error of the rank that failed first is shown whole, by that rank; the others name it in a line.
        """
        until = time.monotonic() + (10 * self.period if _of_the_network(error) else 0)
        while time.monotonic() < until:
            if told := self._failure():
                self._end(told)
            if self._gone:
                self._end(self._keeper_gone())
            if gone := self._silent(3.5 * self.period):
                self._end(self._last_seen(gone))
            time.sleep(self.period / 4)
        if not isinstance(error, SystemExit):  # by which a rank ends where another one says why
            if not isinstance(error, DataError):
                traceback.print_exception(error)
            line = f"rank {self.rank} failed {self._place()}: {type(error).__name__}: {one_line(error)[:1000]}"
            print(f"dualenc: error: {line}", file=sys.stderr, flush=True)
            self._stop.set()
            with suppress(Exception):
                self._tell(failed=line)
            time.sleep(2 * self.period)  # the first rank may keep what is told
        _exit()

    def _talk(self) -> None:
        try:
            while not self._stop.is_set():
                self._beat += 1
                self._tell()
                self._listen()
                self._talked = time.monotonic()
                self._news.wait(self.period)
                self._news.clear()
                self._stop.wait(self.period * max(0.1, self.world / 64))  # one process answers all
        except Exception:  # whatever the store raises where its process is gone
            self._gone = True

    def _tell(self, **more: str) -> None:
        told = {"beat": self._beat, "step": self._step, "doing": self._doing, **more}
        self._store.set(str(self.rank), json.dumps(told))

    def _listen(self) -> None:
        others = [rank for rank in range(self.world) if rank != self.rank]
        there = [rank for rank in others if rank in self._heard or self._store.check([str(rank)])]
        told = self._store.multi_get([str(rank) for rank in there]) if there else []
        for rank, text in zip(there, told, strict=True):
            new = json.loads(text)
            if rank not in self._heard or self._heard[rank][0] != new:
                self._heard[rank] = new, time.monotonic()

    def _place(self) -> str:
        return f"after step {self._step}, where it {self._doing}"

    def _keeper_gone(self) -> str:
        return f"the process that keeps the ranks together is gone or halted: rank 0, last seen {self._last_step(0)}"

    def _last_step(self, rank: int) -> str:
        return f"after step {self._heard[rank][0]['step']}" if rank in self._heard else "before its first step"

    def _failure(self) -> str:
        """What a rank has told of its failure, if one has."""
        return next((told["failed"] for told, _ in list(self._heard.values()) if "failed" in told), "")

    def _silent(self, seconds: float) -> list[int]:
        """The ranks that have told nothing new for so long, and are not done."""
        now = time.monotonic()
        heard = list(self._heard.items())
        return [rank for rank, (told, since) in heard if now - since > seconds and told["doing"] != "done"]

    def _last_seen(self, ranks: list[int]) -> str:
        where = "; ".join(f"rank {rank}, last seen {self._last_step(rank)}" for rank in ranks[:8])
        return f"killed, halted or out of reach: {where}"

    def _standstill(self, waited: float) -> NoReturn:
        """All ranks find it at about the same time; the one that holds the others up shows where it stands."""
        # Those who wait for others are as far as anybody, and in the middle of a step.
        places = {rank: (told["step"], told["doing"] == "trains") for rank, (told, _) in list(self._heard.items())}
        places[self.rank] = self._step, self._doing == "trains"
        last = min(places.values())
        late = [rank for rank, place in sorted(places.items()) if place == last]
        if len(late) == len(places):
            what = f"all {self.world} ranks stand still after step {self._step}"
        else:
            what = "; ".join(f"rank {rank} stands still after step {last[0]}" for rank in late[:8])
        if self.rank in late:
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            stack = "".join(traceback.format_stack(frame)[-6:]) if frame else ""
            print(f"rank {self.rank} stands at:\n{stack}", file=sys.stderr)
        if self.rank == 0:
            time.sleep(3 * self.period)  # it may keep what the others tell
        self._end(f"{what}, nothing for {waited:.0f} s (run.stall_seconds)")

    def _end(self, why: str) -> NoReturn:
        print(f"dualenc: error: {why}; go on with --ckpt_path auto", file=sys.stderr, flush=True)
        _exit()


def _of_the_network(error: BaseException) -> bool:
    """Whether an error is what a rank meets when another one has ended."""
    words = ("gloo", "nccl", "connection", "socket", "store", "peer", "broken pipe", "process group")
    return isinstance(error, RuntimeError | ConnectionError) and any(word in str(error).lower() for word in words)


def _exit() -> NoReturn:
    """Ends the process at once: an orderly end would wait for the other ranks."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
