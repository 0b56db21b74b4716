"""Paired timing of two or more sides of one comparison.

Each side lives in a process of its own from the first round to the last, made fresh, so that its peak memory is its
own. The sides take turns, A B A B: what slows the machine for a while slows both, and the ratio of a round's two rates
is steadier than either. The runner knows nothing of what is measured.
"""

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PACKAGES = ("dualenc", "torch", "torchvision", "pillow", "simplejpeg", "webdataset", "open_clip_torch", "transformers")


@dataclass(frozen=True)
class Side:
    """One of the things compared.

    Attributes:
        name: its row in the table.
        make: called once in the side's process; gives the callable that is one round and returns the units it did.
            Both must be importable by name, since they travel to a fresh process.
    """

    name: str
    make: Callable[[], Callable[[], float]]


@dataclass
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def show(self, form: str) -> str:
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass
class Result:
    """What the rounds gave, and how it is shown.

    Attributes:
        unit: what a round counts, in the plural.
        seconds, cpu, units: by side, one entry a round; `cpu` is the seconds that the side's processes computed, which
            other work on the machine lengthens less.
        peak_mib: by side, the largest sum of the peak resident sizes of its process and that process's children.
        reference: the side that the ratios compare with.
        settings: what the user chose.
        notes: further lines for the page; further keys for the JSON.
        facts: more results, by name.
    """

    name: str
    unit: str
    seconds: dict[str, list[float]]
    cpu: dict[str, list[float]]
    units: dict[str, list[float]]
    peak_mib: dict[str, float]
    reference: str
    cores: int
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def rates(self, side: str) -> list[float]:
        """Units a second, by round."""
        return [units / seconds for units, seconds in zip(self.units[side], self.seconds[side])]

    def ratios(self, side: str, cpu: bool = False) -> list[float]:
        """How many times as fast as the reference, by round; or how many times as much in the same CPU time."""
        times = self.cpu if cpu else self.seconds
        mine, other = (
            [units / seconds for units, seconds in zip(self.units[one], times[one])] for one in (side, self.reference)
        )
        return [a / b for a, b in zip(mine, other)]

    def as_json(self) -> dict[str, Any]:
        sides = {
            side: {
                "seconds": self.seconds[side],
                "cpu_seconds": self.cpu[side],
                "units": self.units[side],
                "rate": vars(Spread.of(self.rates(side))),
                "ratio": vars(Spread.of(self.ratios(side))),
                "cpu_ratio": vars(Spread.of(self.ratios(side, cpu=True))),
                "peak_mib": self.peak_mib[side],
            }
            for side in self.seconds
        }
        return {
            "name": self.name,
            "date": date.today().isoformat(),
            "command": " ".join(["python -m tools.bench", *sys.argv[1:]]),
            "machine": machine() | {"cores_a_side": self.cores},
            "versions": versions(),
            "settings": self.settings,
            "unit": self.unit,
            "reference": self.reference,
            "sides": sides,
            "facts": self.facts,
            "notes": self.notes,
        }

    def as_markdown(self) -> str:
        data = self.as_json()
        host = data["machine"]
        lines = [
            f"# {self.name}",
            "",
            f"| side | {self.unit} a second | times {self.reference} | in the same CPU time | peak memory, MiB |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {side} | {Spread.of(self.rates(side)).show('.1f')} | {Spread.of(self.ratios(side)).show('.2f')} "
            f"| {Spread.of(self.ratios(side, cpu=True)).show('.2f')} | {self.peak_mib[side]:.0f} |"
            for side in self.seconds
        ]
        rounds = len(self.seconds[self.reference])
        lines += [
            "",
            f"Median (quartiles) of {rounds} rounds, the sides in turns; the ratio is taken within each round.",
            *([""] if self.notes else []),
            *(f"- {note}" for note in self.notes),
            "",
            f"{data['date']}, `{data['command']}`, {self.cores} of {host['cores']} cores of {host['cpu']}, "
            f"{host['memory_gib']:.0f} GiB; {', '.join(f'{k} {v}' for k, v in data['versions'].items())}.",
        ]
        return "\n".join(lines) + "\n"

    def write(self, out: Path) -> None:
        """Prints the table; writes NAME.json and NAME.md into the folder `out`."""
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{self.name}.json").write_text(json.dumps(self.as_json(), indent=1) + "\n", "utf-8")
        (out / f"{self.name}.md").write_text(self.as_markdown(), "utf-8")
        print(self.as_markdown(), end="")


