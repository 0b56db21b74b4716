"""The table of results: what is added is found again, and the rest of the file is kept."""

import csv
import errno
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualenc import DataError
from dualenc.evaluation import ResultTable

FORK = multiprocessing.get_context("fork")


def result(seed: int, **changes: Any) -> dict[str, Any]:
    """Return a result with metrics of random values, of which one lacks an interval and one a chance."""
    values = np.random.default_rng(seed).random(8).tolist()
    return {
        "model": f'runs/{seed}, "best"',
        "dataset": "flowers",
        "split": "test",
        "kind": "classification",
        "n": 1200 + seed % 7,
        "complete": True,
        "problems": [],
        "metrics": {"acc1": values[0], "ece": values[1], "ndcg@10": values[2]},
        "intervals": {"acc1": values[3:5], "ndcg@10": values[5:7]},
        "chance": {"acc1": values[7]},
        "fingerprint": f"model {seed}",
        "data_fingerprint": "images",
        "settings": {"prompts": "ab", "shots": [1, 2]},
        **changes,
    }


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_results_are_found_again(tmp_path: Path, seed: int) -> None:
    path, one = tmp_path / "x.csv", result(seed)
    table = ResultTable(path)
    assert table.find(one) is None
    table.add(one)
    table.add(one)
    assert table.added == 1
    assert len(rows(path)) == 3
    found = ResultTable(path).find(one)
    assert found is not None
    assert {name: found[name] for name in found} == {name: one[name] for name in found}
    for change in (
        {"fingerprint": "x"},
        {"data_fingerprint": "x"},
        {"kind": "x"},
        {"settings": {"prompts": "ab", "shots": [1]}},
        {"settings": {}},
    ):
        assert table.find(result(seed, **change)) is None
    assert table.find(result(seed, model="another name", dataset="of the same", split="and more")) is not None


def test_values_of_numpy_are_found_again(tmp_path: Path, seed: int) -> None:
    one = result(seed)
    of_numpy = {name: np.float64(value) for name, value in one["metrics"].items()}
    ResultTable(tmp_path / "x.csv").add({**one, "metrics": of_numpy})  # as a user's own kind may give them
    found = ResultTable(tmp_path / "x.csv").find(one)
    assert found is not None
    assert found["metrics"] == one["metrics"]


def test_the_rest_of_the_file_is_kept(tmp_path: Path, seed: int) -> None:
    """A user has put the columns in another order, added one, and left the last line without its end."""
    path = tmp_path / "x.csv"
    ResultTable(path).add(result(seed))
    given = rows(path)
    names = ["note", *reversed(given[0])]
    lines = [names, *([f"mine, {i}", *[row[name] for name in names[1:]]] for i, row in enumerate(given))]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\r\n").writerows(lines)
    path.write_bytes(path.read_bytes().removesuffix(b"\r\n"))
    before = path.read_bytes()
    other = result(seed + 1)
    ResultTable(path).add(other)
    assert path.read_bytes().startswith(before)
    assert [row["note"] for row in rows(path)] == ["mine, 0", "mine, 1", "mine, 2", "", "", ""]
    assert all((ResultTable(path).find(one) or {})["metrics"] == one["metrics"] for one in (result(seed), other))


def test_several_processes_add_to_one_file(tmp_path: Path, seed: int) -> None:
    """Each adds one result of its own and one that all add; a second table object sees what others have added."""
    path = tmp_path / "x.csv"
    tables = [ResultTable(path) for _ in range(4)]

    def work(number: int) -> None:
        for one in (result(seed), result(seed + 1 + number)):
            tables[number].add(one)

    processes = [FORK.Process(target=work, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(rows(path)) == 3 * 5
    assert len({(row["model"], row["metric"]) for row in rows(path)}) == 3 * 5


def test_a_full_disk_leaves_the_file(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.csv"
    table = ResultTable(path)
    table.add(result(seed))
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"x\.csv cannot be written: No space left"):
        table.add(result(seed + 1))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.csv"]
    table.add(result(seed + 1))  # the failed result is not taken for a known one
    assert len(rows(path)) == 6


@pytest.mark.parametrize("content", ["a,b\n1,2\n", 'model,set\n"x', "model\n"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(DataError, match=r"x\.csv .*: name another file"):
        ResultTable(tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == content


def test_a_damaged_value_is_named(tmp_path: Path, seed: int) -> None:
    one = result(seed)
    ResultTable(tmp_path / "x.csv").add(one)
    text = (tmp_path / "x.csv").read_text()
    (tmp_path / "x.csv").write_text(text.replace(repr(one["metrics"]["acc1"]), "good"))
    with pytest.raises(DataError, match=r"x\.csv: .*'good'.* on flowers"):
        ResultTable(tmp_path / "x.csv").find(one)
