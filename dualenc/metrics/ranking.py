"""Exact ranks and exact first candidates, from a product of embeddings that is never held whole.

Orders are decided by comparing scores, so they must not depend on how a product was cut into blocks. The fp32 product
is made block by block, and decides every comparison that its rounding error cannot turn; the few scores too close to
call are computed again in float64. So each block is only looked at: counted, or searched for what may be among the
first. A block serves both directions, since its transpose holds the scores of the candidates as queries.

Scores less than `TIE` apart are equal.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

TIE = 1e-12  # in units of the score; float64 rounding of a product of unit vectors is below 1e-13
GROUP, FEW = 32, 8  # candidates that are summed up together, before any is looked at
CPU_SCORES, GPU_SCORES = 1 << 21, 1 << 24  # of a block; on the CPU it should stay in the cache
CPU_PAIRS, GPU_PAIRS = 1 << 18, 1 << 24  # float64 numbers gathered at a time
WAITING = 1 << 19  # candidates for the first places, before they are scored
_LARGEST = torch.finfo(torch.float32).max


def match_ranks(queries: Tensor, candidates: Tensor, positives: Tensor, *, chunk: int = 4096) -> Tensor:
    """Rank of each query's best positive among all candidates, 0-based.

    Args:
        queries: (Q, E).
        candidates: (C, E).
        positives: (Q,) index of the one positive, or (Q, P) indices padded with -1.
        chunk: most rows and most columns of a block of the product.

    Returns:
        (Q,) int64: how many candidates that are no positive score higher than the best positive, or the same.

    Raises:
        ValueError: a query has no positive, an index is out of range, or embeddings are not finite.
    """
    positives = positives[:, None] if positives.dim() == 1 else positives
    if len(positives) != len(queries):
        raise ValueError(f"{len(positives)} rows of positives for {len(queries)} queries")
    if not bool((positives >= 0).any(1).all()) or int(positives.max()) >= len(candidates):
        raise ValueError(f"every query needs a positive between 0 and {len(candidates) - 1}")
    query, place = torch.nonzero(positives >= 0).unbind(1)
    pairs = QueryPairs(query, positives[query, place])
    side = Side.of(queries, candidates)
    counter = Counter(side, highest(pairs.query, side.exact(*pairs), len(queries)))
    for i, j, block, _ in blocks(side, pairs, chunk):
        counter.take(block, i, j)
    return counter.number.cpu()


def nearest(queries: Tensor, candidates: Tensor, k: int, *, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k candidates with the highest scores.

    Args:
        queries: (Q, E).
        candidates: (C, E).
        k: how many; where a query has fewer candidates, that many for all.
        skip: (Q,) index of what is no candidate for the query, such as itself; -1 for none.

    Returns:
        Indices (Q, k) int64 and scores (Q, k) float64, the best first. In a row of scores each less than `TIE` below
        the one before, which only duplicates have, the smaller index comes first.

    Raises:
        ValueError: there is no candidate, an index is out of range, or embeddings are not finite.
    """
    side = Side.of(queries, candidates)
    skip = torch.full((len(queries),), -1) if skip is None else skip
    if len(skip) != len(queries) or bool((skip >= len(candidates)).any()):
        raise ValueError(f"skip needs {len(queries)} indices below {len(candidates)}")
    k = min(k, len(candidates) - int(bool((skip >= 0).any())))
    if k < 1:
        raise ValueError(f"no neighbors among {len(candidates)} candidates: k and what is not skipped must be above 0")
    query = torch.nonzero(skip >= 0)[:, 0]
    first = First(side, k)
    for i, j, block, _ in blocks(side, QueryPairs(query, skip[query])):
        first.take(block, i, j)
    return first.found()


class QueryPairs(NamedTuple):
    """Pairs of a query and a candidate, by rising query."""

    query: Tensor  # (n,) int64
    candidate: Tensor  # (n,) int64


