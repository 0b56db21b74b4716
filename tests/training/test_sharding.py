"""FSDP2 over two gloo ranks: which weights travel in which dtype, and gradients equal to those of one process."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import SIZE
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import in_ranks
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import dualenc.training.contrastive as contrastive
from dualenc.losses import clip_loss
from dualenc.models import DualEncoder, ImageConfig, TextConfig, embed_micro_batches
from dualenc.models.tower import compile_blocks
from dualenc.tokens import Tokens
from dualenc.training.sharding import shard

PAIRS = 6


def model_of(seed: int, dtype: torch.dtype) -> DualEncoder:
    torch.manual_seed(seed)
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    text = TextConfig(60, width=16, layers=3, heads=2, context_length=12, norm="pre", pool="mean")
    model = DualEncoder(ImageConfig("vit_tiny_patch16_224", SIZE, vit), text, embed_dim=8, logit_bias=True).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def pairs_of(seed: int, dtype: torch.dtype) -> tuple[Tensor, list[list[int]]]:
    torch.manual_seed(seed + 1)
    texts = [torch.randint(60, (int(n),)).tolist() for n in torch.randint(1, 12, (2 * PAIRS,))]
    return torch.randn(2 * PAIRS, 3, SIZE, SIZE, dtype=dtype), texts


def gradients_of(model: Any, pairs: tuple[Tensor, list[list[int]]], size: int, half: bool, group: Any) -> list[Tensor]:
    """Return the gradients of the mean over the ranks of a loss, embedded in micro-batches of `size`."""
    images, texts = pairs
    micro_batches = [(images[i : i + size], Tokens.pack(texts[i : i + size])) for i in range(0, len(texts), size)]
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        out = embed_micro_batches(model, micro_batches)
        loss = clip_loss(*out, group=group)
    loss.backward()  # Outside of autocast, as Lightning does.
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


class Collectives(TorchDispatchMode):
    """Record of the collectives of FSDP2: name, dtype and number of elements of this rank, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("c10d::_").rstrip("_")
        if name in ("allgather_base", "reduce_scatter_base"):
            part = args[1] if name == "allgather_base" else args[0]
            self.found.append((name, str(part.dtype).removeprefix("torch."), part.numel()))
        return func(*args, **(kwargs or {}))


