"""Bad samples: replaced by good ones, logged and counted, and the error of a run that has too many of them."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dualenc.data.workers import CurrentSample
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.files import LineLog

MAX_CONSECUTIVE = 100  # consecutive bad samples that end a run whatever its budget, since no good one may follow
MIN_BUDGET = 10  # bad samples that every budget allows


class BadRecord(NamedTuple):
    """A sample that could not be used, and why."""

    row: int  # its number in the index
    shard: str
    key: str
    cause: str  # the same text for all samples with this problem
    detail: str


def causes(bad: Iterable[BadRecord]) -> str:
    """Return the most frequent causes as text, each with its count and an example with its detail."""
    bad = list(bad)
    example = {record.cause: record for record in reversed(bad)}
    found = []
    for cause, count in Counter(record.cause for record in bad).most_common(3):
        one = example[cause]
        detail = f": {one.detail}" if one.detail else ""
        found.append(f"{cause} ({count:,}, such as {one.shard} sample {one.key!r}{detail})")
    return "; ".join(found)


class SampleReader:
    """Reader of single samples that replaces a bad sample by the next good one.

    Args:
        index: the samples: has a length, and its items have a `shard` and a `key`.
        read: called with a sample's number and the sample; returns its content, or raises `BadSample`.
        evaluation: the samples are evaluated on, so that a replacement is marked and does not count.
        replacements: called with a sample's number; returns the range [start, stop) of samples that may replace it.
            Without it, every sample may.

    Attributes:
        current_sample: the sample that this process is reading.
    """

    def __init__(
        self,
        index: Any,
        read: Callable[[int, Any], Any],
        *,
        evaluation: bool,
        replacements: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        self.index, self.read, self.evaluation, self.replacements = index, read, evaluation, replacements
        self.current_sample = CurrentSample()

    def read_next_good(self, row: int, bad: list[BadRecord]) -> tuple[int, Any]:
        """Return the number and the content of the first good sample, beginning at `row`.

        The search wraps around at the end of the range of replacements. In an evaluation, the number of a replacement
        is -1.

        Args:
            row: number of the wanted sample.
            bad: list to which the bad samples before the good one are appended.

        Raises:
            DataError: If `MAX_CONSECUTIVE` consecutive samples are bad.
        """
        start, stop = self.replacements(row) if self.replacements is not None else (0, len(self.index))
        for step in range(MAX_CONSECUTIVE):
            candidate = start + (row - start + step) % (stop - start)
            self.current_sample.start(candidate)
            sample = self.index[candidate]
            try:
                return -1 if step and self.evaluation else candidate, self.read(candidate, sample)
            except BadSample as error:
                bad.append(BadRecord(candidate, sample.shard, sample.key, error.cause, error.detail))
        raise DataError(f"{MAX_CONSECUTIVE} consecutive samples are bad: {causes(bad[-MAX_CONSECUTIVE:])}")

    def locate(self, row: int) -> tuple[str, str]:
        """Return a sample's shard, and its shard with its key, as printed in messages."""
        sample = self.index[row]
        return sample.shard, str(sample)


class BadSampleLog:
    """The bad samples of a run, each counted once.

    Args:
        total: number of samples of the data.
        path: JSON Lines file to append them to, `{"shard", "key", "cause", "detail"}`. All ranks and earlier parts of
            the run may share it, and its lines count.
        budget: share of the samples that may be bad; `MIN_BUDGET` samples always may.
    """

    def __init__(self, total: int, path: str | os.PathLike[str] | None = None, budget: float = 0.001) -> None:
        self.limit = max(MIN_BUDGET, int(budget * total))
        self.log = LineLog(path) if path is not None else None
        self._known: dict[tuple[str, str], BadRecord] = {}
        self._bytes_read = 0  # of the file

    @property
    def known(self) -> list[BadRecord]:
        """The bad samples that were added or read so far."""
        return list(self._known.values())

    def __len__(self) -> int:
        self._read_new_lines()
        return len(self._known)

    def add(self, bad: Sequence[BadRecord]) -> None:
        """Count bad samples, and append the new ones to the file.

        Raises:
            DataError: If there are more than the budget allows; names the most frequent causes.
        """
        if not bad:
            return
        self._read_new_lines()
        new = {(record.shard, record.key): record for record in map(BadRecord._make, bad)}
        new = {name: record for name, record in new.items() if name not in self._known}
        self._known |= new
        if self.log is not None:
            lines = (
                {"shard": record.shard, "key": record.key, "cause": record.cause, "detail": record.detail}
                for record in new.values()
            )
            self.log.append(map(json.dumps, lines))
        if len(self) > self.limit:
            where = f"; all are named in {self.log.path}" if self.log is not None else ""
            raise DataError(
                f"{len(self):,} bad samples, more than the {self.limit:,} that data.bad_samples allows: "
                f"{causes(self._known.values())}{where}"
            )

    def _read_new_lines(self) -> None:
        """Read what other ranks have appended, and what this run wrote before it was stopped."""
        if self.log is None or not self.log.path.exists():
            return
        with open(self.log.path, "rb") as file:
            file.seek(self._bytes_read)
            for line in file:
                if not line.endswith(b"\n"):  # another process is writing this line
                    break
                self._bytes_read += len(line)
                try:
                    record = BadRecord(-1, **json.loads(line))
                except (ValueError, TypeError):  # a killed process has written only a part of this line
                    continue
                self._known.setdefault((record.shard, record.key), record)
