"""Interpolation of two models: the formula, its ends to the bit, and refused models."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fits import fails
from helpers import SIZE, WORDS, tiny_embedder
from safetensors.torch import load_file

import dualenc
from dualenc import ModelError, Tokenizer
from dualenc.cli import main
from dualenc.inference.embedder import Embedder
from dualenc.inference.interpolation import interpolate


def pair(seed: int, **config: object) -> tuple[Embedder, Embedder]:
    """Build two models whose parameters all differ, with zeros of both signs."""
    both = tiny_embedder(seed, **config), tiny_embedder(seed + 1, **config)
    with torch.no_grad():
        for one, sign in zip(both, (-1, 1)):
            for parameter in one.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            one.model.image.vit.cls_token.flatten()[0] = sign * 0.0
    return both


def bits(model: Path | Embedder) -> dict[str, bytes]:
    state = model.model.state_dict() if isinstance(model, Embedder) else load_file(model / "model.safetensors")
    return {name: x.numpy().tobytes() for name, x in state.items()}


@pytest.mark.parametrize("options", [{}, {"logit_bias": True}, {"projection": "mlp"}])
def test_every_weight_is_interpolated(seed, tmp_path, capsys, options):
    a, b = pair(seed, **options)
    a.save(tmp_path / "a")
    b.save(tmp_path / "b")
    alpha = round(torch.rand(()).item(), 3)
    command = ["interpolate", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out")]
    main([*command, "--alpha", str(alpha)])
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert all(word in line for word in (*command[1:], f"alpha {alpha:g}"))
    made, first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "a", "b"))
    assert made.keys() == first.keys()
    for name, x in made.items():
        exact = (1 - alpha) * first[name].double() + alpha * second[name].double()
        assert torch.equal(x, exact.float()), name
    assert "logits.logit_scale" in made
    for name in ("config.json", "tokenizer.json", "preprocess.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    main(command)  # by default half way
    half = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(x, ((first[n].double() + second[n].double()) / 2).float()) for n, x in half.items())
    assert dualenc.load(tmp_path / "out", "cpu").embed_texts(["a cat"]).shape == (1, 8)


def test_the_ends_are_the_models_to_the_bit(seed, tmp_path):
    a, b = pair(seed)
    a.save(tmp_path / "a")
    b.save(tmp_path / "b")
    for alpha, end in (("0", a), ("1", b)):
        main(["interpolate", *(str(tmp_path / name) for name in ("a", "b", alpha)), "--alpha", alpha])
        assert bits(tmp_path / alpha) == bits(end)
    assert bits(a) != bits(b)
    assert bits(interpolate(a, b, 0.5)) not in (bits(a), bits(b))  # the control
    before = bits(a)
    interpolate(a, b, 1.0)
    assert bits(a) == before  # it is another model


def test_half_precision_is_interpolated_in_float64(seed):
    a, b = pair(seed)
    a.model.bfloat16()
    b.model.bfloat16()
    found = interpolate(a, b, 0.3).model.state_dict()
    first, second = a.model.state_dict(), b.model.state_dict()
    for name, x in found.items():
        assert torch.equal(x, (0.7 * first[name].double() + 0.3 * second[name].double()).bfloat16()), name


def test_differences_are_named(seed, tmp_path, capsys):
    a, _ = pair(seed)
    config = a.model.config

    def other(**changes):
        made = dataclasses.replace(config, **changes)
        return Embedder(dualenc.DualEncoder.from_config(made), a.tokenizer, a.preprocess, "b")

    deeper = dataclasses.replace(config.image, overrides={**config.image.overrides, "depth": 2})
    tokenizer = Tokenizer.train([" ".join(reversed(word)) for word in WORDS], 200, a.tokenizer.context_length)
    differing = {
        "image.overrides .*'depth': 1.* and .*'depth': 2": other(image=deeper),
        "text.layers 1 and 2": other(text=dataclasses.replace(config.text, layers=2)),
        "embed_dim 8 and 4": other(embed_dim=4),
        "projection 'linear' and 'mlp'": other(projection="mlp"),
        "logit_bias False and True": other(logit_bias=True),
        "preprocess.resize 'shortest' and 'squash'": Embedder(
            a.model, a.tokenizer, dataclasses.replace(a.preprocess, resize="squash")
        ),
        "tokenizer": Embedder(a.model, tokenizer, a.preprocess),
    }
    for message, b in differing.items():
        with pytest.raises(ModelError, match=message):
            interpolate(a, b, 0.5)
    dropping = other(text=dataclasses.replace(config.text, dropout=0.1))
    assert interpolate(a, dropping, 0.5).model.config == config  # no weight depends on it
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ModelError, match=rf"alpha {alpha} must lie between 0 and 1"):
            interpolate(a, a, alpha)
    a.save(tmp_path / "a")
    other(embed_dim=4).save(tmp_path / "b")
    line = fails(capsys, ["interpolate", *(str(tmp_path / name) for name in ("a", "b", "out"))])
    assert "embed_dim 8 and 4" in line
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    folder = str(tmp_path / "a")
    assert "is not a model directory" in fails(capsys, ["interpolate", folder, folder, str(tmp_path / "out")])
    assert "alpha 2" in fails(capsys, ["interpolate", folder, folder, str(tmp_path / "new"), "--alpha", "2"])
    assert "nowhere" in fails(capsys, ["interpolate", folder, "nowhere", str(tmp_path / "new")])


def test_buffers_must_be_equal(seed):
    a, b = pair(seed)
    for one in (a, b):
        one.model.image.register_buffer("seen", torch.tensor([3]))
    assert interpolate(a, b, 0.5).model.state_dict()["image.seen"].item() == 3
    b.model.image.seen += 1
    with pytest.raises(ModelError, match=r"image\.seen"):
        interpolate(a, b, 0.5)


def test_the_card_names_both_models(seed, tmp_path):
    a, b = pair(seed)
    a.name, b.name = "zero", "tuned"
    interpolate(a, b, 0.25).save(tmp_path / "out")
    assert "0.75 zero + 0.25 tuned" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "preprocess.json").read_text())["size"] == SIZE
