"""Bad samples: written down, counted, and the end of a run where they are too many."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dualenc.utils.errors import DataError

IN_A_ROW = 100  # bad samples one after the other that end a run whatever the budget: nothing good would come
AT_LEAST = 10  # that a budget allows


class Bad(NamedTuple):
    """A sample that could not be used."""

    row: int  # its number in the index
    shard: str
    key: str
    cause: str  # alike for all samples that have it
    detail: str


def causes(bad: Iterable[Bad]) -> str:
    """The most frequent causes, each with an example."""
    bad = list(bad)
    example = {item.cause: item for item in reversed(bad)}
    return "; ".join(
        f"{cause} ({count:,}, such as {example[cause].shard} sample {example[cause].key!r})"
        for cause, count in Counter(item.cause for item in bad).most_common(3)
    )


class Quarantine:
    """The bad samples of a run, each once.

    Args:
        total: samples of the data.
        path: a JSON Lines file to append them to, `{"shard", "key", "cause", "detail"}`. All ranks and earlier parts of
            the run may share it: its lines count.
        budget: share of the samples that may be bad; `AT_LEAST` always may.
    """

    def __init__(self, total: int, path: str | os.PathLike[str] | None = None, budget: float = 0.001) -> None:
        self.most = max(AT_LEAST, int(budget * total))
        self.path = Path(path) if path is not None else None
        self._known: dict[tuple[str, str], Bad] = {}
        self._read = 0  # bytes of the file

    @property
    def known(self) -> list[Bad]:
        """All of them."""
        return list(self._known.values())

    def __len__(self) -> int:
        self._read_on()
        return len(self._known)

    def add(self, bad: Sequence[Bad]) -> None:
        """Takes note of samples.

        Raises:
            DataError: the budget is spent; names the most frequent causes.
        """
        if not bad:
            return
        self._read_on()
        new = {(item.shard, item.key): item for item in map(Bad._make, bad)}
        new = {name: item for name, item in new.items() if name not in self._known}
        self._known |= new
        if self.path is not None and new:
            lines = (
                {"shard": item.shard, "key": item.key, "cause": item.cause, "detail": item.detail}
                for item in new.values()
            )
            text = "".join(json.dumps(line) + "\n" for line in lines)
            try:
                self._append(self.path, text)
            except OSError as error:  # they are counted all the same
                print(f"{self.path} cannot be written: {error.strerror}", file=sys.stderr)
        if len(self) > self.most:
            where = f"; all are named in {self.path}" if self.path is not None else ""
            raise DataError(
                f"{len(self):,} bad samples, more than the {self.most:,} that data.bad_samples allows: "
                f"{causes(self._known.values())}{where}"
            )

    @staticmethod
    def _append(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:  # whole lines in one write: ranks do not mix theirs
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
            if size and file.read(1) != b"\n":  # cut by a kill: what follows must not be lost with it
                text = f"\n{text}"
            file.write(text.encode())

    def _read_on(self) -> None:
        """Takes up what other ranks, or this run before it was stopped, have written."""
        if self.path is None or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # being written
                    break
                self._read += len(line)
                try:
                    item = Bad(-1, **json.loads(line))
                except (ValueError, TypeError):  # cut by a kill
                    continue
                self._known.setdefault((item.shard, item.key), item)
