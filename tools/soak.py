"""Soak test of exact resume: disturb runs of the demo's configuration at random times, compare with an unbroken run.

    python tools/soak.py --minutes 20

Each attempt of a run is a process with a random number of data workers. After a random time it gets SIGKILL, or, one
time in four, a signal that asks it to stop: while it starts, trains, saves, evaluates or writes its report. The next
attempt resumes with `--ckpt_path auto`. Two more kinds of trouble come at random: the same command is started a second
time while the first process lives, which must be refused; and the disk is full for a while, which the run must survive.
For the second kind the runs are on a small file system in memory, if this machine lets a user mount one (`unshare`).

The log, weights, optimizer and model directories of a finished run must equal those of the unbroken run to the bit;
then another run begins. A run that finished on a full disk, without its last checkpoint, is resumed. If a full disk has
kept a best model from being written, `best/` is left out of the comparison.
The exit status is 1 if any run differs.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dualenc.cli import main
from dualenc.data.prepare.scenes import write_scenes
from dualenc.training.checkpoint import list_checkpoints, read_checkpoint
from dualenc.training.ranks import STOPPED

SCENES = 2_000
EPOCHS = 8
GENTLE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GENTLY, FULL, TWICE = 0.25, 0.4, 0.3  # shares of the attempts


def exact(value: Any) -> Any:
    """Convert any part of a checkpoint to a form whose equality means equality to the bit."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.blake2b(data, digest_size=16).hexdigest()
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {key: exact(part) for key, part in value.items() if key != "seconds"}  # The wall time of training.
    if isinstance(value, list | tuple):
        return [exact(part) for part in value]
    return value


def log_of(run: Path) -> list[str]:
    """Return the lines of `metrics.csv` without those that depend on time."""
    lines = (run / "metrics.csv").read_text().splitlines()
    return [line for line in lines if "samples_per_second" not in line]


def end_of(run: Path) -> dict[str, Any]:
    """Return the newest checkpoint: weights, optimizer, averaged weights, schedule, progress and accumulated values."""
    content = read_checkpoint(list_checkpoints(run / "checkpoints")[0])
    loops = content.pop("loops")["fit_loop"]
    progress = loops["epoch_loop.automatic_optimization.optim_progress"]
    return exact({**content, "progress": progress, "loader": loops["state_dict"]["combined_loader"]})


