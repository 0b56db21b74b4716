"""Benchmark of the time to quality: recall@10 over samples and CPU seconds, of `dualenc fit` and open_clip's trainer.

Each run is a program of its own, and its curve is a line of a file: a benchmark that is stopped continues with the runs
that are missing, and runs with other settings of ours add lines to the same table.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from dualenc.cli import OPENMP_WAITING, SPIN_COUNT
from dualenc.data import ShardIndex
from dualenc.data.pairs import only_pairs
from dualenc.utils.files import append_lines
from tools.bench.runner import Spread, machine, versions

PEER = "open_clip"


def quality(
    settings: Path,
    evaluation: Path,
    epochs: float | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    set: tuple[str, ...] = (),
    points: int = 20,
    peer: bool = True,
    out: Path = Path("runs/bench/quality"),
) -> None:
    """Measure the time after which a run of ours has the recall@10 that open_clip's trainer has at its end.

    recall@10 is the mean of both directions. Sizes, data, batch, steps, optimizer and schedule are the same. The
    peer has its own architecture of these sizes, tokenizer, loader, augmentation and initialization.

    Args:
        settings: configuration of a `ContrastiveTask`.
        evaluation: retrieval set on which recall is measured.
        epochs: epochs of our data; absent, those of the configuration.
        seeds: seeds of both sides; with each seed the sides take turns.
        set: settings of ours other than those of the configuration, such as model.text.pool=cls.
        points: number of times that recall is measured.
        peer: whether to run the peer's missing runs too.
        out: folder for quality.jsonl, with a line for each run, and the table quality.md.
    """
    out.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_load(settings.read_text("utf-8"))
    data = content["data"]["init_args"]
    batch, epochs = data["batch_size"], content["trainer"]["max_epochs"] if epochs is None else epochs
    for item in set:
        if item.startswith("data.batch_size="):
            raise SystemExit("set data.batch_size in the configuration: both sides must have the same")
    index, _ = only_pairs(ShardIndex.build(data["train"]), data.get("captions", "auto"))
    steps = max(1, round(epochs * (len(index) // batch)))
    plan = {
        "settings": str(settings),
        "evaluation": str(evaluation),
        "steps": steps,
        "batch": batch,
        "measurements": min(points, steps),
    }
    records = _read(out / "quality.jsonl", plan)
    sides = [*([(PEER, ())] if peer else []), ("dualenc", tuple(set))]
    for seed in seeds:
        for side, own in sides:
            if (_label(side, own), seed) in {(record["label"], record["seed"]) for record in records}:
                continue
            record = _run(side, {**plan, "set": list(own), "seed": seed})
            append_lines(out / "quality.jsonl", [json.dumps(record)])
            records.append(record)
    page = table(records)
    (out / "quality.md").write_text(page, "utf-8")
    print(page, end="")


def _label(side: str, own: Sequence[str]) -> str:
    return " ".join([side, *own])


def _read(path: Path, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs of a file that belong to a plan."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if plan.items() <= record.items()]


def _run(side: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Run a side with a seed in a program of its own, and return its record."""
    own = {} if side == PEER or any(name in os.environ for name in OPENMP_WAITING) else {"GOMP_SPINCOUNT": SPIN_COUNT}
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tools.bench.quality_sides", side, json.dumps(plan), folder],
            env={**os.environ, **own},  # as the command `dualenc` sets it
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    about = {"date": date.today().isoformat(), "machine": machine(), "versions": versions()}
    return {**plan, "label": _label(side, plan["set"]), **found, **about}


def reached(points: Sequence[dict[str, float]], recall: float, what: str) -> float | None:
    """Return the samples, CPU seconds or seconds after which a curve first has a recall; None if it never has.

    Between two points of the curve, which begins at 0, the recall is taken to grow evenly.

    Args:
        points: points of a curve, each with `recall` and `what`.
        recall: recall to reach.
        what: name of the quantity to return.
    """
    before = {what: 0.0, "recall": 0.0}
    for point in points:
        if point["recall"] >= recall:
            share = (recall - before["recall"]) / max(point["recall"] - before["recall"], 1e-12)
            return before[what] + max(0.0, share) * (point[what] - before[what])
        before = point
    return None


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the runs as a page: final recall, times, and the time to the peer's final recall with the same seed.

    The last column is the CPU seconds after which the peer first has its final recall, divided by those after which the
    run has it.
    """
    peers = {record["seed"]: record["points"] for record in records if record["label"] == PEER}
    columns = ["side", "seed", "recall@10", "CPU s", "s", "samples to the peer's recall", "CPU s to it", "times faster"]
    lines = ["# quality", "", *_header(columns)]
    labels = dict.fromkeys(record["label"] for record in records)
    summary = ["", *_header(["side", "recall@10", "CPU s", "times faster", "seeds that reach it"])]
    for label in labels:
        own = sorted((record for record in records if record["label"] == label), key=lambda record: record["seed"])
        ratios = []
        for record in own:
            end, peer = record["points"][-1], peers.get(record["seed"])
            samples = peer and reached(record["points"], peer[-1]["recall"], "samples")
            cpu = peer and reached(record["points"], peer[-1]["recall"], "cpu")
            if peer and cpu:  # the peer too may have reached it before its end
                ratios.append((reached(peer, peer[-1]["recall"], "cpu") or 0.0) / cpu)
            shown = (f"{samples:,.0f}", f"{cpu:.0f}", f"{ratios[-1]:.2f}") if samples and cpu else ("-", "-", "-")
            lines.append(
                f"| {label} | {record['seed']} | {end['recall']:.4f} | {end['cpu']:.0f} | {end['seconds']:.0f} "
                f"| {' | '.join(shown)} |"
            )
        recalls, cpus = ([record["points"][-1][what] for record in own] for what in ("recall", "cpu"))
        faster = Spread.of(ratios).show(".2f") if ratios else "-"
        recall, cpu_median = Spread.of(recalls).show(".4f"), f"{median(cpus):.0f}"
        summary.append(f"| {label} | {recall} | {cpu_median} | {faster} | {len(ratios)} of {len(own)} |")
    first = records[0]
    return "\n".join([
        *lines,
        *summary,
        "",
        f"{first['settings']} on {first['evaluation']}: {first['steps']:,} steps of {first['batch']} pairs. recall@10 "
        "is that at the end, the mean of both directions. Median (quartiles) over the seeds. CPU seconds are those of "
        "training with its data workers; preparation and measurements are left out.",
        "",
        f"{first['date']}, `python -m tools.bench {' '.join(sys.argv[1:])}`, {first['threads']} threads of "
        f"{first['machine']['cores']} cores of {first['machine']['cpu']}; "
        f"{', '.join(f'{name} {version}' for name, version in first['versions'].items())}.",
        "",
    ])  # fmt: skip


def _header(columns: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