def on_a_rank(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Return what a step of a sharded model communicates, its gradients, and those of the same model unsharded."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    saved = torch.load(folder / "settings.pt", weights_only=True)
    seed, half, size, compiled = (saved[name] for name in ("seed", "half", "size", "compiled"))
    dtype = torch.float32 if half else torch.float64
    model = model_of(seed, dtype)
    images, texts = pairs_of(seed, dtype)
    own = images[rank::world], texts[rank::world]
    whole = gradients_of(model, own, size, half, dist.group.WORLD)
    for gradient in whole:
        dist.all_reduce(gradient)
    model.zero_grad()
    if compiled:
        compile_blocks(model, backend="aot_eager")  # It traces autograd, and makes no machine code.
    shard(model, init_device_mesh("cpu", (world,)), torch.bfloat16 if half else None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        model.image(own[0][:2])  # Alone and first, as where it is locked.
    ahead = []  # number of gathers when each block of the image tower is done
    collectives = Collectives()
    with nullcontext() if compiled else collectives:  # Nothing is compiled where calls are recorded.
        for block in model.image.vit.blocks:
            block.register_forward_hook(lambda *_: ahead.append(len(collectives.found)))
        sharded = gradients_of(model, own, size, half, dist.group.WORLD)
    return {
        "whole": [gradient / world for gradient in whole],
        "sharded": [gradient.full_tensor() for gradient in sharded],
        "found": collectives.found,
        "ahead": ahead,
        "dtypes": [str(parameter.dtype) for parameter in model.parameters()],
        "graphs": counters["stats"]["unique_graphs"],
    }


def run(folder: Path, seed: int, half: bool, size: int = PAIRS, compiled: bool = False) -> list[dict[str, Any]]:
    torch.save({"seed": seed, "half": half, "size": size, "compiled": compiled}, folder / "settings.pt")
    return in_ranks(on_a_rank, folder, 2)


def block_sizes() -> tuple[int, int]:
    """Return the numbers of elements of the matrices and of the vectors of a block, of either tower."""
    model = model_of(0, torch.float32)
    sizes = {
        (sum(p.numel() for p in block.parameters() if p.dim() > 1), sum(p.numel() for p in block.parameters()))
        for block in (*model.image.vit.blocks, *model.text.blocks)
    }
    ((matrices, both),) = sizes
    return matrices, both - matrices


@pytest.mark.long
@pytest.mark.parametrize(
    ("half", "size", "compiled"), [(False, PAIRS, False), (False, 2, False), (True, PAIRS, False), (False, 3, True)]
)
def test_gradients_equal_those_of_whole_weights(
    tmp_path: Path, seed: int, half: bool, size: int, compiled: bool
) -> None:
    """Autocast rounds the same matrices that are gathered in half precision, so nothing else is rounded."""
    tolerance = 1e-6 if half else 1e-10
    for of_rank in run(tmp_path, seed, half, size, compiled):
        assert (of_rank["graphs"] > 0) == compiled
        assert set(of_rank["dtypes"]) == {"torch.float32" if half else "torch.float64"}
        for whole, sharded in zip(of_rank["whole"], of_rank["sharded"], strict=True):
            torch.testing.assert_close(sharded, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.long
def test_micro_batches_would_sum_in_half_precision(tmp_path: Path, seed: int) -> None:
    """The reason why a task with micro-batches gathers all weights in fp32."""
    (first, _) = run(tmp_path, seed, half=True, size=2)
    errors = [(a - b).norm() / a.norm() for a, b in zip(first["whole"], first["sharded"]) if a.any()]
    assert max(errors) > 1e-4


@pytest.mark.long
def test_matrices_of_blocks_travel_in_half_precision(tmp_path: Path, seed: int) -> None:
    """All else is gathered in fp32, and gradients are reduced in fp32, once for each block."""
    matrices, vectors = block_sizes()
    for of_rank in run(tmp_path, seed, half=True):
        found = Counter(one for one in of_rank["found"] if one[1] != "float64")  # the sums of the loss
        gathers = Counter({key[1:]: count for key, count in found.items() if key[0] == "allgather_base"})
        mixed = {key: count for key, count in gathers.items() if key[0] == "uint8"}
        assert mixed == {("uint8", (2 * matrices + 4 * vectors) // 2): 12}  # 6 blocks, forward and backward
        assert {key[0] for key in gathers} == {"uint8", "float32"}
        reduced = {key[1:]: count for key, count in found.items() if key[0] == "reduce_scatter_base"}
        assert {key[0] for key in reduced} == {"float32"}
        assert reduced["float32", (matrices + vectors) // 2] == 6


@pytest.mark.long
def test_the_next_block_is_gathered_while_a_block_computes(tmp_path: Path, seed: int) -> None:
    for of_rank in run(tmp_path, seed, half=True):
        # When the first block is done, its tower's own weights, its own and those of the second block are gathered.
        assert of_rank["ahead"] == [3, 4, 4]


@pytest.mark.parametrize(
    ("precision", "micro_batch_size", "expected"),
    [("bf16-mixed", None, torch.bfloat16), ("bf16-mixed", 4, None), ("32-true", None, None)],
)
def test_a_task_gathers_in_half_precision_where_autocast_does(
    monkeypatch: pytest.MonkeyPatch, precision: str, micro_batch_size: int | None, expected: torch.dtype | None
) -> None:
    given = []
    monkeypatch.setattr(contrastive, "shard", lambda model, mesh, half: given.append(half))
    contrastive.ContrastiveTask.configure_model(task_of(precision, micro_batch_size))
    assert given == [expected]


def test_scaled_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.precision 16-mixed"):
        contrastive.ContrastiveTask.configure_model(task_of("16-mixed", None))


def task_of(precision: str, micro_batch_size: int | None) -> Any:
    """Return what `configure_model` reads of a task."""
    data = SimpleNamespace(micro_batch_size=micro_batch_size)
    strategy = ModelParallelStrategy()
    trainer = SimpleNamespace(strategy=strategy, precision=precision, world_size=1, datamodule=data)
    mesh = {"data_parallel": SimpleNamespace(size=lambda: 1)}
    return SimpleNamespace(trainer=trainer, auxiliary=[], device_mesh=mesh, model=None)
