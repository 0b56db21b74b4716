"""Evaluation sets during training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dualenc.data import BenchmarkSet
from dualenc.evaluation import SetEmbeddings, embed_set, score
from dualenc.report import Section
from dualenc.training.contrastive import ContrastiveTask
from dualenc.training.ema import averaged
from dualenc.training.ranks import all_gather_object
from dualenc.training.task import rank_zero_print
from dualenc.utils.errors import DataError


class Evaluation(Callback):
    """Zero-shot classification and retrieval on evaluation sets during training.

    Args:
        data: folders in the layout of CLIP_benchmark.
        every_n_epochs: measure at the end of every so many epochs; 0 for never.
        every_n_steps: measure after every so many steps, too; 0 for never.
        at_start: measure before the first step, too: what a pretrained model could do.
        workers: processes a rank that decode.

    The numbers are those of `dualenc zeroshot` and `dualenc retrieval`, logged as `SET/METRIC`. Each rank embeds its
    share of a set's images and texts. What is missing of a set or cannot be read is said once. `dualenc validate` and
    `test` measure the sets beside the held-out pairs.
    """

    def __init__(
        self,
        data: Sequence[str],
        every_n_epochs: int = 1,
        every_n_steps: int = 0,
        workers: int = 0,
        at_start: bool = False,
    ) -> None:
        self.folders, self.workers, self.at_start = list(data), workers, at_start
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.sets: list[BenchmarkSet] = []
        self.sections: list[Section] = []  # of the last measurement, on the first rank
        self._measured = False  # in this process
        self._said: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Opens the sets, so that a wrong one stops the run before it begins."""
        if not isinstance(pl_module, ContrastiveTask):
            raise DataError(f"Evaluation is of images and texts: a {type(pl_module).__name__} has no use for it")
        self.sets = [BenchmarkSet.open(folder) for folder in self.folders]
        names = [data.name for data in self.sets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"two evaluation sets are called {twice.pop()!r}: their numbers would be mixed up")
        if taken := {"train", "val", "test"} & set(names):
            raise DataError(f"evaluation set {taken.pop()!r} has the name of the run's own figures: rename its folder")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures what there is before the first step, if that is asked for."""
        if self.at_start and trainer.global_step == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures, if it is time by the number of steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures, if it is time by the number of epochs, and this step has not been measured."""
        done = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0 and not done:
            self._measure(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures, where this is no part of training."""
        if trainer.state.fn == "validate":
            self._measure(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures."""
        self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ContrastiveTask)  # seen to in `setup`
        pl_module.pause_clock()
        with averaged(trainer), _in_one_piece(pl_module):
            metrics = self._numbers(trainer, pl_module)
        pl_module.publish(trainer.strategy.broadcast(metrics))
        pl_module.start_clock()

    def complete(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures for the report what the run had measured before it was stopped, and not since."""
        assert isinstance(pl_module, ContrastiveTask)
        measured = {name.rpartition("/")[0] for name in trainer.callback_metrics}
        if not self._measured and measured & {data.name for data in self.sets}:
            with averaged(trainer), _in_one_piece(pl_module):
                self._numbers(trainer, pl_module)

    def _numbers(self, trainer: Trainer, pl_module: ContrastiveTask) -> dict[str, float]:
        embedder = pl_module.embedder()
        rank, world = trainer.global_rank, trainer.world_size
        sections, error = [], ""
        for data in self.sets:
            embedded: SetEmbeddings | None = None
            try:
                embedded = embed_set(embedder, data, self.workers, rank=rank, world=world)
            except (ValueError, OSError) as raised:
                error = str(raised) if isinstance(raised, DataError) else f"{data.name}: {raised}"
            _raise_together(error, world)  # or the others would wait for this one's embeddings
            assert embedded is not None
            # Each rank has its part of the rows, in order.
            image, text, rows = (torch.cat(all_gather_object(part, world)) for part in embedded[:3])
            whole = SetEmbeddings(
                image, text, rows, [one for part in all_gather_object(embedded.bad, world) for one in part]
            )
            if trainer.is_global_zero:
                try:
                    sections.append(score(data, whole, embedder).section)
                except (ValueError, OSError) as raised:
                    error = f"{data.name}: {raised}"
            _raise_together(error, world)
        self.sections, self._measured = sections, True
        for result in (section.result for section in sections):
            for problem in result["problems"]:
                line = f"{result['dataset']} is not complete: {problem['what']}: {problem['count']}, such as "
                if line not in self._said:  # once a run, not at each measurement
                    self._said.add(line)
                    rank_zero_print(line + problem["names"][0])
        return {
            f"{section.result['dataset']}/{name}": value
            for section in sections
            for name, value in section.result["metrics"].items()
        }


@contextmanager
def _in_one_piece(module: nn.Module) -> Iterator[None]:
    """Weights that lie spread over the ranks are whole on each: these need not embed the same number of batches."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def _raise_together(error: str, world: int) -> None:
    """Stops all ranks where one has failed."""
    if found := next(filter(None, all_gather_object(error, world)), None):
        if world > 1 and dist.get_rank():
            raise SystemExit(1)  # the first rank says it
        raise DataError(found)
