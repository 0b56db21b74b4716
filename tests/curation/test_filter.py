"""Tests of scores and filters against DuckDB, pandas and brute force."""

import json
import re

import duckdb
import numpy as np
import pandas
import pytest
from helpers import tiny_embedder, write_shards

from dualenc import ShardIndex
from dualenc.cli import main
from dualenc.curation.conditions import Conditions
from dualenc.curation.duplicates import find_duplicates
from dualenc.curation.filter import filter_table
from dualenc.curation.score import score_shards
from dualenc.curation.tables import GLOBAL, Columns, table_path, write_table
from dualenc.utils.errors import DataError


def table_of(folder, columns):
    count = len(columns["clip_score"])
    columns |= {"cluster": np.zeros(count), "duplicate_of": [None] * count, "duplicate_row": np.full(count, -1)}
    columns.setdefault("duplicate_similarity", np.full(count, np.nan))
    write_table(table_path(folder, "0.tar"), columns, {})
    return Columns(folder, ["0.tar"])


def met(columns, text):
    rules = [mask for _, mask in Conditions(text).rules(columns)]
    return np.logical_and.reduce(rules)


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("clip_score > 0.5 and tokens in 3..20", "clip_score > 0.5 and tokens between 3 and 20"),
        ("not (clip_score > 0.5)", "not (clip_score > 0.5)"),
        ("not clip_score > 0.5 or tokens < 5", "not clip_score > 0.5 or tokens < 5"),
        ("0.2 < clip_score <= 0.7", "0.2 < clip_score and clip_score <= 0.7"),
        ("clip_score >= q(0.3) and not tokens in [4, 5]",
         "clip_score >= (select quantile_cont(clip_score, 0.3) from t) and not tokens in (4, 5)"),
        ("q(0.8) > tokens or key == 'k3'", "(select quantile_cont(tokens, 0.8) from t) > tokens or key = 'k3'"),
        ("clip_score > tokens or key not in ['k1', 'k2']", "clip_score > tokens or key not in ('k1', 'k2')"),
        ("not (clip_score > 0.4 and tokens > 30)", "not (clip_score > 0.4 and tokens > 30)"),
        ("clip_score > -0.5", "clip_score > -0.5"),
    ],
)  # fmt: skip
def test_conditions_agree_with_duckdb(tmp_path, seed, text, sql):
    random = np.random.default_rng(seed)
    score = np.where(random.random(300) < 0.2, np.nan, random.normal(0.3, 0.5, 300))
    tokens = np.where(random.random(300) < 0.2, np.nan, random.integers(0, 50, 300))
    columns = table_of(tmp_path, {"key": [f"k{i}" for i in range(300)], "clip_score": score, "tokens": tokens})
    path = table_path(tmp_path, "0.tar")
    query = f"with t as (from '{path}') select key from t where {sql}"
    expected = {key for (key,) in duckdb.sql(query).fetchall()}
    assert set(columns["key"][met(columns, text)]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip_scor > 1", "did you mean clip_score"),
        ("clip_score > q(1.5)", "between 0 and 1"),
        ("clip_score", "is not a condition"),
        ("clip_score > 'a'", "texts with numbers"),
        ("tokens in 9..3", "empty"),
        ("1 < 2", "no column"),
        ("__import__('os').system('x')", "is not understood"),
        ("clip_score >", "not an expression"),
        ("(clip_score > 0) > tokens", "a condition"),
    ],
)
def test_conditions_that_are_refused(tmp_path, text, message):
    columns = table_of(tmp_path, {"key": ["a"], "clip_score": np.ones(1), "tokens": np.ones(1)})
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        met(columns, text)
    assert "\n" not in str(caught.value)


