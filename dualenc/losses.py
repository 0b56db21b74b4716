"""Contrastive losses: functions of tensors and, in distributed training, of a process group.

The B x B matrix of scores is never held in memory. Scores are computed in blocks of rows. A softmax needs only sums
over the rows and columns of all scores. Where the gradient depends on these sums, the scores are computed a second
time, except for those of a small batch, which are kept.

With `group`, each rank passes its own part of the batch and computes the scores of its own images with all texts. Every
rank returns the loss of the whole batch. The mean of the gradients over the ranks, which DDP computes, is the gradient
of one process over the whole batch. The collectives are in this module because the backward pass needs them.

Everything is computed in fp32 or better, whatever autocast says, and without TF32 outside of compiled graphs: a score
is a cosine times up to 100.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualenc.utils.precision import full_fp32

Group = Any  # torch.distributed.ProcessGroup, absent from builds of torch without it
Duplicates = Literal["ignore", "mask", "positive"]

CPU_SCORES, GPU_SCORES = 1 << 21, 1 << 25  # largest number of scores in a block: 8 and 128 MiB in fp32
KEY_FACTOR = -7046029254386353131  # odd, 2^64 divided by the golden ratio: products of close numbers are far apart
SOFTPLUS_LINEAR = 40  # score from which softplus(x) is x to the last bit of float64; torch's 20 is wrong by 2e-9


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group | None = None,
    ids: Tensor | None = None,
    duplicates: Duplicates = "ignore",
    negatives: Tensor | None = None,
    negative_ids: Tensor | None = None,
) -> Tensor:
    """Compute the symmetric cross entropy over the similarities of a batch (CLIP, Radford et al. 2021, figure 3).

    The loss of an image is softplus(log-sum-exp of its scores with the other texts - score with its own text). Near
    zero this keeps the digits that log softmax loses. The loss of a text is computed the same way.

    With `duplicates="positive"` the target of an image is spread evenly over its positive texts. Its loss is then
    log-sum-exp of all scores - mean score of the positives (UniCL, Yang et al. 2022, equations 3 and 4; Khosla et al.
    2020, equation 2).

    With `negatives`, such as documents that are similar to the right one (hard negatives, Karpukhin et al. 2020), the
    loss of an image has their scores in the log-sum-exp. The loss of a text does not change.

    Args:
        image: (B, E) image embeddings of unit length.
        text: (B, E) text embeddings of unit length; row i belongs to image i.
        scale: 0-d or (1,), factor on the cosines.
        bias: ignored, since a softmax does not depend on it; accepted so that losses are interchangeable.
        group: process group over which the batch is split in equal parts.
        ids: (B, 2) int64 ids of images and texts, equal where images or texts are equal; for `duplicates`.
        duplicates: treatment of pairs that share an image or a text: each other's negatives like all others ("ignore"),
            left out of the negatives ("mask"), or positives ("positive").
        negatives: (M, E) embeddings of unit length of texts that belong to no image, which are negatives of all images
            of all ranks; M may differ between the ranks, and either all of them pass negatives or none.
        negative_ids: (M,) int64 ids, which equal those of equal texts in `ids`. Except with "ignore", a negative that
            equals a text of an image is left out of the image's negatives.

    Returns:
        0-d loss, the mean over the B pairs and both directions.

    Raises:
        ValueError: If `duplicates` is unknown, or needs `ids` or `negative_ids` and there are none.

    Example:
        >>> import torch
        >>> from dualenc import clip_loss
        >>> image = torch.eye(4)  # four images, each equal to its own text and orthogonal to the others
        >>> round(clip_loss(image, image, scale=torch.tensor(10.0)).item(), 4)
        0.0001
        >>> round(clip_loss(image, image.roll(1, 0), scale=torch.tensor(10.0)).item(), 4)
        10.0001
    """
    _check_duplicates(ids, duplicates)
    if negatives is not None and duplicates != "ignore" and negative_ids is None:
        raise ValueError(f"duplicates {duplicates!r} needs the ids of the negatives: pass negative_ids")
    image, text = _promote(image, text)
    if negatives is None:
        negative_ids = None
    else:
        negatives = negatives.to(image.dtype)
    return _Clip.apply(image, text, scale, bias, negatives, group, ids, duplicates, negative_ids)  # type: ignore[return-value]


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
    """Compute the sigmoid loss over all pairs of a batch (SigLIP, Zhai et al. 2023, equation 1).

    Args:
        image: (B, E) image embeddings of unit length.
        text: (B, E) text embeddings of unit length; row i belongs to image i.
        scale: 0-d or (1,), factor on the cosines.
        bias: 0-d or (1,), added to the scaled cosines; the model needs `logit_bias: true`.
        group: process group over which the batch is split in equal parts.
        ids: (B, 2) int64 ids of images and texts, equal where images or texts are equal; for `duplicates`.
        duplicates: treatment of the image of one pair and the text of another where the two pairs share an image or a
            text: a negative ("ignore"), left out of the sum ("mask"), or a positive ("positive").

    Returns:
        0-d loss: the sum over all B x B pairs divided by B.

    Raises:
        ValueError: If there is no bias, or if `duplicates` is unknown, or needs `ids` and there are none.

    Example:
        >>> import torch
        >>> from dualenc import siglip_loss
        >>> image, scale, bias = torch.eye(4), torch.tensor(10.0), torch.tensor(-5.0)
        >>> round(siglip_loss(image, image, scale, bias).item(), 4)
        0.0269
        >>> round(siglip_loss(image, image.roll(1, 0), scale, bias).item(), 4)
        10.0269
    """
    if bias is None:
        raise ValueError("siglip_loss needs a bias: set the model's logit_bias to true")
    _check_duplicates(ids, duplicates)
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in (image, text, scale, bias))
    return _Siglip.apply(*_promote(image, text), scale, bias, group, ids, duplicates, differentiate)  # type: ignore[return-value]


def _check_duplicates(ids: Tensor | None, duplicates: str) -> None:
    if duplicates not in ("ignore", "mask", "positive"):
        raise ValueError(f"duplicates {duplicates!r} is not one of ignore, mask, positive")
    if duplicates != "ignore" and ids is None:
        raise ValueError(f"duplicates {duplicates!r} needs the ids of images and texts")


def _promote(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both to their common dtype, fp32 at least."""
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    return image.to(dtype), text.to(dtype)


