"""Soak test of exact resume: kill runs of the demo's configuration at random times, compare with an unbroken run.

    python tools/soak.py --minutes 20

Each attempt of a run is a process with a random number of data workers. After a random time it gets SIGKILL, or, one
time in four, a signal that asks it to stop: while it starts, trains, saves, evaluates or writes its report. The next
attempt resumes with `--ckpt_path auto`. The log, weights, optimizer and model directories of a finished run must equal
those of the unbroken run to the bit; then another run begins. The exit status is 1 if any run differs.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
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
    return {path.parent.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in paths}


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


def soak(out: Path, minutes: float, seed: int, longest: float) -> bool:
    """Run the test and write `soak.json`.

    Args:
        out: folder of the runs, which is emptied first.
        minutes: time after which no further run is started.
        seed: seed of signals, times and numbers of workers.
        longest: largest time in seconds until an attempt is killed.

    Returns:
        True if every run equals the unbroken one.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_scenes(out / "scenes", train=SCENES)
    sets = {"data": [str(out / "scenes" / "retrieval")], "every_n_epochs": 3, "every_n_steps": 70}
    callbacks = [
        {"class_path": "dualenc.training.EMA", "init_args": {"decay": 0.99}},
        {"class_path": "dualenc.training.Evaluation", "init_args": sets},
    ]
    config = Path(__file__).parents[1] / "configs" / "smoke.yaml"
    fit = [
        "fit", "--config", str(config), "--data.train", str(out / "scenes"),
        "--model.image.name", "vit_tiny_patch16_224",
        "--trainer.max_epochs", str(EPOCHS), "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.log_every_n_steps", "1", "--trainer.callbacks", json.dumps(callbacks),
        "--model.patch_dropout", "0.25", "--model.text.dropout", "0.1", "--run.every_n_steps", "17",
        "--trainer.val_check_interval", "13",
    ]  # fmt: skip
    began = time.monotonic()
    unbroken = out / "unbroken"
    pid = start([*fit, "--data.workers", "1", "--trainer.default_root_dir", str(unbroken)], out / "unbroken.log")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, (out / "unbroken.log").read_text()
    took = time.monotonic() - began
    print(f"unbroken: {took:.0f} s", flush=True)

    chance = random.Random(seed)
    began, runs, wrong = time.monotonic(), 0, 0
    kills: Counter[str] = Counter()
    while time.monotonic() - began < 60 * minutes:
        runs += 1
        run, log = out / f"run-{runs}", out / f"run-{runs}.log"
        done = False
        while not done:
            workers = str(chance.choice([0, 1, 2]))
            again = ["--data.workers", workers, "--trainer.default_root_dir", str(run), "--ckpt_path", "auto"]
            pid = start([*fit, *again], log)
            how = chance.choice(GENTLE) if chance.random() < 0.25 else signal.SIGKILL
            until = time.monotonic() + chance.uniform(0, longest)
            found = 0
            while not found and time.monotonic() < until:
                time.sleep(0.005)
                found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                os.kill(pid, how)
                _, status = os.waitpid(pid, 0)
                kills[how.name] += 1
            code = os.waitstatus_to_exitcode(status)
            done = code == 0
            # Before training begins, a signal has its default effect in Python or in the system.
            if code not in (0, -how, STOPPED) and not (not found and how in GENTLE):
                print(f"run {runs} ended with {code}: {log.read_text()[-2000:]}")
                wrong += 1
                break
        same = done and (
            log_of(run) == log_of(unbroken)
            and end_of(run) == end_of(unbroken)
            and models_of(run) == models_of(unbroken)
        )
        wrong += done and not same
        starts = json.loads((run / "run.json").read_text())["restarts"]
        print(f"run {runs}: {starts} restarts, {'equal' if same else 'NOT EQUAL'}; {kills.total()} kills", flush=True)
        if same:
            shutil.rmtree(run)
    report = {
        "kills": kills.total(),
        "by_signal": dict(kills),
        "runs": runs,
        "not_equal": wrong,
        "steps_a_run": len([line for line in log_of(unbroken) if "train/loss" in line]),
        "seconds_unbroken": round(took, 1),
        "seconds": round(time.monotonic() - began),
        "seed": seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    (out / "soak.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return not wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=20, help="largest time in seconds until a process is killed")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()
    sys.exit(0 if soak(given.out, given.minutes, given.seed, given.longest) else 1)
