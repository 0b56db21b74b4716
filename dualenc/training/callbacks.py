"""What a run writes and measures beside its training."""

import csv
import json
import os
import platform
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from dualenc.data import BenchmarkSet, DataError
from dualenc.embedder import Embedder
from dualenc.training.contrastive import ContrastiveTask, say


class MetricsFile(Logger):
    """Appends `step,metric,value` lines to `metrics.csv`: one number a line, so that new metrics need no new header."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"

    @property
    def name(self) -> str:
        """No folder of its own: the run directory is the logger's."""
        return ""

    @property
    def version(self) -> str:
        """See `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The file."""
        return self.path

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes the numbers of a step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "metric", "value"])
            writer.writerows((step, name, repr(float(value))) for name, value in metrics.items() if name != "epoch")

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is in `config.yaml`."""


def embedder_of(trainer: Trainer, task: ContrastiveTask) -> Embedder:
    """The task's model as it stands, for evaluation or saving."""
    tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
    return Embedder(task.model, tokenizer, task.preprocess, name=str(trainer.default_root_dir))


class Evaluation(Callback):
    """Zero-shot classification and retrieval on evaluation sets after each validation.

    Args:
        data: folders in the layout of CLIP_benchmark.
        workers: processes that decode.

    The numbers are those of `dualenc zeroshot` and `dualenc retrieval`, logged as `SET/METRIC`. They are computed on
    the first rank while the others wait.
    """

    def __init__(self, data: Sequence[str], workers: int = 0) -> None:
        self.folders, self.workers = list(data), workers
        self.sets: list[BenchmarkSet] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Opens the sets, so that a wrong one stops the run before it begins."""
        self.sets = [BenchmarkSet.open(folder) for folder in self.folders]
        names = [data.name for data in self.sets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"two evaluation sets are called {twice.pop()!r}: their numbers would be mixed up")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures, beside the held-out pairs."""
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures, where no pairs are held out and so no validation runs."""
        if not trainer.enable_validation:
            assert isinstance(pl_module, ContrastiveTask)
            pl_module.pause_clock()
            self._measure(trainer, pl_module)
            pl_module.start_clock()

    on_test_epoch_end = on_validation_epoch_end

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ContrastiveTask)
        results: Any = None
        if trainer.is_global_zero:
            embedder = embedder_of(trainer, pl_module)
            try:
                results = [embedder.evaluate(data, self.workers) for data in self.sets]
            except ValueError as error:
                results = str(error)
        results = trainer.strategy.broadcast(results)  # to every rank, so that all decide alike
        if isinstance(results, str):
            raise DataError(results)
        for result in results:
            pl_module.publish({f"{result['dataset']}/{name}": value for name, value in result["metrics"].items()})


class RunDirectory(Checkpoint):
    """Keeps the run directory: configuration, record, checkpoint, and the model directories `best/` and `last/`.

    Args:
        monitor: the metric whose largest value names `best/`, written whenever it improves. Where it is not measured
            there is no best, and only `last/` is written, at the end.

    `checkpoints/last.ckpt` is written at the end of each epoch.
    """

    def __init__(self, monitor: str = "val/mrr") -> None:
        self.monitor = monitor
        self.best_value = -float("inf")
        self.config_yaml: str | None = None
        self._continues = False
        self._began = time.time()
        self._before = -1.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the folder."""
        self.root = Path(trainer.default_root_dir)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a folder that holds another run.

        Raises:
            ValueError: it does, and this one does not continue it.
        """
        taken = trainer.strategy.broadcast(not self._continues and (self.root / "run.json").exists())
        if taken:  # on every rank: one that went on alone would wait for the others for ever
            checkpoint = self.root / "checkpoints" / "last.ckpt"
            way = f"continue it with --ckpt_path {checkpoint}" if checkpoint.exists() else "remove it"
            raise ValueError(
                f"{self.root} holds a run already: {way}, or name another folder with --trainer.default_root_dir"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the configuration and the record of the run."""
        if trainer.is_global_zero:
            self.root.mkdir(parents=True, exist_ok=True)
            if self._continues:
                self._cut_back(trainer.global_step)
            if self.config_yaml is not None:
                (self.root / "config.yaml").write_text(self.config_yaml, "utf-8")
            self._record(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `best/` if the metric has improved."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_best(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the checkpoint."""
        if not trainer.enable_validation:
            self._save_best(trainer, pl_module)
        trainer.save_checkpoint(self.root / "checkpoints" / "last.ckpt")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `last/`."""
        self._save(trainer, pl_module, "last")
        if trainer.is_global_zero:
            self._record(trainer)
            found = self.best_value > -float("inf")
            best = (
                f"best/ has {self.monitor} {self.best_value:.4g}"
                if found
                else f"no best/: no {self.monitor} was measured"
            )
            say(f"{trainer.global_step:,} steps done; the model is in {self.root / 'last'}; {best}")

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the best value of the run that this one continues."""
        self._continues = True
        self.best_value = state_dict["best_value"]

    def _cut_back(self, step: int) -> None:
        """Takes lines out of `metrics.csv` that the stopped run wrote after its checkpoint."""
        path = self.root / "metrics.csv"
        if path.exists():
            head, *lines = path.read_text("utf-8").splitlines(keepends=True)
            kept = [line for line in lines if int(line.split(",")[0]) <= step]
            path.write_text("".join([head, *kept]), "utf-8")

    def _save_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and float(value) > self.best_value:
            self.best_value = float(value)
            self._save(trainer, pl_module, "best")

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        assert isinstance(pl_module, ContrastiveTask)
        if trainer.is_global_zero:
            embedder_of(trainer, pl_module).save(self.root / name)

    def _record(self, trainer: Trainer) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        path = self.root / "run.json"
        if self._before < 0:  # seconds of the stopped run, where this one continues it
            self._before = json.loads(path.read_text("utf-8"))["seconds"] if self._continues and path.exists() else 0.0
        record = {
            "command": shlex.join(sys.argv),
            "versions": {name: version(name) for name in ("dualenc", "torch", "timm", "lightning", "tokenizers")},
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "ranks": trainer.world_size,
            "train_pairs": len(data.train_index),
            "held_out_pairs": len(data.val_index) if data.val_index else 0,
            "fingerprint": data.train_index.fingerprint,
            "step": trainer.global_step,
            "samples_seen": trainer.global_step * data.batch_size,
            "seconds": round(self._before + time.time() - self._began, 1),
        }
        path.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
