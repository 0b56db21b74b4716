"""What the commands share: errors, folders that they write, progress bars, the command line as text."""

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
    """The command line, the configuration or what they name is wrong: exit status 2."""


class WorkError(Exception):
    """Work that had begun failed: exit status 1."""


def command_line() -> str:
    """Return the command line of this program for a page, without the secrets of URLs."""
    return redact(shlex.join(["dualenc", *sys.argv[1:]]))


def make_folder(path: Path, name: str) -> None:
    """Make a folder that a command will write into: before its work, not after it.

    Raises:
        UsageError: it cannot be made; begins with the name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{name} {path} cannot be made: {reason(error)}") from error


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn a failure to read or write a file into one line that names it.

    Args:
        out: what is written, for failures that name no file.

    Raises:
        WorkError: the block raised an OSError, or the safetensors library could not write.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WorkError(f"{getattr(error, 'filename', None) or out}: {reason(error)}") from error


def progress(description: str, stderr: bool = False) -> Callable[..., Iterable[Any]]:
    """Return what wraps an iterable in a progress bar, which is shown where standard error is a terminal.

    Args:
        description: of what is counted.
        stderr: draws it on standard error, for commands whose standard output is read by programs.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True) if stderr else None
    return partial(track, description=description, transient=True, disable=not sys.stderr.isatty(), console=console)


def config_folder() -> Path:
    """Return where the configurations of the package lie: in it, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
