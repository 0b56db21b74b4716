"""Training on a list of samples: the pairs that are used, the record, and resuming with another list."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fits import SMOKE, fails, small_fit
from helpers import write_shards

from dualenc.cli import main
from dualenc.data import ShardIndex
from dualenc.data.shards.selection import Selection

OFF = ("--trainer.callbacks", "[]", "--run.monitor", "val/mrr")


@pytest.mark.parametrize("form", [".select", ".txt"])
def test_a_list_chooses_training_pairs_and_is_recorded(tmp_path: Path, seed: int, form: str) -> None:
    """Held-out shards stay whole, though the list names none of them; an expression applies to them, too."""
    write_shards(tmp_path / "train", [20, 15, 13], seed)
    write_shards(tmp_path / "held", [9], seed + 1)
    index = ShardIndex.build(str(tmp_path / "train"))
    rows = np.sort(np.random.default_rng(seed).permutation(48)[:30])
    path = tmp_path / f"chosen{form}"
    Selection.of_index(index.take(rows)).save(path, index)
    train = ["--data.train", str(tmp_path / "train")]  # `small_fit` writes shards of its own
    held = ["--data.val", str(tmp_path / "held")]
    run = small_fit(SMOKE, tmp_path, seed, *train, "--data.select", str(path), *held, *OFF)
    record = json.loads((run / "run.json").read_text())
    assert (record["train_pairs"], record["held_out_pairs"]) == (30, 9)
    assert record["selection"] == Selection.read(path).digest
    assert record["fingerprint"] == index.take(rows).fingerprint


def test_resuming_compares_the_chosen_samples_not_the_form_of_the_list(tmp_path: Path, seed: int, capsys: Any) -> None:
    write_shards(tmp_path / "train", [20, 15, 13], seed)
    index = ShardIndex.build(str(tmp_path / "train"))
    chosen, other = (Selection.of_index(index.take(np.arange(first, first + 30))) for first in (0, 1))
    for form in (".select", ".txt"):
        chosen.save(tmp_path / f"a{form}", index)
        other.save(tmp_path / f"b{form}", index)
    train = ["--data.train", str(tmp_path / "train"), "--data.select", str(tmp_path / "a.select")]
    run = small_fit(SMOKE, tmp_path, seed, *train, "--trainer.max_steps", "4", *OFF)
    again = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "6",
             "--run.accept_changes", "[trainer.max_steps]", "--data.select"]  # fmt: skip
    line = fails(capsys, [*again, str(tmp_path / "b.txt")])
    assert "data.train" in line or "data.val" in line  # the sample that differs may be held out
    assert "--run.accept_changes" in line
    main([*again, str(tmp_path / "a.txt")])
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2
