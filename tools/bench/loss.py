"""Benchmark of our contrastive losses against those of open_clip: time and memory of forward and backward pass."""

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import dualenc.losses as losses
from tools.bench.runner import Result, Side, compare, extra_memory

# Matrix products of B x B x E in a step: the scores, for CLIP again in the backward pass, and two gradients.
PRODUCTS = {"clip": 4, "siglip": 3}


def loss(
    name: Literal["clip", "siglip"] = "clip",
    batch: int = 8192,
    dim: int = 512,
    device: str = "cpu",
    rounds: int = 5,
    cores: int = 2,
    peer: bool = True,
    out: Path = Path("runs/bench"),
) -> None:
    """Measure the steps per second of a contrastive loss, forward and backward in fp32.

    The side "products" computes nothing but the matrix products that dualenc computes.

    Args:
        name: name of the loss.
        batch: pairs in the batch, B.
        dim: width of the embeddings, E.
        device: "cpu" or "cuda".
        rounds: timed rounds of each side.
        cores: CPU cores of each side.
        peer: True to run open_clip's loss too, whose memory grows with B x B.
        out: folder for loss.json and loss.md.
    """
    makers = {"dualenc": _ours, "products": _products, **({"open_clip": _peer} if peer else {})}
    sides = [Side(side, partial(_side, make, name, batch, dim, device)) for side, make in makers.items()]
    result = compare("loss", "steps", sides, "open_clip" if peer else "products", rounds, cores=cores)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # A new process for each side.
        extra = dict(zip(makers, pool.map(extra_memory, sides, chunksize=1)))
    result.settings = {"name": name, "batch": batch, "dim": dim, "device": device}
    result.facts["extra_mib"] = extra
    result.notes = [
        f"{name}, B = {batch:,}, E = {dim}, fp32, {device}, forward and backward. products: only the {PRODUCTS[name]} "
        "products of B x B x E that dualenc computes.",
        "MiB in addition to the inputs, with the gradients of the inputs: "
        + ", ".join(f"{side} {mib:,.0f}" for side, mib in extra.items()),
        *(
            f"dualenc takes {_time_ratio(result, side):.2f} of the time of {side}"
            for side in makers
            if side != "dualenc"
        ),
    ]
    if peer:
        result.notes.append(f"and {extra['dualenc'] / extra['open_clip']:.3f} of the memory of open_clip")
    result.write(out)


def _time_ratio(result: Result, other: str) -> float:
    """Return the time of dualenc divided by that of another side, as the median over the rounds."""
    return median(a / b for a, b in zip(result.seconds["dualenc"], result.seconds[other]))


def _side(make: Callable[..., Callable[[], Any]], name: str, batch: int, dim: int, device: str) -> Callable[[], float]:
    """Return a function that computes one step, for `Side.make`."""
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(batch, dim, generator=generator), dim=1).to(device).requires_grad_() for _ in range(2)
    )
    # The initial values of CLIP's scale and SigLIP's bias.
    scale, bias = (torch.tensor([x], device=device, requires_grad=True) for x in (1 / 0.07, -10.0))
    step = make(name, image, text, scale, bias)

    def run() -> float:
        for x in (image, text, scale, bias):
            x.grad = None
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1.0

    return run


def _ours(name: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Callable[[], Any]:
    function = {"clip": losses.clip_loss, "siglip": losses.siglip_loss}[name]
    return lambda: function(image, text, scale, bias).backward()


def _peer(name: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Callable[[], Any]:
    from open_clip.loss import ClipLoss, SigLipLoss

    if name == "clip":
        clip = ClipLoss()
        return lambda: clip(image, text, scale).backward()
    siglip = SigLipLoss()
    return lambda: siglip(image, text, scale, bias).backward()


def _products(name: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Callable[[], Any]:
    """Return a step that computes the matrix products of the loss only, in the same blocks of rows."""
    rows = max(1, (losses.GPU_SCORES if image.is_cuda else losses.CPU_SCORES) // len(text))
    scores, text_gradient = image.new_empty(rows, len(text)), torch.zeros_like(text)
    image, text = image.detach(), text.detach()
    image_gradient = torch.empty_like(image[:rows])

    def step() -> None:
        for part in image.split(rows):
            for _ in range(PRODUCTS[name] - 2):  # The other two are the gradients below.
                torch.mm(part, text.T, out=scores[: len(part)])
            torch.mm(scores[: len(part)], text, out=image_gradient[: len(part)])
            text_gradient.addmm_(scores[: len(part)].T, part)

    return step
