"""Shards that lie elsewhere: whole files fetched through fsspec into a bounded cache on a local disk.

Secrets stay out of everything that is kept or shown. What a URL says before `@` or after `?` is used to fetch and
nowhere else; the names of cached files are hashes.
"""

import errno
import fcntl
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dualenc.data.shards.tar import TarError, members
from dualenc.utils.errors import DataError
from dualenc.utils.urls import PROTOCOLS, _redact_of, cache_folder, shown

TRIES = 6
DAMAGED = 3  # transfers that bring something else than they should, before that is believed
FIRST_WAIT = 0.5  # seconds; doubled each time, and up to as much again at random
_FULL = {errno.ENOSPC, errno.EDQUOT}
_LOCAL = {*_FULL, errno.EFBIG, errno.EROFS}  # of the disk that is written: no store speaks of these


class StorageError(DataError):
    """A file elsewhere that cannot be had; the message names it without its secrets.

    Attributes:
        absent: whether there is no such file, or none for this user; stores do not always tell which.
    """

    def __init__(self, message: str, absent: bool = False) -> None:
        super().__init__(message)
        self.absent = absent


def glob_remote(pattern: str) -> list[str]:
    """The files elsewhere that a pattern with `*`, `?` or `[` stands for, in order.

    Raises:
        StorageError: the store cannot be listed.
    """
    protocol, _, rest = pattern.partition("://")
    if PROTOCOLS.get(protocol) == "http":
        raise StorageError(f"{shown(pattern)}: web servers list nothing; write braces, such as {{000000..000099}}.tar")
    for wait in _waits():
        try:
            found = _filesystem(pattern).glob(rest)
        except Exception as error:  # each store has its own
            _wait_or_raise(error, pattern, wait)
            continue
        return [f"{protocol}://{str(path).lstrip('/')}" for path in sorted(map(str, found))]
    raise AssertionError


class Place(NamedTuple):
    """A file elsewhere, and what it was when it was indexed; unknown is empty."""

    url: str
    size: int = -1  # bytes
    etag: str = ""  # what the store says changes with the content
    digest: str = ""  # BLAKE2b-128 of the content
    headers: str = ""  # the same of the tar headers of its members: all that an index made from local files knows

    @property
    def name(self) -> str:
        """Of its copy in the cache; the same whatever the URL is signed with."""
        what = self.digest or self.headers or self.etag
        return hashlib.blake2b(f"{shown(self.url)}\0{what}".encode(), digest_size=16).hexdigest()


