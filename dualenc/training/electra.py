"""Replaced-token detection (ELECTRA, Clark et al. 2020): pretraining that learns from every token."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dualenc.data.loading.epoch_plan import derive_seed
from dualenc.data.text.dataset import Texts
from dualenc.inference.text_model import TextPredictor
from dualenc.metrics.text import replaced_metrics
from dualenc.models import HeadConfig, TextConfig
from dualenc.models.electra import ReplacedTokenModel, generator_config, replaced_token_losses
from dualenc.report import Section
from dualenc.training.contrastive import adamw
from dualenc.training.optim import WarmupCosine
from dualenc.training.ranks import mean_over_ranks
from dualenc.training.text import LanguageTask, Measured
from dualenc.utils.errors import DataError

HELD_OUT = 7  # keeps the draws of validation apart from those of training


class ReplacedTokenTask(LanguageTask):
    """Pretrains a text encoder by telling which tokens a small generator has replaced.

    The data have one head, `rtd`. `best/` and `last/` are the discriminator, which is the encoder to go on with;
    `best-generator/` and `last-generator/` lie beside them.

    Args:
        text: architecture of the discriminator.
        generator_size: of the generator's heads and widths, as a share of the discriminator's; see `generator_config`.
        discriminator_weight: of the discriminator's loss beside the generator's; 50 in the paper (section 3.1).
        optimizer: from parameter groups, see `parameter_groups`.
        scheduler: from the optimizer and the number of steps; a class.
        max_skipped: steps in a row whose loss or gradient is not finite, which are skipped, that end the run.
        seed: of dropout and of the generator's draws; the command line gives it `seed_everything`.
    """

    def __init__(
        self,
        text: TextConfig,
        generator_size: float = 0.25,
        discriminator_weight: float = 50.0,
        optimizer: Callable[[Iterable], Optimizer] = adamw,
        scheduler: Callable[[Optimizer, int], LRScheduler] = WarmupCosine,
        max_skipped: int = 20,
        seed: int = 0,
    ) -> None:
        model = ReplacedTokenModel(text, generator_config(text, generator_size))
        super().__init__(model, {"rtd": HeadConfig("rtd")}, text, optimizer, scheduler, seed, max_skipped)
        self.discriminator_weight = discriminator_weight
        self._frequent: Tensor | None = None  # (V,)

    def step(self, batch: Texts) -> tuple[dict[str, Tensor], dict[str, float], int]:
        """See `LanguageTask.step`."""
        assert batch.masked is not None
        out = self.model(batch.tokens, batch.masked.ids, batch.masked.masked_positions)
        sums = torch.stack(replaced_token_losses(out, batch.masked.labels))
        numbers = torch.tensor([float(len(out.guesses)), float(len(out.logits))], device=sums.device)
        guessed, judged = mean_over_ranks(sums, numbers, self.trainer.world_size)
        weights = {"generator": 1.0, "discriminator": self.discriminator_weight}
        return {"generator": guessed, "discriminator": judged}, weights, len(batch.tokens.rows)

    def validation_step(self, batch: Texts, batch_idx: int) -> None:
        """Looks at held-out texts, with the same draws each time."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, HELD_OUT, batch_idx, self.global_rank))
            super().validation_step(batch, batch_idx)

    test_step = validation_step

    def look(self, batch: Texts) -> dict[str, Any]:
        """See `LanguageTask.look`."""
        if batch.masked is None:  # all of its lines are bad
            return {}
        out = self.model(batch.tokens, batch.masked.ids, batch.masked.masked_positions)
        guessed, judged = replaced_token_losses(out, batch.masked.labels)
        right = (out.guesses.argmax(-1) == batch.masked.labels).sum()
        kept = (out.logits.float(), out.replaced, out.ids, guessed, judged, right, len(out.guesses))
        return {"rtd": tuple(x.cpu() if isinstance(x, Tensor) else x for x in kept)}

    def measure(self, found: dict[str, list[Any]], stage: str) -> tuple[dict[str, float], list[Section]]:
        """See `LanguageTask.measure`; frequent are the tokens that make up half of the training texts."""
        if "rtd" not in found:
            raise DataError("not one of them can be read")
        logits, replaced, ids = (torch.cat(column) for column in list(zip(*found["rtd"]))[:3])
        guessed, judged, right, number = (float(sum(column)) for column in list(zip(*found["rtd"]))[3:])
        if self._frequent is None:
            data = self.trainer.datamodule
            counts = torch.zeros(self.text_config.vocab_size, dtype=torch.int64)
            for text in data.tokenizer.encode(list(data.texts("train", "rtd"))):
                counts += torch.bincount(torch.tensor(text), minlength=len(counts))
            self._frequent = frequent_tokens(counts)
        metrics = replaced_metrics(logits, replaced, self._frequent[ids])
        metrics["loss"] = judged / max(1, len(logits))
        metrics |= {"generator_loss": guessed / max(1.0, number), "generator_accuracy": right / max(1.0, number)}
        measured = Measured(metrics, {}, {"accuracy": metrics["always_original"]}, len(logits))
        return {f"rtd/{name}": value for name, value in metrics.items()}, [self.section("rtd", "rtd", measured)]

    def save_model(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """See `Task.save_model`: the generator first, so that where there is a model there are both."""
        tokenizer, name = self.trainer.datamodule.tokenizer, str(self.trainer.default_root_dir)
        for part, folder in (("generator", path.with_name(f"{path.name}-generator")), ("discriminator", path)):
            own = {key.removeprefix(f"{part}."): x for key, x in weights.items() if key.startswith(f"{part}.")}
            TextPredictor(getattr(self.model, part), tokenizer, name).save(folder, own)


def frequent_tokens(counts: Tensor) -> Tensor:
    """Of each token (V,) whether it is among the most frequent ones that make up half of a text.

    Args:
        counts: (V,) how often each is there.
    """
    order = torch.argsort(counts, descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    frequent = torch.zeros(len(counts), dtype=torch.bool)
    frequent[order[before * 2 < counts.sum()]] = True
    return frequent & (counts > 0)
