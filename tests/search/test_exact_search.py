"""Exact search equals brute force in float64, with ties and duplicates, over any cut into segments."""

import math
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from dualenc.search.exact import TIE, nearest_rows
from dualenc.search.segments import Rows, to_fp32


def brute_force(
    matrix: NDArray[np.float16], query: NDArray[np.float32], k: int, allowed: NDArray[np.bool_]
) -> tuple[list[int], list[float]]:
    """Return the first k rows by their scores, each an exactly rounded sum, and by number where they tie."""
    scores = [math.fsum((row.astype(float) * query.astype(float)).tolist()) for row in matrix]
    order = sorted(np.flatnonzero(allowed).tolist(), key=lambda i: -scores[i])
    level, levels = 0, {}
    for before, i in zip([None, *order], order):
        level += before is not None and scores[before] - scores[i] >= TIE
        levels[i] = level
    first = sorted(order, key=lambda i: (levels[i], i))[:k]
    return first, [scores[i] for i in first]


def draw(rng: np.random.Generator, kind: str, count: int, dims: int) -> NDArray[np.float16]:
    """Return rows (N, E) of unit length: random ones, one vector with its numbers shuffled, or a few vectors often."""
    rows = rng.standard_normal((count, dims))
    if kind == "near":
        rows = rng.permuted(np.tile(rows[:1], (count, 1)), axis=1)
    if kind == "equal":
        rows = rows[rng.integers(max(1, count // 20), size=count)]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def flat(rng: np.random.Generator, dims: int) -> NDArray[np.float32]:
    """Return a query whose scores with shuffled vectors differ by less than the rounding of fp32."""
    return (np.ones((1, dims)) / math.sqrt(dims) + 1e-8 * rng.standard_normal((1, dims))).astype(np.float32)


@pytest.mark.parametrize("kind", ["random", "near", "equal"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_order_is_that_of_float64(kind: str, masked: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    count, dims, k = int(rng.integers(300, 900)), int(rng.integers(3, 70)), int(rng.integers(1, 40))
    matrix = draw(rng, kind, count, dims)
    cuts = np.sort(rng.integers(0, count, 3))
    rows = Rows(np.split(matrix, cuts), dims)
    own = matrix[rng.integers(count, size=2)].astype(np.float32)
    queries = np.concatenate([own, draw(rng, kind, 2, dims).astype(np.float32), flat(rng, dims)])
    allowed = rng.random(count) < 0.3 if masked else np.ones(count, bool)
    monkeypatch.setattr("dualenc.search.exact.BLOCK", 64 * dims)  # several blocks in a segment
    found = nearest_rows(rows, queries, k, allowed if masked else None)
    for query, (got, scores) in zip(queries, found, strict=True):
        wanted, true = brute_force(matrix, query, k, allowed)
        assert got.tolist() == wanted
        np.testing.assert_allclose(scores, true, atol=1e-13)


def test_the_product_in_fp32_alone_would_not_do(seed: int) -> None:
    """The control of the test above: the order of fp32 scores differs from the true one."""
    rng = np.random.default_rng(seed)
    matrix = draw(rng, "near", 900, 60)
    query = flat(rng, 60)[0]
    order = np.argsort(-(matrix.astype(np.float32) @ query), kind="stable")[:40].tolist()
    assert order != brute_force(matrix, query, 40, np.ones(900, bool))[0]


def test_fewer_rows_than_asked_for_and_none_allowed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = draw(rng, "random", 7, 5)
    rows = Rows([matrix[:0], matrix, matrix[:0]], 5)
    query = matrix[:1].astype(np.float32)
    (found, scores), = nearest_rows(rows, query, 50)  # fmt: skip
    assert sorted(found.tolist()) == list(range(7))
    assert (np.diff(scores) <= 0).all()
    (found, _), = nearest_rows(rows, query, 50, np.zeros(7, bool))  # fmt: skip
    assert not len(found)


def test_rows_are_found_and_taken_across_segments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = draw(rng, "random", 50, 4)
    rows = Rows(np.split(matrix, [0, 0, 13, 14, 50]), 4)
    chosen = rng.integers(0, 50, 80)
    assert (rows.take(chosen) == matrix[chosen]).all()
    joined = np.concatenate([block for _, block in rows.blocks(5)])
    assert (joined == matrix.astype(np.float32)).all()
    for row in range(50):
        segment, i = rows.find(row)
        assert (rows.arrays[segment][i] == matrix[row]).all()
    with pytest.raises(IndexError):
        rows.find(50)


def test_every_finite_fp16_number_is_converted_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    assert len(every) == 63488
    assert (to_fp32(every).view(np.int32) == every.astype(np.float32).view(np.int32)).all()


def test_neither_torch_nor_faiss_is_loaded_to_search() -> None:
    code = (
        "import sys, numpy as np\n"
        "from dualenc import Index\nfrom dualenc.search.exact import nearest_rows\n"
        "from dualenc.search.segments import Rows\n"
        "nearest_rows(Rows([np.eye(4, dtype=np.float16)], 4), np.eye(4)[:1], 2)\n"
        "print([name for name in ('torch', 'faiss') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
