"""Real runs in child processes that tests can kill. They are forked, so that nothing is imported twice."""

import itertools
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import SMOKE
from helpers import tiny_tokenizer, write_benchmark, write_shards
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger

import dualenc.training.checkpoint as checkpoint_module
import dualenc.utils.files as files_module
from dualenc.cli import main
from tools.soak import end_of, log_of

_PORTS = itertools.count()

TINY = [
    "--model.image.img_size", "16", "--model.image.name", "vit_tiny_patch16_224",
    "--model.image.overrides", '{"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}',
    "--model.text.width", "16", "--model.text.layers", "1", "--model.text.heads", "2", "--model.text.vocab_size", "300",
    "--model.embed_dim", "16", "--model.text.dropout", "0.1", "--model.patch_dropout", "0.25",
    "--model.optimizer.lr", "0.003", "--model.scheduler.warmup", "2",
    "--data.captions", "json.captions", "--data.batch_size", "4", "--data.workers", "0",
    "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu",
    "--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "4", "--run.every_n_steps", "2",
]  # fmt: skip


class Kill(Callback):
    """Callback that sends signals to its own process at a step of one rank.

    Args:
        step: number of completed steps.
        rank: rank of the process.
        where: "step" (after it), "validation" (during the next one), "batch" (before the step is computed).
        signals: numbers of the signals, in order.
        once: path of a file that is created by the first time and prevents a second one.
    """

    def __init__(
        self, step: int, rank: int = 0, where: str = "step", signals: Sequence[int] = (9,), once: str = ""
    ) -> None:
        self.step, self.rank, self.where, self.signals, self.once = step, rank, where, signals, once

    def _now(self, trainer: Any, where: str) -> None:
        if (where, trainer.global_step, trainer.global_rank) == (self.where, self.step, self.rank):
            if self.once and os.path.exists(self.once):
                return
            if self.once:
                Path(self.once).touch()
            for number in self.signals:
                os.kill(os.getpid(), number)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self._now(trainer, "batch")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._now(trainer, "step")

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        self._now(trainer, "validation")


class Break(Callback):
    """Callback that breaks a step of one rank: by an error, a halt, or a non-finite loss."""

    def __init__(self, step: int, rank: int = 0, how: str = "error", last: int = 0) -> None:
        self.step, self.rank, self.how, self.last = step, rank, how, last or step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *args: Any) -> None:
        if self.step <= trainer.global_step <= self.last and trainer.global_rank == self.rank:
            if self.how == "error":
                raise KeyError("something of the user's own")
            if self.how == "stall":
                time.sleep(600)
            if self.how in ("nan", "spike", "infinite loss"):
                real = module.loss

                def broken(*args: Any, **options: Any) -> Any:
                    module.loss = real
                    if self.how == "infinite loss":  # its gradient is finite
                        return real(*args, **options) + float("inf")
                    return real(*args, **options) * (1000.0 if self.how == "spike" else float("inf"))

                module.loss = broken

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if self.how == "weights" and trainer.global_step == self.step:
            next(module.parameters()).data.fill_(float("inf"))


class SignalsInSaves(Callback):
    """Callback that sends signals at each stage of saving, from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step != self.step:
            return

        def with_signals(real: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                for number in (15, 2, 10):
                    os.kill(os.getpid(), number)
                return real(*args, **options)

            return call

        checkpoint_module.torch = types.SimpleNamespace(**{**vars(torch), "save": with_signals(torch.save)})
        files_module.os = types.SimpleNamespace(
            **{**vars(os), "fsync": with_signals(os.fsync), "replace": with_signals(os.replace)}
        )


class KillAtSetup(Callback):
    """Callback that sends SIGINT during setup."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        os.kill(os.getpid(), 2)
        time.sleep(1)


LIMIT, LIMIT_AT = 0, 0  # largest file in bytes, and the step from which the limit holds