def brute_force(vectors, scores, hashes, cluster):
    """Return the best earlier row and its similarity, by the definition."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rank = {row: (-scores[row] if np.isfinite(scores[row]) else np.inf, row) for row in range(len(scores))}
    found = []
    for row in range(len(scores)):
        before = [i for i in rank if rank[i] < rank[row]]
        same = [i for i in before if hashes[row] and hashes[i] == hashes[row]]
        cell = [i for i in before if cluster[i] == cluster[row] >= 0]
        best = max((float(unit[row] @ unit[i]) for i in cell), default=np.nan)
        found.append(1.0 if same else best)
    return np.array(found)


@pytest.mark.parametrize("cells", [1, 5])
def test_duplicates_agree_with_brute_force(tmp_path, seed, cells):
    random = np.random.default_rng(seed)
    counts = [40, 0, 35, 25]
    vectors = random.standard_normal((100, 6))
    vectors[70:80] = vectors[:10] + 0.01 * vectors[70:80]
    vectors[3] = np.nan
    scores = random.random(100).round(1)
    scores[5] = np.nan
    hashes = np.where(random.random(100) < 0.3, random.integers(1, 6, 100), 0)
    starts = np.cumsum([0, *counts])
    found = find_duplicates(lambda i: vectors[starts[i] : starts[i + 1]], counts, scores, hashes, tmp_path, cells)
    assert len(np.unique(found.cluster[found.cluster >= 0])) <= cells
    assert found.cluster[3] == -1
    assert list(tmp_path.iterdir()) == []
    expected = brute_force(vectors, scores, hashes, found.cluster)
    np.testing.assert_allclose(found.similarity, expected, atol=1e-6)
    assert ((found.row >= 0) == np.isfinite(expected)).all()


@pytest.fixture
def scored(tmp_path, seed):
    write_shards(tmp_path / "shards", [12, 9, 7], seed, captions=2)
    index = ShardIndex.build(str(tmp_path / "shards"))
    embedders = {"a": tiny_embedder(seed), "b": tiny_embedder(seed + 1)}
    return tmp_path, index, embedders


def test_scores_are_cosines_and_parts_equal_one_call(scored):
    folder, index, embedders = scored
    load = embedders.__getitem__
    score_shards(index, folder / "one", ["a", "b"], load, workers=0)
    for number in (1, 0):
        made = score_shards(index, folder / "parts", ["a", "b"], load, part=(number, 2), workers=0, batch_size=64)
        assert bool(made.missing) == (number == 1)
    tables = sorted((folder / "one" / "tables").iterdir())
    for path in tables:
        assert path.read_bytes() == (folder / "parts" / "tables" / path.name).read_bytes()
    table = pandas.concat([pandas.read_parquet(path) for path in tables], ignore_index=True)
    assert list(table["key"]) == [sample.key for sample in index]
    assert set(GLOBAL) <= set(table.columns)
    for name, embedder in zip(("clip_score", "clip_score_2"), embedders.values()):
        for row, sample in enumerate(index):
            image = embedder.embed_images([sample.read(sample.image)])
            texts = embedder.embed_texts(sample.read_json()["captions"])
            assert table[name][row] == pytest.approx(float((image @ texts.T).mean()), abs=1e-5)


def test_what_exists_is_kept_and_another_model_is_refused(scored):
    folder, index, embedders = scored
    out = folder / "out"
    score_shards(index, out, ["a"], embedders.__getitem__, workers=0)
    first = {path: path.stat().st_mtime_ns for path in (out / "embeddings").rglob("*.safetensors")}
    made = score_shards(index, out, ["a", "b"], embedders.__getitem__, workers=0)
    assert made.missing == 0
    assert {path: path.stat().st_mtime_ns for path in first} == first
    with pytest.raises(DataError, match="differs from"):
        score_shards(index, out, ["b"], embedders.__getitem__, workers=0)


def test_filter_selects_for_training_and_finds_leaks(scored, capsys):
    folder, index, embedders = scored
    out = folder / "out"
    score_shards(index, out, ["a"], embedders.__getitem__, workers=0)
    result = filter_table(out, "clip_score > q(0.5)")
    result.save(folder / "kept.select")
    chosen = index.select(str(folder / "kept.select"))
    scores = result.columns["clip_score"]
    assert [s.key for s in chosen] == list(result.columns["key"][scores > np.quantile(scores, 0.5)])
    leaks = filter_table(
        out, against=[str(folder / "shards")], load=embedders.__getitem__, against_similarity=0.999, workers=0
    ).leaks
    assert {leak.row for leak in leaks if leak.equal} == set(range(len(index)))
    record = json.loads((folder / "kept.json").read_text())
    assert record["kept"] == len(chosen)
    with pytest.raises(DataError, match="no sample is kept"):
        filter_table(out, "clip_score > 2").save(folder / "none.select")
    with pytest.raises(SystemExit) as stop:
        main(["filter", str(folder / "shards"), "--where", "tokens > 1", "--out", str(folder / "x.select")])
    assert stop.value.code == 2
    assert "not a folder of scores" in capsys.readouterr().err


def test_tables_of_other_shards_are_refused(scored, seed):
    folder, index, embedders = scored
    score_shards(index, folder / "out", ["a"], embedders.__getitem__, workers=0)
    write_shards(folder / "shards", [12, 9, 8], seed + 1, captions=2)
    ShardIndex.build(str(folder / "shards"), rescan=True)
    with pytest.raises(DataError, match="scores of other shards"):
        filter_table(folder / "out", "tokens > 1")
