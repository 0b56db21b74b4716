"""Texts for people: one line for an error, nothing that steers a terminal, plurals."""

import re

from dualenc.utils.urls import redact


def printable(text: str) -> str:
    """Return a text in which everything that a terminal could take for an order is written out, as in `\\x1b`."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def one_line(error: object) -> str:
    """Return an error as one line: no traceback of a worker, nothing that steers a terminal, no password of a URL."""
    # What fails in a worker process arrives with that process's traceback before it.
    text = str(error)
    if "Original Traceback" in text:
        text = re.split(r"\ndualenc\.\w+(?:\.\w+)*: ", text)[-1]
    return redact(printable(" ".join(text.split())))


def reason(error: BaseException) -> str:
    """Return why an operating-system call failed, without its number and file; of other errors their first line."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 shard" or "1,200 shards"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def millions(count: int) -> str:
    """Return a count in millions, such as "1.2 M"."""
    return f"{count / 1e6:.1f} M"


def quoted(text: str, longest: int = 100) -> str:
    """Return a text in quotes, cut after `longest` letters, with everything unprintable written out."""
    return repr(text if len(text) <= longest else f"{text[: longest - 1]}\N{HORIZONTAL ELLIPSIS}")
