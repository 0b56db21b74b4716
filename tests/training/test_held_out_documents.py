"""Documents in training: their metrics are those of `dualenc retrieval`, and a run can be judged by them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fits import TINY_TEXT, fails, metrics
from helpers import caption, write_documents

from dualenc.cli import main
from dualenc.metrics.documents import METRICS

HEADS = {
    "near": {"kind": "embedding", "problem": "negatives", "pool": "mean"},
    "mood": {"kind": "classification", "labels": ["x", "y"]},
}


def write_set(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    corpus = [{"_id": f"d{i}", "title": caption(rng), "text": caption(rng)} for i in range(30)]
    queries = [{"_id": f"q{i}", "text": caption(rng)} for i in range(7)]
    lines = [f"q{q}\td{d}\t1" for q in range(7) for d in rng.choice(30, 4, replace=False)]
    return write_documents(folder, corpus, queries, lines)


def write_config(folder: Path, seed: int, val: Any, heads: Any = HEADS, **run: Any) -> Path:
    rng = np.random.default_rng(seed)
    rows = [f"{caption(rng)}\t{caption(rng)}\t{'xy'[i % 2]}" for i in range(32)]
    (folder / "pairs.tsv").write_text("\n".join(["text\tother\tlabel", *rows]) + "\n")
    train = {"near": {"pair": "other"}, "mood": {}}
    settings = {
        "seed_everything": seed,
        "trainer": {
            "max_epochs": 2, "default_root_dir": str(folder / "run"), "log_every_n_steps": 1, "accelerator": "cpu",
        },
        "run": {"monitor": "val/near/ndcg@10", **run},
        "model": {"class_path": "dualenc.training.TextTask", "init_args": {"heads": heads, "text": TINY_TEXT}},
        "data": {"class_path": "dualenc.training.TextData", "init_args": {
            "train": {name: {**train[name], "files": str(folder / "pairs.tsv")} for name in heads},
            "val": val, "batch_size": 8, "workers": 0,
        }},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))
    return path


def callback(path: Path) -> list[str]:
    one = {"class_path": "dualenc.training.Evaluation", "init_args": {"data": [str(path)], "every_n_steps": 3}}
    return ["--trainer.callbacks", json.dumps([one])]


@pytest.mark.parametrize("alone", [True, False])
def test_metrics_in_training_are_those_of_the_command(tmp_path: Path, seed: int, alone: bool) -> None:
    """Check `val` and the callback, with and without other held-out files."""
    documents = write_set(tmp_path / "docs", seed)
    val: dict[str, Any] = {"near": {"files": str(documents)}}
    heads = {"near": HEADS["near"]} if alone else HEADS
    val |= {} if alone else {"mood": {"files": str(tmp_path / "pairs.tsv")}}
    main(["fit", "--config", str(write_config(tmp_path, seed, val, heads)), *callback(documents)])
    run = tmp_path / "run"
    main(["retrieval", str(run / "last"), str(documents), "--out", str(tmp_path / "out")])
    (result,) = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    for name in METRICS:
        assert len(metrics(run, f"val/near/{name}")) == 2
        assert metrics(run, f"val/near/{name}")[-1] == pytest.approx(result["metrics"][name], abs=1e-6)
        assert metrics(run, f"docs/{name}")[-1] == pytest.approx(result["metrics"][name], abs=1e-6)
    with open(run / "metrics.csv") as file:
        assert {int(row["step"]) for row in csv.DictReader(file) if row["metric"] == "docs/mrr@10"} >= {3, 6}
    assert bool(metrics(run, "val/mood/accuracy")) is not alone
    assert (run / "best").exists()
    assert "retrieval of documents by queries" in (run / "report.html").read_text()


def test_mistakes_stop_the_run_before_it_begins(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    documents = str(write_set(tmp_path / "docs", seed))

    def error(val: Any, heads: Any = HEADS, more: Any = (), **run: Any) -> str:
        return fails(capsys, ["fit", "--config", str(write_config(tmp_path, seed, val, heads, **run)), *more], 2)

    assert "only embedding heads rank" in error({"mood": {"files": documents}})
    assert "data.val.near.pair has no use for" in error({"near": {"files": documents, "pair": "other"}})
    unknown = error({"near": {"files": documents}}, monitor="val/near/ndcg@5")
    assert "run.monitor val/near/ndcg@5 is never measured: did you mean val/near/ndcg@10" in unknown
    only = {"mood": HEADS["mood"]}
    assert "needs a model with an embedding head" in error(
        0.2, only, callback(tmp_path / "docs"), monitor="val/mood/accuracy"
    )
    (tmp_path / "docs" / "queries.jsonl").unlink()
    assert "queries.jsonl is missing" in error({"near": {"files": documents}})
    assert not (tmp_path / "run" / "metrics.csv").exists()
