"""What lies where in one shard, and the file that keeps it for all shards of a folder.

An index file is plain arrays one after the other, each at a multiple of eight bytes, little-endian, and behind them a
JSON that says where they are: read by mapping it into memory, so that a process holds what it uses. Layout:

    16 bytes    "dualenc index 1\\n"
    arrays      those of one shard, then those of the next
    JSON        {"shards": [{"name", "size", ..., "check", "arrays": {name: [offset, count]}}]}
    8 bytes     length of the JSON, little-endian
    16 bytes    BLAKE2b-128 of the JSON
"""

import errno
import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from dualenc.data.images import IMAGE_EXTENSIONS
from dualenc.data.shards.remote import Cache, Place
from dualenc.data.shards.tar import Member, TarError, members
from dualenc.utils.errors import DataError
from dualenc.utils.files import atomic_write
from dualenc.utils.urls import cache_folder, is_remote, shown

MAGIC = b"dualenc index 1\n"
FILE_NAME = "dualenc.index"
DTYPES = {
    "first": "<u4",  # (S+1,) of each sample into the member arrays
    "extension": "<u2",  # (M,) into the shard's `extensions`
    "offset": "<i8",  # (M,) of the data in the shard, bytes
    "size": "<i8",  # (M,) bytes
    "key_end": "<u4",  # (S,) into `keys`
    "keys": "|u1",  # (K,) all keys one after the other, UTF-8
    # Hashes, there when somebody has asked for them; see `Shard.hashed`.
    "piece": "<u8",  # (S,) of the image's size and up to 8 KiB from its middle: cheap, and equal for equal images
    "image": "<u8",  # (S,) of the whole image
    "text": "<u8",  # (S,) of the caption member: .txt, or else .json
}
TRIES = 3  # of reading from a disk that reports an error
_FILES = 64  # open at once


