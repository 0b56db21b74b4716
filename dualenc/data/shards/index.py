"""The index of the samples of a data set's shards.

`ShardIndex` knows the key of each sample, and the extension, the offset in the shard and the size of each of its
members. A sample is read by position, without reading through the tar, and no decoder is chosen by a member's name.
Nothing in a shard is ever executed, unpickled or used as a path.
"""

import fcntl
import hashlib
import json
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dualenc.data.shards.patterns import Patterns, expand_shards
from dualenc.data.shards.remote import Cache, fetch_small
from dualenc.data.shards.sample import Sample, image_members
from dualenc.data.shards.select import Expression
from dualenc.data.shards.selection import Selection, read_selection
from dualenc.data.shards.shard import (
    FILE_NAME,
    IMAGE_EXTENSIONS,
    Shard,
    hash_name,
    index_files,
    name_of,
    read_index,
    scan,
    write_index,
)
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.files import atomic_write, stand_in
from dualenc.utils.text import plural, printable
from dualenc.utils.urls import folder_of, is_remote, shown

__all__ = ["BadSample", "DataError", "Sample", "ShardIndex"]
SAVE_SECONDS = 300  # between writes of an index file while shards are scanned


class ShardIndex:
    """The index of all samples of a list of shards, or of a part of them. It is made with `build` or `load`.

    Example:
        >>> import tempfile
        >>> from webdataset import TarWriter
        >>> from dualenc import ShardIndex
        >>> folder = tempfile.TemporaryDirectory()
        >>> with TarWriter(f"{folder.name}/0.tar") as tar:
        ...     _ = tar.write({"__key__": "cat", "txt": "a cat", "json": {"width": 320}})
        ...     _ = tar.write({"__key__": "dog", "txt": "a dog", "json": {"width": 640}})
        >>> index = ShardIndex.build(folder.name)
        >>> len(index), index[1].key, index[1].read("txt")
        (2, 'dog', b'a dog')
        >>> [sample.key for sample in index.select("width < 500")]
        ['cat']
        >>> folder.cleanup()
    """

    def __init__(
        self, shards: Sequence[Shard], rows: np.ndarray | None = None, images: tuple[str, ...] = IMAGE_EXTENSIONS
    ) -> None:
        self.parts, self.images = list(shards), images
        self.rows = rows  # (S,) ascending sample numbers of the shards; None if all samples are in the index
        self.starts = [0, *np.cumsum([len(shard) for shard in self.parts]).tolist()]

    @classmethod
    def build(
        cls,
        urls: Patterns,
        *,
        image: str | None = None,
        rescan: bool = False,
        hashes: Sequence[str] = (),
        workers: int = 0,
        cache: Cache | None = None,
        unreadable: list[DataError] | None = None,
        track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> "ShardIndex":
        """Build the index of shards from the file `dualenc.index` in their folder, and scan the shards it lacks.

        The file is written there, or in the user's cache if the folder is read-only. Remote shards are scanned only
        with `rescan`; without it they need an index that was made before, or a `dualenc.index` in their folder.

        Args:
            urls: patterns of shards; see `dualenc.data.shards.patterns.find_files`.
            image: members that may hold the image of a sample; see `dualenc.data.shards.sample.image_members`.
            rescan: scan all shards, remote ones too, and ignore the index files that exist.
            hashes: content hashes to include, of "piece", "image" and "text"; see `DTYPES` in `shards/shard.py`.
            workers: number of processes that scan.
            cache: cache of remote shards; by default one in the user's cache folder.
            unreadable: list to which the errors of unreadable shards are appended; these shards are then left out.
            track: wrapper of the loop over the shards to scan, for a progress bar.

        Raises:
            DataError: If a pattern matches nothing; or a shard is not a readable uncompressed tar, has changed since it
                was indexed, or is remote and has no index.
        """
        images = image_members(image)
        names = tuple(hash_name(kind, images) for kind in hashes)
        build = _Build(expand_shards(urls), rescan, names, cache or Cache(), unreadable)
        build.look_up()
        build.scan(workers, track, hash_name("piece", images))
        return cls(build.shards(), images=images)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ShardIndex":
        """Load the index of all shards in the folder of an index file.

        Raises:
            DataError: If the file is damaged, or not an index.
        """
        return cls(list(read_index(path, os.path.dirname(os.fspath(path)), Cache()).values()))

    @classmethod
    def join(cls, indexes: Sequence["ShardIndex"]) -> "ShardIndex":
        """Return the index of the samples of several indexes of the same image members, one after the other."""
        shards = [shard for index in indexes for shard in index.parts]
        if all(index.rows is None for index in indexes):
            return cls(shards, images=indexes[0].images)
        starts = np.cumsum([0, *(index.starts[-1] for index in indexes)])
        rows = np.concatenate([index._all_rows() + start for index, start in zip(indexes, starts)])
        return cls(shards, rows, indexes[0].images)

    @property
    def shards(self) -> list[str]:
        """The shards' paths, or URLs without secrets."""
        return list(map(str, self.parts))

    def __repr__(self) -> str:
        more = "" if len(self.parts) < 2 else f" to {printable(self.shards[-1])}"
        where = f": {printable(self.shards[0])}{more}" if self.parts else ""
        return f"ShardIndex({plural(len(self), 'sample')} in {plural(len(self.parts), 'shard')}{where})"

    def __len__(self) -> int:
        return self.starts[-1] if self.rows is None else len(self.rows)

    def __getitem__(self, i: int) -> Sample:
        shard, number = self.find(i)
        return Sample(shard, shard.key(number), shard.members(number), self.images)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def key(self, i: int) -> str:
        """Return the key of sample i."""
        shard, number = self.find(i)
        return shard.key(number)

    def find(self, i: int) -> tuple[Shard, int]:
        """Return the shard of sample i, and the sample's number within the shard."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        row = int(i if self.rows is None else self.rows[i])
        number = bisect_right(self.starts, row) - 1
        return self.parts[number], row - self.starts[number]

    def _all_rows(self) -> np.ndarray:
        return np.arange(self.starts[-1]) if self.rows is None else self.rows

    def take(self, rows: np.ndarray) -> "ShardIndex":
        """Return the index of a part of the samples, given by ascending numbers."""
        rows = np.asarray(rows, np.int64) if self.rows is None else self.rows[rows]
        return ShardIndex(self.parts, rows, self.images)

    def having(self, extensions: Sequence[str]) -> np.ndarray:
        """Return a mask (S,) of the samples that have a member with one of these extensions."""
        found = []
        for shard in self.parts:
            arrays = shard.arrays
            wanted = [i for i, extension in enumerate(shard.facts["extensions"]) if extension in extensions]
            member = np.concatenate([[0], np.cumsum(np.isin(arrays["extension"], wanted))])
            found.append(np.diff(member[arrays["first"]]) > 0)
        return self._of_rows(found, bool)

    def hashes(self, name: str) -> np.ndarray:
        """Return the content hashes (S,) uint64 of a name that `build` was given."""
        name = hash_name(name, self.images)
        return self._of_rows([shard.arrays[name] for shard in self.parts], np.uint64)

    def _of_rows(self, of_shards: list[np.ndarray], dtype: type) -> np.ndarray:
        """Join arrays with a value for each sample of each shard, and take the values of this index."""
        joined = np.concatenate(of_shards).astype(dtype) if of_shards else np.zeros(0, dtype)
        return joined if self.rows is None else joined[self.rows]

    def files(self) -> list[Path]:
        """Return the paths of the index files of these shards, for each folder that has one."""
        folders = dict.fromkeys(folder_of(part.url) for part in self.parts)
        found = (next((path for path in index_files(folder) if path.is_file()), None) for folder in folders)
        return [path for path in found if path]

    def counts(self) -> list[int]:
        """Return the number of samples in each shard."""
        if self.rows is None:
            return [len(shard) for shard in self.parts]
        return np.diff(np.searchsorted(self.rows, self.starts)).tolist()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the shards' names without their folders, of their tar headers, and of the chosen samples.

        The members of the images are hashed too, except the usual ones.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([[part.facts["name"], part.facts["digest"]] for part in self.parts]).encode())
        if self.rows is not None and len(self.rows) < self.starts[-1]:
            digest.update(self.rows.astype("<i8").tobytes())
        if self.images != IMAGE_EXTENSIONS:
            digest.update(json.dumps(self.images).encode())
        return digest.hexdigest()

    def select(self, choice: str | Sequence[str] | Selection) -> "ShardIndex":
        """Return the index of the samples of a list, or of those whose `.json` fields meet a condition.

        Args:
            choice: a list of keys; the path of a list: a text file with one key per line, a `.select` of
                `dualenc filter`, or a `.npy` of DataComp's uids; or an expression such as
                `meta.width >= 200 and license in ["cc0", "cc-by"]` of field names, literals, comparisons, `and`, `or`,
                `not`, `in`, `len(...)`. A sample that lacks a field of the expression, or whose `.json` cannot be read,
                is not selected.

        Raises:
            DataError: If no sample is selected, a key is unknown, a shard has changed since it was selected from, or
                the expression cannot be parsed.
        """
        selection = read_selection(choice)
        if isinstance(selection, str):
            condition, option = Expression(selection), f"select {selection!r}"
            failures = [condition.failure(sample) for sample in self]
            rows = np.array([i for i, failure in enumerate(failures) if failure is None], np.int64)
            why = "" if len(rows) else f": {condition.explain(self.__getitem__, failures)}"
        else:
            option, rows, why = selection.source, selection.rows(self), ""
        if not len(rows):
            raise DataError(f"{option} selects 0 of {len(self)} samples{why}")
        return self.take(rows)

    def split(self, share: float) -> tuple["ShardIndex", "ShardIndex"]:
        """Split the samples by the content of their images: about `1 - share` and `share` of them.

        The side of a sample depends on its image alone, by the hash `piece`. So equal images are never on both sides,
        and adding shards moves no sample to the other side.

        Raises:
            DataError: If one of the sides would be empty.
        """
        name = hash_name("piece", self.images)
        shards = [shard.with_hashes(name) for shard in self.parts]  # reads images if `build` did not hash them
        held = ShardIndex(shards, self.rows, self.images).hashes("piece") < np.uint64(
            min(int(share * 2**64), 2**64 - 1)
        )
        if not held.any() or held.all():
            raise DataError(f"val: {share} of {len(self)} samples leaves one side empty; give another share or shards")
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))


class _Build:
    """The state of `ShardIndex.build`.

    Attributes:
        known: folder -> name -> shard, as read from index files and scanned.
        ready: path -> shard, for the shards that were scanned or match their index.
        missing: paths of the shards to scan.
        outdated: folders whose index file has to be written.
    """

    def __init__(
        self,
        paths: list[str],
        rescan: bool,
        hashes: tuple[str, ...],
        cache: Cache,
        unreadable: list[DataError] | None,
    ) -> None:
        self.paths, self.rescan, self.hashes, self.cache, self.unreadable = paths, rescan, hashes, cache, unreadable
        self.known = {folder: _read_indexes(folder, cache, rescan) for folder in dict.fromkeys(map(folder_of, paths))}
        self.ready: dict[str, Shard] = {}
        self.missing: list[str] = []
        self.outdated: set[str] = set()

    def look_up(self) -> None:
        """Look up the shards in the index files, and check that local shards have not changed."""
        for path in self.paths:
            folder, name = folder_of(path), name_of(path)
            shard = self.known[folder].get(name)
            if shard is None and is_remote(path) and not self.rescan:
                self.known[folder] |= _fetch_published_index(folder, self.cache)
                shard = self.known[folder].get(name)
                if shard is None:
                    message = f"{shown(path)} has no index: run `dualenc index` once with these shards"
                    self._raise_or_collect(DataError(message))
                    continue
            if shard is None or self.rescan:
                self.missing.append(path)
                continue
            shard.url = path  # with the query and the user of this URL, if it has any
            self._check(path, folder, shard)

    def _check(self, path: str, folder: str, shard: Shard) -> None:
        mtime = shard.facts["mtime"]
        try:
            if not is_remote(path):
                shard.check()
            if shard.facts["mtime"] != mtime:  # the headers are the same, but the data may have changed
                shard = self.known[folder][shard.facts["name"]] = shard.without_hashes()
            self.ready[path] = shard
        except OSError as error:
            self._raise_or_collect(DataError(f"shard {shard} cannot be read: {error.strerror}"))
        except DataError as error:
            self._raise_or_collect(error)
        if shard.facts["mtime"] != mtime:
            self.outdated.add(folder)

    def scan(self, workers: int, track: Callable[[Iterable[Any]], Iterable[Any]], piece: str) -> None:
        """Scan the missing shards, hash those that lack wanted hashes, and write the index files.

        Args:
            workers: see `ShardIndex.build`.
            track: see `ShardIndex.build`.
            piece: `hash_name` of the hash by which held-out samples are chosen; remote shards are always given it.
        """
        ready = self.ready.values()
        unhashed = [shard for shard in ready if not set(self.hashes) <= shard.arrays.keys()] if self.hashes else []
        scanner = _Scanner([*self.missing, *unhashed], self.hashes, self.cache, piece)
        saved = time.monotonic()
        try:
            for result in track(_results(scanner, workers)):
                if isinstance(result, DataError):
                    self._raise_or_collect(result)
                    continue
                self.ready[result.url] = result
                folder = folder_of(result.url)
                self.known[folder][result.facts["name"]] = result
                self.outdated.add(folder)
                if time.monotonic() - saved > SAVE_SECONDS:  # a killed process loses little work
                    _save_index(folder, self.known[folder], self.cache, self.rescan)
                    saved = time.monotonic()
        finally:
            for folder in self.outdated:
                _save_index(folder, self.known[folder], self.cache, self.rescan)

    def shards(self) -> list[Shard]:
        """Return the shards that can be read, in the order of the paths."""
        for path, shard in self.ready.items():
            # Prefer the mapped arrays of an index file: processes share them, and they may leave the memory.
            mapped = self.known[folder_of(path)].get(shard.facts["name"])
            if mapped is not None and set(self.hashes) <= mapped.arrays.keys():
                mapped.url = path
                self.ready[path] = mapped
        return [self.ready[path] for path in self.paths if path in self.ready]

    def _raise_or_collect(self, error: DataError) -> None:
        if self.unreadable is None:
            raise error from None
        self.unreadable.append(error)


def _read_indexes(folder: str, cache: Cache, rescan: bool = False) -> dict[str, Shard]:
    """Read the index files of a folder; the file in the user's cache may have hashes that the other one lacks."""
    found: dict[str, Shard] = {}
    for path in index_files(folder):
        if path.is_file():
            try:
                shards = read_index(path, folder, cache)
            except DataError:
                if not rescan:  # a rescan replaces a damaged file
                    raise
                continue
            for name, shard in shards.items():
                if name not in found or found[name].facts["digest"] == shard.facts["digest"]:
                    found[name] = shard
    return found


def _fetch_published_index(folder: str, cache: Cache) -> dict[str, Shard]:
    """Fetch the index file in the folder of remote shards, if there is one, and store it in the user's cache."""
    data = fetch_small(f"{folder}/{FILE_NAME}")
    if data is None or stand_in(data):  # some web servers answer with a page where a file is missing
        return {}
    path = index_files(folder)[0].with_suffix(".published")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise DataError(f"{path.parent} cannot be written: {error.strerror}; set another DUALENC_CACHE") from None
    try:
        found = read_index(path, folder, cache)
        _save_index(folder, {**_read_indexes(folder, cache), **found}, cache)
    except DataError:
        raise DataError(
            f"{shown(folder)}/{FILE_NAME} is damaged, or not a shard index of this version: replace or remove it"
        ) from None
    return found


def _save_index(folder: str, shards: dict[str, Shard], cache: Cache, rescan: bool = False) -> None:
    """Write the index file of a folder, and map its arrays into memory. If no path can be written, write nothing.

    Shards that another process has added meanwhile are kept; local shards that are gone are left out.
    """
    for path in index_files(folder):
        with suppress(OSError), _folder_lock(path.parent):
            others = {} if rescan or not path.is_file() else read_index(path, folder, cache)
            merged = {**others, **shards}
            names = [name for name in sorted(merged) if is_remote(folder) or os.path.exists(os.path.join(folder, name))]
            write_index(path, (merged[name] for name in names))
            shards |= read_index(path, folder, cache)
            return


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder for this process. On a file system without locks, the file of the last writer stays."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _results(scanner: "_Scanner", workers: int) -> Iterable[Any]:
    """Return what a scanner finds, in its order: from workers, or from this process if the shards are few.

    Scanning a few shards takes less time than starting workers, and than loading torch, which has them.
    """
    if len(scanner) <= 3:
        return scanner
    from dualenc.data.workers import item_loader

    return item_loader(scanner, range(len(scanner)), workers, waiting=True)


class _Scanner:
    """Data set of scanned shards, from paths and URLs to scan and shards to hash. Errors are returned, not raised."""

    def __init__(self, items: list[Any], hashes: tuple[str, ...], cache: Cache, piece: str) -> None:
        self.items, self.hashes, self.cache, self.piece = items, hashes, cache, piece

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Shard | DataError]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: int) -> Shard | DataError:
        try:
            shard = self.items[i]
            if isinstance(shard, str):
                shard = self._scan(shard)
            for name in self.hashes:
                shard = shard.with_hashes(name)
            return shard
        except DataError as error:
            return DataError(str(error))

    def _scan(self, url: str) -> Shard:
        if not is_remote(url):
            return scan(url, self.cache)
        file, path = self.cache.add(url)
        shard = scan(url, self.cache, str(path))
        shard.facts |= {"etag": file.etag, "content": file.digest}
        # Hashed while the copy is in the cache: a run that splits off held-out pairs would have to fetch it again.
        return shard.with_hashes(self.piece)