class Cache:
    """Copies of files elsewhere, on a local disk, up to a size together.

    Any number of processes may use one folder. A file is written beside its place under a lock, compared with what the
    index says of it, and renamed; the others wait for it. Where a new one would pass the bound, those whose use lies
    back the longest go.

    Args:
        limit: bytes.
        folder: absent, `shards` in `cache_folder()`.
    """

    def __init__(self, limit: int = 100 << 30, folder: str | os.PathLike[str] | None = None) -> None:
        self.limit = limit
        self.folder = Path(folder) if folder is not None else cache_folder() / "shards"

    def path(self, place: Place, keep: Collection[str] = ()) -> Path:
        """The copy of a file, fetched if it is not here.

        Args:
            place: which.
            keep: names that must stay, whatever their age.

        Raises:
            StorageError: it cannot be fetched or kept, or is not what was indexed.
        """
        path = self.folder / place.name
        if not self.touch(place):
            with self._lock(place.name):
                if not self.touch(place):  # another process may have fetched it meanwhile
                    self._fetch(place, path, {*keep, place.name})
        return path

    def touch(self, place: Place) -> bool:
        """Marks a copy as used now; false where there is none, or none of the right size."""
        path = self.folder / place.name
        try:
            if place.size >= 0 and os.stat(path).st_size != place.size:
                return False
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except PermissionError:  # of another user, in a folder for all
            return path.exists()
        return True

    def add(self, url: str) -> tuple[Place, Path]:
        """Fetches a file of which nothing is known, keeps it, and says what it is.

        Raises:
            StorageError: see `path`.
        """
        size, etag = _info(url)
        with self._writing(url, size, ()) as beside:
            found, digest = _download_whole(url, beside)
            place = Place(url, found, etag, digest)
            os.replace(beside, self.folder / place.name)
        return place, self.folder / place.name

    def _fetch(self, place: Place, path: Path, keep: Collection[str]) -> None:
        with self._writing(place.url, place.size, keep) as beside:
            for _ in range(DAMAGED):  # on its way, perhaps
                size, digest = _download(place.url, beside)
                if size == place.size and (digest == place.digest if place.digest else _is_shard(beside, place)):
                    os.replace(beside, path)
                    return
                if (now := _info(place.url)[1]) and place.etag and now != place.etag:
                    break
            raise StorageError(
                f"{shown(place.url)} changed since it was indexed; if that is meant: dualenc index {shown(place.url)}"
            )

    @contextmanager
    def _writing(self, url: str, size: int, keep: Collection[str]) -> Iterator[Path]:
        """A new file with room for so many bytes, which is removed if it is not renamed."""
        beside, handle = None, -1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock("room"):
                self._make_room(max(0, size), keep)
                handle, name = tempfile.mkstemp(f".{max(0, size)}.part", "", self.folder)
                beside = Path(name)
                fcntl.flock(handle, fcntl.LOCK_EX)  # as long as somebody writes it
                os.chmod(handle, 0o644)  # a folder may be for all
            yield beside
        except OSError as error:
            what = "its disk is full: free some, or lower data.cache_gb" if error.errno in _FULL else error.strerror
            raise StorageError(f"{shown(url)} cannot be kept in {self.folder}: {what or error}") from None
        finally:
            if beside is not None:
                beside.unlink(missing_ok=True)
            if handle >= 0:
                os.close(handle)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """One process at a time; the system releases it where the holder dies."""
        path, handle = self.folder / f"{name}.lock", -1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                with suppress(PermissionError):  # of another user, in a folder for all
                    os.chmod(path, 0o666)
                fcntl.flock(handle, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), os.stat(path)):
                        break
                os.close(handle)  # whoever removed the copy removed its lock: this one locks nobody out
        except OSError as error:
            raise StorageError(
                f"the cache {self.folder} cannot be written: {error.strerror}; DUALENC_CACHE names another folder"
            ) from None
        try:
            yield
        finally:
            # Not by closing alone: a worker process that began meanwhile has the file open, too.
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _make_room(self, size: int, keep: Collection[str]) -> None:
        """Removes copies until one of this size has room, those used longest ago first, and what a kill left over."""
        entries, total = [], size
        with os.scandir(self.folder) as folder:
            for entry in folder:
                with suppress(OSError):  # gone, or of another user
                    if entry.name.endswith(".part"):
                        total += 0 if _left_over(entry.path) else _reserved(entry)
                    elif "." not in entry.name:
                        status = entry.stat()
                        entries.append((status.st_mtime, status.st_size, entry))
                        total += status.st_size
        for _, length, entry in sorted(entries, key=lambda item: item[0]):
            if total <= self.limit:
                return
            if entry.name not in keep:
                with suppress(OSError):
                    os.unlink(entry.path)
                    total -= length
                    os.unlink(f"{entry.path}.lock")


def _reserved(entry: os.DirEntry[str]) -> int:
    """Bytes that a file which is being written will take."""
    digits = entry.name.split(".")[-2]
    return max(int(digits) if digits.isdigit() else 0, entry.stat().st_size)


def _left_over(path: str) -> bool:
    """Removes a file that nobody writes any more: its writer held a lock and is dead."""
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def _is_shard(path: Path, place: Place) -> bool:
    """Whether a file has the tar headers of a shard; true where these are unknown, too."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb", buffering=0) as file:
            for member in members(file):
                digest.update(member.header)
    except TarError:
        return False
    return place.headers in ("", digest.hexdigest())


def fetch_small(url: str) -> bytes | None:
    """The content of a file elsewhere; None where there is none.

    Raises:
        StorageError: it cannot be had for another reason.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            _download_whole(url, path)
            return path.read_bytes()
    except StorageError as error:
        if error.absent:
            return None
        raise
    except OSError as error:
        raise StorageError(f"{shown(url)} cannot be kept in {tempfile.gettempdir()}: {error.strerror}") from None


def _download_whole(url: str, path: Path) -> tuple[int, str]:
    """Fetches a file, and compares its size with what the store says; see `_download`."""
    found = size = -1
    for _ in range(DAMAGED):
        found, digest = _download(url, path)
        size = _info(url)[0]
        if size in (-1, found):
            return found, digest
    raise StorageError(f"{shown(url)}: only {found:,} of {size:,} bytes arrive; {DAMAGED} tries")


def _download(url: str, path: Path) -> tuple[int, str]:
    """Fetches a file, and tries again where the fault may pass. Returns its size and digest."""
    for wait in _waits():
        try:
            _filesystem(url).get_file(url if PROTOCOLS[urlsplit(url).scheme] == "http" else _bare(url), str(path))
        except Exception as error:  # each store has its own
            if isinstance(error, OSError) and (error.errno in _LOCAL or error.filename == str(path)):
                raise
            _wait_or_raise(error, url, wait)
            continue
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            os.fsync(file.fileno())
            return file.tell(), digest.hexdigest()
    raise AssertionError