class FullDisk(Callback):
    """Callback that limits the size of files, from a step on; `until` another step, if it is given."""

    def __init__(self, until: int = -1) -> None:
        self.until = until

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step in (LIMIT_AT, self.until):
            limit = LIMIT if trainer.global_step == LIMIT_AT else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class FailingLogger(DummyLogger):
    """Logger of another library whose disk is full."""

    def log_metrics(self, *args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")


class Rows(Callback):
    """Callback that writes the rows of each step to one file per rank."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{trainer.global_rank}.jsonl", "a") as file:
            parts = batch if isinstance(batch, list) else [batch]  # micro-batches
            rows = [row for part in parts for row in part.rows.tolist()]
            file.write(json.dumps([trainer.global_step, rows]) + "\n")


def callbacks(*some: tuple[str, dict[str, Any]]) -> list[str]:
    """Return the option for callbacks, given as (name, arguments); those of this module by their bare names."""
    named = [{"class_path": name if "." in name else f"runs.{name}", "init_args": how} for name, how in some]
    return ["--trainer.callbacks", json.dumps(named)]


def data(folder: Path, seed: int) -> list[str]:
    """Write shards, an evaluation set and a tokenizer; return the arguments of a fit on them."""
    write_shards(
        folder / "shards", [16, 12, 9], seed, captions=3
    )  # 9 steps of 4 samples per epoch, and one sample left over
    write_shards(folder / "held_out", [10], seed + 1, captions=3)
    write_benchmark(folder / "set", seed, "retrieval", counts=(3,))
    tiny_tokenizer(16).save(folder / "tokenizer.json")
    paths = {"train": "shards", "val": "held_out", "tokenizer": "tokenizer.json"}
    where = [part for name, path in paths.items() for part in (f"--data.{name}", str(folder / path))]
    return ["fit", "--config", str(SMOKE), *TINY, "--seed_everything", str(seed % 1000), *where]


def everything(folder: Path, *more: tuple[str, dict[str, Any]]) -> list[str]:
    """Return the option for weight averaging, an evaluation set, and more callbacks."""
    sets = {"data": [str(folder / "set")], "every_n_epochs": 1, "every_n_steps": 5}
    return callbacks(("dualenc.training.EMA", {"decay": 0.9}), ("dualenc.training.Evaluation", sets), *more)


class Process:
    """The command `dualenc ARGUMENTS` in a forked process, whose output is written to a file."""

    def __init__(self, arguments: Sequence[str], log: Path, **environment: str) -> None:
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.pid = os.fork()
        if not self.pid:
            self._run(list(arguments), environment, out)
        os.close(out)

    def _run(self, arguments: list[str], environment: dict[str, str], out: int) -> None:
        status = 1
        try:
            for stream in (1, 2):
                os.dup2(out, stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            sys.argv = ["dualenc", *arguments]
            os.environ.update(environment)
            torch.set_num_threads(1)  # the parent's threads are not forked
            main(arguments)
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):  # the disk of the log may be full
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end; return its exit status, or minus the number of the signal that ended it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"not done in {seconds} s:\n{self.log.read_text()[-3000:]}")

    def text(self) -> str:
        return self.log.read_text()


def free_port() -> int:
    """Return a free port that no other test will take before the ranks meet there.

    Each pytest-xdist worker has its own range, below the ports that the kernel gives to anyone who asks for any port.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in _PORTS:
        port = 20_000 + 500 * (worker % 20) + number % 500
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the counter does not end")


def run(arguments: Sequence[str], folder: Path, world: int = 1, strategy: str = "ddp") -> list[int]:
    """Run with `world` ranks in `folder`/run; return the exit status of each rank."""
    return [process.wait() for process in begin(arguments, folder, world, strategy=strategy)]


def begin(
    arguments: Sequence[str], folder: Path, world: int = 1, other: str = "", strategy: str = "ddp"
) -> list[Process]:
    """Start a run as torchrun does. All ranks except the first get `other` as their last argument, if it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = ["--trainer.default_root_dir", str(folder / "run"), "--trainer.devices", str(world)]
    first = list(arguments)
    if world == 1:
        return [Process([*first, *rest], folder / "log-0")]
    rest += ["--trainer.strategy", strategy]
    port = free_port()
    return [
        Process(
            [*(first if not rank or not other else [*first[:-1], other]), *rest], folder / f"log-{rank}",
            TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world),
            RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", LOCAL_WORLD_SIZE=str(world),
        )
        for rank in range(world)
    ]  # fmt: skip


def logged(folder: Path) -> list[str]:
    """Return the log of a run without the times."""
    return log_of(folder / "run")


def end(folder: Path) -> dict[str, Any]:
    """Return the final state and results of a run."""
    return end_of(folder / "run")


def spoil(path: Path, how: str) -> None:
    """Damage a checkpoint."""
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    else:  # a newer format, with the right checksum
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint_module, "FORMAT", checkpoint_module.FORMAT + 1)
            checkpoint_module.write_checkpoint(path, torch.load(path, weights_only=True))
    assert path.read_bytes() != content


class Wait(Callback):
    """Callback that creates a file at a step, and waits until another one exists.

    Args:
        step: number of completed steps.
        reached: path of the file that is created.
        go_on: path of the file that is waited for.
    """

    def __init__(self, step: int, reached: str, go_on: str) -> None:
        self.step, self.reached, self.go_on = step, Path(reached), Path(go_on)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.reached.touch()
            parent = os.getppid()
            while not self.go_on.exists() and os.getppid() == parent:  # or the test has ended
                time.sleep(0.01)
