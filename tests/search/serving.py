"""Servers of the service in a thread, engines that tests control, and clients that may send anything."""

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dualenc.data.image_pixels import decode_pixels
from dualenc.search.service.core import Service
from dualenc.search.service.engine import Engine, Scores, unit_rows
from dualenc.search.service.server import bind, build_server, names_of

PATIENCE = 60  # seconds after which a test gives up; it waits for events, never for a time


class HashEngine(Engine):
    """A model whose embeddings are known: the vector of a text is drawn from its bytes.

    Attributes:
        gate: while it is cleared, `embed_texts` waits.
        entered: set when `embed_texts` was called.
        seen: the texts of each call.
    """

    name, fingerprint, dims, images, labels = "hashes", "0" * 32, 16, True, ()
    scale = 10.0

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.seen: list[list[str]] = []

    def prepare(self, data: bytes) -> Any:
        return int(decode_pixels(data).astype(int).sum())

    def embed_pictures(self, pictures: Sequence[Any]) -> np.ndarray:
        return known_vectors([str(one) for one in pictures])

    def embed_texts(self, texts: Sequence[str], prompt: str | None = None) -> np.ndarray:
        self.seen.append(list(texts))
        self.entered.set()
        assert self.gate.wait(PATIENCE)
        if any("explode" in text for text in texts):
            raise RuntimeError("a model may raise anything")
        return known_vectors(texts)

    def count_tokens(self, texts: Sequence[str]) -> int:
        return sum(len(text.split()) for text in texts)

    def label(self, texts: Sequence[str]) -> list[Scores]:
        raise NotImplementedError


def known_vectors(texts: Sequence[str]) -> np.ndarray:
    """Return the vectors (N, 16) of `HashEngine`."""
    rows = [np.random.default_rng(list(text.encode())).standard_normal(16) for text in texts]
    return unit_rows(np.array(rows, np.float32))


@contextmanager
def served(service: Service, keys: Sequence[str] = ()) -> Iterator[int]:
    """Serve on a free port, yield the port, and stop at the end as a signal does."""
    with service, bind("127.0.0.1", 0) as bound:
        server = build_server(service, names_of("127.0.0.1", bound), keys)
        port = bound.getsockname()[1]
        bound.listen()  # Connections wait until the server is up.
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            service.server = server  # type: ignore[attr-defined]
            yield port
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; a minute is a failure."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def ask(
    port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """Send a request, and return status, headers in lower case, and the parsed JSON or the bytes of the answer.

    Args:
        port: port of the server on 127.0.0.1.
        method: method of the request.
        path: path of the request.
        body: bytes, or what is sent as JSON.
        headers: headers of the request; by default that of JSON.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"} if headers is None else headers)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    found = {name.lower(): value for name, value in answer.getheaders()}
    is_json = found.get("content-type") == "application/json"
    return answer.status, found, json.loads(content) if is_json and content else content


def post(port: int, path: str, **body: Any) -> Any:
    """Send JSON, and return the answer, which must be a success."""
    status, _, answer = ask(port, "POST", path, body)
    assert status == 200, answer
    return answer


def send_raw(port: int, data: bytes, end: bool = False) -> bytes:
    """Send bytes, and return all that the server sends until it closes the connection.

    Args:
        port: port of the server on 127.0.0.1.
        data: the bytes.
        end: whether to say that no more bytes follow.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        found = b""
        try:
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                found += part
        except ConnectionError:  # The server may close before all was sent.
            pass
        return found


def data_uri(data: bytes, kind: str = "png") -> str:
    """Return the data URI of a picture."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
