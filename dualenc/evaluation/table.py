"""A table of results in a CSV file, to which several commands add rows.

There is a row for each metric of a model on a set, so that new kinds and metrics add rows and not columns, and every
value has its interval next to it.
"""

import csv
import fcntl
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dualenc.utils.decoding import read_text
from dualenc.utils.errors import DataError
from dualenc.utils.files import write_bytes
from dualenc.utils.text import reason

# What a result depends on. Names of models and sets are not among them, since another model may get the same name.
KEY = ("model_fingerprint", "set_fingerprint", "kind", "settings")
COLUMNS = (
    "model", "set", "split", "kind", "metric", "value", "low", "high", "chance", "n", "complete", "settings",
    "model_fingerprint", "set_fingerprint", "dualenc", "date",
)  # fmt: skip


class ResultTable:
    """Table of results in a CSV file.

    The results of a set are added in one piece: after a kill or on a full disk the file is the old or the new one.
    Several processes may add to one file. Other columns and the order of the columns are kept.

    Args:
        path: path of the file, which may be missing; its folder must exist.

    Attributes:
        added: number of results that were added.

    Raises:
        DataError: If the file cannot be read, or is not such a table.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(path))  # a link stays a link to the file that is replaced
        self.added = 0
        self._read()

    def find(self, result: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the result of the same model, set, kind and settings; None if the table lacks it.

        Args:
            result: what identifies the result, see `dualenc.evaluation.results.origin`.
        """
        rows = [row for row in self.rows if _key(row) == _key(_identity(result))]
        if not rows:
            return None
        try:
            metrics = {row["metric"]: float(row["value"]) for row in rows}
            bounds = {row["metric"]: [float(row["low"]), float(row["high"])] for row in rows if row["low"]}
            chance = {row["metric"]: float(row["chance"]) for row in rows if row["chance"]}
            n = int(rows[0]["n"])
        except ValueError as error:
            raise DataError(f"{self.path}: {error} in a row of {rows[0]['model']} on {rows[0]['set']}") from None
        return {
            "model": rows[0]["model"],
            "dataset": rows[0]["set"],
            "kind": rows[0]["kind"],
            "n": n,
            "complete": rows[0]["complete"] == "true",
            "problems": [],
            "metrics": metrics,
            "intervals": bounds,
            "chance": chance,
        }

    def add(self, result: Mapping[str, Any]) -> None:
        """Add the rows of a result, unless the file has them.

        Args:
            result: result of a set with its origin.

        Raises:
            DataError: If the file is not such a table, or cannot be written.
        """
        try:
            with _locked(self.path.parent):
                before, columns = self._read()
                if self.find(result) is not None:
                    return
                text = io.StringIO()
                writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
                if not before:
                    writer.writeheader()
                elif not before.endswith("\n"):
                    text.write("\n")
                rows = list(_rows(result))
                writer.writerows(rows)
                write_bytes(self.path, (before + text.getvalue()).encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {reason(error)}") from None
        self.rows += rows
        self.added += 1

    def _read(self) -> tuple[str, list[str]]:
        """Read the rows, and return the content of the file and its columns."""
        content = read_text(self.path) if self.path.exists() else ""
        try:
            reader = csv.DictReader(io.StringIO(content), restval="", strict=True)
            columns, self.rows = list(reader.fieldnames or COLUMNS), list(reader)
        except csv.Error as error:
            raise DataError(f"{self.path} cannot be read as CSV ({error}): name another file") from None
        if missing := [name for name in COLUMNS if name not in columns]:
            raise DataError(
                f"{self.path} is not a table of results, it lacks the column {missing[0]}: name another file"
            )
        return content, columns


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder inside of the block: the file in it is replaced, so that a lock on the file would be lost."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _identity(result: Mapping[str, Any]) -> dict[str, str]:
    settings = {
        name: " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for name, value in result["settings"].items()
    }
    return {
        "model_fingerprint": result["fingerprint"],
        "set_fingerprint": result["data_fingerprint"],
        "kind": result["kind"],
        "settings": "; ".join(f"{name}={settings[name]}" for name in sorted(settings)),
    }


def _rows(result: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the row of each metric of a result."""
    common = {
        "model": result["model"],
        "set": result["dataset"],
        "split": result["split"],
        "n": str(result["n"]),
        "complete": str(result["complete"]).lower(),
        **_identity(result),
        "dualenc": version("dualenc"),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    for metric, value in result["metrics"].items():
        low, high = result["intervals"].get(metric, ("", ""))
        chance = result["chance"].get(metric, "")
        cells = {"value": value, "low": low, "high": high, "chance": chance}
        yield {**common, "metric": metric, **{name: x if x == "" else repr(float(x)) for name, x in cells.items()}}
