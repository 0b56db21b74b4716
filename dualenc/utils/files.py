"""Files written whole or not at all, lines appended whole or not at all, and JSON that is what it says."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import tempfile
import types
import typing
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dualenc.utils.errors import ModelError

FORMAT = 2

# Files

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)


@contextmanager
def atomic_write(path: str | os.PathLike[str], beside: Path | None = None) -> Iterator[Path]:
    """Give a file to write that takes the place of `path` once all of it is on the disk.

    Whatever happens, `path` is the old file or the new one, never a part of it. Where the block fails, the new file is
    removed.

    Args:
        path: name in the end.
        beside: file to write, in the same folder; absent, a new one whose name begins with a dot and ends with
            ".part". A process that is killed leaves it.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        if beside is None:
            handle, name = tempfile.mkstemp(".part", f".{path.name}-", path.parent)
            os.close(handle)
            beside = Path(name)
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        with suppress(OSError):  # a file system that cannot
            beside.chmod(_mode(path))  # mkstemp and safetensors let nobody else read what they write
        os.replace(beside, path)
    except OSError as error:
        if error.filename is not None and Path(str(error.filename)).name.startswith(f".{path.name}-"):
            error.filename, error.filename2 = str(path), None  # the name that people know
        raise
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(folder)


def _mode(path: Path) -> int:
    """Return the permissions of the file that is there, or those that a new one gets from `open`."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        return 0o666 & ~_UMASK


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all; see `atomic_write`."""
    with atomic_write(path) as beside:
        beside.write_bytes(text.encode())


def write_json(path: str | os.PathLike[str], data: Any, indent: int = 2) -> None:
    """Write JSON for people too, whole or not at all: indented, with a line end."""
    write_text(path, json.dumps(data, indent=indent) + "\n")


def append_lines(path: str | os.PathLike[str], lines: Iterable[str], *, sync: bool = False) -> None:
    """Append lines to a file, all of them or none.

    Any number of processes may append to one file: their lines do not mix, where the file system has locks. A last line
    that a killed process left without its end is ended first, so that no other is joined to it.

    Args:
        path: file, made with its folder if missing.
        lines: without line ends.
        sync: return when they are on the disk.

    Raises:
        OSError: there is no room for all of them, or the file cannot be written; it is then as it was.
    """
    data = "".join(f"{line}\n" for line in lines).encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            if file.write(data) != len(data):  # a full disk takes a part without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


# Folders and configurations


def check_place(path: Path, files: Collection[str]) -> None:
    """Refuses to write where something else is than a folder of these files.

    Raises:
        ModelError: it is.
    """
    if path.exists() and not (path.is_dir() and {file.name for file in path.iterdir()} <= set(files)):
        raise ModelError(f"{path} exists and is no model directory: choose another path")


@contextmanager
def replaced_folder(path: str | os.PathLike[str], files: Collection[str]) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `path` once all is written.

    Args:
        path: its name in the end; an older folder of this name is replaced.
        files: what such a folder may hold: one with anything else in it is no such folder, and stays.

    Raises:
        ModelError: the path is taken by something else.
    """
    path = Path(path)
    check_place(path, files)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        beside.chmod(0o755)
        yield beside
        for file in beside.rglob("*"):  # safetensors lets nobody else read what it writes
            file.chmod(0o755 if file.is_dir() else 0o644)
        old = beside.with_name(f"{beside.name}-old")
        if path.exists():
            path.rename(old)  # whatever happens now, one of the two is whole
        beside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def take_format(fields: Any, path: Path) -> int:
    """Take the key `format` out of a config, and return it.

    Raises:
        ModelError: there is none, or it is newer than this version of dualenc.
    """
    found = fields.pop("format", None) if isinstance(fields, dict) else None
    if not isinstance(found, int):
        raise ModelError(f"{path} says no 'format': it is no config of dualenc")
    if found > FORMAT:
        raise ModelError(
            f"{path} has format {found}, dualenc {version('dualenc')} reads up to {FORMAT}: upgrade dualenc"
        )
    return found


def from_dict(cls: type[Any], fields: Any, where: str) -> Any:
    """A frozen dataclass from parsed JSON: every key and every type as declared, nothing missing, nothing more.

    Where the class says which fields are `REQUIRED`, the others may be missing: older files do not have them yet.
    """
    if not isinstance(fields, dict):
        raise ModelError(f"{where} must be an object, not {fields!r}")
    hints = typing.get_type_hints(cls)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    if unknown := [key for key in fields if key not in hints]:
        raise ModelError(f"{where} has the unknown key {unknown[0]!r}: it needs a newer dualenc, or a correction")
    if missing := [key for key in getattr(cls, "REQUIRED", hints) if key not in fields]:
        raise ModelError(f"{where} has no key {missing[0]!r}")
    values = {}
    for key, hint in hints.items():
        if key not in fields:
            continue
        value = fields[key]
        inside = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if inside is not None and (value is not None or hint is inside):
            values[key] = from_dict(typing.cast(type, inside), value, f"{where}: {key}")
        elif not _is(value, hint):
            raise ModelError(f"{where}: {key} must be {getattr(hint, '__name__', hint)}, not {value!r}")
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except (ValueError, ArithmeticError) as error:
        raise ModelError(f"{where}: {error}") from None


def _is(value: Any, hint: Any) -> bool:
    """Whether a value of parsed JSON is of a declared type, of those that the configs use."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        return value in parts
    if kind in (typing.Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if kind is tuple and parts[-1] is Ellipsis:
        return isinstance(value, list) and all(_is(item, parts[0]) for item in value)
    if kind is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(_is, value, parts))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind or hint)


def read_json(path: Path) -> Any:
    """Parses a file.

    Raises:
        ModelError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error})") from None
