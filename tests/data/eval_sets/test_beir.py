"""Folders in the layout of BEIR: what is read, what is noted, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
from helpers import DATA, needs_data, write_documents

from dualenc.data.eval_sets.beir import open_documents
from dualenc.utils.errors import DataError

CORPUS = [
    {"_id": "a", "title": "Cats", "text": "They sleep."},
    {"_id": "é", "title": "", "text": " "},
    {"_id": "z", "text": "Dogs\nrun."},
    {"_id": "b", "title": None, "text": "Boats."},
]
QUERIES = [{"_id": "2", "text": "what sleeps"}, {"_id": "a", "text": "what runs"}, {"_id": "x", "text": "unjudged"}]
QRELS = ["a\tz\t2", "2\ta\t1", "2\tb\t0", "2\té\t-1"]


def write(folder: Path, corpus: Any = CORPUS, queries: Any = QUERIES, qrels: Any = QRELS, split: str = "dev") -> Path:
    return write_documents(folder, corpus, queries, qrels, split)


def test_a_folder_is_read(tmp_path: Path) -> None:
    found = open_documents(write(tmp_path / "set"))
    assert (found.name, found.split, found.ids) == ("set", "dev", ["é", "z", "b", "a"])  # bytes of UTF-8, backwards
    assert found.texts(range(4)) == ["", "Dogs\nrun.", "Boats.", "Cats They sleep."]
    assert (found.query_ids, found.queries) == (["2", "a"], ["what sleeps", "what runs"])
    assert list(zip(found.query.tolist(), found.document.tolist(), found.gain.tolist())) == [(0, 3, 1), (1, 1, 2)]
    assert found.own_documents.tolist() == [-1, 3]
    assert (found.problems, found.notes) == ([], ["documents without a text, embedded as an empty text: 1"])
    again = open_documents(write(tmp_path / "again" / "set"))
    assert again.fingerprint == found.fingerprint
    other = open_documents(write(tmp_path / "other", corpus=[*CORPUS, {"_id": "c", "text": "c"}]))
    assert other.fingerprint != found.fingerprint


def test_the_split_is_test_or_the_only_one(tmp_path: Path) -> None:
    folder = write(tmp_path)
    write(tmp_path, split="train", qrels=["2\tb\t1"])
    with pytest.raises(DataError, match="has the splits dev, train but no test: name one"):
        open_documents(folder)
    assert open_documents(folder, "train").query_ids == ["2"]
    write(tmp_path, split="test")
    assert open_documents(folder).split == "test"
    with pytest.raises(DataError, match="no split 'devv', only dev, test, train"):
        open_documents(folder, "devv")


def test_judgments_of_what_is_missing_are_counted_and_named(tmp_path: Path) -> None:
    found = open_documents(write(tmp_path, qrels=[*QRELS, "2\tlost\t1", "nobody\ta\t1", "nobody\tlost\t1", "x\ta\t0"]))
    assert {problem.what: problem.names for problem in found.problems} == {
        "judgment of a document that is not in corpus.jsonl": ["lost"],
        "judgment of a query that is not in queries.jsonl": ["nobody", "nobody"],
    }
    assert (found.query.tolist(), found.document.tolist()) == ([0, 0, 1], [-1, 3, 1])  # a lost one stays relevant
    assert found.query_ids == ["2", "a", "x"]
    assert "queries without a relevant document, which count 0 in every metric: 1" in found.notes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"corpus": [*CORPUS, CORPUS[0]]}, r"corpus.jsonl line 5: its _id 'a' is that of line 1, too"),
        ({"queries": [*QUERIES, QUERIES[1]]}, r"queries.jsonl line 4: its _id 'a' is that of line 2, too"),
        ({"corpus": [*CORPUS, "{broken"]}, r"corpus.jsonl line 5: it is not JSON"),
        ({"corpus": [*CORPUS, {"_id": 7, "text": "x"}]}, r"corpus.jsonl line 5: '_id' is not a text"),
        ({"queries": [*QUERIES, {"_id": "7"}]}, r"queries.jsonl line 4: its field 'text' is missing"),
        ({"corpus": [*CORPUS, {"_id": "7", "title": ["x"], "text": "x"}]}, r"line 5: 'title' is not a text"),
        ({"qrels": [*QRELS, "2\tz\t0.5"]}, r"dev.tsv line 6: its score '0.5' is not an integer"),
        ({"qrels": [*QRELS, "2 z 1"]}, r"dev.tsv line 6: its number of columns differs"),
        ({"qrels": [*QRELS, "2\ta\t0"]}, r"dev.tsv line 6 judges query '2' and document 'a' again"),
        ({"qrels": ["d1\ta\t1", "2\td2\t1"]}, r"does not judge any document .* compare its ids, such as 'd1' and 'a'"),
    ],
)
def test_broken_files_are_refused_by_line(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_documents(write(tmp_path, **wrong))


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/dev.tsv"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path)
    (folder / name).unlink()
    with pytest.raises(DataError, match=name.removesuffix("/dev.tsv")):
        open_documents(folder)


@needs_data
def test_cranfield() -> None:
    found = open_documents(DATA / "text" / "beir_cranfield")
    assert (len(found), len(found.queries), found.split, found.problems) == (1400, 150, "dev", [])
    assert found.notes == ["documents without a text, embedded as an empty text: 2"]
