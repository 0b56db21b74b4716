"""Benchmark of `dualenc fit` against a plain training loop, by OpenMP's settings, alone or next to busy processes.

Each side of a round is a program of its own, since OpenMP reads its settings when torch is loaded.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback
from torch.nn.utils import clip_grad_norm_

from dualenc.cli.fit import trainer_command
from dualenc.data import Augment, Loader, PairDataset, Preprocess, ShardIndex, Tokenizer
from dualenc.data.pairs import all_captions
from dualenc.losses import clip_loss
from dualenc.models import DualEncoder, ImageConfig, TextConfig
from dualenc.training import WarmupCosine
from dualenc.training.optim import parameter_groups
from tools.bench.runner import Result

Loop = Literal["plain", "fit"]
WARMUP = 10  # steps that are not measured: the workers start, and torch chooses its kernels


def fit(
    shards: Path,
    settings: Path = Path("configs/smoke.yaml"),
    steps: int = 200,
    rounds: int = 5,
    threads: tuple[int, ...] = (2, 1),
    spins: tuple[str, ...] = ("", "1000"),
    loops: tuple[Loop, ...] = ("plain", "fit"),
    neighbors: int = 0,
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed",
    out: Path = Path("runs/bench"),
) -> None:
    """Measure the steps per second of `dualenc fit` and of a plain loop over the same loader, model and optimizer.

    Args:
        shards: training data, such as the scenes of `dualenc demo`.
        settings: configuration of a `ContrastiveTask` on images and captions.
        steps: measured steps of a round.
        rounds: rounds; in each one all sides take turns.
        threads: values of OMP_NUM_THREADS.
        spins: values of GOMP_SPINCOUNT; an empty one for libgomp's default.
        loops: the plain loop, `dualenc fit`, or both.
        neighbors: other processes that keep a core busy meanwhile.
        precision: precision of the trainer.
        out: folder for fit.json and fit.md.
    """
    sides: dict[str, tuple[Loop, int, str]] = {
        f"{loop}, {count} threads, spin count {spin or 'default'}": (loop, count, spin)
        for count in threads
        for spin in spins
        for loop in loops
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    with busy(neighbors):
        for _ in range(rounds):
            for name, (loop, count, spin) in sides.items():
                found = _measure(loop, shards, settings, steps, precision, count, spin)
                seconds[name].append(found["seconds"])
                cpu[name].append(found["cpu"])
                print(f"{name}: {steps / found['seconds']:.2f} steps/s, {found['cpu'] / steps * 1e3:.1f} CPU ms a step")
    units, peak = {name: [float(steps)] * rounds for name in sides}, dict.fromkeys(sides, float("nan"))
    result = Result("fit", "steps", seconds, cpu, units, peak, next(iter(sides)), len(os.sched_getaffinity(0)))
    result.settings = {"settings": str(settings), "steps": steps, "neighbors": neighbors, "precision": precision}
    result.notes = [f"{settings}, {precision}, {neighbors} busy neighbors; CPU time without that of the data workers."]
    result.write(out)


@contextmanager
def busy(processes: int) -> Any:
    """Keep cores busy inside the block, one for each process."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def _measure(
    loop: Loop, shards: Path, config: Path, steps: int, precision: str, threads: int, spin: str
) -> dict[str, float]:
    """Run a side in a program of its own, and return its seconds and CPU seconds."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    own = {"GOMP_SPINCOUNT": spin} if spin else {}
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.fit", loop, str(shards), str(config), str(steps), precision],
        env={**given, **own, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


class Clock(Callback):
    """Clock of the measured steps; prints their seconds and the CPU seconds of this process as JSON."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.start: tuple[float, float] = (0.0, 0.0)

    def tick(self, step: int) -> None:
        """Note that a step is done."""
        if step == WARMUP:
            self.start = time.perf_counter(), time.process_time()
        elif step == WARMUP + self.steps:
            seconds, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
            print(json.dumps({"seconds": seconds, "cpu": cpu}), flush=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note that a step is done."""
        self.tick(trainer.global_step)


def run_fit(shards: str, config: str, steps: int, precision: str) -> None:
    """Train by `dualenc fit`, without evaluation."""
    with TemporaryDirectory() as folder:
        callback = {"class_path": "tools.bench.fit.Clock", "init_args": {"steps": steps}}
        trainer_command([
            "fit", "--config", config, "--data.train", shards, "--data.val", "null",
            "--trainer.default_root_dir", folder, "--trainer.max_steps", str(WARMUP + steps),
            "--trainer.max_epochs", "1000", "--trainer.precision", precision, "--trainer.accelerator", "cpu",
            "--trainer.callbacks", json.dumps([callback]),
        ])  # fmt: skip


def run_plain(shards: str, config: str, steps: int, precision: str) -> None:
    """Train by the loop that a program without a trainer would have."""
    content = yaml.safe_load(Path(config).read_text("utf-8"))
    model_args, data_args = content["model"]["init_args"], content["data"]["init_args"]
    optimizer_args, schedule = model_args["optimizer"]["init_args"], model_args["scheduler"]["init_args"]
    torch.manual_seed(0)
    text = TextConfig(**model_args["text"])
    model = DualEncoder(ImageConfig(**model_args["image"]), text, model_args["embed_dim"]).train()
    preprocess = Preprocess(model.config.image.img_size, **model.image.data_config)
    optimizer = torch.optim.AdamW(parameter_groups(model), **optimizer_args)
    scheduler = WarmupCosine(optimizer, WARMUP + steps, **schedule)
    index, captions = ShardIndex.build(shards), data_args.get("captions", "auto")
    tokenizer = Tokenizer.train(all_captions(index, captions), text.vocab_size, text.context_length)
    augment = Augment(preprocess.size, **data_args.get("augment", {}).get("init_args", {}))
    dataset = PairDataset(index, captions, tokenizer, augment, 0)
    loader = Loader(dataset, data_args["batch_size"], seed=0, workers=data_args.get("workers", 2))
    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    clock, step = Clock(steps), 0
    while step < WARMUP + steps:
        for batch in loader:
            with mixed:
                loss = clip_loss(*model(preprocess.normalize(batch.images), batch.tokens))
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), content["trainer"].get("gradient_clip_val", 1.0))
            optimizer.step()
            scheduler.step()
            model.logits.clamp_scale()
            if step % 10 == 0:
                print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr)
            step += 1
            clock.tick(step)
            if step == WARMUP + steps:
                break
    loader.close()


if __name__ == "__main__":
    {"plain": run_plain, "fit": run_fit}[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
