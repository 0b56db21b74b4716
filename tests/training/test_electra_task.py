"""Runs of replaced-token detection: learning, files, resuming."""

import json

import pytest
import torch
from fits import TINY_TEXT, metrics
from helpers import write_texts
from safetensors.torch import load_file

import dualenc
from dualenc.cli import main
from dualenc.models.electra import ReplacedTokenModel
from dualenc.training.electra import frequent_tokens


def fit(folder, data, seed, *more):
    settings = {
        "seed_everything": seed,
        "trainer": {"max_epochs": 3, "default_root_dir": str(folder), "log_every_n_steps": 1, "accelerator": "cpu"},
        "run": {"monitor": "val/rtd/auroc", "every_n_steps": 4},
        "model": {"class_path": "dualenc.training.ReplacedTokenTask", "init_args": {
            "generator_size": 0.5,
            "text": {**TINY_TEXT, "norm": "post", "types": 2, "dropout": 0.1, "family": "electra"},
            "scheduler": {"class_path": "dualenc.training.WarmupCosine", "init_args": {"warmup": 2}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        }},
        "data": {"class_path": "dualenc.training.TextData", "init_args": {
            "train": {"rtd": {"files": str(data / "plain.txt")}}, "val": 0.2, "batch_size": 8, "workers": 0,
        }},
    }  # fmt: skip
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(settings))
    main(["fit", "--config", str(path), *more])
    return folder


@pytest.mark.slow
def test_a_run(tmp_path, seed):
    write_texts(tmp_path, seed)
    whole = fit(tmp_path / "whole", tmp_path, seed)
    losses = metrics(whole, "train/loss")
    assert sum(losses[-5:]) < sum(losses[:5])
    for name in ("accuracy", "always_original", "auroc_frequent", "auroc_rare", "generator_loss"):
        assert metrics(whole, f"val/rtd/{name}"), name

    # What is written joins to what was trained: the tie lives on.
    encoder, generator = (dualenc.load_text(whole / name, "cpu") for name in ("last", "last-generator"))
    model = ReplacedTokenModel.join(encoder.model, generator.model)
    words = model.generator.encoder.embeddings.token_embeddings.weight
    assert words is model.discriminator.encoder.embeddings.token_embeddings.weight
    (checkpoint,) = sorted((whole / "checkpoints").iterdir())[-1:]
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, x in model.state_dict().items():
        assert torch.equal(x, kept[f"model.{name}"]), name
    assert json.loads((whole / "last" / "config.json").read_text())["architectures"] == ["ElectraForPreTraining"]
    assert len(generator.fill("a [MASK]", top_k=2)[0]) == 2

    # Killed and gone on: the same draws.
    stop = json.dumps([{"class_path": "helpers.StopAt", "init_args": {"step": 3}}])
    part = tmp_path / "part"
    with pytest.raises(SystemExit):
        fit(part, tmp_path, seed, "--trainer.callbacks", stop)
    fit(part, tmp_path, seed, "--ckpt_path", "last")
    for name in ("train/loss", "val/rtd/accuracy", "val/rtd/generator_loss"):
        assert metrics(part, name) == metrics(whole, name)
    one, other = (load_file(run / "last" / "model.safetensors") for run in (part, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_frequent_tokens_make_up_half(seed):
    counts = torch.randint(0, 100, (50,))
    counts[3] = 0
    frequent = frequent_tokens(counts)
    assert counts[frequent].sum() * 2 >= counts.sum()
    assert counts[frequent].min() >= counts[~frequent].max()
    least = counts[frequent].min()
    assert (counts[frequent].sum() - least) * 2 < counts.sum()  # no more of them than it takes
    assert not frequent[3]
