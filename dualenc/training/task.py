"""What the tasks share: optimizer and schedule, dropout that needs no saving, non-finite steps, the log."""

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
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualenc.data.loading.epoch_plan import derive_seed
from dualenc.models import TextConfig
from dualenc.report import Section
from dualenc.training.checkpoint import NORMS, RunState
from dualenc.training.lightning_internals import restore_loader_states
from dualenc.training.optim import Tuning, parameter_groups
from dualenc.training.ranks import Watchdog
from dualenc.utils.errors import DataError
from dualenc.utils.files import append_lines

SKIPPED_STEPS = "skipped_steps.jsonl"
SPIKE = 5.0  # times the median of the last gradient norms
ENOUGH = NORMS // 5  # norms before which a spike cannot be told


@rank_zero_only
def say(line: str) -> None:
    """Tells the user, once for all ranks."""
    print(line, file=sys.stderr, flush=True)


class RunError(DataError):
    """A run that cannot go on."""


class _Step(NamedTuple):
    """A step whose gradient norm the host has not looked at."""

    number: int
    norm: Tensor  # on the host, once the device has come that far
    arrived: Any
    loss: Tensor
    rows: Sequence[int]
    embedded: Sequence[Tensor]


class Task(LightningModule):
    """Trains `model` with any optimizer and schedule; knows how to go on exactly where it was stopped.

    A step whose loss or gradient is not finite on any rank changes nothing on any: the gradient of such a loss is made
    not finite, and the sum over the ranks carries that to all. The step counts, the schedule goes on; the samples are
    written to `skipped_steps.jsonl`, as are those of a gradient norm above `SPIKE` times the median of the last
    `NORMS`.

    Args:
        model: what is trained.
        optimizer: from parameter groups, see `parameter_groups`; its learning rate is times their factors.
        scheduler: from the optimizer and the number of steps; a class.
        seed: of dropout.
        max_skipped: steps in a row that are not finite and end the run.
    """

    trainer: Any  # Lightning declares less than its Trainer has
    noun = "samples"  # what the data consist of
    pretrained: Any = False  # where a new run has weights from

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
            raise ValueError(f"model.max_skipped {max_skipped} must be 1 at least")
        self.model: Any = model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.seed, self.max_skipped = seed, max_skipped
        self.tunings: dict[str, Tuning] = {}  # of parts of the model, by their names
        self.watchdog: Watchdog | None = None  # where there are several ranks
        self.skip: Tensor | None = None  # whether the last step was skipped, on the device
        self.run_state = RunState()
        self._now: tuple[Tensor, Sequence[int], Sequence[Tensor]] | None = None  # loss, rows, embeddings of this step
        self._pending: list[_Step] = []
        self._grad_norm: Tensor | None = None
        self._started: float | None = None  # when the clock was; None while it stands

    def setup(self, stage: str) -> None:
        """Refuses what would be another computation than it seems."""
        if stage == "fit" and self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches must be 1: the loss compares the pairs of one batch, so summing "
                "gradients of small batches is not the gradient of a large one; raise data.batch_size instead, "
                "with data.micro_batch_size if memory is short"
            )

    def configure_optimizers(self) -> Any:
        """The optimizer over `parameter_groups`, its schedule stepped every batch.

        Raises:
            ValueError: the run has no end that a schedule could aim at.
        """
        optimizer = self.optimizer(parameter_groups(self, {f"model.{name}": x for name, x in self.tunings.items()}))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group["factor"]
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("set trainer.max_epochs or trainer.max_steps: the schedule needs the number of steps")
        scheduler = self.scheduler(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # The clock of samples/s: validation is no training.

    def start_clock(self) -> None:
        """From here on, time counts for samples/s."""
        self._started = time.monotonic()
        if self.watchdog is not None:
            self.watchdog.at(self.global_step, "loads")

    def pause_clock(self, doing: str = "evaluates") -> None:
        """Until `start_clock`, time does not count."""
        if self._started is not None:
            self.run_state.seconds += time.monotonic() - self._started
            self._started = None
        if self.watchdog is not None:
            self.watchdog.at(self.global_step, doing)

    def on_train_start(self) -> None:
        """Starts the clock of samples/s."""
        restore_loader_states(self.trainer)
        self.start_clock()

    def on_validation_start(self) -> None:
        """See `pause_clock`."""
        self.pause_clock()

    def on_validation_end(self) -> None:
        """See `start_clock`."""
        self.start_clock()

    # A step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout depends on (seed, step, rank) alone, so that nothing of a generator needs saving."""
        if self.watchdog is not None:
            self.watchdog.at(self.global_step, "trains")
        torch.manual_seed(derive_seed(self.seed, self.global_step, self.global_rank))

    def count(
        self, loss: Tensor, rows: Sequence[int], counts: Sequence[int], embedded: Sequence[Tensor] = ()
    ) -> Tensor:
        """Takes note of a step; returns the loss to go backward from.

        Args:
            loss: 0-d.
            rows: B numbers of the samples in the index.
            counts: samples, real tokens, tokens if padded, bad samples: summed up for the log.
            embedded: (B, E) each; samples whose embeddings are not finite are named first.
        """
        self._now = loss.detach(), rows, [part.detach() for part in embedded]
        for i, number in enumerate(counts):
            self.run_state.counts[i] += number
        self.run_state.steps += 1
        finite = loss.detach().isfinite()
        return loss * torch.where(finite, 1.0, torch.nan)  # a gradient may be finite where its loss is not

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measures the gradient norm, clips by `trainer.gradient_clip_val`, skips what is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        clips = bool(gradient_clip_val) and gradient_clip_algorithm in (None, "norm") and scaler is None
        if clips:
            assert gradient_clip_val is not None
            norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            norm = norm / scaler._scale  # a fused optimizer undoes it itself
        assert self._now is not None
        loss, rows, embedded = self._now
        norm = norm.detach()
        when = ~norm.isfinite()
        self._grad_norm, self.skip = norm, when
        self.run_state.loss = self.run_state.loss + torch.where(when, torch.zeros_like(loss), loss)
        arrived = None
        if scaler is None:  # which otherwise looks itself
            skip(optimizer, when)
        on_host = norm.to("cpu", non_blocking=True)
        if norm.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._look()  # at the step before, while the device is at this one
        self._pending.append(_Step(self.global_step + 1, on_host, arrived, loss, rows, embedded))
        if arrived is None:
            self._look()

    def _look(self) -> None:
        """What the gradient norms that have arrived say; equal on all ranks."""
        pending, self._pending = self._pending, []
        for step in pending:
            if step.arrived is not None:
                step.arrived.synchronize()
            norm = step.norm.item()
            if not math.isfinite(norm):
                self.run_state.skipped += 1
                self.run_state.in_a_row += 1
                named = self._write_down(step, "skipped", norm)
                if self.run_state.in_a_row >= self.max_skipped:
                    raise RunError(
                        f"loss or gradient were not finite in {self.run_state.in_a_row} steps in a row, up to step "
                        f"{step.number}; its samples are {named}, all are in {self._skipped_path}: lower the learning "
                        "rate, or set trainer.precision to bf16-mixed or 32-true"
                    )
                continue
            self.run_state.in_a_row = 0
            if len(self.run_state.norms) >= ENOUGH and norm > SPIKE * statistics.median(self.run_state.norms):
                self.run_state.spikes += 1
                self._write_down(step, "spike", norm)
            self.run_state.norms.append(norm)

    @property
    def _skipped_path(self) -> Path:
        return Path(self.trainer.default_root_dir) / SKIPPED_STEPS

    def _write_down(self, step: _Step, what: str, norm: float) -> str:
        """A line for this rank's samples of a step; some of them in words."""
        index = self.trainer.datamodule.train_index
        broken = torch.zeros(len(step.rows), dtype=torch.bool)
        for part in step.embedded:
            broken |= ~part.float().isfinite().all(-1).cpu()
        shards: dict[str, list[str]] = {}
        first: list[str] = []
        for row, alone in zip(step.rows, broken.tolist(), strict=True):
            sample = index[row]
            shards.setdefault(sample.shard, []).append(sample.key)
            if alone:
                first.append(f"{sample.shard} {sample.key!r}")
        line = {
            "step": step.number,
            "what": what,
            "rank": self.global_rank,
            "loss": _for_json(step.loss.item()),
            "grad_norm": _for_json(norm),
            "median": statistics.median(self.run_state.norms) if self.run_state.norms else None,
            "not_finite": first,
            "samples": shards,
        }
        try:
            append_lines(self._skipped_path, [json.dumps(line)])
        except OSError as error:
            say(f"{self._skipped_path} cannot be written: {error.strerror}")
        named = first or [f"{shard} {key!r}" for shard, keys in shards.items() for key in keys]
        return f"{', '.join(named[:5])}{f' and {len(named) - 5} more' if len(named) > 5 else ''}"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step; then, every `trainer.log_every_n_steps`, what has summed up.

        Here and not at the batch's end, so that a checkpoint of any callback holds the state after both.
        """
        super().optimizer_step(*args, **kwargs)
        self.stepped()
        step = self.global_step + 1  # the trainer counts it when this returns
        every = self.trainer.log_every_n_steps  # 0 for never
        if not every or step % every:
            return
        self._look()
        samples, real, padded, bad = self._all_counts()
        self.pause_clock("trains")
        seconds, self.run_state.seconds = self.run_state.seconds, 0.0
        self.start_clock()
        good = self.run_state.steps - self.run_state.skipped
        assert self._grad_norm is not None
        metrics = {
            "train/loss": float(self.run_state.loss) / good if good else math.nan,
            "train/lr": self.trainer.optimizers[0].param_groups[0]["lr"],  # of what has factor 1
            **self.more_metrics(),
            "train/grad_norm": self._grad_norm.item(),
            "train/grad_spikes": self.run_state.spikes,
            "train/skipped_steps": self.run_state.skipped,
            "train/samples_per_second": samples / seconds,
            "train/padding_avoided": 1 - real / padded,
            "train/bad_samples": bad,
        }
        self.run_state.logged()
        self.publish(metrics, step, bar=("train/loss", "train/samples_per_second"))

    def stepped(self) -> None:
        """After the optimizer's step; for those who derive from this."""

    def more_metrics(self) -> dict[str, float]:
        """For the log; for those who derive from this."""
        return {}

    def _all_counts(self) -> list[int]:
        """What has summed up on all ranks together."""
        counts = torch.tensor(self.run_state.counts, device=self.device)
        return self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()

    def publish(self, metrics: dict[str, float], step: int | None = None, bar: Iterable[str] = ()) -> None:
        """Gives numbers to the loggers (at the current step, or the one named), to callbacks, and some to the bar.

        Not through the trainer's own logging, which takes up to a millisecond a step whether it writes or not.
        """
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.global_step if step is None else step)
        for name, value in metrics.items():
            self.trainer.callback_metrics[name] = torch.tensor(value)
            if name in bar:
                short = name.removeprefix("train/").replace("samples_per_second", "samples/s")
                self.trainer.progress_bar_metrics[short] = value

    # What a run directory asks for

    def save_model(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes a model directory.

        Args:
            path: its name.
            weights: of `model`, whole.

        Raises:
            ModelError: it cannot be written.
        """
        raise NotImplementedError

    def about(self) -> dict[str, str]:
        """The model in words, for the report."""
        return {}

    def sections(self) -> list[Section]:
        """What the last validation found, for the report."""
        return []

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What has summed up is part of a checkpoint, so that a resumed run logs the same."""
        self._look()
        self.run_state.write(checkpoint, self._all_counts())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `on_save_checkpoint`."""
        self.run_state.read(checkpoint, self.trainer.is_global_zero)


def tower_in_words(config: TextConfig) -> str:
    """A text encoder's size."""
    family = f"{config.family}, " if config.family else ""
    return (
        f"{family}{config.layers} layers of width {config.width}, {config.vocab_size:,} entries, up to "
        f"{config.context_length} tokens"
    )


def _for_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def skip(optimizer: Optimizer, when: Tensor) -> None:
    """Lets the next step of an optimizer change nothing, neither parameters nor state, where `when` (0-d) is true.

    On a GPU fused optimizers look themselves; for others the host has to wait for the answer.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False) and when.is_cuda:
        optimizer.grad_scale, optimizer.found_inf = None, when.float()  # type: ignore[attr-defined]
    elif when:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # it takes those without a gradient for not there
