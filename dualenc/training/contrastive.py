"""The contrastive task: towers and losses from the configuration, and validation on held-out pairs."""

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualenc.data import Pairs, Preprocess
from dualenc.data.image_features import Features
from dualenc.data.images import thumbnail
from dualenc.data.pairs import captions_of, decode_sample
from dualenc.evaluation import score_retrieval
from dualenc.formats.huggingface.text_checkpoint import TextCheckpoint, open_text
from dualenc.formats.timm import load_image_weights
from dualenc.inference.embedder import Embedder, difference, fingerprint, load, model_directory, read_config
from dualenc.losses import Duplicates, clip_loss
from dualenc.metrics import retrieval_metrics
from dualenc.models import (
    DualConfig,
    DualEncoder,
    Embeddings,
    ImageConfig,
    TextConfig,
    embed_micro_batches,
)
from dualenc.models.heads import TextModel
from dualenc.models.heads.vectors import EmbeddingConfig
from dualenc.models.tower import WeightCast, compile_blocks
from dualenc.report import Section
from dualenc.tokens import Tokens
from dualenc.training.auxiliary import auxiliary_losses
from dualenc.training.metrics import PairEmbeddings
from dualenc.training.optim import Tuning, WarmupCosine
from dualenc.training.sharding import shard
from dualenc.training.task import Task, describe_text_encoder, rank_zero_print, with_vocabulary
from dualenc.utils.errors import DataError, ModelError
from dualenc.utils.text import millions, plain


def adamw(parameters: Iterable[Any]) -> AdamW:
    """Return AdamW with the constants of CLIP's ViT models (Radford et al. 2021, table 19)."""
    return AdamW(parameters, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=True)


BASE = TextConfig()
PLAIN = Tuning()


def is_model(source: bool | str) -> bool:
    """Return whether `model.pretrained` names a model of dualenc, rather than weights of timm."""
    return isinstance(source, str) and (source.startswith("hf-hub:") or Path(source).is_dir())


def _pieces(batch: Pairs | list[Pairs]) -> list[Pairs]:
    return batch if isinstance(batch, list) else [batch]


