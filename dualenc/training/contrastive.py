"""The contrastive task: towers and loss, each from the configuration, and validation on held-out pairs."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualenc.data import DataError, Pairs, Preprocess
from dualenc.evaluation import retrieval_metrics
from dualenc.losses import clip_loss
from dualenc.models import DualEncoder, Embeddings, ImageConfig, TextConfig
from dualenc.training.metrics import PairEmbeddings
from dualenc.training.optim import WarmupCosine
from dualenc.training.task import Task, say


def adamw(parameters: Iterable[Any]) -> AdamW:
    """AdamW with the constants of CLIP's ViT models (Radford et al. 2021, table 19)."""
    return AdamW(parameters, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=True)


class ContrastiveTask(Task):
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
        max_skipped: steps in a row whose loss or gradient is not finite, which are skipped, that end the run.
        seed: of dropout; the command line gives it `seed_everything`.
    """

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
        max_skipped: int = 20,
        seed: int = 0,
    ) -> None:
        model = DualEncoder(
            image,
            text,
            embed_dim,
            projection,
            logit_bias,
            init_scale=init_scale,
            init_bias=init_bias,
            patch_dropout=patch_dropout,
        )
        super().__init__(model, optimizer, scheduler, seed, max_skipped)
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.preprocess = Preprocess(image.img_size, resize=resize, **self.model.image.data_config)
        self.text_config = text
        self.loss, self.pretrained = loss, pretrained
        self._held_out = PairEmbeddings()
        self.held_out: tuple[Tensor, ...] | None = None  # rows, images, texts of the last validation, on the first rank

    def setup(self, stage: str) -> None:
        """Loads pretrained weights where a new run begins."""
        super().setup(stage)
        if stage == "fit" and self.pretrained:
            self.model.image.load_pretrained(self.pretrained if isinstance(self.pretrained, str) else None)

    def configure_model(self) -> None:
        """Spreads the weights over the ranks, block by block, where the strategy is ModelParallelStrategy (FSDP2).

        Each part whose forward is called alone, as evaluation calls them, is one of its own.
        """
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            model = self.model
            blocks = [*model.image.vit.blocks, *model.text.blocks]
            parts = [model.image, model.text, model.image_projection, model.text_projection, model.logits]
            # What the parts return is never changed in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            for part in (*blocks, *parts):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)  # evaluation has no backward that would do it

    def on_train_start(self) -> None:
        """Says how large the model is."""
        image, text = (
            sum(p.numel() for p in tower.parameters()) / 1e6 for tower in (self.model.image, self.model.text)
        )
        say(f"{image:.1f} M parameters in the image tower, {text:.1f} M in the text tower")
        super().on_train_start()

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        out = self._embed(batch)
        loss = self.loss(*out, group=dist.group.WORLD if self.trainer.world_size > 1 else None)
        size = len(batch.rows)  # and a padded batch would be as wide as the context length
        counts = size, len(batch.tokens.ids), size * self.text_config.context_length, len(batch.bad)
        return self.count(loss, batch.rows, counts, (out.image, out.text))

    def _embed(self, batch: Pairs) -> Embeddings:
        images = self.preprocess.normalize(batch.images, next(self.model.parameters()).dtype)
        return self.model(images, batch.tokens)

    def stepped(self) -> None:
        """The temperature back in bounds."""
        self.model.logits.project()

    def more_metrics(self) -> dict[str, float]:
        """Temperature and bias."""
        scale, bias = self.model.logits()
        metrics = {"train/logit_scale": scale.item()}
        return metrics if bias is None else {**metrics, "train/logit_bias": bias.item()}

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
