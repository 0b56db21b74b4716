"""What an index is built from: pictures or captions of shards, picture files, lines of text files; in parts."""

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dualenc.data.pairs import caption_members, captions_of
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.sample import Sample
from dualenc.data.shards.shard import Shard, content_hash
from dualenc.data.text.dataset import Use
from dualenc.data.text.files import TextFile, TextIndex
from dualenc.inference.embed_files import EmbeddedBatch, Towers, Track, embed_parts
from dualenc.inference.embed_text_files import read_lines
from dualenc.inference.image_files import PART, FileParts
from dualenc.search.segments import Contents, Segment
from dualenc.utils.decoding import text_problem
from dualenc.utils.errors import BadSample
from dualenc.utils.urls import is_remote, shown

LINES = 1 << 16  # lines of a text file in one segment
CHUNK = 4096  # texts that are embedded between two steps of the progress bar
LARGEST = 1 << 12  # bytes of a sample's .json up to which all of it is kept; of a larger one its scalar fields
PICTURES, TEXTS = "images", "texts"  # kinds of an index
EmbedTexts = Callable[[list[str]], np.ndarray]  # from n texts to (n, E)


class Part(NamedTuple):
    """A part of a source, which becomes one segment.

    Attributes:
        name: name for the file of the segment.
        digest: digest of its content.
        about: what the index keeps of it: `source`, the shard or file, for display; `shard`, facts by which the bytes
            of a shard's samples are read.
    """

    name: str
    digest: str
    about: dict[str, Any]


