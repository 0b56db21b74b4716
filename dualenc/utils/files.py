"""Atomic writing of files, appending of lines by several processes, and JSON of declared types."""

import dataclasses
import difflib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import types
import typing
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dualenc.utils.decoding import decode_text
from dualenc.utils.errors import ModelError
from dualenc.utils.text import plural, print_message, reason

FORMAT = 2

# Files

# First bytes of a file -> what it is instead of the file that was wanted.
_STAND_INS = {
    rb"version https://(git-lfs|hawser)": "a Git LFS pointer, not the file itself (get it with `git lfs pull`)",
    rb"(\.\./)*(\.git)?/annex/objects/": "a git-annex pointer, not the file itself (get it with `git annex get`)",
    rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype html|<html)": (
        "an HTML page, not the file itself, such as a page of an error or to sign in (download the file again)"
    ),
    rb"(<\?xml[^>]*>\s*)?<Error>": "the error message of a store, not the file itself (download the file again)",
}


def stand_in(data: bytes) -> str | None:
    """Return what a file is that other programs leave in place of a file, with the way out; None for other files.

    Args:
        data: the first bytes of the file, at least a hundred if it has them.
    """
    data = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((what for start, what in _STAND_INS.items() if re.match(start, data, re.IGNORECASE | re.DOTALL)), None)


_UMASK = os.umask(0)  # the umask can only be read by setting it
os.umask(_UMASK)


