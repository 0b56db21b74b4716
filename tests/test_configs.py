"""Every configuration of the package runs at toy size: the loss falls, every parameter gets a gradient."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import caption, tiny_embedder, tiny_tokenizer, write_benchmark, write_shards

from dualenc import TextConfig
from dualenc.cli import main
from dualenc.interop import TextPredictor
from dualenc.models import TextModel
from dualenc.training import ContrastiveTask
from dualenc.training.task import Task

EVERY = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
TEXTS = [path for path in EVERY if "TextData" in path.read_text()]
CONFIGS = [path for path in EVERY if path not in TEXTS]

LONG = ("many_nodes", "large_batch", "vit_b16_bert_base", "replaced_tokens")


def in_time(configs: list[Path]) -> list[Any]:
    """Parameters of a test, of which those that take long run with the slow ones."""
    marks = {True: pytest.mark.slow, False: ()}
    return [pytest.param(path, id=path.stem, marks=marks[path.stem in LONG]) for path in configs]


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
    if "pretrained: " in config.read_text():
        return small_tuning(config, folder, seed, sets)
    evaluation = f'[{{"class_path": "dualenc.training.Evaluation", "init_args": {{"data": ["{sets}"]}}}}]'
    run = folder / "run"
    main([
        "fit", "--config", str(config), *SMALL, "--data.train", str(folder / "shards"), "--seed_everything", str(seed),
        "--trainer.callbacks", evaluation, "--trainer.default_root_dir", str(run), *more,
    ])  # fmt: skip
    return run


def small_tuning(config: Path, folder: Path, seed: int, sets: str) -> Path:
    """Fine-tunes a small model, by whose architecture the run is, with the configuration's own callbacks."""
    tiny_embedder(seed).save(folder / "model")
    settings = yaml.safe_load(config.read_text())
    for callback in settings["trainer"]["callbacks"]:
        if callback["class_path"].endswith("Evaluation"):
            callback["init_args"]["data"] = [str(sets)]
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    theirs = ("--model.image", "--model.text", "--model.embed_dim")  # the architecture, which is the model's
    pairs = zip(SMALL[::2], SMALL[1::2])
    small = [part for pair in pairs if not pair[0].startswith(theirs) for part in pair]
    main([
        "fit", "--config", str(path), *small, "--data.train", str(folder / "shards"), "--seed_everything", str(seed),
        "--model.pretrained", str(folder / "model"), "--trainer.default_root_dir", str(folder / "run"),
    ])  # fmt: skip
    with open(folder / "run" / "metrics.csv") as file:
        assert "0" in {row["step"] for row in csv.DictReader(file) if row["metric"].startswith("set/")}  # before it all
    return folder / "run"


def small_texts(config: Path, folder: Path, seed: int) -> Path:
    """Runs a configuration of texts made small; the run directory."""
    settings = yaml.safe_load(config.read_text())
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    size = {"vocab_size": 200, "width": 32, "layers": 2, "heads": 2, "mlp_width": 48}
    rng = np.random.default_rng(seed)
    if "text_from" in model:
        tokenizer = tiny_tokenizer(context_length=64)
        text = TextConfig(**{**size, "vocab_size": tokenizer.vocab_size}, context_length=64, types=2)
        TextPredictor(TextModel(text), tokenizer).save(folder / "pretrained")
        model["text_from"] = str(folder / "pretrained")
    else:
        model["text"] |= size
    heads = model.get("heads", {"rtd": {"kind": "rtd"}})
    for name, source in data["train"].items():
        head = heads[name]
        lines = []
        for number in range(64):
            label = head.get("labels", [""])[number % len(head.get("labels", [""]))]
            label = str(number % 5) if head.get("problem") == "regression" else label
            text = f"{caption(rng)} {caption(rng)} {label}"  # it can be learnt
            fields = {source.get("text", "text"): text, source.get("label", "label"): label}
            lines.append(fields | ({source["pair"]: caption(rng)} if "pair" in source else {}))
        path = folder / f"{name}.tsv"
        rows = ["\t".join(lines[0]), *("\t".join(line.values()) for line in lines)]
        path.write_text("\n".join(rows) + "\n")
        source["files"] = str(path)
        if isinstance(data["val"], dict):
            data["val"][name]["files"] = str(path)
    data |= {"batch_size": 16, "workers": 0, "val": data["val"] if isinstance(data["val"], dict) else 0.2}
    model["optimizer"]["init_args"]["lr"] = 0.003
    settings["seed_everything"] = seed
    settings["trainer"] |= {
        "max_epochs": -1, "max_steps": 32, "log_every_n_steps": 1, "accelerator": "cpu", "devices": 1,
        "default_root_dir": str(folder / "run"),
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(path)])
    return folder / "run"


def metrics(run: Path, name: str) -> list[float]:
    with open(run / "metrics.csv") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == name]


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
