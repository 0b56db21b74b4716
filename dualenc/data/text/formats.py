"""Formats of text files, one class a format: where the samples of a file are, and which fields a sample has."""

import csv
import json
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dualenc.utils.decoding import TextError, decode_text, is_blank
from dualenc.utils.errors import DataError

TEXT = "text"  # name of the only column of plain text
WORDS, TAGS = "tokens", "tags"  # fields of a sentence, which a JSON object names in the same way
DOCUMENT = b"-DOCSTART-"  # begins a line between two documents
_COLUMN = re.compile(r"[^ \t\r]+")
CHUNK = 1 << 24  # bytes to scan at a time
LONGEST = 1 << 24  # largest sample to read, in bytes
_INVISIBLE_HEADS = (0x7F, 0xC2, 0xCD, 0xD8, 0xE1, 0xE2, 0xE3, 0xEF, 0xF0, 0xF3)  # see `dualenc.utils.decoding.is_blank`
_DECODER = json.JSONDecoder()
_JSON_BLANKS = (" ", "\t", "\n", "\r")
# Beyond the default limit of 128 KiB the csv module would split a field into records.
csv.field_size_limit(max(csv.field_size_limit(), LONGEST))


class Bounds(NamedTuple):
    """The places of S samples in a file."""

    starts: np.ndarray  # (S,) int64, first byte
    stops: np.ndarray  # (S,) int64, end, without the line end
    numbers: np.ndarray  # (S,) int64, number of the line in which a sample begins, from 1
    entries: np.ndarray | None = None  # (S,) int64, number of each sample in its bytes, where samples share them

    def take(self, chosen: np.ndarray) -> "Bounds":
        """Select samples by a mask (S,)."""
        entries = None if self.entries is None else self.entries[chosen]
        return Bounds(self.starts[chosen], self.stops[chosen], self.numbers[chosen], entries)


class BadFields(ValueError):
    """Content of a sample that its format refuses.

    Args:
        cause: text that completes "the sample is left out, since ...", equal for all samples with the fault.
        detail: what is special about this sample.
        line: number of lines of the sample before the one with the fault; None for the sample as a whole.
    """

    def __init__(self, cause: str, detail: str = "", line: int | None = None) -> None:
        super().__init__(cause)
        self.cause, self.detail, self.line = cause, detail, line


class TextFormat(ABC):
    """A format of text files.

    Attributes:
        header: the first sample names the columns.
        word_lines: each word of a sample has a line of its own.
    """

    header: ClassVar[bool] = False
    word_lines: ClassVar[bool] = False

    def samples(self, whole: np.ndarray, lines: Bounds) -> Bounds:
        """Return the places of the samples; by default lines that are not blank.

        Args:
            whole: bytes of the file.
            lines: places of all its lines.

        Raises:
            BadFields: If samples cannot be found.
        """
        lines = _without_line_ends(whole, lines)
        return lines.take(self._full(whole, lines))

    def _full(self, whole: np.ndarray, lines: Bounds) -> np.ndarray:
        """Return which lines (L,) hold more than blanks."""
        starts, stops = lines.starts, lines.stops
        full = stops > starts
        head = whole[np.minimum(starts, len(whole) - 1)]
        # Invisible characters beyond ASCII begin with one of these bytes of UTF-8. A line of up to 64 bytes may consist
        # of them.
        maybe_blank = np.isin(head, _INVISIBLE_HEADS) & (stops - starts <= 64)
        for i in np.flatnonzero(full & ((head <= 32) | maybe_blank)).tolist():
            full[i] = not self._blank(whole[starts[i] : stops[i]].tobytes())
        return full

    def _blank(self, line: bytes) -> bool:
        """Return whether a line is a text of which nothing is visible."""
        with suppress(TextError):
            return is_blank(decode_text(line, part=True))
        return False

    @abstractmethod
    def columns(self, path: str, first: bytes) -> tuple[str, ...]:
        """Return the columns of a file.

        Args:
            path: the file, for the error.
            first: bytes of its first sample.

        Raises:
            DataError: If the sample cannot be read, or names a column twice.
        """

    @abstractmethod
    def fields(self, text: str, columns: tuple[str, ...]) -> dict[str, Any]:
        """Return the fields of a sample by column.

        Args:
            text: the sample.
            columns: the columns of the file.

        Raises:
            BadFields: If the sample is not valid.
        """

    def entry(self, fields: dict[str, Any], number: int) -> dict[str, Any]:
        """Return the fields of one of the samples that share their bytes; see `Bounds.entries`.

        Args:
            fields: what `fields` returned.
            number: number of the sample.

        Raises:
            BadFields: If the sample is not valid.
        """
        raise NotImplementedError


