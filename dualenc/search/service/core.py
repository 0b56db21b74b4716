"""The service behind HTTP: pictures are decoded, batches are embedded and searched, and answers are put together."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from dualenc.data.image_pixels import ImageError, decode_pixels
from dualenc.search.service.batching import Batcher, Job
from dualenc.search.service.cache import BytesCache
from dualenc.search.service.engine import Engine, unit_rows
from dualenc.search.service.fields import picture_bytes
from dualenc.search.service.refusals import Refusal, busy
from dualenc.utils.errors import DataError
from dualenc.utils.text import one_line, print_message

if TYPE_CHECKING:
    from dualenc.search.index import Index

MAX_HITS = 1000  # hits of a search
THUMBNAIL = 320  # pixels of the longer side
DECODERS = 2  # pictures decoded at once: one of 134 million pixels takes 2 GB meanwhile
MIB = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The limits of the service.

    Attributes:
        max_batch: texts and pictures that are embedded together.
        wait_ms: milliseconds for which a request waits for others to be embedded with it.
        max_body: bytes of a request's body.
        bodies: bytes of all bodies at once.
        queue: requests that are answered at once or wait.
        patience: seconds for which the service waits for a request's header, for its body, and for a client to take
            its answer.
        thumbnails: bytes of thumbnails that are kept.
    """

    max_batch: int = 32
    wait_ms: float = 5
    max_body: int = 16 * MIB
    bodies: int = 256 * MIB
    queue: int = 256
    patience: float = 30
    thumbnails: int = 64 * MIB


@dataclass(frozen=True)
class Search:
    """A search for rows of an index.

    Attributes:
        texts: number of texts among the queries of the job; the others are texts to move away from.
        rows: rows whose neighbors are searched for, and which are left out of the hits.
        k: largest number of hits.
        min_score: lowest score of a hit; None for all.
        where: condition of the hits; None for all.
        distinct: cosine above which a hit is left out as a near duplicate of a better one; None to keep all.
    """

    texts: int
    rows: list[int]
    k: int
    min_score: float | None
    where: str | None
    distinct: float | None