def _takes_ids(loss: Callable) -> bool:
    parameters = inspect.signature(loss).parameters.values()
    return any(p.name == "ids" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


class Architecture(NamedTuple):
    """Architecture of a contrastive run, and the parts of a pretrained model that belong to it."""

    config: DualConfig
    preprocess: Preprocess | None  # of the pretrained model, where the architecture is that model's
    text_checkpoint: TextCheckpoint | None  # of the pretrained text tower or tokenizer


def resolve_architecture(
    image: ImageConfig | None,
    text: TextConfig,
    embed_dim: int,
    projection: Literal["linear", "mlp"],
    logit_bias: bool,
    pretrained: bool | str,
    text_from: str | None,
    resize: Literal["shortest", "squash", "longest"],
) -> Architecture:
    """Return the architecture of a contrastive run, from the settings or from a pretrained model.

    Only configurations are read, not weights.

    Args:
        image: see `ContrastiveTask`.
        text: see `ContrastiveTask`.
        embed_dim: see `ContrastiveTask`.
        projection: see `ContrastiveTask`.
        logit_bias: see `ContrastiveTask`.
        pretrained: see `ContrastiveTask`.
        text_from: see `ContrastiveTask`.
        resize: see `ContrastiveTask`.

    Raises:
        ValueError: If settings contradict each other or one is missing; the message names it.
    """
    if isinstance(pretrained, str) and pretrained.startswith("open_clip:"):
        raise ValueError(f"model.pretrained {pretrained}: run `dualenc import {quote(pretrained)} OUT`, then name OUT")
    checkpoint = open_text(text_from) if text_from else None
    if checkpoint is not None and is_model(pretrained):
        raise ValueError(f"model.text_from {text_from}: model.pretrained {pretrained} has a text tower already")
    text = checkpoint.config if checkpoint is not None else text
    if image is not None:
        return Architecture(DualConfig(image, text, embed_dim, projection, logit_bias), None, checkpoint)
    if not isinstance(pretrained, str):
        raise ValueError("model.image is missing: set an architecture, or name a model in model.pretrained")
    if not is_model(pretrained):
        raise ValueError(
            f"model.pretrained {pretrained} must be a folder or hf-hub:owner/name: make it by `dualenc import SPEC "
            f"{pretrained}`, or set an architecture in model.image"
        )
    own = {"text": text, "embed_dim": embed_dim, "projection": projection, "resize": resize}
    defaults = inspect.signature(ContrastiveTask.__init__).parameters
    if given := [name for name, value in own.items() if value != defaults[name].default and not text_from]:
        raise ValueError(
            f"model.{given[0]} is given by model.pretrained {pretrained}: leave it out, or set model.image too"
        )
    folder, config, preprocess = read_config(pretrained)
    config = dataclasses.replace(config, logit_bias=logit_bias or config.logit_bias)
    return Architecture(config, preprocess, open_text(folder))


def _left_out(checkpoint: TextModel) -> str:
    """Return the heads of a text checkpoint, which a dual encoder does not have; an empty string if there are none."""
    parts = []
    for name, head in checkpoint.head_configs.items():
        own = head.embedding or EmbeddingConfig()
        named = {"dense layers": own.dense, "prompts": own.prompts, "dimensions": own.dim}
        parts.append(f"head {name} ({', '.join([head.kind, *(what for what, value in named.items() if value)])})")
    return f"; left out: {', '.join(parts)}" if parts else ""


class ContrastiveTask(Task):
    """Training of a dual encoder on pairs of images and captions.

    Args:
        image: architecture of the image tower; where it is None, the run has that of the model that `pretrained` names,
            with its text tower, projections, preprocessing, and tokenizer unless the data name another.
        text: architecture of the text tower.
        embed_dim: dimensions of the common space.
        projection: map from each tower into the common space, "linear" or "mlp".
        loss: function of (image, text, scale, bias, group=...), such as `dualenc.losses.clip_loss` or `siglip_loss`.
        duplicates: pairs of a batch that share an image or a text are each other's negatives ("ignore"), are not
            ("mask"), or are positives ("positive"); except for "ignore" the loss is called with `ids` and `duplicates`,
            as those of `dualenc.losses`.
        mlm_weight: weight of `MaskedLanguageLoss` (BERT, Devlin et al. 2019) next to the contrastive loss. The text
            tower reads the same captions once more with 15% of their tokens masked, and a head, which is not part of
            the model directory, guesses them. 0 for none.
        logit_bias: learn a bias; `siglip_loss` needs it.
        init_scale: initial temperature factor; where it is None, 1/0.07, or 10 with a bias.
        init_bias: initial bias.
        optimizer: function of parameter groups, see `parameter_groups`; its learning rate is multiplied by their
            factors.
        scheduler: class of the schedule, from the optimizer and the number of steps.
        pretrained: true for timm's weights of the image tower's name, or a local file of them; or a model directory,
            run directory or hf-hub:owner/name[@revision] for all weights, whose architecture and tokenizer the run
            must have, except for `image.img_size` and dropout, and it may add a bias.
        text_from: a text checkpoint, see `dualenc.load_text`: the text tower has its architecture in place of `text`,
            its weights, and its tokenizer unless the data name another.
        tokenizer: path of the data's tokenizer, whose number of entries replaces `text.vocab_size`, except where
            `text_from` or `pretrained` names weights; the command line takes it from the data.
        image_tuning: parts of the image tower that are trained, and their learning rates.
        text_tuning: parts of the text tower that are trained, and their learning rates.
        patch_dropout: share of image patches left out in training.
        grad_checkpointing: recompute activations in the backward pass, to save memory.
        compile: compile the blocks of the towers by `torch.compile`; see `compile_blocks`.
        resize: conversion of images to squares in evaluation; see `Preprocess`.
        max_skipped: number of consecutive steps with a non-finite loss or gradient that ends the run.
        seed: seed of dropout; the command line passes `seed_everything`.
    """

    noun = "pairs"

    def __init__(
        self,
        image: ImageConfig | None = None,
        text: TextConfig = BASE,
        embed_dim: int = 512,
        projection: Literal["linear", "mlp"] = "linear",
        loss: Callable = clip_loss,
        duplicates: Duplicates = "ignore",
        mlm_weight: float = 0.0,
        logit_bias: bool = False,
        init_scale: float | None = None,
        init_bias: float = -10.0,
        optimizer: Callable[[Iterable], Optimizer] = adamw,
        scheduler: Callable[[Optimizer, int], LRScheduler] = WarmupCosine,
        pretrained: bool | str = False,
        text_from: str | None = None,
        tokenizer: str | None = None,
        image_tuning: Tuning = PLAIN,
        text_tuning: Tuning = PLAIN,
        patch_dropout: float = 0.0,
        grad_checkpointing: bool = False,
        compile: bool = False,
        resize: Literal["shortest", "squash", "longest"] = "shortest",
        max_skipped: int = 20,
        seed: int = 0,
    ) -> None:
        # A resumed run must find the same size where the folder of its pretrained model is gone.
        text = text if text_from or isinstance(pretrained, str) else with_vocabulary(text, tokenizer)
        found = resolve_architecture(image, text, embed_dim, projection, logit_bias, pretrained, text_from, resize)
        shape, text = found.config, found.config.text
        self._described = image is None
        model = DualEncoder(
            **{field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)},
            init_scale=init_scale,
            init_bias=init_bias,
            patch_dropout=patch_dropout,
        )
        super().__init__(model, optimizer, scheduler, seed, max_skipped)
        self.weight_cast = WeightCast(model)
        self.text_checkpoint = found.text_checkpoint
        self.model.set_grad_checkpointing(grad_checkpointing)
        if compile:
            compile_blocks(self.model)
        self.tunings = {"image": image_tuning, "text": text_tuning}
        for name, tuning in self.tunings.items():
            tuning.freeze(getattr(model, name), f"model.{name}_tuning")
        own = Preprocess(shape.image.img_size, resize=resize, **self.model.image.data_config)
        self.preprocess = found.preprocess or own
        self.text_config = text
        if duplicates != "ignore" and not _takes_ids(loss):
            raise ValueError(f"model.duplicates {duplicates} needs a loss that takes ids: set it to ignore")
        self.loss, self.duplicates, self.pretrained = loss, duplicates, pretrained
        self.auxiliary = auxiliary_losses(text, text_tuning.locked, mlm_weight)
        for auxiliary in self.auxiliary:
            self.add_module(auxiliary.name, auxiliary.module)
        self.masked = max((one.masked for one in self.auxiliary), default=0.0)  # share of the tokens that data mask
        self._rows: list[int] = []
        self._held_out = PairEmbeddings()
        self.held_out: tuple[Tensor, ...] | None = None  # rows, images, texts of the last validation, on rank 0

    def setup(self, stage: str) -> None:
        """Load pretrained weights where a new run begins, and check that features belong to the image tower.

        Raises:
            ValueError: If they do not, or the tower is trained.
        """
        super().setup(stage)
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # Lightning warns of frozen parts.
        source = self.pretrained
        if stage == "fit" and isinstance(source, str) and is_model(source):
            self._load(source)
        elif stage == "fit" and source:
            load_image_weights(self.model.image, source if isinstance(source, str) else None)
        if stage == "fit" and self.text_checkpoint is not None and not is_model(source) and not self.trainer.ckpt_path:
            checkpoint = self.text_checkpoint.model()
            self.model.text.load_state_dict(checkpoint.encoder.state_dict())
            rank_zero_print(f"weights of {self.text_checkpoint.spec}: the text tower{_left_out(checkpoint)}")
        for auxiliary in self.auxiliary if stage == "fit" else ():
            auxiliary.check_data(self.trainer.datamodule)
        features = getattr(self.trainer.datamodule, "features", None)
        if stage == "fit" and features is not None:
            self._check_features(features)

    def _check_features(self, features: Features) -> None:
        if not self.tunings["image"].locked:
            raise ValueError(
                f"data.features {features.folder} replace an image tower that is not trained: set "
                "model.image_tuning.locked to true, or data.features to null"
            )
        # A resumed run gets its weights later; the loader's state names the features of its beginning.
        if not self.trainer.ckpt_path and fingerprint(self.model.image, self.preprocess) != features.made_by:
            raise ValueError(
                f"data.features {features.folder} were made by another image tower or preprocessing than this run's: "
                f"by {features.model}; set model.pretrained to it, or make features by `dualenc embed CONFIG SHARDS "
                "OUT --features`"
            )

    def _load(self, spec: str) -> None:
        """Load all weights of a model of dualenc.

        Raises:
            ModelError: If the model differs from this run's; the message says in what.
        """
        folder = model_directory(spec)
        given = load(folder, "cpu")
        own = Embedder(self.model, self.trainer.datamodule.tokenizer, self.preprocess)
        may_differ = ["image.img_size", "preprocess.size", "text.dropout"]
        if self.model.config.logit_bias:
            may_differ.append("logit_bias")
        if found := difference(given, own, may_differ):
            raise ModelError(f"model.pretrained {spec} and this run differ: {found}; set the run to what the model has")
        if given.tokenizer.fingerprint != own.tokenizer.fingerprint:
            raise ModelError(
                f"model.pretrained {spec} has another tokenizer than this run: set --data.tokenizer "
                f"{folder / 'tokenizer.json'}"
            )
        self.model.load_pretrained(given.dual_encoder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add architecture and preprocessing to a checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["model"] = self._description()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a model of `pretrained` that has changed, where the run has its architecture from there.

        Raises:
            ValueError: If it differs from the checkpoint; the message names the values of both.
        """
        super().on_load_checkpoint(checkpoint)
        now, then = self._description(), checkpoint.get("model", {})
        if self._described and (changed := [name for name in now if then.get(name, now[name]) != now[name]]):
            raise ValueError(
                f"model.pretrained: {changed[0]} {now[changed[0]]} is not the checkpoint's {then[changed[0]]}: restore "
                "the model that the run began with"
            )

    def _description(self) -> dict[str, str]:
        """Return architecture and preprocessing, as JSON."""
        parts = {**dataclasses.asdict(self.model.config), "preprocess": dataclasses.asdict(self.preprocess)}
        return {name: json.dumps(value, sort_keys=True) for name, value in parts.items()}

    embeds_texts = True

    def embedder(self) -> Embedder:
        """See `Task.embedder`."""
        tokenizer = self.trainer.datamodule.tokenizer
        return Embedder(self.model, tokenizer, self.preprocess, name=str(self.trainer.default_root_dir))

    def save_model(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """See `Task.save_model`."""
        self.embedder().save(path, weights)

    def metric_names(self) -> list[str]:
        """See `Task.metric_names`."""
        data, limit = self.trainer.datamodule, self.trainer.limit_val_batches
        most = limit * data.batch_size if isinstance(limit, int) else 100
        pairs = min(100, most, len(data.val_index))  # recall@K needs K pairs
        vectors = torch.eye(pairs)
        found = retrieval_metrics(vectors, vectors, torch.arange(pairs), replicates=0).metrics
        return ["val/loss", *(f"val/{name}" for name in found)]

    def about(self) -> dict[str, str]:
        """See `Task.about`."""
        image = self.model.config.image
        return {
            "image tower": f"{plain({image.name: image.overrides}).strip()} at {image.img_size} pixels",
            "text tower": describe_text_encoder(self.text_config),
        }

    def sections(self) -> list[Section]:
        """See `Task.sections`."""
        if self.held_out is None:
            return []
        rows, image, text = self.held_out
        data = self.trainer.datamodule
        samples = [data.val_index[row] for row in rows.tolist()]
        captions = [captions_of(sample, data.captions)[0] for sample in samples]
        found = score_retrieval(
            "held-out pairs", image, text, captions, torch.arange(len(samples)),
            picture=lambda i: thumbnail(decode_sample(samples[i])), model=str(self.trainer.default_root_dir),
        )  # fmt: skip
        return [found.section]

    def configure_model(self) -> None:
        """Distribute the weights over the ranks where the strategy is ModelParallelStrategy (FSDP2).

        Raises:
            ValueError: If the strategy or the precision does not suit the task.
        """
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            # The layers of an auxiliary loss may need the token embeddings, which are whole only inside the tower.
            if self.auxiliary:
                raise ValueError(
                    f"{self.auxiliary[0].option} must be 0 under ModelParallelStrategy: use trainer.strategy ddp"
                )
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            if mesh.size() != self.trainer.world_size:  # The other ranks would have gradients of their own.
                raise ValueError(
                    f"ModelParallelStrategy shards the weights over {mesh.size()} of {self.trainer.world_size} ranks: "
                    "set its data_parallel_size to all of them, tensor_parallel_size to 1"
                )
            if str(self.trainer.precision) == "16-mixed":
                raise ValueError(
                    "trainer.precision 16-mixed cannot be used with ModelParallelStrategy, since each rank would scale "
                    "and skip steps by its own part of the gradients: set bf16-mixed, or use trainer.strategy ddp"
                )
            # The outputs of the parts are never changed in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            # The gradients of micro-batches would be summed in half precision.
            whole = getattr(self.trainer.datamodule, "micro_batch_size", None) is None
            half = torch.bfloat16 if whole and str(self.trainer.precision) == "bf16-mixed" else None
            shard(self.model, mesh, half)

    def on_train_start(self) -> None:
        """Print the number of parameters, and how many are trained."""
        sizes = []
        for name in ("image", "text"):
            own = list(getattr(self.model, name).parameters())
            trained = f" ({millions(sum(p.numel() for p in own if p.requires_grad))} trained)"
            frozen = not all(p.requires_grad for p in own)
            sizes.append(f"{millions(sum(p.numel() for p in own))} parameters in the {name} tower{trained * frozen}")
        rank_zero_print(", ".join(sizes))
        super().on_train_start()

    def on_train_batch_start(self, batch: Pairs | list[Pairs], batch_idx: int) -> None:
        """Keep the rows of the samples while they are on the host: DDP moves all tensors of a batch."""
        super().on_train_batch_start(batch, batch_idx)
        self._rows = [row for piece in _pieces(batch) for row in piece.rows.tolist()]

    def training_step(self, batch: Pairs | list[Pairs], batch_idx: int) -> Tensor:
        """Return the loss of a batch, which may come in micro-batches."""
        pieces = _pieces(batch)
        images = [piece.images for piece in pieces]
        if self.tunings["image"].locked:  # Without a gradient nothing is computed twice.
            with torch.no_grad():
                images = [self.model.image(self._normalized(x)) if x.dim() == 4 else x for x in images]
        out = embed_micro_batches(self._embed, [(x, piece.tokens) for x, piece in zip(images, pieces)])
        loss = self._compare(out, torch.cat([piece.ids for piece in pieces]), self.trainer.world_size > 1)
        for auxiliary in self.auxiliary:
            loss = loss + auxiliary.weight * auxiliary.compute(self.model, pieces, self.trainer.world_size)
        size, real = len(out.image), sum(len(piece.tokens.ids) for piece in pieces)
        padded, bad = size * self.text_config.context_length, sum(len(piece.bad) for piece in pieces)
        return self.record_batch(loss, self._rows, (size, real, padded, bad), (out.image, out.text))

    def _embed(self, images: Tensor, tokens: Tokens) -> Embeddings:
        with self.weight_cast.applied(images.device.type):
            return self.model(self._normalized(images), tokens)

    def _normalized(self, images: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        return images.to(dtype) if images.dim() == 2 else self.preprocess.normalize(images, dtype)  # 2: features

    def _compare(self, out: Embeddings, ids: Tensor, distributed: bool) -> Tensor:
        more = {} if self.duplicates == "ignore" else {"ids": ids, "duplicates": self.duplicates}
        return self.loss(*out, group=dist.group.WORLD if distributed else None, **more)

    def after_optimizer_step(self) -> None:
        """Project the temperature into its bounds."""
        self.model.logits.clamp_scale()

    def extra_metrics(self) -> dict[str, float]:
        """Return temperature and bias, and the auxiliary losses of the last step."""
        scale, bias = self.model.logits()
        metrics = {"train/logit_scale": scale.item()}
        for auxiliary in self.auxiliary:
            if auxiliary.latest is not None:
                metrics[f"train/{auxiliary.name}_loss"] = auxiliary.latest.item()
        return metrics if bias is None else {**metrics, "train/logit_bias": bias.item()}

    def on_validation_epoch_start(self) -> None:
        """Discard the embeddings of the last epoch."""
        self._held_out.reset()

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        """Embed held-out pairs."""
        out = self._embed(batch.images, batch.tokens)
        good = (batch.rows >= 0).cpu().nonzero().squeeze(1)
        here = good.to(self.device)  # A mask would make the host wait for the device to count its entries.
        self._held_out.update(out.image[here], out.text[here], batch.rows[good], batch.ids[here])

    def on_validation_epoch_end(self) -> None:
        """Publish loss and retrieval metrics of the held-out pairs of all ranks.

        The loss compares all pairs with each other: for 1,000 pairs it is that of a batch of 1,000.
        """
        rows, image, text, ids = self._held_out.compute()
        out = Embeddings(image, text, *self.model.logits())
        found: dict[str, float] | str = {}
        if self.trainer.is_global_zero:
            own = torch.arange(len(image), device=image.device)
            try:
                found = {"loss": float(self._compare(out, ids, distributed=False))}
                found |= retrieval_metrics(image, text, own, replicates=0).metrics
            except ValueError as error:
                found = f"held-out pairs: {error}"
            self.held_out = rows.cpu(), image.cpu(), text.cpu()
        metrics = self.trainer.strategy.broadcast(found)  # An error stops all ranks.
        if isinstance(metrics, str):
            raise DataError(metrics)
        if not self.trainer.sanity_checking:
            stage = "test" if self.trainer.testing else "val"
            self.publish({f"{stage}/{name}": value for name, value in metrics.items()}, printed=("val/loss", "val/mrr"))

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
