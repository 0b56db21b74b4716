"""Refusals: each wrong request is answered by a status and one line of JSON."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from dualenc.utils.text import one_line

LONGEST = 500  # characters of a message, which may quote what the client sent
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    500: "server_error",
    503: "overloaded_error",
}  # all others are "invalid_request_error"


class Refusal(Exception):
    """The refusal of a request.

    Attributes:
        status: status of the answer.
        message: one line that says what is wrong and what to send instead.
        headers: further headers of the answer.
        kind: type of the error; by default that of the status.
    """

    def __init__(
        self, status: int, message: object, headers: Mapping[str, str] | None = None, kind: str | None = None
    ) -> None:
        text = one_line(message)
        self.status, self.headers = status, dict(headers or {})
        self.kind = kind or KINDS.get(status, "invalid_request_error")
        self.message = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"
        super().__init__(self.message)

    def body(self) -> bytes:
        """Return the body of the answer."""
        return to_json({"error": {"message": self.message, "type": self.kind}})

    def response(self) -> Response:
        """Return the answer."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def busy(message: str) -> Refusal:
    """Return the refusal of a request for which there is no room at the moment."""
    return Refusal(503, message, {"Retry-After": "1"})


def to_json(value: Any) -> bytes:
    """Return a value as JSON. It is ASCII, so that names of files that are not Unicode can be sent too."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
