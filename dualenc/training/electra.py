"""Replaced-token detection (ELECTRA, Clark et al. 2020): pretraining that learns from every token."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualenc.data.loading.epoch_plan import derive_seed
from dualenc.data.text.dataset import Texts
from dualenc.inference.text_model import TextPredictor
from dualenc.metrics.text import replaced_metrics
from dualenc.models import TextConfig
from dualenc.models.electra import DISCRIMINATOR, ReplacedTokenModel, generator_config, replaced_token_losses
from dualenc.models.heads import HEADS, Measured
from dualenc.report import Section
from dualenc.training.contrastive import adamw
from dualenc.training.optim import WarmupCosine
from dualenc.training.ranks import mean_over_ranks
from dualenc.training.task import with_vocabulary
from dualenc.training.text import LanguageTask
from dualenc.utils.errors import DataError

HELD_OUT = 7  # separates the draws of validation from those of training


class ReplacedTokenTask(LanguageTask):
    """Pretraining of a text encoder that detects which tokens a small generator has replaced.

    The data have one head, `rtd`. `best/` and `last/` are the discriminator, which is the encoder to use after
    pretraining; the generator is next to them, in `best-generator/` and `last-generator/`.

    Args:
        text: architecture of the discriminator.
        generator_size: heads and widths of the generator, as a share of the discriminator's; see `generator_config`.
        discriminator_weight: factor of the discriminator's loss; the generator's has 1; 50 in the paper (section 3.1).
        tokenizer: path of the data's tokenizer, whose number of entries replaces `text.vocab_size`; the command line
            takes it from the data.
        optimizer: function of parameter groups, see `parameter_groups`.
        scheduler: class of the schedule, from the optimizer and the number of steps.
        max_skipped: number of consecutive steps with a non-finite loss or gradient that ends the run.
        seed: seed of dropout and of the generator's draws; the command line passes `seed_everything`.
    """

    def __init__(
        self,
        text: TextConfig,
        generator_size: float = 0.25,
        discriminator_weight: float = 50.0,
        tokenizer: str | None = None,
        optimizer: Callable[[Iterable], Optimizer] = adamw,
        scheduler: Callable[[Optimizer, int], LRScheduler] = WarmupCosine,
        max_skipped: int = 20,
        seed: int = 0,
    ) -> None:
        text = with_vocabulary(text, tokenizer)
        model = ReplacedTokenModel(text, generator_config(text, generator_size))
        super().__init__(model, {"rtd": DISCRIMINATOR}, text, optimizer, scheduler, seed, max_skipped)
        self.discriminator_weight = discriminator_weight
        self._frequent: Tensor | None = None  # (V,)

    def step(self, batch: Texts) -> tuple[dict[str, Tensor], dict[str, float], int]:
        """See `LanguageTask.step`."""
        assert batch.masked is not None
        out = self.model(batch.tokens, batch.masked.ids, batch.masked.masked_positions)
        sums = torch.stack(replaced_token_losses(out, batch.masked.labels))
        guessed, judged = mean_over_ranks(sums, [len(out.guesses), len(out.logits)], self.trainer.world_size)
        weights = {"generator": 1.0, "discriminator": self.discriminator_weight}
        return {"generator": guessed, "discriminator": judged}, weights, len(batch.tokens.rows)

    def validation_step(self, batch: Texts, batch_idx: int) -> None:
        """Keep the states of held-out texts, with the same draws each time."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, HELD_OUT, batch_idx, self.global_rank))
            super().validation_step(batch, batch_idx)

    test_step = validation_step

    def observe(self, batch: Texts) -> dict[str, Any]:
        """See `LanguageTask.observe`."""
        if batch.masked is None:  # All lines of the batch are bad.
            return {}
        out = self.model(batch.tokens, batch.masked.ids, batch.masked.masked_positions)
        guessed, judged = replaced_token_losses(out, batch.masked.labels)
        right = (out.guesses.argmax(-1) == batch.masked.labels).sum()
        state = (out.logits.float(), out.replaced, out.ids, guessed, judged, right, len(out.guesses))
        return {"rtd": tuple(x.cpu() if isinstance(x, Tensor) else x for x in state)}

    def measure(
        self, states: dict[str, list[Any]], stage: Literal["val", "test"]
    ) -> tuple[dict[str, float], list[Section]]:
        """Return metrics and sections, see `LanguageTask.measure`.

        Frequent tokens are those that make up half of the training texts.
        """
        if "rtd" not in states:
            raise DataError("not one of them can be read")
        columns = list(zip(*states["rtd"]))
        logits, replaced, ids = (torch.cat(column) for column in columns[:3])
        guessed, judged, right, number = (float(sum(column)) for column in columns[3:])
        if self._frequent is None:
            data = self.trainer.datamodule
            counts = torch.zeros(self.text_config.vocab_size, dtype=torch.int64)
            for text in data.tokenizer.encode(list(data.texts("train", "rtd"))):
                counts += torch.bincount(torch.tensor(text), minlength=len(counts))
            self._frequent = frequent_tokens(counts)
        metrics = replaced_metrics(logits, replaced, self._frequent[ids])
        metrics["loss"] = judged / max(1, len(logits))
        metrics |= {"generator_loss": guessed / max(1.0, number), "generator_accuracy": right / max(1.0, number)}
        measured = Measured(metrics, {}, {"accuracy": metrics["always_original"]}, len(logits), "always original")
        return {f"rtd/{name}": value for name, value in metrics.items()}, [self.section("rtd", HEADS["rtd"], measured)]

    def metric_names(self) -> list[str]:
        """See `Task.metric_names`."""
        flags = torch.tensor([True, False])
        found = replaced_metrics(torch.tensor([1.0, -1.0]), flags, flags)
        return [f"val/rtd/{name}" for name in (*found, "loss", "generator_loss", "generator_accuracy")]

    def save_model(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Write generator and discriminator, see `Task.save_model`.

        The generator is first, so that a discriminator is never without its generator.
        """
        tokenizer, name = self.trainer.datamodule.tokenizer, str(self.trainer.default_root_dir)
        for part, folder in (("generator", path.with_name(f"{path.name}-generator")), ("discriminator", path)):
            own = {key.removeprefix(f"{part}."): x for key, x in weights.items() if key.startswith(f"{part}.")}
            TextPredictor(getattr(self.model, part), tokenizer, name).save(folder, own)


def frequent_tokens(counts: Tensor) -> Tensor:
    """Return a mask (V,) of the most frequent tokens, which make up half of the texts.

    Args:
        counts: (V,) number of occurrences of each token.
    """
    order = torch.argsort(counts, descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    frequent = torch.zeros(len(counts), dtype=torch.bool)
    frequent[order[before * 2 < counts.sum()]] = True
    return frequent & (counts > 0)
