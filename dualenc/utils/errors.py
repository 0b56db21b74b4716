"""Errors that a user can fix: each message is one line that names the file, key or option and the way out."""

import logging
import os
from collections.abc import Iterable
from functools import cache


class DataError(ValueError):
    """Data that is missing, broken or in another layout; the message names the file and the way out.

    Example:
        >>> from dualenc import DataError, ShardIndex
        >>> try:
        ...     ShardIndex.build("missing-{000..007}.tar")
        ... except DataError as error:
        ...     print(error)
        shards 'missing-000.tar' match no file
    """


class BadSample(DataError):
    """A sample whose content cannot be used: an image that cannot be decoded, no text, no UTF-8, an absurd size.

    Attributes:
        cause: the problem, the same text for all samples that have it.
        detail: what is special about this sample.
    """

    def __init__(self, sample: object, cause: str = "", detail: str = "") -> None:
        # The defaults are needed because torch rebuilds an error of a worker process from its message alone.
        super().__init__(f"{sample}{f': {cause}' if cause else ''}{f' ({detail})' if detail else ''}")
        self.cause, self.detail = cause, detail


class ModelError(ValueError):
    """A model directory or spec that cannot be used; the message names the file or key.

    Example:
        >>> import dualenc
        >>> try:
        ...     dualenc.load("missing/model")
        ... except dualenc.ModelError as error:
        ...     print("missing/model" in str(error))
        True
    """


def first_failure(checks: Iterable[tuple[object, str]]) -> str | None:
    """Return the reason of the first check that does not hold; None if all hold.

    Args:
        checks: pairs of a truth value and the reason to give where it is false; a generator stops at the first failure.
    """
    return next((reason for holds, reason in checks if not holds), None)


@cache
def warn_once(line: str) -> None:
    """Log a warning once, and only in the first one of the processes that a launcher starts on a machine."""
    if all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_LOCALID")):
        logging.getLogger("dualenc").warning("%s", line)
