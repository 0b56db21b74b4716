"""Ranks of the right answers, and the retrieval metrics made from them.

A rank is decided by comparing scores, so it must not depend on how a matrix product was cut into blocks. The blockwise
fp32 product decides every comparison that its rounding error cannot turn; the few scores closer to the positive's than
that error are computed again in float64. A tie, which is a difference below 1e-12, counts against the query.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dualenc.evaluation.bootstrap import bootstrap_mean

TIE = 1e-12  # in units of the score; float64 rounding of a product of unit vectors is below 1e-13


class Scores(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # 95% bootstrap, of the metrics that have one
    chance: dict[str, float]  # expected of an order drawn at random
    ranks: dict[str, Tensor]  # 0-based rank of the right answer, by what was asked: "text", "image"


class Answer(NamedTuple):
    """One query with what came first."""

    query: int
    rank: int  # of the best positive, 0-based
    best: list[int]  # candidates, the highest score first
    scores: list[float]  # of these
    right: list[int]  # the positives, the highest score first


def match_ranks(queries: Tensor, candidates: Tensor, positives: Tensor, *, chunk: int = 4096) -> Tensor:
    """Rank of each query's best positive among all candidates, 0-based.

    Args:
        queries: (Q, E).
        candidates: (C, E).
        positives: (Q,) index of the one positive, or (Q, P) indices padded with -1.
        chunk: rows of a block of the product, both ways.

    Returns:
        (Q,) int64: how many candidates that are no positive score higher than the best positive, or the same.

    Raises:
        ValueError: a query has no positive, or an index is out of range.
    """
    return _ranks(queries, candidates, positives, None, chunk)[0]


def retrieval_ranks(image: Tensor, text: Tensor, image_of_text: Tensor, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Ranks in both directions from one product.

    Args:
        image: (I, E).
        text: (T, E).
        image_of_text: (T,) the image that each text belongs to; every image needs a text.

    Returns:
        (T,) rank of its image for each text, and (I,) rank of its best text for each image; 0-based.
    """
    counts = torch.bincount(image_of_text, minlength=len(image))
    if len(counts) > len(image) or not bool((counts > 0).all()):
        raise ValueError(f"image_of_text must name every image from 0 to {len(image) - 1} at least once")
    order = torch.argsort(image_of_text, stable=True)
    texts_of_image = pad_sequence(list(order.split(counts.tolist())), batch_first=True, padding_value=-1)  # (I, P)
    by_text, by_image = _ranks(text, image, image_of_text, texts_of_image, chunk)
    assert by_image is not None
    return by_text, by_image


def recall_at(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Tensor]:
    """Share of queries with a positive among the first K: `{"recall@1": ..., ...}`, 0-d float64 each."""
    return {f"recall@{k}": (ranks < k).double().mean() for k in ks}


def retrieval_metrics(
    image: Tensor, text: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10), *, replicates: int = 1000
) -> Scores:
    """Metrics of a retrieval set by the names of CLIP_benchmark, with 95% bootstrap intervals over its images.

    Args:
        image: (I, E) of unit length.
        text: (T, E) of unit length.
        image_of_text: (T,) the image that each text belongs to.
        ks: K of the recalls; those above the number of candidates are left out.
        replicates: bootstrap samples; 0 for no intervals.

    Returns:
        `image_retrieval_recall@K`: share of texts whose image is among the first K. `text_retrieval_recall@K`: share of
        images with any own text among the first K. `mean_recall@1`: mean of the two at 1. `median_rank` (1-based) and
        `mrr`: of the text's own image.
    """
    by_text, by_image = retrieval_ranks(image, text, image_of_text)
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    chance: dict[str, float] = {}
    image_of_text = image_of_text.cpu()
    images, texts = len(image), len(text)
    own = Counter(torch.bincount(image_of_text).tolist())
    for direction, ranks, owner, others in (
        ("image_retrieval", by_text, image_of_text, images),
        ("text_retrieval", by_image, torch.arange(images), texts),
    ):
        for k in (k for k in ks if k <= others):
            name = f"{direction}_recall@{k}"
            metrics[name] = recall_at(ranks, (k,))[f"recall@{k}"].item()
            if replicates:
                intervals[name] = bootstrap_mean((ranks < k).double(), owner, replicates=replicates)
            if direction == "image_retrieval":
                chance[name] = k / images
            else:  # one less the share of draws of k texts that miss all of the image's own
                missed = (many * math.comb(texts - n, k) / math.comb(texts, k) for n, many in own.items())
                chance[name] = 1 - sum(missed) / images
    metrics["mean_recall@1"] = ((by_text < 1).double().mean() + (by_image < 1).double().mean()).item() / 2
    metrics["median_rank"] = (by_text.double().quantile(0.5) + 1).item()
    metrics["mrr"] = (1 / (by_text.double() + 1)).mean().item()
    if replicates:
        intervals["mrr"] = bootstrap_mean(1 / (by_text.double() + 1), image_of_text, replicates=replicates)
    chance["mean_recall@1"] = 1 / images  # both ways: an image has T / I of the T texts, in the mean
    chance["median_rank"] = (images + 1) / 2
    chance["mrr"] = sum(1 / rank for rank in range(1, images + 1)) / images
    return Scores(metrics, intervals, chance, {"text": by_text, "image": by_image})


