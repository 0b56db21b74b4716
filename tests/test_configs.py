"""Every configuration, run at toy size: the loss falls, every parameter gets a gradient, and the model goes out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fits import CONFIGS, EVERY, SHIPPED, SMOKE, TEXTS, metrics, small_fit, small_texts
from helpers import tiny_tokenizer

from dualenc import DualEncoder, Embedder, ImageConfig, ModelError, TextConfig
from dualenc.data import Preprocess
from dualenc.inference.text_model import TextPredictor
from dualenc.interop.exporting import FORMATS, export
from dualenc.models import HeadConfig, TextModel
from dualenc.training import ContrastiveTask
from dualenc.training.task import Task

CLIP = {  # the architecture that finetune_clip.yaml takes from the imported model
    "image": {"name": "vit_base_patch32_clip_quickgelu_224", "img_size": 224},
    "text": {
        "width": 512, "heads": 8, "norm": "pre", "causal": True, "pool": "last", "activation": "quick_gelu",
        "norm_eps": 1e-5,
    },
    "embed_dim": 512,
}  # fmt: skip
LONG = ("many_nodes", "large_batch", "vit_b16_bert_base", "replaced_tokens")


def with_marks(configs: list[Path]) -> list[Any]:
    """Return the configurations as parameters of a test; those that take long or repeat another are marked as slow."""
    marks = {True: pytest.mark.slow, False: ()}
    names = [path.stem for path in SHIPPED]
    return [
        pytest.param(
            path,
            id=path.stem if path in SHIPPED else f"tools-{path.stem}",
            marks=marks[path.stem in LONG or (path not in SHIPPED and path.stem in names)],
        )
        for path in configs
    ]


@pytest.mark.parametrize(
    "path", [*SHIPPED, *(path for path in EVERY if path not in SHIPPED)], ids=lambda path: path.stem
)
def test_every_optimizer_is_fused(path: Path) -> None:
    """An optimizer that is not fused takes hundreds of kernels more in each step on a GPU."""
    settings = yaml.safe_load(path.read_text())["model"]["init_args"]["optimizer"]
    assert settings["init_args"]["fused"] is True


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


def untrained_model(config: Path, seed: int) -> Embedder | TextPredictor:
    """Return the model that a configuration would begin with, with two layers in each tower."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(context_length=24)
    model = yaml.safe_load(config.read_text())["model"]["init_args"]
    pretrained = {"pretrained": CLIP, "text_from": {"text": {"types": 2}}}
    for name, architecture in pretrained.items():
        model |= architecture if name in model else {}
    size = {"vocab_size": tokenizer.vocab_size, "layers": 2, "context_length": 24}
    text = TextConfig(**{**model["text"], **size})
    if "image" not in model:
        windows = {"max_length": 24, "stride": 6}
        heads = {
            name: HeadConfig(**{**head, **(windows if "max_length" in head else {})})
            for name, head in model.get("heads", {"rtd": {"kind": "rtd"}}).items()
        }
        return TextPredictor(TextModel(text, heads), tokenizer, config.stem)
    image = model["image"]
    shape = ImageConfig(image["name"], image["img_size"], {**image.get("overrides", {}), "depth": 2})
    dual = DualEncoder(shape, text, model["embed_dim"], logit_bias=model.get("logit_bias", False))
    return Embedder(dual, tokenizer, Preprocess(shape.img_size, **dual.image.data_config))


@pytest.mark.parametrize("config", with_marks(SHIPPED))
def test_the_formats_that_a_config_names(config: Path, tmp_path: Path, seed: int) -> None:
    named = config.read_text().splitlines()[1].removeprefix("# Exports to: ").split(", ")
    model = untrained_model(config, seed)
    able = []
    for name, one in FORMATS.items():
        (tmp_path / name).mkdir()
        try:
            one.write(model, tmp_path / name)
            able.append(name)
        except ModelError:
            assert list(tmp_path.glob(f"{name}/*")) == []
    assert named == able


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_model_of_the_demo_goes_out(name: str, tmp_path: Path, seed: int) -> None:
    untrained_model(SMOKE, seed).save(tmp_path / "model")
    made = export(str(tmp_path / "model"), tmp_path / "out", name)
    assert all(one.largest <= one.tolerance for one in made.verified)


def test_shipped_configs_need_no_files_of_this_project() -> None:
    for path in SHIPPED:
        assert "../" not in path.read_text(), path
        root = yaml.safe_load(path.read_text())["trainer"]["default_root_dir"]
        assert root == f"runs/{path.stem}"


def test_no_config_is_missing() -> None:
    assert {path.stem for path in EVERY} >= {
        "mlm",
        "replaced_tokens",
        "classify",
        "classify_pretrained",
        "answer",
        "answer_pretrained",
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
