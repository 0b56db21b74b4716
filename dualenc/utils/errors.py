"""Errors that a user can mend: each is one line that names the file, key or option and the way out."""

from collections.abc import Iterable


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


class ModelError(ValueError):
    """A model directory or spec that cannot be used; the message names the file or key."""


def first_failure(checks: Iterable[tuple[object, str]]) -> str | None:
    """Return the reason of the first check that does not hold; None if all hold.

    Args:
        checks: pairs of a truth value and the reason to give where it is false; a generator stops at the first failure.
    """
    return next((reason for holds, reason in checks if not holds), None)
