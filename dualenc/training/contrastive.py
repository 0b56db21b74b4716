"""The contrastive task: towers and loss, each from the configuration, and validation on held-out pairs."""

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualenc.data import Pairs, Preprocess
from dualenc.data.image_features import Features
from dualenc.data.images import thumbnail
from dualenc.data.pairs import captions_of, decode_sample
from dualenc.data.text.masking import Masked
from dualenc.evaluation import score_retrieval
from dualenc.formats.huggingface.text_checkpoint import TextCheckpoint, open_text
from dualenc.inference.embedder import Embedder, difference, fingerprint, load, model_directory, read_config
from dualenc.losses import Duplicates, clip_loss
from dualenc.metrics import retrieval_metrics
from dualenc.models import (
    DualConfig,
    DualEncoder,
    Embeddings,
    ImageConfig,
    MaskedLanguageHead,
    TextConfig,
    embed_micro_batches,
    map_micro_batches,
)
from dualenc.report import Section
from dualenc.tokens import Tokens
from dualenc.training.metrics import PairEmbeddings
from dualenc.training.optim import Tuning, WarmupCosine
from dualenc.training.ranks import mean_over_ranks
from dualenc.training.task import Task, describe_text_encoder, rank_zero_print
from dualenc.utils.errors import DataError, ModelError
from dualenc.utils.text import millions


def adamw(parameters: Iterable[Any]) -> AdamW:
    """AdamW with the constants of CLIP's ViT models (Radford et al. 2021, table 19)."""
    return AdamW(parameters, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=True)


BASE = TextConfig()
PLAIN = Tuning()
MASKED = 0.15  # share of the tokens that are hidden for a masked-language-model loss


def is_model(source: bool | str) -> bool:
    """Whether `model.pretrained` names a model of ours, and no weights of timm's."""
    return isinstance(source, str) and (source.startswith("hf-hub:") or Path(source).is_dir())


def _pieces(batch: Pairs | list[Pairs]) -> list[Pairs]:
    return batch if isinstance(batch, list) else [batch]


