"""Helpers of the commands: errors, output folders, and the command line as text."""

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dualenc.utils.text import reason
from dualenc.utils.urls import redact


class UsageError(Exception):
    """Wrong use: of the command line, of the configuration, or of a file that they name. Exit status 2."""


class WorkError(Exception):
    """Failure of work that had begun. Exit status 1."""


def command_line() -> str:
    """Return the command line of this program as text, without the secrets of URLs."""
    return redact(shlex.join(["dualenc", *sys.argv[1:]]))


def make_folder(path: Path, name: str) -> None:
    """Create the folder that a command will write into, before its work begins.

    Args:
        path: path of the folder.
        name: option that names the folder, for the message of the error.

    Raises:
        UsageError: If the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{name} {path} cannot be created: {reason(error)}") from error


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn a failure to read or write a file into an error of one line that names the file.

    Args:
        out: output path, named where the failure does not name a file.

    Raises:
        WorkError: If the block raises an OSError, or the safetensors library cannot write.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WorkError(f"{getattr(error, 'filename', None) or out}: {reason(error)}") from error


def config_folder() -> Path:
    """Return the folder of the package's configurations: inside the package, or next to it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def parse_part(text: str | None) -> tuple[int, int]:
    """Return the part (i, n) of the work that --part names; (0, 1) without it.

    Raises:
        UsageError: If it is not I/N with I from 0 to N - 1.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    if found is None or int(found[1]) >= int(found[2]):
        raise UsageError(f"--part {text} must be I/N with I from 0 to N - 1, such as 0/8")
    return int(found[1]), int(found[2])
