"""The arithmetic, the noisy shards and the file of tools/bench/noise: no training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import write_shards

from dualenc.data import ShardIndex
from dualenc.data.pairs import captions_of
from tools.bench import noise as bench
from tools.bench.noise import ARMS, auroc, noise, precision_at, write_noisy


def test_figures_agree_with_their_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        n = int(rng.integers(2, 40))
        scores, wrong = rng.integers(0, 6, n) / 5, rng.random(n) < 0.5
        wrong[:2] = True, False
        pairs = [(a < b) + (a == b) / 2 for a in scores[wrong] for b in scores[~wrong]]
        assert auroc(scores, wrong) == pytest.approx(np.mean(pairs), abs=1e-12)
        for recall in (0.2, 0.8, 1.0):
            cut = min(c for c in scores if (scores[wrong] <= c).mean() >= recall - 1e-12)
            assert precision_at(scores, wrong, recall) == pytest.approx(wrong[scores <= cut].mean())


def test_noisy_shards_have_the_texts_of_other_samples(tmp_path: Path, seed: int) -> None:
    write_shards(tmp_path / "in", [23, 17, 20], seed, captions=2)
    index = ShardIndex.build(str(tmp_path / "in"))
    mismatched = write_noisy(index, "json.captions", 0.3, 4, tmp_path / "out")
    noisy = ShardIndex.build(str(tmp_path / "out"))
    assert noisy.counts() == [15] * 4
    before = {sample.key: sample for sample in index}
    assert sorted(mismatched) == sorted(before)
    moved = 0
    for sample in noisy:
        own = before[sample.key]
        assert sample.read("png") == own.read("png")
        differs = captions_of(sample, "json.captions") != captions_of(own, "json.captions")
        assert mismatched[sample.key] == differs == (sample.read("txt") != own.read("txt"))
        moved += differs
    assert moved == 18
    assert sorted(sample.read("txt") for sample in noisy) == sorted(sample.read("txt") for sample in index)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    write_noisy(index, "json.captions", 0.3, 4, tmp_path / "out")
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}


def test_a_stopped_benchmark_continues(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", [40, 20], seed)
    settings = tmp_path / "run.yaml"
    data = {"train": str(tmp_path / "in"), "batch_size": 4, "captions": "txt"}
    settings.write_text(yaml.safe_dump({"data": {"init_args": data}}))
    ran: list[str] = []
    stops = {"fold": 1, "noisy-1": 1}

    def stop(name: str) -> None:
        if stops.get(name):
            stops[name] -= 1
            raise KeyboardInterrupt
        ran.append(name)

    def score_fold(settings: Path, noisy: Path, fold: int, *rest: Any) -> dict[str, Any]:
        stop("fold" if fold == 1 else f"fold {fold}")
        keys = [sample.key for sample in ShardIndex.build(str(noisy / f"fold-{fold}.tar"))]
        return {"scores": {key: float(i) for i, key in enumerate(keys)}, "kept": keys[6:], "cpu": 1.0}

    def fit(settings: Path, folder: Path, shards: Any, options: list[str]) -> float:
        stop(folder.name.rpartition("-")[0])
        assert options[options.index("--trainer.max_steps") + 1] == "30"
        if "--data.select" in options:
            chosen = ShardIndex.build(shards).select(options[options.index("--data.select") + 1])
            assert len(chosen) == 42
        return 2.0

    monkeypatch.setattr(bench, "_score_fold", score_fold)
    monkeypatch.setattr(bench, "_fit", fit)
    monkeypatch.setattr(bench, "_recall", lambda folder, evaluation: {"n": 0.1, "f": 0.2, "c": 0.3}[folder.name[0]])
    common: dict[str, Any] = {"settings": settings, "evaluation": tmp_path / "set", "out": tmp_path / "out"}
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            noise(**common, epochs=2, seeds=(0, 1))
    noise(**common, epochs=2, seeds=(0, 1))
    assert ran == ["fold 0", "fold", "fold 2", *(f"{arm}-{seed}" for seed in (0, 1) for arm in ARMS)]
    lines = (tmp_path / "out" / "noise.jsonl").read_text().splitlines()
    assert len(lines) == len(ran) == len([json.loads(line) for line in lines])
    page = capsys.readouterr().out
    assert "The filter keeps 42 pairs" in page
    assert "| filtered | 0.2000 | 0.0000 | 0.2000, 0.2000 | 2 |" in page
