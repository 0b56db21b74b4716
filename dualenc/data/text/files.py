"""Lines of text files as samples: an index of where lines begin and end, from which a line is read when requested.

The files are plain text (`.txt`), tables whose first line names the columns (`.tsv`, `.csv`), or one JSON object on
each line (`.jsonl`). In a `.tsv` a tab always ends a field, and quotes have no meaning. A `.csv` follows RFC 4180, so
that a quoted field may hold line ends. All files are UTF-8, with or without a byte-order mark; lines end with "\\n" or
"\\r\\n". Empty lines are skipped.
"""

import csv
import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from dualenc.data.shards.patterns import TEXTS, Patterns, find_files, parts_of, require_all
from dualenc.data.shards.shard import content_hash, open_cached
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.utils.decoding import TextError, decode_text, is_blank, mark_size
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.files import stand_in
from dualenc.utils.urls import is_remote, shown

KINDS = TEXTS.endings
TEXT = "text"  # name of the only column of plain text
_INVISIBLE_HEADS = (0x7F, 0xC2, 0xCD, 0xD8, 0xE1, 0xE2, 0xE3, 0xEF, 0xF0, 0xF3)  # see `dualenc.utils.decoding.is_blank`
CHUNK = 1 << 24  # bytes to scan at a time
AT_ONCE = 256  # lines to tokenize at a time when lines are cut
LONGEST = 1 << 24  # largest line to read, in bytes
# Beyond the default limit of 128 KiB the csv module would split a field into records.
csv.field_size_limit(max(csv.field_size_limit(), LONGEST))


@dataclass(frozen=True, eq=False)
class TextFile:
    """Index of the lines of one file."""

    url: str  # local path; named as in `Shard`, which has the same interface
    size: int  # of the file, in bytes
    mtime: int  # time of the last change, in ns
    digest: str  # hash of the content
    columns: tuple[str, ...]  # for a `.jsonl` the fields of its first line
    starts: np.ndarray  # (S,) int64, first byte of each sample
    sizes: np.ndarray  # (S,) int64, bytes of each sample, without the line end
    numbers: np.ndarray  # (S,) int64, number of the line in which each sample begins, from 1

    def __len__(self) -> int:
        return len(self.starts)

    def __str__(self) -> str:
        return self.url

    @property
    def kind(self) -> str:
        """The suffix of the file's name, with the dot."""
        return os.path.splitext(self.url)[1].lower()

    def key(self, i: int) -> str:
        """Return the name of sample i for messages: its line."""
        name = f"line {self.numbers[i]}"
        if i and self.numbers[i] == self.numbers[i - 1]:  # a further piece of the same line
            name += f" from byte {self.starts[i]}"
        return name

    def bytes(self, i: int) -> bytes:
        """Return the bytes of sample i.

        Raises:
            DataError: If the file has been changed or removed.
        """
        try:
            status = os.stat(self.url)
            if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime):
                raise DataError(f"{self.url} has changed since it was indexed: start the run again")
            return os.pread(open_cached(self.url, status.st_ino).descriptor, int(self.sizes[i]), int(self.starts[i]))
        except OSError as error:
            raise DataError(f"{self.url} cannot be read: {error.strerror}") from None

    def take(self, chosen: np.ndarray) -> "TextFile":
        """Select samples by a mask (S,)."""
        return replace(self, starts=self.starts[chosen], sizes=self.sizes[chosen], numbers=self.numbers[chosen])


