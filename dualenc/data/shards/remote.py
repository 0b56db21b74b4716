"""Remote shards: whole files are fetched through fsspec into a cache of bounded size on a local disk.

Secrets stay out of everything that is stored or printed. The parts of a URL before `@` and after `?` are used only to
fetch the file, and the names of cached files are hashes.
"""

import errno
import fcntl
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dualenc.data.shards.tar import TarError, members
from dualenc.utils.errors import DataError
from dualenc.utils.files import stand_in
from dualenc.utils.urls import PROTOCOLS, cache_folder, redact_url, shown

TRIES = 6  # requests, before an error that may be temporary is raised
TRANSFERS = 3  # complete transfers with unexpected content, before the remote file counts as changed
FIRST_WAIT = 0.5  # seconds before the second try; doubled for each further try, with random jitter of up to 100%
_FULL = {errno.ENOSPC, errno.EDQUOT}
_LOCAL = {*_FULL, errno.EFBIG, errno.EROFS}  # errors of the local disk, which no store reports


class StorageError(DataError):
    """A remote file that cannot be read; the message names it without its secrets.

    Attributes:
        absent: the file does not exist, or is hidden from this user; stores do not always say which.
    """

    def __init__(self, message: str, absent: bool = False) -> None:
        super().__init__(message)
        self.absent = absent


def glob_remote(pattern: str) -> list[tuple[str, bool]]:
    """Return the URLs of the remote files and folders that match a pattern, sorted, and whether each is a folder.

    Raises:
        StorageError: If the store cannot be listed.
    """
    protocol, _, rest = pattern.partition("://")
    if PROTOCOLS.get(protocol) == "http":
        raise StorageError(
            f"{shown(pattern)}: web servers do not list files: write braces, such as {{000000..000099}}.tar"
        )
    found = _retry(pattern, lambda: _filesystem(pattern).glob(rest, detail=True))
    return [(f"{protocol}://{path.lstrip('/')}", found[path]["type"] == "directory") for path in sorted(found)]


def exists_remote(url: str) -> bool:
    """Return whether a remote file or folder exists.

    Raises:
        StorageError: If the store does not answer.
    """
    try:
        _retry(url, lambda: _filesystem(url).info(url if PROTOCOLS.get(urlsplit(url).scheme) == "http" else _bare(url)))
    except StorageError as error:
        if error.absent:
            return False
        raise
    return True


class RemoteFile(NamedTuple):
    """A remote file as it was when it was indexed. Fields that are not known are empty, or -1."""

    url: str
    size: int = -1  # bytes
    etag: str = ""  # a tag of the content, made by the store
    digest: str = ""  # BLAKE2b-128 of the content
    headers: str = ""  # BLAKE2b-128 of the tar headers; an index that was made from local files has only this one

    @property
    def name(self) -> str:
        """The name of its copy in the cache, which does not depend on the signature of the URL."""
        content = self.digest or self.headers or self.etag
        return hashlib.blake2b(f"{shown(self.url)}\0{content}".encode(), digest_size=16).hexdigest()


