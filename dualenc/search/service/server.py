"""The server: the socket, the time that a connection has, and a stop that answers what was taken."""

import asyncio
import errno
import ipaddress
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from dualenc.search.service.app import OPEN_PATHS, build_app
from dualenc.search.service.core import Service
from dualenc.search.service.guard import MAX_HEADER, Guard
from dualenc.search.service.refusals import Refusal, busy
from dualenc.utils.errors import DataError
from dualenc.utils.text import reason

MAX_CONNECTIONS = 500  # fewer than the 1,024 open files that many systems allow a process
LOOPBACK = ("127.0.0.1", "[::1]", "localhost")


class PatientProtocol(H11Protocol):
    """A connection that ends if the client is too slow: uvicorn itself waits forever.

    The time is that of `timeout_keep_alive`. It begins with the connection and after each answer, and ends when the
    header of a request is complete; the application limits the time of the body. It begins again whenever the client
    stops taking an answer.
    """

    _waiting: asyncio.TimerHandle | None = None  # for a header
    _writing: asyncio.TimerHandle | None = None  # for a client that does not take an answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection, or refuse one too many."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(busy(f"there are {MAX_CONNECTIONS:,} connections already"), b"503 Service Unavailable")
        self._wait_for_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        for timer in (self._waiting, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Handle what the client has sent."""
        super().handle_events()
        if self._waiting is not None and self.cycle is not None and not self.cycle.response_complete:
            self._waiting.cancel()
            self._waiting = None

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self._wait_for_header()

    def pause_writing(self) -> None:
        """Wait for the client to take what was sent."""
        super().pause_writing()
        self._writing = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        """Send more."""
        if self._writing is not None:
            self._writing.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Send a refusal of what is not a request of HTTP, in place of uvicorn's plain text."""
        self._refuse(Refusal(400, "this is not a request of HTTP, or its header is too long"), b"400 Bad Request")

    def _wait_for_header(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def _refuse(self, refusal: Refusal, status: bytes) -> None:
        """Write an answer past the state of the connection, which may be broken, and close it."""
        body = refusal.body()
        head = [b"HTTP/1.1 " + status, b"content-type: application/json", b"content-length: %d" % len(body)]
        head += [f"{name.lower()}: {value}".encode() for name, value in refusal.headers.items()]
        self.transport.write(b"\r\n".join([*head, b"connection: close", b"", b""]) + body)
        self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, before the model is loaded.

    Args:
        host: name or address of an interface of this machine.
        port: port; 0 for a free one.

    Raises:
        DataError: If the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        hint = {
            errno.EADDRINUSE: "; stop the other program, or pass another --port",
            errno.EACCES: "; ports below 1024 need rights, pass another --port",
        }.get(error.errno or 0, "; pass a name or an address of this machine as --host")
        raise DataError(f"{host}:{port} cannot be listened on: {reason(error)}{hint}") from None
    return bound


def names_of(host: str, bound: socket.socket) -> list[str]:
    """Return the names under which a server on the loopback interface is reached; none for all on another one.

    Args:
        host: what the user wrote.
        bound: the socket.
    """
    if not ipaddress.ip_address(bound.getsockname()[0]).is_loopback:
        return []
    return sorted({*LOOPBACK, f"[{host}]".lower() if ":" in host else host.lower()})


def address_of(bound: socket.socket) -> str:
    """Return the address at which a browser opens the server."""
    host, port = bound.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def build_server(service: Service, hosts: Sequence[str], keys: Sequence[str]) -> uvicorn.Server:
    """Return a server for a service, which `run` takes.

    Args:
        service: the service.
        hosts: see `Guard`.
        keys: see `Guard`.
    """
    app: ASGIApp = Guard(build_app(service), hosts, keys, OPEN_PATHS)
    patience = service.limits.patience
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER,
        timeout_keep_alive=patience,  # type: ignore[arg-type]
        timeout_graceful_shutdown=max(1, round(2 * patience)),
    )
    return uvicorn.Server(config)


def run(server: uvicorn.Server, bound: socket.socket, started: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, and answer what was taken before the return.

    Args:
        server: the server.
        bound: the socket.
        started: function that is called once the server listens.
    """

    def stop(*_: Any) -> None:
        server.should_exit = True

    # uvicorn has its own handlers while it serves. Afterwards it raises the signal again, which must not end the
    # process by the signal: the stop was clean.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)

    async def serve() -> None:
        serving = asyncio.ensure_future(server.serve([bound]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        started()
        await serving

    asyncio.run(serve())
