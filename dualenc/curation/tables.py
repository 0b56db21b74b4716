"""Folder of a scored list of shards: `scores.json`, a Parquet table and files of embeddings for each shard."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualenc.data.shards.index import ShardIndex
from dualenc.utils.errors import DataError
from dualenc.utils.files import atomic_write
from dualenc.utils.text import did_you_mean

FORMAT = 1
ABOUT = "scores.json"
KEY = b"dualenc"  # key of a table's metadata, a JSON
GLOBAL = ("cluster", "duplicate_of", "duplicate_row", "duplicate_similarity")  # columns that depend on all shards
TEXTS = ("key", "uid", "problem", "duplicate_of")


def parquet() -> Any:
    """Return the module that reads and writes Parquet.

    Raises:
        DataError: If pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError("tables of scores need pyarrow: pip install 'dualenc[parquet]'") from None
    return pyarrow.parquet


def table_path(folder: Path, shard: str) -> Path:
    """Return the path of a shard's table."""
    return folder / "tables" / f"{shard.removesuffix('.tar')}.parquet"


def read_scores(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `scores.json` of a folder.

    Raises:
        DataError: If it is missing, damaged, or of a newer format.
    """
    path = Path(folder) / ABOUT
    try:
        about = json.loads(path.read_text("utf-8"))
        _ = about["models"], dict(about["shards"]), about["urls"]
        if about["format"] > FORMAT:
            raise DataError(f"{path} has format {about['format']}, this dualenc reads up to {FORMAT}: upgrade dualenc")
        return about
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder} is not a folder of scores: make it with dualenc score SHARDS OUT --model M"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} was not written by dualenc score: name another folder") from None


def open_table(path: Path) -> Any:
    """Open a table.

    Raises:
        DataError: If it is missing or damaged.
    """
    module = parquet()
    from pyarrow import ArrowException

    try:
        return module.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: run the same dualenc score again to resume") from None
    except (ArrowException, OSError):
        raise DataError(f"{path} is damaged: remove it, and run the same dualenc score again") from None


def table_facts(path: Path) -> dict[str, Any]:
    """Return the facts with which a table was written: the digest of the shard and the models."""
    return json.loads((open_table(path).schema_arrow.metadata or {}).get(KEY, b"{}"))


def write_table(path: Path, columns: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write a table atomically.

    Args:
        path: path of the table.
        columns: arrays or lists of equal length; None and NaN are nulls.
        facts: facts for `table_facts`.
    """
    module = parquet()
    import pyarrow

    fields, arrays = [], []
    for name, values in columns.items():
        kind = pyarrow.string() if name in TEXTS else None
        is_arrow = isinstance(values, pyarrow.Array | pyarrow.ChunkedArray)
        array = values if is_arrow else pyarrow.array(values, kind, from_pandas=True)
        fields.append(pyarrow.field(name, array.type))
        arrays.append(array)
    schema = pyarrow.schema(fields, {KEY: json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        module.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), partial)


class Columns(Mapping[str, np.ndarray]):
    """Columns of all tables of a folder, in the order of the shards, each read when it is first used.

    Numbers are float arrays with NaN for null, except for hashes and rows, which are int64; texts are object arrays.

    Args:
        folder: folder of `dualenc score`.
        shards: names of the shards in order.

    Raises:
        DataError: If a table is missing or damaged, or the tables are not finished.
    """

    def __init__(self, folder: Path, shards: Sequence[str]) -> None:
        self.folder = folder
        self._tables = [open_table(table_path(folder, name)) for name in shards]
        self._names = list(self._tables[0].schema_arrow.names) if self._tables else []
        self._read: dict[str, np.ndarray] = {}
        if any(not set(GLOBAL) <= set(table.schema_arrow.names) for table in self._tables):
            raise DataError(f"{folder} is not finished: run the same dualenc score again, without --part")

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column.

        Raises:
            DataError: If there is no such column.
        """
        if name not in self._names:
            raise DataError(f"{self.folder} has no column {name!r}: {did_you_mean(name, self._names)}")
        if name not in self._read:
            parts = [_numpy(table.read([name]).column(0), name) for table in self._tables]
            self._read[name] = np.concatenate(parts)
        return self._read[name]

    def known(self, name: str) -> np.ndarray:
        """Return a mask of the rows in which a column is not null."""
        values = self[name]
        if name in TEXTS:
            return np.array([value is not None for value in values], bool)
        return values != 0 if name.endswith("_hash") else ~np.isnan(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _numpy(column: Any, name: str) -> np.ndarray:
    """Return a column of a table as an array."""
    if name in TEXTS:
        return np.array(column.to_pylist(), object)
    if name.endswith("_hash") or name in ("row", "duplicate_row"):
        return column.fill_null(0).to_numpy().astype(np.int64)
    return column.to_numpy().astype(np.float64)


def check_shards(folder: Path, about: Mapping[str, Any], index: ShardIndex) -> None:
    """Check that the shards are those of the tables.

    Raises:
        DataError: If a shard has changed since, or is another one.
    """
    for shard in index.parts:
        known = about["shards"].get(shard.facts["name"])
        if known is None or known["digest"] != shard.facts["digest"]:
            raise DataError(
                f"{folder} has the scores of other shards: {shard} "
                f"{'is not among them' if known is None else 'has changed since'}; score it into a new folder"
            )