class PlainText(TextFormat):
    """A text on each line."""

    def columns(self, path: str, first: bytes) -> tuple[str, ...]:
        """See `TextFormat.columns`."""
        return (TEXT,)

    def fields(self, text: str, columns: tuple[str, ...]) -> dict[str, Any]:
        """See `TextFormat.fields`."""
        return {TEXT: text}


class JsonLines(TextFormat):
    """A JSON object on each line; the columns are the fields of the first."""

    def columns(self, path: str, first: bytes) -> tuple[str, ...]:
        """See `TextFormat.columns`."""
        try:
            return tuple(self.fields(_decoded(path, first), ()))
        except BadFields:
            raise DataError(f"{path}: every line must be a JSON object, but the first is not") from None

    def fields(self, text: str, columns: tuple[str, ...]) -> dict[str, Any]:
        """See `TextFormat.fields`."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadFields("it is not JSON", str(error)) from None
        if not isinstance(found, dict):
            raise BadFields("it is not a JSON object")
        return found


class SquadJson(JsonLines):
    """SQuAD's JSON: a sample is a question, and shares the bytes of its paragraph with the others.

    So only one paragraph is decoded to read a sample, and the questions of a paragraph stay together when samples are
    split by their bytes.
    """

    def samples(self, whole: np.ndarray, lines: Bounds) -> Bounds:
        """See `TextFormat.samples`."""
        starts, stops, entries = array("q"), array("q"), array("q")
        try:
            for start, stop, paragraph in _paragraphs(whole, int(lines.starts[0])):
                questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
                # A paragraph without a list of questions is one bad sample when it is read.
                count = len(questions) if isinstance(questions, list) else 1
                starts.extend([start] * count)
                stops.extend([stop] * count)
                entries.extend(range(count))
        except (ValueError, RecursionError) as error:
            cause = "it is not the JSON of SQuAD: give a file with a JSON object on each line the ending .jsonl"
            raise BadFields(cause, str(error)) from None
        if not starts:
            raise BadFields("it is not the JSON of SQuAD", 'its "data" has no "paragraphs" with questions in "qas"')
        begin, end, numbers = (np.frombuffer(part, np.int64) for part in (starts, stops, entries))
        return Bounds(begin, end, np.searchsorted(lines.starts, begin, side="right"), numbers)

    def columns(self, path: str, first: bytes) -> tuple[str, ...]:
        """See `TextFormat.columns`."""
        return ("id", "question", "context", "answers", "is_impossible")

    def entry(self, fields: dict[str, Any], number: int) -> dict[str, Any]:
        """Return the fields of a question, its paragraph's context included; see `TextFormat.entry`."""
        questions = fields.get("qas")
        if not isinstance(questions, list) or not isinstance(questions[number], dict):
            raise BadFields('its paragraph does not have a list of questions, "qas"')
        return {**{name: value for name, value in fields.items() if name == "context"}, **questions[number]}


