"""Contrastive losses: functions of tensors and, in distributed training, a process group.

With `group`, each rank passes its own part of the batch. The value returned is the loss of the whole batch, on every
rank; the gradients are such that their mean over the ranks, which is what DDP computes, is the gradient of one process
over the whole batch. The collectives live here because the backward pass needs them.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup, absent from builds of torch without it


class _Gather(torch.autograd.Function):
    """(b, E) of each rank -> (W * b, E) in rank order; backward sums over ranks what each asks of every row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        out = grad.new_empty(len(grad) // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad, group=ctx.group)
        return out, None


def _gather(x: Tensor, group: Group | None) -> Tensor:
    return x if group is None else _Gather.apply(x, group)  # type: ignore[return-value]


def _whole(loss: Tensor, group: Group | None) -> Tensor:
    """The mean of the ranks' losses as value, this rank's own as gradient."""
    if group is None:
        return loss
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=group)
    return loss + (mean / dist.get_world_size(group) - loss.detach())


def _blocks(x: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time: without gradients no more than their scores are ever held."""
    return zip(x.split(1024), target.split(1024))


def _exact(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(image.dtype, torch.float32)
    return image.to(dtype), text.to(dtype)


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, *, group: Group | None = None
) -> Tensor:
    """Symmetric cross entropy over the similarities of a batch (CLIP, Radford et al. 2021, figure 3).

    Args:
        image, text: (B, E) embeddings of unit length, row i of one belonging to row i of the other.
        scale: 0-d or (1,), factor on the cosines.
        bias: without effect on a softmax; taken so that losses can be exchanged.
        group: process group over which the batch is split in equal parts.

    Returns:
        0-d loss, the mean over the B pairs and both directions, computed in fp32 or better whatever autocast says.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = _exact(image, text)
        start = 0 if group is None else dist.get_rank(group) * len(image)
        target = torch.arange(start, start + len(image), device=image.device)
        both = _gather(torch.cat([image, text], dim=1), group)  # one collective for both towers
        all_image, all_text = both.chunk(2, dim=1)  # (W*B, E)
        loss = image.new_zeros(())
        for queries, keys in ((image, all_text), (text, all_image)):
            for x, own in _blocks(queries, target):
                loss = loss + F.cross_entropy(scale * (x @ keys.T), own, reduction="sum")
        return _whole(loss / (2 * len(image)), group)


def siglip_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, *, group: Group | None = None
) -> Tensor:
    """Sigmoid loss over all pairs of a batch (SigLIP, Zhai et al. 2023, equation 1).

    Args:
        image, text: (B, E) embeddings of unit length, row i of one belonging to row i of the other.
        scale: 0-d or (1,), factor on the cosines.
        bias: 0-d or (1,), added to the scaled cosines; the model needs `logit_bias: true`.
        group: process group over which the batch is split in equal parts.

    Returns:
        0-d loss: the sum over all B x B pairs divided by B, computed in fp32 or better whatever autocast says.

    Raises:
        ValueError: there is no bias.
    """
    if bias is None:
        raise ValueError("siglip_loss needs a bias: set the model's logit_bias to true")
    with torch.autocast(image.device.type, enabled=False):
        image, text = _exact(image, text)
        start = 0 if group is None else dist.get_rank(group) * len(image)
        target = torch.arange(start, start + len(image), device=image.device)
        all_text = _gather(text, group)
        loss = image.new_zeros(())
        for x, own in _blocks(image, target):
            logits = scale * (x @ all_text.T) + bias  # (b, W*B)
            # +1 for pairs that belong together, -1 for the others.
            sign = torch.full_like(logits, -1.0).scatter_(1, own[:, None], 1.0)
            loss = loss - F.logsigmoid(sign * logits).sum()
        return _whole(loss / len(image), group)
