"""Benchmark of a retrieval evaluation of given embeddings, against CLIP_benchmark and the matrix product alone."""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualenc.metrics.retrieval import retrieval_metrics
from tools.bench.runner import Result, Side, compare, extra_memory

KS = (1, 5, 10)  # numbers of best candidates for recall
BATCH = 64  # queries that CLIP_benchmark, the peer, scores at a time by default


def retrieval(
    images: int = 5000,
    captions: int = 5,
    dim: int = 512,
    noise: float = 8.0,
    rounds: int = 5,
    cores: int = 2,
    peer: Path | None = None,
    out: Path = Path("runs/bench"),
) -> None:
    """Measure the evaluations per second: retrieval in both directions, on the CPU in fp32.

    The side "dualenc" computes all metrics, the rank of each query and the intervals of 1,000 bootstrap samples;
    "without intervals" leaves out the bootstrap. "product" computes nothing but the matrix of scores, the least that
    any evaluation needs. The peer computes recall at 1, 5 and 10.

    Args:
        images: number of images, I.
        captions: texts of each image.
        dim: width of the embeddings, E.
        noise: length of the random vector that is added to an image to make a text; 0 simulates a perfect model.
        rounds: timed rounds of each side.
        cores: CPU cores of each side.
        peer: folder with the package clip_benchmark, which is not a dependency; None to leave it out. Its memory grows
            with the number of images times the number of texts.
        out: folder for retrieval.json and retrieval.md.
    """
    makers: dict[str, Callable[..., Callable[[], Any]]] = {
        "dualenc": _ours,
        "without intervals": _without_intervals,
        "product": _product,
    }
    if peer is not None:
        makers["clip_benchmark"] = partial(_peer, peer.resolve())
    sides = [Side(side, partial(_side, make, images, captions, dim, noise)) for side, make in makers.items()]
    result = compare(
        "retrieval", "evaluations", sides, "product" if peer is None else "clip_benchmark", rounds, cores=cores
    )
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # A new process for each side.
        extra = dict(zip(makers, pool.map(extra_memory, sides, chunksize=1)))
        found = {side.name: pool.apply(_metrics, (side,)) for side in sides if side.name != "product"}
    result.settings = {"images": images, "captions": captions, "dim": dim, "noise": noise}
    result.facts |= {"extra_mib": extra, "metrics": found}
    result.notes = [
        f"{images:,} images, {images * captions:,} texts, E = {dim}, fp32, CPU.",
        "MiB in addition to the embeddings: " + ", ".join(f"{side} {mib:,.0f}" for side, mib in extra.items()),
        f"dualenc takes {_time_ratio(result, 'dualenc', 'product'):.2f} of the time of the product alone, without "
        f"intervals {_time_ratio(result, 'without intervals', 'product'):.2f}",
    ]
    if peer is not None:
        difference = max(abs(value - found["dualenc"][name]) for name, value in found["clip_benchmark"].items())
        result.notes.append(
            f"dualenc is {1 / _time_ratio(result, 'dualenc', 'clip_benchmark'):.1f} times as fast as clip_benchmark, "
            f"in {extra['dualenc'] / extra['clip_benchmark']:.3f} of its memory; recall differs by at most "
            f"{difference:.1e}"
        )
    result.write(out)


def _time_ratio(result: Result, side: str, other: str) -> float:
    """Return the time of a side divided by the time of another, as the median over the rounds."""
    return median(a / b for a, b in zip(result.seconds[side], result.seconds[other]))


def _metrics(side: Side) -> dict[str, float]:
    """Return the metrics that a side computes."""
    # `retrieval` makes each side as partial(_side, make, *settings).
    make, *settings = side.make.args  # type: ignore[attr-defined]
    return make(*_embeddings(*settings))()


def _side(
    make: Callable[..., Callable[[], Any]], images: int, captions: int, dim: int, noise: float
) -> Callable[[], float]:
    """Return a function that runs one evaluation, for `Side.make`."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    evaluate = make(*_embeddings(images, captions, dim, noise))

    def run() -> float:
        evaluate()
        return 1.0

    return run


def _embeddings(images: int, captions: int, dim: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Draw image embeddings (I, E), text embeddings (T, E), and the image of each text (T,)."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(captions)
    image = F.normalize(torch.randn(images, dim, generator=generator), dim=1)
    text = F.normalize(torch.randn(len(owner), dim, generator=generator), dim=1).mul_(noise)
    return image, F.normalize(text.add_(image[owner]), dim=1), owner


def _ours(image: Tensor, text: Tensor, owner: Tensor) -> Callable[[], dict[str, float]]:
    return lambda: retrieval_metrics(image, text, owner, KS).metrics


def _without_intervals(image: Tensor, text: Tensor, owner: Tensor) -> Callable[[], dict[str, float]]:
    return lambda: retrieval_metrics(image, text, owner, KS, replicates=0).metrics


def _product(image: Tensor, text: Tensor, owner: Tensor) -> Callable[[], Any]:
    return lambda: text @ image.T


def _peer(folder: Path, image: Tensor, text: Tensor, owner: Tensor) -> Callable[[], dict[str, float]]:
    """Return the recalls of CLIP_benchmark, computed as in its `evaluate`."""
    sys.path.insert(0, str(folder))
    theirs = importlib.import_module("clip_benchmark.metrics.zeroshot_retrieval")

    def run() -> dict[str, float]:
        scores = text @ image.T
        pairs = torch.zeros_like(scores, dtype=torch.bool)
        pairs[torch.arange(len(text)), owner] = True
        found = {}
        for k in KS:
            for name, x, y in (("image", scores, pairs), ("text", scores.T, pairs.T)):
                hits = theirs.batchify(theirs.recall_at_k, x, y, BATCH, "cpu", k=k) > 0
                found[f"{name}_retrieval_recall@{k}"] = hits.float().mean().item()
        return found

    return run
