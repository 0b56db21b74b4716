"""Decoding of texts that others wrote: captions, class names, templates, tables, vocabularies, lists of keys.

Nothing else in the package decodes such texts, so that all of them treat byte-order marks, UTF-16 and NULs alike.
"""

import codecs
import io
import os
import re
from pathlib import Path
from typing import Any, TextIO

from dualenc.utils.errors import DataError

MARK = "\ufeff"  # the byte-order mark, which some programs write at the beginning of a text
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# All white space of Unicode, as `str.isspace` defines it, and the mark.
_EDGE = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000" + MARK
)
# White space, control characters, the characters that Unicode declares ignorable for display (property
# Default_Ignorable_Code_Point: zero-width characters, marks, variation selectors, fillers), and the blank of Braille.
_INVISIBLE = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff]*"
)


class TextError(ValueError):
    """Bytes that are not a text.

    Attributes:
        cause: the problem, which completes "the file ...", such as "is not UTF-8".
        detail: where it is.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause} ({detail})")
        self.cause, self.detail = cause, detail


def decode_text(data: bytes, *, part: bool = False) -> str:
    """Decode a text: UTF-8, or UTF-16 if it begins with the byte-order mark of UTF-16. The mark is left out.

    Args:
        data: bytes of the text.
        part: the bytes are a part of a UTF-8 text, such as one of its lines, which a mark does not begin.

    Raises:
        TextError: If the bytes are not UTF-8, or after the mark of UTF-16 not UTF-16, or the text has NULs.
    """
    text = _decode(data, "UTF-16" if data.startswith(_UTF16_MARKS) and not part else "UTF-8")
    if "\0" in text:
        hint = "UTF-16 without a byte-order mark has them, too"
        raise TextError("has NUL characters", f"the first one is character {text.index(chr(0)) + 1:,}; {hint}")
    return text if part else text.lstrip(MARK)  # A text that was saved repeatedly may have several marks.


def _decode(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise TextError(f"is not {encoding}", str(error)) from None


def mark_size(head: bytes) -> int:
    """Return the number of bytes of the mark at the beginning of a UTF-8 text, whose lines are decoded as parts.

    Args:
        head: first bytes of the text.

    Raises:
        TextError: If the text is UTF-16, which can only be decoded as a whole.
    """
    if head.startswith(_UTF16_MARKS):
        raise TextError("is UTF-16", "single lines can be read from UTF-8 only: convert it")
    size = 0
    while head.startswith(codecs.BOM_UTF8, size):
        size += len(codecs.BOM_UTF8)
    return size


def read_text(path: str | os.PathLike[str]) -> str:
    """Read and decode a whole text file; see `decode_text`.

    Raises:
        DataError: If the file cannot be read or is not a text; the message names it.
    """
    try:
        return decode_text(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except TextError as error:
        raise DataError(f"{path} {error}") from None


def open_text(path: str | os.PathLike[str], newline: str) -> TextIO:
    """Open a table to read it row by row, decoded as by `decode_text`.

    Bytes that are not UTF-8 become halves of surrogate pairs, and NULs stay, so that both spoil only their own row; see
    `text_problem`.

    Args:
        path: path of the file.
        newline: see `open`.

    Raises:
        OSError: If the file cannot be read.
        DataError: If it is UTF-16 without a mark, or broken.
    """
    with open(path, "rb") as file:
        head = file.read(4)
    if head.startswith(_UTF16_MARKS):
        try:
            return io.StringIO(_decode(Path(path).read_bytes(), "UTF-16").lstrip(MARK), newline)
        except TextError as error:
            raise DataError(f"{path} {error}") from None
    if b"\0" in head:
        raise DataError(f"{path} has NULs, as UTF-16 without a byte-order mark does: convert it to UTF-8")
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def lines_of(text: str) -> list[str]:
    """Split a text at its line ends into trimmed lines; see `trimmed`."""
    return [trimmed(line) for line in re.split(r"\r\n|\n|\r", text)]


def trimmed(text: str) -> str:
    """Return a text without white space and byte-order marks around it."""
    return text.strip(_EDGE)


def is_blank(text: str) -> bool:
    """Return whether nothing of a text is visible: it has only white space, marks, zero-width and control characters.

    Example:
        >>> is_blank(" \\ufeff\\u200b"), is_blank("a")
        (True, False)
    """
    return _INVISIBLE.fullmatch(text) is not None


def text_problem(value: Any) -> str | None:
    """Return why a value is not a usable text, to follow a noun as in "caption not text"; None for a usable text.

    Empty are None, an empty list, NaN (which pandas writes for a missing text), and text of which nothing is visible.
    """
    if not isinstance(value, str):
        return "empty" if value is None or value == [] or value != value else "not text"
    if "\0" in value:
        return "with NUL characters"
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, and `open_text` escapes bytes by them.
        return "not UTF-8"
    return "empty" if is_blank(value) else None
