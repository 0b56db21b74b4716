"""Bad samples: replaced, written down, counted, and the end of a run where they are too many."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dualenc.data.workers import Progress
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.files import append_lines

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


class SampleReader:
    """Reads the samples of an index one by one; in place of a bad one it reads the next good one.

    Args:
        index: the samples: a length, and items with a `shard` and a `key`.
        read: gives what a sample holds, from its number and itself; raises BadSample where that is of no use.
        measured: the samples are measured, so that no other counts in place of a bad one.
        alike: gives the first of the samples that may stand for a bad one, and the first after them; absent, all may.

    Attributes:
        progress: the sample that this process is at.
    """

    def __init__(
        self,
        index: Any,
        read: Callable[[int, Any], Any],
        *,
        measured: bool,
        alike: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        self.index, self.read, self.measured, self.alike = index, read, measured, alike
        self.progress = Progress()

    def read_next_good(self, row: int, bad: list[Bad]) -> tuple[int, Any]:
        """Return the number of the first sample from `row` on that can be used, and what it holds.

        The number is -1 where another one stands for a sample that is measured. `bad` takes those that were met before.

        Raises:
            DataError: `IN_A_ROW` samples one after the other are bad.
        """
        start, stop = self.alike(row) if self.alike is not None else (0, len(self.index))
        for step in range(IN_A_ROW):
            near = start + (row - start + step) % (stop - start)
            self.progress.begin(near)
            sample = self.index[near]
            try:
                return -1 if step and self.measured else near, self.read(near, sample)
            except BadSample as error:
                bad.append(Bad(near, sample.shard, sample.key, error.cause, error.detail))
        raise DataError(f"{IN_A_ROW} samples in a row are bad: {causes(bad[-IN_A_ROW:])}")

    def where(self, row: int) -> tuple[str, str]:
        """Return a sample's shard, and its shard and key, for people."""
        sample = self.index[row]
        return sample.shard, str(sample)


class BadSampleLog:
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
            try:
                append_lines(self.path, map(json.dumps, lines))
            except OSError as error:  # they are counted all the same
                print(f"{self.path} cannot be written: {error.strerror}", file=sys.stderr)
        if len(self) > self.most:
            where = f"; all are named in {self.path}" if self.path is not None else ""
            raise DataError(
                f"{len(self):,} bad samples, more than the {self.most:,} that data.bad_samples allows: "
                f"{causes(self._known.values())}{where}"
            )

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
