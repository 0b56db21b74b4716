"""The text task: one text encoder under one head or several, each with data of its own."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualenc.data.loading.bad_samples import causes
from dualenc.data.loading.epoch_plan import permutation
from dualenc.data.text.dataset import Part, Texts
from dualenc.formats.huggingface.text_checkpoint import TextCheckpoint, open_text
from dualenc.inference.text_model import TextPredictor
from dualenc.losses import clip_loss
from dualenc.metrics import retrieval_metrics
from dualenc.metrics.text import (
    label_bootstrap,
    label_metrics,
    majority_baseline,
    mean_baseline,
    pseudo_perplexity,
    unigram_perplexity,
)
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.models.heads import answers
from dualenc.report import Section
from dualenc.tokens import Tokens
from dualenc.training.contrastive import BASE, PLAIN, adamw
from dualenc.training.optim import Tuning, WarmupCosine
from dualenc.training.ranks import gathered, mean_over_ranks
from dualenc.training.task import Task, say, tower_in_words
from dualenc.utils.errors import DataError
from dualenc.utils.files import append_lines
from dualenc.utils.text import millions

NEGATIVES = 20.0  # scale of the cosines (Reimers and Gurevych 2019, as their library has it)
PREDICTIONS = "predictions.jsonl"


class Measured(NamedTuple):
    """What a head's held-out texts gave."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    chance: dict[str, float]  # the metrics of who has not read the texts
    number: int  # of texts, or tokens


class LanguageTask(Task):
    """What training on texts shares: steps, and figures of held-out texts.

    Args:
        model: what is trained.
        heads: what the data are for, by name.
        text: architecture of the tower that texts are for.
        optimizer, scheduler, seed, max_skipped: see `Task`.
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
        self.text_checkpoint: TextCheckpoint | None = None  # where the tower and the tokenizer are from
        self._rows: list[int] = []
        self._losses: dict[str, Tensor] = {}  # of the last step, by name
        self._found: dict[str, list[Any]] = {}  # of held-out texts, by name
        self._sections: list[Section] = []

    def step(self, batch: Texts) -> tuple[dict[str, Tensor], dict[str, float], int]:
        """Losses of a batch, each the mean over all ranks; their weights; and how many texts have been read."""
        raise NotImplementedError

    def look(self, batch: Texts) -> dict[str, Any]:
        """What is kept of a batch of held-out texts, by name."""
        raise NotImplementedError

    def measure(self, found: dict[str, list[Any]], stage: str) -> tuple[dict[str, float], list[Section]]:
        """Metrics by name, of what `look` has kept on all ranks; and sections of the report."""
        raise NotImplementedError

    def on_train_start(self) -> None:
        """Says how large the model is."""
        own = list(self.model.parameters())
        trained = millions(sum(p.numel() for p in own if p.requires_grad))
        part = "" if all(p.requires_grad for p in own) else f" ({trained} trained)"
        say(f"{millions(sum(p.numel() for p in own))} parameters{part}: {tower_in_words(self.text_config)}")
        super().on_train_start()

    def on_train_batch_start(self, batch: Texts, batch_idx: int) -> None:
        """Takes the samples' numbers while they are on the host."""
        super().on_train_batch_start(batch, batch_idx)
        self._rows = batch.rows.tolist()

    def training_step(self, batch: Texts, batch_idx: int) -> Tensor:
        """The weighted sum of the losses."""
        losses, weights, texts = self.step(batch)
        self._losses = {name: loss.detach() for name, loss in losses.items()}
        loss = torch.stack([weights[name] * part for name, part in losses.items()]).sum()
        counts = len(batch.rows), len(batch.tokens.ids), texts * self.text_config.context_length, len(batch.bad)
        return self.count(loss, self._rows, counts)

    def more_metrics(self) -> dict[str, float]:
        """The losses of the last step, where there are several."""
        several = self._losses if len(self._losses) > 1 else {}
        return {f"train/{name}/loss": float(loss) for name, loss in several.items()}

    def configure_model(self) -> None:
        """Refuses a strategy that spreads the weights."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError("a text task does not spread its weights over the ranks: use trainer.strategy ddp")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the logits mean is part of a checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["heads"] = {name: self._meaning(name) for name in self.heads}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses heads that mean something else.

        Raises:
            ValueError: names the head, and what it was.
        """
        super().on_load_checkpoint(checkpoint)
        for name in self.heads:
            kind, problem, labels = then = checkpoint.get("heads", {}).get(name, self._meaning(name))
            if then != self._meaning(name):  # a head that it has not has no weights there, and is refused for that
                raise ValueError(
                    f"model.heads.{name} is not what the checkpoint has: kind {kind}, problem {problem}, labels "
                    f"{', '.join(labels) or 'none'}"
                )

    def _meaning(self, name: str) -> list[Any]:
        head = self.heads[name]
        return [head.kind, head.problem, list(head.labels)]

    def on_validation_epoch_start(self) -> None:
        """Starts anew."""
        self._found = {}

    def validation_step(self, batch: Texts, batch_idx: int) -> None:
        """Looks at held-out texts."""
        for name, value in self.look(batch).items():
            self._found.setdefault(name, []).append(value)

    def on_validation_epoch_end(self) -> None:
        """Metrics of all held-out texts of all ranks, `STAGE/HEAD/METRIC`."""
        everywhere = gathered(self._found, self.trainer.world_size)
        stage = "test" if self.trainer.testing else "val"
        metrics: dict[str, float] | str = {}
        if self.trainer.is_global_zero:
            names = {name for found in everywhere for name in found}
            whole = {name: [item for found in everywhere for item in found.get(name, [])] for name in sorted(names)}
            try:
                metrics, self._sections = self.measure(whole, stage)
            except ValueError as error:
                metrics = f"held-out texts: {error}"
        metrics = self.trainer.strategy.broadcast(metrics)  # or an error, so that all ranks stop
        if isinstance(metrics, str):
            raise DataError(metrics)
        if not self.trainer.sanity_checking:
            self.publish({f"{stage}/{name}": value for name, value in metrics.items()})

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def section(self, name: str, kind: str, measured: Measured) -> Section:
        """Of the report."""
        result = {
            "dataset": name,
            "kind": kind,
            "model": str(self.trainer.default_root_dir),
            "n": measured.number,
            "complete": True,
            "problems": [],
            "metrics": measured.metrics,
            "intervals": measured.intervals,
            "chance": measured.chance,
        }
        return Section(result, None)

    def about(self) -> dict[str, str]:
        """See `Task.about`."""
        return {"text tower": tower_in_words(self.text_config)}

    def sections(self) -> list[Section]:
        """See `Task.sections`."""
        return self._sections


