"""Approximate search by faiss: its file, how much of the exact result it finds, and the import that cannot hang."""

import json
import math
import os
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from dualenc.search.exact import nearest_rows, rescore
from dualenc.search.segments import Rows
from dualenc.utils.errors import DataError
from dualenc.utils.files import atomic_write

EXACT, AUTO = "exact", "auto"
FEW, MANY = 100_000, 1_000_000  # rows below which "auto" is exact, and from which it looks into some cells only
WIDEN = 10  # times k, the rows that faiss is asked for, of which the scores of the mapped rows choose k
PROBED = 32  # one of this many cells is looked into
GOOD = 0.95  # recall below which a specification is warned of
QUERIES = 200  # rows by which the recall is measured
ADDED = 1 << 15  # rows that are added at a time


def choose_spec(wanted: str, rows: int) -> str | None:
    """Return the specification of faiss for an index of this many rows; None for exact search.

    "auto" is 1 bit a dimension (RaBitQ, Gao and Long 2024, arXiv:2405.12497), whose errors the fp16 rows correct.

    Args:
        wanted: "exact", "auto" or a specification of faiss's `index_factory`.
        rows: number of rows.
    """
    if wanted == EXACT or (wanted == AUTO and rows < FEW):
        return None
    if wanted != AUTO:
        return wanted
    return "RaBitQ" if rows < MANY else f"IVF{2 ** round(math.log2(4 * math.sqrt(rows)))},RaBitQ"


def load_faiss() -> Any:
    """Import faiss.

    Raises:
        DataError: If it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise DataError("approximate search needs faiss: pip install 'dualenc[search]'") from None
    _use_one_thread_after_fork()
    return faiss


@cache
def _use_one_thread_after_fork() -> None:
    """Let faiss use one thread in forked processes, since the threads it waits for exist in their parent only."""
    import faiss

    os.register_at_fork(after_in_child=partial(faiss.omp_set_num_threads, 1))


def check_spec(spec: str, dims: int) -> None:
    """Refuse a specification that faiss does not know, before any work.

    Raises:
        DataError: If it does not know it, or is not installed.
    """
    if spec in (EXACT, AUTO):
        if spec == AUTO:
            load_faiss()
        return
    _make(load_faiss(), spec, dims)


def covers(spec: str, files: list[str]) -> str:
    """Return the digest of what a file of faiss is made of: the specification and the segments."""
    return blake2b(json.dumps([spec, WIDEN, PROBED, files]).encode(), digest_size=8).hexdigest()


def build_ann(spec: str, rows: Rows, path: Path) -> dict[str, Any]:
    """Train an index of faiss, add all rows, write it, and measure its recall.

    Returns:
        Facts for `search.json`: `spec`, `rows`, `recall@10`, `file`, `size` in bytes.

    Raises:
        DataError: If there are too few rows to train it.
    """
    faiss = load_faiss()
    made = _make(faiss, spec, rows.dims)
    cells = getattr(_inner(faiss, made), "nlist", 0)
    sample = np.random.default_rng(0).permutation(len(rows))[: max(64 * cells, 1 << 16)]
    try:
        made.train(rows.take(np.sort(sample)).astype(np.float32))
        for _, block in rows.blocks(ADDED):
            made.add(block)
    except RuntimeError as error:
        raise DataError(f"--index {spec}: {_reason(error)}") from None
    with atomic_write(path) as partial:
        faiss.write_index(made, str(partial))
    recall = measure_recall(AnnIndex(made), rows)
    return {"spec": spec, "rows": len(rows), "recall@10": recall, "file": path.name, "size": path.stat().st_size}


def measure_recall(ann: "AnnIndex", rows: Rows, k: int = 10) -> float:
    """Measure the share of the k nearest neighbors of some rows that approximate search finds.

    The rows are the queries, and are left out of their neighbors. A row that scores as high as the exact k-th counts
    as found, since duplicates are as good as each other.
    """
    chosen = np.sort(np.random.default_rng(1).permutation(len(rows))[:QUERIES])
    queries = rows.take(chosen).astype(np.float32)
    exact, shares = nearest_rows(rows, queries, k + 1), []
    for own, (of_exact, best), (found, scores) in zip(chosen, exact, ann.search(rows, queries, k + 1), strict=True):
        best = best[of_exact != own][:k]
        if len(best):
            shares.append((scores[found != own][:k] >= best[-1] - 1e-6).sum() / len(best))
    return round(float(np.mean(shares)), 4) if shares else 1.0


class AnnIndex:
    """An index of faiss, whose candidates the mapped rows score.

    Args:
        made: the index of faiss.
    """

    def __init__(self, made: Any) -> None:
        self._made = made
        # An index with a refinement of its own already compares more rows than it returns.
        self._widen = 1 if hasattr(made, "k_factor") else WIDEN

    @classmethod
    def read(cls, path: Path, size: int) -> "AnnIndex":
        """Read the file of an index.

        Raises:
            DataError: If it is missing or damaged, or faiss is not installed.
        """
        faiss = load_faiss()
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path} is missing or damaged: run the same dualenc build-search again")
        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise DataError(
                f"{path} cannot be read ({_reason(error)}): run the same dualenc build-search again"
            ) from None

    def search(self, rows: Rows, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Find about the k rows with the highest scores; see `dualenc.search.exact.nearest_rows`."""
        wanted = min(len(rows), k * self._widen)
        _, found = self._made.search(np.ascontiguousarray(queries, np.float32), wanted)
        return [rescore(rows, query, one[one >= 0], k) for query, one in zip(queries, found, strict=True)]


def _make(faiss: Any, spec: str, dims: int) -> Any:
    """Return an untrained index of faiss.

    Raises:
        DataError: If the specification is unknown.
    """
    try:
        made = faiss.index_factory(dims, spec, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise DataError(
            f"--index {spec!r} is not a specification of faiss for {dims} dimensions ({_reason(error)}): use exact, "
            "auto, or one such as HNSW32 or IVF4096,RaBitQ"
        ) from None
    if hasattr(made, "k_factor"):
        made.k_factor = WIDEN
    if (cells := getattr(_inner(faiss, made), "nlist", 0)) > 1:
        _inner(faiss, made).nprobe = max(1, cells // PROBED)
    return made


def _inner(faiss: Any, made: Any) -> Any:
    """Return the index inside of a refinement or a transformation."""
    for name in ("base_index", "index"):
        if hasattr(made, name):
            return _inner(faiss, faiss.downcast_index(getattr(made, name)))
    return made


def _reason(error: RuntimeError) -> str:
    """Return the message of an error of faiss without the place in its code."""
    return str(error).rpartition(": ")[2].strip() or "unknown"
