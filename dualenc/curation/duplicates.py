"""Near-duplicates among embeddings: cells by spherical k-means, exact products inside a cell.

The rule is SemDeDup's (Abbas et al., "SemDeDup: Data-efficient learning at web-scale through semantic deduplication",
2023, arXiv:2303.09540), except for which sample of a group stays: here the one with the best score, there the one
farthest from the centroid. The embeddings are read part by part and laid out by cell in a temporary file, so that the
memory holds a few numbers a row, and the vectors of one cell.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

ITERATIONS = 10  # of k-means
ROWS_A_CELL = 64  # rows from which k-means learns each centroid
BLOCK = 1 << 20  # products computed at once; they stay in the cache
_SEED = 0

Vectors = Callable[[int], np.ndarray]  # embeddings (n, D) of a part by its number; a row of NaN has no embedding


class Duplicates(NamedTuple):
    """The nearest better-ranked neighbor of each of N rows."""

    cluster: np.ndarray  # (N,) int32, number of the cell; -1 for a row without an embedding
    row: np.ndarray  # (N,) int64, the most similar row of the cell that ranks before; -1 for the first of its cell
    similarity: np.ndarray  # (N,) float32, the cosine with it; NaN where `row` is -1


def find_duplicates(
    vectors: Vectors,
    counts: Sequence[int],
    scores: np.ndarray,
    hashes: np.ndarray,
    folder: Path,
    cells: int | None = None,
) -> Duplicates:
    """Return the most similar row of each row's cell among those with a better score.

    Rows rank by score, the highest first, and equal scores by their number; a row without a score ranks last. Rows of
    equal hashes count as similarity 1 in whatever cells they are: their duplicate is the first of them.

    Args:
        vectors: function that reads the embeddings of a part.
        counts: number of rows of each part.
        scores: (N,) scores; NaN for none.
        hashes: (N,) hashes of the content; 0 for none.
        folder: folder for a temporary file of N * D * 4 bytes.
        cells: number of cells; by default the square root of N, with which the products inside the cells cost as much
            as those with the centroids.
    """
    rank = np.lexsort((np.arange(len(scores)), -np.nan_to_num(scores, nan=-np.inf)))
    place = np.empty(len(rank), np.int64)
    place[rank] = np.arange(len(rank))
    found = Duplicates(
        np.full(len(rank), -1, np.int32), np.full(len(rank), -1, np.int64), np.full(len(rank), np.nan, np.float32)
    )
    centroids = _centroids(vectors, counts, cells or max(1, round(len(rank) ** 0.5)))
    if centroids is not None:
        _inside_cells(vectors, counts, place, centroids, folder, found)
    _equal_content(hashes, place, found)
    return found


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (n, D) of length 1 as float32; those without a direction become NaN."""
    vectors = np.asarray(vectors, np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _centroids(vectors: Vectors, counts: Sequence[int], cells: int) -> np.ndarray | None:
    """Fit centroids (K, D) of unit length from a sample of the rows; None if no row has an embedding."""
    random = np.random.default_rng(_SEED)
    share = min(1.0, cells * ROWS_A_CELL / max(1, sum(counts)))
    parts = []
    for number, count in enumerate(counts):
        chosen = np.flatnonzero(random.random(count) < share) if share < 1 else np.arange(count)
        if len(chosen):
            part = normalized(vectors(number)[chosen])
            parts.append(part[np.isfinite(part).all(1)])
    sample = np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
    if not len(sample):
        return None
    cells = min(cells, len(sample))
    centroids = sample[random.choice(len(sample), cells, replace=False)]
    for _ in range(ITERATIONS if cells > 1 else 0):
        nearest = _nearest(sample, centroids)
        order = np.argsort(nearest, kind="stable")
        filled, starts = np.unique(nearest[order], return_index=True)
        # A cell that lost all its rows begins again from a row of the sample.
        centroids = sample[random.choice(len(sample), cells, replace=False)]
        means = normalized(np.add.reduceat(sample[order], starts, axis=0))
        usable = np.isfinite(means).all(1)
        centroids[filled[usable]] = means[usable]
    return centroids


def _nearest(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return the number (n,) int32 of the centroid with the greatest product with each row."""
    found = np.empty(len(rows), np.int32)
    step = max(1, BLOCK // len(centroids))
    for start in range(0, len(rows), step):
        found[start : start + step] = (rows[start : start + step] @ centroids.T).argmax(1)
    return found


def _inside_cells(
    vectors: Vectors,
    counts: Sequence[int],
    place: np.ndarray,
    centroids: np.ndarray,
    folder: Path,
    found: Duplicates,
) -> None:
    """Assign rows to cells, and fill in the nearest better-ranked row of the cell of each.

    Args:
        vectors, counts, folder: see `find_duplicates`.
        place: (N,) rank of each row.
        centroids: (K, D).
        found: the arrays to fill.
    """
    starts = np.cumsum([0, *counts])
    for number, count in enumerate(counts):
        part = normalized(vectors(number))
        good = np.isfinite(part).all(1)
        found.cluster[starts[number] : starts[number] + count][good] = _nearest(part[good], centroids)
    order = np.lexsort((place, found.cluster))  # by cell, then by rank
    order = order[np.searchsorted(found.cluster[order], 0) :]
    where = np.full(len(place), -1, np.int64)
    where[order] = np.arange(len(order))
    with TemporaryDirectory(dir=folder, prefix=".cells-", suffix=".part") as temporary:
        laid = np.memmap(Path(temporary) / "rows", np.float32, "w+", shape=(len(order), centroids.shape[1]))
        for number, count in enumerate(counts):
            target = where[starts[number] : starts[number] + count]
            laid[target[target >= 0]] = normalized(vectors(number)[target >= 0])
        bounds = np.searchsorted(found.cluster[order], np.arange(len(centroids) + 1))
        for first, last in pairwise(bounds):
            near, similarity = _best_before(np.array(laid[first:last]))
            rows = order[first:last]
            found.row[rows] = np.where(near >= 0, rows[near], -1)
            found.similarity[rows] = similarity
        del laid


def _best_before(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number (n,) of the most similar earlier row of each row, and the cosine; -1 and NaN for the first."""
    near, similarity = np.full(len(rows), -1, np.int64), np.full(len(rows), np.nan, np.float32)
    first = 1
    while first < len(rows):
        last = min(len(rows), first + max(1, BLOCK // len(rows)))
        products = rows[first:last] @ rows[: last - 1].T
        # Row `first + i` may see the rows before it: of the last columns, those below the diagonal.
        square = products[:, first:]
        square[~np.tri(len(square), square.shape[1], -1, dtype=bool)] = -np.inf
        best = products.argmax(1)
        near[first:last], similarity[first:last] = best, products[np.arange(last - first), best]
        first = last
    return near, np.clip(similarity, -1, 1)


def _equal_content(hashes: np.ndarray, place: np.ndarray, found: Duplicates) -> None:
    """Make the best-ranked row of each hash the duplicate of the others, with similarity 1."""
    order = np.lexsort((place, hashes))
    order = order[hashes[order] != 0]
    if not len(order):
        return
    new = np.concatenate([[True], hashes[order][1:] != hashes[order][:-1]])
    leader = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    others = order[~new]
    found.row[others], found.similarity[others] = leader[~new], 1.0
