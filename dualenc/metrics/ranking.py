"""Exact ranks and exact nearest candidates, without the whole matrix of scores in memory.

Orders are decided by comparing scores, so they must not depend on how the product of the embeddings was cut into
blocks. The fp32 product is computed block by block, and decides every comparison that its rounding error cannot change.
The few scores that are too close to decide are computed again in float64. A block is used once: its scores are counted,
or searched for candidates that may be among the first. It serves both directions, since its transpose holds the scores
of the candidates as queries.

Scores less than `TIE` apart are equal.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dualenc.utils.precision import full_fp32

TIE = 1e-12  # in units of the score; the float64 rounding of a product of unit vectors is below 1e-13
GROUP, SMALL_GROUP = 32, 8  # candidates that are reduced to one number before any of them is examined
CPU_SCORES, GPU_SCORES = 1 << 21, 1 << 24  # scores in a block; on the CPU a block should fit into the cache
CPU_PAIRS, GPU_PAIRS = 1 << 18, 1 << 24  # float64 numbers gathered at a time
MAX_PENDING = 1 << 19  # candidates that wait for their exact scores
_LARGEST = torch.finfo(torch.float32).max


def match_ranks(queries: Tensor, candidates: Tensor, positives: Tensor, *, chunk: int = 4096) -> Tensor:
    """Compute the rank of each query's best positive among all candidates, 0-based.

    Args:
        queries: (Q, E) embeddings.
        candidates: (C, E) embeddings.
        positives: (Q,) index of the one positive, or (Q, P) indices padded with -1.
        chunk: largest number of rows and of columns of a block of the product.

    Returns:
        (Q,) int64: the number of candidates that are not positives and score higher than the best positive, or the
        same. A tie counts against the query.

    Raises:
        ValueError: If a query has no positive, an index is out of range, or embeddings are not finite.

    Example:
        >>> import torch
        >>> from dualenc import match_ranks
        >>> candidates = torch.eye(3)
        >>> queries = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.4, 0.1]])
        >>> match_ranks(queries, candidates, torch.tensor([0, 1]))
        tensor([0, 1])
        >>> match_ranks(queries, candidates, torch.tensor([[0, -1], [0, 2]]))
        tensor([0, 0])
    """
    positives = positives[:, None] if positives.dim() == 1 else positives
    if len(positives) != len(queries):
        raise ValueError(f"{len(positives)} rows of positives for {len(queries)} queries")
    if not bool((positives >= 0).any(1).all()) or int(positives.max()) >= len(candidates):
        raise ValueError(f"every query needs a positive between 0 and {len(candidates) - 1}")
    query, column = torch.nonzero(positives >= 0).unbind(1)
    pairs = QueryPairs(query, positives[query, column])
    operands = Operands.from_embeddings(queries, candidates)
    counter = RankCounter(operands, max_per_query(pairs.query, operands.exact_scores(*pairs), len(queries)))
    for i, j, block, _ in score_blocks(operands, pairs, chunk):
        counter.update(block, i, j)
    return counter.counts.cpu()


def nearest(queries: Tensor, candidates: Tensor, k: int, *, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the k candidates with the highest scores.

    Args:
        queries: (Q, E) embeddings.
        candidates: (C, E) embeddings.
        k: number of candidates; fewer for all queries where one of them has fewer.
        skip: (Q,) index of a candidate to leave out for the query, such as the query itself; or (Q, P) indices of
            several; -1 for none.

    Returns:
        index: (Q, k) int64, the best first. Candidates of equal score are sorted by index: those in a row of scores
            each less than `TIE` below the one before, which only duplicates have.
        score: (Q, k) float64.

    Raises:
        ValueError: If there are no candidates, an index is out of range, or embeddings are not finite.
    """
    operands = Operands.from_embeddings(queries, candidates)
    skip = torch.full((len(queries),), -1) if skip is None else skip
    skip = skip[:, None] if skip.dim() == 1 else skip
    if len(skip) != len(queries) or bool((skip >= len(candidates)).any()):
        raise ValueError(f"skip needs {len(queries)} indices below {len(candidates)}")
    k = min(k, len(candidates) - int((skip >= 0).sum(1).max()) if len(skip) else k)
    if k < 1:
        raise ValueError(f"no neighbors among {len(candidates)} candidates: k and what is not skipped must be above 0")
    query, column = torch.nonzero(skip >= 0).unbind(1)
    top = TopK(operands, k)
    for i, j, block, _ in score_blocks(operands, QueryPairs(query, skip[query, column])):
        top.update(block, i, j)
    return top.result()


class QueryPairs(NamedTuple):
    """Pairs of a query and a candidate, sorted by query."""

    query: Tensor  # (n,) int64
    candidate: Tensor  # (n,) int64