class Shard:
    """One shard: what it is, where its members lie, and their bytes.

    Attributes:
        url: path or URL.
        facts: `name`, `size` (bytes), `mtime` (ns, 0 elsewhere), `digest` (of its tar headers), `etag` and `content`
            (digest of all of it; both only elsewhere), `samples`, `extensions`.
    """

    def __init__(
        self, url: str, facts: dict[str, Any], arrays: "_Mapped | dict[str, np.ndarray]", cache: Cache
    ) -> None:
        self.url, self.facts, self.cache = url, facts, cache
        self._arrays = arrays
        self._checked = False
        self._touched = float("-inf")  # when the cache was last told of its use

    def __len__(self) -> int:
        return self.facts["samples"]

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def place(self) -> Place:
        """Of a shard elsewhere."""
        facts = self.facts
        return Place(self.url, facts["size"], facts["etag"], facts["content"], facts["digest"])

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """By the names of `DTYPES`.

        Raises:
            DataError: the index file is damaged.
        """
        if isinstance(self._arrays, dict):
            return self._arrays
        found = self._arrays.read()
        if not self._checked:
            first, size, offset = found["first"], found["size"], found["offset"]
            whole = (
                self._arrays.check == _digest(found)
                and len(first) == len(self) + 1
                and len(found["key_end"]) == len(self)
                and len(found["extension"]) == len(size) == len(offset) == first[-1]
                and bool((np.diff(first.astype(np.int64)) >= 0).all())
                and bool((np.diff(found["key_end"].astype(np.int64)) >= 0).all())
                and (not len(self) or found["key_end"][-1] == len(found["keys"]))
                and (not len(size) or found["extension"].max() < len(self.facts["extensions"]))
                and (not len(size) or (offset.min() >= 0 and size.min() >= 0))
                and (not len(size) or (offset + size).max() <= self.facts["size"])
                and all(len(found[name]) == len(self) for name in ("piece", "image", "text") if name in found)
            )
            if not whole:
                raise _damaged(self._arrays.path)
            self._checked = True
        return found

    def key(self, i: int) -> str:
        """Of sample i."""
        ends = self.arrays["key_end"]
        return self.arrays["keys"][int(ends[i - 1]) if i else 0 : ends[i]].tobytes().decode("utf-8", "surrogateescape")

    def members(self, i: int) -> dict[str, tuple[int, int]]:
        """Extension -> offset and size in bytes, of sample i."""
        arrays, names = self.arrays, self.facts["extensions"]
        span = slice(*arrays["first"][i : i + 2].tolist())
        extension, offset, size = (arrays[name][span].tolist() for name in ("extension", "offset", "size"))
        return {names[kind]: place for kind, place in zip(extension, zip(offset, size))}

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the shard; one that lies elsewhere is fetched.

        Raises:
            DataError: it is gone, has changed since it was indexed, or the disk fails again and again.
        """
        data, left = b"", TRIES
        while left:
            left -= 1
            try:
                file = self._file()  # held while it is read: another thread may let go of it
                while len(data) < size and (more := os.pread(file.descriptor, size - len(data), offset + len(data))):
                    data += more  # all at once, but for more than 2 GiB
                break
            except FileNotFoundError:
                if is_remote(self.url) and left:  # another process has made room just now
                    continue
                raise DataError(f"shard {self} is gone since it was indexed") from None
            except OSError as error:
                if not left:
                    raise DataError(f"shard {self} cannot be read: {error.strerror}; {TRIES} tries") from None
                time.sleep(0.1 * 4 ** (TRIES - left))
        if len(data) != size:
            raise changed(self.url)
        return data

    @cached_property
    def _copy(self) -> str:
        """Where the cache has a shard elsewhere: of its name and content, which stay as they are."""
        return str(self.cache.folder / self.place.name)

    def _file(self) -> "_File":
        if is_remote(self.url):
            path = self._copy
            try:
                status = os.stat(path)
            except FileNotFoundError:
                status = None
            if status is None or status.st_size != self.facts["size"]:
                status = os.stat(self.cache.path(self.place))
            if time.monotonic() - self._touched > 60 or (path, status.st_ino) not in _HELD:
                self._touched = time.monotonic()
                self.cache.touch(self.place)
            return open_kept(path, status.st_ino)
        return open_kept(self.url, self.check().st_ino)

    def check(self) -> os.stat_result:
        """Looks whether a local shard is what its index says.

        Copied and touched ones have other times: their headers say whether they are the same.

        Raises:
            DataError: it is not.
            OSError: it cannot be found.
        """
        status = os.stat(self.url)
        if status.st_mtime_ns != self.facts["mtime"] or status.st_size != self.facts["size"]:
            now = scan(self.url, self.cache).facts if status.st_size == self.facts["size"] else {"digest": ""}
            if now["digest"] != self.facts["digest"]:
                raise changed(self.url)
            self.facts["mtime"] = now["mtime"]
        return status

    def hashed(self, name: str) -> "Shard":
        """This shard with the array `piece`, `image` or `text` of `DTYPES` beside the others."""
        if name in self.arrays:
            return self
        hashes = np.array([self._hash(name, i) for i in range(len(self))], dtype=DTYPES[name])
        return Shard(self.url, self.facts, {**self.arrays, name: hashes}, self.cache)

    def without_hashes(self) -> "Shard":
        """This shard without what its content was."""
        kept = {name: array for name, array in self.arrays.items() if name not in ("piece", "image", "text")}
        return Shard(self.url, self.facts, kept, self.cache)

    def _hash(self, name: str, i: int) -> int:
        found = self.members(i)
        wanted = ("txt", "json") if name == "text" else IMAGE_EXTENSIONS
        extension = next((extension for extension in wanted if extension in found), None)
        if extension is None:
            return 0
        offset, size = found[extension]
        if name != "piece":
            return content_hash(self.read(offset, size))
        piece = _middle(size)
        return content_hash(self.read(offset + piece.start, len(piece)), size)


def _middle(size: int) -> range:
    piece = min(size, 8192)
    return range((size - piece) // 2, (size + piece) // 2)


def partial_hash(data: bytes) -> int:
    """The `piece` of an image's bytes, see `DTYPES`."""
    piece = _middle(len(data))
    return content_hash(data[piece.start : piece.stop], len(data))