class EarlierRows:
    """The rows of the index before, to be found by their content.

    Args:
        segments: its segments.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments

    def find(self, content: int) -> tuple[np.ndarray, dict[str, Any]] | None:
        """Return embedding and record of the row with this hash of its content; None if there is none."""
        place = self._places.get(content)
        if place is None:
            return None
        segment, i = self.segments[place[0]], place[1]
        return segment.embeddings[i], segment.record(i)

    def content_of(self, path: str, state: tuple[int, int]) -> int | None:
        """Return the hash of a picture file that is in the state in which it was read; None if it is not."""
        before, content = self._files.get(path, (None, 0))
        return content if before == state else None

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        """Number of the segment, and number in it, by hash."""
        return {int(one): (n, i) for n, segment in enumerate(self.segments) for i, one in enumerate(segment.content)}

    @cached_property
    def _files(self) -> dict[str, tuple[tuple[int, int], int]]:
        """State and hash of picture files, by path."""
        found = {}
        for segment in self.segments:
            for i, content in enumerate(segment.content.tolist()):
                if "state" in (record := segment.record(i)):
                    found[record["key"]] = (record["state"][0], record["state"][1]), content
        return found


class SearchSource(ABC):
    """Pictures or texts to build an index from.

    Attributes:
        kind: kind of the index.
        parts: parts of the source, one for each segment.
    """

    kind: ClassVar[str]
    parts: list[Part]

    @abstractmethod
    def embed(self, numbers: Sequence[int], earlier: EarlierRows, track: Track) -> Iterator[Contents]:
        """Embed parts, and yield the contents of their segments one after the other.

        Args:
            numbers: numbers of the parts.
            earlier: rows of the index before, whose embeddings are kept where the content is the same.
            track: wraps the steps of the work, for a progress bar.
        """


class ShardPictures(SearchSource):
    """The pictures of shards.

    Args:
        index: the shards.
        towers: functions that embed.
        captions: source of the captions to show with a picture.
        options: `workers` and `batch_size`, see `dualenc.inference.embed_files.embed_parts`.
    """

    kind = PICTURES

    def __init__(self, index: ShardIndex, towers: Towers, captions: str, options: Mapping[str, Any]) -> None:
        caption_members(captions)  # raises if it is not understood
        self.index, self.towers, self.captions, self.options = index, towers, captions, options
        self.parts = [_shard_part(shard) for shard in index.parts]

    def embed(self, numbers: Sequence[int], earlier: EarlierRows, track: Track) -> Iterator[Contents]:
        """See `SearchSource.embed`."""
        for number, batches in embed_parts(self.index, numbers, self.towers, track=track, **self.options):
            embeddings, good, sizes, bad = _joined(batches)
            start = self.index.starts[number]
            records = [_record(self.index[start + i], self.captions, size) for i, size in zip(good, sizes, strict=True)]
            hashes = [one for batch in batches for one in batch.read.hashes]
            content = np.array([hashes[i] for i in good], np.uint64)
            keys = [(self.index.key(start + i), cause, detail) for i, cause, detail in bad]
            yield Contents(embeddings, records, content, keys)


class ShardCaptions(SearchSource):
    """The captions of shards, each of which is a row.

    Args:
        index: the shards.
        of_texts: function that embeds captions.
        captions: source of the captions.
    """

    kind = TEXTS

    def __init__(self, index: ShardIndex, of_texts: EmbedTexts, captions: str) -> None:
        caption_members(captions)  # raises if it is not understood
        self.index, self.of_texts, self.captions = index, of_texts, captions
        self.parts = [_shard_part(shard) for shard in index.parts]

    def embed(self, numbers: Sequence[int], earlier: EarlierRows, track: Track) -> Iterator[Contents]:
        """See `SearchSource.embed`."""
        for number in track(numbers, total=len(numbers)):
            records, texts, bad = [], [], []
            for row in range(*self.index.starts[number : number + 2]):
                sample = self.index[row]
                try:
                    found = captions_of(sample, self.captions)
                except BadSample as error:
                    bad.append((sample.key, error.cause, error.detail))
                    continue
                record = _record(sample, self.captions, None)
                texts += found
                records += [{**record, "captions": [text]} for text in found]
            yield _embedded_texts(texts, records, bad, self.of_texts, earlier)


class PictureFiles(SearchSource):
    """Picture files, in parts of `PART`.

    A file that has not changed keeps its embedding, however the parts have moved.

    Args:
        paths: paths of the files.
        towers: functions that embed.
        options: `workers` and `batch_size`, see `dualenc.inference.embed_files.embed_parts`.
    """

    kind = PICTURES

    def __init__(self, paths: Sequence[str], towers: Towers, options: Mapping[str, Any]) -> None:
        self.towers, self.options = towers, options
        paths = [os.path.abspath(path) for path in paths]
        self._states = {path: _state(path) for path in paths}
        self.pieces = [paths[start : start + PART] for start in range(0, len(paths), PART)]
        self.parts = [
            Part(f"images-{number:05d}", _digest([[path, *self._states[path]] for path in piece]), {"source": ""})
            for number, piece in enumerate(self.pieces)
        ]

    def embed(self, numbers: Sequence[int], earlier: EarlierRows, track: Track) -> Iterator[Contents]:
        """See `SearchSource.embed`."""
        for number in numbers:
            piece = self.pieces[number]
            hashes = {path: self._hash(path, earlier) for path in piece}
            rows: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}  # embedding and fields
            for path, content in hashes.items():
                if (found := earlier.find(content)) is not None:
                    rows[path] = found[0], found[1]["fields"]
            new, bad = [path for path in piece if path not in rows], []
            if new:
                (_, batches), *_ = embed_parts(FileParts(new), [0], self.towers, track=track, **self.options)
                embeddings, good, sizes, unusable = _joined(batches)
                for i, embedding, (height, width) in zip(good, embeddings, sizes, strict=True):
                    rows[new[i]] = embedding, {"width": width, "height": height}
                bad = [(new[i], cause, detail) for i, cause, detail in unusable]
            usable = [path for path in piece if path in rows]
            yield Contents(
                np.array([rows[path][0] for path in usable], np.float32).reshape(-1, self.towers.dims),
                [
                    {"key": path, "captions": [], "fields": rows[path][1], "state": list(self._states[path])}
                    for path in usable
                ],
                np.array([hashes[path] for path in usable], np.uint64),
                bad,
            )

    def _hash(self, path: str, earlier: EarlierRows) -> int:
        """Return the hash of a file's bytes, which are not read if the file is in the state it had before."""
        known = earlier.content_of(path, self._states[path])
        if known is not None:
            return known
        try:
            with open(path, "rb") as file:
                return content_hash(file.read())
        except OSError:  # It becomes a bad sample when it is read.
            return 0