class Service:
    """A model, perhaps with an index, that answers many callers at once.

    Args:
        engine: the model.
        index: the index that the model made; None for a model alone.
        name: name of the index in answers.
        limits: limits of the service.
    """

    def __init__(self, engine: Engine, index: "Index | None" = None, name: str = "", limits: Limits = Limits()) -> None:
        self.engine, self.index, self.name, self.limits = engine, index, name, limits
        self.rows = None if index is None else len(index)
        self.thumbnails = BytesCache(limits.thumbnails)
        self._places = limits.queue
        self._pool = ThreadPoolExecutor(DECODERS, "dualenc-pictures")
        self.batcher = Batcher(self.compute, limits.max_batch, limits.wait_ms / 1000, limits.queue)

    def close(self) -> None:
        """Finish what was taken, and end the threads."""
        self._pool.shutdown()
        self.batcher.close()

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the service."""
        self.close()

    @property
    def facts(self) -> dict[str, Any]:
        """The name and the fingerprint of the model, which every answer has."""
        return {"model": self.engine.name, "fingerprint": self.engine.fingerprint}

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in a thread that decodes pictures."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def enter(self) -> None:
        """Take one of the places for requests, which `leave` gives back.

        Raises:
            Refusal: If all are taken.
        """
        if self._places <= 0:
            raise busy(f"{self.limits.queue} requests are being answered or wait: try again")
        self._places -= 1

    def leave(self) -> None:
        """Give back a place."""
        self._places += 1

    async def pictures(self, uris: Sequence[str]) -> list[Any]:
        """Decode pictures in data URIs to what the model takes.

        Raises:
            Refusal: If one cannot be decoded, or the model does not have an image tower.
        """
        if uris and not self.engine.images:
            raise Refusal(400, f"{self.engine.name} is a text model: send texts")
        return [await self.run(self._prepare, number, uri) for number, uri in enumerate(uris)]

    def _prepare(self, number: int, uri: str) -> Any:
        try:
            return self.engine.prepare(picture_bytes(uri))
        except ImageError as error:
            raise Refusal(400, f"picture {number} (from 0) {error}") from None

    async def answer(self, items: dict[str, list[Any]], search: Search | None = None) -> Any:
        """Append a job to the queue, and return its result.

        Raises:
            Refusal: If the queue is full, or the job is refused.
        """
        return await asyncio.wrap_future(self.batcher.submit(Job(items, search)))

    def compute(self, jobs: Sequence[Job]) -> list[Any]:
        """Embed what jobs ask for, all of one kind in one pass, and search for all of them in one product.

        Kinds of items are "texts", "queries" (texts with the prompt of queries), "pictures" of `Engine.prepare`, and
        "labeled", texts for the classification head.

        Returns:
            For each job its embeddings by kind, or rows and scores of its search, or the exception that it failed with.
        """
        found: list[dict[str, Any]] = [{} for _ in jobs]
        embed: dict[str, Callable[[list[Any]], Any]] = {
            "texts": self.engine.embed_texts,
            "queries": lambda texts: self.engine.embed_texts(texts, self.query_prompt),
            "pictures": self.engine.embed_pictures,
            "labeled": self.engine.label,
        }
        for kind, function in embed.items():
            asking = [i for i, job in enumerate(jobs) if job.items.get(kind)]
            if not asking:
                continue
            results = function([item for i in asking for item in jobs[i].items[kind]])
            start = 0
            for i in asking:
                found[i][kind] = results[start : start + len(jobs[i].items[kind])]
                start += len(jobs[i].items[kind])
        answers: list[Any] = list(found)
        if searching := [i for i, job in enumerate(jobs) if job.search is not None]:
            hits = self._search([(jobs[i].search, found[i]) for i in searching])
            for i, hit in zip(searching, hits, strict=True):
                answers[i] = hit
        return answers

    @property
    def query_prompt(self) -> str | None:
        """The text to put before queries; None for the default of the model."""
        return None if self.index is None else self.index.query_prompt

    def _search(self, asked: Sequence[tuple[Search, dict[str, Any]]]) -> list[Any]:
        """Return rows and scores of each search; those without a condition share one product."""
        assert self.index is not None
        hits: list[Any] = [self._vector(search, found) for search, found in asked]
        alone = [search.where is not None or search.distinct is not None for search, _ in asked]
        plain = [i for i, vector in enumerate(hits) if isinstance(vector, np.ndarray) and not alone[i]]
        if plain:
            most = min(len(self.index), max(asked[i][0].k + len(asked[i][0].rows) for i in plain))
            scores, rows = self.index.search_many(np.stack([hits[i] for i in plain]), most)
            for i, one_rows, one_scores in zip(plain, rows, scores, strict=True):
                hits[i] = _kept(asked[i][0], one_rows, one_scores)
        for i, (search, _) in enumerate(asked):
            if alone[i] and isinstance(hits[i], np.ndarray):
                hits[i] = self._filtered(search, hits[i])
        return hits

    def _vector(self, search: Search, found: dict[str, Any]) -> np.ndarray | Refusal:
        """Return the one vector (E,) of all queries of a search, or the refusal of queries that cancel each other."""
        assert self.index is not None
        queries = found.get("queries", np.empty((0, self.engine.dims), np.float32))
        pictures = found.get("pictures", np.empty((0, self.engine.dims), np.float32))
        towards = np.concatenate([queries[: search.texts], pictures])
        try:
            return self.index.combine(towards, rows=search.rows, minus=queries[search.texts :])
        except DataError as error:
            return Refusal(400, error)

    def _filtered(self, search: Search, vector: np.ndarray) -> Any:
        """Search by itself, under a condition or without near duplicates, or refuse the condition."""
        assert self.index is not None
        try:
            hits = self.index.search(
                vectors=vector[None],
                rows=search.rows,
                k=search.k,
                min_score=search.min_score,
                where=search.where,
                distinct=search.distinct,
            )
        except DataError as error:
            return Refusal(400, error, kind="where")
        return _kept(search, hits.rows, hits.scores)

    async def describe(self, rows: Sequence[int], scores: Sequence[float]) -> list[dict[str, Any]]:
        """Return what answers say of hits."""
        return await asyncio.to_thread(self._describe, rows, scores)

    def _describe(self, rows: Sequence[int], scores: Sequence[float]) -> list[dict[str, Any]]:
        assert self.index is not None
        found = []
        for row, score in zip(rows, scores, strict=True):
            record = without_folders(self.index.record(row), self.index.about["source"])
            about = {"row": row, "score": score, "key": record["key"], "source": record["source"]}
            about |= {"caption": (record["captions"] or [""])[0]}
            found.append(about | {side: record["fields"].get(side) for side in ("width", "height")})
        return found

    async def sample(self, row: int) -> dict[str, Any]:
        """Return key, source, captions and fields of a row."""
        assert self.index is not None
        record = await asyncio.to_thread(self.index.record, row)
        return without_folders(record, self.index.about["source"])

    async def image(self, row: int) -> tuple[bytes, str]:
        """Return the file of a picture of the index, and its media type; see `_image`."""
        return await asyncio.to_thread(self._image, row)

    async def thumbnail(self, row: int) -> bytes:
        """Return a JPEG of a picture of the index, at most 320 pixels wide and high.

        Raises:
            Refusal: If the picture cannot be read.
        """
        if (kept := self.thumbnails.get(row)) is None:
            kept = await self.run(self._thumbnail, row)
            self.thumbnails.put(row, kept)
        return kept

    def _thumbnail(self, row: int) -> bytes:
        data, _ = self._image(row)
        try:
            image = Image.fromarray(decode_pixels(data))
        except ImageError as error:
            raise Refusal(422, f"the picture of row {row} {error}") from None
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        out = BytesIO()
        image.save(out, "JPEG", quality=90, subsampling=0)  # Drawings show what less leaves out.
        return out.getvalue()

    def _image(self, row: int) -> tuple[bytes, str]:
        """Return the file of a picture of the index, and its media type.

        Raises:
            Refusal: If its shard or file has changed or is gone.
        """
        assert self.index is not None
        try:
            return self.index.image_bytes(row)
        except (DataError, OSError, ValueError) as error:
            print_message(f"row {row}: {one_line(error)}")  # for the owner; the message names paths of the server
            what = "cannot be read, or changed since the index was built"
            raise Refusal(410, f"the picture of row {row} {what}: the log of the server says more") from None

    async def classifier(self, labels: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """Return for each of C labels the mean of its texts' embeddings at unit length (C, E)."""
        texts = [template.replace("{c}", label) for label in labels for template in templates]
        vectors = (await self.answer({"texts": texts}))["texts"]
        return unit_rows(vectors.reshape(len(labels), len(templates), -1).mean(1))


def _kept(search: Search, rows: np.ndarray, scores: np.ndarray) -> tuple[list[int], list[float]]:
    """Return rows and scores of the hits that a search asks for, without its own rows."""
    keep = ~np.isin(rows, search.rows) & (rows >= 0)
    if search.min_score is not None:
        keep &= scores >= search.min_score
    return rows[keep][: search.k].tolist(), scores[keep][: search.k].tolist()


def without_folders(record: dict[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    """Return a record of the index without the folders of its shard or file, which are the server's own affair.

    Args:
        record: see `Index.record`.
        sources: what the index was built from. The key of a picture file is its path within a folder of these.
    """
    name, key = record["source"].rstrip("/").rsplit("/", 1)[-1], record["key"]
    if key == record["source"]:
        within = [key.removeprefix(f"{folder}/") for folder in sources if key.startswith(f"{folder}/")]
        key = min(within, key=len, default=name)
    return {**record, "key": key, "source": name}