class _GlobalBatch(NamedTuple):
    """The texts of all ranks, and the part of them that belongs to this rank."""

    texts: Tensor  # (B + M, E), the texts of the images, followed by the negatives
    size: int  # B
    ids: Tensor | None  # (B, 2), unless duplicates are ignored
    negative_ids: Tensor | None  # (M,), unless duplicates are ignored or there are no negatives
    local: slice  # this rank's rows
    world_size: int
    counts: Sequence[int]  # number of negatives of each rank; empty for one rank


def _gather_batch(
    text: Tensor,
    ids: Tensor | None,
    duplicates: Duplicates,
    group: Group | None,
    negatives: Tensor | None = None,
    negative_ids: Tensor | None = None,
) -> _GlobalBatch:
    """Gather the texts and negatives of all ranks, and their ids unless duplicates are ignored."""
    if duplicates == "ignore":
        ids = negative_ids = None
    start, world, counts = 0, 1, []
    local_size = len(text)
    if group is not None:
        start, world = dist.get_rank(group) * local_size, dist.get_world_size(group)
        text, ids = _all_gather(text, group), None if ids is None else _all_gather(ids, group)
        if negatives is not None:
            counts = _all_gather(torch.tensor([len(negatives)], device=text.device), group).tolist()
            negatives = _all_gather_parts(negatives, counts, group)
            negative_ids = None if negative_ids is None else _all_gather_parts(negative_ids, counts, group)
    texts = text if negatives is None else torch.cat([text, negatives])
    return _GlobalBatch(texts, len(text), ids, negative_ids, slice(start, start + local_size), world, counts)


