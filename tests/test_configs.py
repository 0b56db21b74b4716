"""Every configuration of the package runs at toy size: the loss falls, every parameter gets a gradient."""

import csv
from pathlib import Path

import pytest
import torch
from helpers import write_benchmark, write_shards

from dualenc.cli import main
from dualenc.training import ContrastiveTask

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))

SMALL = [
    "--model.image.name", "vit_tiny_patch16_224", "--model.image.img_size", "32",
    "--model.image.overrides", '{"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}',
    "--model.text.width", "32", "--model.text.layers", "2", "--model.text.heads", "2",
    "--model.text.vocab_size", "300", "--model.embed_dim", "32",
    "--model.optimizer.lr", "0.003", "--model.scheduler.warmup", "2",
    "--data.batch_size", "16", "--data.workers", "0", "--data.val", "0.25", "--run.monitor", "val/mrr",
    "--trainer.max_steps", "24", "--trainer.max_epochs", "-1",
    "--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps", "1",
    "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.strategy", "auto",
]  # fmt: skip


def small_fit(config: Path, folder: Path, seed: int, *more: str) -> Path:
    """Runs `dualenc fit` on a configuration made small; the run directory."""
    captions = 3 if "json." in config.read_text() else 1
    write_shards(folder / "shards", [20, 15, 13], seed, captions=captions)
    sets = write_benchmark(folder / "set", seed, "retrieval")
    more = ("--data.micro_batch_size", "6", *more) if "micro_batch_size" in config.read_text() else more
    evaluation = f'[{{"class_path": "dualenc.training.Evaluation", "init_args": {{"data": ["{sets}"]}}}}]'
    run = folder / "run"
    main([
        "fit", "--config", str(config), *SMALL, "--data.train", str(folder / "shards"), "--seed_everything", str(seed),
        "--trainer.callbacks", evaluation, "--trainer.default_root_dir", str(run), *more,
    ])  # fmt: skip
    return run


def metrics(run: Path, name: str) -> list[float]:
    with open(run / "metrics.csv") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == name]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_runs_small(config: Path, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without: set[str] = set()

    def check(self: ContrastiveTask, optimizer: torch.optim.Optimizer) -> None:
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        without.update(
            name
            for name, p in self.named_parameters()
            if p.grad is None or not bool(p.grad.any()) or id(p) not in known
        )

    monkeypatch.setattr(ContrastiveTask, "on_before_optimizer_step", check, raising=False)
    run = small_fit(config, tmp_path, seed)
    losses = metrics(run, "train/loss")
    assert len(losses) == 24
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not without
    assert metrics(run, "set/image_retrieval_recall@1")
    assert {path.name for path in run.iterdir()} >= {"best", "last", "config.yaml", "run.json", "checkpoints"}


def test_there_are_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "smoke",
        "small",
        "flickr8k",
        "emoji",
        "vit_b32_bert_base",
        "vit_b16_bert_base",
        "large_batch",
        "many_nodes",
    }
