"""Lines of text files as samples: an index of where lines begin and end, from which a line is read when requested.

The files are plain text (`.txt`), tables whose first line names the columns (`.tsv`, `.csv`), one JSON object on each
line (`.jsonl`), one word on each line (`.conll`), where a sentence is a sample, or SQuAD's JSON (`.json`), where a
question is a sample. In a `.tsv` a tab always ends a field, and quotes have no meaning. A `.csv` follows RFC 4180, so
that a quoted field may hold line ends. All files are UTF-8, with or without a byte-order mark; lines end with "\\n" or
"\\r\\n". Empty lines are skipped.
"""

import hashlib
import json
import os
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
from dualenc.data.text.formats import CHUNK, FORMATS, LONGEST, BadFields, Bounds
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.utils.decoding import TextError, decode_text, is_blank, mark_size
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.files import stand_in
from dualenc.utils.urls import is_remote, shown

KINDS = TEXTS.endings
AT_ONCE = 256  # lines to tokenize at a time when lines are cut


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
    entries: np.ndarray | None = None  # see `Bounds.entries`

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
        if self.entries is not None:
            return f"{name} from byte {self.starts[i]} question {self.entries[i] + 1}"
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
        bounds = Bounds(self.starts, self.sizes, self.numbers, self.entries).take(chosen)
        return replace(self, starts=bounds.starts, sizes=bounds.stops, numbers=bounds.numbers, entries=bounds.entries)


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
            BadSample: If the line is not UTF-8, has NULs, is larger than `LONGEST`, or is not valid in its format.
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
        form, entries = FORMATS[self.source.kind], self.source.entries
        try:
            fields = form.fields(text, self.source.columns)
            return fields if entries is None else form.entry(fields, int(entries[self.number]))
        except BadFields as error:
            place = () if error.line is None else (f"line {self.source.numbers[self.number] + error.line}",)
            raise BadSample(self, error.cause, ": ".join([*place, error.detail])) from None

    def at_word(self, i: int) -> str:
        """Return the place of word i for messages: its own line, where the format has one a word."""
        if not FORMATS[self.source.kind].word_lines:
            return str(self)
        return f"{self.shard} line {self.source.numbers[self.number] + i}"


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
            digest.update(b"" if part.entries is None else part.entries.astype("<i8").data)
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
    form = FORMATS[kind]
    try:
        starts, stops, numbers, entries = form.samples(whole, Bounds(starts, stops, np.arange(1, len(starts) + 1)))
    except BadFields as error:
        raise DataError(f"{path} cannot be read: {error.cause} ({error.detail})") from None
    if not len(starts):
        raise DataError(f"{path} has only empty lines")
    columns = form.columns(path, whole[starts[0] : stops[0]].tobytes())
    file = TextFile(path, status.st_size, status.st_mtime_ns, digest, columns, starts, stops - starts, numbers, entries)
    if not form.header:
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