def retrieval_answers(
    image: Tensor, text: Tensor, image_of_text: Tensor, ranks: dict[str, Tensor], count: int = 4, k: int = 5
) -> dict[str, list[Answer]]:
    """Some queries of each direction, right and wrong ones, drawn blindly, with their first candidates.

    Args:
        image: (I, E).
        text: (T, E).
        image_of_text: (T,) the image that each text belongs to.
        ranks: by "text" and by "image", as `retrieval_metrics` found them.
        count: how many right and how many wrong ones of each direction.
        k: candidates of each.

    Returns:
        By "text" (which look for an image) and by "image": the answers, right ones first. The draw is the same for the
        same number of right and wrong ones.
    """
    image_of_text = image_of_text.cpu()
    found = {}
    for asked, queries, candidates in (("text", text, image), ("image", image, text)):
        chosen: list[int] = []
        for kind in (ranks[asked] == 0, ranks[asked] > 0):
            rows = torch.nonzero(kind)[:, 0]
            chosen += rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]].tolist()
        found[asked] = []
        for query in chosen:
            texts = torch.nonzero(image_of_text == query)[:, 0].tolist()
            own = [int(image_of_text[query])] if asked == "text" else texts
            rough = candidates.float() @ queries[query].float()
            near = rough.topk(min(len(rough), k + len(own) + 64)).indices.tolist()
            # Of those that may come first the exact scores, since they decide the ranks; a right one loses a tie.
            near = sorted({*near, *own})
            exact = (candidates[near].double() * queries[query].double()).sum(1).tolist()
            scores = dict(zip(near, exact))
            best = sorted(near, key=lambda i: -(scores[i] - TIE * (i in own)))[:k]
            right = sorted(own, key=lambda i: -scores[i])
            found[asked].append(Answer(query, int(ranks[asked][query]), best, [scores[i] for i in best], right))
    return found


def _ranks(
    queries: Tensor, candidates: Tensor, positives: Tensor, back: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """Ranks of queries among candidates and, with the candidates' own positives `back`, the other way round."""
    for name, x in (("queries", queries), ("candidates", candidates)):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"the {name} hold embeddings that are not finite: they cannot be ranked")
    # Rounding bound of a product of E terms, for any order of summation, and of the cast of the threshold.
    norms = queries.norm(dim=1).max() * candidates.norm(dim=1).max()
    margin = 2 * (queries.shape[1] + 4) * 2.0**-24 * float(norms)
    rows = _Counter(queries, candidates, positives, margin, chunk)
    columns = None if back is None else _Counter(candidates, queries, back, margin, chunk)
    with _full_precision():
        for i in range(0, len(queries), chunk):
            block = queries[i : i + chunk].float()
            for j in range(0, len(candidates), chunk):
                scores = block @ candidates[j : j + chunk].float().T
                rows.count(scores, i, j)
                if columns is not None:
                    columns.count(scores.T, j, i)
    return rows.ranks(), None if columns is None else columns.ranks()


class _Counter:
    """Counts, block by block, the candidates that score at least as high as each query's best positive."""

    def __init__(self, queries: Tensor, candidates: Tensor, positives: Tensor, margin: float, chunk: int) -> None:
        positives = positives.to(queries.device)
        positives = positives[:, None] if positives.dim() == 1 else positives.sort(1, descending=True).values
        twice = torch.zeros_like(positives, dtype=torch.bool)
        twice[:, 1:] = positives[:, 1:] == positives[:, :-1]
        positives = positives.masked_fill(twice, -1)
        if len(positives) != len(queries):
            raise ValueError(f"{len(positives)} rows of positives for {len(queries)} queries")
        if not bool((positives >= 0).any(1).all()) or int(positives.max()) >= len(candidates):
            raise ValueError(f"every query needs a positive between 0 and {len(candidates) - 1}")
        self.queries, self.candidates, self.margin = queries, candidates, margin
        best, tied = [], []
        for i in range(0, len(queries), chunk):
            index = positives[i : i + chunk]  # (q, P)
            query = torch.arange(i, i + len(index), device=index.device)[:, None].expand_as(index)
            scores = self._exact(query.flatten(), index.clamp(min=0).flatten()).view_as(index)
            scores = scores.masked_fill(index < 0, -torch.inf)
            best.append(scores.max(1).values)
            tied.append((scores >= best[-1][:, None] - TIE).sum(1))
        self.best = torch.cat(best)  # (Q,) float64
        self.number = -torch.cat(tied)  # (Q,) the positives themselves are counted below and must not be

    def _exact(self, query: Tensor, candidate: Tensor) -> Tensor:
        return (self.queries[query].double() * self.candidates[candidate].double()).sum(1)

    def count(self, scores: Tensor, i: int, j: int) -> None:
        """Takes a block (q, c) of scores; its first row and column are query i and candidate j."""
        best = self.best[i : i + len(scores), None]
        number = self.number[i : i + len(scores)]
        above = scores > (best + self.margin).float()
        number += above.sum(1)
        unsure = torch.nonzero((scores >= (best - self.margin).float()) & ~above)
        for part in unsure.split(1 << 16):  # bounds the float64 copies
            query, candidate = part.unbind(1)
            ties = self._exact(query + i, candidate + j) >= best[query, 0] - TIE
            number.index_add_(0, query, ties.long())

    def ranks(self) -> Tensor:
        return self.number.cpu()


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32: its error would make every comparison an unsure one."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
