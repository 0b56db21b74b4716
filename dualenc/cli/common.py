"""Helpers of the commands: errors, output folders, progress bars, and the command line as text."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

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


def progress(description: str, stderr: bool = False) -> Callable[..., Iterable[Any]]:
    """Return a function that wraps an iterable in a progress bar, which is shown if standard error is a terminal.

    Args:
        description: noun for the items that are counted.
        stderr: draw the bar on standard error, for commands whose standard output is read by programs.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True) if stderr else None
    return partial(track, description=description, transient=True, disable=not sys.stderr.isatty(), console=console)


def config_folder() -> Path:
    """Return the folder of the package's configurations: inside the package, or next to it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