@dataclass(frozen=True)
class Line:
    """One sample: a line of a file, or a piece of a line."""

    source: TextFile
    number: int  # index among the file's samples

    @property
    def shard(self) -> str:
        """The path of the file; named as in `Sample`, so that messages treat both alike."""
        return self.source.url

    @property
    def key(self) -> str:
        """The name of the line for messages."""
        return self.source.key(self.number)

    def __str__(self) -> str:
        return f"{self.shard} {self.key}"

    def read(self) -> dict[str, Any]:
        """Return the fields of the line by column; plain text has one.

        Raises:
            BadSample: If the line is not UTF-8, has NULs, is not a JSON object, is wrongly quoted, has another number
                of fields than the header, or is larger than `LONGEST`.
            DataError: If the file has been changed or removed.
        """
        size = int(self.source.sizes[self.number])
        if size > LONGEST:
            raise BadSample(self, "it is too large", f"{size:,} bytes, at most {LONGEST:,}")
        data = self.source.bytes(self.number)  # outside of the `try`, because its DataError is a ValueError, too
        try:
            text = decode_text(data, part=True)
        except TextError as error:
            raise BadSample(self, f"it {error.cause}", error.detail) from None
        kind, columns = self.source.kind, self.source.columns
        if kind == ".txt":
            return {TEXT: text}
        if kind == ".jsonl":
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadSample(self, "it is not JSON", str(error)) from None
            if not isinstance(found, dict):
                raise BadSample(self, "it is not a JSON object")
            return found
        try:
            fields = text.split("\t") if kind == ".tsv" else _record(text)
        except csv.Error as error:
            raise BadSample(self, "its quotes are not valid in CSV", str(error)) from None
        if len(fields) != len(columns):
            raise BadSample(
                self, "its number of columns differs from the header's", f"{len(fields)}, expected {len(columns)}"
            )
        return dict(zip(columns, fields))


def _record(text: str) -> list[str]:
    """Return the fields of one record of a CSV."""
    return next(csv.reader([text], strict=True), [])


def expand_files(files: Patterns) -> list[str]:
    """Return the paths of text files that are named by patterns; see `dualenc.data.shards.patterns.find_files`.

    Raises:
        DataError: If a part is a URL, matches no file or names a file of another kind, or two parts name one file.
    """
    for part in parts_of(files):
        if is_remote(part) or part.startswith("pipe:"):
            raise DataError(f"{shown(part)!r}: text is read from local files only: copy it to a local file")
    paths = require_all(*find_files(files, TEXTS), TEXTS)
    for path in paths:
        if not path.lower().endswith(KINDS):
            raise DataError(f"{path} must be one of {', '.join(KINDS)}")
    return paths


class TextIndex:
    """Index of the lines of several files, or of some of them; made by `build`.

    Args:
        parts: indexes of single files.
    """

    def __init__(self, parts: Sequence[TextFile]) -> None:
        self.parts = list(parts)
        self.starts = [0, *np.cumsum([len(part) for part in self.parts]).tolist()]

    @classmethod
    def build(cls, files: Patterns, columns: Sequence[str] = ()) -> "TextIndex":
        """Build the index of files, each of which is scanned once.

        Args:
            files: see `expand_files`.
            columns: columns that each file must have.

        Raises:
            DataError: If a file is missing, empty or unreadable, or lacks a column; the message names it.
        """
        parts = [_scan(path) for path in expand_files(files)]
        for part in parts:
            for name in columns:
                if name not in part.columns:
                    raise DataError(f"{part} has no column {name!r}, only {', '.join(map(repr, part.columns))}")
        return cls(parts)

    @classmethod
    def join(cls, indexes: Sequence["TextIndex"]) -> "TextIndex":
        """Join the samples of several indexes, one index after the other."""
        return cls([part for index in indexes for part in index.parts])

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> Line:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = bisect_right(self.starts, i) - 1
        return Line(self.parts[number], int(i) - self.starts[number])

    def __iter__(self) -> Iterator[Line]:
        return (self[i] for i in range(len(self)))

    @property
    def shards(self) -> list[str]:
        """The paths of the files."""
        return list(map(str, self.parts))

    def counts(self) -> list[int]:
        """Return the number of samples in each file."""
        return [len(part) for part in self.parts]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the files' names without folders, their content, and the choice of samples."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self.parts:
            digest.update(json.dumps([os.path.basename(part.url), part.digest, len(part)]).encode())
            digest.update(part.starts.astype("<i8").data)
            digest.update(part.sizes.astype("<i8").data)
        return digest.hexdigest()

    def split(self, share: float) -> tuple["TextIndex", "TextIndex"]:
        """Split the samples by content into two parts, about `1 - share` and `share` of them.

        The part of a line depends only on its bytes, so that equal lines are in the same part, and added lines do not
        move others.

        Raises:
            DataError: If one of the parts would be empty.
        """
        limit = min(int(share * 2**64), 2**64 - 1)
        held_out = [
            np.array([content_hash(part.bytes(i)) < limit for i in range(len(part))], dtype=bool) for part in self.parts
        ]
        number = sum(int(mask.sum()) for mask in held_out)
        if not 0 < number < len(self):
            raise DataError(
                f"val: {share} of {len(self)} lines of {self.parts[0]} leaves one side empty: set another share, or "
                "files"
            )
        pairs = list(zip(self.parts, held_out))
        return TextIndex([part.take(~mask) for part, mask in pairs]), TextIndex([part.take(m) for part, m in pairs])

    def cut(self, tokenizer: Tokenizer) -> "TextIndex":
        """Cut lines of plain text that are longer than the context into several samples.

        Only white space is left out, and pieces end between words where that is possible. Lines of tables and of
        `.jsonl` stay whole.
        """
        return TextIndex([_cut(part, tokenizer) if part.kind == ".txt" else part for part in self.parts])


