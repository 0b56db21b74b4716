"""Formatting of errors, counts and untrusted texts for the terminal."""

import re
import sys
from contextlib import suppress

from dualenc.utils.urls import redact


def printable(text: str) -> str:
    """Return a text with its unprintable characters escaped, as in `\\x1b`, so that it cannot control a terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def one_line(error: object) -> str:
    """Return an error as one printable line, without the traceback of a worker and the secrets of URLs."""
    # torch puts the traceback of a worker process before the message of its error.
    text = str(error)
    if "Original Traceback" in text:
        text = re.split(r"\ndualenc\.\w+(?:\.\w+)*: ", text)[-1]
    return redact(printable(" ".join(text.split())))


def reason(error: BaseException) -> str:
    """Return the reason of an operating-system error without its number and file, or another error's first line."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def print_message(line: str) -> None:
    """Print a line on standard error, which may be a file on a full disk: that must not end what is running."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 shard" or "1,200 shards"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def clock_time(seconds: float) -> str:
    """Return a length of time in hours, minutes and seconds, such as "1:23:45"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:,}:{minutes % 60:02}:{rest:02}"


def millions(count: int) -> str:
    """Return a count in millions, such as "1.2 M"."""
    return f"{count / 1e6:.1f} M"


def quoted(text: str, longest: int = 100) -> str:
    """Return a text in quotes, cut after `longest` characters, with its unprintable characters escaped."""
    return repr(text if len(text) <= longest else f"{text[: longest - 1]}\N{HORIZONTAL ELLIPSIS}")