class TextLines(SearchSource):
    """Lines of text files, in parts of `LINES`.

    In a table with the columns `_id` and `title`, as BEIR's corpora have them, the title comes before the text.

    Args:
        index: the lines.
        of_texts: function that embeds texts.
        column: column of the texts.
    """

    kind = TEXTS

    def __init__(self, index: TextIndex, of_texts: EmbedTexts, column: str) -> None:
        self.of_texts, self.column = of_texts, column
        self.pieces = [
            (file, range(first, min(first + LINES, len(file))))
            for file in index.parts
            for first in range(0, len(file), LINES)
        ]
        self.parts = [_lines_part(*piece) for piece in self.pieces]

    def embed(self, numbers: Sequence[int], earlier: EarlierRows, track: Track) -> Iterator[Contents]:
        """See `SearchSource.embed`."""
        chunks = [(number, first) for number in numbers for first in self.pieces[number][1][::CHUNK]]
        done: list[Contents] = []
        for number, first in track(chunks, total=len(chunks)):
            file, lines = self.pieces[number]
            stop = min(first + CHUNK, lines.stop)
            done.append(self._chunk(file, range(first, stop), earlier))
            if stop == lines.stop:
                yield Contents(
                    np.concatenate([one.embeddings for one in done]),
                    [record for one in done for record in one.records],
                    np.concatenate([one.content for one in done]),
                    [item for one in done for item in one.bad],
                )
                done = []

    def _chunk(self, file: TextFile, lines: range, earlier: EarlierRows) -> Contents:
        """Embed consecutive lines of a file."""
        unreadable: list[Any] = []
        numbers, texts = read_lines(file, Use("", self.column), lines, unreadable)
        bad = [(one.key, one.cause, one.detail) for one in unreadable]
        index, records, passages = TextIndex([file]), [], []
        table = file.kind in (".csv", ".tsv")
        titled = self.column == "text" and {"_id", "title"} <= set(file.columns)
        for number, text in zip(numbers, texts, strict=True):
            line = index[lines.start + number]
            fields = {name: value for name, value in line.read().items() if name != self.column}
            if titled and isinstance(title := fields.get("title"), str):
                text = f"{title} {text}".strip()
            if (problem := text_problem(text)) is not None:
                bad.append((line.key, f"its column {self.column!r} holds a text {problem}", ""))
                continue
            key = next((str(fields[name]) for name in ("_id", "id") if fields.get(name)), line.key)
            passages.append(text)
            records.append({"key": key, "captions": [text], "fields": _kept_fields(fields, table)})
        return _embedded_texts(passages, records, bad, self.of_texts, earlier)


def _embedded_texts(
    texts: list[str],
    records: list[dict[str, Any]],
    bad: list[tuple[str, str, str]],
    of_texts: EmbedTexts,
    earlier: EarlierRows,
) -> Contents:
    """Embed texts that are not known from before."""
    content = np.array([content_hash(text.encode()) for text in texts], np.uint64)
    kept = [earlier.find(int(one)) for one in content]
    new = [i for i, one in enumerate(kept) if one is None]
    found = of_texts([texts[i] for i in new] or [""])
    embeddings = np.empty((len(texts), found.shape[1]), np.float32)
    for i, one in enumerate(kept):
        if one is not None:
            embeddings[i] = one[0]
    embeddings[new] = found[: len(new)]
    return Contents(embeddings, records, content, bad)