def _scan(path: str) -> TextFile:
    """Read a file once, and return the index of its lines that are not empty.

    Raises:
        DataError: If the file or its header cannot be read, or it has no lines.
    """
    kind = os.path.splitext(path)[1].lower()
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not status.st_size:
                raise DataError(f"{path} is empty")
            whole = np.memmap(file, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if what := stand_in(whole[:1024].tobytes()):
        raise DataError(f"{path} is {what}")
    digest, starts, stops = _lines(whole)
    try:
        starts[0] = mark_size(whole[:64].tobytes())
    except TextError as error:
        raise DataError(f"{path} {error}") from None
    numbers = np.arange(1, len(starts) + 1)
    if kind == ".csv":
        starts, stops, numbers = _records(whole, starts, stops)
    stops = stops - ((stops > starts) & (whole[stops - 1] == 13))
    full = _full(whole, starts, stops, kind)
    starts, sizes, numbers = starts[full], (stops - starts)[full], numbers[full]
    if not len(starts):
        raise DataError(f"{path} has only empty lines")
    columns = _columns(path, kind, whole[starts[0] : starts[0] + sizes[0]].tobytes())
    file = TextFile(path, status.st_size, status.st_mtime_ns, digest, columns, starts, sizes, numbers)
    if kind in (".txt", ".jsonl"):
        return file
    if len(starts) == 1:
        raise DataError(f"{path} has a header and no lines")
    return file.take(np.arange(len(starts)) > 0)


def _lines(whole: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the digest of a file's bytes (N,), and the bytes at which its lines start and stop (L,)."""
    digest = hashlib.blake2b(digest_size=16)
    ends = []
    for at in range(0, len(whole), CHUNK):
        digest.update(whole[at : at + CHUNK].data)
        ends.append(np.flatnonzero(whole[at : at + CHUNK] == 10) + at)  # 10 is "\n".
    stops = np.concatenate([*ends, [len(whole)]] if whole[-1] != 10 else ends)
    starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)
    return digest.hexdigest(), starts, stops


def _full(whole: np.ndarray, starts: np.ndarray, stops: np.ndarray, kind: str) -> np.ndarray:
    """Return which lines (L,) hold more than blanks; tabs of a table and records of a CSV are not blanks."""
    full = stops > starts
    if kind == ".csv":
        return full
    head = whole[np.minimum(starts, len(whole) - 1)]
    # Invisible characters beyond ASCII begin with one of these bytes of UTF-8. A line of up to 64 bytes may consist of
    # them.
    maybe_blank = np.isin(head, _INVISIBLE_HEADS) & (stops - starts <= 64)
    for i in np.flatnonzero(full & ((head <= 32) | maybe_blank)).tolist():
        line = whole[starts[i] : stops[i]].tobytes()
        full[i] = bool(line.strip(b" ")) if kind == ".tsv" else not _is_blank(line)
    return full


def _is_blank(line: bytes) -> bool:
    """Return whether a line is a text of which nothing is visible."""
    with suppress(TextError):
        return is_blank(decode_text(line, part=True))
    return False


def _columns(path: str, kind: str, first: bytes) -> tuple[str, ...]:
    """Return the columns that the first line of a file names.

    Raises:
        DataError: If the line cannot be read, or names a column twice.
    """
    if kind == ".txt":
        return (TEXT,)
    try:
        text = decode_text(first, part=True)
    except TextError as error:
        raise DataError(f"{path}: its first line {error}: convert the file to UTF-8") from None
    if kind == ".jsonl":
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise DataError(f"{path}: every line must be a JSON object, but the first is not")
        return tuple(fields)
    try:
        columns = text.split("\t") if kind == ".tsv" else _record(text)
    except csv.Error as error:
        raise DataError(f"{path}: the header cannot be read ({error})") from None
    if twice := [name for i, name in enumerate(columns) if name in columns[:i]]:
        raise DataError(f"{path}: two columns are called {twice[0]!r}; its first line must name the columns")
    return tuple(columns)


def _records(whole: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, ...]:
    """Find the bounds of the records of a CSV, and their line numbers: a quoted field may hold line ends.

    The csv module finds them. It gets each byte as one character, which does no harm, since all characters that
    have a meaning in CSV are ASCII. A record that it cannot read, such as one whose quotes do not end, is cut to
    its first line, which is a bad sample when it is read; the next record begins in the next line.

    Args:
        whole: bytes of the file.
        starts: (L,) first byte of each line.
        stops: (L,) end of each line.

    Returns:
        Starts (R,), stops (R,) and line numbers (R,) of the records.
    """
    # Without quotes (34 is the byte of a quote) every line is a record.
    if not any((whole[at : at + CHUNK] == 34).any() for at in range(0, len(whole), CHUNK)):
        return starts, stops, np.arange(1, len(starts) + 1)
    at, line = 0, 0  # number of lines that the reader has taken, and first line of the current record

    def lines() -> Iterator[str]:
        nonlocal at
        while at < len(starts):
            at += 1
            yield whole[starts[at - 1] : stops[at - 1]].tobytes().decode("latin-1") + "\n"

    first, last = array("q"), array("q")
    reader = csv.reader(lines(), strict=True)
    while line < len(starts):
        try:
            next(reader)
        except StopIteration:
            break
        except csv.Error:
            at = line + 1
            reader = csv.reader(lines(), strict=True)
        first.append(line)
        last.append(at - 1)
        line = at
    begin = np.frombuffer(first, np.int64)
    return starts[begin], stops[np.frombuffer(last, np.int64)], begin + 1


def _cut(file: TextFile, tokenizer: Tokenizer) -> TextFile:
    """Cut the lines that have too many tokens for the context; see `TextIndex.cut`.

    Most lines are too short to be tokenized. A byte gives at most one token, or at most six where normalization expands
    a character that is not ASCII. One more token may come first, such as the prefix of SentencePiece.
    """
    room = tokenizer.context_length - tokenizer.backend.num_special_tokens_to_add(False) - 1
    long = np.flatnonzero(file.sizes * 6 > room).tolist()
    cuts: dict[int, list[tuple[int, int]]] = {}  # bounds of the pieces of each line that is cut, in bytes
    for batch in (long[i : i + AT_ONCE] for i in range(0, len(long), AT_ONCE)):
        texts: dict[int, str] = {}
        for i in batch:
            if file.sizes[i] > LONGEST:  # It becomes a bad sample when it is read.
                continue
            data = file.bytes(i)
            if len(data) > room or not data.isascii():
                with suppress(TextError):  # It becomes a bad sample when it is read.
                    texts[i] = decode_text(data, part=True)
        for (i, text), cut_points in zip(texts.items(), tokenizer.cut(list(texts.values()))):
            if len(cut_points) > 1:
                pieces = [text[a:b] for a, b in pairwise([0, *cut_points])]
                bounds = pairwise(np.cumsum([0, *(len(piece.encode()) for piece in pieces)]).tolist())
                cuts[i] = [bound for bound, piece in zip(bounds, pieces) if not is_blank(piece)]
    if not cuts:
        return file
    counts = np.ones(len(file), dtype=np.int64)
    counts[list(cuts)] = [len(pieces) for pieces in cuts.values()]
    first = np.cumsum(counts) - counts
    starts, sizes = np.repeat(file.starts, counts), np.repeat(file.sizes, counts)
    for i, pieces in cuts.items():
        here = slice(first[i], first[i] + counts[i])
        begins, ends = np.array(pieces, dtype=np.int64).reshape(-1, 2).T
        starts[here] += begins
        sizes[here] = ends - begins
    return replace(file, starts=starts, sizes=sizes, numbers=np.repeat(file.numbers, counts))
