"""The run directory: the files that a run writes, when it saves checkpoints, and how it stops and resumes."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy

from dualenc.training.checkpoint import (
    CheckpointError,
    RunState,
    VerifiedIO,
    check_finite,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
    misfit,
    write_checkpoint,
)
from dualenc.training.csv_logger import MetricsFile, truncate_log
from dualenc.training.ema import averaged
from dualenc.training.evaluation_callback import DEFAULT_MONITOR, Measurement, check_monitor
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
from dualenc.training.ranks import (
    RankFlags,
    Signals,
    Stopped,
    Watchdog,
    all_gather_object,
    collective_timeout,
    raise_together,
)
from dualenc.training.resume import (
    Changes,
    OldOptimizer,
    apply_changes,
    check_changes,
    check_scheduler,
    compared_settings,
    describe_optimizer,
    find_changes,
    take_optimizer,
)
from dualenc.training.run_lock import RunLock
from dualenc.training.run_record import RunRecord, write_run_report
from dualenc.training.task import SKIPPED_STEPS, RunError, Task, print_unwritten, rank_zero_print
from dualenc.utils.errors import DataError
from dualenc.utils.files import LineLog
from dualenc.utils.text import plural, reason

KEPT = ("best_value", "best_step", "samples", "changes")  # of the state, in checkpoints


class RunDirectory(Checkpoint):
    """Callback that writes the run directory: configuration, record, checkpoints, report, `best/` and `last/`.

    Checkpoints are `checkpoints/step-N.ckpt`. They are saved by steps, by minutes, at the ends of epochs, and when a
    signal stops the run. If validation follows a step, its checkpoint is saved after the validation. If a file cannot
    be written, a message is printed, training continues and the older files stay.

    The folder is locked until the run ends, so that a second run cannot use it.

    Args:
        monitor: metric whose largest value selects `best/`, which is written whenever the metric improves; null for no
            `best/`.
        every_n_steps: number of steps between checkpoints; 0 for none by steps.
        every_n_minutes: number of minutes between checkpoints; 0 for none by time.
        keep: number of checkpoints to keep, the newest; at least 2.
        failed_saves: number of consecutive failed saves that ends the run.
        stall_seconds: seconds without a step after which a rank counts as stalled; the other ranks end and name it.
        accept_changes: settings that may differ from those of the checkpoint's run, such as `[model.optimizer.lr]`;
            they are used from the next step on. With other data or another order of them, such as
            `[data.batch_size]`, the run resumes at the beginning of the next epoch.
    """

    def __init__(
        self,
        monitor: str | None = DEFAULT_MONITOR,
        every_n_steps: int = 0,
        every_n_minutes: float = 15.0,
        keep: int = 2,
        failed_saves: int = 3,
        stall_seconds: float = 600.0,
        accept_changes: Sequence[str] = (),
    ) -> None:
        if monitor is not None and monitor.endswith(("loss", "median_rank", "perplexity", "mse")):
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
        self._tried_value = -math.inf  # last value of the metric for which `best/` was written, or failed to be
        self._state = RunState()  # replaced by the task's in `setup`
        self.config_yaml: str | None = None
        self.may_exist = False  # set by the command line: whether the folder may hold a run already
        self._resumed = False
        self._first_step = 0
        self.lock: RunLock | None = None  # the command line takes it before it looks for a checkpoint
        self._settings: dict[str, Any] = {}  # compared with those of the checkpoint's run
        self._changes: Changes = {}
        self._old_optimizer: OldOptimizer | None = None
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
            DataError: If another run uses the folder.
            ValueError: If validation is scheduled by time, which differs between ranks and between runs.
        """
        if stage == "fit" and validates_by_time(trainer):
            raise ValueError("trainer.val_check_interval must be a number of steps or a share of the epoch, not a time")
        if stage == "fit":
            disable_signal_handlers(trainer)
        self.root, self._trainer = Path(trainer.default_root_dir), trainer
        if stage == "fit":
            self.take_lock(trainer)
            self._settings = compared_settings(yaml.safe_load(self.config_yaml), trainer) if self.config_yaml else {}
        if isinstance(pl_module, Task):
            self._state = pl_module.run_state
            self._state.monitor = self.monitor or ""
            pl_module.check_resume = self._check_resume if stage == "fit" else None
        trainer.strategy.checkpoint_io = VerifiedIO()
        several = len(getattr(pl_module, "heads", ())) > 1  # a step may leave out the parameters of a head
        if isinstance(trainer.strategy, DDPStrategy) and (trainer.world_size > 2 or several):
            find_unused_parameters(trainer.strategy)

    def take_lock(self, trainer: Trainer) -> None:
        """Lock the folder for this run, from rank 0.

        Raises:
            DataError: If another run uses the folder, on all ranks.
        """
        self.lock = self.lock or RunLock(trainer.default_root_dir)
        if trainer.is_global_zero:
            self.lock.acquire()
        if refusal := trainer.strategy.broadcast(self.lock.refusal):
            raise DataError(refusal)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the lock of the folder."""
        if self.lock is not None:
            self.lock.release()

    def _check_resume(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other settings, unless `accept_changes` allows it.

        Raises:
            CheckpointError: If settings differ; names them.
        """
        trainer = self._trainer
        self._first_step = checkpoint["global_step"]
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        of_loader = loader.changes(loader_state(checkpoint))
        if of_loader.get("features", (None, None))[1] is not None:
            raise CheckpointError(
                "the checkpoint's run did not have these data.features: set those that it had, or start a new run"
            )
        changes = find_changes(checkpoint.get("settings", {}), self._settings, of_loader)
        check_changes(changes, self.accept_changes, self._settings, misfit(checkpoint, trainer.lightning_module))
        check_scheduler(changes, [config.scheduler for config in trainer.lr_scheduler_configs])
        self._old_optimizer = take_optimizer(checkpoint, changes, trainer)
        if of_loader:
            continue_at_next_epoch(checkpoint, loader.state_dict())
        if changes:
            where = "the beginning of the next epoch" if of_loader else "the next step"
            rank_zero_print(f"changed: {', '.join(changes)}; used from {where} on")
        self._changes = changes

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint what a resumed run is compared with."""
        checkpoint["settings"] = self._settings
        checkpoint["optimizer"] = describe_optimizer(pl_module, trainer.optimizers[0])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder that holds another run, and install the signal handlers.

        Raises:
            CheckpointError: If the ranks resume from different checkpoints.
            ValueError: If the folder holds a run that this one does not resume, or the monitored metric is never
                measured.
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
                f"{self.root} holds a run already: resume it with --ckpt_path auto, remove it, or name another "
                "folder with --trainer.default_root_dir"
            )
        check_scheduler(self._changes, [config.scheduler for config in trainer.lr_scheduler_configs])
        if isinstance(pl_module, Task):
            check_monitor(self.monitor, trainer, pl_module)
        self._signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the accepted changes, write the configuration and the record of the run, and start the watchdog.

        Raises:
            DataError: If the logs of a resumed run cannot be cut back to its step.
        """
        assert isinstance(pl_module, Task)
        if self._resumed:
            apply_changes(trainer, pl_module, self._changes, self._old_optimizer)
        if self._changes:
            both = {name: list(values) for name, values in self._changes.items()}
            self._state.changes.append({"step": trainer.global_step, "settings": both})
        if "data.val" in self._changes:  # values of other held-out data cannot be compared
            self._state.best_value = -math.inf
        self._old_optimizer = None
        raise_together(self._clean_folder(trainer) if trainer.is_global_zero else "", trainer.world_size)
        self._record = RunRecord(self.root, self.config_yaml, self._resumed)
        self._record.add_start(trainer)
        if trainer.is_global_zero:
            self._write_record(trainer, pl_module)
            if self._resumed:
                rank_zero_print(f"resuming after step {trainer.global_step:,}")
        disable_sigterm_broadcast(trainer)
        disable_child_observer(trainer)
        self._rank_flags = RankFlags(trainer.world_size, collective_timeout(self.stall_seconds))
        if trainer.world_size > 1:
            self._watchdog = pl_module.watchdog = Watchdog(trainer.global_rank, trainer.world_size, self.stall_seconds)
            self._watchdog.start()
        self._saved_at = time.monotonic()
        # A value of the checkpoint that is better than that of `best/` must not select the weights of a later step.
        metrics = self._state.metrics
        better = {self.monitor} if self._state.is_better(metrics.get(self.monitor or "", math.nan)) else set()
        restored = {name: x for name, x in metrics.items() if name not in better}
        trainer.callback_metrics.update({name: torch.tensor(x, dtype=torch.float64) for name, x in restored.items()})

    def _clean_folder(self, trainer: Trainer) -> str:
        """Remove what belongs to later steps than that of the start; return why it cannot be removed, or nothing."""
        for name in ("metrics.csv", SKIPPED_STEPS):
            try:
                truncate_log(self.root / name, trainer.global_step)
            except OSError as error:
                return f"{self.root / name} cannot be cut back to step {trainer.global_step:,}: {reason(error)}"
        for path in list_checkpoints(self.root / "checkpoints"):
            if checkpoint_step(path) > trainer.global_step:  # damaged, or the user resumes from an older one
                try:
                    path.rename(path.with_suffix(".stale"))
                except OSError as error:
                    return f"{path} is later than step {trainer.global_step:,} and cannot be renamed: {reason(error)}"
                rank_zero_print(
                    f"{path} is damaged, or later than step {trainer.global_step}, from which this run starts: "
                    "renamed to .stale, may be deleted"
                )
        return ""

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
        """Write `last/`, the report and the last checkpoint.

        Raises:
            RunError: If `last/` cannot be written.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Measurement):
                callback.complete(trainer, pl_module)
        assert isinstance(pl_module, Task)
        failed = self._save_last(trainer, pl_module)
        report = ""
        if trainer.is_global_zero:
            self._write_record(trainer, pl_module)
            report = f"; report: {self.root / 'report.html'}"
            try:
                write_run_report(self.root, trainer, pl_module)
            except Exception as error:  # a run does not fail because of its report, whatever its writer raises
                report = ""
                print_unwritten(self.root / "report.html", error)
        self._save(trainer, pl_module)
        self._signals.restore()
        if self._watchdog is not None:
            self._watchdog.close()
        self._close_logs(trainer, pl_module)
        if trainer.is_global_zero:
            self._write_record(trainer, pl_module)
            last = f"{self.root / 'last'} cannot be written" if failed else f"the model is in {self.root / 'last'}"
            self._print_summary(trainer, last, report)
        self._require_last(failed)

    def _save_last(self, trainer: Trainer, pl_module: Task) -> str:
        """Write `last/`; return why it cannot be written, the same on all ranks, or nothing."""
        failed = self._save_model(trainer, pl_module, "last")
        self._record.last_step = self._record.last_step if failed else trainer.global_step
        return failed

    def _require_last(self, failed: str) -> None:
        if failed:
            raise RunError(
                f"{self.root / 'last'} cannot be written: {failed}; make room, then run the same command with "
                "--ckpt_path auto, which writes it"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a message if there was nothing to train, and write `last/` if the run could not write it before.

        Raises:
            RunError: If `last/` cannot be written.
        """
        if self._rank_flags is None:
            self._record = RunRecord(self.root, self.config_yaml, self._resumed)
            # Only rank 0 decides: the others may not see its files.
            is_missing = trainer.strategy.broadcast(self._record.last_step != trainer.global_step)
            if is_missing and isinstance(pl_module, Task):
                self._require_last(self._save_last(trainer, pl_module))
                if trainer.is_global_zero:
                    self._write_record(trainer, pl_module)
            rank_zero_print(
                f"{self.root} was done already, after {trainer.global_step:,} steps: to train more, raise "
                "trainer.max_epochs or trainer.max_steps, and name it in --run.accept_changes"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End this rank if there are several: the one that failed first prints its error, the others name that rank."""
        if isinstance(pl_module, Task):
            self._close_logs(trainer, pl_module)
        if self.lock is not None:
            self.lock.release()
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
        return {
            "monitor": self.monitor,
            **{name: getattr(self._state, name) for name in KEPT},
            "metrics": metrics,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the run that this one resumes."""
        self._resumed = True
        for name in (*KEPT, "metrics"):
            setattr(self._state, name, state_dict.get(name, getattr(self._state, name)))
        # A value of another metric cannot be compared; older versions took a NaN for the best value.
        if state_dict.get("monitor", self.monitor) != self.monitor or not math.isfinite(self._state.best_value):
            self._state.best_value = -math.inf

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
        for log in self._logs(trainer, pl_module):  # a checkpoint is not newer than the lines up to its step
            log.append()
        content = dump_checkpoint(trainer)
        error = ""
        if trainer.is_global_zero:
            folder = self.root / "checkpoints"
            try:
                check_finite(content["state_dict"])
                write_checkpoint(checkpoint_path(folder, trainer.global_step), content)
            except Exception as raised:  # whatever the writer raises, the run continues
                error = reason(raised)
            else:
                for path in list_checkpoints(folder)[self.keep :]:
                    with suppress(OSError):
                        path.unlink()
                self._write_record(trainer, pl_module)
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
            rank_zero_print(f"saved {checkpoint_path(self.root / 'checkpoints', trainer.global_step)}")
        pl_module.start_clock()

    def _logs(self, trainer: Trainer, pl_module: Task) -> list[LineLog]:
        """Return the logs of this rank."""
        bad = getattr(getattr(trainer, "datamodule", None), "bad_sample_log", None)  # missing before the setup
        metrics = [logger.log for logger in trainer.loggers if isinstance(logger, MetricsFile)]
        return [log for log in (pl_module.skipped_log, None if bad is None else bad.log, *metrics) if log is not None]

    def _close_logs(self, trainer: Trainer, pl_module: Task) -> None:
        for log in self._logs(trainer, pl_module):
            log.close()

    def _save_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Task)
        value = float(trainer.callback_metrics.get(self.monitor or "", math.nan))
        if not self._state.is_better(value) or value == self._tried_value:
            return
        self._tried_value = value  # a model that cannot be written is not tried again until the next measurement
        if not self._save_model(trainer, pl_module, "best"):
            self._state.best_value, self._state.best_step = value, trainer.global_step
            rank_zero_print(f"saved {self.root / 'best'}: {self.monitor} {value:.4g} is the best so far")
            if trainer.is_global_zero:
                self._write_record(trainer, pl_module)

    def _save_model(self, trainer: Trainer, pl_module: Task, name: str) -> str:
        """Write a model directory; return why it cannot be written, the same on all ranks, or nothing."""
        error = ""
        with averaged(trainer):
            weights = trainer.strategy.lightning_module_state_dict()  # unsharded on rank 0, whatever the strategy
            if trainer.is_global_zero:
                whole = {key.removeprefix("model."): x for key, x in weights.items() if key.startswith("model.")}
                try:
                    pl_module.save_model(self.root / name, whole)
                except Exception as raised:  # safetensors has an error of its own for a full disk
                    error = reason(raised)
                    print_unwritten(self.root / name, raised)
        return trainer.strategy.broadcast(error)

    # Record

    def _write_record(self, trainer: Trainer, pl_module: Task) -> None:
        try:
            self._record.write(trainer, pl_module)
        except OSError as error:
            print_unwritten(error.filename or self._record.path, error)

    def _print_summary(self, trainer: Trainer, last: str, report: str) -> None:
        if best := self._state.best:
            has_best = f"best/ has {best['metric']} {best['value']:.4g}"
        else:
            why = f"{self.monitor} was not measured" if self.monitor else "run.monitor is null"
            if math.isfinite(self._tried_value):
                why = "it could not be written"
            has_best = f"best/ is missing, since {why}"
        count = len(trainer.datamodule.bad_sample_log)  # type: ignore[attr-defined]
        bad = f"; {plural(count, 'bad sample')} left out, see {self.root / 'bad_samples.jsonl'}" if count else ""
        rank_zero_print(f"{trainer.global_step:,} steps done; {last}; {has_best}{report}{bad}")
