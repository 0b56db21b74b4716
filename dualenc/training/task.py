"""The base class of the tasks: optimizer and schedule, reproducible dropout, skipped steps, and the log."""

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualenc.data.loading.epoch_plan import derive_seed
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.models import TextConfig
from dualenc.report import Section
from dualenc.training.checkpoint import NORMS, CheckpointError, RunState, misfit
from dualenc.training.lightning_internals import restore_loader_states
from dualenc.training.optim import Tuning, clip_gradients, parameter_groups
from dualenc.training.ranks import Watchdog
from dualenc.utils.errors import DataError
from dualenc.utils.files import LineLog
from dualenc.utils.text import print_message, reason

SKIPPED_STEPS = "skipped_steps.jsonl"
SPIKE = 5.0  # a gradient norm above this multiple of the median of the last norms is a spike
MIN_NORMS = NORMS // 5  # norms needed before a spike can be detected


@rank_zero_only
def rank_zero_print(line: str) -> None:
    """Print a line on standard error, on rank 0 only."""
    print_message(line)


def print_unwritten(path: Any, error: BaseException) -> None:
    """Print that a file of the run cannot be written, on rank 0 only."""
    rank_zero_print(f"{path} cannot be written: {reason(error)}")


class RunError(DataError):
    """Error that ends a run, such as too many skipped steps."""


class _Step(NamedTuple):
    """A step whose gradient norm the host has yet to check."""

    number: int
    norm: Tensor  # on the host; valid once `copied` has been reached
    copied: Any  # CUDA event after the copy of the norm; None on a CPU
    loss: Tensor
    rows: Sequence[int]
    embedded: Sequence[Tensor]


