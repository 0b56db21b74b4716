"""Shards: what lies where in the tar files of a data set.

`ShardIndex` knows for each sample its key, and for each of its members the extension, the offset in the shard and the
size. A sample is read by position, without walking the tar and without any decoder running on a member's name: nothing
in a shard is ever executed, unpickled or used as a path.
"""

import fcntl
import hashlib
import json
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from glob import escape, glob
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from torch.utils.data import Dataset

from dualenc.data.images import IMAGE_EXTENSIONS
from dualenc.data.shards.remote import Cache, fetch_small, glob_remote
from dualenc.data.shards.select import expression
from dualenc.data.shards.shard import FILE_NAME, Shard, index_files, name_of, read_index, scan, write_index
from dualenc.data.workers import each
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.files import atomic_write
from dualenc.utils.urls import PROTOCOLS, folder_of, is_remote, shown

__all__ = ["BadSample", "DataError", "Sample", "ShardIndex", "expand_shards"]
MAX_IMAGE, MAX_OTHER = 1 << 28, 1 << 24  # bytes of a member that are read
KEEP_EVERY = 300  # seconds after which an index that is being made is written down

Shards = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def expand_shards(shards: Shards) -> list[str]:
    """Paths and URLs of what users write: a path, a glob, a brace pattern, a folder, or a list of these.

    Raises:
        DataError: a part names no file, or is neither a local path nor of a store that is known.
    """
    parts = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    paths: list[str] = []
    for part in (os.fspath(part) for part in parts):
        if part.startswith("pipe:"):
            raise DataError(f"shards {part!r}: commands are never run; name the files, or URLs of {_STORES}")
        if is_remote(part) and part.partition("://")[0] not in PROTOCOLS:
            raise DataError(f"shards {shown(part)!r}: only local paths are read, and URLs of {_STORES}")
        try:
            patterns = [part] if os.path.exists(part) else list(braceexpand(part))
        except ValueError as error:
            raise DataError(f"shards {shown(part)!r}: {error}") from None
        for pattern in patterns:
            found = _remote(pattern) if is_remote(pattern) else _local(pattern)
            if not found:
                raise DataError(f"shards {shown(pattern)!r} match no file")
            paths += found
    if not paths:
        raise DataError("the list of shards is empty")
    paths, twice = distinct(paths)
    if twice:
        raise DataError(f"shards named twice: {', '.join(twice[:3])}")
    return paths


