"""Stores on this machine's loopback that count what is asked of them, and fail when told to."""

import hashlib
import os
import re
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SLOW = 0.02  # seconds between the pieces of a slow answer


class WebServer(ThreadingHTTPServer):
    """Serves a folder with HEAD, ETag and Range.

    `fail(name, *faults)` spoils the next GETs of a file, one fault each: a status such as 503, "reset", "short" (the
    length of the whole is announced), "short unsized" (it is not), "flip" (one byte is another), "slow". A fault of
    ("always", fault) stays.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[Any]] = defaultdict(list)
        self.always: dict[str, Any] = {}
        self.log: list[tuple[str, str]] = []  # method and name
        self.credentials: str | None = None  # "user:password" that is asked for
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, name: str, *faults: Any, always: bool = False) -> None:
        if always:
            self.always[name] = faults[0]
        else:
            self.faults[name] += faults

    def gets(self, name: str | None = None) -> Any:
        """How often a file was asked for, or all of them by name; the log in order is `log`."""
        found = Counter(path for method, path in self.log if method == "GET")
        return found if name is None else found[name]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may go."""


class _Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        fault = None
        with self.server.lock:
            self.server.log.append((self.command, name))
            if send and self.server.faults[name]:
                fault = self.server.faults[name].pop(0)
            elif send:
                fault = self.server.always.get(name)
        if self.server.credentials is not None:
            import base64

            wanted = "Basic " + base64.b64encode(self.server.credentials.encode()).decode()
            if self.headers.get("Authorization") != wanted:
                return self._status(401)
        path = self.server.folder / name
        if isinstance(fault, int):
            return self._status(fault)
        if not path.is_file():
            return self._status(404)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)  # closing is not enough where a forked process has it open, too
            self.connection.close()
            self.close_connection = True
            return None
        data = path.read_bytes()
        etag = hashlib.md5(data).hexdigest()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            data = data[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None]
        if fault == "flip":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Type", "application/x-tar")
        if fault == "short unsized":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not send:
            return None
        if fault in ("short", "short unsized"):
            data = data[: len(data) // 2]
            self.close_connection = True
        pieces = 20 if fault == "slow" else 1
        size = -(-len(data) // pieces)
        for start in range(0, len(data), max(1, size)):
            self.wfile.write(data[start : start + size])
            if fault == "slow":
                time.sleep(SLOW)
        return None

    def _status(self, status: int) -> None:
        body = b"no"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def web_server(folder: Path) -> Iterator[WebServer]:
    folder.mkdir(parents=True, exist_ok=True)
    server = WebServer(folder)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Bucket:
    """A bucket of an S3 store that runs here: moto's, behind something that counts and fails."""

    def __init__(self, client: Any, name: str, store: "Store") -> None:
        self.client, self.name, self.store = client, name, store
        client.create_bucket(Bucket=name)

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def put(self, paths: Iterable[str | os.PathLike[str]], prefix: str = "") -> None:
        for path in map(Path, paths):
            self.client.put_object(Bucket=self.name, Key=f"{prefix}{path.name}", Body=path.read_bytes())

    def fail(self, key: str, *faults: Any) -> None:
        """The next GETs of a key: a status, or "short"."""
        self.store.faults[f"/{self.name}/{key}"] += faults

    def gets(self, key: str) -> int:
        return sum(path == f"/{self.name}/{key}" for path in self.store.log)


class Store:
    """A WSGI program around moto's."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        self.faults: dict[str, list[Any]] = defaultdict(list)
        self.log: list[str] = []

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "GET":
            return self.inner(environ, start)
        self.log.append(path)
        fault = self.faults[path].pop(0) if self.faults[path] else None
        if isinstance(fault, int):
            code = {503: "SlowDown", 403: "AccessDenied", 500: "InternalError", 404: "NoSuchKey"}[fault]
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}!</Message></Error>".encode()
            start(f"{fault} {code}", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
            return [body]
        whole = self.inner(environ, start)
        return [b"".join(whole)[:100]] if fault == "short" else whole  # with the length of the whole


@contextmanager
def s3_server() -> Iterator[tuple[str, Store]]:
    """Its address, and what counts and fails."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    store = Store(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, store, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", store
    finally:
        server.shutdown()
        server.server_close()