def content_hash(data: bytes, more: int = 0) -> int:
    """64 bits of BLAKE2b: equal for equal bytes, and for others in one case of 2^64."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=more.to_bytes(8, "little")).digest(), "little")


def changed(url: str) -> DataError:
    """The error of a shard that is not what its index says."""
    return DataError(f"shard {shown(url)} changed since it was indexed; if that is meant: dualenc index {shown(url)}")


def scan(url: str, cache: Cache, path: str | None = None) -> Shard:
    """Reads the tar headers of a shard.

    A sample is the members that share their path up to the first dot of the base name, as webdataset defines it, and
    the same members are passed over: hidden ones, those without extension, `__meta__`.  They need not stand together.

    Args:
        url: of the shard.
        cache: where a shard elsewhere is read from later.
        path: of its copy, where it lies elsewhere.

    Raises:
        DataError: it is no whole uncompressed tar, or a key has two members of one extension.
    """
    found = _Headers(url)
    try:
        with open(path or url, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            for member in members(file):
                found.add(member)
    except TarError as error:
        raise DataError(f"shard {shown(url)} cannot be read: {error}") from None
    except OSError as error:
        raise DataError(f"shard {shown(url)} cannot be read: {error.strerror}") from None
    facts = {
        "name": name_of(url),
        "size": status.st_size,
        "mtime": 0 if is_remote(url) else status.st_mtime_ns,
        "digest": found.digest.hexdigest(),
        "etag": "",
        "content": "",
        "samples": len(found.number),
        "extensions": [extension.decode("utf-8", "surrogateescape") for extension in found.extensions],
    }
    return Shard(url, facts, found.arrays(), cache)


class _Headers:
    """The members of a shard, gathered to samples."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.number: dict[bytes, int] = {}  # sample of each key
        self.extensions: dict[bytes, int] = {}
        self.digest = hashlib.blake2b(digest_size=16)
        self._owner: list[int] = []
        self._found: list[tuple[int, int, int]] = []
        self._pairs: set[tuple[int, int]] = set()
        self._current, self._sample = b"", -1

    def add(self, member: Member) -> None:
        """Takes the next member; those that webdataset passes over belong to no sample."""
        name, offset, size, header = member
        self.digest.update(header)
        folder, slash, base = name.rpartition(b"/")
        stem, dot, extension = base.partition(b".")
        if not stem or not dot or (name[:2] == b"__" and name.partition(b"/")[0][-2:] == b"__"):
            return
        key = folder + slash + stem
        if key != self._current:
            self._current, self._sample = key, self.number.setdefault(key, len(self.number))
        kind = self.extensions.setdefault(extension.lower(), len(self.extensions))
        if (self._sample, kind) in self._pairs:
            text = key.decode("utf-8", "surrogateescape")
            raise DataError(
                f"{shown(self.url)} sample {text!r}: two members .{extension.decode('utf-8', 'replace')}, the second "
                f"at byte {offset:,}; keys must differ within a shard"
            )
        self._pairs.add((self._sample, kind))
        self._owner.append(self._sample)
        self._found.append((kind, offset, size))

    def arrays(self) -> dict[str, np.ndarray]:
        """All of them by the names of `DTYPES`."""
        if len(self.extensions) > 1 << 16 or len(self._found) >= 1 << 32:
            raise DataError(
                f"shard {shown(self.url)} has {len(self.extensions):,} kinds of members: it is no set of samples"
            )
        order = np.argsort(
            np.array(self._owner, dtype=np.int64), kind="stable"
        )  # members that stand apart come together
        table = np.array(self._found, dtype=np.int64).reshape(-1, 3)[order]
        counts = np.bincount(self._owner, minlength=len(self.number)) if self._owner else []
        arrays = {
            "first": np.concatenate([[0], np.cumsum(counts)]),
            "extension": table[:, 0],
            "offset": table[:, 1],
            "size": table[:, 2],
            "key_end": np.cumsum([len(key) for key in self.number], dtype=np.int64),
            "keys": np.frombuffer(b"".join(self.number), dtype=np.uint8),
        }
        return {name: array.astype(DTYPES[name]) for name, array in arrays.items()}


def name_of(url: str) -> str:
    """Of a shard in its folder."""
    return os.path.basename(shown(url))


# The file


class _Mapped:
    """The arrays of one shard in an index file; goes to another process as its place there."""

    def __init__(
        self, path: str, stamp: tuple[int, int], facts: dict[str, Any], places: dict[str, list[int]], check: str
    ) -> None:
        self.path, self.stamp, self.places, self.check = path, stamp, places, check
        self.shard = facts["name"], facts["digest"]
        self._found: dict[str, np.ndarray] | None = None
        self._buffer: np.ndarray | None = None

    def read(self) -> dict[str, np.ndarray]:
        if self._found is None:
            buffer = self._buffer = self._map()
            self._found = {}
            for name, (offset, count) in self.places.items():
                end = offset + count * np.dtype(DTYPES[name]).itemsize
                if not 0 <= offset <= end <= len(buffer):
                    raise _damaged(self.path)
                self._found[name] = buffer[offset:end].view(DTYPES[name])
        return self._found

    def _map(self) -> np.ndarray:
        """The file in memory. Where another run has written it anew, the shard is looked for in the new one."""
        mapped = _MAPS.get((self.path, self.stamp))
        if mapped is None:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                mapped = np.memmap(file, np.uint8, "r").view(np.ndarray)  # parts of a memmap are slow to take
            stamp = status.st_size, status.st_mtime_ns
            mapped = self._buffer = _MAPS.setdefault((self.path, stamp), mapped)
            if stamp != self.stamp:
                name, digest = self.shard
                now = read_index(self.path, "", Cache()).get(name)
                if now is None or now.facts["digest"] != digest or not isinstance(now._arrays, _Mapped):
                    raise changed(os.path.join(os.path.dirname(self.path), name))
                self.stamp, self.places, self.check = now._arrays.stamp, now._arrays.places, now._arrays.check
                return self._map()
        return mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None, "_buffer": None}


