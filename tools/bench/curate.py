"""Benchmark of the steps over all rows of a table of scores: near-duplicates and a filter, on synthetic embeddings."""

import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dualenc.curation.conditions import Conditions
from dualenc.curation.filter import row_rules
from dualenc.curation.score import finish
from dualenc.curation.tables import Columns, table_path, write_table
from tools.bench.runner import process_memory

SHARD = 10_000  # rows of a table
COPIES = 0.1  # share of rows that are near a row of another table


def curate(rows: int = 1_000_000, dims: int = 64, out: Path = Path("runs/bench")) -> None:
    """Measure seconds and peak memory of tables, near-duplicates and a filter, from given embeddings.

    Args:
        rows: number of rows.
        dims: width of the embeddings.
        out: folder for curate-ROWS.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with TemporaryDirectory(dir=out) as name:
        folder = Path(name)
        shards = [f"{i:05}.tar" for i in range(-(-rows // SHARD))]
        began = time.monotonic()
        for number, shard in enumerate(shards):
            _write_shard(folder, number, shard, min(SHARD, rows - number * SHARD), dims)
        seconds["tables"], began = time.monotonic() - began, time.monotonic()
        finish(folder, shards, lambda number: np.load(folder / f"{number}.npy"))
        seconds["duplicates"], began = time.monotonic() - began, time.monotonic()
        columns = Columns(folder, shards)
        rules = row_rules(columns, Conditions("clip_score > q(0.3) and tokens in 3..64"), 0.95)
        kept = int(np.logical_and.reduce([rule.kept for rule in rules]).sum())
        seconds["filter"] = time.monotonic() - began
        removed = {rule.name: int((~rule.kept).sum()) for rule in rules}
    result = {"rows": rows, "dims": dims, "seconds": {name: round(x, 1) for name, x in seconds.items()}}
    result |= {"peak_bytes": process_memory(os.getpid(), "VmHWM"), "kept": kept, "removed": removed}
    (out / f"curate-{rows}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _write_shard(folder: Path, number: int, shard: str, count: int, dims: int) -> None:
    """Write the embeddings and the table of a shard, whose first rows are near rows of the shard before."""
    random = np.random.default_rng(number)
    vectors = random.standard_normal((count, dims), dtype=np.float32)
    copies = int(count * COPIES) if number else 0
    before = np.random.default_rng(number - 1 if number else 0).standard_normal((SHARD, dims), dtype=np.float32)
    vectors[:copies] = before[-copies or SHARD :] + 0.05 * vectors[:copies]
    np.save(folder / f"{number}.npy", vectors)
    columns = {
        "key": [f"{number:05}{i:05}" for i in range(count)], "row": np.arange(count, dtype=np.int32),
        "clip_score": random.random(count, np.float32), "tokens": random.integers(1, 80, count).astype(float),
        "image_hash": random.integers(1, 1 << 62, count),
    }  # fmt: skip
    write_table(table_path(folder, shard), columns, {})
