"""One shard: the locations of its members and their bytes; and the index file of all shards of a folder.

An index file holds plain little-endian arrays, each at a multiple of eight bytes, followed by a JSON with their
offsets. It is mapped into memory, so that a process loads only the arrays that it uses. Layout:

    16 bytes    "dualenc index 1\\n"
    arrays      of the first shard, then of the next
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
from shlex import quote
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from dualenc.data.shards.remote import Cache, RemoteFile
from dualenc.data.shards.tar import Member, TarError, members
from dualenc.utils.errors import DataError
from dualenc.utils.files import atomic_write, stand_in
from dualenc.utils.urls import cache_folder, is_remote, shown

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of the members that may hold the image
MAGIC = b"dualenc index 1\n"
FILE_NAME = "dualenc.index"
DTYPES = {
    "first": "<u4",  # (S+1,) number of each sample's first member in the member arrays
    "extension": "<u2",  # (M,) number in the shard's `extensions`
    "offset": "<i8",  # (M,) bytes from the start of the shard to the data
    "size": "<i8",  # (M,) bytes
    "key_end": "<u4",  # (S,) end of each sample's key in `keys`
    "keys": "|u1",  # (K,) all keys joined, UTF-8
    # The hashes are optional; see `Shard.with_hashes`. Those of images that are other members have a name with the
    # members, such as "piece:input.jpg"; see `hash_name`.
    "piece": "<u8",  # (S,) of the image's size and up to 8 KiB from its middle: cheap, and equal for equal images
    "image": "<u8",  # (S,) of the whole image
    "text": "<u8",  # (S,) of the caption member: .txt, or .json if there is no .txt
}
HASHES = ("piece", "image", "text")
TRIES = 3  # to read from a disk that reports an error
_MAX_OPEN_FILES = 64


class Shard:
    """One shard: its facts, the locations of its members, and their bytes.

    Attributes:
        url: path or URL.
        facts: `name`, `size` (bytes), `mtime` (ns; 0 for a remote shard), `digest` (of its tar headers), `samples`,
            `extensions`; and for a remote shard `etag` and `content` (digest of the whole file), else empty.
    """

    def __init__(
        self, url: str, facts: dict[str, Any], arrays: "_MappedArrays | dict[str, np.ndarray]", cache: Cache
    ) -> None:
        self.url, self.facts, self.cache = url, facts, cache
        self._arrays = arrays
        self._verified = False
        self._touched = float("-inf")  # when the copy in the cache was last marked as used

    def __len__(self) -> int:
        return self.facts["samples"]

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def remote_file(self) -> RemoteFile:
        """The description of a remote shard by which the cache finds it."""
        facts = self.facts
        return RemoteFile(self.url, facts["size"], facts["etag"], facts["content"], facts["digest"])

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the index by the names of `DTYPES`.

        Raises:
            DataError: If the index file is damaged.
        """
        if isinstance(self._arrays, dict):
            return self._arrays
        found = self._arrays.read()
        if not self._verified:
            first, size, offset = found["first"], found["size"], found["offset"]
            valid = (
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
                and all(len(array) == len(self) for name, array in found.items() if _kind(name) in HASHES)
            )
            if not valid:
                raise _damaged_error(self._arrays.path)
            self._verified = True
        return found

    def key(self, i: int) -> str:
        """Return the key of sample i."""
        ends = self.arrays["key_end"]
        return self.arrays["keys"][int(ends[i - 1]) if i else 0 : ends[i]].tobytes().decode("utf-8", "surrogateescape")

    def members(self, i: int) -> dict[str, tuple[int, int]]:
        """Return the members of sample i: extension -> offset and size in bytes."""
        arrays, names = self.arrays, self.facts["extensions"]
        span = slice(*arrays["first"][i : i + 2].tolist())
        extension, offset, size = (arrays[name][span].tolist() for name in ("extension", "offset", "size"))
        return {names[number]: location for number, location in zip(extension, zip(offset, size))}

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes of the shard; a remote shard is fetched into the cache first.

        Raises:
            DataError: If the shard is gone or has changed since it was indexed, or the disk fails repeatedly.
        """
        data, left = b"", TRIES
        while left:
            left -= 1
            try:
                file = self._file()  # the reference keeps the file open even if another thread drops it from the cache
                while len(data) < size and (more := os.pread(file.descriptor, size - len(data), offset + len(data))):
                    data += more  # one call reads everything up to 2 GiB
                break
            except FileNotFoundError:
                if is_remote(self.url) and left:  # another process has removed the copy to make room
                    continue
                raise DataError(f"shard {self} is gone since it was indexed") from None
            except OSError as error:
                if not left:
                    raise DataError(f"shard {self} cannot be read: {error.strerror}; {TRIES} tries") from None
                time.sleep(0.1 * 4 ** (TRIES - left))
        if len(data) != size:
            raise changed_error(self.url)
        return data

    @cached_property
    def _copy(self) -> str:
        """The path of a remote shard's copy in the cache; cached because its name and content do not change."""
        return str(self.cache.folder / self.remote_file.name)

    def _file(self) -> "_File":
        if is_remote(self.url):
            path = self._copy
            try:
                status = os.stat(path)
            except FileNotFoundError:
                status = None
            if status is None or status.st_size != self.facts["size"]:
                status = os.stat(self.cache.path(self.remote_file))
            if time.monotonic() - self._touched > 60 or (path, status.st_ino) not in _OPEN_FILES:
                self._touched = time.monotonic()
                self.cache.touch(self.remote_file)
            return open_cached(path, status.st_ino)
        return open_cached(self.url, self.check().st_ino)

    def check(self) -> os.stat_result:
        """Check that a local shard has not changed since it was indexed.

        A shard that was copied or touched has another modification time. Then its tar headers are compared.

        Raises:
            DataError: If the shard has changed.
            OSError: If the shard cannot be found.
        """
        status = os.stat(self.url)
        if status.st_mtime_ns != self.facts["mtime"] or status.st_size != self.facts["size"]:
            now = scan(self.url, self.cache).facts if status.st_size == self.facts["size"] else {"digest": ""}
            if now["digest"] != self.facts["digest"]:
                raise changed_error(self.url)
            self.facts["mtime"] = now["mtime"]
        return status

    def with_hashes(self, name: str) -> "Shard":
        """Return this shard with a hash of a `hash_name` among its arrays, computed if it is missing."""
        if name in self.arrays:
            return self
        hashes = np.array([self._hash(name, i) for i in range(len(self))], dtype=DTYPES[_kind(name)])
        return Shard(self.url, self.facts, {**self.arrays, name: hashes}, self.cache)

    def without_hashes(self) -> "Shard":
        """Return this shard without the hashes of its content."""
        kept = {name: array for name, array in self.arrays.items() if _kind(name) not in HASHES}
        return Shard(self.url, self.facts, kept, self.cache)

    def _hash(self, name: str, i: int) -> int:
        found = self.members(i)
        kind, _, images = name.partition(":")
        wanted = ("txt", "json") if kind == "text" else images.split(";") if images else IMAGE_EXTENSIONS
        extension = next((extension for extension in wanted if extension in found), None)
        if extension is None:
            return 0
        offset, size = found[extension]
        if kind != "piece":
            return content_hash(self.read(offset, size))
        piece = _piece(size)
        return content_hash(self.read(offset + piece.start, len(piece)), size)