class Tabbed(TextFormat):
    """A table whose fields end at tabs; quotes have no meaning."""

    header = True

    def _blank(self, line: bytes) -> bool:
        """Return whether a line has blanks only; a tab is a field's end."""
        return not line.strip(b" ")

    def columns(self, path: str, first: bytes) -> tuple[str, ...]:
        """See `TextFormat.columns`."""
        try:
            columns = self.split(_decoded(path, first))
        except csv.Error as error:
            raise DataError(f"{path}: the header cannot be read ({error})") from None
        if twice := [name for i, name in enumerate(columns) if name in columns[:i]]:
            raise DataError(f"{path}: two columns are called {twice[0]!r}; its first line must name the columns")
        return tuple(columns)

    def fields(self, text: str, columns: tuple[str, ...]) -> dict[str, Any]:
        """See `TextFormat.fields`."""
        try:
            fields = self.split(text)
        except csv.Error as error:
            raise BadFields("its quotes are not valid in CSV", str(error)) from None
        if len(fields) != len(columns):
            raise BadFields(
                "its number of columns differs from the header's", f"{len(fields)}, expected {len(columns)}"
            )
        return dict(zip(columns, fields))

    def split(self, record: str) -> list[str]:
        """Return the fields of a record."""
        return record.split("\t")


class CommaSeparated(Tabbed):
    """A table by RFC 4180, in which a quoted field may hold line ends."""

    def samples(self, whole: np.ndarray, lines: Bounds) -> Bounds:
        """See `TextFormat.samples`."""
        records = _without_line_ends(whole, _records(whole, lines))
        return records.take(records.stops > records.starts)

    def split(self, record: str) -> list[str]:
        """See `Tabbed.split`."""
        return next(csv.reader([record], strict=True), [])


class WordColumns(TextFormat):
    """A word on each line, with columns that blanks or tabs separate, as in the tasks of CoNLL.

    The first column is the word and the last one its tag; with one column the words do not have tags. Blank lines, and
    lines that begin with `-DOCSTART-`, stand between the sentences, each of which is a sample.
    """

    word_lines = True

    def samples(self, whole: np.ndarray, lines: Bounds) -> Bounds:
        """See `TextFormat.samples`."""
        lines = _without_line_ends(whole, lines)
        full = self._full(whole, lines)
        # 45 is the byte of "-"; few words begin with it.
        for i in np.flatnonzero(full & (whole[np.minimum(lines.starts, len(whole) - 1)] == 45)).tolist():
            full[i] = not whole[lines.starts[i] : lines.stops[i]].tobytes().startswith(DOCUMENT)
        before, after = np.r_[False, full[:-1]], np.r_[full[1:], False]
        first, last = full & ~before, full & ~after
        return Bounds(lines.starts[first], lines.stops[last], lines.numbers[first])

    def _blank(self, line: bytes) -> bool:
        """Return whether a line has blanks and tabs only; an invisible character may be a word."""
        return not line.strip(b" \t")

    def columns(self, path: str, first: bytes) -> tuple[str, ...]:
        """See `TextFormat.columns`."""
        try:
            return tuple(self.fields(_decoded(path, first), ()))
        except BadFields:  # The first sentence becomes a bad sample when it is read.
            return (WORDS, TAGS)

    def fields(self, text: str, columns: tuple[str, ...]) -> dict[str, Any]:
        """See `TextFormat.fields`."""
        rows = [_COLUMN.findall(line) for line in text.split("\n")]
        for i, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise BadFields(
                    "its lines have different numbers of columns", f"{len(row)}, not {len(rows[0])} as the first", i
                )
        words = {WORDS: [row[0] for row in rows]}
        return words | ({TAGS: [row[-1] for row in rows]} if len(rows[0]) > 1 else {})


FORMATS: dict[str, TextFormat] = {
    ".txt": PlainText(),
    ".tsv": Tabbed(),
    ".csv": CommaSeparated(),
    ".jsonl": JsonLines(),
    ".conll": WordColumns(),
    ".json": SquadJson(),
}  # by the ending of the file's name


def _decoded(path: str, first: bytes) -> str:
    """Return the first sample of a file as text.

    Raises:
        DataError: If it is not UTF-8.
    """
    try:
        return decode_text(first, part=True)
    except TextError as error:
        raise DataError(f"{path}: its first line {error}: convert the file to UTF-8") from None


