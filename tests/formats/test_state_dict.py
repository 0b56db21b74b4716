"""Weights of other programs: what is around them is taken off, and what cannot be read is said in one line."""

import argparse
import pickle
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dualenc.formats.pickled import WRAPPERS
from dualenc.formats.state_dict import Rule, Weights, plain_copy, read_state
from dualenc.utils.errors import ModelError, warn_once

NAMES = ["visual.proj", "visual.blocks.0.weight", "visual.blocks.1.weight", "model_scale", "text.module.bias", "emb"]


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(2, i + 1) for i, name in enumerate(NAMES)}


def read(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    with closing(Weights(path)) as weights:
        return {name: x.clone() for name, x in weights.items()}, weights.taken_off


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_wrappers_and_prefixes_are_taken_off(tmp_path, seed, caplog):
    rng = np.random.default_rng(seed)
    for number in range(30):
        state = tensors()
        prefixes = [str(x) for x in rng.choice(["module.", "_orig_mod.", "model."], rng.integers(3))]
        entries = [str(x) for x in rng.choice(WRAPPERS, rng.integers(3), replace=False)]
        content: Any = {"".join(prefixes) + name: x for name, x in state.items()}
        scalars = bool(entries) and rng.random() < 0.5
        for entry in reversed(entries):
            content = {"epoch": 3, "args": {"lr": 0.1}, entry: content}
        if scalars:
            content |= {"best": np.float64(0.5), "step": np.int64(7), "half": np.float16(1), "flag": np.bool_(True)}
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        warn_once.cache_clear()
        caplog.clear()
        found, taken_off = read(path)
        assert same(found, state)
        assert set(taken_off) == {*prefixes, *entries, *(["NumPy scalars"] if scalars else [])}
        lines = [record.message for record in caplog.records]
        assert len(lines) == bool(taken_off)
        assert all(
            str(path) in line and set(taken_off) <= {*line.partition("weights: ")[2].split(", ")} for line in lines
        )
        with plain_copy(path) as copy:
            assert (copy == path) == (not taken_off)
            assert same(load_file(copy) if taken_off else torch.load(copy), state)
        assert path.exists()


def test_parts_of_names_that_mean_something_stay(tmp_path, seed):
    state = tensors()
    mixed = {f"model.{name}": x for name, x in state.items()} | {"head.weight": torch.ones(2)}
    save_file(mixed, tmp_path / "mixed.safetensors")
    assert same(read(tmp_path / "mixed.safetensors")[0], mixed)
    inside = {name.replace("visual.", "visual._orig_mod."): x for name, x in state.items()}
    save_file(inside, tmp_path / "inside.safetensors")
    assert same(read(tmp_path / "inside.safetensors")[0], state)
    clash = {"a.weight": torch.zeros(1), "_orig_mod.a.weight": torch.ones(1)}
    save_file(clash, tmp_path / "clash.safetensors")
    assert same(read(tmp_path / "clash.safetensors")[0], clash)


def test_averaged_weights_come_first(tmp_path, seed):
    plain, averaged = tensors(), tensors()
    kept = {"n_averaged": torch.tensor(9), **{f"module.{name}": x for name, x in averaged.items()}}
    for number, content in enumerate((
        {"state_dict": plain, "state_dict_ema": averaged},
        {"model": plain, "model_ema": kept},
        {"model": plain, "ema": {"decay": 0.9, "state_dict": averaged}},
    )):  # fmt: skip
        torch.save(content, tmp_path / f"{number}.pt")
        assert same(read(tmp_path / f"{number}.pt")[0], averaged)
    torch.save({"model": plain, "ema": {"decay": 0.9, "shadow": list(averaged.values())}}, tmp_path / "list.pt")
    assert same(read(tmp_path / "list.pt")[0], plain)  # not weights by their names


def test_what_cannot_be_read_is_said_in_one_line(tmp_path, seed):
    state = tensors()

    def refusal(name: str) -> str:
        with pytest.raises(ModelError) as raised:
            Weights(tmp_path / name)
        text = str(raised.value)
        assert text.isprintable()
        assert str(tmp_path / name) in text
        return text

    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "args.pt")
    assert "argparse.Namespace" in refusal("args.pt")
    torch.save({"epoch": 3, "weights\x1b[2J": state}, tmp_path / "other.pt")
    assert "'epoch'" in refusal("other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    refusal("list.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(print))
    refusal("plain.pt")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refusal("pointer.pt")
    torch.save(state, tmp_path / "half.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "half.pt").read_bytes()[:-200])
    refusal("half.pt")
    (tmp_path / "memo.pt").write_bytes(b"junk" * 20)  # as a pickle it asks for an object that it never stored
    assert "damaged" in refusal("memo.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    assert "damaged" in refusal("empty.pt")
    torch.save({number: torch.ones(2) for number in range(3)}, tmp_path / "numbers.pt")  # an optimizer's state
    refusal("numbers.pt")
    object_scalar = np.array([print], dtype=object)
    torch.save({"state_dict": state, "more": object_scalar}, tmp_path / "array.pt")
    assert "numpy" in refusal("array.pt")


@pytest.mark.parametrize("count", [2, 7, 30])
def test_unknown_names_are_shown_with_the_missing_ones(count, seed):
    theirs = {f"encoder.{i}": torch.zeros(2) for i in range(count)}
    rules = [Rule((f"ours.{i}",), (f"blocks.{i}",)) for i in range(count)]
    shapes = {f"ours.{i}": (2,) for i in range(count)}
    with pytest.raises(ModelError) as raised:
        read_state(theirs, rules, shapes, "file")
    text = str(raised.value)
    shown = min(count, 5)
    assert all(f"blocks.{i} is missing" in text and f"encoder.{i} is unknown" in text for i in range(shown))
    assert (f"and {2 * count - 10} more" in text) == (count > 5)