def distinct(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Each file once, and, for people, the paths that name an earlier one's again."""
    files: dict[str, str] = {}
    twice = []
    for path in paths:
        file = shown(path) if is_remote(path) else os.path.realpath(path)
        if file in files:
            twice.append(shown(path))
        files.setdefault(file, path)
    return list(files.values()), twice


_STORES = ", ".join(f"{name}://" for name in PROTOCOLS)


def _local(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        return sorted(glob(os.path.join(escape(pattern), "*.tar")))
    return [pattern] if os.path.exists(pattern) else sorted(glob(pattern))


def _remote(pattern: str) -> list[str]:
    path = shown(pattern)
    if any(letter in path for letter in "*?["):
        return glob_remote(pattern)
    return [pattern] if path.endswith(".tar") else glob_remote(f"{pattern.rstrip('/')}/*.tar")


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: where its members lie."""

    source: Shard
    key: str
    members: dict[str, tuple[int, int]]  # extension -> offset, size in bytes

    def __contains__(self, extension: str) -> bool:
        return extension in self.members

    @property
    def shard(self) -> str:
        """The shard's path or URL, for people."""
        return str(self.source)

    def read(self, extension: str) -> bytes:
        """The bytes of one member.

        Raises:
            BadSample: there is no such member, or it is larger than anything of its kind should be.
            DataError: the shard is gone or was changed.
        """
        if extension not in self.members:
            raise BadSample(self, f"no .{extension} among its members", ", ".join(sorted(self.members)))
        offset, size = self.members[extension]
        if size > (MAX_IMAGE if extension in IMAGE_EXTENSIONS else MAX_OTHER):
            raise BadSample(self, f".{extension} is too large", f"{size:,} bytes")
        return self.source.read(offset, size)

    def read_json(self) -> Any:
        """The parsed `.json` member.

        Raises:
            BadSample: it is missing or no JSON.
        """
        data = self.read("json")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:  # DataError, a ValueError, comes from outside the parser only
            raise BadSample(self, ".json cannot be read", str(error)) from None

    @property
    def image(self) -> str | None:
        """The extension of its picture, or None."""
        return next((extension for extension in IMAGE_EXTENSIONS if extension in self.members), None)

    def __str__(self) -> str:
        return f"{self.shard} sample {self.key!r}"


class ShardIndex:
    """What lies where in a list of shards, or in some of their samples. Make one with `build` or `load`."""

    def __init__(self, shards: Sequence[Shard], rows: np.ndarray | None = None) -> None:
        self.parts = list(shards)
        self.rows = rows  # (S,) ascending numbers among all samples of the shards; None for all of them
        self.starts = [0, *np.cumsum([len(shard) for shard in self.parts]).tolist()]

    @classmethod
    def build(
        cls,
        urls: Shards,
        *,
        anew: bool = False,
        hashes: Sequence[str] = (),
        workers: int = 0,
        cache: Cache | None = None,
        unreadable: list[DataError] | None = None,
        track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> "ShardIndex":
        """The index of shards, from `dualenc.index` in their folder where there is one.

        Local shards that it lacks are scanned, and the file is written, beside the shards or else among the user's
        cached files. Shards elsewhere need an index: one made before, or `dualenc.index` beside them.

        Args:
            urls: see `expand_shards`.
            anew: scan all of them, those elsewhere too, whatever there is.
            hashes: "piece", "image", "text": hashes of the content to have beside; see `dualenc.data.shards.shard`.
            workers: processes that scan.
            cache: for shards elsewhere.
            unreadable: takes the errors of shards that cannot be read, which are then left out.
            track: wraps the loop over the shards to scan, for a progress bar.

        Raises:
            DataError: a pattern matches nothing, or a shard is no readable uncompressed tar, is not what it was when it
                was indexed, or lies elsewhere and has no index.
        """
        work = _Build(expand_shards(urls), anew, tuple(hashes), cache or Cache(), unreadable)
        work.look_up()
        work.scan(workers, track)
        return cls(work.shards())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ShardIndex":
        """All shards of an index file, which lie in its folder.

        Raises:
            DataError: the file is no index, or damaged.
        """
        return cls(list(read_index(path, os.path.dirname(os.fspath(path)), Cache()).values()))

    @classmethod
    def join(cls, indexes: Sequence["ShardIndex"]) -> "ShardIndex":
        """The samples of several indexes, one after the other."""
        shards = [shard for index in indexes for shard in index.parts]
        if all(index.rows is None for index in indexes):
            return cls(shards)
        starts = np.cumsum([0, *(index.starts[-1] for index in indexes)])
        return cls(shards, np.concatenate([index._all_rows() + start for index, start in zip(indexes, starts)]))

    @property
    def shards(self) -> list[str]:
        """The shards' paths and URLs, for people."""
        return list(map(str, self.parts))

    def __len__(self) -> int:
        return self.starts[-1] if self.rows is None else len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        shard, place = self.find(i)
        return Sample(shard, shard.key(place), shard.members(place))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def key(self, i: int) -> str:
        """The key of sample i."""
        shard, place = self.find(i)
        return shard.key(place)

    def find(self, i: int) -> tuple[Shard, int]:
        """The shard of sample i, and its number there."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        row = int(i if self.rows is None else self.rows[i])
        number = bisect_right(self.starts, row) - 1
        return self.parts[number], row - self.starts[number]

    def _all_rows(self) -> np.ndarray:
        return np.arange(self.starts[-1]) if self.rows is None else self.rows

    def take(self, rows: np.ndarray) -> "ShardIndex":
        """The index of some of the samples, given by ascending numbers."""
        return ShardIndex(self.parts, np.asarray(rows, np.int64) if self.rows is None else self.rows[rows])

    def having(self, extensions: Sequence[str]) -> np.ndarray:
        """Which samples (S,) have a member with one of these extensions."""
        found = []
        for shard in self.parts:
            arrays = shard.arrays
            wanted = [i for i, extension in enumerate(shard.facts["extensions"]) if extension in extensions]
            member = np.concatenate([[0], np.cumsum(np.isin(arrays["extension"], wanted))])
            found.append(np.diff(member[arrays["first"]]) > 0)
        return self._of_rows(found, bool)

    def hashes(self, name: str) -> np.ndarray:
        """(S,) uint64 of the content, by a name that `build` was given."""
        return self._of_rows([shard.arrays[name] for shard in self.parts], np.uint64)

    def _of_rows(self, parts: list[np.ndarray], dtype: type) -> np.ndarray:
        whole = np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
        return whole if self.rows is None else whole[self.rows]

    def files(self) -> list[Path]:
        """The index files that know these shards; a folder that could not be written and has none is left out."""
        folders = dict.fromkeys(folder_of(part.url) for part in self.parts)
        found = (next((path for path in index_files(folder) if path.is_file()), None) for folder in folders)
        return [path for path in found if path]

    def counts(self) -> list[int]:
        """Samples in each shard."""
        if self.rows is None:
            return [len(shard) for shard in self.parts]
        return np.diff(np.searchsorted(self.rows, self.starts)).tolist()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the shards' names without their folders, of their tar headers, and of which samples are meant."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([[part.facts["name"], part.facts["digest"]] for part in self.parts]).encode())
        if self.rows is not None and len(self.rows) < self.starts[-1]:
            digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def select(self, choice: str | Sequence[str]) -> "ShardIndex":
        """The samples with the given keys, or those whose `.json` fields fulfil an expression.

        Args:
            choice: a list of keys; the path of a text file with one key a line; or an expression such as
                `width >= 200 and license in ["cc0", "cc-by"]` with names for fields, literals, comparisons, `and`,
                `or`, `not`, `in`. A sample without a field that the expression asks for, or whose `.json` cannot be
                read, is not selected.

        Raises:
            DataError: nothing is selected, a key is unknown, or the expression does not parse.
        """
        if isinstance(choice, str) and os.path.isfile(choice):
            where = f"select {choice}"
            choice = [line.strip() for line in Path(choice).read_text("utf-8").splitlines() if line.strip()]
        else:
            where = f"select {choice!r}" if isinstance(choice, str) else "select"
        if isinstance(choice, str):
            test = expression(choice)
            rows = [i for i, sample in enumerate(self) if "json" in sample and test(_fields(sample))]
        else:
            wanted = set(choice)
            keys = [self.key(i) for i in range(len(self))]
            rows = [i for i, key in enumerate(keys) if key in wanted]
            if unknown := sorted(wanted - set(keys)):
                raise DataError(f"{where}: {len(unknown)} keys are in no shard, such as {unknown[0]!r}")
        if not rows:
            raise DataError(f"{where} selects none of {len(self)} samples")
        return self.take(np.array(rows, dtype=np.int64))

    def split(self, share: float) -> tuple["ShardIndex", "ShardIndex"]:
        """Two parts by image content: about `1 - share` and `share` of the samples.

        Which part a sample falls into depends on the bytes of its image alone, so the same picture never stands in
        both, and adding shards moves nothing. Of a large file a piece is read: equal files have equal pieces.

        Raises:
            DataError: one of the parts would be empty.
        """
        shards = [shard.hashed("piece") for shard in self.parts]  # read where `build` was not asked for it
        held = ShardIndex(shards, self.rows).hashes("piece") < np.uint64(min(int(share * 2**64), 2**64 - 1))
        if not held.any() or held.all():
            raise DataError(f"val: {share} of {len(self)} samples leaves one side empty; give another share or shards")
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))


def _fields(sample: Sample) -> Any:
    try:
        return sample.read_json()
    except BadSample:
        return None


# Making


class _Build:
    """The work of `ShardIndex.build`; see there.

    Attributes:
        known: folder -> name -> shard, of the index files.
        ready: path -> shard, of those that are what their index says.
        missing: paths to scan.
        touched: folders whose index is no longer what it should be.
    """

    def __init__(
        self,
        paths: list[str],
        anew: bool,
        hashes: tuple[str, ...],
        cache: Cache,
        unreadable: list[DataError] | None,
    ) -> None:
        self.paths, self.anew, self.hashes, self.cache, self.unreadable = paths, anew, hashes, cache, unreadable
        self.known = {folder: _known(folder, cache, anew) for folder in dict.fromkeys(map(folder_of, paths))}
        self.ready: dict[str, Shard] = {}
        self.missing: list[str] = []
        self.touched: set[str] = set()

    def look_up(self) -> None:
        """Finds in index files what they know, and checks that local shards are still so."""
        for path in self.paths:
            folder, name = folder_of(path), name_of(path)
            shard = self.known[folder].get(name)
            if shard is None and is_remote(path) and not self.anew:
                self.known[folder] |= _published(folder, self.cache)
                shard = self.known[folder].get(name)
                if shard is None:
                    without = f"{shown(path)} has no index: `dualenc index` with these shards reads them once"
                    self._refuse(DataError(without))
                    continue
            if shard is None or self.anew:
                self.missing.append(path)
                continue
            shard.url = path  # with its query, if it has one
            self._check(path, folder, shard)

    def _check(self, path: str, folder: str, shard: Shard) -> None:
        time_then = shard.facts["mtime"]
        try:
            if not is_remote(path):
                shard.check()
            if shard.facts["mtime"] != time_then:  # the same headers, but perhaps other content behind them
                shard = self.known[folder][shard.facts["name"]] = shard.without_hashes()
            self.ready[path] = shard
        except OSError as error:
            self._refuse(DataError(f"shard {shard} cannot be read: {error.strerror}"))
        except DataError as error:
            self._refuse(error)
        if shard.facts["mtime"] != time_then:
            self.touched.add(folder)

    def scan(self, workers: int, track: Callable[[Iterable[Any]], Iterable[Any]]) -> None:
        """Scans the missing shards, hashes those without the wanted hashes, and writes the index files."""
        ready = self.ready.values()
        without = [shard for shard in ready if not set(self.hashes) <= shard.arrays.keys()] if self.hashes else []
        scans = _Scan([*self.missing, *without], self.hashes, self.cache)
        kept = time.monotonic()
        try:
            workers = workers if len(scans) > 3 else 0  # a few are not worth the start of processes
            for item in track(each(scans, range(len(scans)), workers)):
                if isinstance(item, DataError):
                    self._refuse(item)
                    continue
                self.ready[item.url] = item
                folder = folder_of(item.url)
                self.known[folder][item.facts["name"]] = item
                self.touched.add(folder)
                if time.monotonic() - kept > KEEP_EVERY:  # what was read is not read again, whatever comes
                    _keep(folder, self.known[folder], self.cache, self.anew)
                    kept = time.monotonic()
        finally:
            for folder in self.touched:
                _keep(folder, self.known[folder], self.cache, self.anew)

    def shards(self) -> list[Shard]:
        """The shards that can be read, in the order of the paths."""
        for path, shard in self.ready.items():
            # From the file where there is one: what is mapped is shared by all processes, and need not stay in memory.
            mapped = self.known[folder_of(path)].get(shard.facts["name"])
            if mapped is not None and set(self.hashes) <= mapped.arrays.keys():
                mapped.url = path
                self.ready[path] = mapped
        return [self.ready[path] for path in self.paths if path in self.ready]

    def _refuse(self, error: DataError) -> None:
        if self.unreadable is None:
            raise error from None
        self.unreadable.append(error)


def _known(folder: str, cache: Cache, anew: bool = False) -> dict[str, Shard]:
    """What index files say of a folder; the one among the user's cached files may know more of the same shards."""
    found: dict[str, Shard] = {}
    for path in index_files(folder):
        if path.is_file():
            try:
                here = read_index(path, folder, cache)
            except DataError:
                if not anew:  # else it is made anew
                    raise
                continue
            for name, shard in here.items():
                if name not in found or found[name].facts["digest"] == shard.facts["digest"]:
                    found[name] = shard
    return found


def _published(folder: str, cache: Cache) -> dict[str, Shard]:
    """What an index beside shards elsewhere says, kept among the user's cached files from now on."""
    data = fetch_small(f"{folder}/{FILE_NAME}")
    if data is None:
        return {}
    path = index_files(folder)[0].with_suffix(".published")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as beside:
            beside.write_bytes(data)
    except OSError as error:
        raise DataError(f"{path.parent} cannot be written: {error.strerror}; DUALENC_CACHE names another") from None
    try:
        found = read_index(path, folder, cache)
        _keep(folder, {**_known(folder, cache), **found}, cache)
    except DataError:
        raise DataError(
            f"{shown(folder)}/{FILE_NAME} is no whole shard index of this version: replace or remove it"
        ) from None
    return found


def _keep(folder: str, shards: dict[str, Shard], cache: Cache, anew: bool = False) -> None:
    """Writes the index of a folder where that can be done, and maps what is written; where not, it stays in memory.

    Shards that another process has added meanwhile stay; local ones that are gone do not.
    """
    for path in index_files(folder):
        with suppress(OSError), _alone(path.parent):
            others = {} if anew or not path.is_file() else read_index(path, folder, cache)
            whole = {**others, **shards}
            names = [name for name in sorted(whole) if is_remote(folder) or os.path.exists(os.path.join(folder, name))]
            write_index(path, (whole[name] for name in names))
            shards |= read_index(path, folder, cache)
            return


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; where the file system has no locks, several, of which the last one's file stays."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class _Scan(Dataset[Any]):
    """Scans a path or URL, or adds hashes to a shard; an error is a result."""

    def __init__(self, items: list[Any], hashes: tuple[str, ...], cache: Cache) -> None:
        self.items, self.hashes, self.cache = items, hashes, cache

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Shard | DataError:
        try:
            shard = self.items[i]
            if isinstance(shard, str):
                shard = self._scan(shard)
            for name in self.hashes:
                shard = shard.hashed(name)
            return shard
        except DataError as error:
            return DataError(str(error))

    def _scan(self, url: str) -> Shard:
        if not is_remote(url):
            return scan(url, self.cache)
        place, path = self.cache.add(url)
        shard = scan(url, self.cache, str(path))
        shard.facts |= {"etag": place.etag, "content": place.digest}
        return shard.hashed("piece")  # while it is here: a run that holds pairs out would have to fetch all of it again