class Task(LightningModule):
    """Base class of the tasks: trains `model` with any optimizer and schedule, and resumes exactly.

    A step whose loss or gradient is non-finite on any rank is skipped on all ranks: a non-finite loss makes its
    gradient non-finite, and the sum over the ranks carries that to all of them. A skipped step counts as a step, and
    the schedule advances. The samples of skipped steps are written to `skipped_steps.jsonl`, and so are those of
    spikes: steps whose gradient norm exceeds `SPIKE` times the median of the last `NORMS`.

    Args:
        model: model to train.
        optimizer: function from parameter groups to an optimizer, see `parameter_groups`; each group's learning rate
            is multiplied by its factor.
        scheduler: function from the optimizer and the number of steps to a schedule.
        seed: seed of dropout.
        max_skipped: number of consecutive skipped steps that ends the run.
    """

    trainer: Any  # Lightning declares fewer attributes than its Trainer has
    noun = "samples"  # name of the samples in reports, such as "pairs"
    pretrained: Any = False  # source of the weights of a new run

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler],
        seed: int,
        max_skipped: int,
    ) -> None:
        super().__init__()
        if max_skipped < 1:
            raise ValueError(f"model.max_skipped {max_skipped} must be at least 1")
        self.model: Any = model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.seed, self.max_skipped = seed, max_skipped
        self.tunings: dict[str, Tuning] = {}  # settings of parts of the model, by their names
        self.watchdog: Watchdog | None = None  # set if there are several ranks
        self.skip: Tensor | None = None  # (), bool, on the device: whether the last step was skipped
        self.run_state = RunState()
        self._batch: tuple[Tensor, Sequence[int], Sequence[Tensor]] | None = None  # loss, rows, embeddings of this step
        self._pending: list[_Step] = []
        self._grad_norm: Tensor | None = None
        self._clock_start: float | None = None  # None while the clock is paused
        self.skipped_log: LineLog | None = None  # in training
        self._failed_loggers: set[int] = set()
        self.check_resume: Callable[[dict[str, Any]], None] | None = None  # set by `RunDirectory`
        self.print_metrics: Callable[[Mapping[str, float], int, Iterable[str]], None] | None = None  # by `Progress`
        self.optimizer_options: list[dict[str, Any]] = []  # settings of each parameter group of the new optimizer

    def setup(self, stage: str) -> None:
        """Refuse settings of the trainer that would train wrongly, and open the log of skipped steps.

        Raises:
            ValueError: If gradients are accumulated, since the sum over small batches is not the gradient of a large
                batch; or if weights are kept in half precision, which rounds small updates away.
        """
        if stage != "fit":
            return
        self.skipped_log = LineLog(Path(self.trainer.default_root_dir) / SKIPPED_STEPS)
        if str(self.trainer.precision) in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision {self.trainer.precision} keeps the weights in half precision, in which weights "
                "near 1, such as the gains of LayerNorm, and the temperature do not change by small updates: set "
                "bf16-mixed"
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches must be 1: the loss compares the pairs of one batch, so summing "
                "gradients of small batches is not the gradient of a large one; raise data.batch_size instead, "
                "with data.micro_batch_size if memory is short"
            )

    def configure_optimizers(self) -> Any:
        """Return the optimizer over `parameter_groups`, and its schedule, which advances every step.

        Raises:
            ValueError: If the run has no end, from which the schedule takes its number of steps.
        """
        optimizer = self.optimizer(parameter_groups(self, {f"model.{name}": x for name, x in self.tunings.items()}))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group["factor"]
        self.optimizer_options = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("set trainer.max_epochs or trainer.max_steps: the schedule needs the number of steps")
        scheduler = self.scheduler(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # The clock of samples/s, which counts training time only.

    def start_clock(self) -> None:
        """Start counting time for samples/s."""
        self._clock_start = time.monotonic()
        if self.watchdog is not None:
            self.watchdog.report(self.global_step, "loading")

    def pause_clock(self, phase: str = "evaluating") -> None:
        """Stop counting time for samples/s until `start_clock`.

        Args:
            phase: what the rank does in the meantime, for the watchdog.
        """
        if self._clock_start is not None:
            self.run_state.seconds += time.monotonic() - self._clock_start
            self._clock_start = None
        if self.watchdog is not None:
            self.watchdog.report(self.global_step, phase)

    def on_train_start(self) -> None:
        """Restore the state of the data loaders, and start the clock of samples/s."""
        restore_loader_states(self.trainer)
        self.start_clock()

    def on_validation_start(self) -> None:
        """Pause the clock of samples/s."""
        self.pause_clock()

    def on_validation_end(self) -> None:
        """Start the clock of samples/s again."""
        self.start_clock()

    # A step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the seed of dropout from (seed, step, rank), so that checkpoints need no generator state."""
        if self.watchdog is not None:
            self.watchdog.report(self.global_step, "training")
        seed = derive_seed(self.seed, self.global_step, self.global_rank)
        # As torch.manual_seed, which looks for devices of all kinds and so takes 0.1 ms.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def record_batch(
        self, loss: Tensor, rows: Sequence[int], counts: Sequence[int], embedded: Sequence[Tensor] = ()
    ) -> Tensor:
        """Record a batch for the log and for the check of its step, and return the loss to backpropagate.

        Args:
            loss: (), loss of the batch.
            rows: B rows of the samples in the index.
            counts: numbers of samples, real tokens, tokens if padded, and bad samples, which are summed for the log.
            embedded: embeddings, (B, E) each; if the step is skipped, samples with non-finite ones are named first.

        Returns:
            The loss, (); a non-finite loss is replaced by one whose gradient is non-finite too.
        """
        self._batch = loss.detach(), rows, [part.detach() for part in embedded]
        for i, number in enumerate(counts):
            self.run_state.counts[i] += number
        self.run_state.steps += 1
        finite = loss.detach().isfinite()
        return loss * torch.where(finite, 1.0, torch.nan)  # a non-finite loss may have a finite gradient

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Compute the gradient norm, clip by `trainer.gradient_clip_val`, and skip a non-finite step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # A fused optimizer unscales the gradients itself, in its step.
        unscales = getattr(optimizer, "_step_supports_amp_scaling", False)
        scale = scaler._scale if scaler is not None and unscales else None
        norm = clip_gradients(parameters, gradient_clip_val, gradient_clip_algorithm, scale)
        assert self._batch is not None
        loss, rows, embedded = self._batch
        self._grad_norm, skip = norm, ~norm.isfinite()
        self.skip = skip
        self.run_state.loss = self.run_state.loss + torch.where(skip, torch.zeros_like(loss), loss)
        copied = None
        if scaler is None:  # a gradient scaler skips non-finite steps itself
            skip_step(optimizer, skip)
        on_host = norm.to("cpu", non_blocking=True)
        if norm.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._check_pending_steps()  # of the step before, while the device computes this one
        self._pending.append(_Step(self.global_step + 1, on_host, copied, loss, rows, embedded))
        if copied is None:
            self._check_pending_steps()

    def _check_pending_steps(self) -> None:
        """Check the gradient norms of steps that are pending, and log non-finite ones and spikes.

        The norms are equal on all ranks, so all ranks come to the same result.

        Raises:
            RunError: If too many consecutive steps are non-finite.
        """
        pending, self._pending = self._pending, []
        for step in pending:
            if step.copied is not None:
                step.copied.synchronize()
            norm = step.norm.item()
            if not math.isfinite(norm):
                self.run_state.skipped += 1
                self.run_state.in_a_row += 1
                assert self.skipped_log is not None
                if self.run_state.skipped == 1:  # the log counts those that follow
                    rank_zero_print(
                        f"step {step.number:,} skipped: loss or gradient was not finite, see {self.skipped_log.path}"
                    )
                samples = self._log_samples(step, "skipped", norm)
                if self.run_state.in_a_row >= self.max_skipped:
                    raise RunError(
                        f"loss or gradient was not finite in {self.run_state.in_a_row} consecutive steps, up to step "
                        f"{step.number} with the samples {samples}; {self.skipped_log.path} lists all samples: lower "
                        "the learning rate, or set trainer.precision to bf16-mixed or 32-true"
                    )
                continue
            self.run_state.in_a_row = 0
            if len(self.run_state.norms) >= MIN_NORMS and norm > SPIKE * statistics.median(self.run_state.norms):
                self.run_state.spikes += 1
                self._log_samples(step, "spike", norm)
            self.run_state.norms.append(norm)

    def teardown(self, stage: str) -> None:
        """Close the log of skipped steps."""
        if self.skipped_log is not None:
            self.skipped_log.close()

    def _log_samples(self, step: _Step, what: str, norm: float) -> str:
        """Append this rank's samples of a step to `skipped_steps.jsonl`, and return the names of up to five samples."""
        index = self.trainer.datamodule.train_index
        broken = torch.zeros(len(step.rows), dtype=torch.bool)
        for part in step.embedded:
            broken |= ~part.float().isfinite().all(-1).cpu()
        shards: dict[str, list[str]] = {}
        non_finite: list[str] = []
        for row, is_broken in zip(step.rows, broken.tolist(), strict=True):
            sample = index[row]
            shards.setdefault(sample.shard, []).append(sample.key)
            if is_broken:
                non_finite.append(f"{sample.shard} {sample.key!r}")
        line = {
            "step": step.number,
            "what": what,
            "rank": self.global_rank,
            "loss": _for_json(step.loss.item()),
            "grad_norm": _for_json(norm),
            "median": statistics.median(self.run_state.norms) if self.run_state.norms else None,
            "not_finite": non_finite,
            "samples": shards,
        }
        assert self.skipped_log is not None
        self.skipped_log.append([json.dumps(line)])
        names = non_finite or [f"{shard} {key!r}" for shard, keys in shards.items() for key in keys]
        return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, and log every `trainer.log_every_n_steps` steps.

        The log is written here and not at the end of the batch, so that a checkpoint which any callback saves there
        holds the state after the log.
        """
        super().optimizer_step(*args, **kwargs)
        self.after_optimizer_step()
        step = self.global_step + 1  # the trainer counts the step when this method returns
        every = self.trainer.log_every_n_steps  # 0 for never
        if not every or step % every:
            return
        self._check_pending_steps()
        samples, real, padded, bad = self._counts_of_all_ranks()
        self.pause_clock("training")
        seconds, self.run_state.seconds = self.run_state.seconds, 0.0
        self.start_clock()
        taken = self.run_state.steps - self.run_state.skipped
        assert self._grad_norm is not None
        metrics = {
            "train/loss": float(self.run_state.loss) / taken if taken else math.nan,
            "train/lr": self.trainer.optimizers[0].param_groups[0]["lr"],  # of the group with factor 1
            **self.extra_metrics(),
            "train/grad_norm": self._grad_norm.item(),
            "train/grad_spikes": self.run_state.spikes,
            "train/skipped_steps": self.run_state.skipped,
            "train/samples_per_second": samples / seconds,
            "train/padding_avoided": 1 - real / padded,
            "train/bad_samples": bad,
        }
        self.run_state.reset_sums()
        self.publish(metrics, step)

    def after_optimizer_step(self) -> None:
        """Run after each step of the optimizer; subclasses override this."""

    def extra_metrics(self) -> dict[str, float]:
        """Return more metrics for the log of a step; subclasses override this."""
        return {}

    def _counts_of_all_ranks(self) -> list[int]:
        """Return the counts since the last log, summed over the ranks."""
        counts = torch.tensor(self.run_state.counts, device=self.device)
        return self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()

    def publish(self, metrics: dict[str, float], step: int | None = None, printed: Iterable[str] = ()) -> None:
        """Send metrics to the loggers and the callbacks, and print them.

        This does not use the trainer's own logging, which takes up to a millisecond a step whether it writes or not.

        Args:
            metrics: values by name.
            step: step of the values; absent, the current one.
            printed: names of the metrics to print of a measurement, the monitored one aside.
        """
        step = self.global_step if step is None else step
        for number, logger in enumerate(self.trainer.loggers):
            try:
                logger.log_metrics(metrics, step=step)
            except OSError as error:  # a full disk must not end a run because of a log
                if number not in self._failed_loggers:
                    rank_zero_print(f"{type(logger).__name__} cannot log step {self.global_step:,}: {reason(error)}")
                self._failed_loggers.add(number)
        for name, value in metrics.items():
            self.trainer.callback_metrics[name] = torch.tensor(value, dtype=torch.float64)  # exactly as logged
        if self.print_metrics is not None:
            self.print_metrics(metrics, step, printed)

    # Hooks of `RunDirectory`

    def metric_names(self) -> list[str] | None:
        """Return the names of the metrics of held-out data; None if they are not known before they are measured."""
        return None

    def save_model(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a model directory.

        Args:
            path: path of the directory.
            weights: unsharded weights of `model`.

        Raises:
            ModelError: If the directory cannot be written.
        """
        raise NotImplementedError

    def about(self) -> dict[str, str]:
        """Return facts about the model for the report, by title."""
        return {}

    embeds_texts = False  # if the model embeds texts, for which it has been trained

    def embedder(self) -> Any:
        """Return the model with its present weights, for evaluation or saving; None for one that does not embed."""
        return None

    def sections(self) -> list[Section]:
        """Return the results of the last validation for the report."""
        return []

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the sums since the last log to a checkpoint, so that a resumed run logs the same values."""
        self._check_pending_steps()
        self.run_state.save_to(checkpoint, self._counts_of_all_ranks())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of a run with other settings, and restore what `on_save_checkpoint` has added."""
        if self.check_resume is not None:
            self.check_resume(checkpoint)
        elif found := misfit(checkpoint, self):
            raise CheckpointError(
                f"the checkpoint does not fit the model: {found}; use the configuration of its run, config.yaml"
            )
        self.run_state.load_from(checkpoint, self.trainer.is_global_zero)


