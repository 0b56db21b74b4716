"""Queries of an index: combination, conditions, near duplicates, and approximate search next to torch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import encode, pixels, tiny_embedder, write_shards, write_tar
from numpy.typing import NDArray

import dualenc.search.ann as ann_module
from dualenc import DataError, Index, ShardIndex
from dualenc.search.ann import choose_spec
from dualenc.search.build import build_search
from dualenc.search.segments import Contents, Rows, Segment, write_segment


@pytest.fixture
def model(seed: int) -> Any:
    return tiny_embedder(seed)


@pytest.fixture
def index(model: Any, tmp_path: Path, seed: int) -> Index:
    write_shards(tmp_path / "shards", [13, 20, 9], seed)
    build_search(model, [str(tmp_path / "shards")], tmp_path / "out", workers=0)
    return Index.open(tmp_path / "out", model)


def unit(vector: NDArray[Any]) -> NDArray[Any]:
    return vector / np.linalg.norm(vector)


def test_queries_combine_by_weights_and_without_what_to_avoid(index: Index, model: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    picture, weights = pixels(rng), rng.uniform(0.1, 2, 4)
    texts, minus = ["a cat", "red hats"], ["two boats", "a tree"]
    hits = index.search(texts=texts, images=[picture], rows=[5], minus=minus, weights=weights.tolist(), k=7)
    own = unit(index.vectors.take(np.array([5]))[0].astype(float))
    parts = np.array([*model.embed_texts(texts).numpy(), *model.embed_images([picture]).numpy(), own], float)
    query = unit(unit(weights @ parts) - model.embed_texts(minus).numpy().astype(float).mean(0))
    scores = index.vectors.take(np.arange(len(index))).astype(float) @ query
    scores[5] = -np.inf
    assert hits.rows.tolist() == np.argsort(-scores)[:7].tolist()
    np.testing.assert_allclose(hits.scores, np.sort(scores)[::-1][:7], atol=1e-6)
    assert hits.keys == [f"{row:06d}" for row in hits.rows]
    assert [hit.row for hit in hits] == hits.rows.tolist()
    given = index.search(vectors=query[None], rows=[5], k=7)  # embedded already: the row is only left out
    assert given.rows.tolist() == hits.rows.tolist()
    with pytest.raises(DataError, match="cancel"):
        index.search(texts=["a cat"], minus=["a cat"])
    for wrong in ([1.0], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(DataError, match="weights must be 2"):
            index.search(texts=texts, weights=wrong)
    with pytest.raises(DataError, match="needs words"):
        index.search()
    with pytest.raises(DataError, match="row 42 does not exist"):
        index.search(rows=[42])


def test_conditions_are_those_of_select(index: Index, tmp_path: Path, seed: int) -> None:
    width = int(np.random.default_rng(seed).integers(150, 350))
    for condition in (f"width >= {width}", f"number in [3, 5] or width < {width}"):
        wanted = {sample.key for sample in ShardIndex.build(str(tmp_path / "shards")).select(condition)}
        assert set(index.search(texts=["a cat"], where=condition, k=99).keys) == wanted
    with pytest.raises(DataError, match=r"0 of 42 rows.*fields are width"):
        index.search(texts=["a cat"], where="depth > 3")
    with pytest.raises(DataError, match="not understood"):
        index.search(texts=["a cat"], where="width.__class__()")


def test_a_selection_is_read_by_the_trainer(index: Index, tmp_path: Path) -> None:
    hits = index.search(texts=["a cat"], k=5)
    (tmp_path / "keys.txt").write_text("".join(f"{line}\n" for line in hits.select_list()))
    chosen = ShardIndex.build(str(tmp_path / "shards")).select(str(tmp_path / "keys.txt"))
    assert sorted(sample.key for sample in chosen) == sorted(hits.keys)


def test_least_score_and_batches(index: Index) -> None:
    queries = index.encode(["a cat", "two boats"])
    scores, rows = index.search_many(queries, 50)
    assert (rows[:, 42:] == -1).all()
    assert np.isneginf(scores[:, 42:]).all()
    for query, of_query, found in zip(queries, scores, rows, strict=True):
        hits = index.search(vectors=query[None], k=42)
        assert hits.rows.tolist() == found[:42].tolist()
        least = float(of_query[20])
        assert index.search(vectors=query[None], k=42, min_score=least).scores.min() >= least


def test_near_duplicates_collapse(model: Any, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(8):
        picture = encode(pixels(rng, 16, 16))
        samples += [{"__key__": f"{i}-{n}", "png": picture} for n in range(int(rng.integers(1, 30)))]
    write_tar(tmp_path / "a.tar", [samples[i] for i in rng.permutation(len(samples))])
    build_search(model, [str(tmp_path / "a.tar")], tmp_path / "out", workers=0)
    index = Index.open(tmp_path / "out", model)
    hits = index.search(texts=["a cat"], k=3, distinct=0.999999)
    assert len({key.split("-")[0] for key in hits.keys}) == 3
    for hit in hits:  # the best of its duplicates, which are sorted by row
        assert hit.row == min(row for row in range(len(index)) if index.record(row)["key"][0] == hit.key[0])
    assert len(index.search(texts=["a cat"], k=999, distinct=0.999999)) <= 8
    assert len(index.search(texts=["a cat"], k=999)) == len(samples)


def write_index(path: Path, matrix: NDArray[np.float16]) -> Rows:
    records = [{"key": str(i), "captions": [], "fields": {}} for i in range(len(matrix))]
    write_segment(path, "", Contents(matrix, records, np.zeros(len(matrix), np.uint64), []))
    return Rows([Segment(path).embeddings], matrix.shape[1])


def test_the_choice_of_auto() -> None:
    assert [choose_spec("auto", n) for n in (99_999, 100_000, 1_000_000)] == [None, "RaBitQ", "IVF4096,RaBitQ"]
    assert (choose_spec("exact", 10**9), choose_spec("HNSW32", 5)) == (None, "HNSW32")


def test_approximate_search_is_measured_kept_and_renewed(
    model: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "shards", [130, 150], seed)
    source, out = [str(tmp_path / "shards")], tmp_path / "out"
    exact = build_search(model, source, out, workers=0)
    assert exact.about["ann"] is None
    built: list[str] = []
    real = ann_module.build_ann
    monkeypatch.setattr(
        "dualenc.search.build.build_ann", lambda spec, *rest: (built.append(spec), real(spec, *rest))[1]
    )
    made = build_search(model, source, out, index="Flat", workers=0)
    assert made.about["ann"]["recall@10"] == 1
    assert not made.new
    index, before = Index.open(out, model), Index.open(out, model)
    before.about["ann"] = None
    hits, wanted = (one.search(texts=["a cat"], k=9) for one in (index, before))
    assert hits.rows.tolist() == wanted.rows.tolist()
    assert (hits.scores == wanted.scores).all()
    build_search(model, source, out, index="Flat", workers=0)
    assert built == ["Flat"]  # kept, since nothing has changed
    lossy = build_search(model, source, out, index="PQ1x2", workers=0)
    assert lossy.about["ann"]["recall@10"] < 0.95
    assert "warning: more than 5%" in "\n".join(lossy.lines())
    file = out / lossy.about["ann"]["file"]
    assert list(out.glob("*.faiss")) == [file]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="missing or damaged"):
        Index.open(out, model).search(texts=["a cat"])
    build_search(model, source, out, index="PQ1x2", workers=0)
    assert len(Index.open(out, model).search(texts=["a cat"], k=9)) == 9
    with pytest.raises(DataError, match="'nonsense' is not a specification"):
        build_search(model, source, out, index="nonsense", workers=0)
    build_search(model, source, out, workers=0)
    assert not list(out.glob("*.faiss"))


def test_recall_of_one_bit_a_dimension(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((40, 64))
    matrix = centers[rng.integers(40, size=2000)] + 0.7 * rng.standard_normal((2000, 64))
    matrix = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)
    rows = write_index(tmp_path / "a.safetensors", matrix)
    facts = ann_module.build_ann("RaBitQ", rows, tmp_path / "a.faiss")
    assert facts["recall@10"] > 0.95
    assert ann_module.build_ann("PQ2x4", rows, tmp_path / "b.faiss")["recall@10"] < facts["recall@10"]


def test_faiss_that_is_missing_is_named(model: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "shards", [5], seed)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DataError, match=r"pip install 'dualenc\[search\]'"):
        build_search(model, [str(tmp_path / "shards")], tmp_path / "out", index="auto", workers=0)


FORKED = """
import os, sys
import numpy as np
first = sys.argv[1]
if first == "torch":
    import torch
from dualenc.search.ann import load_faiss
faiss = load_faiss()
import torch
torch.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((3000, 32)).astype("float32")
index = faiss.index_factory(32, "RaBitQ", faiss.METRIC_INNER_PRODUCT)
index.train(x)
index.add(x)
index.search(x[:200], 10)
torch.randn(400, 400) @ torch.randn(400, 400)
child = os.fork()
if not child:
    torch.set_num_threads(1)  # as the workers of a DataLoader do
    torch.randn(400, 400) @ torch.randn(400, 400)
    index.search(x[:200], 10)
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.long
@pytest.mark.parametrize("first", ["torch", "faiss"])
def test_faiss_next_to_torch_in_a_forked_worker(first: str) -> None:
    """A worker that hangs is ended by the time limit, which is far above what the work takes."""
    threads = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", FORKED, first], check=True, timeout=120, env=threads)
