"""The guard in front of all routes: the name of the host, the key, and the headers of every answer."""

import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualenc.search.service.refusals import Refusal
from dualenc.utils.text import quoted

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
MAX_HEADER = 32 * 1024  # bytes of a request before its body


class Guard:
    """A wrapper of the application that refuses requests before anything reads them.

    Args:
        app: the application.
        hosts: names of the host under which the server is reached, in lower case; empty for all. A server on the
            loopback interface has them: a page of another site whose name resolves to 127.0.0.1 (DNS rebinding) would
            be of the same origin as the server, and could read its answers.
        keys: the keys; empty for a server that asks for none.
        open_paths: paths that do not need a key; one that ends with a slash stands for all below it.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], keys: Sequence[str], open_paths: Sequence[str]) -> None:
        self.app, self.hosts, self.open_paths = app, frozenset(hosts), tuple(open_paths)
        self.digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it to the application."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        try:
            self._check(scope)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        """Raise a `Refusal` of a request with a long header, to another host, or without a key."""
        # uvicorn limits what it keeps of an incomplete header, not one that comes at once.
        length = len(scope["raw_path"]) + len(scope["query_string"])
        if length + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > MAX_HEADER:
            raise Refusal(431, f"the header of the request is longer than {MAX_HEADER:,} bytes")
        headers = dict(reversed(scope["headers"]))  # the first one of a name counts
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts and host_name(host) not in self.hosts:
            raise Refusal(403, f"this server is not {quoted(host)}: open it as {sorted(self.hosts)[-1]}")
        path = scope["path"]
        if self.digests and not any(
            path == one or (one[-1:] == "/" != one and path.startswith(one)) for one in self.open_paths
        ):
            self._check_key(headers.get(b"authorization", b""))

    def _check_key(self, given: bytes) -> None:
        """Compare a key with all keys, in a time that does not depend on them."""
        scheme, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        right = [hmac.compare_digest(digest, one) for one in self.digests]
        if scheme.lower() != b"bearer" or not any(right):
            what = "the key is wrong" if given else "a key is needed"
            raise Refusal(401, f"{what}: send the header Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})


def host_name(host: str) -> str:
    """Return the name in a Host header, in lower case and without the port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _digest(key: bytes) -> bytes:
    """Hash a key, so that the time to compare two does not tell their lengths."""
    return hashlib.sha256(key).digest()