def _takes_ids(loss: Callable) -> bool:
    parameters = inspect.signature(loss).parameters.values()
    return any(p.name == "ids" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


class Architecture(NamedTuple):
    """What a contrastive run trains, and where it begins."""

    config: DualConfig
    preprocess: Preprocess | None  # of the model that the run begins with, where the architecture is that model's
    text_checkpoint: TextCheckpoint | None  # where the text tower or the tokenizer is from


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
    """Return what a contrastive run trains: what the settings say, or what a pretrained model is.

    Reads configurations and no weights, and changes nothing.

    Args:
        image, text, embed_dim, projection, logit_bias, pretrained, text_from, resize: see `ContrastiveTask`.

    Raises:
        ValueError: the settings contradict each other, or one is missing; names it.
    """
    if isinstance(pretrained, str) and pretrained.startswith("open_clip:"):
        raise ValueError(f"model.pretrained {pretrained}: dualenc import {pretrained} OUT, and name OUT")
    checkpoint = open_text(text_from) if text_from else None
    if checkpoint is not None and is_model(pretrained):
        raise ValueError(f"model.text_from {text_from}: model.pretrained {pretrained} has a text tower already")
    text = checkpoint.config if checkpoint is not None else text
    if image is not None:
        return Architecture(DualConfig(image, text, embed_dim, projection, logit_bias), None, checkpoint)
    if not isinstance(pretrained, str):
        raise ValueError("model.image is missing: say an architecture, or name a model in model.pretrained")
    if not is_model(pretrained):
        raise ValueError(
            f"model.pretrained {pretrained} is no folder, and no hf-hub:owner/name: make it by dualenc import SPEC "
            f"{pretrained}, or say an architecture in model.image"
        )
    own = {"text": text, "embed_dim": embed_dim, "projection": projection, "resize": resize}
    usual = inspect.signature(ContrastiveTask.__init__).parameters
    if said := [name for name, value in own.items() if value != usual[name].default and not text_from]:
        raise ValueError(
            f"model.{said[0]} is that of model.pretrained {pretrained}: leave it away, or say model.image too"
        )
    folder, config, preprocess = read_config(pretrained)
    config = dataclasses.replace(config, logit_bias=logit_bias or config.logit_bias)
    return Architecture(config, preprocess, open_text(folder))


class ContrastiveTask(Task):
    """Trains a dual encoder on pairs of images and captions.

    Args:
        image: architecture of the image tower; absent, the run has that of the model that `pretrained` names, with its
            text tower, projections, preprocessing, and tokenizer unless the data name another.
        text: architecture of the text tower.
        embed_dim: dimensions of the common space.
        projection: from each tower into it, "linear" or "mlp".
        loss: function of (image, text, scale, bias, group=...), such as `dualenc.losses.clip_loss` or `siglip_loss`.
        duplicates: pairs of a batch that share an image or a text are each other's negatives ("ignore"), are not
            ("mask"), or are positives ("positive"); but for "ignore" the loss is called with `ids` and `duplicates`, as
            that of `dualenc.losses`.
        mlm_weight: of a masked-language-model loss (BERT, Devlin et al. 2019) beside the contrastive one. The text
            tower reads the same captions once more with `MASKED` of their tokens hidden, and a head, which is no part
            of the model directory, guesses them. 0 for none.
        logit_bias: learn a bias; `siglip_loss` needs it.
        init_scale: temperature factor at the start; absent, 1/0.07, or 10 with a bias.
        init_bias: bias at the start.
        optimizer: from parameter groups, see `parameter_groups`; its learning rate is times their factors.
        scheduler: from the optimizer and the number of steps; a class.
        pretrained: true for timm's weights of the image tower's name, or a local file of them; or a model directory,
            run directory or hf-hub:owner/name[@revision] for all weights, whose architecture and tokenizer the run
            must have, but for `image.img_size` and dropout, and it may add a bias.
        text_from: a text checkpoint, see `dualenc.load_text`: the text tower has its architecture in place of `text`,
            its weights, and its tokenizer unless the data name another.
        image_tuning: what of the image tower is trained, and how fast.
        text_tuning: likewise of the text tower.
        patch_dropout: share of image patches left out in training.
        grad_checkpointing: less memory, more computation.
        resize: how evaluation makes images square; see `Preprocess`.
        max_skipped: steps in a row whose loss or gradient is not finite, which are skipped, that end the run.
        seed: of dropout; the command line gives it `seed_everything`.
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
        image_tuning: Tuning = PLAIN,
        text_tuning: Tuning = PLAIN,
        patch_dropout: float = 0.0,
        grad_checkpointing: bool = False,
        resize: Literal["shortest", "squash", "longest"] = "shortest",
        max_skipped: int = 20,
        seed: int = 0,
    ) -> None:
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
        self.text_checkpoint = found.text_checkpoint
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.tunings = {"image": image_tuning, "text": text_tuning}
        for name, tuning in self.tunings.items():
            tuning.freeze(getattr(model, name), f"model.{name}_tuning")
        own = Preprocess(shape.image.img_size, resize=resize, **self.model.image.data_config)
        self.preprocess = found.preprocess or own
        self.text_config = text
        if duplicates != "ignore" and not _takes_ids(loss):
            raise ValueError(f"model.duplicates {duplicates} needs a loss that takes ids: set it to ignore")
        self.loss, self.duplicates, self.pretrained = loss, duplicates, pretrained
        if mlm_weight < 0 or (mlm_weight and text_tuning.locked):
            raise ValueError(
                f"model.mlm_weight {mlm_weight} must not be negative, and 0 where model.text_tuning.locked is true"
            )
        self.mlm_weight, self.mlm = mlm_weight, MaskedLanguageHead(text) if mlm_weight else None
        self.masked = MASKED if mlm_weight else 0.0  # share of the tokens that the data hide
        self._mlm_loss: Tensor | None = None
        self._rows: list[int] = []
        self._held_out = PairEmbeddings()
        self.held_out: tuple[Tensor, ...] | None = None  # rows, images, texts of the last validation, on the first rank

    def setup(self, stage: str) -> None:
        """Loads pretrained weights where a new run begins, and looks whether features are of its image tower.

        Raises:
            ValueError: they are not, or the tower is trained.
        """
        super().setup(stage)
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # Lightning's, of frozen parts
        source = self.pretrained
        if stage == "fit" and isinstance(source, str) and is_model(source):
            self._load(source)
        elif stage == "fit" and source:
            self.model.image.load_pretrained(source if isinstance(source, str) else None)
        if stage == "fit" and self.text_checkpoint is not None and not is_model(source) and not self.trainer.ckpt_path:
            self.model.text.load_state_dict(self.text_checkpoint.model().encoder.state_dict())
        if stage == "fit" and self.mlm is not None and not getattr(self.trainer.datamodule, "mask", 0):
            raise ValueError(f"model.mlm_weight needs data that hide words: PairData(mask={MASKED})")
        features = getattr(self.trainer.datamodule, "features", None)
        if stage == "fit" and features is not None:
            self._check_features(features)

    def _check_features(self, features: Features) -> None:
        if not self.tunings["image"].locked:
            raise ValueError(
                f"data.features {features.folder} stand for an image tower that stays as it is: set "
                "model.image_tuning.locked to true, or data.features to null"
            )
        # A run that goes on gets its weights later: the loader's state names the features that it began with.
        if not self.trainer.ckpt_path and fingerprint(self.model.image, self.preprocess) != features.made_by:
            raise ValueError(
                f"data.features {features.folder} are of another image tower or preprocessing than this run's: of "
                f"{features.model}; give the run that one by model.pretrained, or make features of its own by dualenc "
                "embed CONFIG SHARDS OUT --features"
            )

    def _load(self, spec: str) -> None:
        """All weights of a model of ours.

        Raises:
            ModelError: it is another one than this run's; says in what.
        """
        folder = model_directory(spec)
        given = load(folder, "cpu")
        own = Embedder(self.model, self.trainer.datamodule.tokenizer, self.preprocess)
        apart = ["image.img_size", "preprocess.size", "text.dropout"]
        if self.model.config.logit_bias:
            apart.append("logit_bias")
        if found := difference(given, own, apart):
            raise ModelError(f"model.pretrained {spec} and this run differ: {found}; give the run what the model has")
        if given.tokenizer.fingerprint != own.tokenizer.fingerprint:
            raise ModelError(
                f"model.pretrained {spec} has another tokenizer than this run: --data.tokenizer "
                f"{folder / 'tokenizer.json'}"
            )
        self.model.load_pretrained(given.dual_encoder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the weights are of, and how their images are made, is part of a checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["model"] = self._description()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses what the folder of `pretrained` says by now, where the run has its architecture from there.

        Raises:
            ValueError: names what was and is.
        """
        super().on_load_checkpoint(checkpoint)
        now, then = self._description(), checkpoint.get("model", {})
        if self._described and (changed := [name for name in now if then.get(name, now[name]) != now[name]]):
            raise ValueError(
                f"model.pretrained: {changed[0]} {now[changed[0]]} is not the checkpoint's {then[changed[0]]}: put the "
                "model back that the run began with"
            )

    def _description(self) -> dict[str, str]:
        """Architecture and preprocessing, as JSON."""
        parts = {**dataclasses.asdict(self.model.config), "preprocess": dataclasses.asdict(self.preprocess)}
        return {name: json.dumps(value, sort_keys=True) for name, value in parts.items()}

    def embedder(self) -> Embedder:
        """The model as it stands, for evaluation or saving."""
        tokenizer = self.trainer.datamodule.tokenizer
        return Embedder(self.model, tokenizer, self.preprocess, name=str(self.trainer.default_root_dir))

    def save_model(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """See `Task.save_model`."""
        self.embedder().save(path, weights)

    def about(self) -> dict[str, str]:
        """See `Task.about`."""
        image = self.model.config.image
        return {
            "image tower": f"{image.name} {image.overrides or ''} at {image.img_size} pixels",
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
        """Spreads the weights over the ranks, block by block, where the strategy is ModelParallelStrategy (FSDP2).

        Each part whose forward is called alone, as evaluation calls them, is one of its own.
        """
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            if self.mlm is not None:  # its head needs the word embedding, which is whole only while the tower computes
                raise ValueError("model.mlm_weight must be 0 under ModelParallelStrategy: use trainer.strategy ddp")
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            if mesh.size() != self.trainer.world_size:  # the others would have gradients of their own
                raise ValueError(
                    f"ModelParallelStrategy spreads the weights over {mesh.size()} of {self.trainer.world_size} ranks: "
                    "set its data_parallel_size to all of them, tensor_parallel_size to 1"
                )
            model = self.model
            blocks = [*model.image.vit.blocks, *model.text.blocks]
            parts = [model.image, model.text, model.image_projection, model.text_projection, model.logits]
            # What the parts return is never changed in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            for part in (*blocks, *parts):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)  # evaluation has no backward that would do it

    def on_train_start(self) -> None:
        """Says how large the model is, and what of it is trained."""
        sizes = []
        for name in ("image", "text"):
            own = list(getattr(self.model, name).parameters())
            trained = f" ({millions(sum(p.numel() for p in own if p.requires_grad))} trained)"
            frozen = not all(p.requires_grad for p in own)
            sizes.append(f"{millions(sum(p.numel() for p in own))} parameters in the {name} tower{trained * frozen}")
        rank_zero_print(", ".join(sizes))
        super().on_train_start()

    def on_train_batch_start(self, batch: Pairs | list[Pairs], batch_idx: int) -> None:
        """Takes the samples' numbers while they are on the host: DDP moves all tensors of a batch."""
        super().on_train_batch_start(batch, batch_idx)
        self._rows = [row for piece in _pieces(batch) for row in piece.rows.tolist()]

    def training_step(self, batch: Pairs | list[Pairs], batch_idx: int) -> Tensor:
        """Loss of one batch, or of one that comes in pieces."""
        pieces = _pieces(batch)
        images = [piece.images for piece in pieces]
        if self.tunings["image"].locked:  # nothing of it is computed again for a gradient
            with torch.no_grad():
                images = [self.model.image(self._normalized(x)) if x.dim() == 4 else x for x in images]
        out = embed_micro_batches(self._embed, [(x, piece.tokens) for x, piece in zip(images, pieces)])
        loss = self._compare(out, torch.cat([piece.ids for piece in pieces]), self.trainer.world_size > 1)
        if self.mlm is not None:
            loss = loss + self.mlm_weight * self._guess(pieces)
        size, real = len(out.image), sum(len(piece.tokens.ids) for piece in pieces)
        padded, bad = size * self.text_config.context_length, sum(len(piece.bad) for piece in pieces)
        return self.record_batch(loss, self._rows, (size, real, padded, bad), (out.image, out.text))

    def _embed(self, images: Tensor, tokens: Tokens) -> Embeddings:
        return self.model(self._normalized(images), tokens)

    def _normalized(self, images: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        return images.to(dtype) if images.dim() == 2 else self.preprocess.normalize(images, dtype)  # 2: features

    def _guess(self, pieces: Sequence[Pairs]) -> Tensor:
        """Cross entropy of the hidden tokens, the mean over those of all ranks."""
        some = [(piece.tokens, piece.masked) for piece in pieces if piece.masked is not None]
        total = torch.stack(map_micro_batches(self._guess_piece, some)).sum()
        mean = mean_over_ranks(total, sum(len(masked.masked_positions) for _, masked in some), self.trainer.world_size)
        self._mlm_loss = mean.detach()
        return mean

    def _guess_piece(self, tokens: Tokens, masked: Masked) -> Tensor:
        hidden = self.model.text(tokens._replace(ids=masked.ids))[masked.masked_positions]
        logits = self.mlm(hidden, self.model.text.embeddings.token_embeddings.weight)  # type: ignore[misc]
        return F.cross_entropy(logits.float(), masked.labels, reduction="sum")

    def _compare(self, out: Embeddings, ids: Tensor, spread: bool) -> Tensor:
        more = {} if self.duplicates == "ignore" else {"ids": ids, "duplicates": self.duplicates}
        return self.loss(*out, group=dist.group.WORLD if spread else None, **more)

    def after_optimizer_step(self) -> None:
        """The temperature back in bounds."""
        self.model.logits.clamp_scale()

    def extra_metrics(self) -> dict[str, float]:
        """Temperature and bias; the masked-language-model loss of the last step."""
        scale, bias = self.model.logits()
        metrics = {"train/logit_scale": scale.item()}
        if self._mlm_loss is not None:
            metrics["train/mlm_loss"] = self._mlm_loss.item()
        return metrics if bias is None else {**metrics, "train/logit_bias": bias.item()}

    def on_validation_epoch_start(self) -> None:
        """Starts anew."""
        self._held_out.reset()

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        """Embeds held-out pairs."""
        out = self._embed(batch.images, batch.tokens)
        good = batch.rows >= 0
        here = good.to(self.device)
        self._held_out.update(out.image[here], out.text[here], batch.rows[good], batch.ids[here])

    def on_validation_epoch_end(self) -> None:
        """Loss and retrieval among all held-out pairs of all ranks, whatever the batch they came in.

        The loss compares all of them with all: of 1,000 pairs it is that of a batch of 1,000.
        """
        rows, image, text, ids = self._held_out.compute()
        out = Embeddings(image, text, *self.model.logits())
        found: dict[str, float] | str = {}
        if self.trainer.is_global_zero:
            own = torch.arange(len(image), device=image.device)
            try:
                found = {"loss": float(self._compare(out, ids, spread=False))}
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
