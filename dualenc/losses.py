"""Contrastive losses: functions of tensors and, in distributed training, a process group.

No matrix of all pairs is ever held. Scores are computed some rows at a time; what a softmax needs of all of them are
sums over rows and columns, and where the gradient depends on these, the scores are computed a second time.

With `group`, each rank passes its own part of the batch, and computes the scores of its own images with all texts. The
value returned is the loss of the whole batch, on every rank; the gradients are such that their mean over the ranks,
which is what DDP computes, is the gradient of one process over the whole batch. The collectives live here because the
backward pass needs them.

Everything is computed in fp32 or better, whatever autocast says and, but in compiled graphs, TF32: a score is a cosine
times up to 100.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = Any  # torch.distributed.ProcessGroup, absent from builds of torch without it
Duplicates = Literal["ignore", "mask", "positive"]

CPU_SCORES, GPU_SCORES = 1 << 21, 1 << 25  # that are held at a time


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group | None = None,
    ids: Tensor | None = None,
    duplicates: Duplicates = "ignore",
) -> Tensor:
    """Symmetric cross entropy over the similarities of a batch (CLIP, Radford et al. 2021, figure 3).

    The loss of an image is softplus(log sum exp of the other texts' scores - score of its own), which near zero has the
    digits that log softmax has lost; that of a text likewise.

    With `duplicates="positive"` the target of an image is spread evenly over its texts: its loss is log(sum exp of all
    scores) - mean of its own (UniCL, Yang et al. 2022, equations 3 and 4; Khosla et al. 2020, equation 2).

    Args:
        image, text: (B, E) embeddings of unit length, row i of one belonging to row i of the other.
        scale: 0-d or (1,), factor on the cosines.
        bias: without effect on a softmax; taken so that losses can be exchanged.
        group: process group over which the batch is split in equal parts.
        ids: (B, 2) int64, equal where images or texts are equal; for `duplicates`.
        duplicates: pairs that share an image or a text are each other's negatives like any ("ignore"), are left out of
            the negatives ("mask"), or are positives ("positive").

    Returns:
        0-d loss, the mean over the B pairs and both directions.

    Raises:
        ValueError: `duplicates` is unknown, or needs `ids`.
    """
    _check(ids, duplicates)
    return _Clip.apply(*_wide(image, text), scale, bias, group, ids, duplicates)  # type: ignore[return-value]


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group | None = None,
    ids: Tensor | None = None,
    duplicates: Duplicates = "ignore",
) -> Tensor:
    """Sigmoid loss over all pairs of a batch (SigLIP, Zhai et al. 2023, equation 1).

    Args:
        image, text: (B, E) embeddings of unit length, row i of one belonging to row i of the other.
        scale: 0-d or (1,), factor on the cosines.
        bias: 0-d or (1,), added to the scaled cosines; the model needs `logit_bias: true`.
        group: process group over which the batch is split in equal parts.
        ids: (B, 2) int64, equal where images or texts are equal; for `duplicates`.
        duplicates: an image and a text of two pairs that share an image or a text do not belong together ("ignore"),
            are left out of the sum ("mask"), or belong together ("positive").

    Returns:
        0-d loss: the sum over all B x B pairs divided by B.

    Raises:
        ValueError: there is no bias; `duplicates` is unknown, or needs `ids`.
    """
    if bias is None:
        raise ValueError("siglip_loss needs a bias: set the model's logit_bias to true")
    _check(ids, duplicates)
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (image, text, scale, bias))
    return _Siglip.apply(*_wide(image, text), scale, bias, group, ids, duplicates, differentiate)  # type: ignore[return-value]


def _check(ids: Tensor | None, duplicates: str) -> None:
    if duplicates not in ("ignore", "mask", "positive"):
        raise ValueError(f"duplicates {duplicates!r} is none of ignore, mask, positive")
    if duplicates != "ignore" and ids is None:
        raise ValueError(f"duplicates {duplicates!r} needs the ids of images and texts")


def _wide(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    return image.to(dtype), text.to(dtype)


@contextmanager
def _exactly(x: Tensor) -> Iterator[None]:
    """No half precision and, but in a compiled graph, no TF32, whatever the caller has chosen for the towers."""
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():  # which takes TF32 or not for all of a graph
            yield
            return
        places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, precision in zip(places, before):
                place.fp32_precision = precision


class _Batch(NamedTuple):
    """The batch of all ranks, as one of them sees it."""

    text: Tensor  # (B, E)
    ids: Tensor | None  # (B, 2), where they matter
    own: slice  # this rank's rows
    world: int


def _batch(text: Tensor, ids: Tensor | None, duplicates: Duplicates, group: Group | None) -> _Batch:
    ids = None if duplicates == "ignore" else ids
    if group is None:
        return _Batch(text, ids, slice(0, len(text)), 1)
    start = dist.get_rank(group) * len(text)
    everyone = None if ids is None else _gather(ids, group)
    return _Batch(_gather(text, group), everyone, slice(start, start + len(text)), dist.get_world_size(group))


def _gather(x: Tensor, group: Group) -> Tensor:
    """(b, ...) of each rank -> (W * b, ...) in rank order."""
    out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _sum(x: Tensor, group: Group | None) -> Tensor:
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


class _Block(NamedTuple):
    """The scores of some of this rank's images with all texts."""

    rows: slice  # among this rank's images
    columns: slice  # of the texts that belong to them
    image: Tensor  # (r, E)
    scores: Tensor  # (r, B), scaled cosines
    buffer: Tensor  # (r, B), for what is made of them
    same: Tensor | None  # (r, B), true for two pairs that share an image or a text

    def own(self, x: Tensor) -> Tensor:
        """A view (r,) of what an (r, B) has for images and their own texts."""
        return x[:, self.columns].diagonal()


def _blocks(image: Tensor, whole: _Batch, scale: Tensor) -> Iterator[_Block]:
    """All scores of this rank's images, some rows at a time; each block overwrites the one before it."""
    count = max(1, (GPU_SCORES if image.is_cuda else CPU_SCORES) // len(whole.text))
    held = image.new_empty(2, min(count, len(image)), len(whole.text))
    ids = None if whole.ids is None else whole.ids[whole.own]
    for first in range(0, len(image), count):
        part = image[first : first + count]
        rows = slice(first, first + len(part))
        columns = slice(whole.own.start + first, whole.own.start + rows.stop)
        scores, buffer = held[:, : len(part)]
        torch.mm(part * scale.to(part.dtype), whole.text.T, out=scores)
        same = None
        if ids is not None and whole.ids is not None:
            same = (ids[rows, :1] == whole.ids[:, 0]) | (ids[rows, 1:] == whole.ids[:, 1])
            same[:, columns].diagonal().fill_(False)
        yield _Block(rows, columns, part, scores, buffer, same)


class _Sums(NamedTuple):
    """What is known of each row or column of scores, (N,) in float64."""

    others: Tensor  # log sum exp of all scores but the one of the pair itself
    own: Tensor  # that score
    rest: Tensor  # sum of the other scores that belong to it
    number: Tensor  # of scores that belong to it

    def losses(self) -> Tensor:
        """log sum exp of all, minus the mean of those that belong to it."""
        excess = self.own - (self.own + self.rest) / self.number
        return F.softplus(self.others - self.own, threshold=40) + excess

    def log_sum_exp(self) -> Tensor:
        """log sum exp of all."""
        return torch.logaddexp(self.others, self.own)

    def slope(self, rounded: Tensor) -> Tensor:
        """Derivative of the loss by the score of the pair itself: softmax minus target, with all its digits.

        Args:
            rounded: what `log_sum_exp` has become in the precision of the scores. The softmax of all others is off by a
                factor for that, and with the same factor here their sum stays 0, in which large terms cancel.
        """
        factor = (self.log_sum_exp() - rounded.double()).exp()
        return (1 - 1 / self.number) - torch.sigmoid(self.others - self.own) * factor


def _log_sum_exp(scores: Tensor, dim: int, buffer: Tensor) -> Tensor:
    """In float64; minus infinity for nothing at all."""
    most = scores.amax(dim, keepdim=True)
    most = torch.where(most == -math.inf, 0.0, most)
    sums = torch.sub(scores, most, out=buffer).exp_().sum(dim)
    return sums.double().log() + most.squeeze(dim).double()


def _statistics(
    image: Tensor, text: Tensor, whole: _Batch, scale: Tensor, duplicates: Duplicates, group: Group | None
) -> tuple[_Sums, _Sums]:
    """Of this rank's rows, and of all columns."""
    # In float64, because a score near 100 has five digits after the point in single precision.
    own = torch.cat([(a.double() * b.double()).sum(1) for a, b in zip(image.split(4096), text.split(4096))])
    own = own * scale.double()
    rows = _Sums(torch.empty_like(own), own, torch.zeros_like(own), torch.ones_like(own))
    nothing = own.new_zeros(len(whole.text))
    others, rest, count = nothing.log(), nothing.clone(), nothing + 1
    for block in _blocks(image, whole, scale):
        if block.same is not None and duplicates == "positive":
            belong = torch.where(block.same, block.scores, 0.0)
            for sums, number, dim in ((rows.rest[block.rows], rows.number[block.rows], 1), (rest, count, 0)):
                sums += belong.sum(dim, dtype=torch.float64)
                number += block.same.sum(dim)
        elif block.same is not None:
            block.scores.masked_fill_(block.same, -math.inf)
        block.own(block.scores).fill_(-math.inf)
        rows.others[block.rows] = _log_sum_exp(block.scores, 1, block.buffer)
        others = torch.logaddexp(others, _log_sum_exp(block.scores, 0, block.buffer))
    if group is None:
        return rows, _Sums(others, own, rest, count)
    at_home = nothing.clone()
    at_home[whole.own] = own
    own, rest, count = _sum(torch.stack([at_home, rest, count - 1]), group)
    return rows, _Sums(_gather(others[None], group).logsumexp(0), own, rest, count + 1)  # of (W, B)


class _Clip(torch.autograd.Function):
    """See `clip_loss`. Four products of B x B x E: scores, scores again in the backward pass, and two gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        group: Group | None,
        ids: Tensor | None,
        duplicates: Duplicates,
    ) -> Tensor:
        with _exactly(image):
            whole = _batch(text, ids, duplicates, group)
            rows, columns = _statistics(image, text, whole, scale, duplicates, group)
            loss = rows.losses().sum() + columns.losses()[whole.own].sum()
            loss = _sum(loss / (2 * len(whole.text)), group)
        ctx.save_for_backward(image, whole.text, whole.ids, scale, bias, *rows, *columns)
        ctx.group, ctx.duplicates, ctx.own, ctx.world = group, duplicates, whole.own, whole.world
        return loss.to(image.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image, text, ids, scale, bias, *sums = ctx.saved_tensors
        whole, rows, columns = _Batch(text, ids, ctx.own, ctx.world), _Sums(*sums[:4]), _Sums(*sums[4:])
        with _exactly(image):
            for_image, for_text = torch.empty_like(image), torch.zeros_like(text)
            by_row, by_column = rows.log_sum_exp().to(image.dtype), columns.log_sum_exp().to(image.dtype)
            slope = (rows.slope(by_row) + columns.slope(by_column)[whole.own]).to(image.dtype)
            of_row, of_column = (1 / rows.number).to(image.dtype)[:, None], (1 / columns.number).to(image.dtype)
            for block in _blocks(image, whole, scale):
                if block.same is not None and ctx.duplicates == "mask":
                    block.scores.masked_fill_(block.same, -math.inf)
                change = torch.sub(block.scores, by_row[block.rows, None], out=block.buffer).exp_()
                change += block.scores.sub_(by_column).exp_()
                if block.same is not None and ctx.duplicates == "positive":
                    change -= (of_row[block.rows] + of_column) * block.same
                block.own(change).copy_(slope[block.rows])
                torch.mm(change, text, out=for_image[block.rows])
                for_text.addmm_(change.T, block.image)
            weight = grads[0].double() / (2 * len(text))
            found = _gradients(image, scale, for_image, for_text, weight, whole, ctx.group)
        return *found, None if bias is None else torch.zeros_like(bias), *[None] * 3  # a softmax sees no bias


class _Siglip(torch.autograd.Function):
    """See `siglip_loss`. Three products of B x B x E: what the gradient needs of a score is known as soon as it is."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        group: Group | None,
        ids: Tensor | None,
        duplicates: Duplicates,
        differentiate: bool,
    ) -> Tensor:
        with _exactly(image):
            whole = _batch(text, ids, duplicates, group)
            for_image, for_text = (torch.zeros_like(x) if differentiate else x for x in (image, whole.text))
            loss = of_bias = image.new_zeros((), dtype=torch.float64)
            for block in _blocks(image, whole, scale):
                # Of a pair that belongs together softplus(-score), of another softplus(score).
                scores = block.scores.add_(bias)
                block.own(scores).neg_()
                if block.same is not None and duplicates == "mask":
                    scores.masked_fill_(block.same, -math.inf)
                elif block.same is not None:
                    torch.where(block.same, -scores, scores, out=scores)
                loss = loss + F.softplus(scores, threshold=40).sum(1).sum(dtype=torch.float64)
                if differentiate:
                    change = scores.sigmoid_()
                    block.own(change).neg_()
                    if block.same is not None and duplicates == "positive":
                        torch.where(block.same, -change, change, out=change)
                    torch.mm(change, whole.text, out=for_image[block.rows])
                    for_text.addmm_(change.T, block.image)
                    of_bias = of_bias + change.sum(1).sum(dtype=torch.float64)
            weight = torch.full_like(loss, 1 / len(whole.text))
            loss = _sum(loss * weight, group)
            if differentiate:
                found = _gradients(image, scale, for_image, for_text, weight, whole, group)
                of_bias = (of_bias * weight * whole.world).to(bias.dtype).reshape(bias.shape)
                ctx.save_for_backward(*found, of_bias)
        return loss.to(image.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(grads[0].to(x.dtype) * x for x in ctx.saved_tensors), *[None] * 4


def _gradients(
    image: Tensor,
    scale: Tensor,
    for_image: Tensor,
    for_text: Tensor,
    weight: Tensor,
    whole: _Batch,
    group: Group | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of image (b, E), text (b, E) and scale.

    Args:
        image: (b, E).
        scale: factor on the cosines.
        for_image: (b, E), derivatives by this rank's scores times the texts.
        for_text: (B, E), the same transposed, times this rank's images.
        weight: 0-d, factor on all of them.
        whole: the batch.
        group: of the ranks, whose shares of `for_text` are summed up.
    """
    weight = weight * whole.world  # what averages over the ranks divides by their number
    of_scale = (image * for_image).sum(1).sum(dtype=torch.float64) * weight
    factor = (scale.double() * weight).to(image.dtype)
    if group is not None:
        mine = image.new_empty(image.shape)
        dist.reduce_scatter_tensor(mine, for_text, group=group)
        for_text = mine
    return for_image.mul_(factor), for_text.mul_(factor), of_scale.to(scale.dtype).reshape(scale.shape)
