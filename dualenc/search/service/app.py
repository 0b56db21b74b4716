"""The routes of the service, on Starlette."""

import base64
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dualenc.search.service.body import BodyReader, unless_gone
from dualenc.search.service.core import MAX_HITS, Search, Service
from dualenc.search.service.engine import unit_rows
from dualenc.search.service.fields import PICTURE, Fields, parse_object
from dualenc.search.service.refusals import Refusal, to_json
from dualenc.utils.text import quoted

MAX_TEXTS, MAX_PICTURES = 2048, 64  # of a request; the first is OpenAI's
MAX_QUERIES, MAX_ROWS = 64, 1000  # of a search
PAGE = Path(__file__).parents[1] / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
OPEN_PATHS = ("/", "/static/", "/health")  # the page and the state of the server need no key
KEPT = "private, max-age=300"  # how long a browser keeps pictures, whose rows may change when the index is built again
TEMPLATE = "a photo of a {c}."

Answer = dict[str, Any]


def build_app(service: Service) -> Starlette:
    """Return the application of a service."""
    routes = Routes(service)
    get: dict[str, Any] = {"/health": routes.health}
    post: dict[str, Any] = {"/v1/embeddings": routes.embeddings, "/classify": routes.classify}
    if service.index is not None:
        get |= {"/": routes.page, "/static/{name}": routes.static}
        get |= {"/api/about": routes.about, "/api/sample/{row}": routes.sample}
        post |= {"/api/search": routes.search}
        if service.index.kind == "images":
            get |= {"/api/image/{row}": routes.image, "/api/thumbnail/{row}": routes.thumbnail}
    return Starlette(
        routes=[
            *(Route(path, routes.placed(function), methods=["GET"]) for path, function in get.items()),
            *(Route(path, routes.posted(function), methods=["POST"]) for path, function in post.items()),
        ],
        exception_handlers={Refusal: _refused, HTTPException: _unknown, Exception: _failed},
    )


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _unknown(request: Request, error: Exception) -> Response:
    """Return the answer to a request for a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    known = ", ".join(route.path for route in request.app.routes)
    what = {
        404: f"there is no {quoted(request.url.path)} here: the paths are {known}",
        405: f"{quoted(request.method, 20)} is not for {quoted(request.url.path)}",
    }
    return Refusal(error.status_code, what.get(error.status_code, error.detail), error.headers).response()


async def _failed(_: Request, error: Exception) -> Response:
    """Return the answer to a request that failed by a mistake of the program, whose traceback the server logs."""
    return Refusal(500, f"the request failed in the server ({type(error).__name__}), whose log says more").response()


class Routes:
    """The functions of the routes.

    Args:
        service: the service.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.bodies = service, BodyReader(service.limits)
        self.files = {path.name: path.read_bytes() for path in sorted(PAGE.glob("*")) if path.suffix in TYPES}

    def posted(
        self, function: Callable[[dict[str, Any]], Coroutine[Any, Any, Answer]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint of a function that takes a parsed body and returns an answer."""

        async def endpoint(request: Request) -> Response:
            async with self.bodies.read(request) as body:
                self.service.enter()
                try:
                    answer = await unless_gone(request, function(parse_object(body)))
                finally:
                    self.service.leave()
            return self.respond(answer)

        return endpoint

    def placed(self, function: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint of a function that takes a request without a body; the state needs no place."""

        async def endpoint(request: Request) -> Response:
            if function == self.health:
                return await function(request)
            self.service.enter()
            try:
                return await function(request)
            finally:
                self.service.leave()

        return endpoint

    def respond(self, answer: Answer) -> Response:
        """Return an answer with the name and the fingerprint of the model."""
        content = to_json({**self.service.facts, **answer})
        return Response(content, media_type="application/json", headers={"Cache-Control": "no-store"})

    async def health(self, request: Request) -> Response:
        """Return what is served."""
        service = self.service
        kind = None if service.index is None else service.index.kind
        return self.respond({"status": "ok", "rows": service.rows, "kind": kind, "dims": service.engine.dims})

    async def page(self, request: Request) -> Response:
        """Return the page."""
        return self._file("index.html")

    async def static(self, request: Request) -> Response:
        """Return a file that belongs to the page."""
        return self._file(request.path_params["name"])

    def _file(self, name: str) -> Response:
        """Return one of the files that were read at the start: no path of a client is opened."""
        if name not in self.files:
            raise Refusal(404, f"there is no file {quoted(name)} here")
        return Response(self.files[name], media_type=TYPES[Path(name).suffix], headers={"Cache-Control": "no-cache"})

    async def about(self, request: Request) -> Response:
        """Return facts about the index."""
        index = self.service.index
        assert index is not None
        about = {"name": self.service.name, "kind": index.kind, "rows": len(index), "dims": index.dims}
        return self.respond(
            {
                **about,
                "examples": index.about["examples"],
                "fields": index.about["fields"],
                "max_k": MAX_HITS,
                "image_queries": self.service.engine.images,
            }
        )

    def _row(self, request: Request) -> int:
        """Return the row in the path of a request.

        Raises:
            Refusal: If the index does not have it.
        """
        text, rows = request.path_params["row"], self.service.rows
        assert rows is not None
        if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) < rows):
            raise Refusal(404, f"there is no row {quoted(text, 30)}: the index has the rows 0 to {rows - 1:,}")
        return int(text)

    async def sample(self, request: Request) -> Response:
        """Return what the index knows about a row."""
        row = self._row(request)
        return self.respond({"row": row, **await self.service.sample(row)})

    async def image(self, request: Request) -> Response:
        """Return the file of a picture."""
        data, kind = await self.service.image(self._row(request))
        return _cached(request, data, kind)

    async def thumbnail(self, request: Request) -> Response:
        """Return a small JPEG of a picture."""
        return _cached(request, await self.service.thumbnail(self._row(request)), "image/jpeg")

    async def search(self, body: dict[str, Any]) -> Answer:
        """Search the index."""
        started = time.monotonic()
        rows = self.service.rows
        assert rows is not None
        known = ("texts", "images", "rows", "minus", "k", "min_score", "where", "distinct")
        fields = Fields(body, known)
        texts, minus = (fields.texts(name, MAX_QUERIES) for name in ("texts", "minus"))
        uris = fields.texts("images", MAX_QUERIES)
        search = Search(
            texts=len(texts),
            rows=fields.rows("rows", rows, MAX_ROWS),
            k=fields.whole("k", 1, MAX_HITS, 20),
            min_score=fields.real("min_score", -2, 2),
            where=fields.string("where"),
            distinct=fields.real("distinct", 0, 1),
        )
        if not (texts or uris or search.rows):
            raise Refusal(400, "send what to search for: texts, images or rows")
        pictures = await self.service.pictures(uris)
        found = await self.service.answer({"queries": texts + minus, "pictures": pictures}, search)
        hits = await self.service.describe(*found)
        return {"hits": hits, "seconds": round(time.monotonic() - started, 6), "rows": rows}

    async def embeddings(self, body: dict[str, Any]) -> Answer:
        """Embed texts and pictures, in the form of OpenAI."""
        service = self.service
        fields = Fields(body, ("input", "model", "encoding_format", "dimensions", "user"))
        inputs = fields.texts("input", MAX_TEXTS, one=True)
        if not inputs:
            raise Refusal(400, "input is missing: send a string or a list of strings")
        name = fields.string("model")
        if name not in (None, service.engine.name, service.engine.fingerprint):
            raise Refusal(404, f"model {quoted(name or '')} is not served here: it is {quoted(service.engine.name)}")
        form = fields.string("encoding_format", ("float", "base64")) or "float"
        dims = fields.whole("dimensions", 1, service.engine.dims, service.engine.dims)
        fields.string("user")
        is_picture = np.array([service.engine.images and one.startswith(PICTURE) for one in inputs])
        texts = [one for one, picture in zip(inputs, is_picture) if not picture]
        uris = [one for one, picture in zip(inputs, is_picture) if picture]
        if len(uris) > MAX_PICTURES:
            raise Refusal(400, f"input has {len(uris)} pictures: send at most {MAX_PICTURES} at once")
        found = await service.answer({"texts": texts, "pictures": await service.pictures(uris)})
        vectors = np.empty((len(inputs), service.engine.dims), np.float32)
        for kind, places in (("texts", ~is_picture), ("pictures", is_picture)):
            if kind in found:
                vectors[places] = found[kind]
        if dims < service.engine.dims:
            vectors = unit_rows(vectors[:, :dims])
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(row) if form == "base64" else row.tolist()}
            for i, row in enumerate(vectors)
        ]
        tokens = await service.run(service.engine.count_tokens, texts) if texts else 0
        return {"object": "list", "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}

    async def classify(self, body: dict[str, Any]) -> Answer:
        """Score labels for pictures or texts, the best first."""
        service = self.service
        fields = Fields(body, ("images", "texts", "labels", "templates"))
        uris, texts = fields.texts("images", MAX_PICTURES), fields.texts("texts", MAX_TEXTS)
        labels, templates = fields.texts("labels", MAX_TEXTS), fields.texts("templates", MAX_QUERIES)
        if bool(uris) == bool(texts):
            raise Refusal(400, "send either images or texts")
        if len(labels) * max(1, len(templates)) > MAX_TEXTS:
            raise Refusal(400, f"labels times templates are more than {MAX_TEXTS:,}: send fewer at once")
        if wrong := [one for one in templates if "{c}" not in one]:
            raise Refusal(400, f"template {quoted(wrong[0])} does not have {{c}}, which stands for the label")
        if not labels:
            if not (texts and service.engine.labels):
                raise Refusal(400, "send labels: only a text model with one classification head has labels of its own")
            scored = (await service.answer({"labeled": texts}))["labeled"]
            return {"results": [_best_first(one) for one in scored]}
        if uris:
            found = (await service.answer({"pictures": await service.pictures(uris)}))["pictures"]
        else:
            found = (await service.answer({"texts": texts}))["texts"]
        classifier = await service.classifier(labels, templates or [TEMPLATE if uris else "{c}"])
        scores = found @ classifier.T
        scores = service.engine.probabilities(scores) if uris else scores
        return {"results": [_best_first(list(zip(labels, row, strict=True))) for row in scores.tolist()]}


def _best_first(scores: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in sorted(scores, key=lambda one: -one[1])]


def _encoded(vector: np.ndarray) -> str:
    """Return a vector as base64 of little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _cached(request: Request, data: bytes, kind: str) -> Response:
    """Return a picture, or that the one that the browser has is the same."""
    tag = f'"{hashlib.blake2b(data, digest_size=16).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": KEPT}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)