class Cache:
    """A folder of copies of remote files, bounded in size.

    Any number of processes may share one folder. A process takes a lock, writes to a temporary file, compares it with
    the index, and renames it; the others wait for it. If a new file does not fit within the limit, the least recently
    used copies are removed.

    Args:
        limit: bytes of all copies together.
        folder: folder of the copies; by default `shards` in `cache_folder()`.
    """

    def __init__(self, limit: int = 100 << 30, folder: str | os.PathLike[str] | None = None) -> None:
        self.limit = limit
        self.folder = Path(folder) if folder is not None else cache_folder() / "shards"

    def path(self, file: RemoteFile, keep: Collection[str] = ()) -> Path:
        """Return the path of the copy of a file, which is fetched if the cache does not have it.

        Args:
            file: the remote file.
            keep: names of copies that must not be removed to make room.

        Raises:
            StorageError: If the file cannot be fetched or stored, or has changed since it was indexed.
        """
        path = self.folder / file.name
        if not self.touch(file):
            with self._lock(file.name):
                if not self.touch(file):  # another process may have fetched it during the wait for the lock
                    self._fetch(file, path, {*keep, file.name})
        return path

    def touch(self, file: RemoteFile) -> bool:
        """Mark the copy of a file as used now; return false if there is no copy of the right size."""
        path = self.folder / file.name
        try:
            if file.size >= 0 and os.stat(path).st_size != file.size:
                return False
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except PermissionError:  # the copy belongs to another user of a shared folder
            return path.exists()
        return True

    def add(self, url: str) -> tuple[RemoteFile, Path]:
        """Fetch a file that is not indexed yet; return its description and the path of its copy.

        Raises:
            StorageError: If the file cannot be fetched or stored.
        """
        size, etag = _info(url)
        with self._new_file(url, size, ()) as temporary:
            found, digest = _download_complete(url, temporary)
            file = RemoteFile(url, found, etag, digest)
            os.replace(temporary, self.folder / file.name)
        return file, self.folder / file.name

    def _fetch(self, file: RemoteFile, path: Path, keep: Collection[str]) -> None:
        with self._new_file(file.url, file.size, keep) as temporary:
            for _ in range(TRANSFERS):  # the content may be damaged during a transfer
                size, digest = _download(file.url, temporary)
                if size == file.size and (digest == file.digest if file.digest else _is_shard(temporary, file)):
                    os.replace(temporary, path)
                    return
                if (etag := _info(file.url)[1]) and file.etag and etag != file.etag:
                    break
            url = shown(file.url)
            with open(temporary, "rb") as received:
                if what := stand_in(received.read(1024)):
                    raise StorageError(f"{url} is {what}")
            raise StorageError(
                f"{url} changed since it was indexed; if this is intended, run: dualenc index {quote(str(url))}"
            )

    @contextmanager
    def _new_file(self, url: str, size: int, keep: Collection[str]) -> Iterator[Path]:
        """Create a file with room for `size` bytes, which is removed if it was not renamed."""
        path, handle = None, -1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock("room"):
                self._make_room(max(0, size), keep)
                handle, name = tempfile.mkstemp(f".{max(0, size)}.part", "", self.folder)
                path = Path(name)
                fcntl.flock(handle, fcntl.LOCK_EX)  # the lock says that a living process writes the file
                os.chmod(handle, 0o644)  # the folder may be shared with other users
            yield path
        except OSError as error:
            reason = "its disk is full: free space, or lower data.cache_gb" if error.errno in _FULL else error.strerror
            raise StorageError(f"{shown(url)} cannot be stored in {self.folder}: {reason or error}") from None
        finally:
            if path is not None:
                path.unlink(missing_ok=True)
            if handle >= 0:
                os.close(handle)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Lock a name for this process alone. The system releases the lock if the process dies."""
        path, handle = self.folder / f"{name}.lock", -1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                with suppress(PermissionError):  # the file belongs to another user of a shared folder
                    os.chmod(path, 0o666)
                fcntl.flock(handle, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), os.stat(path)):
                        break
                # The lock file was removed together with its copy, so that a lock on it excludes no other process.
                os.close(handle)
        except OSError as error:
            raise StorageError(
                f"the cache {self.folder} cannot be written: {error.strerror}; set DUALENC_CACHE to another folder"
            ) from None
        try:
            yield
        finally:
            # Closing alone would not unlock: a worker process that was forked meanwhile has the file open, too.
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _make_room(self, size: int, keep: Collection[str]) -> None:
        """Remove files of killed processes, and the least recently used copies until `size` more bytes fit."""
        entries, total = [], size
        with os.scandir(self.folder) as folder:
            for entry in folder:
                with suppress(OSError):  # the file is gone, or belongs to another user
                    if entry.name.endswith(".part"):
                        total += 0 if _remove_abandoned(entry.path) else _reserved(entry)
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
    """Return the number of bytes that a file will have when it is completely written."""
    digits = entry.name.split(".")[-2]
    return max(int(digits) if digits.isdigit() else 0, entry.stat().st_size)


def _remove_abandoned(path: str) -> bool:
    """Remove a file that no process holds a lock on, since its writer is dead; return whether it was removed."""
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def _is_shard(path: Path, expected: RemoteFile) -> bool:
    """Return whether a file is a tar with the expected headers; any tar will do if they are not known."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb", buffering=0) as file:
            for member in members(file):
                digest.update(member.header)
    except TarError:
        return False
    return expected.headers in ("", digest.hexdigest())


