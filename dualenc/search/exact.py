"""Exact search: the k rows with the highest scores, equal to those of float64 arithmetic, without a matrix of scores.

A product in fp32, block by block, leaves the rows that its rounding error could not put behind the first k. Only their
scores are computed in float64, and decide. `dualenc.metrics.ranking.nearest` does the same for tensors in memory. This
module needs numpy alone, so that a search does not load torch.
"""

import numpy as np

from dualenc.search.segments import BLOCK, Rows

TIE = 1e-12  # scores less than this apart are equal; the float64 rounding of a product of unit vectors is below 1e-13
LONGEST = 1.01  # bound of the length of a row, which is 1 before it is rounded to fp16
GATHERED = 1 << 20  # float64 numbers gathered at a time
_LEAST = float(np.finfo(np.float32).min)  # below every score, above -inf, which marks rows that are left out


def nearest_rows(
    rows: Rows, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Find the k rows with the highest scores for each query.

    Args:
        rows: the N rows.
        queries: (Q, E) vectors.
        k: number of rows, 1 or more.
        allowed: (N,) bool, the rows to search; None for all.

    Returns:
        For each query the numbers (n,) int64 of its rows, the best first, and their scores (n,) float64; n is k, or the
        number of allowed rows if that is less. Rows of equal score are sorted by number.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    error = (rows.dims + 4) * 2.0**-24
    error = np.linalg.norm(queries.astype(np.float64), axis=1) * LONGEST * error / (1 - 3 * error) + TIE  # (Q,)
    searches = [_Search(k, 2 * float(one)) for one in error]
    low = np.full(len(queries), _LEAST, np.float32)
    most = max(64, BLOCK // max(rows.dims, len(queries), 1))
    for first, block in rows.blocks(most):
        scores = queries @ block.T  # (Q, n)
        if allowed is not None:
            scores[:, ~allowed[first : first + len(block)]] = -np.inf
        for i in np.flatnonzero(scores.max(1) >= low).tolist():
            reached = np.flatnonzero(scores[i] >= low[i])
            low[i] = searches[i].add(reached + first, scores[i, reached])
    return [rescore(rows, query, search.rows, k) for query, search in zip(queries, searches)]


class _Search:
    """The rows that may be among the first k of one query.

    Args:
        k: number of rows to find.
        margin: difference of two fp32 scores above which the higher one is higher in truth.

    Attributes:
        rows: (n,) int64, ascending.
    """

    def __init__(self, k: int, margin: float) -> None:
        self.k, self.margin, self.low = k, margin, _LEAST
        self.rows, self.scores = np.zeros(0, np.int64), np.zeros(0, np.float32)

    def add(self, rows: np.ndarray, scores: np.ndarray) -> float:
        """Add rows and their fp32 scores, and return the lowest score that may still be among the first k."""
        self.rows, self.scores = np.concatenate((self.rows, rows)), np.concatenate((self.scores, scores))
        if len(self.rows) > self.k:
            place = len(self.rows) - self.k
            self.low = float(np.partition(self.scores, place)[place]) - self.margin
            kept = self.scores >= self.low
            self.rows, self.scores = self.rows[kept], self.scores[kept]
        return self.low


def rescore(rows: Rows, query: np.ndarray, chosen: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Order some rows by their scores in float64, and return the first k with their scores; see `nearest_rows`.

    Args:
        rows: all rows.
        query: (E,) vector.
        chosen: (n,) numbers of the rows to order.
        k: most rows to return.
    """
    chosen = np.sort(chosen)
    scores = np.empty(len(chosen), np.float64)
    size, query = max(1, GATHERED // rows.dims), query.astype(np.float64)
    for first in range(0, len(chosen), size):
        gathered = rows.take(chosen[first : first + size]).astype(np.float64)
        scores[first : first + size] = (gathered * query).sum(1)
    order = np.argsort(-scores, kind="stable")
    chosen, scores = chosen[order], scores[order]
    # Rows in a sequence of scores each less than TIE below the one before are tied: only duplicates have such scores.
    level = np.concatenate(([0], np.cumsum(scores[:-1] - scores[1:] >= TIE))) if len(scores) else scores
    order = np.lexsort((chosen, level))[:k]
    return chosen[order], scores[order]
