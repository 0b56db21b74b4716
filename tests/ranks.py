"""Runs of a function on several gloo ranks, which are processes forked from one that has imported everything."""

import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def in_ranks(function: Callable[[Path, int, int], Any], folder: Path, world: int) -> list[Any]:
    """Run `function(folder, rank, world)` on each rank and return the values by rank.

    Args:
        function: function at the top level of a module; its value must be loadable by `torch.load(weights_only=True)`.
        folder: folder for the values.
        world: number of ranks.
    """
    import torch

    command = [sys.executable, __file__, function.__module__, function.__name__, str(folder), str(world)]
    path = os.pathsep.join(part for part in sys.path if part)
    run = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]


def _rank(module: str, name: str, folder: Path, rank: int, world: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    torch.save(getattr(importlib.import_module(module), name)(folder, rank, world), folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    module, name, folder, world = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    importlib.import_module(module)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(module, name, folder, r, world), daemon=True) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    sys.exit(any(process.exitcode != 0 for process in ranks))