def hash_name(kind: str, images: Sequence[str]) -> str:
    """Return the name of the array of one of the `HASHES`, where `images` are the members that may hold the image."""
    return kind if kind == "text" or tuple(images) == IMAGE_EXTENSIONS else f"{kind}:{';'.join(images)}"


def _kind(name: str) -> str:
    """Return which of the `DTYPES` an array has."""
    return name.partition(":")[0]


def _piece(size: int) -> range:
    """Return the range of up to 8 KiB in the middle of `size` bytes, of which the hash `piece` is made."""
    length = min(size, 8192)
    return range((size - length) // 2, (size + length) // 2)


def partial_hash(data: bytes) -> int:
    """Return the hash `piece` of an image's bytes; see `DTYPES`."""
    piece = _piece(len(data))
    return content_hash(data[piece.start : piece.stop], len(data))


def content_hash(data: bytes, salt: int = 0) -> int:
    """Return 64 bits of BLAKE2b; different bytes have the same hash with a probability of 2^-64."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=salt.to_bytes(8, "little")).digest(), "little")


def changed_error(url: str) -> DataError:
    """Return the error of a shard that is not the one that was indexed."""
    url = shown(url)
    return DataError(
        f"shard {url} changed since it was indexed; if this is intended, run: dualenc index {quote(str(url))}"
    )


def scan(url: str, cache: Cache, path: str | None = None) -> Shard:
    """Read the tar headers of a shard.

    A sample is the members that share their path up to the first dot of the base name, as webdataset defines it. The
    members that webdataset skips are skipped: hidden ones, those without extension, `__meta__`. The members of a sample
    do not have to be adjacent.

    Args:
        url: path or URL of the shard.
        cache: cache from which a remote shard is read later.
        path: path of a remote shard's copy.

    Raises:
        DataError: If the file is not a complete uncompressed tar, or a key has two members with one extension.
    """
    found = _MemberTable(url)
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
        "samples": len(found.samples),
        "extensions": [extension.decode("utf-8", "surrogateescape") for extension in found.extensions],
    }
    return Shard(url, facts, found.arrays(), cache)


class _MemberTable:
    """The members of a shard, grouped into samples."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.samples: dict[bytes, int] = {}  # key -> number of the sample
        self.extensions: dict[bytes, int] = {}
        self.digest = hashlib.blake2b(digest_size=16)
        self._sample_of: list[int] = []  # (M,)
        self._members: list[tuple[int, int, int]] = []  # (M,) number of the extension, offset, size
        self._seen: set[tuple[int, int]] = set()  # sample, extension
        self._current, self._sample = b"", -1  # key and number of the sample of the last member

    def add(self, member: Member) -> None:
        """Add the next member, except if webdataset skips it."""
        name, offset, size, header, _ = member
        self.digest.update(header)
        folder, slash, base = name.rpartition(b"/")
        stem, dot, extension = base.partition(b".")
        if not stem or not dot or (name[:2] == b"__" and name.partition(b"/")[0][-2:] == b"__"):
            return
        key = folder + slash + stem
        if key != self._current:
            self._current, self._sample = key, self.samples.setdefault(key, len(self.samples))
        number = self.extensions.setdefault(extension.lower(), len(self.extensions))
        if (self._sample, number) in self._seen:
            text = key.decode("utf-8", "surrogateescape")
            raise DataError(
                f"{shown(self.url)} sample {text!r}: two members .{extension.decode('utf-8', 'replace')}, the second "
                f"at byte {offset:,}; keys must differ within a shard"
            )
        self._seen.add((self._sample, number))
        self._sample_of.append(self._sample)
        self._members.append((number, offset, size))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of the index by the names of `DTYPES`."""
        if len(self.extensions) > 1 << 16 or len(self._members) >= 1 << 32:
            raise DataError(
                f"shard {shown(self.url)} has {len(self.extensions):,} extensions and {len(self._members):,} members, "
                "too many for an index: pack its samples as webdataset does"
            )
        order = np.argsort(np.array(self._sample_of, dtype=np.int64), kind="stable")  # makes each sample contiguous
        table = np.array(self._members, dtype=np.int64).reshape(-1, 3)[order]
        counts = np.bincount(self._sample_of, minlength=len(self.samples)) if self._sample_of else []
        arrays = {
            "first": np.concatenate([[0], np.cumsum(counts)]),
            "extension": table[:, 0],
            "offset": table[:, 1],
            "size": table[:, 2],
            "key_end": np.cumsum([len(key) for key in self.samples], dtype=np.int64),
            "keys": np.frombuffer(b"".join(self.samples), dtype=np.uint8),
        }
        return {name: array.astype(DTYPES[name]) for name, array in arrays.items()}


def name_of(url: str) -> str:
    """Return the file name of a shard."""
    return os.path.basename(shown(url))


# The index file


class _MappedArrays:
    """The arrays of one shard in an index file that is mapped into memory; pickled as their location in the file."""

    def __init__(
        self, path: str, stamp: tuple[int, int], facts: dict[str, Any], spans: dict[str, list[int]], check: str
    ) -> None:
        self.path = path
        self.stamp = stamp  # size and modification time of the index file
        self.spans = spans  # name -> offset in bytes, number of entries
        self.check = check  # digest of the arrays
        self.shard = facts["name"], facts["digest"]
        self._arrays: dict[str, np.ndarray] | None = None
        self._buffer: np.ndarray | None = None

    def read(self) -> dict[str, np.ndarray]:
        if self._arrays is None:
            buffer = self._buffer = self._map()
            self._arrays = {}
            for name, (offset, count) in self.spans.items():
                dtype = np.dtype(DTYPES[_kind(name)])
                end = offset + count * dtype.itemsize
                if not 0 <= offset <= end <= len(buffer):
                    raise _damaged_error(self.path)
                self._arrays[name] = buffer[offset:end].view(dtype)
        return self._arrays

    def _map(self) -> np.ndarray:
        """Map the index file into memory. If another run has replaced it, find the shard in the new file."""
        mapped = _MAPS.get((self.path, self.stamp))
        if mapped is None:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                mapped = np.memmap(file, np.uint8, "r").view(np.ndarray)  # slices of a memmap are slow
            stamp = status.st_size, status.st_mtime_ns
            mapped = self._buffer = _MAPS.setdefault((self.path, stamp), mapped)
            if stamp != self.stamp:
                name, digest = self.shard
                now = read_index(self.path, "", Cache()).get(name)
                if now is None or now.facts["digest"] != digest or not isinstance(now._arrays, _MappedArrays):
                    raise changed_error(os.path.join(os.path.dirname(self.path), name))
                self.stamp, self.spans, self.check = now._arrays.stamp, now._arrays.spans, now._arrays.check
                return self._map()
        return mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None, "_buffer": None}


# One map of each file in a process, as long as a shard uses it.
_MAPS: WeakValueDictionary[tuple[str, tuple[int, int]], np.ndarray] = WeakValueDictionary()


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _damaged_error(path: str | os.PathLike[str]) -> DataError:
    return DataError(f"{path} is damaged, or not a shard index of this version: remove it and run `dualenc index`")


def read_index(path: str | os.PathLike[str], folder: str, cache: Cache) -> dict[str, Shard]:
    """Read the shards of an index file: name -> shard.

    Args:
        path: path of the index file.
        folder: path or URL of the folder of the shards.
        cache: cache of the shards if the folder is remote.

    Raises:
        DataError: If the file is damaged, or of another format.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            head = file.read(1024)
            file.seek(max(0, size - 24))
            tail = file.read(24)
            length = int.from_bytes(tail[:8], "little")
            if what := stand_in(head):
                raise DataError(f"{path} is {what}")
            if not head.startswith(MAGIC) or not 0 < length <= size - 40:
                raise _damaged_error(path)
            file.seek(size - 24 - length)
            text = file.read(length)
            status = os.fstat(file.fileno())
        if hashlib.blake2b(text, digest_size=16).digest() != tail[8:]:
            raise _damaged_error(path)
        stamp = (status.st_size, status.st_mtime_ns)
        shards = {}
        for facts in json.loads(text)["shards"]:
            spans, check = facts.pop("arrays"), facts.pop("check")
            if not DTYPES.keys() >= set(map(_kind, spans)) or os.path.basename(facts["name"]) != facts["name"]:
                raise _damaged_error(path)
            arrays = _MappedArrays(os.fspath(path), stamp, facts, spans, check)
            shards[facts["name"]] = Shard(os.path.join(folder, facts["name"]), facts, arrays, cache)
        return shards
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged_error(path) from None


def write_index(path: str | os.PathLike[str], shards: Iterable[Shard]) -> None:
    """Write an index file atomically.

    Raises:
        OSError: If the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.parent.stat().st_mode & 0o222:  # root could write into a read-only folder, but should not
        raise PermissionError(errno.EACCES, "the folder is read-only", str(path.parent))
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(MAGIC)
        entries = []
        for shard in shards:
            spans = {}
            for name, array in shard.arrays.items():
                file.write(bytes(-file.tell() % 8))
                spans[name] = [file.tell(), len(array)]
                file.write(np.ascontiguousarray(array).data)
            entries.append({**shard.facts, "check": _digest(shard.arrays), "arrays": spans})
        text = json.dumps({"shards": entries}).encode()
        file.write(text + len(text).to_bytes(8, "little") + hashlib.blake2b(text, digest_size=16).digest())


# Open files


class _File:
    """An open file that closes when its last reference is gone; every reader has one."""

    def __init__(self, path: str, inode: int) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        if os.fstat(self.descriptor).st_ino != inode:
            raise OSError(errno.ESTALE, "replaced while it was opened", path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # `os.open` may have failed
            os.close(self.descriptor)


_OPEN_FILES: OrderedDict[tuple[str, int], _File] = OrderedDict()
_OPEN_FILES_LOCK = threading.Lock()
# A forked process gets a new lock, because a thread of its parent may have held the old one.
os.register_at_fork(after_in_child=lambda: globals().update(_OPEN_FILES_LOCK=threading.Lock()))


def open_cached(path: str, inode: int) -> _File:
    """Open a file, or return it if it is open already. A new file with the same path has another inode."""
    key = (path, inode)
    with _OPEN_FILES_LOCK:
        if key not in _OPEN_FILES:
            # Close the copies that were removed from the cache of remote shards, because they still use disk space.
            for old in [old for old, file in _OPEN_FILES.items() if not os.fstat(file.descriptor).st_nlink]:
                del _OPEN_FILES[old]
            _OPEN_FILES[key] = _File(path, inode)
            while len(_OPEN_FILES) > _MAX_OPEN_FILES:
                _OPEN_FILES.popitem(last=False)
        _OPEN_FILES.move_to_end(key)
        return _OPEN_FILES[key]


def index_files(folder: str) -> Sequence[Path]:
    """Return the possible paths of a folder's index: in the folder, and for read-only folders in the user's cache."""
    name = hashlib.blake2b((shown(folder) if is_remote(folder) else os.path.abspath(folder)).encode(), digest_size=16)
    cached = cache_folder() / "index" / f"{name.hexdigest()}.index"
    return [cached] if is_remote(folder) else [Path(folder) / FILE_NAME, cached]
