"""Formatting of errors, counts and untrusted texts for the terminal."""

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

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


def plain(value: Any) -> str:
    """Return a value without the signs of Python: a mapping as names with values, a sequence as its items.

    Example:
        >>> plain({"depth": 3, "sizes": [7, 14]})
        'depth 3, sizes 7 14'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(part)}" for name, part in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return " ".join(map(plain, value))
    return str(value)


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


def shorten(text: str, width: int) -> str:
    """Return the beginning of a text that fits a line: up to a punctuation mark, or else up to a word.

    Example:
        >>> shorten("Write a table, and a report; see the docs.", 30)
        'Write a table, and a report'
        >>> shorten("Write a table, and a report; see the docs.", 20)
        'Write a table'
    """
    text = " ".join(text.split()).removesuffix(".")
    if len(text) <= width:
        return text
    clause = max(text.rfind(mark, 0, width + 1) for mark in ("; ", ": ", ". ", " ("))
    if clause > width // 3:
        return text[:clause]
    comma = text.rfind(", ", 0, width)
    if comma > width // 2 and text.count("(", 0, comma) == text.count(")", 0, comma):
        return text[:comma]
    return f"{text[: text.rfind(' ', 0, width - 3)]} ..."


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """Return the end of a message about an unknown name: the most similar known names, or else all of them.

    Upper and lower case, dashes and underscores count as equal.

    Args:
        name: what the user wrote.
        known: names that exist.
        otherwise: end of the message if no known name is similar; absent, the message lists the known names.

    Example:
        >>> did_you_mean("zeroshto", ["zeroshot", "retrieval"])
        'did you mean zeroshot?'
        >>> did_you_mean("x", ["zeroshot", "retrieval"])
        'choose one of zeroshot, retrieval'
    """
    plain: dict[str, str] = {}
    for one in known:
        plain.setdefault(_plain(one), one)
    if near := difflib.get_close_matches(_plain(name), plain, n=3, cutoff=0.6):
        ratio = {one: difflib.SequenceMatcher(None, one, _plain(name)).ratio() for one in near}
        near = [one for one in near if ratio[one] > ratio[near[0]] - 0.05]
        return f"did you mean {' or '.join(plain[one] for one in near)}?"
    return f"choose one of {', '.join(plain.values())}" if otherwise is None else otherwise


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
