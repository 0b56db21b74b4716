"""Web, S3 and model hub servers on the loopback interface, which log their requests and fail on demand."""

import base64
import hashlib
import json
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

SLOW = 0.02  # seconds between the parts of a slow response


class WebServer(ThreadingHTTPServer):
    """Server of a folder with HEAD, ETag and Range.

    `fail(name, *faults)` adds faults to the next GETs of a file, one each: a status such as 503, "reset", "short" (half
    of the file, with the length of the whole), "short unsized" (half, without a length), "flip" (one bit differs),
    "slow". With `always=True` the first fault stays for all GETs.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[Any]] = defaultdict(list)
        self.always: dict[str, Any] = {}
        self.log: list[tuple[str, str]] = []  # method and name
        self.credentials: str | None = None  # "user:password" that requests must have
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
        """Return the number of GETs of a file, or of all files by name; `log` has the requests in order."""
        found = Counter(path for method, path in self.log if method == "GET")
        return found if name is None else found[name]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection."""


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
        fault, path = self._fault(name, send), self.server.folder / name
        if not self._may_read():
            self._status(401)
        elif isinstance(fault, int):
            self._status(fault)
        elif not path.is_file():
            self._status(404)
        elif fault == "reset":
            self._reset()
        else:
            self._file(path.read_bytes(), fault, send)

    def _fault(self, name: str, send: bool) -> Any:
        with self.server.lock:
            self.server.log.append((self.command, name))
            if not send:
                return None
            if self.server.faults[name]:
                return self.server.faults[name].pop(0)
            return self.server.always.get(name)

    def _may_read(self) -> bool:
        if self.server.credentials is None:
            return True
        wanted = "Basic " + base64.b64encode(self.server.credentials.encode()).decode()
        return self.headers.get("Authorization") == wanted

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)  # closing is not enough if a forked process has it open, too
        self.connection.close()
        self.close_connection = True

    def _file(self, data: bytes, fault: Any, send: bool) -> None:
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
            return
        if fault in ("short", "short unsized"):
            data = data[: len(data) // 2]
            self.close_connection = True
        parts = 20 if fault == "slow" else 1
        size = -(-len(data) // parts)
        for start in range(0, len(data), max(1, size)):
            self.wfile.write(data[start : start + size])
            if fault == "slow":
                time.sleep(SLOW)

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
    """A bucket of moto's S3 server behind a `Store`."""

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
        """Add faults to the next GETs of a key: a status, or "short"."""
        self.store.faults[f"/{self.name}/{key}"] += faults

    def gets(self, key: str) -> int:
        return sum(path == f"/{self.name}/{key}" for path in self.store.log)


class Store:
    """A WSGI application around moto's that logs GETs and makes some of them fail."""

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
        return [b"".join(whole)[:100]] if fault == "short" else whole  # with the length of the whole object


@contextmanager
def s3_server() -> Iterator[tuple[str, Store]]:
    """Run moto's S3 server; yield its address and its `Store`."""
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


class Hub(ThreadingHTTPServer):
    """A model hub, with the part of the protocol that huggingface_hub needs to create, push and fetch.

    Each repository has commits, which hold files by name, and branches. `log` has the requests (method, path), `tokens`
    the user of each token. Faults: `status` is the status of every response, `hang` the seconds before a response, and
    `spoil` flips a bit in uploads of large files, which the server reports ("loud") or does not ("quiet").
    """

    daemon_threads = True
    allow_reuse_address = True
    LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "other")
    LARGE = (".safetensors", ".onnx", ".bin")  # stored apart from git, by their SHA-256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.tokens = {"token-of-owner": "owner", "token-of-other": "other"}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.status, self.hang, self.spoil = 0, 0.0, ""
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection."""


class Repo:
    """A repository: files by commit, large ones as `Large`."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.gated = False  # files are for users who accepted the terms, and no user has
        self.commits: dict[str, dict[str, bytes | Large]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, branch: str, changes: "dict[str, bytes | Large | None]", message: str) -> str:
        """Commit changed files, and remove those that are None; return the hash of the commit."""
        both = {**self.commits.get(self.branches.get(branch, ""), {}), **changes}
        files = {name: content for name, content in both.items() if content is not None}
        names = [len(self.commits), message, *((name, str(x)) for name, x in sorted(files.items()))]
        commit = hashlib.sha1(json.dumps(names).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        self.messages.append(message)
        return commit

    def at(self, revision: str) -> str | None:
        """Return the commit of a branch or hash, or None."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Large:
    def __init__(self, oid: str, size: int) -> None:
        self.oid, self.size = oid, size

    def __str__(self) -> str:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {self.size}\n"


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        with self.server.lock:
            self.server.log.append((self.command, unquote(path)))
        if self.server.hang:
            time.sleep(self.server.hang)
        if self.server.status:
            return self._send(self.server.status, {"error": "out of order"})
        self.user = self.server.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        with self.server.lock:
            for pattern, method in self.ROUTES:
                command, _, rest = pattern.partition(" ")
                if self.command in command.split("|") and (found := re.fullmatch(rest, path)):
                    return method(self, body, *map(unquote, found.groups()))
        return self._send(404, {"error": "Not Found"})

    def _send(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status >= 400 and isinstance(body, dict):
            self.send_header("X-Error-Message", body["error"])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may_write(self, repo: str) -> bool:
        if self.user is None:
            self._send(401, {"error": "Invalid username or password."})
        elif self.user != repo.partition("/")[0]:
            self._send(403, {"error": f"You don't have the rights to write to {repo}"})
        return self.user is not None and self.user == repo.partition("/")[0]

    def _found(self, name: str, revision: str) -> "tuple[Repo, str] | None":
        """Return a repository that this user may read and one of its commits; otherwise respond with an error."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.user != name.partition("/")[0]):
            error = {"error": "Repository not found"}
            self._send(401 if self.user is None else 404, error, X_Error_Code="RepoNotFound")
        elif (commit := repo.at(revision)) is None:
            self._send(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        else:
            return repo, commit
        return None

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(repo):
            return None
        if repo in self.server.repos:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"})
        self.server.repos[repo] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._send(200, {"url": f"{self.server.url}/{repo}", "name": repo})

    def _validate(self, body: bytes) -> None:
        import yaml

        content = json.loads(body)["content"]
        about = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)[1])  # type: ignore[index]
        errors = []
        if about.get("license") not in (None, *self.server.LICENSES):
            errors.append({"message": '"license" must be one of a list'})
        for model in about.get("model-index", []):
            for result in model["results"]:
                wrong = not result["task"]["type"] or not result["dataset"]["type"] or not result["metrics"]
                errors += [{"message": '"model-index" is malformed'}] if wrong else []
        self._send(400 if errors else 200, {"error": "Bad Request", "errors": errors, "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        if not self._may_write(repo) or (found := self._found(repo, revision)) is None:
            return
        files = found[0].commits[found[1]]
        answer = []
        for one in json.loads(body)["files"]:
            there = files.get(one["path"])
            oid = there.oid if isinstance(there, Large) else None if there is None else git_hash(there)
            mode = "lfs" if one["path"].endswith(self.server.LARGE) else "regular"
            answer.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answer})

    def _batch(self, body: bytes, repo: str) -> None:
        if not self._may_write(repo):
            return
        answer = []
        for one in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/lfs/{one['oid']}"},
                "verify": {"href": f"{self.server.url}/verify"},
            }
            answer.append({**one} if one["oid"] in self.server.objects else {**one, "actions": actions})
        self._send(200, {"transfer": "basic", "objects": answer})

    def _upload(self, body: bytes, oid: str) -> None:
        if self.server.spoil:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if hashlib.sha256(body).hexdigest() != oid and self.server.spoil != "quiet":
            return self._send(400, {"error": "the content has another SHA-256"})
        self.server.objects[oid] = body
        return self._send(200, b"")

    def _verify(self, body: bytes) -> None:
        asked = json.loads(body)
        there = len(self.server.objects.get(asked["oid"], b"")) == asked["size"]
        self._send(200 if there else 404, {"error": "no such object"})

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        if not self._may_write(name) or (found := self._found(name, revision)) is None:
            return None
        changes: dict[str, bytes | Large | None] = {}
        message = ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
            else:
                content = self.server.objects[
                    value["oid"]
                ]  # listed by its real hash and size, whatever the request says
                changes[value["path"]] = Large(hashlib.sha256(content).hexdigest(), len(content))
                self.server.objects[hashlib.sha256(content).hexdigest()] = content
        commit = found[0].commit(revision, changes, message)
        return self._send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        if not self._may_write(name) or (found := self._found(name, "main")) is None:
            return None
        if branch in found[0].branches:
            return self._send(409, {"error": "Reference already exists"})
        found[0].branches[branch] = found[1]
        return self._send(200, {})

    def _info(self, body: bytes, name: str, revision: str = "main") -> None:
        if (found := self._found(name, revision)) is not None:
            private = found[0].private
            self._send(200, {"id": name, "modelId": name, "sha": found[1], "private": private, "siblings": []})

    def _listed(self, name: str, content: bytes | Large) -> dict[str, Any]:
        if isinstance(content, Large):
            pointer = git_hash(str(content).encode())
            lfs = {"oid": content.oid, "size": content.size, "pointerSize": len(str(content))}
            return {"type": "file", "path": name, "size": content.size, "oid": pointer, "lfs": lfs}
        return {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        if (found := self._found(name, revision)) is not None:
            files = found[0].commits[found[1]]
            self._send(200, [self._listed(*item) for item in files.items()])

    def _paths(self, body: bytes, name: str, revision: str) -> None:
        if (found := self._found(name, revision)) is not None:
            from urllib.parse import parse_qs

            json_body = self.headers.get("Content-Type", "").startswith("application/json")
            paths = json.loads(body)["paths"] if json_body else parse_qs(body.decode())["paths"]
            files = found[0].commits[found[1]]
            self._send(200, [self._listed(path, files[path]) for path in paths if path in files])

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (found := self._found(name, revision)) is None:
            return None
        if found[0].gated:
            return self._send(403, {"error": "Access to this model is restricted"}, X_Error_Code="GatedRepo")
        content = found[0].commits[found[1]].get(path)
        headers = {"X_Repo_Commit": found[1]}
        if content is None:
            return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **headers)
        if isinstance(content, Large):
            headers |= {"X_Linked_Etag": f'"{content.oid}"', "X_Linked_Size": str(content.size)}
            # Large files are on another host, which must not receive the token of the hub.
            where = f"http://localhost:{self.server.server_port}/large/{content.oid}"
            return self._send(302, b"", Location=where, **headers)
        return self._send(200, content, ETag=f'"{git_hash(content)}"', **headers)

    def _large(self, body: bytes, oid: str) -> None:
        if "Authorization" in self.headers:
            return self._send(400, {"error": "a token was sent to another host"})
        return self._send(200, self.server.objects[oid], ETag=f'"{oid}"')

    _REPO = "([^/]+/[^/]+)"
    ROUTES = (
        ("POST /api/repos/create", _create),
        ("POST /api/validate-yaml", _validate),
        (f"POST /api/models/{_REPO}/preupload/([^/]+)", _preupload),
        (f"POST /{_REPO}[.]git/info/lfs/objects/batch", _batch),
        ("PUT /lfs/(.+)", _upload),
        ("POST /verify", _verify),
        (f"POST /api/models/{_REPO}/commit/([^/]+)", _commit),
        (f"POST /api/models/{_REPO}/branch/([^/]+)", _branch),
        (f"POST /api/models/{_REPO}/paths-info/([^/]+)", _paths),
        (f"GET /api/models/{_REPO}/revision/([^/]+)", _info),
        (f"GET /api/models/{_REPO}/tree/([^/]+)", _tree),
        (f"GET /api/models/{_REPO}", _info),
        (f"HEAD|GET /{_REPO}/resolve/([^/]+)/(.+)", _resolve),
        ("HEAD|GET /large/(.+)", _large),
    )


@contextmanager
def hub_server() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