def _all_gather(x: Tensor, group: Group) -> Tensor:
    """Gather the (b, ...) of all ranks as (W * b, ...), in rank order."""
    out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _all_gather_parts(x: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Gather the (m, ...) of all ranks, of which each has its own number of `counts`, in rank order."""
    most = max(1, *counts)
    padded = x.new_zeros(most, *x.shape[1:])
    padded[: len(x)] = x
    parts = _all_gather(padded, group).split(most)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _all_reduce(x: Tensor, group: Group | None, op: Any = None) -> Tensor:
    """Sum a tensor over the ranks in place, or reduce it by another operation of `torch.distributed.ReduceOp`."""
    if group is not None:
        dist.all_reduce(x, op or dist.ReduceOp.SUM, group=group)
    return x


class _Block(NamedTuple):
    """The scores of r of this rank's images with all B texts and M negatives."""

    rows: slice  # of the images among this rank's images
    columns: slice  # of their own texts among all texts
    image: Tensor  # (r, E)
    scores: Tensor  # (r, B + M), scaled cosines; -inf for negatives that equal a text of the image
    buffer: Tensor  # (r, B + M), memory for intermediate results
    shared: Tensor | None  # (r, B), true at (i, j) where pairs i and j differ but share an image or a text

    def own(self, x: Tensor) -> Tensor:
        """Return a view (r,) of the entries of an (r, B + M) tensor that belong to the images' own texts."""
        return x[:, self.columns].diagonal()


def _blocks(image: Tensor, batch: _GlobalBatch, scale: Tensor, kept: Tensor | None = None) -> Iterator[_Block]:
    """Yield all scores of this rank's images, a block of rows at a time; each block overwrites the one before.

    Args:
        image: (b, E) embeddings of this rank.
        batch: the batch of all ranks.
        scale: factor on the cosines.
        kept: (b, B + M) scores of an earlier call, which had one block: they are yielded again.
    """
    count = max(1, (GPU_SCORES if image.is_cuda else CPU_SCORES) // len(batch.texts))
    shape = min(count, len(image)), len(batch.texts)
    memory, scratch = image.new_empty(shape) if kept is None else kept, image.new_empty(shape)
    ids = None if batch.ids is None else batch.ids[batch.local]
    known = None  # keys of the pairs, sorted, to be compared with those of the negatives
    if kept is None and batch.ids is not None and batch.negative_ids is not None:
        known = _keys(*batch.ids.unbind(1)).sort().values
    for first in range(0, len(image), count):
        part = image[first : first + count]
        rows = slice(first, first + len(part))
        columns = slice(batch.local.start + first, batch.local.start + rows.stop)
        scores, buffer = memory[: len(part)], scratch[: len(part)]
        if kept is None:
            torch.mm(part * scale.to(part.dtype), batch.texts.T, out=scores)
        shared = None
        if ids is not None and batch.ids is not None:
            shared = (ids[rows, :1] == batch.ids[:, 0]) | (ids[rows, 1:] == batch.ids[:, 1])
            shared[:, columns].diagonal().fill_(False)
            if known is not None and batch.negative_ids is not None:
                keys = _keys(ids[rows, :1], batch.negative_ids)
                positive = known[torch.searchsorted(known, keys).clamp(max=len(known) - 1)] == keys
                scores[:, batch.size :].masked_fill_(positive, -math.inf)
        yield _Block(rows, columns, part, scores, buffer, shared)


def _keys(image: Tensor, text: Tensor) -> Tensor:
    """Combine the ids of images and texts into one number for each pair, which other pairs do not share."""
    return image * KEY_FACTOR + text


class _SoftmaxTerms(NamedTuple):
    """The terms of the softmax loss of each row or column of scores, (N,) float64 each."""

    others: Tensor  # log-sum-exp of all scores except that of the pair itself
    own: Tensor  # score of the pair itself
    other_positives: Tensor  # sum of the scores of its positives other than the pair itself
    positives: Tensor  # number of its positives, the pair itself included

    def losses(self) -> Tensor:
        """Compute the losses: log-sum-exp of all scores minus the mean over the positives."""
        excess = self.own - (self.own + self.other_positives) / self.positives
        return F.softplus(self.others - self.own, threshold=SOFTPLUS_LINEAR) + excess

    def log_sum_exp(self) -> Tensor:
        """Compute the log-sum-exp of all scores."""
        return torch.logaddexp(self.others, self.own)

    def own_grad(self, rounded: Tensor) -> Tensor:
        """Compute the derivative by the score of the pair itself: softmax minus target, without cancellation.

        Args:
            rounded: `log_sum_exp` in the precision of the scores, from which the caller computes the softmax of all
                other scores. The rounding multiplies that softmax by a factor. The same factor is applied here, so that
                the derivatives of a row still sum to 0.
        """
        factor = (self.log_sum_exp() - rounded.double()).exp()
        return (1 - 1 / self.positives) - torch.sigmoid(self.others - self.own) * factor


def _log_sum_exp(scores: Tensor, dim: int, buffer: Tensor) -> Tensor:
    """Compute the log-sum-exp over a dimension, in float64; -inf where all scores are -inf."""
    largest = scores.amax(dim, keepdim=True)
    largest = torch.where(largest == -math.inf, 0.0, largest)  # -inf - -inf would be NaN.
    sums = torch.sub(scores, largest, out=buffer).exp_().sum(dim)
    return sums.double().log() + largest.squeeze(dim).double()


def _softmax_terms(
    image: Tensor, text: Tensor, batch: _GlobalBatch, scale: Tensor, duplicates: Duplicates, group: Group | None
) -> tuple[_SoftmaxTerms, _SoftmaxTerms, Tensor | None]:
    """Compute the terms of this rank's rows, and of all columns.

    Returns:
        Both, and the scores (b, B + M) if they are one block: -inf for the pairs themselves and where a term leaves
        them out.
    """
    # In float64, because a score near 100 has only five digits after the decimal point in single precision. The split
    # keeps the float64 copies of the embeddings small.
    own = torch.cat([(a.double() * b.double()).sum(1) for a, b in zip(image.split(4096), text.split(4096))])
    own = own * scale.double()
    rows = _SoftmaxTerms(torch.empty_like(own), own, torch.zeros_like(own), torch.ones_like(own))
    zeros = own.new_zeros(batch.size)
    others, other_positives, positives = zeros.log(), zeros.clone(), zeros + 1  # of the columns
    kept = None
    for block in _blocks(image, batch, scale):
        kept = block.scores if len(block.image) == len(image) else None
        scores, buffer = block.scores[:, : batch.size], block.buffer[:, : batch.size]  # without the negatives
        if block.shared is not None and duplicates == "positive":
            chosen = torch.where(block.shared, scores, 0.0)
            for sums, number, dim in (
                (rows.other_positives[block.rows], rows.positives[block.rows], 1),
                (other_positives, positives, 0),
            ):
                sums += chosen.sum(dim, dtype=torch.float64)
                number += block.shared.sum(dim)
        elif block.shared is not None:
            scores.masked_fill_(block.shared, -math.inf)
        block.own(scores).fill_(-math.inf)
        rows.others[block.rows] = _log_sum_exp(block.scores, 1, block.buffer)
        others = torch.logaddexp(others, _log_sum_exp(scores, 0, buffer))
    if group is None:
        return rows, _SoftmaxTerms(others, own, other_positives, positives), kept
    local = zeros.clone()
    local[batch.local] = own
    largest = _all_reduce(others.clone(), group, dist.ReduceOp.MAX)
    largest = torch.where(largest == -math.inf, 0.0, largest)  # -inf - -inf would be NaN.
    # The pair itself is taken off, because the sum over the ranks would count it once a rank.
    sums = torch.stack([local, other_positives, positives - 1, (others - largest).exp_()])
    own, other_positives, positives, sums_of_others = _all_reduce(sums, group)
    others = sums_of_others.log() + largest
    return rows, _SoftmaxTerms(others, own, other_positives, positives + 1), kept


class _Clip(torch.autograd.Function):
    """See `clip_loss`. Four products of B x (B + M) x E: scores, scores again in the backward pass, two gradients.

    Scores that are one block are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        negatives: Tensor | None,
        group: Group | None,
        ids: Tensor | None,
        duplicates: Duplicates,
        negative_ids: Tensor | None,
    ) -> Tensor:
        with full_fp32(image.device):
            batch = _gather_batch(text, ids, duplicates, group, negatives, negative_ids)
            rows, columns, kept = _softmax_terms(image, text, batch, scale, duplicates, group)
            loss = rows.losses().sum() + columns.losses()[batch.local].sum()
            loss = _all_reduce(loss / (2 * batch.size), group)
        ctx.save_for_backward(image, scale, bias, kept, batch.texts, batch.ids, batch.negative_ids, *rows, *columns)
        ctx.group, ctx.duplicates, ctx.size, ctx.has_negatives = group, duplicates, batch.size, negatives is not None
        ctx.split = batch.local, batch.world_size, batch.counts
        return loss.to(image.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image, scale, bias, kept, texts, ids, negative_ids, *terms = ctx.saved_tensors
        batch = _GlobalBatch(texts, ctx.size, ids, negative_ids, *ctx.split)
        rows, columns = _SoftmaxTerms(*terms[:4]), _SoftmaxTerms(*terms[4:])
        with full_fp32(image.device):
            grad_image, grad_text = torch.empty_like(image), torch.zeros_like(texts)
            row_lse, column_lse = rows.log_sum_exp().to(image.dtype), columns.log_sum_exp().to(image.dtype)
            grad_own = (rows.own_grad(row_lse) + columns.own_grad(column_lse)[batch.local]).to(image.dtype)
            row_target = (1 / rows.positives).to(image.dtype)[:, None]
            column_target = (1 / columns.positives).to(image.dtype)
            for block in _blocks(image, batch, scale, kept):
                scores = block.scores[:, : batch.size]  # without the negatives
                if kept is None and block.shared is not None and ctx.duplicates == "mask":
                    scores.masked_fill_(block.shared, -math.inf)
                grad = torch.sub(block.scores, row_lse[block.rows, None], out=block.buffer).exp_()
                of_texts = grad[:, : batch.size]
                # Another backward pass may need the scores that were kept.
                of_texts += torch.sub(scores, column_lse, out=scores if kept is None else None).exp_()
                if block.shared is not None and ctx.duplicates == "positive":
                    of_texts -= (row_target[block.rows] + column_target) * block.shared
                block.own(grad).copy_(grad_own[block.rows])
                torch.mm(grad, texts, out=grad_image[block.rows])
                grad_text.addmm_(grad.T, block.image)
            weight = grads[0].double() / (2 * batch.size)
            found = _input_grads(image, scale, grad_image, grad_text[: batch.size], weight, batch, ctx.group)
            of_negatives = None
            if ctx.has_negatives:
                of_negatives = _negative_grads(scale, grad_text[batch.size :], weight, batch, ctx.group)
        # The loss does not depend on the bias.
        return *found, None if bias is None else torch.zeros_like(bias), of_negatives, *[None] * 4


class _Siglip(torch.autograd.Function):
    """See `siglip_loss`. Three products of B x B x E: the forward pass computes the gradients from the same scores."""

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
        with full_fp32(image.device):
            batch = _gather_batch(text, ids, duplicates, group)
            grad_image, grad_text = (torch.zeros_like(x) if differentiate else x for x in (image, batch.texts))
            loss = grad_bias = image.new_zeros((), dtype=torch.float64)
            for block in _blocks(image, batch, scale):
                # A positive costs softplus(-score), a negative softplus(score).
                scores = block.scores.add_(bias)
                block.own(scores).neg_()
                if block.shared is not None and duplicates == "mask":
                    scores.masked_fill_(block.shared, -math.inf)
                elif block.shared is not None:
                    torch.where(block.shared, -scores, scores, out=scores)
                loss = loss + F.softplus(scores, threshold=SOFTPLUS_LINEAR).sum(1).sum(dtype=torch.float64)
                if differentiate:
                    grad = scores.sigmoid_()
                    block.own(grad).neg_()
                    if block.shared is not None and duplicates == "positive":
                        torch.where(block.shared, -grad, grad, out=grad)
                    torch.mm(grad, batch.texts, out=grad_image[block.rows])
                    grad_text.addmm_(grad.T, block.image)
                    grad_bias = grad_bias + grad.sum(1).sum(dtype=torch.float64)
            weight = torch.full_like(loss, 1 / batch.size)
            loss = _all_reduce(loss * weight, group)
            if differentiate:
                found = _input_grads(image, scale, grad_image, grad_text, weight, batch, group)
                grad_bias = (grad_bias * weight * batch.world_size).to(bias.dtype).reshape(bias.shape)
                ctx.save_for_backward(*found, grad_bias)
        return loss.to(image.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(grads[0].to(x.dtype) * x for x in ctx.saved_tensors), *[None] * 4


def _input_grads(
    image: Tensor,
    scale: Tensor,
    grad_image: Tensor,
    grad_text: Tensor,
    weight: Tensor,
    batch: _GlobalBatch,
    group: Group | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of image (b, E), text (b, E) and scale.

    Args:
        image: (b, E) embeddings of this rank.
        scale: factor on the cosines.
        grad_image: (b, E), gradient by this rank's scores (b, B) times the texts; overwritten.
        grad_text: (B, E), the same gradient transposed times this rank's images; overwritten.
        weight: 0-d factor on all gradients.
        batch: the batch of all ranks.
        group: process group over which `grad_text` is summed.
    """
    weight = weight * batch.world_size  # DDP averages the gradients over the ranks, which divides by their number.
    grad_scale = (image * grad_image).sum(1).sum(dtype=torch.float64) * weight
    factor = (scale.double() * weight).to(image.dtype)
    if group is not None:
        local = image.new_empty(image.shape)
        dist.reduce_scatter_tensor(local, grad_text, group=group)
        grad_text = local
    return grad_image.mul_(factor), grad_text.mul_(factor), grad_scale.to(scale.dtype).reshape(scale.shape)


def _negative_grads(scale: Tensor, grad: Tensor, weight: Tensor, batch: _GlobalBatch, group: Group | None) -> Tensor:
    """Return the gradient (m, E) of this rank's negatives.

    Args:
        scale: factor on the cosines.
        grad: (M, E), gradient by this rank's scores with all negatives times this rank's images; overwritten.
        weight: see `_input_grads`.
        batch: the batch of all ranks.
        group: process group over which `grad` is summed.
    """
    grad = grad.mul_((scale.double() * weight * batch.world_size).to(grad.dtype))
    if group is None:
        return grad
    return _all_reduce(grad, group).split(list(batch.counts))[dist.get_rank(group)]
