"""Distribution of a dual encoder's weights over the ranks by FSDP2 (Zhao et al. 2023)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dualenc.models import DualEncoder


def shard(model: DualEncoder, mesh: DeviceMesh, half: torch.dtype | None) -> None:
    """Distribute the weights of a dual encoder over the ranks, in place, block by block.

    Each block is gathered before it runs, while the block before it still computes. Each part whose forward is called
    alone, as in evaluation, is sharded by itself.

    Args:
        model: model, on the device of the mesh or on the CPU.
        mesh: the ranks.
        half: dtype in which autocast multiplies, in which the matrices of the blocks are gathered; None to gather all
            weights in their own. Gradients are reduced in the dtype of the weights.
    """
    towers = ((model.image, model.image.vit.blocks), (model.text, model.text.blocks))
    # Evaluation has no backward pass that would shard the weights again, so the forward pass does.
    for _, blocks in towers:
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=_matrices_in(half))
    for part in (model.image, model.text, model.image_projection, model.text_projection, model.logits):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    root = fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for _, blocks in towers:
        for block, following in pairwise(cast("Iterable[FSDPModule]", blocks)):
            block.set_modules_to_forward_prefetch([following])
    # Otherwise the first module that runs becomes the root, which is a tower where that is locked or evaluated first.
    root._get_fsdp_state()._lazy_init()


def _matrices_in(half: torch.dtype | None) -> MixedPrecisionPolicy:
    """Return the policy that gathers matrices in half precision, as autocast would round them for each product.

    Vectors stay unchanged: the residual stream and the LayerNorms, with their gains near 1, are not rounded either.
    """
    # Versions of torch before 2.15 round all weights of a block or none.
    if half is None or "param_dtype_override_fn" not in {field.name for field in fields(MixedPrecisionPolicy)}:
        return MixedPrecisionPolicy()

    def dtype_of(weight: Tensor) -> torch.dtype | None:
        return None if weight.dim() > 1 else weight.dtype

    return MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False, param_dtype_override_fn=dtype_of)


@contextmanager
def whole_weights(task: Any) -> Iterator[None]:
    """Put a copy of the model with whole weights in place of a sharded one inside the block.

    The weights are gathered once, because ranks may embed different numbers of batches, and in their own dtype, in
    which evaluation multiplies.

    Args:
        task: task with a `model`, changed inside the block; nothing is done if its weights are not sharded.
    """
    sharded = task.model
    if not isinstance(sharded, FSDPModule):
        yield
        return
    devices = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(task.device):  # Random weights come first.
        task.model = DualEncoder.from_config(cast(DualEncoder, sharded).config).eval()
    own = task.model.state_dict()
    for name, x in cast(nn.Module, sharded).state_dict().items():
        own[name].copy_(x.full_tensor() if isinstance(x, DTensor) else x)
    try:
        yield
    finally:
        task.model = sharded
