"""The run directory: the files that a run writes, when it saves checkpoints, and how it stops and resumes."""

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
from dualenc.training.checkpoint import (
    CheckpointError,
    RunState,
    VerifiedIO,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
    write_checkpoint,
)
from dualenc.training.csv_logger import truncate_log
from dualenc.training.ema import averaged
from dualenc.training.evaluation_callback import Evaluation
from dualenc.training.lightning_internals import (
    continue_at_next_epoch,
    disable_child_observer,
    disable_signal_handlers,
    disable_sigterm_broadcast,
    dump_checkpoint,
    epoch_is_done,
    find_unused_parameters,
    loader_state,
    validates_by_time,
    validation_follows,
)
from dualenc.training.ranks import RankFlags, Signals, Stopped, Watchdog, all_gather_object
from dualenc.training.task import SKIPPED_STEPS, RunError, Task, rank_zero_print
from dualenc.utils.errors import ModelError
from dualenc.utils.files import write_json, write_text
from dualenc.utils.text import millions, one_line, plural, reason
from dualenc.utils.urls import redact


class RunDirectory(Checkpoint):
    """Callback that writes the run directory: configuration, record, checkpoints, report, `best/` and `last/`.

    Checkpoints are `checkpoints/step-N.ckpt`. They are saved by steps, by minutes, at the ends of epochs, and when a
    signal stops the run. If validation follows a step, its checkpoint is saved after the validation. If saving fails,
    a message is printed, training continues and the older checkpoints stay.

    Args:
        monitor: metric whose largest value selects `best/`, which is written whenever the metric improves. If it is
            never measured, only `last/` is written, at the end.
        every_n_steps: number of steps between checkpoints; 0 for none by steps.
        every_n_minutes: number of minutes between checkpoints; 0 for none by time.
        keep: number of checkpoints to keep, the newest; at least 2.
        failed_saves: number of consecutive failed saves that ends the run.
        stall_seconds: seconds without a step after which a rank counts as stalled; the other ranks end and name it.
        accept_changes: settings that may differ from those of the checkpoint's run, such as `[batch_size]`; the run
            then resumes at the beginning of the next epoch.
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
            raise ValueError(f"run.monitor {monitor} must be a metric that is best when largest: name another metric")
        if keep < 2:
            raise ValueError(f"run.keep {keep} must be at least 2: the newest checkpoint may turn out to be damaged")
        if every_n_steps < 0 or every_n_minutes < 0 or failed_saves < 1 or stall_seconds <= 0:
            raise ValueError(
                f"run.every_n_steps {every_n_steps} and run.every_n_minutes {every_n_minutes} must not be negative, "
                f"run.failed_saves {failed_saves} and run.stall_seconds {stall_seconds} must be positive"
            )
        self.monitor, self.every_n_steps, self.every_n_minutes = monitor, every_n_steps, every_n_minutes
        self.keep, self.failed_saves, self.stall_seconds = keep, failed_saves, stall_seconds
        self.accept_changes = list(accept_changes)
        self._tried_value = -math.inf  # largest value of the metric for which `best/` was written, or failed to be
        self._state = RunState()  # replaced by the task's in `setup`
        self.config_yaml: str | None = None
        self.may_exist = False  # set by the command line: whether the folder may hold a run already
        self._resumed = False
        self._first_step = 0
        self._start_time = time.time()
        self._seconds_before = 0.0  # time of the run before it was resumed
        self._starts: list[dict[str, Any]] = []
        self._config: Any = None  # configuration for `run.json`
        self._save_due = self._stop_due = False
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._failures = 0
        self._signals = Signals()
        self._rank_flags: RankFlags | None = None  # None until training starts
        self._watchdog: Watchdog | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set up the folder, the checkpoint plugin and the handling of signals.

        Raises:
            ValueError: If validation is scheduled by time, which differs between ranks and between runs.
        """
        if stage == "fit" and validates_by_time(trainer):
            raise ValueError("trainer.val_check_interval must be a number of steps or a share of the epoch, not a time")
        if stage == "fit":
            disable_signal_handlers(trainer)
        self.root, self._trainer = Path(trainer.default_root_dir), trainer
        if isinstance(pl_module, Task):
            self._state = pl_module.run_state
        trainer.strategy.checkpoint_io = VerifiedIO()
        several = len(getattr(pl_module, "heads", ())) > 1  # a step may leave out the parameters of a head
        if isinstance(trainer.strategy, DDPStrategy) and (trainer.world_size > 2 or several):
            find_unused_parameters(trainer.strategy)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other data or in another order, unless `accept_changes` allows it.

        Raises:
            CheckpointError: If settings differ; names them.
        """
        if trainer.state.fn != "fit":
            return
        self._first_step = checkpoint["global_step"]
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        changes = loader.changes(loader_state(checkpoint))
        if changes.get("features", (None, None))[1] is not None:
            raise CheckpointError(
                "the checkpoint's run did not have these data.features: set those that it had, or start a new run"
            )
        if refused := [name for name in changes if name not in self.accept_changes]:
            before, now = changes[refused[0]]
            raise CheckpointError(
                f"the checkpoint's run had {refused[0]} {before}, this one has {now}; if that is intended, "
                f"--run.accept_changes '[{', '.join(refused)}]' resumes at the next epoch"
            )
        if changes:
            continue_at_next_epoch(checkpoint, loader.state_dict())
            rank_zero_print(f"changed: {', '.join(changes)}; resuming at the beginning of the next epoch")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder that holds another run, and install the signal handlers.

        Raises:
            CheckpointError: If the ranks resume from different checkpoints.
            ValueError: If the folder holds a run that this one does not resume.
        """
        steps = all_gather_object(self._first_step, trainer.world_size)
        if different := [rank for rank, step in enumerate(steps) if step != steps[0]]:
            raise CheckpointError(
                f"rank 0 starts from step {steps[0]}, rank {different[0]} from step {steps[different[0]]}: give all "
                "machines the same folder"
            )
        taken = trainer.strategy.broadcast(
            not self._resumed and not self.may_exist and (self.root / "run.json").exists()
        )
        if taken:  # raised on every rank: a rank that continued alone would wait for the others forever
            raise ValueError(
                f"{self.root} holds a run already: resume it with --ckpt_path last, remove it, or name another "
                "folder with --trainer.default_root_dir"
            )
        self._signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the configuration and the record of the run, and start the watchdog."""
        assert isinstance(pl_module, Task)
        if trainer.is_global_zero:
            self.root.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.csv", SKIPPED_STEPS):
                truncate_log(self.root / name, trainer.global_step)
            for path in list_checkpoints(self.root / "checkpoints"):
                if checkpoint_step(path) > trainer.global_step:  # damaged, or the user resumes from an older one
                    path.rename(path.with_suffix(".stale"))
                    rank_zero_print(
                        f"{path} is damaged, or later than step {trainer.global_step}, from which this run starts: "
                        "renamed to .stale, may be deleted"
                    )
            if self.config_yaml is not None:
                write_text(self.root / "config.yaml", redact(self.config_yaml))
            self._start_record(trainer)
            self._record(trainer, pl_module)
            if self._resumed:
                rank_zero_print(f"resuming after step {trainer.global_step:,}")
        disable_sigterm_broadcast(trainer)
        disable_child_observer(trainer)
        self._rank_flags = RankFlags(trainer.world_size)
        if trainer.world_size > 1:
            self._watchdog = pl_module.watchdog = Watchdog(trainer.global_rank, trainer.world_size, self.stall_seconds)
            self._watchdog.start()
        self._saved_at = time.monotonic()
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._state.metrics.items()})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write `best/` if the metric has improved, and a checkpoint if one is due."""
        assert isinstance(pl_module, Task)
        self._state.samples += trainer.datamodule.batch_size  # type: ignore[attr-defined]
        self._save_best(trainer, pl_module)
        self._combine_flags(trainer)
        self._save_due |= bool(self.every_n_steps and trainer.global_step % self.every_n_steps == 0)
        if not validation_follows(trainer):
            self._save_if_due(trainer, pl_module)
        if self._watchdog is not None:
            self._watchdog.report(trainer.global_step, "loading")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `best/` if the metric has improved, and inside an epoch a checkpoint if one is due."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_best(trainer, pl_module)
            if not epoch_is_done(trainer):
                self._combine_flags(trainer, wait=True)
                self._save_if_due(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `best/` with the initial weights if an evaluation before the first step has measured them."""
        if trainer.global_step == 0:
            self._save_best(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `best/` if the metric has improved, and the checkpoint of the epoch."""
        self._save_best(trainer, pl_module)
        if not trainer.fit_loop.done:  # `on_train_end` saves the last one, after all other files
            self._combine_flags(trainer, wait=True)
            self._save_due = True
            self._save_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `last/`, the report and the last checkpoint."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Evaluation):
                callback.complete(trainer, pl_module)
        self._save_model(trainer, pl_module, "last")
        if trainer.is_global_zero:
            self._record(trainer, pl_module)
            try:
                self._report(trainer, pl_module)
            except (OSError, ValueError) as error:  # a run does not fail because of its report
                rank_zero_print(f"{self.root / 'report.html'} cannot be written: {one_line(error)}")
        self._save(trainer, pl_module)
        self._signals.restore()
        if self._watchdog is not None:
            self._watchdog.close()
        if trainer.is_global_zero:
            self._record(trainer, pl_module)
            self._print_summary(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a message if there was nothing to train."""
        if self._rank_flags is None:
            rank_zero_print(
                f"{self.root} was done already, after {trainer.global_step:,} steps: to train more, raise "
                "trainer.max_epochs or trainer.max_steps"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End this rank if there are several: the one that failed first prints its error, the others name that rank."""
        if isinstance(exception, Stopped):
            return
        if self._watchdog is not None:
            # Before the signal handlers are restored: the launcher of the ranks may send signals when one has ended.
            self._watchdog.fail(exception)
        self._signals.restore()

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, the number of samples so far, and the metrics that callbacks may read."""
        found = self._trainer.callback_metrics.items()
        metrics = {name: float(value) for name, value in found if name != "train/samples_per_second"}
        return {"best_value": self._state.best_value, "samples": self._state.samples, "metrics": metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the run that this one resumes."""
        self._resumed = True
        for name in ("best_value", "samples", "metrics"):
            setattr(self._state, name, state_dict[name])

    # Saving

    def _combine_flags(self, trainer: Trainer, wait: bool = False) -> None:
        """Combine two flags of all ranks: a signal has come to any rank; a checkpoint is due by the clock of rank 0.

        Args:
            trainer: the trainer.
            wait: whether to wait for the flags of this step; otherwise those of the step before are used.
        """
        assert self._rank_flags is not None
        late = self.every_n_minutes and time.monotonic() - self._saved_at > 60 * self.every_n_minutes
        own = bool(self._signals.received), bool(late and trainer.is_global_zero)
        if wait or trainer.world_size == 1:
            stop, save = self._rank_flags.reduce(*own)
        else:
            stop, save = self._rank_flags.wait() or (False, False)
            self._rank_flags.start(own[0], own[1] and not save)
        self._stop_due |= stop
        self._save_due |= stop or save

    def _save_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint if one is due, and stop the run if a signal has come.

        Raises:
            Stopped: If a signal has come to any rank.
        """
        if self._save_due and trainer.global_step != self._saved_step:
            self._save(trainer, pl_module)
        if self._stop_due:
            self._signals.block()
            if self._watchdog is not None:
                self._watchdog.close()
            kept = list_checkpoints(self.root / "checkpoints")
            failed = "" if trainer.global_step == self._saved_step else " (saving this step failed)"
            last = f"{kept[0] if kept else 'no checkpoint'}{failed}"
            raise Stopped(
                f"stopped by {self._signals.received or 'a signal to another rank'} after step "
                f"{trainer.global_step:,}; saved: {last}; resume with --ckpt_path auto"
            )

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint, and remove the oldest ones beyond `keep`. All ranks must call it.

        Raises:
            RunError: If too many consecutive saves have failed.
        """
        assert isinstance(pl_module, Task)
        pl_module.pause_clock("saving")
        content = dump_checkpoint(trainer)
        error = ""
        if trainer.is_global_zero:
            folder = self.root / "checkpoints"
            try:
                _check_finite(content["state_dict"])
                write_checkpoint(checkpoint_path(folder, trainer.global_step), content)
            except (OSError, ValueError) as raised:
                error = reason(raised)
            else:
                for path in list_checkpoints(folder)[self.keep :]:
                    with suppress(OSError):
                        path.unlink()
                self._record(trainer, pl_module)
        error = trainer.strategy.broadcast(error)
        self._saved_at, self._save_due = time.monotonic(), False
        if error:
            self._failures += 1
            rank_zero_print(
                f"the checkpoint of step {trainer.global_step:,} cannot be saved in {self.root / 'checkpoints'}: "
                f"{error}; training continues, older checkpoints stay"
            )
            if self._failures >= self.failed_saves:
                raise RunError(
                    f"no checkpoint could be saved in {self.root / 'checkpoints'}, {self._failures} consecutive times "
                    f"(run.failed_saves): {error}"
                )
        else:
            self._failures, self._saved_step = 0, trainer.global_step
        pl_module.start_clock()

    def _save_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None or float(value) <= max(self._state.best_value, self._tried_value):
            return
        self._tried_value = float(value)  # a model that cannot be written is not tried again at each step
        if self._save_model(trainer, pl_module, "best"):
            self._state.best_value = float(value)

    def _save_model(self, trainer: Trainer, pl_module: LightningModule, name: str) -> bool:
        """Write a model directory; return whether it could be written, the same on all ranks."""
        error = ""
        assert isinstance(pl_module, Task)
        with averaged(trainer):
            weights = trainer.strategy.lightning_module_state_dict()  # unsharded on rank 0, whatever the strategy
            if trainer.is_global_zero:
                whole = {key.removeprefix("model."): x for key, x in weights.items() if key.startswith("model.")}
                try:
                    pl_module.save_model(self.root / name, whole)
                except (OSError, ModelError) as raised:
                    error = reason(raised)
                    rank_zero_print(f"{self.root / name} cannot be written: {error}")
        return not trainer.strategy.broadcast(error)

    # Record and report

    def _start_record(self, trainer: Trainer) -> None:
        """Read what `run.json` says about the run before it was resumed, and add this start."""
        path = self.root / "run.json"
        try:
            before = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            before = {}
        self._config = _redacted(yaml.safe_load(self.config_yaml)) if self.config_yaml else None
        self._starts = before.get("starts", [])
        self._seconds_before = before.get("seconds", 0.0) if self._resumed else 0.0
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
            "seconds": round(self._seconds_before + time.time() - self._start_time, 1),
            "restarts": len(self._starts) - 1,
            "starts": self._starts,
            "config": self._config,
        }
        try:
            write_json(self.root / "run.json", record)
        except OSError as error:
            rank_zero_print(f"{self.root / 'run.json'} cannot be written: {error.strerror}")

    def _print_summary(self, trainer: Trainer) -> None:
        if self._state.best_value > -math.inf:
            best = f"best/ has {self.monitor} {self._state.best_value:.4g}"
        else:
            best = f"there is no best/, since {self.monitor} was not measured"
        count = len(trainer.datamodule.bad_sample_log)  # type: ignore[attr-defined]
        bad = f"; {plural(count, 'bad sample')} left out, see {self.root / 'bad_samples.jsonl'}" if count else ""
        rank_zero_print(
            f"{trainer.global_step:,} steps done; the model is in {self.root / 'last'}; {best}; "
            f"report: {self.root / 'report.html'}{bad}"
        )

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `report.html`: the curves, and the last results of each evaluation that this process has run."""
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
            "data": "; ".join(map(_describe_source, trainer.datamodule.sources)),  # type: ignore[attr-defined]
            noun: f"{record[f'train_{noun}']:,} to train on, {record[f'held_out_{noun}']:,} held out; "
            f"fingerprint {record['fingerprint']}",
            "training": f"{record['step']:,} steps, {record['samples_seen']:,} samples seen in {minutes} min "
            f"{seconds} s on {record['ranks']} x {record['device']}",
        }
        write_report(self.root, f"Training of {self.root.name}", sections, about, self.root / "metrics.csv")


def _describe_source(source: Mapping[str, Any]) -> str:
    shards, weight = source.get("shards") or source["files"], source.get("weight", 1.0)
    text = redact(shards if isinstance(shards, str) else " ".join(shards))
    return text if weight == 1 else f"{text}, weight {weight:g}"


def _redacted(value: Any) -> Any:
    """Return a configuration without the secrets of its URLs."""
    if isinstance(value, dict):
        return {key: _redacted(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_redacted(part) for part in value]
    return redact(value) if isinstance(value, str) else value


@cache
def _revision() -> str | None:
    """Return the git revision of the working folder, marked "-dirty" if files differ from it; None without one."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True)
    return found.stdout.strip() or None


def _check_finite(weights: Mapping[str, Any]) -> None:
    """Refuse non-finite weights: a run that has lost its weights must resume from an older checkpoint.

    Raises:
        ValueError: If a weight is non-finite; names it.
    """
    for name, weight in weights.items():
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise ValueError(f"{name} is not finite")
