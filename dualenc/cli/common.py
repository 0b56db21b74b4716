"""What the commands share: their errors, the folders that they write, the command line as text."""

import shlex
import sys
from pathlib import Path


class UsageError(Exception):
    """The command line, the configuration or what they name is wrong: exit status 2."""


class WorkError(Exception):
    """Work that had begun failed: exit status 1."""


def command_line() -> str:
    """This program's, for a page: without the secrets of URLs."""
    from dualenc.utils.urls import redact

    return redact(shlex.join(["dualenc", *sys.argv[1:]]))


def make_folder(path: Path, name: str) -> None:
    """For what a command will write: before its work, not after it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{name} {path} cannot be made: {error.strerror}") from error


def config_folder() -> Path:
    """Where the configurations that come with the package lie: in it, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
