"""The contrastive task: towers, loss, optimizer and schedule, each from the configuration."""

import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualenc.data import DataError, Pairs, Preprocess
from dualenc.data.plan import draw
from dualenc.evaluation import retrieval_metrics
from dualenc.losses import clip_loss
from dualenc.models import DualEncoder, Embeddings, ImageConfig, TextConfig
from dualenc.training.metrics import PairEmbeddings
from dualenc.training.optim import WarmupCosine, parameter_groups


@rank_zero_only
def say(line: str) -> None:
    """Tells the user, once for all ranks."""
    print(line, file=sys.stderr, flush=True)


def adamw(parameters: Iterable[Any]) -> AdamW:
    """AdamW with the constants of CLIP's ViT models (Radford et al. 2021, table 19)."""
    return AdamW(parameters, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)


class ContrastiveTask(LightningModule):
    """Trains a dual encoder on pairs of images and captions.

    Args:
        image: architecture of the image tower.
        text: architecture of the text tower.
        embed_dim: dimensions of the common space.
        projection: from each tower into it, "linear" or "mlp".
        loss: function of (image, text, scale, bias, group=...), such as `dualenc.losses.clip_loss` or `siglip_loss`.
        logit_bias: learn a bias; `siglip_loss` needs it.
        init_scale: temperature factor at the start; absent, 1/0.07, or 10 with a bias.
        init_bias: bias at the start.
        optimizer: from parameter groups; the second has no weight decay.
        scheduler: from the optimizer and the number of steps; a class.
        pretrained: true for timm's weights of the image tower's name, or a local file of weights.
        patch_dropout: share of image patches left out in training.
        grad_checkpointing: less memory, more computation.
        resize: how evaluation makes images square; see `Preprocess`.
        seed: of dropout; the command line gives it `seed_everything`.
    """

    trainer: Any  # Lightning declares less than its Trainer has

    def __init__(
        self,
        image: ImageConfig,
        text: TextConfig,
        embed_dim: int = 512,
        projection: Literal["linear", "mlp"] = "linear",
        loss: Callable = clip_loss,
        logit_bias: bool = False,
        init_scale: float | None = None,
        init_bias: float = -10.0,
        optimizer: Callable[[Iterable], Optimizer] = adamw,
        scheduler: Callable[[Optimizer, int], LRScheduler] = WarmupCosine,
        pretrained: bool | str = False,
        patch_dropout: float = 0.0,
        grad_checkpointing: bool = False,
        resize: Literal["shortest", "squash", "longest"] = "shortest",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = DualEncoder(
            image,
            text,
            embed_dim,
            projection,
            logit_bias,
            init_scale=init_scale,
            init_bias=init_bias,
            patch_dropout=patch_dropout,
        )
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.preprocess = Preprocess(image.img_size, resize=resize, **self.model.image.data_config)
        self.text_config = text
        self.loss, self.optimizer, self.scheduler = loss, optimizer, scheduler
        self.pretrained, self.seed = pretrained, seed
        self._held_out = PairEmbeddings()
        self.held_out: tuple[Tensor, ...] | None = None  # rows, images, texts of the last validation, on the first rank
        # Since the last log: loss on the device; on the host steps; samples, real tokens, tokens if padded, bad samples
        self._loss: Tensor | float = 0.0
        self._steps, self._counts = 0, [0] * 4
        self._grad_norm: Tensor | None = None
        self._seconds, self._started = 0.0, 0.0  # of training since the last log; when the clock was started

    def setup(self, stage: str) -> None:
        """Loads pretrained weights where a new run begins."""
        if stage == "fit":
            if self.trainer.accumulate_grad_batches != 1:
                raise ValueError(
                    "trainer.accumulate_grad_batches must be 1: the loss compares the pairs of one batch, so summing "
                    "gradients of small batches is not the gradient of a large one; raise data.batch_size instead, "
                    "with model.grad_checkpointing if memory is short"
                )
            if self.pretrained:
                self.model.image.load_pretrained(self.pretrained if isinstance(self.pretrained, str) else None)

    def configure_optimizers(self) -> Any:
        """The optimizer over decay and no-decay groups, its schedule stepped every batch.

        Raises:
            ValueError: the run has no end that a schedule could aim at.
        """
        optimizer = self.optimizer(parameter_groups(self.model))
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("set trainer.max_epochs or trainer.max_steps: the schedule needs the number of steps")
        scheduler = self.scheduler(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Says how large the model is; starts the clock of samples/s."""
        image, text = (
            sum(p.numel() for p in tower.parameters()) / 1e6 for tower in (self.model.image, self.model.text)
        )
        say(f"{image:.1f} M parameters in the image tower, {text:.1f} M in the text tower")
        self.start_clock()

    def start_clock(self) -> None:
        """From here on, time counts for samples/s."""
        self._started = time.monotonic()

    def pause_clock(self) -> None:
        """Until `start_clock`, time does not count: validation is no training."""
        self._seconds += time.monotonic() - self._started

    def on_validation_start(self) -> None:
        """See `pause_clock`."""
        self.pause_clock()

    def on_validation_end(self) -> None:
        """See `start_clock`."""
        self.start_clock()

    def on_train_batch_start(self, batch: Pairs, batch_idx: int) -> None:
        """Dropout depends on (seed, step, rank) alone, so that nothing of a generator needs saving."""
        torch.manual_seed(draw(self.seed, self.global_step, self.global_rank))

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        out = self._embed(batch)
        loss = self.loss(*out, group=dist.group.WORLD if self.trainer.world_size > 1 else None)
        self._loss = self._loss + loss.detach()
        size = len(batch.rows)  # and a padded batch would be as wide as the context length
        padded = size * self.text_config.context_length
        for i, count in enumerate((size, len(batch.tokens.ids), padded, len(batch.bad))):
            self._counts[i] += count
        self._steps += 1
        return loss

    def _embed(self, batch: Pairs) -> Embeddings:
        images = self.preprocess.normalize(batch.images, next(self.model.parameters()).dtype)
        return self.model(images, batch.tokens)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What has summed up is part of a checkpoint, so that a resumed run logs the same."""
        checkpoint["running"] = {
            "loss": float(self._loss),
            "steps": self._steps,
            "counts": self._all_counts(),
            "seconds": self._seconds,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `on_save_checkpoint`."""
        running = checkpoint["running"]
        self._loss, self._steps, self._seconds = running["loss"], running["steps"], running["seconds"]
        self._counts = list(running["counts"]) if self.trainer.is_global_zero else [0] * 4

    def _all_counts(self) -> list[int]:
        """What has summed up on all ranks together."""
        counts = torch.tensor(self._counts, device=self.device)
        return self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by `trainer.gradient_clip_val`; keeps the norm before clipping for the log."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scaled = str(self.trainer.precision).startswith("16")  # where a fused optimizer may undo the scale itself
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and not scaled:
            self._grad_norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
            return
        if self._due(self.global_step + 1):
            self._grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step; then the temperature back in bounds and, every `trainer.log_every_n_steps`, what has summed up.

        Here and not at the batch's end, so that a checkpoint of any callback holds the state after both.
        """
        super().optimizer_step(*args, **kwargs)
        self.model.logits.project()
        step = self.global_step + 1  # the trainer counts it when this returns
        if self._due(step):
            samples, real, padded, bad = self._all_counts()
            self.pause_clock()
            seconds, self._seconds = self._seconds, 0.0
            self.start_clock()
            scale, bias = self.model.logits()
            metrics = {
                "train/loss": float(self._loss) / self._steps,
                "train/lr": self.trainer.optimizers[0].param_groups[0]["lr"],
                "train/logit_scale": scale.item(),
                "train/samples_per_second": samples / seconds,
                "train/padding_avoided": 1 - real / padded,
                "train/bad_samples": bad,
            }
            if bias is not None:
                metrics["train/logit_bias"] = bias.item()
            if self._grad_norm is not None:
                metrics["train/grad_norm"] = self._grad_norm.item()
            self._loss, self._steps, self._counts = 0.0, 0, [0] * 4
            self.publish(metrics, step, bar=("train/loss", "train/samples_per_second"))

    def _due(self, step: int) -> bool:
        every = self.trainer.log_every_n_steps  # 0 for never
        return bool(every) and step % every == 0

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

    def on_validation_epoch_start(self) -> None:
        """Starts anew."""
        self._held_out.reset()

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        """Embeds held-out pairs."""
        out = self._embed(batch)
        good = batch.rows >= 0
        self._held_out.update(out.image[good.to(self.device)], out.text[good.to(self.device)], batch.rows[good])

    def on_validation_epoch_end(self) -> None:
        """Loss and retrieval among all held-out pairs of all ranks, whatever the batch they came in.

        The loss compares all of them with all: of 1,000 pairs it is that of a batch of 1,000.
        """
        rows, image, text = self._held_out.compute()
        scale, bias = self.model.logits()
        found: dict[str, float] | str = {}
        if self.trainer.is_global_zero:
            own = torch.arange(len(image), device=image.device)
            try:
                found = {"loss": float(self.loss(image, text, scale, bias, group=None))}
                found |= retrieval_metrics(image, text, own, replicates=0).metrics
            except ValueError as error:
                found = f"held-out pairs: {error}"
            self.held_out = rows.cpu(), image.cpu(), text.cpu()
        metrics = self.trainer.strategy.broadcast(found)  # or an error, so that all ranks stop
        if isinstance(metrics, str):
            raise DataError(metrics)
        if not self.trainer.sanity_checking:
            stage = "test" if self.trainer.testing else "val"
            bar = ("val/loss", "val/mean_recall@1")
            self.publish({f"{stage}/{name}": value for name, value in metrics.items()}, bar=bar)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
