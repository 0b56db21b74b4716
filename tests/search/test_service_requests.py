"""Wrong requests of every kind: each has its status and one line, and nothing else happens."""

import base64
import contextlib
import json
import socket
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import encode, pixels
from serving import PATIENCE, HashEngine, ask, data_uri, known_vectors, post, send_raw, served, until

from dualenc.search.service.core import MIB, Limits, Service
from dualenc.search.service.fields import MAX_CHARACTERS, MAX_VALUES, parse_object
from dualenc.search.service.refusals import Refusal


class FewRows:
    """An index of known vectors, whose rows are looked up in numpy."""

    kind, dims, query_prompt = "images", 16, None

    def __init__(self) -> None:
        self.vectors = known_vectors([f"row {i}" for i in range(6)])
        self.about = {"examples": ["row 1"], "fields": [], "source": []}
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.vectors)

    def combine(self, vectors: np.ndarray, weights: Any = None, rows: Any = (), minus: Any = None) -> np.ndarray:
        query = np.concatenate([vectors, self.vectors[list(rows)]]).mean(0)
        return query / np.linalg.norm(query)

    def search_many(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = vectors @ self.vectors.T
        order = np.argsort(-scores, 1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), order

    def record(self, row: int) -> dict[str, Any]:
        return {"key": str(row), "source": "/a/b.tar", "captions": [f"row {row}"], "fields": {}}

    def image_bytes(self, row: int) -> tuple[bytes, str]:
        self.reads.append(row)
        return encode(np.full((4, 4, 3), row, np.uint8)), "image/png"


@pytest.fixture(scope="module")
def service() -> Service:
    return Service(HashEngine(), FewRows(), "few", Limits(wait_ms=0, max_body=MIB))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def port(service: Service) -> Any:
    with served(service) as port:
        yield port


@dataclass
class Wrong:
    """A wrong request.

    Attributes:
        name: name of the case.
        status: the status that it must have.
        body: body, as bytes or as what is sent as JSON.
        path: path of the request.
        method: method of the request.
        headers: headers of the request; by default that of JSON.
        says: what the message must contain.
    """

    name: str
    status: int
    body: Any = field(default=None, repr=False)
    path: str = "/api/search"
    method: str = "POST"
    headers: dict[str, str] | None = None
    says: str = ""


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that declares many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def nested(depth: int) -> bytes:
    return b'{"texts":' + b"[" * depth + b"]" * depth + b"}"


PICTURE = encode(pixels(np.random.default_rng(1)))
JSON = {"Content-Type": "application/json"}
CLASSIFY, EMBED = "/classify", "/v1/embeddings"
TEXT = {"texts": ["a cat"]}
WRONG = [
    # Paths and methods.
    Wrong("unknown path", 404, method="GET", path="/nothing"),
    Wrong("traversal in a row", 404, method="GET", path="/api/image/..%2f..%2fetc%2fpasswd"),
    Wrong("traversal in a path", 404, method="GET", path="/api/image/../../../../etc/passwd"),
    Wrong("traversal in a static name", 404, method="GET", path="/static/..%2fapp.py"),
    Wrong("traversal out of the static folder", 404, method="GET", path="/static/../../__init__.py"),
    Wrong("encoded dots in a static name", 404, method="GET", path="/static/%2e%2e%2findex.py"),
    Wrong("absolute static name", 404, method="GET", path="/static//etc/passwd"),
    Wrong("NUL in a static name", 404, method="GET", path="/static/app.js%00.html"),
    Wrong("unknown static name", 404, method="GET", path="/static/core.py"),
    Wrong("unknown row", 404, method="GET", path="/api/image/6", says="rows 0 to 5"),
    Wrong("negative row", 404, method="GET", path="/api/image/-1"),
    Wrong("row of other digits", 404, method="GET", path="/api/thumbnail/%D9%A3"),
    Wrong("row with a sign", 404, method="GET", path="/api/sample/+1"),
    Wrong("fractional row", 404, method="GET", path="/api/sample/1.0"),
    Wrong("huge row", 404, method="GET", path="/api/sample/" + "9" * 500),
    Wrong("no row", 404, method="GET", path="/api/sample/"),
    Wrong("GET of a search", 405, method="GET"),
    Wrong("PUT of a row", 405, method="PUT", path="/api/image/1"),
    Wrong("DELETE of the state", 405, method="DELETE", path="/health"),
    Wrong("POST of the page", 405, path="/", body={}),
    Wrong("unknown method", 405, method="BREW", path="/health"),
    # Bodies.
    Wrong("no body", 400, b"", says="JSON"),
    Wrong("broken JSON", 400, b'{"texts": ["a cat"', says="JSON"),
    Wrong("two objects", 400, b"{}{}"),
    Wrong("list", 400, [], says="object"),
    Wrong("null", 400, b"null", says="object"),
    Wrong("not UTF-8", 400, b'{"texts": ["\xff\xfe"]}', says="UTF-8"),
    Wrong("UTF-16", 400, json.dumps(TEXT).encode("utf-16")),
    Wrong("key twice", 400, b'{"k": 1, "texts": ["a"], "k": 2}', says="'k' stands twice"),
    Wrong("deep nesting", 400, nested(200_000), says="deep"),
    Wrong("too large", 413, b" " * (MIB + 1), says="1 MiB"),
    Wrong("100 MB of JSON", 413, b'{"texts": ["' + b"a" * 100_000_000 + b'"]}', says="1 MiB"),
    Wrong("form", 415, b"texts=a", headers={"Content-Type": "application/x-www-form-urlencoded"}, says="Content-Type"),
    Wrong("plain text", 415, json.dumps(TEXT).encode(), headers={"Content-Type": "text/plain"}),
    Wrong("multipart", 415, b"--x", headers={"Content-Type": "multipart/form-data; boundary=x"}),
    Wrong("no type", 415, json.dumps(TEXT).encode(), headers={}),
    Wrong("compressed", 415, zlib.compress(b"{}"), headers={**JSON, "Content-Encoding": "deflate"}),
    # Fields of a search.
    Wrong("nothing to search for", 400, {}, says="texts, images or rows"),
    Wrong("only minus", 400, {"minus": ["a"]}, says="texts, images or rows"),
    Wrong("unknown field", 400, {"text": ["a"]}, says="texts"),
    Wrong("text that is no list", 400, {"texts": "a cat"}, says="list"),
    Wrong("number among texts", 400, {"texts": ["a", 3]}, says="number 1"),
    Wrong("null among texts", 400, {"texts": [None]}),
    Wrong("object as texts", 400, {"texts": {"a": 1}}),
    Wrong("empty text", 400, {"texts": ["  "]}, says="empty"),
    Wrong("half a character", 400, b'{"texts": ["\\ud800"]}', says="half"),
    Wrong("long text", 400, {"texts": ["a" * (MAX_CHARACTERS + 1)]}, says="longer"),
    Wrong("many texts", 400, {"texts": ["a"] * 65}, says="at most 64"),
    Wrong("number as minus", 400, {**TEXT, "minus": 1}),
    Wrong("k of 0", 400, {**TEXT, "k": 0}, says="1 to 1,000"),
    Wrong("negative k", 400, {**TEXT, "k": -1}),
    Wrong("large k", 400, {**TEXT, "k": 1001}),
    Wrong("huge k", 400, {**TEXT, "k": 10**400}),
    Wrong("k of more digits than Python reads", 400, b'{"texts": ["a"], "k": ' + b"9" * 10_000 + b"}"),
    Wrong("fractional k", 400, {**TEXT, "k": 1.5}),
    Wrong("k as text", 400, {**TEXT, "k": "3"}),
    Wrong("k as truth", 400, {**TEXT, "k": True}),
    Wrong("min_score as text", 400, {**TEXT, "min_score": "0.2"}),
    Wrong("NaN", 400, b'{"texts": ["a"], "min_score": NaN}', says="NaN"),
    Wrong("Infinity", 400, b'{"texts": ["a"], "min_score": -Infinity}', says="Infinity"),
    Wrong("number past the floats", 400, b'{"texts": ["a"], "min_score": 1e999}', says="inf"),
    Wrong("whole number past the floats", 400, {**TEXT, "min_score": 10**400}),
    Wrong("distinct over 1", 400, {**TEXT, "distinct": 1.5}),
    Wrong("distinct as list", 400, {**TEXT, "distinct": [0.9]}),
    Wrong("where as list", 400, {**TEXT, "where": ["width > 3"]}),
    Wrong("long where", 400, {**TEXT, "where": "a" * 1001}),
    Wrong("rows as number", 400, {"rows": 3}),
    Wrong("text among rows", 400, {"rows": [1, "2"]}),
    Wrong("truth among rows", 400, {"rows": [True]}),
    Wrong("unknown row in a search", 400, {"rows": [6]}, says="0 to 5"),
    Wrong("negative row in a search", 400, {"rows": [-1]}),
    Wrong("huge row in a search", 400, {"rows": [10**400]}),
    Wrong("many rows", 400, {"rows": [1] * 1001}, says="at most 1,000"),
    # Pictures.
    Wrong("URL", 400, {"images": ["http://127.0.0.1:1/a.png"]}, says="no URL"),
    Wrong("file URL", 400, {"images": ["file:///etc/passwd"]}),
    Wrong("path", 400, {"images": ["/etc/passwd"]}),
    Wrong("data URI of a text", 400, {"images": ["data:text/html;base64,YQ=="]}),
    Wrong("data URI without base64", 400, {"images": ["data:image/png,abc"]}),
    Wrong("broken base64", 400, {"images": ["data:image/png;base64,!!!!"]}, says="base64"),
    Wrong("base64 of other characters", 400, {"images": ["data:image/png;base64,äöü"]}),
    Wrong("empty picture", 400, {"images": ["data:image/png;base64,"]}, says="empty"),
    Wrong("broken picture", 400, {"images": [data_uri(PICTURE[:50])]}, says="picture 0"),
    Wrong("second picture broken", 400, {"images": [data_uri(PICTURE), data_uri(b"no picture")]}, says="picture 1"),
    Wrong("GIF", 400, {"images": [data_uri(b"GIF89a" + bytes(40), "gif")]}, says="JPEG, PNG or WebP"),
    Wrong("SVG", 400, {"images": [data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml")]}),
    Wrong("bomb", 400, {"images": [data_uri(bomb(60_000, 60_000))]}, says="pixels"),
    Wrong("bomb of the largest sides", 400, {"images": [data_uri(bomb(2**31 - 1, 2**31 - 1))]}, says="pixels"),
    Wrong("many pictures", 400, {"images": [data_uri(PICTURE)] * 65}),
    # Embeddings and classes.
    Wrong("no input", 400, {}, EMBED, says="input"),
    Wrong("empty input", 400, {"input": []}, EMBED),
    Wrong("empty string", 400, {"input": ""}, EMBED),
    Wrong("token ids", 400, {"input": [1, 2, 3]}, EMBED),
    Wrong("many inputs", 400, {"input": ["a"] * 2049}, EMBED, says="2,048"),
    Wrong("many pictures as input", 400, {"input": [data_uri(PICTURE)] * 65}, EMBED, says="64"),
    Wrong("broken picture as input", 400, {"input": data_uri(b"nothing")}, EMBED),
    Wrong("other model", 404, {"input": "a", "model": "gpt"}, EMBED, says="hashes"),
    Wrong("model as number", 400, {"input": "a", "model": 3}, EMBED),
    Wrong("other format", 400, {"input": "a", "encoding_format": "hex"}, EMBED, says="base64"),
    Wrong("dimensions of 0", 400, {"input": "a", "dimensions": 0}, EMBED),
    Wrong("many dimensions", 400, {"input": "a", "dimensions": 17}, EMBED, says="1 to 16"),
    Wrong("nothing to classify", 400, {"labels": ["a"]}, CLASSIFY),
    Wrong("pictures and texts", 400, {"images": [data_uri(PICTURE)], "texts": ["a"], "labels": ["b"]}, CLASSIFY),
    Wrong("no labels", 400, {"images": [data_uri(PICTURE)]}, CLASSIFY, says="labels"),
    Wrong("template without a place", 400, {"texts": ["a"], "labels": ["b"], "templates": ["a photo"]}, CLASSIFY),
    Wrong("many prompts", 400, {"texts": ["a"], "labels": ["b"] * 100, "templates": ["{c}"] * 30}, CLASSIFY),
]


def check_health(service: Service, port: int) -> None:
    """Assert that a server answers as at its start."""
    assert ask(port, "GET", "/health")[2]["status"] == "ok"
    assert [hit["row"] for hit in post(port, "/api/search", texts=["row 4"], k=1)["hits"]] == [4]
    assert service.engine.seen[-1] == ["row 4"]  # type: ignore[attr-defined]


def check_refusal(content: bytes) -> str:
    """Assert that a body is that of an error, and return its message."""
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type"}
    assert error["message"].isprintable()
    assert 0 < len(error["message"]) <= 500
    assert "Traceback" not in error["message"]
    return error["message"]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda one: one.name)
def test_wrong_requests(service: Service, port: int, wrong: Wrong) -> None:
    batches, reads = service.batcher.batches, list(service.index.reads)  # type: ignore[union-attr]
    status, headers, answer = ask(port, wrong.method, wrong.path, wrong.body, wrong.headers)
    assert status == wrong.status, answer
    assert headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff"
    assert wrong.says in check_refusal(json.dumps(answer).encode())
    assert (service.batcher.batches, service.index.reads) == (batches, reads)  # type: ignore[union-attr]
    check_health(service, port)


def test_a_condition_that_cannot_be_read_is_told_apart(tmp_path: Path) -> None:
    from helpers import tiny_embedder

    import dualenc
    from dualenc.search.build import build_search
    from dualenc.search.service.torch_engine import TorchEngine

    (tmp_path / "a.png").write_bytes(PICTURE)
    embedder = tiny_embedder(1)
    build_search(embedder, [str(tmp_path / "a.png")], tmp_path / "index", workers=0)
    index = dualenc.Index.open(tmp_path / "index", embedder)
    with served(Service(TorchEngine(embedder, "tiny"), index)) as port:
        for where in ("width >", "nothing > 3", "__import__('os')", "open('/etc/passwd')", "width > 10**6", "(" * 500):
            status, _, answer = ask(port, "POST", "/api/search", {"texts": ["a cat"], "where": where})
            assert (status, answer["error"]["type"]) == (400, "where"), where
        status, _, answer = ask(port, "POST", "/api/search", {"texts": ["a cat"], "minus": ["a cat"]})
        assert status == 400  # nothing is left of the query
        assert answer["error"]["type"] == "invalid_request_error"
        assert len(post(port, "/api/search", texts=["a cat"], where="width >= 1")["hits"]) == 1


def test_a_body_of_many_values_is_not_parsed() -> None:
    """A list of empty lists takes twenty times its bytes."""
    body = b'{"texts": [' + b"0," * MAX_VALUES + b"0]}"
    with pytest.raises(Refusal, match="values") as caught:
        parse_object(body)
    assert caught.value.status == 413
    assert len(parse_object(body.replace(b"0,", b"", 20))["texts"]) == MAX_VALUES - 19


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
RAW = {
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
    "no host in HTTP 1.0": (b"GET /health HTTP/1.0\r\n\r\n", 403),
    "two lengths": (HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n{}  ", 400),
    "negative length": (HEAD + b"Content-Length: -1\r\n\r\n", 400),
    "length that is no number": (HEAD + b"Content-Length: ten\r\n\r\n", 400),
    "broken chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "other encoding": (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    "long header": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431),
    "many headers": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 20_000 + b"\r\n", 431),
    "long path": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
    "blank in a path": (b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "absolute path": (b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
}


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_no_good_request(service: Service, port: int, name: str) -> None:
    data, status = RAW[name]
    if status != 400:
        data = data.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    answer = send_raw(port, data)
    # A long header is refused by its size (431), or earlier, when that much of it came and it did not end (400); and
    # the server may close the connection before all was sent, which can lose the answer.
    if answer or status != 431:
        assert answer.startswith(
            tuple(f"HTTP/1.1 {one} ".encode() for one in {status, 400 if status == 431 else status})
        )
        check_refusal(answer.partition(b"\r\n\r\n")[2])
    check_health(service, port)


def test_chunks_without_a_length_are_bounded(service: Service, port: int) -> None:
    part = b"10000\r\n" + b" " * 65536 + b"\r\n"
    request = HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    answer = send_raw(port, request + part * 17 + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert send_raw(port, request + part + b"2\r\n{}\r\n0\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    check_health(service, port)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /health HT",
        HEAD,
        HEAD + b"Content-Length: 100\r\n\r\n",
        HEAD + b"Content-Length: 100\r\n\r\n" + b'{"texts": ["a',
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
    ids=["nothing", "half a line", "half a header", "no body", "half a body", "half a chunk"],
)
def test_clients_that_stop_in_a_request(service: Service, port: int, data: bytes) -> None:
    """Some end the connection; others keep it and send no more, and are cut off after a time."""
    batches = service.batcher.batches
    send_raw(port, data, end=True)
    assert service.batcher.batches == batches
    check_health(service, port)
    with served(Service(HashEngine(), limits=Limits(patience=0.2))) as slow:
        answer = send_raw(slow, data)
        if answer:  # A header has come in time: the server tells that the body did not.
            assert answer.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 100 "))


def test_a_client_that_takes_no_answer_is_cut_off() -> None:
    service = Service(HashEngine(), limits=Limits(patience=0.2))
    body = json.dumps({"input": [f"text {i}" for i in range(2048)]}).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with socket.socket() as connection, served(service) as port:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", port))
        # 40 answers of 0.7 MB are more than the buffers of a system hold.
        with contextlib.suppress(ConnectionError):
            connection.sendall(request * 40)
        until(lambda: bool(service.engine.seen))  # type: ignore[attr-defined]
        until(lambda: not service.server.server_state.connections)  # type: ignore[attr-defined]


def test_one_place_for_all_bodies() -> None:
    with served(Service(HashEngine(), limits=Limits(bodies=1000, wait_ms=0))) as small:
        status, headers, answer = ask(small, "POST", "/v1/embeddings", {"input": "a" * 2000})
        assert (status, headers["retry-after"], answer["error"]["type"]) == (503, "1", "overloaded_error")
        for _ in range(10):  # what a body took is given back, whatever became of it
            assert ask(small, "POST", "/v1/embeddings", {"input": "a" * 600})[0] == 200
            assert ask(small, "POST", "/v1/embeddings", b"{" + b" " * 600)[0] == 400


def test_base64_is_little_endian(port: int) -> None:
    (found,) = post(port, "/v1/embeddings", input="abc", encoding_format="base64")["data"]
    assert struct.unpack("<16f", base64.b64decode(found["embedding"])) == tuple(known_vectors(["abc"])[0].tolist())