def describe_text_encoder(config: TextConfig) -> str:
    """Describe the size of a text encoder, for logs and reports."""
    family = f"{config.family}, " if config.family else ""
    return (
        f"{family}{config.layers} layers of width {config.width}, {config.vocab_size:,} entries, up to "
        f"{config.context_length} tokens"
    )


def with_vocabulary(text: TextConfig, tokenizer: str | None) -> TextConfig:
    """Return an architecture of a text encoder with one token embedding for each entry of a tokenizer.

    Args:
        text: the architecture, from the settings of a run.
        tokenizer: path of the tokenizer that the data name; None keeps `vocab_size`, for a tokenizer to be trained.

    Raises:
        DataError: If the tokenizer cannot be read.
    """
    if tokenizer is None:
        return text
    size = Tokenizer.from_file(tokenizer, sys.maxsize).vocab_size
    if text.vocab_size not in (size, TextConfig.vocab_size):
        rank_zero_print(
            f"the text encoder takes the {size:,} entries of {tokenizer}; model.text.vocab_size {text.vocab_size:,} is "
            "not used"
        )
    return dataclasses.replace(text, vocab_size=size)


def _for_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def skip_step(optimizer: Optimizer, when: Tensor) -> None:
    """Let the next step of an optimizer change neither parameters nor state if `when` is true.

    Args:
        optimizer: optimizer; a fused one on a GPU reads `when` on the device, for others the host waits for it.
        when: (), bool.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False) and when.is_cuda:
        optimizer.grad_scale, optimizer.found_inf = None, when.float()  # type: ignore[attr-defined]
    elif when:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # optimizers ignore parameters without a gradient