def models_of(run: Path) -> dict[str, str]:
    """Return the hashes of the weights in the model directories."""
    paths = [run / name / "model.safetensors" for name in ("best", "last")]
    return {path.parent.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def without_best(value: Any) -> Any:
    """Return part of a result of `end_of` or `models_of` without what tells which model was the best."""
    if isinstance(value, dict):
        return {key: without_best(part) for key, part in value.items() if not str(key).startswith("best")}
    return [without_best(part) for part in value] if isinstance(value, list) else value


def differences(run: Path, unbroken: Path, best: bool) -> list[str]:
    """Return the parts of a finished run that differ from the unbroken one.

    Args:
        run: run directory.
        unbroken: run directory of the unbroken run.
        best: whether to compare what depends on the best model.
    """
    kept = (lambda value: value) if best else without_best
    parts = {"log": log_of, "checkpoint": end_of, "models": models_of}
    return [name for name, part in parts.items() if kept(part(run)) != kept(part(unbroken))]


def start(arguments: list[str], log: Path) -> int:
    """Start `dualenc ARGUMENTS` in a forked process, with its output in a log, and return its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(out, stream)
        torch.set_num_threads(1)  # A forked process does not have its parent's threads.
        sys.argv = ["dualenc", *arguments]
        main(arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int | None:
    """Return the exit status of a child process, or minus the number of the signal that ended it; None if it lives."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


class Disk:
    """A small file system that can be filled.

    Args:
        folder: where it is mounted; it is a plain folder, which cannot be filled, if `size` is 0.
        size: size in bytes.
    """

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.can_fill, self.filled = folder, size > 0, False
        self.filler = folder / "filler"
        if size:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

    def fill(self) -> None:
        """Take all space that is free now."""
        self.filled = True
        with open(self.filler, "ab", buffering=0) as file:
            for block in (1 << 20, 1 << 12):
                try:
                    while file.write(bytes(block)) == block:
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        """Give the space back."""
        self.filled = False
        self.filler.unlink(missing_ok=True)


class Soak:
    """The unbroken run, and the runs that are compared with it.

    Args:
        out: folder for all files, which is emptied first.
        seed: seed of the trouble.
        longest: largest time in seconds until an attempt is killed.
        mounts: whether a small file system can be mounted.
    """

    def __init__(self, out: Path, seed: int, longest: float, mounts: bool) -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        self.out, self.longest, self.chance = out, longest, random.Random(seed)
        self.counts: Counter[str] = Counter()
        write_scenes(out / "scenes", train=SCENES)
        sets = {"data": [str(out / "scenes" / "retrieval")], "every_n_epochs": 3, "every_n_steps": 70}
        callbacks = [
            {"class_path": "dualenc.training.EMA", "init_args": {"decay": 0.99}},
            {"class_path": "dualenc.training.Evaluation", "init_args": sets},
        ]
        config = Path(__file__).parents[1] / "configs" / "smoke.yaml"
        self.fit = [
            "fit", "--config", str(config), "--data.train", str(out / "scenes"),
            "--model.image.name", "vit_tiny_patch16_224",
            "--trainer.max_epochs", str(EPOCHS), "--trainer.accelerator", "cpu", "--trainer.devices", "1",
            "--trainer.log_every_n_steps", "1", "--trainer.callbacks", json.dumps(callbacks),
            "--model.patch_dropout", "0.25", "--model.text.dropout", "0.1", "--run.every_n_steps", "17",
            "--trainer.val_check_interval", "13", "--run.failed_saves", "1000000",
        ]  # fmt: skip
        began = time.monotonic()
        self.unbroken, log = out / "unbroken", out / "unbroken.log"
        pid = start([*self.fit, "--data.workers", "1", "--trainer.default_root_dir", str(self.unbroken)], log)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 0, log.read_text()
        self.seconds = time.monotonic() - began
        size = sum(path.stat().st_size for path in self.unbroken.rglob("*") if path.is_file())
        self.disk = Disk(out / "disk", 3 * size if mounts else 0)  # a checkpoint and a model more than a run keeps

    def run(self, name: str) -> list[str]:
        """Run one run with trouble until it is finished; return what is wrong with it."""
        folder, log = self.disk.folder / name, self.out / f"{name}.log"
        wrong: str | None = None
        while wrong is None or (not wrong and not self.has_last_checkpoint(folder)):
            workers = str(self.chance.choice([0, 1, 2]))
            again = ["--data.workers", workers, "--trainer.default_root_dir", str(folder), "--ckpt_path", "auto"]
            wrong = self.attempt([*self.fit, *again], folder, log)
        if wrong:
            return [f"{wrong}: {log.read_text()[-2000:]}"]
        best_lost = f"{folder / 'best'} cannot be written" in log.read_text()
        self.counts["runs that lost a best model"] += best_lost
        found = differences(folder, self.unbroken, not best_lost)
        starts = json.loads((folder / "run.json").read_text())["restarts"]
        print(f"{name}: {starts} restarts, {'NOT EQUAL' if found else 'equal'}; {dict(self.counts)}", flush=True)
        if found:
            shutil.copytree(folder, self.out / name)
        shutil.rmtree(folder)
        return found

    def has_last_checkpoint(self, folder: Path) -> bool:
        """Return whether a finished run has the checkpoint of its end, for which a full disk may have had no room."""
        newest = [list_checkpoints(run / "checkpoints")[0].name for run in (folder, self.unbroken)]
        return newest[0] == newest[1]

    def attempt(self, command: list[str], folder: Path, log: Path) -> str | None:
        """Start a run once, with some of all trouble; return "" if it finished, None if not, or what is wrong."""
        chance, began = self.chance, time.monotonic()
        kill = began + chance.uniform(0, self.longest)
        how = chance.choice(GENTLE) if chance.random() < GENTLY else signal.SIGKILL
        full = sorted(began + chance.uniform(0, self.longest) for _ in range(2))
        fills = self.disk.can_fill and chance.random() < FULL
        again = began + chance.uniform(0, self.longest) if chance.random() < TWICE else kill
        first, second = start(command, log), 0
        code, was_full = None, False
        try:
            while (code := ended(first)) is None and time.monotonic() < kill:
                time.sleep(0.005)
                now = time.monotonic()
                if fills and full[0] < now < full[1]:
                    self.counts["full disks"] += not was_full
                    was_full = True
                    self.disk.fill()
                elif self.disk.filled:
                    self.disk.free()
                if not second and now > again and _holds(folder, first):
                    second = start(command, log.with_suffix(".second"))
                if second > 0 and (status := ended(second)) is not None:
                    second, self.counts["second starts"] = -1, self.counts["second starts"] + 1
                    if status != 2 and (code := ended(first)) is None:
                        return f"the second start ended with {status}"
            killed = code is None
            if killed:
                os.kill(first, how)
                code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
                self.counts[how.name] += 1
        finally:
            if second > 0:
                os.kill(second, signal.SIGKILL)
                os.waitpid(second, 0)
            self.disk.free()
        if code == 0:
            return ""
        # Before training begins, a signal has its default effect in Python or in the system. A run whose last files
        # do not fit on the disk fails and writes them when it is started again.
        expected = code in (-how, STOPPED) or (killed and how in GENTLE) or (was_full and code == 1)
        return None if expected else f"ended with {code}"

    def report(self, runs: int, wrong: int, seconds: float, seed: int) -> None:
        """Write and print the figures."""
        signals = {how.name: self.counts[how.name] for how in (signal.SIGKILL, *GENTLE)}
        report = {
            "kills": sum(signals.values()),
            "by_signal": signals,
            **{name: number for name, number in self.counts.items() if name not in signals},
            "runs": runs,
            "not_equal": wrong,
            "steps_a_run": len([line for line in log_of(self.unbroken) if "train/loss" in line]),
            "seconds_unbroken": round(self.seconds, 1),
            "seconds": round(seconds),
            "seed": seed,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
        }
        (self.out / "soak.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report, indent=2))


def _holds(folder: Path, pid: int) -> bool:
    """Return whether a process says that it holds the lock of a run directory."""
    try:
        return json.loads((folder / ".lock").read_text())["process"] == pid
    except (OSError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="time after which no further run begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=20, help="largest time in seconds until a process is killed")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--mounts", action="store_true", help=argparse.SUPPRESS)  # inside `unshare`
    given = parser.parse_args()
    space = ["unshare", "--map-root-user", "--mount"]
    if not given.mounts and shutil.which("unshare") and not subprocess.run([*space, "true"], check=False).returncode:
        os.execvp("unshare", [*space, sys.executable, *sys.argv, "--mounts"])
    if not given.mounts:
        print("no file system can be mounted here: full disks are left out")
    soak = Soak(given.out, given.seed, given.longest, given.mounts)
    print(f"unbroken: {soak.seconds:.0f} s", flush=True)
    began, runs, wrong = time.monotonic(), 0, 0
    while time.monotonic() - began < 60 * given.minutes:
        runs += 1
        if problems := soak.run(f"run-{runs}"):
            wrong += 1
            print(f"run-{runs}: {', '.join(problems)}", flush=True)
    soak.report(runs, wrong, time.monotonic() - began, given.seed)
    sys.exit(1 if wrong else 0)
