"""Image files in place of shards: found in folders, by globs and in lists, and read in parts."""

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from dualenc.data.eval_sets.base import ImageFiles
from dualenc.data.shards.patterns import SHARDS, FileKind, find_files, require_all
from dualenc.data.shards.shard import IMAGE_EXTENSIONS
from dualenc.utils.decoding import lines_of, read_text, trimmed
from dualenc.utils.errors import DataError
from dualenc.utils.urls import is_remote

PART = 4096  # images whose embeddings are written to one file
IMAGES = FileKind("images", tuple(f".{extension}" for extension in IMAGE_EXTENSIONS), (*SHARDS.others, *SHARDS.endings))


def find_images(sources: Sequence[str]) -> list[str] | None:
    """Find the image files that are named by folders, globs, paths, and lists with a path on each line.

    Args:
        sources: what a user named. A folder names its images and those in its folders, unless it holds shards.

    Returns:
        The paths; None if the sources name something else, such as shards.

    Raises:
        DataError: If some sources name images and others do not, or an image is missing or named twice.
    """
    found = {source: _images_of(source) for source in sources}
    if not any(found.values()):
        return None
    if others := [source for source, paths in found.items() if not paths]:
        named = next(source for source, paths in found.items() if paths)
        raise DataError(f"{named} names images and {others[0]} does not: embed them into two folders")
    return require_all([path for paths in found.values() for path in paths], [], IMAGES)


def _images_of(source: str) -> list[str]:
    """Return the images that a source names; none if it names something else."""
    if is_remote(source):
        return []
    if source.lower().endswith(".txt"):
        return _listed(source)
    named = source.lower().endswith(IMAGES.endings)
    if not named and find_files([source], SHARDS)[0]:
        return []
    is_folder = os.path.isdir(os.path.expanduser(source))
    paths, missing = find_files([f"{glob.escape(source)}/**" if is_folder else source], IMAGES)
    if named and missing:
        raise missing[0]
    return [os.path.normpath(path) for path in paths]


def _listed(path: str) -> list[str]:
    """Return the images that a text file lists; none if its first line does not name one.

    Raises:
        DataError: If it names images that do not exist.
    """
    try:
        with open(path, "rb") as file:
            first = file.readline(4096).decode("utf-8", "replace")
    except OSError:
        return []
    if not trimmed(first).lower().endswith(IMAGES.endings):
        return []
    names = [os.path.normpath(name) for name in map(trimmed, lines_of(read_text(path))) if name]
    if not any(map(os.path.exists, names)):
        raise DataError(f"{path}: {names[0]!r} does not exist: list whole paths, or such from the current folder")
    return names


@dataclass(frozen=True)
class FileSample:
    """An image file, in place of a sample of a shard; see `dualenc.data.shards.sample.Sample`."""

    files: ImageFiles
    number: int

    @property
    def image(self) -> str:
        """The extension of the image."""
        return str(self).rpartition(".")[2].lower()

    @property
    def shard(self) -> str:
        """The folder of the file."""
        return os.path.dirname(str(self))

    @property
    def members(self) -> dict[str, tuple[int, int]]:
        """The members of the sample, without their places."""
        return {self.image: (0, 0)}

    def read(self, extension: str) -> bytes:
        """Read the bytes of the file.

        Raises:
            BadSample: If the file cannot be read.
        """
        return self.files.read(self.number)

    def __str__(self) -> str:
        return self.files.key(self.number)


class FilePart:
    """Some image files, in place of a shard; see `dualenc.data.shards.shard.Shard`.

    Args:
        number: number of the part.
        paths: paths of the files.
    """

    def __init__(self, number: int, paths: Sequence[str]) -> None:
        self.files = ImageFiles(paths, paths)
        states = [_state(path) for path in paths]
        digest = hashlib.blake2b(json.dumps(states).encode(), digest_size=16).hexdigest()
        self.facts: dict[str, Any] = {"name": f"images-{number:05d}", "digest": digest}

    def __len__(self) -> int:
        return len(self.files)

    def __str__(self) -> str:
        return self.facts["name"]

    def key(self, number: int) -> str:
        """Return the path of an image."""
        return self.files.key(number)


def _state(path: str) -> list[Any]:
    """Return what changes if a file does, without reading it."""
    try:
        status = os.stat(path)
    except OSError:
        return [path]
    return [path, status.st_size, status.st_mtime_ns]


class FileParts:
    """Image files in parts, in place of an index of shards; see `dualenc.data.shards.index.ShardIndex`.

    Args:
        paths: paths of the files.
    """

    images = IMAGE_EXTENSIONS

    def __init__(self, paths: Sequence[str]) -> None:
        pieces = [paths[start : start + PART] for start in range(0, len(paths), PART)]
        self.parts = [FilePart(number, piece) for number, piece in enumerate(pieces)]
        self.starts = [0, *accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> FileSample:
        part, number = divmod(row, PART)
        return FileSample(self.parts[part].files, number)
