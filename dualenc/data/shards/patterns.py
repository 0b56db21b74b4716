"""Patterns as users write them: paths, globs, brace patterns, folders and URLs; and the files that they name.

One function, `find_files`, decides for shards and for text files, on local disks and in stores.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from braceexpand import braceexpand

from dualenc.data.shards.remote import exists_remote, glob_remote
from dualenc.utils.errors import DataError, warn_once
from dualenc.utils.text import plural, printable
from dualenc.utils.urls import PROTOCOLS, is_remote, shown

Patterns = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".lz4", ".zip", ".7z", ".rar")
MAX_ENTRIES = 10_000  # names in a folder and below it that are looked at, to tell whether it holds files of a kind
_STORES = ", ".join(f"{name}://" for name in PROTOCOLS)
_EXAMPLES = 3
_TABLES_AND_IMAGES = (".parquet", ".csv", ".jpg", ".jpeg", ".png", ".webp")


class FileKind(NamedTuple):
    """A kind of files, which is recognized by their names."""

    noun: str
    endings: tuple[str, ...]
    others: tuple[str, ...]  # endings of files that usually lie next to them, and are passed over without a message


SHARDS = FileKind(
    "shards",
    (".tar",),
    (".index", ".idx", ".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".md", ".html", ".yaml", ".yml", ".part"),
)
TEXTS = FileKind("files", (".txt", ".tsv", ".csv", ".jsonl", ".conll", ".json"), (".md", ".yaml", ".yml", ".part"))


@dataclass
class _Match:
    """The files of a kind that a pattern names, and what it passes over."""

    files: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)  # files whose names are not those of the kind
    usual: list[str] = field(default_factory=list)  # files that usually lie next to files of the kind
    folders: list[str] = field(default_factory=list)  # folders with files of the kind


def expand_shards(shards: Patterns) -> list[str]:
    """Return the paths and URLs of shards that are named by patterns; see `find_files`.

    Raises:
        DataError: If a part matches no shard, is neither a local path nor a URL of a known store, or two parts name one
            shard.
    """
    return require_all(*find_files(shards, SHARDS), SHARDS)


def require_all(paths: list[str], missing: list[DataError], kind: FileKind) -> list[str]:
    """Return the paths that `find_files` found.

    Raises:
        DataError: If a part matches no file, there is no part, or two parts name one file.
    """
    if missing:
        raise missing[0]
    if not paths:
        raise DataError(f"the list of {kind.noun} is empty")
    if repeated := distinct(paths)[1]:
        raise DataError(f"{kind.noun} named twice: {', '.join(repeated[:_EXAMPLES])}")
    return paths


def parts_of(patterns: Patterns) -> list[str]:
    """Return patterns as a list of texts."""
    return [os.fspath(part) for part in ([patterns] if isinstance(patterns, str | os.PathLike) else patterns)]


def find_files(patterns: Patterns, kind: FileKind) -> tuple[list[str], list[DataError]]:
    """Find the files of a kind that patterns name: the only place that decides this, for local files and for stores.

    A pattern is a path, a glob, a brace pattern, a folder or a URL. `~` is the home folder, and `**` stands for any
    number of folders. A name that exists is taken literally, even if it has characters of a pattern. Globs and folders
    name the files whose names end as those of the kind, and what they pass over is logged in one line. A file that is
    named in full is returned whatever its name, except if such files usually lie next to those of the kind, because
    shells expand globs to full names.

    Returns:
        The paths and URLs in the order of the patterns, with repetitions; and an error for each pattern that matches no
        file.

    Raises:
        DataError: If braces are not closed, or a URL is not of a known store.
    """
    paths: list[str] = []
    missing: list[DataError] = []
    passed, usual = _Match(), _Match()
    for pattern in _split(patterns, kind):
        match = _match_remote(pattern, kind) if is_remote(pattern) else _match_local(pattern, kind)
        paths += match.files
        if match.files:
            passed.passed += match.passed
            passed.folders += match.folders
        elif match.usual == [pattern]:
            usual.usual.append(pattern)
        else:
            why = _describe(match.passed + match.usual, match.folders, kind)
            missing.append(DataError(f"{kind.noun} {shown(pattern)!r} match no file{f': {why}' if why else ''}"))
    if usual.usual and not paths and not missing:
        why = _describe(usual.usual, [], kind)
        missing.append(DataError(f"{kind.noun} {usual.usual[0]!r} match no file: {why}"))
    if line := _describe(passed.passed, passed.folders, kind):
        warn_once(f"{kind.noun}: {line}")
    return paths, missing


def distinct(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return one path of each file, and the paths that name an earlier file again, the latter without secrets."""
    files: dict[str, str] = {}
    repeated = []
    for path in paths:
        file = shown(path) if is_remote(path) else os.path.realpath(path)
        if file in files:
            repeated.append(shown(path))
        files.setdefault(file, path)
    return list(files.values()), repeated