def compare(
    name: str, unit: str, sides: Sequence[Side], reference: str, rounds: int, warmup: int = 1, cores: int = 1
) -> Result:
    """Runs the sides in turns, each in its process on the same `cores` cores, and times every round."""
    chosen = sorted(os.sched_getaffinity(0))[-cores:]
    running: dict[str, _Running] = {}
    try:
        for side in sides:
            running[side.name] = _Running(side, chosen)
            for _ in range(warmup):
                running[side.name].round()
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        cpu: dict[str, list[float]] = {side.name: [] for side in sides}
        units: dict[str, list[float]] = {side.name: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                for kept, figure in zip((seconds, cpu, units), running[side.name].round()):
                    kept[side.name].append(figure)
        peaks = {side.name: running[side.name].peak / 2**20 for side in sides}
    finally:
        for side_running in running.values():
            side_running.stop()
    return Result(name, unit, seconds, cpu, units, peaks, reference, len(chosen))


class _Running:
    """A side's process, seen from outside."""

    def __init__(self, side: Side, cores: list[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self.peak = side.name, 0
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(side, cores, theirs))  # no daemon: it may have workers
        self.process.start()
        theirs.close()
        self._answer()

    def round(self) -> tuple[float, float, float]:
        """Seconds, CPU seconds and units of one more round."""
        self.pipe.send(True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.pid is not None
        while not self.pipe.poll(0.05):  # workers may end with their round: look while they live
            self.peak = max(self.peak, sum(process_memory(pid, "VmHWM") for pid in family(self.process.pid)))
        try:
            fine, answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"side {self.name!r} died") from None
        self.peak = max(self.peak, sum(process_memory(pid, "VmHWM") for pid in family(self.process.pid)))
        if not fine:
            raise RuntimeError(f"side {self.name!r} failed:\n{answer}")
        return answer

    def stop(self) -> None:
        self.pipe.close()  # the side reads the end, and ends
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(side: Side, cores: list[int], pipe: Connection) -> None:
    """A side's process: build, then one round whenever asked."""
    os.sched_setaffinity(0, cores)
    workers_fork()
    try:
        run = side.make()
        pipe.send((True, None))
        while pipe.recv():
            before, start = _cpu_seconds(), time.perf_counter()
            did = run()
            took = time.perf_counter() - start
            pipe.send((True, (took, _cpu_seconds() - before, did)))
    except (EOFError, BrokenPipeError):
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))


def workers_fork() -> None:
    """Lets data loaders start workers as they do in a program of their own: a fresh process hands its own way on."""
    multiprocessing.set_start_method("fork", force=True)


def _cpu_seconds() -> float:
    """Of this process and all of its children, those that ended too."""
    ended, tick = os.times(), os.sysconf("SC_CLK_TCK")
    total = time.process_time() + ended.children_user + ended.children_system
    for pid in family(os.getpid())[1:]:
        try:
            total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15])) / tick
        except OSError:
            continue
    return total


def process_memory(pid: int, what: str) -> int:
    """Bytes of one of the kernel's figures of a process, such as VmRSS; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:")), 0)


def family(pid: int) -> list[int]:
    """A process, its children and theirs."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def extra_memory(side: Side) -> float:
    """MiB that the first step takes beyond what was there before it, at its most."""
    import torch

    run = side.make()
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = process_memory(os.getpid(), "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    run()
    return (process_memory(os.getpid(), "VmHWM") - before) / 2**20


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(pages / 2**30, 1)}


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
