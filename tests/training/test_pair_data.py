"""Weighted sources, from the command line to the batches."""

import json
from pathlib import Path

import numpy as np
import pytest
from fits import fails, fit
from helpers import write_shards

from dualenc.cli import main
from dualenc.data import EpochPlan, Loader
from dualenc.data.pairs import Pairs


@pytest.fixture
def two(tmp_path: Path, seed: int) -> Path:
    write_shards(tmp_path / "shards", [12, 8], seed)
    write_shards(tmp_path / "more", [9], seed + 1)
    return tmp_path


def sources(folder: Path, *weights: float) -> str:
    names = [str(folder / name) for name in ("shards", "more")]
    return json.dumps([{"shards": name, "weight": weight} for name, weight in zip(names, weights)])


def test_batches_follow_the_weights_of_the_sources(two: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    iterate = Loader.__iter__

    def watch(self: Loader):
        for batch in iterate(self):
            assert isinstance(batch, Pairs)
            seen.append(batch.rows.tolist())
            yield batch

    monkeypatch.setattr(Loader, "__iter__", watch)
    run = ["--data.train", sources(two, 0.5, 2), "--data.val", "null", "--data.batch_size", "4", "--data.window", "2"]
    main([*fit(two), *run, "--trainer.max_epochs", "2", "--seed_everything", str(seed)])
    expected = []
    for epoch in range(2):
        plan = EpochPlan([12, 8, 9], seed, epoch, 4, 2, [(2, 0.5), (1, 2.0)])
        expected += [plan[k].tolist() for k in range(len(plan))]
    assert seen == expected
    rows = np.concatenate(seen)
    assert (rows < 20).sum() <= 20  # half of them in each of two epochs
    assert (rows >= 20).sum() >= 4 * 9 - 2 * 4
    record = json.loads((two / "run" / "run.json").read_text())
    assert (record["train_pairs"], record["bad_samples"]) == (29, 0)


def test_mistakes_in_sources_are_named(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "weight -1.0" in fails(capsys, [*fit(two), "--data.train", sources(two, 1, -1)])
    twice = json.dumps([{"shards": str(two / "more")}, {"shards": str(two / "more")}])
    line = fails(capsys, [*fit(two), "--data.train", twice])
    assert "part-000.tar is in two sources" in line
    line = fails(capsys, [*fit(two), "--data.train", json.dumps([{"shard": str(two / "more")}])])
    assert "data.train.0.shard: did you mean shards?" in line
    for option, value in (("bad_samples", "2"), ("cache_gb", "0")):
        assert f"data.{option} {value}" in fails(capsys, [*fit(two), f"--data.{option}", value])
