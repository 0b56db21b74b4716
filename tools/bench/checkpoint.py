"""Benchmark of writing a checkpoint, hashed, synced and renamed when complete, against Lightning and `torch.save`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from dualenc.training.checkpoint import write_checkpoint
from tools.bench.runner import Side, compare

MOST_SHARE = 0.05  # Largest share of the time between two saves at the default interval.


def checkpoint(millions: int = 200, minutes: float = 15.0, rounds: int = 5, out: Path = Path("runs/bench")) -> None:
    """Measure the gigabytes written per second, and the share of a run's time that saving takes.

    Args:
        millions: parameters in millions, in fp32; each has AdamW's two moments.
        minutes: minutes between two saves; the default is that of `run.every_n_minutes`.
        rounds: timed rounds of each side.
        out: folder for checkpoint.json and checkpoint.md.
    """
    with TemporaryDirectory(dir=".") as folder:
        writers = {"torch.save": _plain, "lightning": _lightning, "dualenc": _ours}
        sides = [Side(name, partial(_side, writer, folder, millions)) for name, writer in writers.items()]
        result = compare("checkpoint", "GB", sides, "lightning", rounds)
    share = median(result.seconds["dualenc"]) / (60 * minutes)
    result.settings = {"millions": millions, "minutes": minutes}
    result.facts["share"] = share
    result.notes = [
        f"{millions} M parameters and AdamW's state, {12 * millions / 1000:.1f} GB, in 600 tensors.",
        "dualenc: hashed, synced and renamed. lightning: assembled in memory, then written. torch.save: neither.",
        f"A save takes {median(result.seconds['dualenc']):.1f} s: {share:.2%} of the {minutes:g} minutes between two "
        f"saves (at most {MOST_SHARE:.0%}).",
    ]
    result.write(out)


def _side(writer: Callable[[Path, dict[str, Any]], None], folder: str, millions: int) -> Callable[[], float]:
    size = millions * 1_000_000 // 200
    content = {
        name: {f"layer.{i}.weight": torch.randn(size) for i in range(200)} for name in ("state_dict", "first", "second")
    }
    path = Path(folder) / f"{writer.__name__}.ckpt"

    def run() -> float:
        writer(path, content)
        written = path.stat().st_size / 1e9
        path.unlink()
        return written

    return run


def _plain(path: Path, content: dict[str, Any]) -> None:
    torch.save(content, path)


def _lightning(path: Path, content: dict[str, Any]) -> None:
    TorchCheckpointIO().save_checkpoint(content, path)


def _ours(path: Path, content: dict[str, Any]) -> None:
    write_checkpoint(path, content)
