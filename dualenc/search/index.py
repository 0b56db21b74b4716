"""The index: queries of words and pictures, the rows nearest to them, and what is known of a row."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dualenc.data.shards.remote import Cache
from dualenc.data.shards.select import Expression
from dualenc.data.shards.shard import Shard
from dualenc.search.ann import AnnIndex
from dualenc.search.exact import nearest_rows
from dualenc.search.folder import SEGMENTS, read_about
from dualenc.search.segments import Rows, Segment
from dualenc.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

    from dualenc.inference.embedder import Embedder
    from dualenc.inference.text_model import TextPredictor
    from dualenc.inference.text_tower import TextTower

MEDIA_TYPES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"RIFF": "image/webp",
}  # by first bytes
_MASKS = 16  # conditions whose rows are kept
_FIRST = 4  # times k, the rows to look at first where some of them may be left out


class Hit(NamedTuple):
    """A row that a query found.

    Attributes:
        row: number of the row in the index.
        score: cosine of row and query.
        key: key of the sample in its shard, path of the picture, or name of the line.
        source: shard or file that the row is from.
        caption: first caption, or the passage; "" if there is none.
    """

    row: int
    score: float
    key: str
    source: str
    caption: str


@dataclass(frozen=True)
class Hits:
    """The rows that a query found, the best first; iterating yields each as a `Hit`.

    Attributes:
        rows: (n,) int64.
        scores: (n,) fp32 cosines.
        keys, sources, captions: of each row, see `Hit`.
    """

    rows: np.ndarray
    scores: np.ndarray
    keys: list[str]
    sources: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Hit]:
        for one in zip(self.rows.tolist(), self.scores.tolist(), self.keys, self.sources, self.captions, strict=True):
            yield Hit(*one)

    def select_list(self) -> list[str]:
        """Return the lines of a file for `data.select`, the keys of the samples, each once."""
        return list(dict.fromkeys(self.keys))


class Index:
    """An index of pictures or texts that `dualenc build-search` wrote; it is opened with `open`.

    Opening and searching need neither torch nor the model, which is loaded when words or pictures are embedded.

    Example:
        >>> import tempfile
        >>> import dualenc
        >>> from dualenc.search.build import build_search
        >>> tokenizer = dualenc.Tokenizer.train(["a cat", "a dog"], vocab_size=40, context_length=8)
        >>> config = dualenc.TextConfig(tokenizer.vocab_size, width=8, layers=1, heads=2, context_length=8, pool="mean")
        >>> model = dualenc.TextPredictor(dualenc.models.TextModel(config, {}).eval(), tokenizer)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with open(f"{folder}/texts.txt", "w") as file:
        ...         _ = file.write("a cat\\na dog\\n")
        ...     _ = build_search(model, [f"{folder}/texts.txt"], f"{folder}/index")
        ...     index = dualenc.Index.open(f"{folder}/index", model)
        ...     hits = index.search(texts=["a dog"], k=1)
        >>> hits.captions, round(float(hits.scores[0]), 2)
        (['a dog'], 1.0)
    """

    def __init__(self, out: Path, about: dict[str, Any], segments: Sequence[Segment]) -> None:
        self.out, self.about, self.segments = out, about, list(segments)
        self.vectors = Rows([segment.embeddings for segment in self.segments], about["dims"])
        self._model: Embedder | TextTower | None = None
        self._device: Any = None
        self._ann: AnnIndex | None = None
        self._masks: OrderedDict[str, np.ndarray] = OrderedDict()
        self._shards: dict[int, Shard] = {}

    @classmethod
    def open(
        cls,
        out: str | os.PathLike[str],
        model: "str | os.PathLike[str] | Embedder | TextPredictor | None" = None,
        device: Any = None,
    ) -> "Index":
        """Open an index.

        Args:
            out: folder of the index.
            model: a model, or its spec, in place of the recorded one, such as for a folder that was moved.
            device: device of a model that is loaded; None for CUDA if available, else the CPU.

        Raises:
            DataError: If there is no index, or a file of it is missing, damaged, or of a newer format.
            ModelError: If the model is another one than the index was made with.
        """
        out = Path(out)
        about = read_about(out)
        if about is None:
            raise DataError(f"{out} is not an index: make one with dualenc build-search MODEL SOURCE {out}")
        index = cls(out, about, [Segment(out / SEGMENTS / one["file"]) for one in about["segments"]])
        if any(segment.embeddings.shape[1:] != (index.dims,) for segment in index.segments):
            raise DataError(f"{out} has segments of other dimensions than {index.dims}: build it again")
        index._device = device
        if model is not None:
            index._model = index._checked_model(model)
        return index

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        return f"Index({self.out}: {len(self):,} {self.kind} of {self.dims} dimensions by {self.about['model']})"

    @property
    def kind(self) -> str:
        """Either "images" or "texts"."""
        return self.about["kind"]

    @property
    def dims(self) -> int:
        """The number of dimensions of the vectors, E."""
        return self.about["dims"]

    @property
    def query_prompt(self) -> str | None:
        """The text that is put before each query of words; None in an index of pictures."""
        return self.about["prompts"]["query"] if self.kind == "texts" else None

    @property
    def model(self) -> "Embedder | TextTower":
        """The model, which is loaded at the first use.

        Raises:
            ModelError: If it cannot be loaded, or is another one than the index was made with.
        """
        if self._model is None:
            self._model = self._checked_model(self.about["model"])
        return self._model

    # Queries

    def encode(self, texts: Sequence[str] = (), images: Sequence[Any] = ()) -> np.ndarray:
        """Embed words, then pictures, as (n, E) fp32 of unit length.

        Args:
            texts: words; the prompt of queries is put before them.
            images: pictures in any form that `Embedder.embed_images` takes.

        Raises:
            ModelError: If the model cannot be loaded, or cannot embed pictures.
            ImageError: If a picture cannot be read.
        """
        model, found = self.model, [np.zeros((0, self.dims), np.float32)]
        texts, images = [texts] if isinstance(texts, str) else list(texts), list(images)
        from dualenc.inference.text_model import TextPredictor
        from dualenc.inference.text_tower import TextTower

        embedder = model.source if isinstance(model, TextTower) else model
        if texts:
            words = model.embed(texts, self.query_prompt) if isinstance(model, TextTower) else model.embed_texts(texts)
            found.append(words.numpy())
        if images:
            if isinstance(embedder, TextPredictor):
                raise ModelError(f"{model.name} embeds texts only: search with words")
            found.append(embedder.embed_images(images).numpy())
        return np.concatenate(found)

    def combine(
        self,
        vectors: np.ndarray,
        weights: Sequence[float] | None = None,
        rows: Sequence[int] = (),
        minus: np.ndarray | None = None,
    ) -> np.ndarray:
        """Combine queries into one of unit length, (E,) fp32: the mean of all, without the mean of what to avoid.

        Args:
            vectors: (n, E) of unit length.
            weights: weight of each vector, then of each row; equal by default.
            rows: rows of the index that are queries too.
            minus: (m, E) of unit length, whose mean is subtracted.

        Raises:
            DataError: If there is no query, a weight is missing or negative, or the sum is zero.
        """
        own = self.vectors.take(self._checked(rows)).astype(np.float64)
        own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12)
        parts = np.concatenate([np.asarray(vectors, np.float64).reshape(-1, self.dims), own])
        if not len(parts):
            raise DataError("a search needs words, a picture or a row")
        factors = np.ones(len(parts)) if weights is None else np.asarray(weights, np.float64)
        if len(factors) != len(parts) or not np.isfinite(factors).all() or factors.min() < 0 or not factors.any():
            raise DataError(f"weights must be {len(parts)} numbers of 0 or more, one for each query, not all 0")
        query = factors @ parts / factors.sum()
        if minus is not None and len(minus):
            query = _unit(query) - np.asarray(minus, np.float64).mean(0)
        return _unit(query).astype(np.float32)

    def search(
        self,
        texts: Sequence[str] = (),
        images: Sequence[Any] = (),
        rows: Sequence[int] = (),
        minus: Sequence[str] = (),
        *,
        vectors: np.ndarray | None = None,
        weights: Sequence[float] | None = None,
        k: int = 20,
        min_score: float | None = None,
        where: str | None = None,
        distinct: float | None = None,
    ) -> Hits:
        """Find the rows nearest to one query, which all arguments together make; see `combine`.

        Args:
            texts: words.
            images: pictures in any form that `Embedder.embed_images` takes.
            rows: rows of the index, to find more like them; they are not among the hits.
            minus: words to avoid.
            vectors: (n, E) queries that are embedded already; then `rows` are only left out of the hits.
            weights: weight of each text, picture, vector and row; equal by default.
            k: most hits.
            min_score: least cosine of a hit.
            where: condition on the fields of a row, see `dualenc.data.shards.select.Expression`.
            distinct: cosine from which a row is a near duplicate of a better hit, and is left out.

        Raises:
            DataError: If there is no query, a row does not exist, or the condition cannot be understood.
            ModelError: If the model cannot be loaded, or is another one than the index was made with.
        """
        if k < 1:
            raise DataError(f"k is {k}: it must be 1 or more")
        texts, minus = ([one] if isinstance(one, str) else list(one) for one in (texts, minus))
        queries = [np.asarray([] if vectors is None else vectors, np.float32).reshape(-1, self.dims)]
        embedded = self.encode([*texts, *minus], images) if texts or minus or len(images) else queries[0][:0]
        avoided = embedded[len(texts) : len(texts) + len(minus)]
        queries = [embedded[: len(texts)], embedded[len(texts) + len(minus) :], *queries]
        query = self.combine(np.concatenate(queries), weights, () if vectors is not None else rows, avoided)
        allowed = None if where is None else self.rows_where(where).copy()
        left_out = self._checked(rows)
        if allowed is not None:
            allowed[left_out] = False
        found, scores = self._nearest(query, k, allowed, left_out, distinct)
        if min_score is not None:
            found, scores = found[scores >= min_score], scores[scores >= min_score]
        return self.hits(found, scores)

    def search_many(self, vectors: np.ndarray, k: int = 20) -> tuple[np.ndarray, np.ndarray]:
        """Find the rows nearest to each of Q queries.

        Args:
            vectors: (Q, E) of unit length.
            k: number of rows.

        Returns:
            Scores (Q, k) fp32 and rows (Q, k) int64, the best first, with -inf and -1 where there are fewer.
        """
        vectors = np.asarray(vectors, np.float32).reshape(-1, self.dims)
        scores, rows = np.full((len(vectors), k), -np.inf, np.float32), np.full((len(vectors), k), -1, np.int64)
        for i, (found, of_rows) in enumerate(self._candidates(vectors, k, None)):
            rows[i, : len(found)], scores[i, : len(found)] = found, of_rows
        return scores, rows

    def hits(self, rows: np.ndarray, scores: np.ndarray) -> Hits:
        """Return rows (n,) with their scores (n,) as hits."""
        records = [self.record(row) for row in np.asarray(rows).tolist()]
        return Hits(
            np.asarray(rows, np.int64),
            np.asarray(scores, np.float32),
            [record["key"] for record in records],
            [record["source"] for record in records],
            [next(iter(record["captions"]), "") for record in records],
        )

    def rows_where(self, condition: str) -> np.ndarray:
        """Return the mask (N,) bool of the rows that meet a condition; see `search`.

        The fields of all rows are read at the first use of a condition, which is then kept.

        Raises:
            DataError: If the condition cannot be understood, or no row meets it.
        """
        if (known := self._masks.get(condition)) is not None:
            self._masks.move_to_end(condition)
            return known
        expression = Expression(condition, "where")
        failures = [
            expression.failure_of(segment.record(i)["fields"]) for segment in self.segments for i in range(len(segment))
        ]
        mask = np.array([failure is None for failure in failures], bool)
        if not mask.any():
            raise DataError(f"where {condition!r} is met by 0 of {len(self):,} rows: {self._why_none(failures)}")
        self._masks[condition] = mask
        while len(self._masks) > _MASKS:
            self._masks.popitem(last=False)
        return mask

    def _why_none(self, failures: list[str | None]) -> str:
        reasons = ", ".join(str(one) for one in list(dict.fromkeys(failures))[:3])
        names = ", ".join(one["name"] for one in self.about["fields"][:20])
        return f"{reasons}; the fields are {names or 'none'}"

    def _nearest(
        self, query: np.ndarray, k: int, allowed: np.ndarray | None, left_out: np.ndarray, distinct: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the first k rows and their scores, without those left out and without near duplicates."""
        wanted = k + len(left_out) if distinct is None else _FIRST * k + len(left_out)
        while True:
            rows, scores = self._candidates(query[None], wanted, allowed)[0]
            whole = len(rows) < wanted
            kept = ~np.isin(rows, left_out)
            rows, scores = rows[kept], scores[kept]
            if distinct is None:
                return rows[:k], scores[:k]
            first = _distinct(self.vectors.take(rows).astype(np.float32), distinct, k)
            if len(first) == k or whole:
                return rows[first], scores[first]
            wanted *= _FIRST

    def _candidates(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the first k rows of each query and their scores, by exact search where only some rows are allowed."""
        if not len(self):
            return [(np.zeros(0, np.int64), np.zeros(0))] * len(queries)
        if allowed is None and (facts := self.about["ann"]):
            if self._ann is None:
                self._ann = AnnIndex.read(self.out / facts["file"], facts["size"])
            return self._ann.search(self.vectors, queries, k)
        return nearest_rows(self.vectors, queries, k, allowed)

    # Rows

    def record(self, row: int) -> dict[str, Any]:
        """Return what is known of a row: `key`, `source` (its shard or file), `captions` and `fields`.

        Raises:
            IndexError: If there is no such row.
        """
        number, i = self.vectors.find(row)
        found = self.segments[number].record(i)
        source = self.about["segments"][number]["source"] or found["key"]
        return {"key": found["key"], "source": source, "captions": found["captions"], "fields": found["fields"]}

    def image_bytes(self, row: int) -> tuple[bytes, str]:
        """Read the file of a row's picture, and return it with its media type.

        Raises:
            IndexError: If there is no such row.
            DataError: If the row is not of a picture, or the picture cannot be read or is not the one of the index.
        """
        number, i = self.vectors.find(row)
        record = self.segments[number].record(i)
        if place := record.get("place"):
            data = self._shard(number).read(*place[1:])
        elif "state" in record:
            data = _read_unchanged(record["key"], record["state"])
        else:
            raise DataError(f"row {row} is a text, not a picture")
        kind = next((kind for start, kind in MEDIA_TYPES.items() if data.startswith(start)), None)
        if kind is None:
            raise DataError(f"the picture of row {row} is not a JPEG, PNG or WebP")
        return data, kind

    def image(self, row: int) -> "Image":
        """Return the picture of a row as a viewer shows it, as an RGB image of Pillow; see `image_bytes`."""
        from PIL import Image

        from dualenc.data.images import open_image

        data, _ = self.image_bytes(row)
        return Image.fromarray(open_image(data, f"the picture of row {row}").permute(1, 2, 0).numpy())

    def _shard(self, number: int) -> Shard:
        """Return the shard of a segment, for reading of its bytes."""
        if number not in self._shards:
            facts = dict(self.about["segments"][number]["shard"])
            self._shards[number] = Shard(facts.pop("url"), facts, {}, Cache())
        return self._shards[number]

    def _checked(self, rows: Sequence[int]) -> np.ndarray:
        """Return row numbers as an array (n,) int64, after a check that they exist."""
        for row in rows:
            if not 0 <= row < len(self):
                raise DataError(f"row {row} does not exist: the index has {len(self):,} rows, from 0")
        return np.array(list(rows), np.int64)

    def _checked_model(self, model: Any) -> "Embedder | TextTower":
        """Return a model, or load it by its spec, after a check that the index was made with it."""
        from dualenc.inference.embedder import Embedder, load
        from dualenc.inference.text_model import TextPredictor
        from dualenc.inference.text_tower import TextTower, load_text_tower

        found: Embedder | TextTower
        if isinstance(model, TextPredictor) and self.kind == "images":
            raise ModelError(f"{self.out} is an index of pictures, and {model.name} is a text model")
        if isinstance(model, Embedder | TextPredictor):
            found = model if self.kind == "images" and isinstance(model, Embedder) else TextTower(model)
        else:
            try:
                found = (load if self.kind == "images" else load_text_tower)(
                    model, self._device, self.about["precision"]
                )
            except ModelError as error:
                raise ModelError(f"the model of {self.out}: {error}; name it with --model if it was moved") from None
        if found.fingerprint != self.about["fingerprint"]:
            raise ModelError(
                f"{self.out} was made with {self.about['model']}, and {found.name} differs from it in weights, "
                "architecture or tokenizer: name that model, or build an index with the other one in a new folder"
            )
        return found


def _unit(vector: np.ndarray) -> np.ndarray:
    """Return a vector at unit length.

    Raises:
        DataError: If it is zero or not finite.
    """
    length = float(np.linalg.norm(vector))
    if not length > 1e-6:
        raise DataError("the queries cancel each other, so that nothing is left to search for: change one of them")
    return vector / length


def _distinct(vectors: np.ndarray, least: float, k: int) -> list[int]:
    """Return the numbers of the first k vectors (n, E) whose cosine with every kept one before is below `least`."""
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    kept: list[int] = []
    for i, one in enumerate(vectors):
        if not kept or float((vectors[kept] @ one).max()) < least:
            kept.append(i)
            if len(kept) == k:
                break
    return kept


def _read_unchanged(path: str, state: Sequence[int]) -> bytes:
    """Read a picture file that the index was made of.

    Raises:
        DataError: If it cannot be read, or has changed.
    """
    way_out = "run the same dualenc build-search again"
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != tuple(state):
                raise DataError(f"{path} has changed since it was indexed: {way_out}")
            return file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {way_out}") from None