def fetch_small(url: str) -> bytes | None:
    """Return the content of a small remote file, or None if there is no such file.

    Raises:
        StorageError: If the file cannot be read for another reason.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            _download_complete(url, path)
            return path.read_bytes()
    except StorageError as error:
        if error.absent:
            return None
        raise
    except OSError as error:
        raise StorageError(f"{shown(url)} cannot be stored in {tempfile.gettempdir()}: {error.strerror}") from None


def _download_complete(url: str, path: Path) -> tuple[int, str]:
    """Fetch a file, again if its size is not the one that the store reports; see `_download`."""
    found = size = -1
    for _ in range(TRANSFERS):
        found, digest = _download(url, path)
        size = _info(url)[0]
        if size in (-1, found):
            return found, digest
    raise StorageError(f"{shown(url)}: received only {found:,} of {size:,} bytes in each of {TRANSFERS} tries")


def _download(url: str, path: Path) -> tuple[int, str]:
    """Fetch a file, and try again after errors that may be temporary; return its size in bytes and its digest."""
    for wait in _waits():
        try:
            _filesystem(url).get_file(url if PROTOCOLS[urlsplit(url).scheme] == "http" else _bare(url), str(path))
        except Exception as error:  # every store has its own classes of errors
            if isinstance(error, OSError) and (error.errno in _LOCAL or error.filename == str(path)):
                raise
            _wait_or_raise(error, url, wait)
            continue
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            os.fsync(file.fileno())
            return file.tell(), digest.hexdigest()
    raise AssertionError


def _retry(url: str, ask: Callable[[], Any]) -> Any:
    """Return the answer of a store, and ask again after errors that may be temporary."""
    for wait in _waits():
        try:
            return ask()
        except Exception as error:  # every store has its own classes of errors
            _wait_or_raise(error, url, wait)
    raise AssertionError


def _bare(url: str) -> str:
    return url.partition("://")[2]


def _waits() -> Iterator[float | None]:
    """Yield the seconds to wait after each try, and None after the last try."""
    for i in range(TRIES - 1):
        # SystemRandom does not touch the generators of the training loop.
        yield FIRST_WAIT * 2**i * (1 + random.SystemRandom().random())
    yield None


def _wait_or_raise(error: Exception, url: str, wait: float | None) -> None:
    """Wait after an error that may be temporary; raise any other error, and the last one, as a `StorageError`.

    The original error is not chained, because a traceback would print it with its URL and the secrets in it.
    """
    if isinstance(error, StorageError):
        raise error
    status = _status(error)
    absent = isinstance(error, FileNotFoundError) or status in (404, 410)
    denied = isinstance(error, PermissionError) or status in (401, 403)
    refused = absent or denied or (status is not None and 400 <= status < 500 and status not in (408, 425, 429))
    temporary = isinstance(error, OSError | EOFError) or status is not None or _is_a(error, *_TEMPORARY)
    reason = redact_url(url, " ".join(f"{error}".split())) or type(error).__name__
    if absent:
        reason = "there is no such file, or you may not see it"
    elif denied:
        code = f" ({status})" if status else ""
        reason = f"the server denies access{code}: the credentials are missing, wrong or out of date"
    elif status is not None:
        reason = f"the server answers {status}"
    elif _is_a(error, "botocore.exceptions.NoCredentialsError"):
        reason = "no credentials found: set AWS_PROFILE, or for a public bucket FSSPEC_S3_ANON=true"
    if refused or not temporary:
        # A denied file counts as absent, because S3 answers 403 for a missing file where listing is not allowed.
        raise StorageError(f"{shown(url)}: {reason}", absent or denied) from None
    if wait is None:
        raise StorageError(f"{shown(url)}: gave up after {TRIES} tries: {reason}") from None
    time.sleep(wait)


_TEMPORARY = (
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
    """Return the HTTP status of an error, wherever its library stores it."""
    response = getattr(error, "response", None)
    cause = getattr(error.__cause__, "response", None)  # s3fs raises one of Python's errors from botocore's
    metadata = cause.get("ResponseMetadata", {}) if isinstance(cause, dict) else {}
    found = (
        getattr(error, "status", None),  # aiohttp
        getattr(response, "status_code", None),  # httpx, requests
        metadata.get("HTTPStatusCode"),
        getattr(error, "code", None) if _is_a(error, "gcsfs.retry.HttpError") else None,
    )
    return next((int(str(status)) for status in found if str(status).isdigit()), None)


def _is_a(error: Exception, *names: str) -> bool:
    """Return whether an error's class or one of its bases has one of these names, without importing their library."""
    return any(f"{kind.__module__}.{kind.__name__}" in names for kind in type(error).__mro__)


def _info(url: str) -> tuple[int, str]:
    """Return a file's size in bytes and its etag, as far as the store reports them; else -1 and an empty text."""
    try:
        info = _filesystem(url).info(url)
    except StorageError:
        raise
    except Exception:  # the transfer of this file will meet the error again and raise it
        return -1, ""
    etag = next((info[name] for name in ("ETag", "etag", "sha256", "blob_id") if info.get(name)), "")
    return int(info["size"]) if info.get("size") is not None else -1, str(etag)


def _filesystem(url: str) -> Any:
    import fsspec

    scheme = urlsplit(url).scheme
    if scheme not in PROTOCOLS:
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise StorageError(f"{shown(url)}: {scheme}:// must be one of {known}")
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": False}
    if PROTOCOLS[scheme] == "http":
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        headers = {"Accept-Encoding": "identity"}  # the stored bytes, of which there are as many as the server says
        options = {"client_kwargs": {"timeout": timeout, "headers": headers, "trust_env": True}}  # .netrc, proxies
    elif scheme == "s3":
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 1}}  # `_waits` retries
    try:
        return fsspec.filesystem(PROTOCOLS[scheme], **options)
    except ImportError:
        extra = {"s3": "s3", "gcs": "gs"}.get(PROTOCOLS[scheme])
        if extra is None:
            raise
        raise StorageError(f"{scheme}:// needs an extra: pip install 'dualenc[{extra}]'") from None
