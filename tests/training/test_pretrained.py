"""Fine-tuning from models of this package: loading, resampling of positions, and refusals."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fits import SMALL, SMOKE, fails, metrics, small_fit
from helpers import SIZE, WORDS, tiny_embedder, write_benchmark, write_shards
from safetensors.torch import load_file

import dualenc
from dualenc import DualEncoder, ImageConfig, ModelError, Preprocess, TextConfig, Tokenizer
from dualenc.cli import main
from dualenc.models import Projection
from dualenc.training import ContrastiveTask

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def dual(size: int, name: str, **changes: Any) -> DualEncoder:
    """Return a small dual encoder with all parameters random."""
    model = DualEncoder(ImageConfig(name, size, {**VIT, **changes}), TextConfig(50, 16, 1, 2), 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


TOWERS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "mean": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "relative": ("vit_relpos_small_patch16_224", {}),
    "table": ("vit_relpos_small_patch16_224", {"rel_pos_type": "bias"}),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_outputs_are_equal_at_the_same_size(kind: str) -> None:
    name, changes = TOWERS[kind]
    source, model = dual(32, name, **changes), dual(32, name, **changes)
    images, tokens = torch.randn(3, 3, 32, 32), dualenc.Tokens.pack([[1, 2, 3], [4]])
    assert not torch.equal(model(images, tokens).image, source(images, tokens).image)  # control
    model.load_pretrained(source)
    found, expected = model(images, tokens), source(images, tokens)
    assert all(torch.equal(x, y) for x, y in zip(found[:3], expected[:3]))


@pytest.mark.filterwarnings(
    "ignore:Using a non-tuple sequence", "ignore:torch.searchsorted"
)  # from timm, which resamples tables
@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("kind", TOWERS)
def test_only_positions_are_resampled_at_another_size(kind: str, size: int) -> None:
    name, changes = TOWERS[kind]
    source, model = dual(32, name, **changes), dual(size, name, **changes)
    model.load_pretrained(source)
    state, before = model.state_dict(), source.state_dict()
    positions = {x for x in state if x.endswith(("pos_embed", "relative_position_bias_table"))}
    assert bool(positions) == (kind != "relative")  # "relative" has a network of the distances instead
    for key in state.keys() - positions:
        assert torch.equal(state[key], before[key]), key
    if "image.vit.pos_embed" in positions:
        extra = kind == "class token"
        old = before["image.vit.pos_embed"]
        grid = old[:, extra:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (size // 8, size // 8), mode="bicubic", antialias=True, align_corners=False)
        expected = torch.cat([old[:, :extra], grid.flatten(2).mT], 1)
        torch.testing.assert_close(state["image.vit.pos_embed"], expected, rtol=1e-5, atol=1e-6)
    for key in positions - {"image.vit.pos_embed"}:  # the entry of distance 0 does not change
        old, new = before[key], state[key]
        torch.testing.assert_close(new[len(new) // 2], old[len(old) // 2])
        assert len(new) == (2 * size // 8 - 1) ** 2
    assert model.encode_image(torch.randn(2, 3, size, size)).isfinite().all()


def task(source: Path, given: dualenc.Embedder, **changes: Any) -> ContrastiveTask:
    """Return a task with the architecture of a model, in a trainer with the tokenizer of that model."""
    config = given.model.config
    settings = {
        "image": config.image, "text": config.text, "embed_dim": config.embed_dim, "projection": config.projection,
        "logit_bias": config.logit_bias, "pretrained": str(source), **changes,
    }  # fmt: skip
    tokenizer = settings.pop("tokenizer", given.tokenizer)
    made = ContrastiveTask(**settings)
    data = SimpleNamespace(tokenizer=tokenizer)
    trainer = SimpleNamespace(accumulate_grad_batches=1, precision="32-true", default_root_dir=".", datamodule=data)
    made._trainer = trainer  # type: ignore[assignment]
    return made


@pytest.fixture
def given(seed: int, tmp_path: Path) -> dualenc.Embedder:
    """Save a model with the preprocessing of a run in `model/`, one with a bias in `biased/`; return the first."""
    for name, bias in (("model", False), ("biased", True)):
        made = tiny_embedder(seed, logit_bias=bias)
        mean, std = (made.model.image.data_config[key] for key in ("mean", "std"))
        made.preprocess = dataclasses.replace(made.preprocess, mean=mean, std=std)
        made.save(tmp_path / name)
    return dualenc.load(tmp_path / "model", "cpu")


def test_models_that_differ_are_refused(given: dualenc.Embedder, tmp_path: Path) -> None:
    image, text = given.model.config.image, given.model.config.text
    deeper = {**image.overrides, "depth": 2}
    cases = {
        "image.overrides .*'depth': 1.* and .*'depth': 2": {"image": dataclasses.replace(image, overrides=deeper)},
        "image.name 'vit_tiny_patch16_224' and 'vit_small_patch16_224'": {
            "image": dataclasses.replace(image, name="vit_small_patch16_224")
        },
        "text.layers 1 and 2": {"text": dataclasses.replace(text, layers=2)},
        "text.pool 'cls' and 'mean'": {"text": dataclasses.replace(text, pool="mean")},
        "embed_dim 8 and 4": {"embed_dim": 4},
        "projection 'linear' and 'mlp'": {"projection": "mlp"},
        "preprocess.resize 'shortest' and 'squash'": {"resize": "squash"},
    }
    for message, changes in cases.items():
        with pytest.raises(ModelError, match=f"model.pretrained .* differ: {message}"):
            task(tmp_path / "model", given, **changes).setup("fit")
    other = Tokenizer.train([" ".join(reversed(word)) for word in WORDS], 200, text.context_length)
    refused = task(tmp_path / "model", given, tokenizer=other)
    before = {name: x.clone() for name, x in refused.model.state_dict().items()}
    with pytest.raises(ModelError, match=rf"--data\.tokenizer {tmp_path}/model/tokenizer\.json"):
        refused.setup("fit")
    assert all(torch.equal(x, before[name]) for name, x in refused.model.state_dict().items())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="not a complete model directory"):
        task(tmp_path / "empty", given).setup("fit")


def test_size_dropout_and_bias_may_differ(given: dualenc.Embedder, tmp_path: Path) -> None:
    image, text = given.model.config.image, given.model.config.text
    other = task(
        tmp_path / "model",
        given,
        image=dataclasses.replace(image, img_size=2 * SIZE),
        text=dataclasses.replace(text, dropout=0.3),
        logit_bias=True,
        init_bias=-7.0,
        init_scale=3.0,
    )
    other.setup("validate")
    assert not torch.equal(
        other.model.image_projection.weight, given.model.image_projection.weight
    )  # loaded by fit only
    other.setup("fit")
    state, source = other.model.state_dict(), given.model.state_dict()
    assert state.pop("logits.logit_bias").item() == -7.0
    assert state.keys() == source.keys()
    for name, x in state.items():
        assert name == "image.vit.pos_embed" or torch.equal(x, source[name]), name
    with pytest.raises(ModelError, match="logit_bias True and False"):
        task(tmp_path / "biased", given).setup("fit")
    biased = task(tmp_path / "biased", given, logit_bias=True)
    biased.setup("fit")
    whole = load_file(tmp_path / "biased" / "model.safetensors")
    assert all(torch.equal(x, whole[name]) for name, x in biased.model.state_dict().items())


@pytest.mark.slow
def test_run_from_an_earlier_run(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """At learning rate 0 the weights stay, and a stopped run resumes without the files of the earlier run."""
    options = ("--trainer.max_steps", "3", "--data.val", "null", "--run.monitor", "null")
    base = small_fit(SMOKE, tmp_path / "base", seed, *options)
    write_shards(tmp_path / "other", [24, 24], seed + 1, captions=3)
    common = ["fit", "--config", str(SMOKE), *SMALL, "--data.train", str(tmp_path / "other"), "--data.val", "null"]
    common += ["--data.captions", "json.captions", "--model.pretrained", str(base), "--trainer.callbacks", "[]"]
    line = fails(capsys, [*common, "--trainer.default_root_dir", str(tmp_path / "wrong")])
    assert f"--data.tokenizer {base}/last/tokenizer.json" in line
    common += ["--data.tokenizer", str(base / "last" / "tokenizer.json")]
    still, run = tmp_path / "still", tmp_path / "run"
    main([*common, "--trainer.default_root_dir", str(still), "--model.optimizer.lr", "0", "--trainer.max_steps", "2"])
    began, ended = (load_file(folder / "last" / "model.safetensors") for folder in (base, still))
    assert all(torch.equal(x, ended[name]) for name, x in began.items())
    common += ["--model.image_tuning.layer_decay", "0.7", "--model.text_tuning.frozen_layers", "1"]
    common += ["--trainer.max_steps", "6"]
    main([*common, "--trainer.default_root_dir", str(tmp_path / "whole")])
    stop = '[{"class_path": "helpers.StopAt", "init_args": {"step": 2}}]'
    with pytest.raises(SystemExit):
        main([*common, "--trainer.default_root_dir", str(run), "--trainer.callbacks", stop])
    (base / "last" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    shutil.rmtree(base)
    tokenizer = ["--data.tokenizer", str(tmp_path / "tokenizer.json")]
    main([*common, *tokenizer, "--trainer.default_root_dir", str(run), "--ckpt_path", "last"])
    assert metrics(run, "train/loss") == metrics(tmp_path / "whole", "train/loss")
    ended, whole = (load_file(folder / "last" / "model.safetensors") for folder in (run, tmp_path / "whole"))
    assert all(torch.equal(x, whole[name]) for name, x in ended.items())
    assert not torch.equal(began["image_projection.weight"], ended["image_projection.weight"])  # control
    assert torch.equal(began["text.blocks.0.mlp.0.weight"], ended["text.blocks.0.mlp.0.weight"])


def test_run_without_an_architecture_takes_that_of_its_model(tmp_path: Path, seed: int) -> None:
    """Preprocessing and tokenizer are those of the model too, and differ from the defaults."""
    given = tiny_embedder(seed, image_projection=Projection((12,), (True, False), "tanh"))
    given.save(tmp_path / "model")
    made = ContrastiveTask(pretrained=str(tmp_path / "model"), logit_bias=True)
    assert made.model.config == dataclasses.replace(given.dual_encoder.config, logit_bias=True)
    assert made.preprocess == given.preprocess != Preprocess(given.preprocess.size)  # type: ignore[union-attr]
    assert made.text_checkpoint is not None
    assert made.text_checkpoint.tokenizer().fingerprint == given.tokenizer.fingerprint
    made._trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=1,
        precision="32-true",
        default_root_dir=".",
        ckpt_path=None,
        datamodule=SimpleNamespace(tokenizer=given.tokenizer),
    )
    made.setup("fit")
    ours = made.model.state_dict()
    assert all(torch.equal(x, ours[name]) for name, x in given.dual_encoder.state_dict().items())
    folder = str(tmp_path / "model")
    for wrong, message in (
        ({}, "model.image is missing"),
        ({"pretrained": str(tmp_path / "gone")}, "model.pretrained .*gone must be a folder .*dualenc import SPEC"),
        ({"pretrained": folder, "embed_dim": 7}, "model.embed_dim is given by model.pretrained"),
        ({"pretrained": folder, "resize": "squash"}, "model.resize is given by model.pretrained"),
        ({"pretrained": True}, "model.image is missing"),
        ({"pretrained": "open_clip:ViT-B-32/openai"}, "dualenc import open_clip:ViT-B-32/openai OUT"),
    ):
        with pytest.raises(ValueError, match=message):
            ContrastiveTask(**wrong)


@pytest.mark.slow
def test_run_with_the_architecture_of_a_model_resumes_with_that_model_only(
    tmp_path: Path, seed: int, capsys: Any
) -> None:
    """Its `best/` has the initial weights, since no evaluation was better than the one before the first step."""
    tiny_embedder(seed).save(tmp_path / "model")
    write_shards(tmp_path / "shards", [20, 15], seed)
    sets = write_benchmark(tmp_path / "set", seed, "retrieval")
    evaluation = {"class_path": "dualenc.training.Evaluation", "init_args": {"data": [str(sets)], "at_start": True}}
    run = tmp_path / "run"
    arguments = [
        "fit", "--model", "ContrastiveTask", "--model.pretrained", str(tmp_path / "model"), "--data", "PairData",
        "--data.train", str(tmp_path / "shards"), "--data.batch_size", "16", "--data.workers", "0",
        "--data.val", "null", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu",
        "--trainer.default_root_dir", str(run),
        "--trainer.callbacks", json.dumps([evaluation]), "--run.monitor", "set/median_rank",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(arguments)  # the monitor must be a metric that is best when largest
    arguments[-1] = "set/mrr"
    arguments += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1e-6"]  # too small to change a rank
    main(arguments)
    best, last, began = (load_file(tmp_path / one / "model.safetensors") for one in ("run/best", "run/last", "model"))
    assert len(set(metrics(run, "set/mrr"))) == 1
    assert all(torch.equal(x, best[name]) for name, x in began.items())
    assert not all(torch.equal(x, last[name]) for name, x in began.items())
    path = tmp_path / "model" / "preprocess.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "resize": "squash"}))
    longer = ["--trainer.max_epochs", "2", "--run.accept_changes", "[trainer.max_epochs]"]
    again = [*arguments, *longer, "--ckpt_path", "last"]
    assert "model.pretrained: preprocess" in fails(capsys, again)
