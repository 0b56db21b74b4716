"""Memory of a training step by model, micro-batch and precision: counted without a GPU, and measured where one is."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_map

from dualenc.data import Pairs
from dualenc.models import ImageConfig, TextConfig
from dualenc.tokens import Tokens
from dualenc.training import ContrastiveTask
from dualenc.training.step_memory import AUTOCAST, StepMemory, optimizer_memory, step_memory
from dualenc.training.task import Task


class OneRank(SimpleNamespace):
    """Stand-in for a trainer of one rank, with what a task asks of it."""

    world_size = 1
    estimated_stepping_batches = 1


def memory(
    image: str = "vit_base_patch32_clip_224",
    img_size: int = 224,
    layers: int = 12,
    width: int = 512,
    embed_dim: int = 512,
    tokens: int = 20,
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed",
    pairs: int = 256,
) -> None:
    """Print the memory of a step with AdamW: of the parameters, and per pair of a micro-batch and of a rank's batch.

    Where torch finds a CUDA device, the peaks of its caching allocator follow what was counted.

    Args:
        image: timm's name of the image tower.
        img_size: side of the image in pixels.
        layers: layers of the text tower.
        width: width of the text tower.
        embed_dim: width of the embeddings, E.
        tokens: tokens of a caption.
        precision: precision of the trainer.
        pairs: smaller of two batches; the other one has twice as many pairs. In small batches the gradients outweigh
            the activations, and the difference of two peaks is not the memory of the pairs.
    """
    config = ImageConfig(image, img_size)
    text = TextConfig(layers=layers, width=width, heads=width // 64, norm="pre", pool="mean")
    measured = torch.cuda.is_available()
    print(f"{image} at {img_size} pixels, text tower of {layers} layers of width {width}, {tokens} tokens, {precision}")
    for checkpointing in (False, True):
        task, trainer = make_task(config, text, embed_dim, checkpointing, "meta")
        if not checkpointing:
            number = sum(p.numel() for p in task.parameters())
            fixed = 8 * number + optimizer_memory(task).state
            print(f"parameters, gradients, AdamW's state: {fixed / 1e9:.2f} GB ({number / 1e6:.0f} M parameters)")
        batches = [pair_batch(img_size, size, tokens) for size in (pairs, 2 * pairs)]
        rows = {"counted": [step_memory(task, batch, precision) for batch in batches]}
        if measured:
            task, trainer = make_task(config, text, embed_dim, checkpointing, "cuda")
            allocator_memory(task, batches[0], precision)  # loads the libraries, which take their workspaces
            rows["measured"] = [allocator_memory(task, batch, precision) for batch in batches]
        for how, (small, large) in rows.items():
            slope = (max(large[1:]) - max(small[1:])) / pairs
            name = "with grad_checkpointing" if checkpointing else "plain"
            print(f"{how:9} {name:24} {slope / 1e6:7.2f} MB a pair, peak of {2 * pairs} {max(large[1:]) / 1e9:.3f} GB")
        del task, trainer


def make_task(
    image: ImageConfig, text: TextConfig, embed_dim: int, checkpointing: bool, device: str
) -> tuple[ContrastiveTask, Any]:
    """Make a task and the trainer that it asks; Lightning keeps a weak reference to the trainer only."""
    with (
        torch.device("meta") if device == "meta" else nullcontext()
    ):  # Without content no time goes into random numbers.
        task = ContrastiveTask(image, text, embed_dim, grad_checkpointing=checkpointing).to(device)
    trainer = OneRank()
    task.trainer = trainer
    return task, trainer


def pair_batch(img_size: int, pairs: int, tokens: int) -> Pairs:
    """Make a batch of black images and equal captions."""
    images = torch.zeros(pairs, 3, img_size, img_size, dtype=torch.uint8)
    rows = torch.zeros(pairs, dtype=torch.int64)
    return Pairs(images, Tokens.pack([[5] * tokens] * pairs), rows, torch.arange(2 * pairs).view(pairs, 2))


def allocator_memory(task: Task, batch: Any, precision: str) -> StepMemory:
    """Return what `step_memory` counts, as torch's caching allocator measures it."""
    task.train()
    for parameter in task.parameters():
        parameter.grad = None
    task._batch = None
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    given = tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, batch)
    inputs = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST):
        loss = task.training_step(given, 0)
    forward = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    return StepMemory(inputs, forward, torch.cuda.max_memory_allocated() - before)