def _joined(
    batches: Sequence[EmbeddedBatch],
) -> tuple[np.ndarray, list[int], list[tuple[int, int]], list[tuple[int, str, str]]]:
    """Return the embeddings (n, E) of the usable pictures of a part, their numbers and sizes, and the bad ones."""
    images = np.concatenate([batch.images for batch in batches])
    finite: list[bool] = np.isfinite(images).all(axis=1).tolist()
    read = [(i, size) for batch in batches for i, size in zip(batch.read.good, batch.read.sizes, strict=True)]
    good = [(i, size) for i, size in read if finite[i]]
    bad = sorted(item for batch in batches for item in batch.read.bad)
    return images[[i for i, _ in good]], [i for i, _ in good], [size for _, size in good], bad


def _shard_part(shard: Shard) -> Part:
    """Return the part that a shard is."""
    facts = {name: value for name, value in shard.facts.items() if name not in ("samples", "extensions")}
    digest = hashlib.blake2b(json.dumps([facts["digest"], facts["etag"], facts["content"]]).encode(), digest_size=16)
    for name, array in sorted(shard.arrays.items()):
        if name.partition(":")[0] in ("piece", "text"):  # the headers of a tar do not show all changes of its content
            digest.update(array.tobytes())
    url = shard.url if is_remote(shard.url) else os.path.abspath(shard.url)
    about = {"source": shown(url), "shard": {"url": url, **facts}}
    return Part(facts["name"].removesuffix(".tar"), digest.hexdigest(), about)


def _lines_part(file: TextFile, lines: range) -> Part:
    """Return the part that some lines of a file are."""
    start, stop = int(file.starts[lines.start]), int(file.starts[lines.stop - 1] + file.sizes[lines.stop - 1])
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([file.kind, file.columns]).encode())
    with open(file.url, "rb") as opened:
        opened.seek(start)
        while start < stop and (piece := opened.read(min(1 << 24, stop - start))):
            digest.update(piece)
            start += len(piece)
    path = os.path.abspath(file.url)
    name = f"{os.path.basename(path)}-{lines.start // LINES:05d}"
    return Part(name, digest.hexdigest(), {"source": path})


def _state(path: str) -> tuple[int, int]:
    """Return size and time of the last change of a file, which show a change without reading it; 0 if it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _record(sample: Sample, captions: str, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return what is known of a sample of a shard, see `Contents`; a broken caption or .json only leaves it out."""
    try:
        texts = captions_of(sample, captions)
    except BadSample:
        texts = []
    fields: dict[str, Any] = {}
    if "json" in sample:
        try:
            found = sample.read_json()
            fields = _kept_fields(found) if isinstance(found, dict) else {}
        except BadSample:
            fields = {}
    if size is not None:
        fields = {"width": size[1], "height": size[0], **fields}
    extension = sample.image
    place = None if extension is None else [extension, *sample.members[extension]]
    return {"key": sample.key, "captions": texts, "fields": fields, "place": place}


def _kept_fields(fields: Mapping[str, Any], numbers_in_texts: bool = False) -> dict[str, Any]:
    """Return the fields to keep: all of them if they are small, otherwise the scalars. JSON has no infinity or NaN.

    Args:
        fields: the fields.
        numbers_in_texts: make numbers of texts that are numbers, since tables hold texts only.
    """
    kept = _finite(dict(fields))
    if numbers_in_texts:
        kept = {name: _number(value) if isinstance(value, str) else value for name, value in kept.items()}
    if len(json.dumps(kept)) <= LARGEST:
        return kept
    return {
        name: value
        for name, value in kept.items()
        if not isinstance(value, dict | list) and (not isinstance(value, str) or len(value) <= LARGEST)
    }


def _number(text: str) -> Any:
    """Return the number that a text is, or else the text, such as a code that begins with a zero."""
    try:
        value = float(text)
    except ValueError:
        return text
    if not math.isfinite(value) or len(text) > 15 or (text.isdigit() and str(int(text)) != text):
        return text
    return int(value) if text.lstrip("-").isdigit() else value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value
