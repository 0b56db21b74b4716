"""The folder of an index: its description `search.json`, its segments, and the lock of whoever builds it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dualenc.utils.errors import DataError
from dualenc.utils.text import reason

FORMAT = 1
ABOUT = "search.json"
SEGMENTS = "segments"
ANN = "*.faiss"  # files of approximate search


def read_about(out: Path) -> dict[str, Any] | None:
    """Read the description of an index; None if there is none.

    Raises:
        DataError: If the file cannot be read, is damaged, or is of a newer format.
    """
    path = out / ABOUT
    try:
        about = json.loads(path.read_text("utf-8"))
        if about["format"] > FORMAT:
            raise DataError(f"{path} has format {about['format']}, this dualenc reads up to {FORMAT}: upgrade dualenc")
        for segment in about["segments"]:
            if os.path.basename(segment["file"]) != segment["file"]:
                raise ValueError
        _ = about["kind"], about["model"], about["fingerprint"], about["dims"], about["options"], about["ann"]
        return about
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged: remove it, and run the same dualenc build-search again") from None


@contextmanager
def building(out: Path) -> Iterator[None]:
    """Create the folder of an index, and hold its lock inside of the block.

    Partial files that a killed build left are removed.

    Raises:
        DataError: If the folder holds something else, or another process is building it.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} must be a folder")
    own = {ABOUT, SEGMENTS}
    if out.exists() and (
        other := [
            path.name
            for path in out.iterdir()
            if not _is_partial(path) and path.name not in own and not path.match(ANN)
        ]
    ):
        raise DataError(f"{out} holds {other[0]}, which build-search did not write: name a new folder")
    (out / SEGMENTS).mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)  # The files in it are replaced, so that a lock on one of them would be lost.
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{out} is being built by another process: wait for its end, or name another folder"
            ) from None
        except OSError:  # some file systems have no locks
            pass
        for path in [*out.iterdir(), *(out / SEGMENTS).iterdir()]:
            if _is_partial(path):
                path.unlink()
        yield
    finally:
        os.close(handle)


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".part"
