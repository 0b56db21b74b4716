"""What can be wrong with data, and how it is said."""

import re


class DataError(ValueError):
    """Data that is missing, broken or not in the layout; the message names the file and the way out."""


class BadSample(DataError):
    """A sample whose content is of no use: a picture that cannot be decoded, no text, no UTF-8, an absurd size.

    Attributes:
        cause: what is wrong with it, alike for all samples that have it.
        detail: more of it, for this one.
    """

    def __init__(self, sample: object, cause: str = "", detail: str = "") -> None:
        # From a worker process it comes back as its message alone.
        super().__init__(f"{sample}{f': {cause}' if cause else ''}{f' ({detail})' if detail else ''}")
        self.cause, self.detail = cause, detail


def one_line(error: object) -> str:
    """An error in one line: no traceback of a worker, no order to a terminal, no password of a URL."""
    from dualenc.utils.urls import redact

    # What fails in a worker process arrives with that process's traceback before it.
    text = str(error)
    if "Original Traceback" in text:
        text = re.split(r"\ndualenc\.\w+(?:\.\w+)*: ", text)[-1]
    # What strangers wrote gives a terminal no orders; what a user wrote may hold the password of a URL.
    return redact("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(text.split())))


class ModelError(ValueError):
    """A model directory or spec that cannot be used; the message names the file or key."""
