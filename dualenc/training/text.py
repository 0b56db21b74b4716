"""The text task: one text encoder under one head or several, each with data of its own."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualenc.data.loading.bad_samples import causes
from dualenc.data.text.dataset import Texts
from dualenc.formats.huggingface.text_checkpoint import TextCheckpoint, open_text
from dualenc.inference.text_model import TextPredictor
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.models.heads import Examples, Head, HeldOut, LoadedHeads, Measured, import_head, make_head
from dualenc.report import Section, verdict
from dualenc.tokens import Tokens
from dualenc.training.contrastive import BASE, PLAIN, adamw
from dualenc.training.evaluation_callback import HeldOutDocuments
from dualenc.training.optim import Tuning, WarmupCosine
from dualenc.training.progress import primary_metrics
from dualenc.training.ranks import all_gather_object, mean_over_ranks
from dualenc.training.task import Task, describe_text_encoder, rank_zero_print, with_vocabulary
from dualenc.utils.errors import DataError, warn_once
from dualenc.utils.files import append_lines
from dualenc.utils.text import millions

PREDICTIONS = "predictions.jsonl"


class LanguageTask(Task):
    """Base of tasks on texts: steps, and metrics of held-out texts.

    Args:
        model: model to train.
        heads: configurations of the heads that the data are for, by name.
        text: architecture of the text encoder.
        optimizer: see `Task`.
        scheduler: see `Task`.
        seed: see `Task`.
        max_skipped: see `Task`.
    """

    noun = "texts"

    def __init__(
        self,
        model: torch.nn.Module,
        heads: Mapping[str, HeadConfig],
        text: TextConfig,
        optimizer: Callable[[Iterable], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler],
        seed: int,
        max_skipped: int,
    ) -> None:
        super().__init__(model, optimizer, scheduler, seed, max_skipped)
        self.heads, self.text_config = dict(heads), text
        self.text_checkpoint: TextCheckpoint | None = None  # of the pretrained encoder and tokenizer
        self._rows: list[int] = []
        self._losses: dict[str, Tensor] = {}  # of the last step, by head
        self._states: dict[str, list[Any]] = {}  # of held-out texts, by head
        self._sections: list[Section] = []

    def step(self, batch: Texts) -> tuple[dict[str, Tensor], dict[str, float], int]:
        """Return the losses of a batch, each the mean over all ranks; their weights; and the number of texts."""
        raise NotImplementedError

    def observe(self, batch: Texts) -> dict[str, Any]:
        """Return what is kept of a batch of held-out texts, by head."""
        raise NotImplementedError

    def measure(
        self, states: dict[str, list[Any]], stage: Literal["val", "test"]
    ) -> tuple[dict[str, float], list[Section]]:
        """Return metrics by name, and sections of the report.

        Args:
            states: returns of `observe` on all ranks, by head.
            stage: stage of the run.
        """
        raise NotImplementedError

    def on_train_start(self) -> None:
        """Print the number of parameters."""
        own = list(self.model.parameters())
        trained = millions(sum(p.numel() for p in own if p.requires_grad))
        part = "" if all(p.requires_grad for p in own) else f" ({trained} trained)"
        rank_zero_print(
            f"{millions(sum(p.numel() for p in own))} parameters{part}: {describe_text_encoder(self.text_config)}"
        )
        super().on_train_start()

    def on_train_batch_start(self, batch: Texts, batch_idx: int) -> None:
        """Keep the rows of the samples while they are on the host."""
        super().on_train_batch_start(batch, batch_idx)
        self._rows = batch.rows.tolist()

    def training_step(self, batch: Texts, batch_idx: int) -> Tensor:
        """Return the weighted sum of the losses."""
        losses, weights, texts = self.step(batch)
        self._losses = {name: loss.detach() for name, loss in losses.items()}
        loss = torch.stack([weights[name] * part for name, part in losses.items()]).sum()
        counts = len(batch.rows), len(batch.tokens.ids), texts * self.text_config.context_length, len(batch.bad)
        return self.record_batch(loss, self._rows, counts)

    def extra_metrics(self) -> dict[str, float]:
        """Return the losses of the last step, where there are several."""
        several = self._losses if len(self._losses) > 1 else {}
        return {f"train/{name}/loss": float(loss) for name, loss in several.items()}

    def configure_model(self) -> None:
        """Refuse a strategy that shards the weights."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError("a text task cannot shard its weights over the ranks: use trainer.strategy ddp")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the meaning of the logits to a checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["heads"] = {name: _as_json(head) for name, head in self.heads.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse heads whose logits mean something else.

        Raises:
            ValueError: If a head differs; the message names it and what the checkpoint has.
        """
        super().on_load_checkpoint(checkpoint)
        for name, head in self.heads.items():
            now = _as_json(head)
            # A head that the checkpoint lacks has no weights there, for which it is refused later.
            kind, problem, labels = then = checkpoint.get("heads", {}).get(name, now)
            if then != now:
                raise ValueError(
                    f"model.heads.{name} differs from the checkpoint's: kind {kind}, problem {problem}, labels "
                    f"{', '.join(labels) or 'none'}"
                )

    def on_validation_epoch_start(self) -> None:
        """Discard the states of the last epoch."""
        self._states = {}

    def validation_step(self, batch: Texts, batch_idx: int) -> None:
        """Keep the states of held-out texts."""
        for name, state in self.observe(batch).items():
            self._states.setdefault(name, []).append(state)

    def on_validation_epoch_end(self) -> None:
        """Publish metrics of the held-out texts of all ranks as `STAGE/HEAD/METRIC`."""
        everywhere = all_gather_object(self._states, self.trainer.world_size)
        stage = "test" if self.trainer.testing else "val"
        metrics: dict[str, float] | str = {}
        if self.trainer.is_global_zero:
            names = {name for states in everywhere for name in states}
            whole = {name: [item for states in everywhere for item in states.get(name, [])] for name in sorted(names)}
            try:
                metrics, self._sections = self.measure(whole, stage)
            except ValueError as error:
                metrics = f"held-out texts: {error}"
        metrics = self.trainer.strategy.broadcast(metrics)  # An error stops all ranks.
        if isinstance(metrics, str):
            raise DataError(metrics)
        if not self.trainer.sanity_checking:
            printed = [f"{stage}/{name}" for name in primary_metrics(self._sections)]
            self.publish({f"{stage}/{name}": value for name, value in metrics.items()}, printed=printed)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def section(self, name: str, head: Head | type[Head], measured: Measured) -> Section:
        """Return the section of a head's metrics.

        Args:
            name: name of the head.
            head: the head, or its kind.
            measured: metrics of the held-out texts.
        """
        result = {
            "dataset": name,
            "kind": head.result_kind,
            "model": str(self.trainer.default_root_dir),
            "n": measured.number,
            "complete": True,
            "problems": [],
            "metrics": measured.metrics,
            "intervals": measured.intervals,
            "chance": measured.chance,
            "baseline": measured.baseline,
            "notes": list(measured.notes),
        }
        for note in measured.notes:
            warn_once(f"{name}: {note}")
        result["verdict"] = verdict(result, head.description)
        return Section(result, measured.findings, description=head.description)

    def about(self) -> dict[str, str]:
        """See `Task.about`."""
        return {"text tower": describe_text_encoder(self.text_config)}

    def sections(self) -> list[Section]:
        """See `Task.sections`."""
        return self._sections


class TextTask(LanguageTask):
    """Training of a text encoder under one head or several.

    The loss is the sum over the heads of `weight` times the mean over their texts in the batch (of "mlm": over the
    masked tokens), of all ranks together.

    Args:
        heads: configurations of the heads by name; the data name the files of each. A kind of your own is named by its
            import path, see `dualenc.models.heads.Head`.
        text: architecture of the encoder.
        text_from: a text checkpoint, see `dualenc.load_text`: the encoder has its architecture in place of `text`, its
            weights, and its tokenizer unless the data name another. Heads that are the same there and here have its
            weights too, and a classification head takes up the layer of a pooler. An embedding head that leaves
            `embedding` open has the dense layers, prompts and dimensions of the checkpoint's.
        tokenizer: path of the data's tokenizer, whose number of entries replaces `text.vocab_size`, except with
            `text_from`; the command line takes it from the data.
        optimizer: function of parameter groups, see `parameter_groups`; its learning rate is multiplied by their
            factors.
        scheduler: class of the schedule, from the optimizer and the number of steps.
        tuning: parts of the encoder that are trained, and their learning rates.
        grad_checkpointing: recompute activations in the backward pass, to save memory.
        scored_tokens: number of tokens of the held-out texts of "mlm" that `dualenc test` masks one by one for the
            pseudo-perplexity.
        max_skipped: number of consecutive steps with a non-finite loss or gradient that ends the run.
        seed: seed of dropout; the command line passes `seed_everything`.
    """

    def __init__(
        self,
        heads: dict[str, HeadConfig],
        text: TextConfig = BASE,
        text_from: str | None = None,
        tokenizer: str | None = None,
        optimizer: Callable[[Iterable], Optimizer] = adamw,
        scheduler: Callable[[Optimizer, int], LRScheduler] = WarmupCosine,
        tuning: Tuning = PLAIN,
        grad_checkpointing: bool = False,
        scored_tokens: int = 20_000,
        max_skipped: int = 20,
        seed: int = 0,
    ) -> None:
        _check_heads(heads)
        checkpoint = open_text(text_from) if text_from else None
        text = checkpoint.config if checkpoint is not None else with_vocabulary(text, tokenizer)
        if checkpoint is not None:
            heads = {name: make_head(head).completed(checkpoint.heads.values()) for name, head in heads.items()}
        model = TextModel(text, heads)
        super().__init__(model, heads, text, optimizer, scheduler, seed, max_skipped)
        self.kinds = model.kinds
        self.text_checkpoint, self.scored_tokens = checkpoint, scored_tokens
        self.model.encoder.grad_checkpointing = grad_checkpointing
        self.tunings = {"encoder": tuning}
        tuning.freeze(self.model.encoder, "model.tuning")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("model.tuning.locked leaves nothing to train: the heads have no weights")

    def setup(self, stage: str) -> None:
        """Load the checkpoint's weights where a new run begins.

        Raises:
            ValueError: If heads cannot be trained together on several ranks.
        """
        super().setup(stage)
        mixed = len(self.heads) > 1 and getattr(self.trainer.datamodule, "mix", "") == "together"
        comparing = [name for name, head in self.kinds.items() if head.compares_ranks]
        if stage == "fit" and mixed and comparing and self.trainer.world_size > 1:
            raise ValueError(
                f"model.heads.{comparing[0]} compares the texts of all ranks, which must have equally many: set "
                "data.mix to round_robin"
            )
        for name, head in self.kinds.items() if stage == "fit" else ():
            try:
                head.prepare(partial(self.trainer.datamodule.labels, name))
            except ValueError as error:
                raise ValueError(f"model.heads.{name}: {error}") from None
        if stage == "fit" and self.text_checkpoint is not None and not self.trainer.ckpt_path:
            loaded = self.model.load_pretrained(self.text_checkpoint.model())
            rank_zero_print(f"weights of {self.text_checkpoint.spec}: {describe_loaded(loaded)}")

    def step(self, batch: Texts) -> tuple[dict[str, Tensor], dict[str, float], int]:
        """See `LanguageTask.step`."""
        hidden, world = self._hidden(batch), self.trainer.world_size
        group = dist.group.WORLD if world > 1 else None
        sums: dict[str, tuple[Tensor, Tensor | int]] = {}
        for name, head in self.kinds.items():
            if name in batch.parts:
                sums[name] = head.sums(self._examples(name, hidden, batch), group)
            else:  # The sums over the ranks must have every head on every rank.
                sums[name] = hidden.new_zeros((), dtype=torch.float32), 0
        totals, numbers = zip(*sums.values())
        means = mean_over_ranks(torch.stack(totals), numbers, world)
        met = [name for name in sums if world > 1 or name in batch.parts] or list(sums)  # all of them if all are bad
        losses = {name: mean for name, mean in zip(sums, means) if name in met}
        return losses, {name: head.weight for name, head in self.heads.items()}, len(batch.tokens.rows)

    def _hidden(self, batch: Texts) -> Tensor:
        tokens = batch.tokens if batch.masked is None else batch.tokens._replace(ids=batch.masked.ids)
        return self.model.encoder(tokens)

    def _examples(self, name: str, hidden: Tensor, batch: Texts) -> Examples:
        """Return logits and labels of a head that has samples in the batch."""
        head, part = self.kinds[name], batch.parts[name]
        positions = batch.masked.masked_positions if head.masking is not None and batch.masked is not None else None
        positions = positions if part.windows is None else part.windows.tokens
        logits = self.model.head(name, hidden, batch.tokens, positions)
        return head.examples(logits, batch, part)

    def observe(self, batch: Texts) -> dict[str, Any]:
        """Return what the heads keep, each with the rows of its samples; see `LanguageTask.observe`."""
        hidden = self._hidden(batch)
        return {
            name: (self.kinds[name].observe(self._examples(name, hidden, batch)), batch.rows[part.texts.cpu()].tolist())
            for name, part in batch.parts.items()
        }

    def measure(
        self, states: dict[str, list[Any]], stage: Literal["val", "test"]
    ) -> tuple[dict[str, float], list[Section]]:
        """See `LanguageTask.measure`."""
        metrics: dict[str, float] = {}
        sections = []
        for name, own in states.items():
            head = self.kinds[name]
            rows = [row for _, some in own for row in some]
            measured = head.metrics([state for state, _ in own], self._held_out(name, stage, rows))
            metrics |= {f"{name}/{key}": value for key, value in measured.metrics.items()}
            metrics |= {f"{name}/baseline_{key}": value for key, value in measured.chance.items()}
            sections.append(self.section(name, head, measured))
        return metrics, sections

    def metric_names(self) -> list[str] | None:
        """See `Task.metric_names`."""
        found: list[str] = []
        for name in self.trainer.datamodule.given["val"]:
            own = self.kinds[name].metric_names()
            if own is None:
                return None
            found += [f"val/{name}/{metric}" for metric in own]
        return found

    def _held_out(self, name: str, stage: Literal["val", "test"], rows: Sequence[int]) -> HeldOut:
        data = self.trainer.datamodule
        measured = "test" if stage == "test" and data.given["test"] else "val"

        def texts(part: Literal["train", "held_out"]) -> Iterable[str]:
            return data.texts("train" if part == "train" else measured, name)

        def logits(tokens: Tokens, positions: Tensor) -> Tensor:
            return self.model(tokens.to(self.device), name, positions.to(self.device))

        def text(i: int) -> str:
            return " / ".join(data.texts_of_row(measured, name, rows[i]))

        labels = partial(data.labels, name)
        return HeldOut(stage, labels, texts, data.tokenizer, logits, text, self.seed, self.scored_tokens)

    # Prediction

    def on_predict_start(self) -> None:
        """Create an empty `predictions.jsonl`.

        Raises:
            ValueError: If there are several ranks.
            DataError: If a head has no predictions.
        """
        if self.trainer.world_size > 1:
            raise ValueError("predict writes one file: set trainer.devices to 1")
        for name in self.trainer.datamodule.given["predict"]:
            if not self.kinds[name].predicts:
                raise DataError(f"data.predict.{name}: a head of kind {self.heads[name].kind} cannot label texts")
        root = Path(self.trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        (root / PREDICTIONS).write_text("")
        self._written = 0

    def predict_step(self, batch: Texts, batch_idx: int) -> int:
        """Write a line for each text: its file and line, the head, and the head's prediction.

        Returns:
            Number of lines.
        """
        hidden, index = self._hidden(batch), self.trainer.datamodule.predict_index
        lines: dict[int, dict[str, Any]] = {}
        for name, part in batch.parts.items():
            found = self.kinds[name].answers(self._examples(name, hidden, batch))
            for row, answer in zip(batch.rows[part.texts.cpu()].tolist(), found, strict=True):
                lines[row] = {"head": name, **answer}
        about = {row: {"file": index[row].shard, "line": index[row].key} for row in lines}
        texts = (json.dumps({**about[row], **lines[row]}, ensure_ascii=False) for row in sorted(lines))
        append_lines(Path(self.trainer.default_root_dir) / PREDICTIONS, texts)
        self._written += len(lines)
        return len(lines)

    def on_predict_end(self) -> None:
        """Print where the predictions are."""
        bad = self.trainer.datamodule.bad_sample_log
        named = f"; {len(bad):,} lines cannot be read: {causes(bad.known)}" if len(bad) else ""
        rank_zero_print(
            f"{self._written:,} predictions are in {Path(self.trainer.default_root_dir) / PREDICTIONS}{named}"
        )

    @property
    def embeds_texts(self) -> bool:  # type: ignore[override]
        """True if a head is trained for embeddings."""
        return bool(self.model.heads_for("sentence-similarity"))

    def embedder(self) -> TextPredictor:
        """See `Task.embedder`."""
        return TextPredictor(self.model, self.trainer.datamodule.tokenizer, str(self.trainer.default_root_dir))

    def save_model(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """See `Task.save_model`."""
        self.embedder().save(path, weights)

    def configure_callbacks(self) -> list[Callback]:
        """Return the measurement of the documents that the data hold out."""
        documents = self.trainer.datamodule.documents
        return [HeldOutDocuments(documents)] if documents else []


def describe_loaded(loaded: LoadedHeads) -> str:
    """Return the parts of a model that have weights of a checkpoint, and the heads that have random weights."""
    parts = ["the encoder", *(f"head {name}" for name in loaded.whole)]
    parts += [f"the first layer of head {name}" for name in loaded.first_layer]
    return ", ".join(parts) + (f"; random at first: head {', '.join(loaded.random)}" if loaded.random else "")


def _check_heads(heads: Mapping[str, HeadConfig]) -> None:
    """Import the kinds of heads that are named by import path, and check that the task can train the heads.

    Raises:
        ValueError: If it cannot; the message names the head.
    """
    if not heads:
        raise ValueError("model.heads names no head: there is nothing to train for")
    masking = []
    for name, head in heads.items():
        try:
            kind = import_head(head.kind)
        except ValueError as error:
            raise ValueError(f"model.heads.{name}: {error}") from None
        if kind.trained_by != TextTask.__name__:
            way_out = f"use {kind.trained_by}" if kind.trained_by else "leave it out"
            raise ValueError(f"model.heads.{name} is of kind {head.kind}, which TextTask cannot train: {way_out}")
        masking += [name] if kind.masking is not None else []
    if len(masking) > 1:
        raise ValueError(f"model.heads: {' and '.join(masking)} read masked tokens: keep one of them")


def _as_json(head: HeadConfig) -> list[Any]:
    """Return the meaning of a head as it comes back from a checkpoint."""
    kind, problem, labels = head.meaning
    return [kind, problem, list(labels)]