class Operands(NamedTuple):
    """The embeddings whose product is searched, with their norms."""

    queries: Tensor  # (Q, E)
    candidates: Tensor  # (C, E)
    query_norms: Tensor  # (Q,) float64
    candidate_norms: Tensor  # (C,) float64

    @classmethod
    def from_embeddings(cls, queries: Tensor, candidates: Tensor) -> "Operands":
        """Compute the norms, and refuse embeddings that cannot be ranked."""
        norms = []
        for name, x in (("queries", queries), ("candidates", candidates)):
            norm = torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
            if not bool(torch.isfinite(norm).all()) and not bool(torch.isfinite(x).all()):
                raise ValueError(f"the {name} hold embeddings that are not finite: they cannot be ranked")
            norms.append(norm.double().clamp(min=1e-15))  # The squares of smaller numbers may have underflowed.
        if len(queries) and len(candidates) and float(norms[0].max() * norms[1].max()) > 1e30:
            raise ValueError("the embeddings are too long for products in single precision: normalize them")
        return cls(queries.detach(), candidates.detach(), *norms)

    def swap(self) -> "Operands":
        """Swap queries and candidates."""
        return Operands(self.candidates, self.queries, self.candidate_norms, self.query_norms)

    def error_bound(self) -> Tensor:
        """Compute a bound (Q,) of the error of comparing an fp32 score with an fp32 threshold, float64.

        Whatever the order of summation, a product of E terms errs by at most gamma = n u / (1 - n u) of |x| |y|, with
        n = E and u = 2^-24 (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1). Of the four
        additional u, two are for casting the embeddings to fp32, one for casting the threshold, and one for terms of
        higher order. The norms err by less than that product. The additional `TIE` covers underflow.
        """
        error = (self.queries.shape[1] + 4) * 2.0**-24
        largest = self.candidate_norms.max() if len(self.candidate_norms) else 0.0
        return self.query_norms * largest * (error / (1 - 3 * error)) + TIE

    def exact_scores(self, query: Tensor, candidate: Tensor) -> Tensor:
        """Compute the scores (n,) of pairs in float64."""
        device = self.queries.device
        # A few pairs at a time, because gathering from a cache is ten times as fast.
        rows = max(1, (GPU_PAIRS if device.type == "cuda" else CPU_PAIRS) // max(1, self.queries.shape[1]))
        scores = torch.empty(len(query), dtype=torch.float64, device=device)
        for i in range(0, len(query), rows):
            product = self.queries.index_select(0, query[i : i + rows].to(device)).double()
            product.mul_(self.candidates.index_select(0, candidate[i : i + rows].to(device)))
            torch.sum(product, 1, out=scores[i : i + rows])
        return scores

    def exact_rows(self, i: int, j: int, scores: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Compute a block of scores again in float64, for blocks with too many scores that are too close to decide.

        A model that has collapsed has such blocks.

        Args:
            i: first query of the block.
            j: first candidate of the block.
            scores: (q, c) fp32 scores; -inf stays -inf.

        Yields:
            The number of the first row in the block, and the scores (r, c) of some rows.
        """
        candidates = self.candidates[j : j + scores.shape[1]].double()
        for row in range(0, len(scores), 64):
            rough = scores[row : row + 64, : len(candidates)]
            product = self.queries[i + row : i + row + len(rough)].double() @ candidates.T
            yield row, product.masked_fill_(rough == -torch.inf, -torch.inf)


class ScoreBlock(NamedTuple):
    """The scores of some queries with some candidates; -inf marks pairs that are left out."""

    scores: Tensor  # (q, c) float32, c a multiple of GROUP; either rows or columns are contiguous
    scratch: Tensor  # (q, c) of the same layout, memory for intermediate results


def score_blocks(
    operands: Operands, masked: QueryPairs, chunk: int = 4096
) -> Iterator[tuple[int, int, ScoreBlock, ScoreBlock]]:
    """Compute the product in fp32, block by block.

    Args:
        operands: the factors.
        masked: pairs to leave out.
        chunk: largest number of queries and of candidates of a block.

    Yields:
        The numbers of the first query and the first candidate, the block, and its transpose, in which the candidates
        are the queries. The next block overwrites both.
    """
    queries, candidates, device = operands.queries, operands.candidates, operands.queries.device
    width = _even_size(len(candidates), chunk)
    most = max(1, (GPU_SCORES if device.type == "cuda" else CPU_SCORES) // width)
    height = _even_size(len(queries), min(chunk, most))
    memory = torch.full((_padded_size(height), _padded_size(width, row=True)), -torch.inf, device=device)
    scratch = torch.empty_like(memory)
    query, candidate = masked.query.to(device), masked.candidate.to(device)
    starts = list(range(0, len(queries), height))
    bounds = torch.searchsorted(query, torch.tensor([*starts, len(queries)], device=device)).tolist()
    for i, since, until in zip(starts, bounds, bounds[1:]):
        rows = queries[i : i + height].float()
        r, masked_rows, masked_columns = len(rows), query[since:until] - i, candidate[since:until]
        for j in range(0, len(candidates), width):
            columns = candidates[j : j + width].float()
            c = len(columns)
            shape = slice(_padded_size(r)), slice(_padded_size(c, row=True))
            scores, spare = memory[shape], scratch[shape]
            if r < height or c < width:
                scores[r:] = scores[:, c:] = -torch.inf
            with full_fp32(device):  # The error of TF32 would make every comparison undecided.
                torch.mm(rows, columns.T, out=scores[:r, :c])
            here = (masked_columns >= j) & (masked_columns < j + c)
            scores[masked_rows[here], masked_columns[here] - j] = -torch.inf
            yield i, j, ScoreBlock(scores[:r], spare[:r]), ScoreBlock(scores[:, :c].T, spare[:, :c].T)


def _even_size(total: int, most: int) -> int:
    """Return the size of the parts, when `total` is split into as few nearly equal parts of at most `most`."""
    parts = -(-total // most)
    return -(-total // max(1, parts)) or 1


def _padded_size(size: int, row: bool = False) -> int:
    """Round up to whole groups; a long `row` to a multiple that vector instructions process without a remainder."""
    unit = 16 * GROUP if row and size > 16 * GROUP else GROUP
    return -(-size // unit) * unit


class RankCounter:
    """Counter of the candidates whose score reaches each query's threshold or ties with it.

    Args:
        operands: queries and candidates.
        threshold: (Q,) float64.

    Attributes:
        counts: (Q,) int64, of the blocks so far.
    """

    def __init__(self, operands: Operands, threshold: Tensor) -> None:
        self.operands = operands
        self.threshold, error = threshold - TIE, operands.error_bound()  # (Q,) float64
        self.low = (self.threshold - error).float()
        self.high = (self.threshold + error).float()
        self.counts = torch.zeros(len(threshold), dtype=torch.int64, device=threshold.device)

    def update(self, block: ScoreBlock, i: int, j: int) -> None:
        """Count a block whose first query is i and whose first candidate is j."""
        scores, queries = block.scores, slice(i, i + len(block.scores))
        low, high = self.low[queries, None], self.high[queries, None]
        # Comparing into floats and summing them is five times as fast as with booleans.
        above = _reduce_groups(torch.sum, torch.gt(scores, high, out=block.scratch), GROUP)  # (q, c / GROUP)
        unsure = _reduce_groups(torch.sum, torch.ge(scores, low, out=block.scratch), GROUP).sub_(above)
        if float(unsure.sum(dtype=torch.float64)) > scores.numel() / 32:
            for row, exact in self.operands.exact_rows(i, j, scores):
                reached = exact >= self.threshold[i + row : i + row + len(exact), None]
                self.counts[i + row : i + row + len(exact)] += reached.sum(1)
            return
        counts = above.sum(1).long()
        query, group = torch.nonzero(unsure).unbind(1)
        members = _group_members(scores, GROUP, query, group)
        which, member = torch.nonzero((members >= low[query]) & (members <= high[query])).unbind(1)
        query, candidate = query[which], member * unsure.shape[1] + group[which]
        reached = self.operands.exact_scores(query + i, candidate + j) >= self.threshold[query + i]
        self.counts[queries] += counts.index_add_(0, query, reached.long())


class TopK:
    """Block-by-block search for the k candidates of each query with the highest scores.

    The k-th highest of the maxima of groups of candidates is a lower bound of the k-th highest score. Only groups whose
    maximum reaches the bound are examined, and the bound rises from block to block.

    Args:
        operands: queries and candidates.
        k: number of candidates for each query.
    """

    def __init__(self, operands: Operands, k: int) -> None:
        size, device = len(operands.queries), operands.queries.device
        self.operands, self.k, self.error = operands, k, operands.error_bound()
        self.maxima = torch.full((size, k), -torch.inf, device=device)
        self.index = torch.full((size, k), -1, device=device)
        self.score = torch.full((size, k), -torch.inf, dtype=torch.float64, device=device)
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []  # queries, candidates, fp32 scores
        self.count = 0

    def update(self, block: ScoreBlock, i: int, j: int) -> None:
        """Search a block whose first query is i and whose first candidate is j."""
        scores, size = block.scores, GROUP
        while size > 1 and scores.shape[1] < 2 * self.k * size:
            size //= 2
        small = min(size, SMALL_GROUP)
        maxima = _reduce_groups(torch.amax, scores, small)  # (q, c / small)
        group_maxima = _reduce_groups(torch.amax, maxima, size // small)
        highest = torch.cat((self.maxima[i : i + len(scores)], group_maxima), 1)
        self.maxima[i : i + len(scores)] = highest.topk(self.k).values
        bound = self._bound(torch.arange(i, i + len(scores), device=scores.device))
        query, group = torch.nonzero(maxima >= bound[:, None]).unbind(1)
        members = _group_members(scores, small, query, group)
        kept = members >= bound[query, None]
        if int(kept.sum()) > 2 * self.k * len(scores) + scores.numel() // 16:
            for row, exact in self.operands.exact_rows(i, j, scores):
                query, candidate = torch.nonzero(_top_k_mask(exact, self.k)).unbind(1)
                self._add_pending(query + i + row, candidate + j, exact[query, candidate].float())
        else:
            which, member = torch.nonzero(kept).unbind(1)
            candidate = member * maxima.shape[1] + group[which]
            self._add_pending(query[which] + i, candidate + j, members[which, member])
        if self.count > MAX_PENDING:
            self._merge_pending()

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the candidates (Q, k), -1 where there are fewer, and their float64 scores; see `nearest`."""
        self._merge_pending()
        return self.index.cpu(), self.score.cpu()

    def _bound(self, query: Tensor) -> Tensor:
        """Return a lower bound of the fp32 scores of the first k; both these and the maxima are subject to error."""
        return (self.maxima[query, -1] - 2 * self.error[query]).float().clamp(min=-_LARGEST)

    def _add_pending(self, query: Tensor, candidate: Tensor, score: Tensor) -> None:
        self.pending.append((query, candidate, score))
        self.count += len(query)

    def _merge_pending(self) -> None:
        """Compute the exact scores of the pending candidates, and keep the first k of these and of the known ones."""
        if not self.count:
            return
        query, candidate, rough = (torch.cat(parts) for parts in zip(*self.pending))
        self.pending, self.count = [], 0
        kept = rough >= self._bound(query)
        query, candidate = query[kept], candidate[kept]
        if not len(query):
            return
        score = self.operands.exact_scores(query, candidate)
        since, until = int(query.min()), int(query.max()) + 1
        before = self.index[since:until] >= 0
        query = torch.cat((torch.nonzero(before)[:, 0] + since, query))
        candidate = torch.cat((self.index[since:until][before], candidate))
        score = torch.cat((self.score[since:until][before], score))
        order = torch.argsort(score, descending=True, stable=True)
        order = order[torch.argsort(query[order], stable=True)]
        query, candidate, score = query[order], candidate[order], score[order]
        lower = torch.ones_like(query, dtype=torch.bool)  # not tied with the candidate before
        lower[1:] = (query[1:] != query[:-1]) | (score[:-1] - score[1:] >= TIE)
        if not bool(lower.all()):
            order = torch.argsort(lower.cumsum(0) * len(self.operands.candidates) + candidate)
            candidate, score = candidate[order], score[order]
        sizes = torch.bincount(query - since, minlength=until - since)
        rank = torch.arange(len(query), device=query.device) - (sizes.cumsum(0) - sizes)[query - since]
        first = rank < self.k
        query, rank = query[first], rank[first]
        self.index[query, rank], self.score[query, rank] = candidate[first], score[first]


def _top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Mark (q, c) the k highest scores of each row; of those that tie, the first ones."""
    last = scores.topk(min(k, scores.shape[1])).values[:, -1:]
    above = scores > last + TIE
    tied = (scores >= last - TIE) & ~above & (scores > -torch.inf)
    return above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))


def _reduce_groups(reduce: Callable[..., Tensor], scores: Tensor, size: int) -> Tensor:
    """Compute the sum or maximum (q, c / size) of groups of candidates.

    Candidate j belongs to group j % (c / size). With such groups, and one branch for each layout, the reduction reads
    contiguous memory in both layouts.
    """
    if scores.stride(1) == 1:
        return reduce(scores.unflatten(1, (size, -1)), 1)
    return reduce(scores.T.unflatten(0, (size, -1)), 0).T


def _group_members(scores: Tensor, size: int, query: Tensor, group: Tensor) -> Tensor:
    """Return the scores (n, size) in groups of `_reduce_groups`; member m is candidate m * (c / size) + group."""
    if scores.stride(1) == 1:
        return scores.unflatten(1, (size, -1))[query, :, group]
    return scores.T.unflatten(0, (size, -1))[:, group, query].T


def max_per_query(query: Tensor, score: Tensor, size: int) -> Tensor:
    """Compute the maximum (size,) of each query's scores (n,)."""
    return score.new_full((size,), -torch.inf).scatter_reduce_(0, query.to(score.device), score, "amax")
