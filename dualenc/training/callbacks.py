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

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from dualenc.data import BenchmarkSet, DataError
from dualenc.data.images import thumbnail
from dualenc.data.pairs import captions_of, decode_sample
from dualenc.data.storage import redact
from dualenc.embedder import Embedder, SetEmbeddings, score, score_retrieval
from dualenc.report import Section, write_report
from dualenc.training.contrastive import ContrastiveTask, say
from dualenc.training.data import Source


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
    """Zero-shot classification and retrieval on evaluation sets during training.

    Args:
        data: folders in the layout of CLIP_benchmark.
        every_n_epochs: measure at the end of every so many epochs; 0 for never.
        every_n_steps: measure after every so many steps, too; 0 for never.
        workers: processes a rank that decode.

    The numbers are those of `dualenc zeroshot` and `dualenc retrieval`, logged as `SET/METRIC`. Each rank embeds its
    share of a set's images and texts. `dualenc validate` and `test` measure the sets beside the held-out pairs.
    """

    def __init__(self, data: Sequence[str], every_n_epochs: int = 1, every_n_steps: int = 0, workers: int = 0) -> None:
        self.folders, self.workers = list(data), workers
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.sets: list[BenchmarkSet] = []
        self.sections: list[Section] = []  # of the last measurement, on the first rank

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Opens the sets, so that a wrong one stops the run before it begins."""
        self.sets = [BenchmarkSet.open(folder) for folder in self.folders]
        names = [data.name for data in self.sets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"two evaluation sets are called {twice.pop()!r}: their numbers would be mixed up")
        if taken := {"train", "val", "test"} & set(names):
            raise DataError(f"evaluation set {taken.pop()!r} has the name of the run's own figures: rename its folder")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures, if it is time by the number of steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures, if it is time by the number of epochs, and this step has not been measured."""
        done = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0 and not done:
            self._measure(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures, where this is no part of training."""
        if trainer.state.fn == "validate":
            self._measure(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ContrastiveTask)
        pl_module.pause_clock()
        embedder = embedder_of(trainer, pl_module)
        rank, world = trainer.global_rank, trainer.world_size
        sections, error = [], ""
        for data in self.sets:
            embedded: SetEmbeddings | None = None
            try:
                embedded = embedder.embed_set(data, self.workers, rank=rank, world=world)
            except (ValueError, OSError) as raised:
                error = str(raised) if isinstance(raised, DataError) else f"{data.name}: {raised}"
            _raise_together(error, world)  # or the others would wait for this one's embeddings
            assert embedded is not None
            texts = len(data.captions[0] if data.kind == "retrieval" else data.classnames)
            whole = SetEmbeddings(
                _whole(embedded.image, len(data), pl_module, world), _whole(embedded.text, texts, pl_module, world)
            )
            if trainer.is_global_zero:
                try:
                    sections.append(score(data, whole, embedder.name))
                except ValueError as raised:
                    error = f"{data.name}: {raised}"
            _raise_together(error, world)
        self.sections = sections
        metrics = {
            f"{section.result['dataset']}/{name}": value
            for section in sections
            for name, value in section.result["metrics"].items()
        }
        pl_module.publish(trainer.strategy.broadcast(metrics))
        pl_module.start_clock()


def _raise_together(error: str, world: int) -> None:
    """Stops all ranks where one has failed."""
    errors: list[Any] = [error]
    if world > 1:
        errors = [""] * world
        dist.all_gather_object(errors, error)
    if found := next(filter(None, errors), None):
        if world > 1 and dist.get_rank():
            raise SystemExit(1)  # the first rank says it
        raise DataError(found)


def _whole(part: Tensor, count: int, task: LightningModule, world: int) -> Tensor:
    """The ranks' parts (n, E) of `count` rows put together, on the CPU; the parts are those of `np.array_split`."""
    if world == 1:
        return part
    sizes = [len(share) for share in np.array_split(np.arange(count), world)]
    padded = part.new_zeros(max(sizes), part.shape[1])
    padded[: len(part)] = part
    gathered = task.all_gather(padded.to(task.device))
    assert isinstance(gathered, Tensor)  # (W, n, E)
    return torch.cat([rows[:size] for rows, size in zip(gathered.cpu(), sizes)])


def _words(source: Source) -> str:
    shards, weight = source["shards"], source.get("weight", 1.0)
    return redact(shards if isinstance(shards, str) else " ".join(shards)) + (f", weight {weight:g}" * (weight != 1))


class RunDirectory(Checkpoint):
    """Keeps the run directory: configuration, record, checkpoint, report, model directories `best/` and `last/`.

    Args:
        monitor: the metric whose largest value names `best/`, written whenever it improves. Where it is not measured
            there is no best, and only `last/` is written, at the end.

    `checkpoints/last.ckpt` is written at the end of each epoch.
    """

    def __init__(self, monitor: str = "val/mrr") -> None:
        if monitor.rpartition("/")[2] in ("loss", "median_rank"):
            raise ValueError(f"run.monitor {monitor} is best when small, best/ is of the largest: name another metric")
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
                (self.root / "config.yaml").write_text(redact(self.config_yaml), "utf-8")
            self._record(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `best/` if the metric has improved."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_best(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes `best/` if the metric has improved."""
        self._save_best(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `best/` if the metric has improved, and the checkpoint."""
        self._save_best(trainer, pl_module)
        trainer.save_checkpoint(self.root / "checkpoints" / "last.ckpt")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `last/` and the report."""
        self._save(trainer, pl_module, "last")
        if trainer.is_global_zero:
            self._record(trainer)
            self._report(trainer, pl_module)
            found = self.best_value > -float("inf")
            best = (
                f"best/ has {self.monitor} {self.best_value:.4g}"
                if found
                else f"no best/: no {self.monitor} was measured"
            )
            bad = len(trainer.datamodule.quarantine)  # type: ignore[attr-defined]
            named = f"; {bad:,} bad sample{'s' * (bad != 1)} did not take part, see {self.root / 'quarantine.jsonl'}"
            named *= bad > 0
            say(
                f"{trainer.global_step:,} steps done; the model is in {self.root / 'last'}; {best}; "
                f"report: {self.root / 'report.html'}{named}"
            )

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
            whole = (line for line in lines if line.count(",") == 2 and line.endswith("\n"))  # a kill may cut the last
            kept = [line for line in whole if int(line.split(",")[0]) <= step]
            path.write_text("".join([head, *kept]), "utf-8")

    def _save_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and float(value) > self.best_value:
            self.best_value = float(value)
            self._save(trainer, pl_module, "best")

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`report.html`: the curves, and the last measurement of everything that was measured."""
        assert isinstance(pl_module, ContrastiveTask)
        record = json.loads((self.root / "run.json").read_text("utf-8"))
        sections = [
            section for callback in trainer.callbacks if isinstance(callback, Evaluation)  # type: ignore[attr-defined]
            for section in callback.sections
        ]  # fmt: skip
        data = trainer.datamodule  # type: ignore[attr-defined]
        if pl_module.held_out is not None:
            rows, image, text = pl_module.held_out
            samples = [data.val_index[row] for row in rows.tolist()]
            captions = [captions_of(sample, data.captions)[0] for sample in samples]
            sections.append(
                score_retrieval(
                    "held-out pairs", image, text, captions, torch.arange(len(samples)),
                    picture=lambda i: thumbnail(decode_sample(samples[i])), model=str(self.root),
                )
            )  # fmt: skip
        config = pl_module.model.config
        minutes, seconds = divmod(round(record["seconds"]), 60)
        about = {
            "command": redact(shlex.join(["dualenc", *sys.argv[1:]])),
            "model": self.root,
            "image tower": f"{config.image.name} {config.image.overrides or ''} at {config.image.img_size} pixels",
            "text tower": f"{config.text.layers} layers of width {config.text.width}, "
            f"{config.text.vocab_size:,} entries, up to {config.text.context_length} tokens",
            "parameters": f"{sum(p.numel() for p in pl_module.model.parameters()) / 1e6:.1f} M",
            "data": "; ".join(map(_words, data.sources)),
            "pairs": f"{record['train_pairs']:,} to train on, {record['held_out_pairs']:,} held out; "
            f"fingerprint {record['fingerprint']}",
            "training": f"{record['step']:,} steps, {record['samples_seen']:,} samples seen in {minutes} min "
            f"{seconds} s on {record['ranks']} x {record['device']}",
        }
        write_report(self.root, f"Training of {self.root.name}", sections, about, self.root / "metrics.csv")

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
            "command": redact(shlex.join(sys.argv)),
            "versions": {name: version(name) for name in ("dualenc", "torch", "timm", "lightning", "tokenizers")},
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "ranks": trainer.world_size,
            "train_pairs": len(data.train_index),
            "held_out_pairs": len(data.val_index) if data.val_index else 0,
            "fingerprint": data.train_index.fingerprint,
            "step": trainer.global_step,
            "bad_samples": len(data.quarantine),
            "samples_seen": trainer.global_step * data.batch_size,
            "seconds": round(self._before + time.time() - self._began, 1),
        }
        path.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
