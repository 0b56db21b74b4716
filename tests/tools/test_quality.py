"""The arithmetic and the file of tools/bench/quality: no training, and no time is asserted."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import write_shards

from tools.bench import quality as bench
from tools.bench.quality import quality, reached, table


def test_a_recall_is_reached_where_the_curve_first_has_it(seed: int) -> None:
    """Compare with numpy's interpolation of curves that only grow."""
    rng = random.Random(seed)
    for _ in range(50):
        times, recalls = (sorted(rng.random() for _ in range(8)) for _ in range(2))
        points = [{"cpu": cpu, "recall": recall} for cpu, recall in zip(times, recalls)]
        goal = rng.uniform(0, recalls[-1])
        assert reached(points, goal, "cpu") == pytest.approx(np.interp(goal, [0, *recalls], [0, *times]))
        assert reached(points, recalls[-1] + 1e-6, "cpu") is None
    fallen = [{"cpu": 1.0, "recall": 0.4}, {"cpu": 2.0, "recall": 0.1}, {"cpu": 3.0, "recall": 0.5}]
    assert reached(fallen, 0.4, "cpu") == pytest.approx(1.0)


def curve(pace: float) -> list[dict[str, float]]:
    return [{"step": i, "samples": 4 * i, "seconds": i, "cpu": i * pace, "recall": i / 10} for i in range(1, 6)]


def test_missing_runs_are_added_and_the_others_kept(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "shards", [9, 6], seed)
    settings: dict[str, Any] = {"data": {"init_args": {"train": str(tmp_path / "shards"), "batch_size": 4}}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "trainer": {"max_epochs": 3}}))
    ran: list[tuple[str, int]] = []

    def run(side: str, plan: dict[str, Any]) -> dict[str, Any]:
        assert (plan["steps"], plan["batch"]) == (3 * (15 // 4), 4)
        label = " ".join([side, *plan["set"]])
        ran.append((label, plan["seed"]))
        pace = {"open_clip": 2.0, "dualenc": 1.0}.get(label, 0.5)
        return {
            **plan, "label": label, "points": curve(pace), "threads": 1, "date": "2026-01-01",
            "machine": {"cores": 2, "cpu": "some"}, "versions": {},
        }  # fmt: skip

    monkeypatch.setattr(bench, "_run", run)
    common: dict[str, Any] = {"settings": path, "evaluation": tmp_path / "set", "out": tmp_path / "out"}
    quality(**common, seeds=(0,))
    quality(**common, seeds=(0, 1))
    quality(**common, seeds=(0, 1), set=("model.text.pool=cls",))
    lever = "dualenc model.text.pool=cls"
    assert ran == [("open_clip", 0), ("dualenc", 0), ("open_clip", 1), ("dualenc", 1), (lever, 0), (lever, 1)]
    lines = (tmp_path / "out" / "quality.jsonl").read_text().splitlines()
    assert [(json.loads(line)["label"], json.loads(line)["seed"]) for line in lines] == ran
    page = (tmp_path / "out" / "quality.md").read_text()
    assert capsys.readouterr().out.endswith(page)
    faster = {row.split(" | ")[0]: row.split(" | ")[3] for row in page.splitlines() if row.endswith("2 of 2 |")}
    assert faster == {
        "| open_clip": "1.00 (1.00 to 1.00)",
        "| dualenc": "2.00 (2.00 to 2.00)",
        f"| {lever}": "4.00 (4.00 to 4.00)",
    }


def test_a_run_that_stays_below_the_peer_has_no_ratio() -> None:
    about = {"threads": 1, "date": "", "machine": {"cores": 2, "cpu": ""}, "versions": {}, "steps": 5, "batch": 4}
    below = [{**point, "recall": point["recall"] / 2} for point in curve(1.0)]
    records = [
        {**about, "label": label, "seed": 3, "settings": "", "evaluation": "", "points": points}
        for label, points in (("open_clip", curve(1.0)), ("dualenc", below))
    ]
    assert "| dualenc | 3 | 0.2500 | 5 | 5 | - | - | - |" in table(records)
    assert "| - | 0 of 1 |" in table(records)