class Side(NamedTuple):
    """One direction: who asks, and what is asked for."""

    queries: Tensor  # (Q, E)
    candidates: Tensor  # (C, E)
    lengths: Tensor  # (Q,) of the queries, float64
    others: Tensor  # (C,) of the candidates

    @classmethod
    def of(cls, queries: Tensor, candidates: Tensor) -> "Side":
        """Looks at the embeddings once, and refuses what cannot be ranked."""
        lengths = []
        for name, x in (("queries", queries), ("candidates", candidates)):
            length = torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
            if not bool(torch.isfinite(length).all()) and not bool(torch.isfinite(x).all()):
                raise ValueError(f"the {name} hold embeddings that are not finite: they cannot be ranked")
            lengths.append(length.double().clamp(min=1e-15))  # squares of less may have underflowed
        if len(queries) and len(candidates) and float(lengths[0].max() * lengths[1].max()) > 1e30:
            raise ValueError("the embeddings are too long for products in single precision: normalize them")
        return cls(queries.detach(), candidates.detach(), *lengths)

    def turned(self) -> "Side":
        """The other direction."""
        return Side(self.candidates, self.queries, self.others, self.lengths)

    def margin(self) -> Tensor:
        """How far (Q,) a comparison of an fp32 score with an fp32 threshold may be off, float64.

        Whatever the order of summation, a product of E terms errs by at most gamma = n u / (1 - n u) of |x| |y|, with
        n = E and u = 2^-24 (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1). Of the four
        more u, two are for a cast of the embeddings to fp32, one for that of the threshold, one for what is of a higher
        order. The lengths err by less than that product. `TIE` more makes up for what underflows.
        """
        error = (self.queries.shape[1] + 4) * 2.0**-24
        largest = self.others.max() if len(self.others) else 0.0
        return self.lengths * largest * (error / (1 - 3 * error)) + TIE

    def exact(self, query: Tensor, candidate: Tensor) -> Tensor:
        """Scores (n,) of pairs, float64. A few pairs at a time: gathering from a cache is ten times as fast."""
        device = self.queries.device
        rows = max(1, (GPU_PAIRS if device.type == "cuda" else CPU_PAIRS) // max(1, self.queries.shape[1]))
        scores = torch.empty(len(query), dtype=torch.float64, device=device)
        for i in range(0, len(query), rows):
            product = self.queries.index_select(0, query[i : i + rows].to(device)).double()
            product.mul_(self.candidates.index_select(0, candidate[i : i + rows].to(device)))
            torch.sum(product, 1, out=scores[i : i + rows])
        return scores

    def exact_rows(self, i: int, j: int, scores: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The block (q, c) of scores from query i and candidate j on, in float64, some rows (r, c) at a time.

        For where too many are too close to call, as in a model that has collapsed. Masked ones stay so.
        """
        candidates = self.candidates[j : j + scores.shape[1]].double()
        for row in range(0, len(scores), 64):
            rough = scores[row : row + 64, : len(candidates)]
            product = self.queries[i + row : i + row + len(rough)].double() @ candidates.T
            yield row, product.masked_fill_(rough == -torch.inf, -torch.inf)


class ScoreBlock(NamedTuple):
    """Scores of some queries with some candidates; -inf is no candidate."""

    scores: Tensor  # (q, c) float32, c a multiple of GROUP; either rows or columns lie contiguous
    scratch: Tensor  # (q, c), laid out alike, for whoever looks at the block


def blocks(side: Side, masked: QueryPairs, chunk: int = 4096) -> Iterator[tuple[int, int, ScoreBlock, ScoreBlock]]:
    """The product in fp32, block by block.

    Args:
        side: what is multiplied.
        masked: pairs that are no candidates.
        chunk: most queries and most candidates of a block.

    Yields:
        The first query and the first candidate, the block, and its transpose, where the candidates are the queries.
        Both are overwritten by the next.
    """
    queries, candidates, device = side.queries, side.candidates, side.queries.device
    wide = _even(len(candidates), chunk)
    tall = _even(len(queries), min(chunk, max(1, (GPU_SCORES if device.type == "cuda" else CPU_SCORES) // wide)))
    held = torch.full((_padded(tall), _padded(wide, long=True)), -torch.inf, device=device)
    scratch = torch.empty_like(held)
    query, candidate = masked.query.to(device), masked.candidate.to(device)
    starts = list(range(0, len(queries), tall))
    bounds = torch.searchsorted(query, torch.tensor([*starts, len(queries)], device=device)).tolist()
    for i, since, until in zip(starts, bounds, bounds[1:]):
        rows = queries[i : i + tall].float()
        r, own_rows, own_columns = len(rows), query[since:until] - i, candidate[since:until]
        for j in range(0, len(candidates), wide):
            columns = candidates[j : j + wide].float()
            c = len(columns)
            shape = slice(_padded(r)), slice(_padded(c, long=True))
            scores, spare = held[shape], scratch[shape]
            if r < tall or c < wide:
                scores[r:] = scores[:, c:] = -torch.inf
            with _full_precision():
                torch.mm(rows, columns.T, out=scores[:r, :c])
            here = (own_columns >= j) & (own_columns < j + c)
            scores[own_rows[here], own_columns[here] - j] = -torch.inf
            yield i, j, ScoreBlock(scores[:r], spare[:r]), ScoreBlock(scores[:, :c].T, spare[:, :c].T)


def _even(total: int, most: int) -> int:
    """Size of as few pieces as there can be, and all about as large."""
    pieces = -(-total // most)
    return -(-total // max(1, pieces)) or 1


def _padded(size: int, long: bool = False) -> int:
    """Up to whole groups; a `long` row up to groups that vector instructions have no remainder of."""
    unit = 16 * GROUP if long and size > 16 * GROUP else GROUP
    return -(-size // unit) * unit


class Counter:
    """Counts, block by block, the candidates whose score reaches each query's threshold or ties with it."""

    def __init__(self, side: Side, threshold: Tensor) -> None:
        self.side = side
        self.threshold, margin = threshold - TIE, side.margin()  # (Q,) float64
        self.low = (self.threshold - margin).float()
        self.high = (self.threshold + margin).float()
        self.number = torch.zeros(len(threshold), dtype=torch.int64, device=threshold.device)

    def take(self, block: ScoreBlock, i: int, j: int) -> None:
        """Counts a block whose first query is i and whose first candidate is j."""
        scores, queries = block.scores, slice(i, i + len(block.scores))
        low, high = self.low[queries, None], self.high[queries, None]
        # Comparing into floats and summing these is five times as fast as with truths.
        above = _fold(torch.sum, torch.gt(scores, high, out=block.scratch), GROUP)  # (q, c / GROUP)
        unsure = _fold(torch.sum, torch.ge(scores, low, out=block.scratch), GROUP).sub_(above)
        if float(unsure.sum(dtype=torch.float64)) > scores.numel() / 32:
            for row, exact in self.side.exact_rows(i, j, scores):
                reached = exact >= self.threshold[i + row : i + row + len(exact), None]
                self.number[i + row : i + row + len(exact)] += reached.sum(1)
            return
        number = above.sum(1).long()
        query, group = torch.nonzero(unsure).unbind(1)
        members = _members(scores, GROUP, query, group)
        which, place = torch.nonzero((members >= low[query]) & (members <= high[query])).unbind(1)
        query, candidate = query[which], place * unsure.shape[1] + group[which]
        reached = self.side.exact(query + i, candidate + j) >= self.threshold[query + i]
        self.number[queries] += number.index_add_(0, query, reached.long())


class First:
    """Finds, block by block, the k candidates of each query with the highest scores.

    The k-th highest of the maxima of groups of candidates is a bound from below of the k-th highest score, so only
    groups whose maximum reaches it are looked into; and it rises from block to block.
    """

    def __init__(self, side: Side, k: int) -> None:
        size, device = len(side.queries), side.queries.device
        self.side, self.k, self.margin = side, k, side.margin()
        self.maxima = torch.full((size, k), -torch.inf, device=device)
        self.index = torch.full((size, k), -1, device=device)
        self.score = torch.full((size, k), -torch.inf, dtype=torch.float64, device=device)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # queries, candidates, fp32 scores
        self.count = 0

    def take(self, block: ScoreBlock, i: int, j: int) -> None:
        """Searches a block whose first query is i and whose first candidate is j."""
        scores, size = block.scores, GROUP
        while size > 1 and scores.shape[1] < 2 * self.k * size:
            size //= 2
        some = min(size, FEW)
        maxima = _fold(torch.amax, scores, some)  # (q, c / some)
        highest = torch.cat((self.maxima[i : i + len(scores)], _fold(torch.amax, maxima, size // some)), 1)
        self.maxima[i : i + len(scores)] = highest.topk(self.k).values
        floor = self._floor(torch.arange(i, i + len(scores), device=scores.device))
        query, group = torch.nonzero(maxima >= floor[:, None]).unbind(1)
        members = _members(scores, some, query, group)
        kept = members >= floor[query, None]
        if int(kept.sum()) > 2 * self.k * len(scores) + scores.numel() // 16:
            for row, exact in self.side.exact_rows(i, j, scores):
                query, candidate = torch.nonzero(_first_of(exact, self.k)).unbind(1)
                self._wait(query + i + row, candidate + j, exact[query, candidate].float())
        else:
            which, place = torch.nonzero(kept).unbind(1)
            self._wait(query[which] + i, place * maxima.shape[1] + group[which] + j, members[which, place])
        if self.count > WAITING:
            self._settle()

    def found(self) -> tuple[Tensor, Tensor]:
        """Candidates (Q, k), -1 where there are no more, and their scores, float64; see `nearest`."""
        self._settle()
        return self.index.cpu(), self.score.cpu()

    def _floor(self, query: Tensor) -> Tensor:
        """fp32 score that each of the first must reach: both it and what the bound comes from may be off."""
        return (self.maxima[query, -1] - 2 * self.margin[query]).float().clamp(min=-_LARGEST)

    def _wait(self, query: Tensor, candidate: Tensor, score: Tensor) -> None:
        self.waiting.append((query, candidate, score))
        self.count += len(query)

    def _settle(self) -> None:
        """Scores what waits, and keeps the first k of it and of those found before."""
        if not self.count:
            return
        query, candidate, rough = (torch.cat(parts) for parts in zip(*self.waiting))
        self.waiting, self.count = [], 0
        kept = rough >= self._floor(query)
        query, candidate = query[kept], candidate[kept]
        if not len(query):
            return
        score = self.side.exact(query, candidate)
        since, until = int(query.min()), int(query.max()) + 1
        before = self.index[since:until] >= 0
        query = torch.cat((torch.nonzero(before)[:, 0] + since, query))
        candidate = torch.cat((self.index[since:until][before], candidate))
        score = torch.cat((self.score[since:until][before], score))
        order = torch.argsort(score, descending=True, stable=True)
        order = order[torch.argsort(query[order], stable=True)]
        query, candidate, score = query[order], candidate[order], score[order]
        new = torch.ones_like(query, dtype=torch.bool)
        new[1:] = (query[1:] != query[:-1]) | (score[:-1] - score[1:] >= TIE)
        if not bool(new.all()):
            order = torch.argsort(new.cumsum(0) * len(self.side.candidates) + candidate)
            candidate, score = candidate[order], score[order]
        sizes = torch.bincount(query - since, minlength=until - since)
        place = torch.arange(len(query), device=query.device) - (sizes.cumsum(0) - sizes)[query - since]
        first = place < self.k
        query, place = query[first], place[first]
        self.index[query, place], self.score[query, place] = candidate[first], score[first]


def _first_of(scores: Tensor, k: int) -> Tensor:
    """Truths (q, c): the k highest of each row, of those that tie the first ones."""
    last = scores.topk(min(k, scores.shape[1])).values[:, -1:]
    above = scores > last + TIE
    tied = (scores >= last - TIE) & ~above & (scores > -torch.inf)
    return above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))


def _fold(how: Callable[..., Tensor], scores: Tensor, size: int) -> Tensor:
    """Sum or maximum (q, c / size) over groups of candidates: j belongs to group j % (c / size).

    Groups are so spread, and the two layouts told apart, because both then go along the memory.
    """
    if scores.stride(1) == 1:
        return how(scores.unflatten(1, (size, -1)), 1)
    return how(scores.T.unflatten(0, (size, -1)), 0).T


def _members(scores: Tensor, size: int, query: Tensor, group: Tensor) -> Tensor:
    """Scores (n, size) of the members of groups as `_fold` makes them; the m-th is candidate m * (c / size) + group."""
    if scores.stride(1) == 1:
        return scores.unflatten(1, (size, -1))[query, :, group]
    return scores.T.unflatten(0, (size, -1))[:, group, query].T


def highest(query: Tensor, score: Tensor, size: int) -> Tensor:
    """The highest (size,) of each query's scores (n,)."""
    return score.new_full((size,), -torch.inf).scatter_reduce_(0, query.to(score.device), score, "amax")


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32: its error would make every comparison an unsure one."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