def _without_line_ends(whole: np.ndarray, lines: Bounds) -> Bounds:
    r"""Return lines without the "\r" of their ends, which is byte 13."""
    return lines._replace(stops=lines.stops - ((lines.stops > lines.starts) & (whole[lines.stops - 1] == 13)))


class _JsonCursor:
    """A place in a JSON text, which moves on as values are read.

    Args:
        text: the JSON.
        at: the first place.
    """

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def skip_blanks(self) -> int:
        """Move to the next character that is not blank, and return its place."""
        while self.text[self.at : self.at + 1] in _JSON_BLANKS:
            self.at += 1
        return self.at

    def take(self, letter: str) -> bool:
        """Move past a letter if it is the next one; return whether it is."""
        found = self.text.startswith(letter, self.skip_blanks())
        self.at += found
        return found

    def require(self, letter: str) -> None:
        """Move past a letter, or raise JSONDecodeError if another one is next."""
        if not self.take(letter):
            raise json.JSONDecodeError(f"Expecting {letter!r}", self.text, self.at)

    def value(self) -> Any:
        """Read a value."""
        found, self.at = _DECODER.raw_decode(self.text, self.skip_blanks())
        return found

    def members(self, brackets: str) -> Iterator[Any]:
        """Yield the key of each member of an object ("{}"), or None for each of a list ("[]"); the caller reads it."""
        self.require(brackets[0])
        if self.take(brackets[1]):
            return
        key = None
        while True:
            if brackets == "{}":
                key = self.value()
                self.require(":")
            yield key
            if self.take(brackets[1]):
                return
            self.require(",")

    def named(self, name: str) -> Iterator[None]:
        """Yield for each element of the list that an object has under a name; the caller reads it."""
        for key in self.members("{}"):
            if key == name:
                yield from self.members("[]")
            else:
                self.value()


def _paragraphs(whole: np.ndarray, at: int) -> Iterator[tuple[int, int, Any]]:
    """Yield the first byte, the end and the content of each paragraph of SQuAD's JSON, where "é" is two characters.

    Each byte is decoded as one character, so that places of characters are places of bytes: all characters that have a
    meaning in JSON are ASCII.

    Args:
        whole: bytes of the file.
        at: place of the first one.

    Raises:
        ValueError: If it is not JSON, or not SQuAD's.
    """
    cursor = _JsonCursor(whole.tobytes().decode("latin-1"), at)
    for _ in cursor.named("data"):
        for _ in cursor.named("paragraphs"):
            start = cursor.skip_blanks()
            paragraph = cursor.value()
            yield start, cursor.at, paragraph
    if cursor.skip_blanks() < len(cursor.text):
        raise json.JSONDecodeError("Extra data", cursor.text, cursor.at)


def _records(whole: np.ndarray, lines: Bounds) -> Bounds:
    """Find the records of a CSV: a quoted field may hold line ends.

    The csv module finds them. It gets each byte as one character, which does no harm, since all characters that
    have a meaning in CSV are ASCII. A record that it cannot read, such as one whose quotes do not end, is cut to
    its first line, which is a bad sample when it is read; the next record begins in the next line.
    """
    # Without quotes (34 is the byte of a quote) every line is a record.
    if not any((whole[at : at + CHUNK] == 34).any() for at in range(0, len(whole), CHUNK)):
        return lines
    at, line = 0, 0  # number of lines that the reader has taken, and first line of the current record

    def texts() -> Iterator[str]:
        nonlocal at
        while at < len(lines.starts):
            at += 1
            yield whole[lines.starts[at - 1] : lines.stops[at - 1]].tobytes().decode("latin-1") + "\n"

    first, last = array("q"), array("q")
    reader = csv.reader(texts(), strict=True)
    while line < len(lines.starts):
        try:
            next(reader)
        except StopIteration:
            break
        except csv.Error:
            at = line + 1
            reader = csv.reader(texts(), strict=True)
        first.append(line)
        last.append(at - 1)
        line = at
    begin = np.frombuffer(first, np.int64)
    return Bounds(lines.starts[begin], lines.stops[np.frombuffer(last, np.int64)], begin + 1)
