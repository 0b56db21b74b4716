"""The run directory: what a run keeps, when it saves, how it stops and goes on."""

import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy

from dualenc.report import write_report
from dualenc.training.checkpoint import CheckpointError, RunState, VerifiedIO, checkpoints, path_of, step_of, write
from dualenc.training.csv_logger import cut_back
from dualenc.training.ema import averaged
from dualenc.training.evaluation_callback import Evaluation
from dualenc.training.lightning_internals import (
    ask_no_rank_to_stop,
    continue_at_next_epoch,
    dump_checkpoint,
    epoch_is_done,
    find_unused_parameters,
    handle_no_signals,
    kill_no_rank,
    loader_state,
    validates_by_time,
    validation_follows,
)
from dualenc.training.ranks import Signals, StopConsensus, Stopped, Watchdog, gathered
from dualenc.training.task import SKIPPED_STEPS, RunError, Task, say
from dualenc.utils.errors import ModelError
from dualenc.utils.files import write_json, write_text
from dualenc.utils.text import millions, one_line, plural, reason
from dualenc.utils.urls import redact


class RunDirectory(Checkpoint):
    """Keeps the run directory: configuration, record, checkpoints, report, model directories `best/` and `last/`.

    Checkpoints are `checkpoints/step-N.ckpt`: after so many steps, after so many minutes, at the ends of epochs and
    when a signal stops the run. A step that evaluation follows is saved after it. A save that fails is told; training
    and the older checkpoints stay.

    Args:
        monitor: the metric whose largest value names `best/`, written whenever it improves. Where it is not measured
            there is no best, and only `last/` is written, at the end.
        every_n_steps: save after every so many steps; 0 for never.
        every_n_minutes: save when the last one is so many minutes old; 0 for never.
        keep: checkpoints that stay, the newest; 2 at least.
        failed_saves: in a row, that end the run.
        stall_seconds: without a step, that mean that a rank stands still; the others end and name it.
        accept_changes: what may differ from the run that a checkpoint is of, such as `[batch_size]`; the run then goes
            on from the beginning of the next epoch.
    """

    def __init__(
        self,
        monitor: str = "val/mrr",
        every_n_steps: int = 0,
        every_n_minutes: float = 15.0,
        keep: int = 2,
        failed_saves: int = 3,
        stall_seconds: float = 600.0,
        accept_changes: Sequence[str] = (),
    ) -> None:
        if monitor.endswith(("loss", "median_rank", "perplexity", "mse")):
            raise ValueError(f"run.monitor {monitor} is best when small, best/ is of the largest: name another metric")
        if keep < 2:
            raise ValueError(f"run.keep {keep} must be 2 at least: the newest checkpoint may turn out damaged")
        if every_n_steps < 0 or every_n_minutes < 0 or failed_saves < 1 or stall_seconds <= 0:
            raise ValueError(
                f"run.every_n_steps {every_n_steps} and run.every_n_minutes {every_n_minutes} must not be negative, "
                f"run.failed_saves {failed_saves} and run.stall_seconds {stall_seconds} must be positive"
            )
        self.monitor, self.every_n_steps, self.every_n_minutes = monitor, every_n_steps, every_n_minutes
        self.keep, self.failed_saves, self.stall_seconds = keep, failed_saves, stall_seconds
        self.accept_changes = list(accept_changes)
        self._tried = -math.inf
        self._state = RunState()  # the task's, once there is one
        self.config_yaml: str | None = None
        self.goes_on = False  # whether the folder may hold a run: set where it is meant
        self._continues = False
        self._begins = 0  # step
        self._began = time.time()
        self._before = 0.0  # seconds of the stopped run, where this one continues it
        self._starts: list[dict[str, Any]] = []
        self._config: Any = None  # as the record has it
        self._due = self._stops = False
        self._saved = -1  # step
        self._saved_at = time.monotonic()
        self._failures = 0
        self._signals = Signals()
        self._stop_consensus: StopConsensus | None = None
        self._watchdog: Watchdog | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the folder; takes care that checkpoints are read and written as ours, and signals are.

        Raises:
            ValueError: validation is to follow the clock, which is another one on each rank and in each run.
        """
        if stage == "fit" and validates_by_time(trainer):
            raise ValueError("trainer.val_check_interval must be steps or a share of the epoch, no time")
        if stage == "fit":
            handle_no_signals(trainer)
        self.root, self._trainer = Path(trainer.default_root_dir), trainer
        if isinstance(pl_module, Task):
            self._state = pl_module.run_state
        trainer.strategy.checkpoint_io = VerifiedIO()
        several = len(getattr(pl_module, "heads", ())) > 1  # a step may be without one of them
        if isinstance(trainer.strategy, DDPStrategy) and (trainer.world_size > 2 or several):
            find_unused_parameters(trainer.strategy)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with other data, or in another order, unless that is said.

        Raises:
            CheckpointError: names what differs.
        """
        if trainer.state.fn != "fit":
            return
        self._begins = checkpoint["global_step"]
        then, loader = loader_state(checkpoint), trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        changes = loader.changes(then)
        if changes.get("features", (None, None))[1] is not None:
            raise CheckpointError(
                "the checkpoint's run did not have these data.features: give it those that it had, or begin a new run"
            )
        if refused := [name for name in changes if name not in self.accept_changes]:
            before, now = changes[refused[0]]
            raise CheckpointError(
                f"the checkpoint's run had {refused[0]} {before}, this one has {now}; if that is meant: "
                f"--run.accept_changes '[{', '.join(refused)}]' goes on from the next epoch"
            )
        if changes:
            continue_at_next_epoch(checkpoint, loader.state_dict())
            say(f"other {', '.join(changes)} than before: goes on at the beginning of the next epoch")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a folder that holds another run; from here on signals stop the run well.

        Raises:
            CheckpointError: the ranks begin from different checkpoints.
            ValueError: the folder holds a run that this one does not continue.
        """
        begins = gathered(self._begins, trainer.world_size)
        if different := [rank for rank, step in enumerate(begins) if step != begins[0]]:
            raise CheckpointError(
                f"rank 0 begins from step {begins[0]}, rank {different[0]} from step {begins[different[0]]}: give all "
                "machines the same folder"
            )
        taken = trainer.strategy.broadcast(
            not self._continues and not self.goes_on and (self.root / "run.json").exists()
        )
        if taken:  # on every rank: one that went on alone would wait for the others for ever
            raise ValueError(
                f"{self.root} holds a run already: continue it with --ckpt_path last, remove it, or name another "
                "folder with --trainer.default_root_dir"
            )
        self._signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the configuration and the record of the run; begins to listen to the other ranks."""
        assert isinstance(pl_module, Task)
        if trainer.is_global_zero:
            self.root.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.csv", SKIPPED_STEPS):
                cut_back(self.root / name, trainer.global_step)
            for path in checkpoints(self.root / "checkpoints"):
                if step_of(path) > trainer.global_step:  # damaged, or this run begins before it
                    path.rename(path.with_suffix(".stale"))
                    say(f"{path} is damaged, or behind step {trainer.global_step}: renamed to .stale, may be deleted")
            if self.config_yaml is not None:
                write_text(self.root / "config.yaml", redact(self.config_yaml))
            self._take_up_record(trainer)
            self._record(trainer, pl_module)
            if self._continues:
                say(f"goes on after step {trainer.global_step:,}")
        ask_no_rank_to_stop(trainer)
        kill_no_rank(trainer)
        self._stop_consensus = StopConsensus(trainer.world_size)
        if trainer.world_size > 1:
            self._watchdog = pl_module.watchdog = Watchdog(trainer.global_rank, trainer.world_size, self.stall_seconds)
            self._watchdog.start()
        self._saved_at = time.monotonic()
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._state.metrics.items()})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes `best/` if the metric has improved, and a checkpoint if it is time."""
        assert isinstance(pl_module, Task)
        self._state.samples += trainer.datamodule.batch_size  # type: ignore[attr-defined]
        self._save_best(trainer, pl_module)
        self._agree(trainer)
        self._due |= bool(self.every_n_steps and trainer.global_step % self.every_n_steps == 0)
        if not validation_follows(trainer):
            self._save_if_due(trainer, pl_module)
        if self._watchdog is not None:
            self._watchdog.at(trainer.global_step, "loads")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `best/` if the metric has improved, and a checkpoint if it is time and the epoch goes on."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_best(trainer, pl_module)
            if not epoch_is_done(trainer):
                self._agree(trainer, wait=True)
                self._save_if_due(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `best/` with the weights that an evaluation before the first step was of."""
        if trainer.global_step == 0:
            self._save_best(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `best/` if the metric has improved, and the checkpoint."""
        self._save_best(trainer, pl_module)
        if not trainer.fit_loop.done:  # the very last one follows when all else is written
            self._agree(trainer, wait=True)
            self._due = True
            self._save_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `last/`, the report and the last checkpoint."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Evaluation):
                callback.complete(trainer, pl_module)
        self._save_model(trainer, pl_module, "last")
        if trainer.is_global_zero:
            self._record(trainer, pl_module)
            try:
                self._report(trainer, pl_module)
            except (OSError, ValueError) as error:  # the run is not lost because a page is
                say(f"no report: {one_line(error)}")
        self._save(trainer, pl_module)
        self._signals.restore()
        if self._watchdog is not None:
            self._watchdog.close()
        if trainer.is_global_zero:
            self._record(trainer, pl_module)
            found = self._state.best_value > -math.inf
            best = (
                f"best/ has {self.monitor} {self._state.best_value:.4g}"
                if found
                else f"no best/: no {self.monitor} was measured"
            )
            bad = len(trainer.datamodule.bad_sample_log)  # type: ignore[attr-defined]
            named = f"; {plural(bad, 'bad sample')} did not take part, see {self.root / 'bad_samples.jsonl'}"
            named *= bad > 0
            say(
                f"{trainer.global_step:,} steps done; the model is in {self.root / 'last'}; {best}; "
                f"report: {self.root / 'report.html'}{named}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so where there was nothing to do."""
        if self._stop_consensus is None:
            say(f"{self.root} is done, after {trainer.global_step:,} steps: more by trainer.max_epochs or max_steps")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """With several ranks: shows the error of the one that failed first, and ends the others without their own."""
        if isinstance(exception, Stopped):
            return
        if self._watchdog is not None:
            self._watchdog.failed(
                exception
            )  # before signals mean anything else: whoever started the ranks may send some
        self._signals.restore()

    def state_dict(self) -> dict[str, Any]:
        """The best value and the samples so far; what callbacks may look at."""
        found = self._trainer.callback_metrics.items()
        metrics = {name: float(value) for name, value in found if name != "train/samples_per_second"}
        return {"best_value": self._state.best_value, "samples": self._state.samples, "metrics": metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what the run had that this one continues."""
        self._continues = True
        for name in ("best_value", "samples", "metrics"):
            setattr(self._state, name, state_dict[name])

    # Saving

    def _agree(self, trainer: Trainer, wait: bool = False) -> None:
        """Whether any rank was told to stop, and whether it is time to save by the clock of the first."""
        assert self._stop_consensus is not None
        late = self.every_n_minutes and time.monotonic() - self._saved_at > 60 * self.every_n_minutes
        asked = bool(self._signals.seen), bool(late and trainer.is_global_zero)
        if wait or trainer.world_size == 1:
            stop, save = self._stop_consensus.now(*asked)
        else:
            stop, save = self._stop_consensus.hear() or (False, False)
            self._stop_consensus.ask(asked[0], asked[1] and not save)
        self._stops |= stop
        self._due |= stop or save

    def _save_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due and trainer.global_step != self._saved:
            self._save(trainer, pl_module)
        if self._stops:
            self._signals.block()
            if self._watchdog is not None:
                self._watchdog.close()
            kept = checkpoints(self.root / "checkpoints")
            failed = "" if trainer.global_step == self._saved else " (saving this step failed)"
            last = f"{kept[0] if kept else 'no checkpoint'}{failed}"
            raise Stopped(
                f"stopped by {self._signals.seen or 'a signal to another rank'} after step {trainer.global_step:,}; "
                f"saved: {last}; go on with --ckpt_path auto"
            )

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes a checkpoint, and removes those that are too many; on all ranks together.

        Raises:
            RunError: it has failed too often in a row.
        """
        assert isinstance(pl_module, Task)
        pl_module.pause_clock("saves")
        content = dump_checkpoint(trainer)
        error = ""
        if trainer.is_global_zero:
            folder = self.root / "checkpoints"
            try:
                _check_finite(content["state_dict"])
                write(path_of(folder, trainer.global_step), content)
            except (OSError, ValueError) as raised:
                error = reason(raised)
            else:
                for path in checkpoints(folder)[self.keep :]:
                    with suppress(OSError):
                        path.unlink()
                self._record(trainer, pl_module)
        error = trainer.strategy.broadcast(error)
        self._saved_at, self._due = time.monotonic(), False
        if error:
            self._failures += 1
            say(
                f"the checkpoint of step {trainer.global_step:,} cannot be saved in {self.root / 'checkpoints'}: "
                f"{error}; training goes on, older checkpoints stay"
            )
            if self._failures >= self.failed_saves:
                raise RunError(f"no checkpoint could be saved {self._failures} times in a row: {error}")
        else:
            self._failures, self._saved = 0, trainer.global_step
        pl_module.start_clock()

    def _save_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None or float(value) <= max(self._state.best_value, self._tried):
            return
        self._tried = float(value)  # what cannot be written is not tried at each step
        if self._save_model(trainer, pl_module, "best"):
            self._state.best_value = float(value)

    def _save_model(self, trainer: Trainer, pl_module: LightningModule, name: str) -> bool:
        """Whether it could be written; the same on all ranks."""
        error = ""
        assert isinstance(pl_module, Task)
        with averaged(trainer):
            weights = trainer.strategy.lightning_module_state_dict()  # whole on the first rank, wherever they lie
            if trainer.is_global_zero:
                whole = {key.removeprefix("model."): x for key, x in weights.items() if key.startswith("model.")}
                try:
                    pl_module.save_model(self.root / name, whole)
                except (OSError, ModelError) as raised:
                    error = reason(raised)
                    say(f"{self.root / name} cannot be written: {error}")
        return not trainer.strategy.broadcast(error)

    # Record and report

    def _take_up_record(self, trainer: Trainer) -> None:
        """What the run had written of itself before it was stopped."""
        path = self.root / "run.json"
        try:
            before = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            before = {}
        self._config = _redacted(yaml.safe_load(self.config_yaml)) if self.config_yaml else None
        self._starts = before.get("starts", [])
        self._before = before.get("seconds", 0.0) if self._continues else 0.0
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._starts.append({"step": trainer.global_step, "at": now, "ranks": trainer.world_size})

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Task)
        data = trainer.datamodule  # type: ignore[attr-defined]
        record = {
            "command": redact(shlex.join(sys.argv)),
            "versions": {name: version(name) for name in ("dualenc", "torch", "timm", "lightning", "tokenizers")},
            "python": platform.python_version(),
            "git": _revision(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "machine": f"{platform.node()}, {platform.system()} {platform.release()}, {os.cpu_count()} cores",
            "ranks": trainer.world_size,
            "seed": data.seed,
            f"train_{pl_module.noun}": len(data.train_index),
            f"held_out_{pl_module.noun}": len(data.val_index) if data.val_index else 0,
            "fingerprint": data.train_index.fingerprint,
            "step": trainer.global_step,
            "samples_seen": self._state.samples,
            "bad_samples": len(data.bad_sample_log),
            "seconds": round(self._before + time.time() - self._began, 1),
            "restarts": len(self._starts) - 1,
            "starts": self._starts,
            "config": self._config,
        }
        try:
            write_json(self.root / "run.json", record)
        except OSError as error:
            say(f"{self.root / 'run.json'} cannot be written: {error.strerror}")

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`report.html`: the curves, and the last measurement of what this process has measured."""
        assert isinstance(pl_module, Task)
        record = json.loads((self.root / "run.json").read_text("utf-8"))
        sections = [
            section for callback in trainer.callbacks if isinstance(callback, Evaluation)  # type: ignore[attr-defined]
            for section in callback.sections
        ]  # fmt: skip
        sections += pl_module.sections()
        noun = pl_module.noun
        minutes, seconds = divmod(round(record["seconds"]), 60)
        about = {
            "command": redact(shlex.join(["dualenc", *sys.argv[1:]])),
            "model": self.root,
            **pl_module.about(),
            "parameters": millions(sum(p.numel() for p in pl_module.model.parameters())),
            "data": "; ".join(map(_words, trainer.datamodule.sources)),  # type: ignore[attr-defined]
            noun: f"{record[f'train_{noun}']:,} to train on, {record[f'held_out_{noun}']:,} held out; "
            f"fingerprint {record['fingerprint']}",
            "training": f"{record['step']:,} steps, {record['samples_seen']:,} samples seen in {minutes} min "
            f"{seconds} s on {record['ranks']} x {record['device']}",
        }
        write_report(self.root, f"Training of {self.root.name}", sections, about, self.root / "metrics.csv")


def _words(source: Mapping[str, Any]) -> str:
    shards, weight = source.get("shards") or source["files"], source.get("weight", 1.0)
    text = redact(shards if isinstance(shards, str) else " ".join(shards))
    return text if weight == 1 else f"{text}, weight {weight:g}"


def _redacted(value: Any) -> Any:
    """A configuration without the secrets of its URLs."""
    if isinstance(value, dict):
        return {key: _redacted(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_redacted(part) for part in value]
    return redact(value) if isinstance(value, str) else value


@cache
def _revision() -> str | None:
    """The git revision of the working folder, with a mark where files differ from it; None where there is none."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True)
    return found.stdout.strip() or None


def _check_finite(weights: Mapping[str, Any]) -> None:
    """A run whose weights are lost goes on from a checkpoint that is not of them."""
    for name, weight in weights.items():
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise ValueError(f"{name} is not finite")
