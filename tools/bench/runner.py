"""Paired timing of two or more sides of a comparison.

Each side runs in its own new process from the first round to the last, so that its peak memory can be measured. The
sides take turns, A B A B: a slow phase of the machine slows both, so the ratio of the rates within a round is steadier
than the rates. The runner does not depend on what is measured.
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
    """One of the implementations that are compared.

    Attributes:
        name: name of its row in the table.
        make: function that is called once in the side's process and returns a function that runs a round and returns
            the units done. `make` must be picklable, since it is sent to a new process.
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
    """Measurements of a comparison, and their tables.

    Attributes:
        name: name of the benchmark and of its files.
        unit: name of the unit that a round counts, in the plural.
        seconds: by side, the seconds of each round.
        cpu: by side, the CPU seconds of its processes in each round, which other work on the machine affects less.
        units: by side, the units done in each round.
        peak_mib: by side, the largest sum in MiB of the peak resident sizes of its process and that process's children.
        reference: side that the ratios compare with.
        cores: CPU cores of each side.
        settings: arguments of the benchmark.
        notes: further lines of the page.
        facts: further results by name.
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
        """Return the units per second of each round."""
        return [units / seconds for units, seconds in zip(self.units[side], self.seconds[side])]

    def ratios(self, side: str, cpu: bool = False) -> list[float]:
        """Return the rate of a side divided by the reference's, of each round.

        Args:
            side: name of the side.
            cpu: True for units per CPU second instead of units per second.
        """
        times = self.cpu if cpu else self.seconds
        mine, other = (
            [units / seconds for units, seconds in zip(self.units[name], times[name])]
            for name in (side, self.reference)
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
        """Print the table and write NAME.json and NAME.md to the folder `out`."""
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{self.name}.json").write_text(json.dumps(self.as_json(), indent=1) + "\n", "utf-8")
        (out / f"{self.name}.md").write_text(self.as_markdown(), "utf-8")
        print(self.as_markdown(), end="")


def compare(
    name: str, unit: str, sides: Sequence[Side], reference: str, rounds: int, warmup: int = 1, cores: int = 1
) -> Result:
    """Run the sides in turns, each in its own process on the same cores, and time every round.

    Args:
        name: name of the benchmark.
        unit: name of the unit that a round counts, in the plural.
        sides: the sides.
        reference: name of the side that the ratios compare with.
        rounds: timed rounds of each side.
        warmup: rounds of each side that are not timed.
        cores: CPU cores of each side.
    """
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
                for values, value in zip((seconds, cpu, units), running[side.name].round()):
                    values[side.name].append(value)
        peaks = {side.name: running[side.name].peak / 2**20 for side in sides}
    finally:
        for side_running in running.values():
            side_running.stop()
    return Result(name, unit, seconds, cpu, units, peaks, reference, len(chosen))


class _Running:
    """Process of a side, controlled by a pipe."""

    def __init__(self, side: Side, cores: list[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self.peak = side.name, 0
        self.pipe, child_pipe = context.Pipe()
        # numpy's BLAS counts the cores of the machine when it is loaded, and its threads would wait for each other.
        os.environ["OPENBLAS_NUM_THREADS"] = str(len(cores))
        # The process is not a daemon, since daemons cannot start workers.
        self.process = context.Process(target=_serve, args=(side, cores, child_pipe))
        self.process.start()
        child_pipe.close()
        self._receive()

    def round(self) -> tuple[float, float, float]:
        """Run a round and return its seconds, CPU seconds and units."""
        self.pipe.send(True)
        return self._receive()

    def _receive(self) -> Any:
        """Wait for a message of the process and record its peak memory meanwhile."""
        assert self.process.pid is not None
        while not self.pipe.poll(0.05):  # Workers may end with the round, so measure while it runs.
            self.peak = max(self.peak, sum(process_memory(pid, "VmHWM") for pid in process_tree(self.process.pid)))
        try:
            succeeded, message = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of side {self.name!r} died") from None
        self.peak = max(self.peak, sum(process_memory(pid, "VmHWM") for pid in process_tree(self.process.pid)))
        if not succeeded:
            raise RuntimeError(f"side {self.name!r} failed:\n{message}")
        return message

    def stop(self) -> None:
        """End the process."""
        self.pipe.close()  # The process ends when its pipe is closed.
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(side: Side, cores: list[int], pipe: Connection) -> None:
    """Build a side, then run a round for each request; this is the main function of a side's process."""
    os.sched_setaffinity(0, cores)
    fork_workers()
    try:
        run = side.make()
        pipe.send((True, None))
        while pipe.recv():
            before, start = cpu_seconds(), time.perf_counter()
            units = run()
            seconds = time.perf_counter() - start
            pipe.send((True, (seconds, cpu_seconds() - before, units)))
    except (EOFError, BrokenPipeError):
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))


def fork_workers() -> None:
    """Let data loaders fork their workers, as in a normal program; a spawned process would spawn them."""
    multiprocessing.set_start_method("fork", force=True)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and all of its children, including those that have ended."""
    ended, tick = os.times(), os.sysconf("SC_CLK_TCK")
    total = time.process_time() + ended.children_user + ended.children_system
    for pid in process_tree(os.getpid())[1:]:
        try:
            total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15])) / tick
        except OSError:
            continue
    return total


def process_memory(pid: int, field: str) -> int:
    """Return one of the kernel's figures of a process in bytes, or 0 if the process has ended.

    Args:
        pid: the process id.
        field: name in /proc/PID/status, such as VmRSS.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def process_tree(pid: int) -> list[int]:
    """Return the ids of a process and all of its descendants, the process first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for process in found:  # The list grows while it is iterated over.
        found += children.get(process, [])
    return found


def extra_memory(side: Side) -> float:
    """Return the peak memory in MiB that the first round of a side adds to that of its inputs."""
    import torch

    run = side.make()
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = process_memory(os.getpid(), "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Reset the kernel's peak, VmHWM.
    run()
    return (process_memory(os.getpid(), "VmHWM") - before) / 2**20


def machine() -> dict[str, Any]:
    """Describe the machine: its processor, the cores that this process may use, and its memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(pages / 2**30, 1)}


def versions() -> dict[str, str]:
    """Return the versions of Python and of those packages in `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