def _bare(url: str) -> str:
    return url.partition("://")[2]


def _waits() -> Iterator[float | None]:
    """Seconds to wait after each try; None after the last."""
    for i in range(TRIES - 1):
        yield FIRST_WAIT * 2**i * (1 + random.SystemRandom().random())  # no generator of the training loop
    yield None


def _wait_or_raise(error: Exception, url: str, wait: float | None) -> None:
    """Waits after an error that may pass; others, and the last one, are raised in our words, with nothing of its own.

    A cause would be shown with its URL by whoever prints a traceback.
    """
    if isinstance(error, StorageError):
        raise error
    status = _status(error)
    absent = isinstance(error, FileNotFoundError) or status in (404, 410)
    denied = isinstance(error, PermissionError) or status in (401, 403)
    refused = absent or denied or (status is not None and 400 <= status < 500 and status not in (408, 425, 429))
    passing = isinstance(error, OSError | EOFError) or status is not None or _of(error, *_PASSING)
    what = _redact_of(url, " ".join(f"{error}".split())) or type(error).__name__
    if absent:
        what = "there is no such file, or it is not for you to see"
    elif denied:
        what = f"the server denies it{f' ({status})' if status else ''}: credentials are missing, wrong or out of date"
    elif status is not None:
        what = f"the server answers {status}"
    elif _of(error, "botocore.exceptions.NoCredentialsError"):
        what = "no credentials are found: set AWS_PROFILE, or for a public bucket FSSPEC_S3_ANON=true"
    if refused or not passing:
        raise StorageError(f"{shown(url)}: {what}", absent or denied) from None  # S3 forbids where it does not list
    if wait is None:
        raise StorageError(f"{shown(url)}: given up after {TRIES} tries: {what}") from None
    time.sleep(wait)


_PASSING = (
    "aiohttp.client_exceptions.ClientPayloadError",
    "aiohttp.client_exceptions.ClientConnectionError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",
    "gcsfs.retry.ChecksumError",
    "google.auth.exceptions.TransportError",
    "httpx.TransportError",
    "requests.exceptions.RequestException",
)


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error, wherever its library keeps it."""
    response = getattr(error, "response", None)
    cause = getattr(error.__cause__, "response", None)  # s3fs raises one of Python's own from botocore's
    metadata = cause.get("ResponseMetadata", {}) if isinstance(cause, dict) else {}
    found = (
        getattr(error, "status", None),  # aiohttp
        getattr(response, "status_code", None),  # httpx, requests
        metadata.get("HTTPStatusCode"),
        getattr(error, "code", None) if _of(error, "gcsfs.retry.HttpError") else None,
    )
    return next((int(str(status)) for status in found if str(status).isdigit()), None)


def _of(error: Exception, *names: str) -> bool:
    """Whether an error's class, or one that it derives from, has one of these names."""
    return any(f"{kind.__module__}.{kind.__name__}" in names for kind in type(error).__mro__)


def _info(url: str) -> tuple[int, str]:
    """Size in bytes, or -1, and what the store says changes with the content, or nothing."""
    try:
        info = _filesystem(url).info(url)
    except StorageError:
        raise
    except Exception:  # whoever fetches it will meet the error
        return -1, ""
    etag = next((info[name] for name in ("ETag", "etag", "sha256", "blob_id") if info.get(name)), "")
    return int(info["size"]) if info.get("size") is not None else -1, str(etag)


def _filesystem(url: str) -> Any:
    import fsspec

    scheme = urlsplit(url).scheme
    if scheme not in PROTOCOLS:
        raise StorageError(f"{shown(url)}: {scheme}:// is none of {', '.join(f'{name}://' for name in PROTOCOLS)}")
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": False}
    if PROTOCOLS[scheme] == "http":
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        headers = {"Accept-Encoding": "identity"}  # bytes as they lie there, and no more than it says
        options = {"client_kwargs": {"timeout": timeout, "headers": headers, "trust_env": True}}  # .netrc, proxies
    elif scheme == "s3":
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 1}}  # tries are counted here
    try:
        return fsspec.filesystem(PROTOCOLS[scheme], **options)
    except ImportError:
        extra = {"s3": "s3", "gcs": "gs"}.get(PROTOCOLS[scheme])
        if extra is None:
            raise
        raise StorageError(f"{scheme}:// needs more: pip install 'dualenc[{extra}]'") from None