def _split(patterns: Patterns, kind: FileKind) -> Iterator[str]:
    """Yield the patterns with their braces expanded, and with the home folder for `~`."""
    for part in parts_of(patterns):
        if part.startswith("pipe:"):
            raise DataError(f"{kind.noun} {part!r}: commands are never run; name the files, or URLs of {_STORES}")
        if is_remote(part) and part.partition("://")[0] not in PROTOCOLS:
            raise DataError(f"{kind.noun} {shown(part)!r} must be local paths, or URLs of {_STORES}")
        try:
            for pattern in [part] if os.path.exists(os.path.expanduser(part)) else braceexpand(part):
                yield pattern if is_remote(pattern) else os.path.expanduser(pattern)
        except ValueError as error:
            raise DataError(f"{kind.noun} {shown(part)!r}: {error}") from None


def _match_local(pattern: str, kind: FileKind) -> _Match:
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "*")
    elif os.path.exists(pattern):
        usual = pattern.lower().endswith(kind.others) and not pattern.lower().endswith(kind.endings)
        return _Match(usual=[pattern]) if usual else _Match([pattern])
    pattern = f"{pattern}*" if pattern.endswith("/") else pattern
    found = glob.glob(pattern, recursive=True) or glob.glob(pattern.replace("[", "[[]"), recursive=True)
    match = _sort([(path, os.path.isdir(path)) for path in sorted(found)], pattern, kind)
    match.files = distinct(match.files)[0]  # `**` follows links to folders
    match.folders = [folder for folder in match.folders if _holds(folder, kind)]
    return match


def _match_remote(pattern: str, kind: FileKind) -> _Match:
    path = shown(pattern)
    if path.lower().endswith(COMPRESSED):
        return _Match(passed=[pattern])
    is_literal = not glob.has_magic(path) or exists_remote(pattern)
    if is_literal and path.lower().endswith(kind.endings):
        return _Match([pattern])
    if is_literal or pattern.endswith("/"):
        scheme, _, rest = pattern.rstrip("/").partition("://")
        pattern = f"{scheme}://{glob.escape(rest) if is_literal else rest}/*"
    found = glob_remote(pattern)
    if not found and "[" in path:  # as on local disks, brackets that match nothing are letters
        found = glob_remote(pattern.replace("[", "[[]"))
    return _sort(found, pattern, kind)


def _sort(found: list[tuple[str, bool]], pattern: str, kind: FileKind) -> _Match:
    """Sort the matches of a glob, with whether each is a folder. Hidden files match only if the glob names the dot."""
    match = _Match()
    for path, is_folder in found:
        name = os.path.basename(path)
        if is_folder:
            if "**" not in pattern:  # the files in the folders match this pattern themselves
                match.folders.append(path)
        elif not name or (name.startswith(".") and not os.path.basename(pattern).startswith(".")):
            continue
        elif name.lower().endswith(kind.endings):
            match.files.append(path)
        else:
            (match.usual if name.lower().endswith(kind.others) else match.passed).append(path)
    return match


def _holds(folder: str, kind: FileKind) -> bool:
    """Return whether files of a kind are in a folder or below it, except for those of evaluation sets."""
    left = MAX_ENTRIES
    for _, folders, names in os.walk(folder):
        if "nshards.txt" in names:
            folders.clear()
        elif any(name.lower().endswith(kind.endings) for name in names):
            return True
        left -= len(folders) + len(names)
        if left < 0:
            break
    return False


def _describe(passed: list[str], folders: list[str], kind: FileKind) -> str:
    """Describe in one line what patterns passed over, with the way out; empty if they passed over nothing."""
    parts, ways_out = [], []
    if passed:
        endings = " or ".join(kind.endings)
        parts.append(f"{plural(len(passed), 'file')} not named {endings} ({_examples(passed)})")
        if any(path.lower().endswith(COMPRESSED) for path in passed):
            ways_out.append(f"unpack what is compressed to plain {endings}")
        if kind is SHARDS and any(path.lower().endswith(_TABLES_AND_IMAGES) for path in passed):
            ways_out.append("`dualenc make-shards` makes shards of images and captions")
    if folders:
        parts.append(f"{plural(len(folders), 'folder')} ({_examples(folders)})")
        inside = f"{glob.escape(os.path.dirname(shown(folders[0])))}/**"
        ways_out.append(f"{printable(inside)!r} names the files in folders too")
    return "; ".join([f"passed over {' and '.join(parts)}", *ways_out]) if parts else ""


def _examples(paths: list[str]) -> str:
    names = [printable(shown(path)) for path in paths[:_EXAMPLES]]
    return ", ".join(names) + (", ..." if len(paths) > _EXAMPLES else "")