@contextmanager
def atomic_write(path: str | os.PathLike[str], temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file to write, which replaces `path` once all of it is on the disk.

    Whatever happens, `path` is the old file or the new one, never a part of it. If the block fails, the temporary file
    is removed. A process that is killed leaves it.

    Args:
        path: path of the finished file.
        temporary: file to write, in the same folder; by default a new one whose name begins with a dot and ends with
            ".part".

    Raises:
        OSError: If the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        if temporary is None:
            handle, name = tempfile.mkstemp(".part", f".{path.name}-", path.parent)
            os.close(handle)
            temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        with suppress(OSError):  # some file systems have no permissions
            temporary.chmod(_mode(path))  # mkstemp and safetensors make files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None and Path(str(error.filename)).name.startswith(f".{path.name}-"):
            error.filename, error.filename2 = str(path), None  # the user knows this name, not the temporary one
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # writes the new name to the disk
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(folder)


def _mode(path: Path) -> int:
    """Return the permissions of a file, or if it does not exist those that `open` would give it."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        return 0o666 & ~_UMASK


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically; see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically; see `atomic_write`."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], data: Any, indent: int = 2) -> None:
    """Write a JSON file atomically, indented and with a line end."""
    write_text(path, json.dumps(data, indent=indent) + "\n")


def append_lines(path: str | os.PathLike[str], lines: Iterable[str], *, sync: bool = False) -> None:
    """Append lines to a file, all of them or none.

    Any number of processes may append to one file: their lines do not mix if the file system has locks. If a killed
    process left a line without its end, the line is ended first, so that no new line is joined to it.

    Args:
        path: path of the file; the file and its folder are created if they are missing.
        lines: lines without line ends.
        sync: return only when the lines are on the disk.

    Raises:
        OSError: If the disk has no room for all lines, or the file cannot be written; the file is then unchanged.
    """
    data = "".join(f"{line}\n" for line in lines).encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            if file.write(data) != len(data):  # a full disk takes a part of the data without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


class LineLog:
    """Log of a run that loses no line without a message.

    Lines that cannot be written (full disk) are kept in memory and written with the next ones.

    Args:
        path: path of the file.
        header: first line of the file; empty for none.
    """

    def __init__(self, path: str | os.PathLike[str], header: str = "") -> None:
        self.path, self.header = Path(path), header
        self._unwritten: list[str] = []

    def append(self, lines: Iterable[str] = ()) -> None:
        """Append lines, after those that could not be written before. If writing fails, print a message once."""
        already_told = bool(self._unwritten)
        self._unwritten += lines
        if not self._unwritten:
            return
        try:
            begins = bool(self.header) and not (self.path.exists() and self.path.stat().st_size)
            append_lines(self.path, [self.header, *self._unwritten] if begins else self._unwritten)
            self._unwritten = []
        except OSError as error:
            if not already_told:
                print_message(f"{self.path} cannot be written, its lines are kept in memory: {reason(error)}")

    def close(self) -> None:
        """Write the lines that are left; if that fails, print how many lines are lost."""
        self.append()
        if self._unwritten:
            print_message(f"{self.path} lacks the last {plural(len(self._unwritten), 'line')}")
            self._unwritten = []


# Folders and configurations


def check_replaceable(path: Path, files: Collection[str]) -> None:
    """Refuse a path that holds anything but a model directory made of these files.

    Raises:
        ModelError: If the path exists and must not be replaced.
    """
    if path.exists() and not (path.is_dir() and {file.name for file in path.iterdir()} <= set(files)):
        raise ModelError(f"{path} exists and is not a model directory: choose another path")


@contextmanager
def atomic_folder(path: str | os.PathLike[str], files: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder to write into, which replaces `path` once all files are written.

    Args:
        path: path of the finished folder; an older folder at this path is replaced.
        files: names that the older folder may hold; a folder with any other file is not replaced.

    Raises:
        ModelError: If the path exists and must not be replaced.
    """
    path = Path(path)
    check_replaceable(path, files)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*"):  # safetensors makes files that only their owner can read
            file.chmod(0o755 if file.is_dir() else 0o644)
        old = temporary.with_name(f"{temporary.name}-old")
        if path.exists():
            path.rename(old)  # from now on the old or the new folder is complete, whatever happens
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_format(fields: Any, path: Path) -> int:
    """Remove the key `format` from a config, and return its value.

    Raises:
        ModelError: If the key is missing, or the format is newer than this version of dualenc.
    """
    found = fields.pop("format", None) if isinstance(fields, dict) else None
    if not isinstance(found, int):
        raise ModelError(f"{path} does not have the key 'format': it is not a config of dualenc")
    if found > FORMAT:
        raise ModelError(
            f"{path} has format {found}, dualenc {version('dualenc')} reads up to {FORMAT}: upgrade dualenc"
        )
    return found


def from_dict(cls: type[Any], fields: Any, where: str) -> Any:
    """Build a dataclass from parsed JSON, of which every key and every type must be as declared.

    All keys must be present, except if the class lists its `REQUIRED` fields: older files lack the others.

    Args:
        cls: the dataclass; its fields may be dataclasses too.
        fields: the parsed JSON.
        where: the file, and the key in it, for messages.

    Raises:
        ModelError: If a key is unknown or missing, or a value has another type or is refused by the class.
    """
    if not isinstance(fields, dict):
        raise ModelError(f"{where} must be an object, not {fields!r}")
    hints = typing.get_type_hints(cls)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    if unknown := [key for key in fields if key not in hints]:
        raise ModelError(f"{where} has the unknown key {unknown[0]!r}: upgrade dualenc, or correct the file")
    if missing := [key for key in getattr(cls, "REQUIRED", hints) if key not in fields]:
        raise ModelError(f"{where} has no key {missing[0]!r}")
    values = {}
    for key, hint in hints.items():
        if key not in fields:
            continue
        value = fields[key]
        nested = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if nested is not None and typing.get_origin(hint) is tuple and isinstance(value, list):
            items = enumerate(value)
            values[key] = tuple(from_dict(typing.cast(type, nested), x, f"{where}: {key}.{i}") for i, x in items)
        elif nested is not None and (value is not None or hint is nested):
            values[key] = from_dict(typing.cast(type, nested), value, f"{where}: {key}")
        elif not _has_type(value, hint):
            raise ModelError(f"{where}: {key} must be {getattr(hint, '__name__', hint)}, not {value!r}")
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except (ValueError, ArithmeticError) as error:
        raise ModelError(f"{where}: {error}") from None


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether a value of parsed JSON has a declared type, one of those that the configs use."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        return value in parts
    if kind in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in parts)
    if kind is tuple and parts[-1] is Ellipsis:
        return isinstance(value, list) and all(_has_type(item, parts[0]) for item in value)
    if kind is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(_has_type, value, parts))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind or hint)


def read_json(path: Path) -> Any:
    """Read and parse a JSON file.

    Raises:
        ModelError: If the file cannot be read or parsed.
    """
    try:
        return json.loads(decode_text(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error})") from None


def similar_paths(path: Path) -> list[Path]:
    """Return up to two paths of the same folder whose names are similar to that of a path that does not exist."""
    try:
        names = [one.name for one in path.parent.iterdir()]
    except OSError:
        return []
    return [path.parent / name for name in difflib.get_close_matches(path.name, names, n=2)]
