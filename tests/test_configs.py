"""Every configuration of the package, run at toy size: the loss falls and every parameter gets a gradient."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import CONFIGS, EVERY, TEXTS, metrics, small_fit, small_texts

from dualenc.training import ContrastiveTask
from dualenc.training.task import Task

LONG = ("many_nodes", "large_batch", "vit_b16_bert_base", "replaced_tokens")


def with_marks(configs: list[Path]) -> list[Any]:
    """Return the configurations as parameters of a test; those that take long are marked as slow."""
    marks = {True: pytest.mark.slow, False: ()}
    return [pytest.param(path, id=path.stem, marks=marks[path.stem in LONG]) for path in configs]


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Yield the names of parameters without a gradient, or in no group of the optimizer, filled in during training.

    A contrastive task must give every parameter a gradient in each step. Other tasks train one head per step, so their
    parameters need one in any step.
    """
    found: set[str] = set()
    ever: set[str] = set()

    def check(self: Task, optimizer: torch.optim.Optimizer) -> None:
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = {
            name for name, p in self.named_parameters() if p.grad is not None and p.grad.any() and id(p) in optimized
        }
        ever.update(trained)
        names = {name for name, _ in self.named_parameters()}
        found.update(names - trained if isinstance(self, ContrastiveTask) else ())
        if not isinstance(self, ContrastiveTask):
            found.clear()
            found.update(names - ever)

    monkeypatch.setattr(Task, "on_before_optimizer_step", check, raising=False)
    yield found
    assert ever


@pytest.mark.parametrize("config", with_marks(CONFIGS))
def test_contrastive_configs_train(config: Path, tmp_path: Path, seed: int, untrained: set[str]) -> None:
    run = small_fit(config, tmp_path, seed)
    losses = metrics(run, "train/loss")
    assert len(losses) == 24
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not untrained
    assert metrics(run, "set/image_retrieval_recall@1")
    assert {path.name for path in run.iterdir()} >= {"best", "last", "config.yaml", "run.json", "checkpoints"}


@pytest.mark.parametrize("config", with_marks(TEXTS))
def test_text_configs_train(config: Path, tmp_path: Path, seed: int, untrained: set[str]) -> None:
    run = small_texts(config, tmp_path, seed)
    losses = metrics(run, "train/loss")
    assert len(losses) == 32
    assert sum(losses[16:]) < sum(losses[:16])  # Whole epochs, so that every head has its share in both sums.
    assert not untrained
    assert {path.name for path in run.iterdir()} >= {"best", "last", "config.yaml", "run.json", "checkpoints"}


def test_no_config_is_missing() -> None:
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