# One of each file in a process, as long as a shard uses it.
_MAPS: WeakValueDictionary[tuple[str, tuple[int, int]], np.ndarray] = WeakValueDictionary()


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _damaged(path: str | os.PathLike[str]) -> DataError:
    return DataError(f"{path} is no whole shard index of this version: remove it, and `dualenc index` makes it anew")


def read_index(path: str | os.PathLike[str], folder: str, cache: Cache) -> dict[str, Shard]:
    """The shards of an index file by name, as lying in a folder, which may be a URL.

    Raises:
        DataError: the file is damaged, or of another format.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            magic = file.read(len(MAGIC))
            file.seek(max(0, size - 24))
            tail = file.read(24)
            length = int.from_bytes(tail[:8], "little")
            if magic != MAGIC or not 0 < length <= size - 40:
                raise _damaged(path)
            file.seek(size - 24 - length)
            text = file.read(length)
            status = os.fstat(file.fileno())
        if hashlib.blake2b(text, digest_size=16).digest() != tail[8:]:
            raise _damaged(path)
        stamp = (status.st_size, status.st_mtime_ns)
        shards = {}
        for facts in json.loads(text)["shards"]:
            places, check = facts.pop("arrays"), facts.pop("check")
            if not DTYPES.keys() >= places.keys() or os.path.basename(facts["name"]) != facts["name"]:
                raise _damaged(path)
            shards[facts["name"]] = Shard(
                os.path.join(folder, facts["name"]), facts, _Mapped(os.fspath(path), stamp, facts, places, check), cache
            )
        return shards
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(path) from None


def write_index(path: str | os.PathLike[str], shards: Iterable[Shard]) -> None:
    """Writes an index file, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.stat().st_mode & 0o222:  # which root could write all the same
        raise PermissionError(errno.EACCES, "the folder is read-only", str(path.parent))
    with atomic_write(path) as beside, open(beside, "wb") as file:
        file.write(MAGIC)
        head = []
        for shard in shards:
            places = {}
            for name, array in shard.arrays.items():
                file.write(bytes(-file.tell() % 8))
                places[name] = [file.tell(), len(array)]
                file.write(np.ascontiguousarray(array).data)
            head.append({**shard.facts, "check": _digest(shard.arrays), "arrays": places})
        text = json.dumps({"shards": head}).encode()
        file.write(text + len(text).to_bytes(8, "little") + hashlib.blake2b(text, digest_size=16).digest())


# Open files


class _File:
    """An open file that closes when nothing holds it; whoever reads it does."""

    def __init__(self, path: str, inode: int) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        if os.fstat(self.descriptor).st_ino != inode:
            raise OSError(errno.ESTALE, "replaced while it was opened", path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # os.open may have failed
            os.close(self.descriptor)


_HELD: OrderedDict[tuple[str, int], _File] = OrderedDict()
_HOLDING = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_HOLDING=threading.Lock()))  # a thread may have held it


def open_kept(path: str, inode: int) -> _File:
    """A file, kept open by path and inode: another file of that name is opened anew."""
    key = (path, inode)
    with _HOLDING:
        if key not in _HELD:
            for old in [old for old, file in _HELD.items() if not os.fstat(file.descriptor).st_nlink]:
                del _HELD[old]  # removed from the cache of fetched shards: its room is free when nobody holds it
            _HELD[key] = _File(path, inode)
            while len(_HELD) > _FILES:
                _HELD.popitem(last=False)
        _HELD.move_to_end(key)
        return _HELD[key]


def index_files(folder: str) -> Sequence[Path]:
    """Where the index of a folder may be: in it, and where that cannot be written, among the user's cached files."""
    name = hashlib.blake2b((shown(folder) if is_remote(folder) else os.path.abspath(folder)).encode(), digest_size=16)
    cached = cache_folder() / "index" / f"{name.hexdigest()}.index"
    return [cached] if is_remote(folder) else [Path(folder) / FILE_NAME, cached]
