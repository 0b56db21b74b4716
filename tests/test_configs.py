"""Every configuration of the package runs at toy size: the loss falls, every parameter gets a gradient."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import CONFIGS, EVERY, TEXTS, metrics, small_fit, small_texts

from dualenc.training import ContrastiveTask
from dualenc.training.task import Task

LONG = ("many_nodes", "large_batch", "vit_b16_bert_base", "replaced_tokens")


def in_time(configs: list[Path]) -> list[Any]:
    """Parameters of a test, of which those that take long run with the slow ones."""
    marks = {True: pytest.mark.slow, False: ()}
    return [pytest.param(path, id=path.stem, marks=marks[path.stem in LONG]) for path in configs]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Parameters without a gradient in some step (of heads in turn: in all), or in no group of the optimizer."""
    found: set[str] = set()
    had: set[str] = set()

    def check(self: Task, optimizer: torch.optim.Optimizer) -> None:
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        here = {name for name, p in self.named_parameters() if p.grad is not None and p.grad.any() and id(p) in known}
        had.update(here)
        names = {name for name, _ in self.named_parameters()}
        found.update(names - here if isinstance(self, ContrastiveTask) else ())
        if not isinstance(self, ContrastiveTask):
            found.clear()
            found.update(names - had)

    monkeypatch.setattr(Task, "on_before_optimizer_step", check, raising=False)
    yield found
    assert had


@pytest.mark.parametrize("config", in_time(CONFIGS))
def test_runs_small(config: Path, tmp_path: Path, seed: int, without: set[str]) -> None:
    run = small_fit(config, tmp_path, seed)
    losses = metrics(run, "train/loss")
    assert len(losses) == 24
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not without
    assert metrics(run, "set/image_retrieval_recall@1")
    assert {path.name for path in run.iterdir()} >= {"best", "last", "config.yaml", "run.json", "checkpoints"}


@pytest.mark.parametrize("config", in_time(TEXTS))
def test_texts_run_small(config: Path, tmp_path: Path, seed: int, without: set[str]) -> None:
    run = small_texts(config, tmp_path, seed)
    losses = metrics(run, "train/loss")
    assert len(losses) == 32
    assert sum(losses[16:]) < sum(losses[:16])  # whole epochs: of heads in turn each has its part in both
    assert not without
    assert {path.name for path in run.iterdir()} >= {"best", "last", "config.yaml", "run.json", "checkpoints"}


def test_there_are_configs() -> None:
    assert {path.stem for path in EVERY} >= {
        "mlm",
        "replaced_tokens",
        "classify",
        "classify_pretrained",
        "tasks_pretrained",
        "finetune_clip",
        "smoke",
        "small",
        "flickr8k",
        "emoji",
        "vit_b32_bert_base",
        "vit_b16_bert_base",
        "large_batch",
        "many_nodes",
    }