class TextTask(LanguageTask):
    """Trains a text encoder under one head or several.

    The loss is the sum over the heads of `weight` times the mean over their texts in the batch (of "mlm": over its
    hidden tokens), of all ranks together.

    Args:
        heads: by name; the data name the files of each.
        text: architecture of the encoder.
        text_from: a text checkpoint, see `dualenc.load_text`: the encoder has its architecture in place of `text`, its
            weights, and its tokenizer unless the data name another. Heads that are the same there and here have its
            weights too, and a classification head takes up the layer of a pooler.
        optimizer: from parameter groups, see `parameter_groups`; its learning rate is times their factors.
        scheduler: from the optimizer and the number of steps; a class.
        tuning: what of the encoder is trained, and how fast.
        grad_checkpointing: less memory, more computation.
        scored_tokens: of the held-out texts of "mlm", that `dualenc test` hides one by one for the pseudo-perplexity.
        max_skipped: steps in a row whose loss or gradient is not finite, which are skipped, that end the run.
        seed: of dropout; the command line gives it `seed_everything`.
    """

    def __init__(
        self,
        heads: dict[str, HeadConfig],
        text: TextConfig = BASE,
        text_from: str | None = None,
        optimizer: Callable[[Iterable], Optimizer] = adamw,
        scheduler: Callable[[Optimizer, int], LRScheduler] = WarmupCosine,
        tuning: Tuning = PLAIN,
        grad_checkpointing: bool = False,
        scored_tokens: int = 20_000,
        max_skipped: int = 20,
        seed: int = 0,
    ) -> None:
        if not heads:
            raise ValueError("model.heads names no head: there is nothing to train for")
        if wrong := [name for name, head in heads.items() if head.kind in ("rtd", "pooler")]:
            raise ValueError(
                f"model.heads.{wrong[0]} is of kind {heads[wrong[0]].kind}, which a TextTask does not train: "
                "ReplacedTokenTask does rtd"
            )
        if sum(head.kind == "mlm" for head in heads.values()) > 1:
            raise ValueError("model.heads has two of kind mlm: one reads the texts of both")
        checkpoint = open_text(text_from) if text_from else None
        text = checkpoint.config if checkpoint is not None else text
        model = TextModel(text, heads)
        super().__init__(model, heads, text, optimizer, scheduler, seed, max_skipped)
        self.text_checkpoint, self.scored_tokens = checkpoint, scored_tokens
        self.model.encoder.grad_checkpointing = grad_checkpointing
        self.tunings = {"encoder": tuning}
        tuning.freeze(self.model.encoder, "model.tuning")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("model.tuning.locked leaves nothing to train: the heads have no weights")

    def setup(self, stage: str) -> None:
        """Loads the checkpoint's weights where a new run begins.

        Raises:
            ValueError: heads are trained together on several ranks that cannot be.
        """
        super().setup(stage)
        mixed = len(self.heads) > 1 and getattr(self.trainer.datamodule, "mix", "") == "together"
        negatives = [name for name, head in self.heads.items() if head.problem == "negatives"]
        if stage == "fit" and mixed and negatives and self.trainer.world_size > 1:
            raise ValueError(
                f"model.heads.{negatives[0]} compares the texts of all ranks, which must have as many each: set "
                "data.mix to round_robin"
            )
        if stage == "fit" and self.text_checkpoint is not None and not self.trainer.ckpt_path:
            taken = self.model.load_pretrained(self.text_checkpoint.model())
            random = [name for name in self.heads if not any(name == one.split()[-1] for one in taken)]
            random = [name for name in random if self.heads[name].kind != "embedding"]
            new = f"; random at first: head {', '.join(random)}" if random else ""
            say(f"weights of {self.text_checkpoint.spec}: {', '.join(['the encoder', *taken])}{new}")

    def step(self, batch: Texts) -> tuple[dict[str, Tensor], dict[str, float], int]:
        """See `LanguageTask.step`."""
        hidden, world = self._hidden(batch), self.trainer.world_size
        zero = hidden.new_zeros((), dtype=torch.float32)
        # Every rank counts every head, met or not: the sums over the ranks go on together.
        sums = {name: self._sum(name, hidden, batch) if name in batch.parts else (zero, 0) for name in self.heads}
        numbers = torch.tensor([float(number) for _, number in sums.values()], device=hidden.device)
        means = mean_over_ranks(torch.stack([total for total, _ in sums.values()]), numbers, world)
        met = [name for name in sums if world > 1 or name in batch.parts] or list(sums)  # all bad: none
        losses = {name: mean for name, mean in zip(sums, means) if name in met}
        return losses, {name: head.weight for name, head in self.heads.items()}, len(batch.tokens.rows)

    def _hidden(self, batch: Texts) -> Tensor:
        tokens = batch.tokens if batch.masked is None else batch.tokens._replace(ids=batch.masked.ids)
        return self.model.encoder(tokens)

    def _sum(self, name: str, hidden: Tensor, batch: Texts) -> tuple[Tensor, int]:
        """The sum over this rank's texts or tokens, and how many they are."""
        head, part = self.heads[name], batch.parts[name]
        if head.kind == "mlm":
            assert batch.masked is not None
            logits = self.model.head(name, hidden, batch.tokens, batch.masked.masked_positions)
            return F.cross_entropy(logits.float(), batch.masked.labels, reduction="sum"), len(
                batch.masked.masked_positions
            )
        assert part.labels is not None or head.problem == "negatives"
        if head.kind == "classification":
            logits = self.model.head(name, hidden, batch.tokens)[part.texts].float()
            return _label_loss(head, logits, part.labels), len(part.texts)
        first, second = self._both(name, hidden, batch)
        if head.problem == "negatives":
            group = dist.group.WORLD if self.trainer.world_size > 1 else None
            scale = first.new_tensor(head.scale or NEGATIVES)
            return clip_loss(first, second, scale, group=group) * len(first), len(first)
        assert part.labels is not None
        return ((first * second).sum(-1) - part.labels / (head.scale or 1.0)).square().sum(), len(first)

    def _both(self, name: str, hidden: Tensor, batch: Texts) -> tuple[Tensor, Tensor]:
        """Unit vectors of both sides of the pairs of an embedding head."""
        part: Part = batch.parts[name]
        assert part.others is not None
        vectors = self.model.head(name, hidden, batch.tokens)
        return vectors[part.texts], vectors[part.others]

    def look(self, batch: Texts) -> dict[str, Any]:
        """See `LanguageTask.look`."""
        hidden, kept = self._hidden(batch), {}
        for name, part in batch.parts.items():
            head, labels = self.heads[name], None if part.labels is None else part.labels.cpu()
            if head.kind == "mlm":
                assert batch.masked is not None
                logits = self.model.head(name, hidden, batch.tokens, batch.masked.masked_positions).float()
                loss = F.cross_entropy(logits, batch.masked.labels, reduction="sum").item()
                right = (logits.argmax(-1) == batch.masked.labels).sum().item()
                kept[name] = loss, right, len(batch.masked.masked_positions)
            elif head.kind == "classification":
                logits = self.model.head(name, hidden, batch.tokens)[part.texts]
                kept[name] = logits.float().cpu(), labels
            else:
                first, second = self._both(name, hidden, batch)
                kept[name] = (first.cpu(), second.cpu()), labels
        return kept

    def measure(self, found: dict[str, list[Any]], stage: str) -> tuple[dict[str, float], list[Section]]:
        """See `LanguageTask.measure`."""
        metrics: dict[str, float] = {}
        sections = []
        for name, kept in found.items():
            head = self.heads[name]
            if head.kind == "mlm":
                loss, right, number = (sum(column) for column in zip(*kept))
                loss, right = (loss / number, right / number) if number else (math.nan, math.nan)
                own = {"loss": loss, "perplexity": math.exp(loss), "accuracy": right}
                measured = Measured(own, {}, {}, number)
                if stage == "test":
                    measured = self._beside_ngrams(name, measured)
            elif head.kind == "classification":
                logits = torch.cat([logits for logits, _ in kept])
                labels = torch.cat([labels for _, labels in kept])
                measured = _of_labels(head, logits, labels, self.trainer.datamodule.labels(name))
            else:
                measured = _of_pairs(head, kept)
            metrics |= {f"{name}/{key}": value for key, value in measured.metrics.items()}
            metrics |= {f"{name}/baseline_{key}": value for key, value in measured.chance.items()}
            kinds = {"classification": "labels", "embedding": "text-pairs"}
            sections.append(self.section(name, kinds.get(head.kind, head.kind), measured))
        return metrics, sections

    def _beside_ngrams(self, name: str, measured: "Measured") -> "Measured":
        """The pseudo-perplexity of some held-out texts, and the perplexity of unigrams of the training texts."""
        data = self.trainer.datamodule
        tokenizer, special = data.tokenizer, list(data.tokenizer.special.values())
        measured_part = "test" if data.given["test"] else "val"
        train, held_out = (tokenizer.encode(list(data.texts(part, name))) for part in ("train", measured_part))
        some: list[list[int]] = []
        for place in permutation(len(held_out), self.seed).tolist():
            if sum(map(len, some)) < self.scored_tokens:
                some.append(held_out[place])

        def guess(tokens: Tokens, masked_positions: Tensor) -> Tensor:
            return self.model(tokens.to(self.device), name, masked_positions.to(self.device))

        found = {"pseudo_perplexity": pseudo_perplexity(guess, some, tokenizer.mask_id, special)}
        found["unigram_perplexity"] = unigram_perplexity(train, some, tokenizer.vocab_size, special)
        return measured._replace(metrics={**measured.metrics, **found})

    # Prediction

    def on_predict_start(self) -> None:
        """Begins `predictions.jsonl` anew.

        Raises:
            ValueError: there are several ranks.
        """
        if self.trainer.world_size > 1:
            raise ValueError("predict writes one file: set trainer.devices to 1")
        root = Path(self.trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        (root / PREDICTIONS).write_text("")
        self._written = 0

    def predict_step(self, batch: Texts, batch_idx: int) -> int:
        """Writes a line for each text: file and line that it is from, the head, and what the head says of it.

        Returns:
            How many.
        """
        hidden, index = self._hidden(batch), self.trainer.datamodule.predict_index
        lines: dict[int, dict[str, Any]] = {}
        for name, part in batch.parts.items():
            head = self.heads[name]
            if head.kind == "classification":
                said = answers(head, self.model.head(name, hidden, batch.tokens)[part.texts])
            elif head.kind == "embedding":
                first, second = self._both(name, hidden, batch)
                said = [{"cosine": value} for value in (first * second).sum(-1).tolist()]
            else:
                raise DataError(f"data.predict.{name}: a head of kind {head.kind} predicts no label of a text")
            for row, answer in zip(batch.rows[part.texts.cpu()].tolist(), said, strict=True):
                lines[row] = {"head": name, **answer}
        about = {row: {"file": index[row].shard, "line": index[row].key} for row in lines}
        texts = (json.dumps({**about[row], **lines[row]}, ensure_ascii=False) for row in sorted(lines))
        append_lines(Path(self.trainer.default_root_dir) / PREDICTIONS, texts)
        self._written += len(lines)
        return len(lines)

    def on_predict_end(self) -> None:
        """Says where they are."""
        bad = self.trainer.datamodule.bad_sample_log
        named = f"; {len(bad):,} lines could not be read: {causes(bad.known)}" if len(bad) else ""
        say(f"{self._written:,} predictions are in {Path(self.trainer.default_root_dir) / PREDICTIONS}{named}")

    def save_model(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """See `Task.save_model`."""
        root = str(self.trainer.default_root_dir)
        TextPredictor(self.model, self.trainer.datamodule.tokenizer, root).save(path, weights)


def _label_loss(head: HeadConfig, logits: Tensor, labels: Tensor | None) -> Tensor:
    """The sum over texts (b,) of a classification's loss."""
    assert labels is not None
    if head.problem == "single_label":
        return F.cross_entropy(logits, labels, reduction="sum")
    if head.problem == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1).sum()
    return (logits[:, 0] - labels).square().sum()


def _of_labels(head: HeadConfig, logits: Tensor, labels: Tensor, train: Tensor) -> Measured:
    """Metrics of a classification, beside those of always giving the most frequent answer, or the mean."""
    problem: Any = head.problem
    own = label_metrics(logits, labels, head.labels, problem)
    intervals = label_bootstrap(logits, labels, head.labels, problem).intervals()
    if problem == "regression":
        chance = {"mse": mean_baseline(train, labels)}
    else:
        chance = {"accuracy": majority_baseline(train, labels)}
    own["loss"] = float(_label_loss(head, logits, labels)) / len(labels)
    return Measured(own, intervals, chance, len(labels))


def _of_pairs(head: HeadConfig, kept: list[Any]) -> Measured:
    """Of an embedding: which of the second texts is found by the first, or how cosines go with labels."""
    first, second = (torch.cat([pair[i] for pair, _ in kept]) for i in (0, 1))
    if head.problem == "negatives":
        found = retrieval_metrics(first, second, torch.arange(len(first)), replicates=0).metrics
        names = {"image_retrieval": "first", "text_retrieval": "second"}  # what is looked for
        own = {}
        for key, value in found.items():
            for old, new in names.items():
                key = key.replace(old, new)
            own[key] = value
        return Measured(own, {}, {}, len(first))
    cosines, labels = (first * second).sum(-1), torch.cat([labels for _, labels in kept]) / (head.scale or 1.0)
    own = label_metrics(cosines, labels, ["cosine"], "regression")
    return Measured(own, label_bootstrap(cosines, labels, ["cosine"], "regression").intervals(), {}, len(labels))
