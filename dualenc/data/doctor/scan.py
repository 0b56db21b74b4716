"""What samples are like: each read and decoded once as a run does it, in worker processes, and a few numbers kept.

Of a sample are kept its sizes, a hash of 8 bytes of its image and one of each caption, and what is wrong with it.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from dualenc.data.pairs import decode_sample
from dualenc.data.shards.index import Sample, ShardIndex
from dualenc.data.shards.shard import content_hash
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.data.workers import item_loader
from dualenc.utils.errors import BadSample, DataError

_CHUNK = 32  # samples that a worker hands over at once
_DETAILS = 100  # kept of each cause
_OTHERS = {b"GIF8": "a GIF", b"BM": "a BMP", b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"<": "HTML or XML", b"{": "JSON"}


class Survey(NamedTuple):
    """What is kept of n samples with m captions."""

    image: np.ndarray  # (n,) uint64 hash of the bytes
    size: np.ndarray  # (n,) int64 bytes; 0 where they cannot be read
    shape: np.ndarray  # (n, 2) int64 width and height; 0 where it was not decoded
    plain: np.ndarray  # (n,) bool, whether it has one color
    caption: np.ndarray  # (m,) uint64 hash
    owner: np.ndarray  # (m,) int64 row of its sample
    length: np.ndarray  # (m,) int64 tokens, or words
    unknown: np.ndarray  # (m,) int64 tokens among them that the vocabulary has not
    problems: list[tuple[int, str, str]]  # row, cause, detail; the detail of the first ones of each cause


def survey(
    index: ShardIndex,
    rows: np.ndarray,
    captions: Callable[[Sample], list[str]] | None,
    tokenizer: Tokenizer | None = None,
    *,
    decode: bool = True,
    workers: int = 0,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Survey:
    """Reads samples.

    Args:
        index: of the shards.
        rows: which samples (n,).
        captions: of a sample; absent, they are not read.
        tokenizer: measures captions in tokens, and cuts none; absent, in words.
        decode: whether to decode the images, or only to read them.
        workers: processes; 0 for none.
        track: wraps the loop over chunks of samples.
    """
    reader = _Reader(index, captions, tokenizer, decode)
    chunks = item_loader(reader, [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)], workers)
    parts: list[Survey] = [reader[rows[:0]]]  # has the shapes, if there is no other
    problems: list[tuple[int, str, str]] = []
    count: Counter[str] = Counter()
    for part in track(chunks):
        for row, cause, detail in part.problems:
            count[cause] += 1
            problems.append((row, sys.intern(cause), detail if count[cause] <= _DETAILS else ""))
        parts.append(part._replace(problems=[]))
    arrays = [np.concatenate(columns) for columns in list(zip(*parts))[:-1]]
    return Survey(*arrays, problems=problems)


class _Reader(Dataset[Survey]):
    def __init__(
        self,
        index: ShardIndex,
        captions: Callable[[Sample], list[str]] | None,
        tokenizer: Tokenizer | None,
        decode: bool,
    ) -> None:
        self.index, self.captions, self.tokenizer, self.decode = index, captions, tokenizer, decode

    def __getitem__(self, rows: np.ndarray) -> Survey:
        images, texts, owner, problems = [], [], [], []
        for row in rows.tolist():
            sample, image = self.index[row], (0, 0, 0, 0, False)
            for read in (self._image, self._captions):  # both: a sample may have two troubles
                try:
                    found = read(sample)
                except DataError as error:
                    known = isinstance(error, BadSample)
                    problems.append((row, *((error.cause, error.detail) if known else ("cannot be read", str(error)))))
                    continue
                if isinstance(found, tuple):
                    image = found
                else:
                    texts += found
                    owner += [row] * len(found)
            images.append(image)
        length, unknown = self._measured(texts)
        problems += [(row, "caption without any token", "") for row, n in zip(owner, length) if n == 0]
        columns = [np.array([image[i] for image in images], kind) for i, kind in enumerate("Qqqq?")]
        return Survey(
            columns[0],
            columns[1],
            np.stack(columns[2:4], axis=1),
            columns[4],
            np.array([content_hash(text.encode()) for text in texts], np.uint64),
            np.array(owner, np.int64),
            np.array(length, np.int64),
            np.array(unknown, np.int64),
            problems,
        )

    def _image(self, sample: Sample) -> tuple[int, int, int, int, bool]:
        """Hash, bytes, width, height, and whether it has one color."""
        if sample.image is None:
            return 0, 0, 0, 0, False
        data = sample.read(sample.image)
        if not self.decode:
            return content_hash(data), len(data), 0, 0, False
        try:
            picture = decode_sample(sample)  # (3, H, W)
        except BadSample:
            other = next((name for magic, name in _OTHERS.items() if data.lstrip().startswith(magic)), None)
            other = "AVIF, HEIC or a film" if data[4:8] == b"ftyp" else other if data else "an empty file"
            if other:
                raise BadSample(sample, f".{sample.image} is {other}") from None
            raise
        corner = picture[:, :1, :1]
        plain = bool((picture[:, ::16, ::16] == corner).all()) and bool((picture == corner).all())
        return content_hash(data), len(data), picture.shape[2], picture.shape[1], plain

    def _captions(self, sample: Sample) -> list[str]:
        return [text.strip() for text in self.captions(sample)] if self.captions else []

    def _measured(self, texts: list[str]) -> tuple[list[int], list[int]]:
        if self.tokenizer is None:
            return [len(text.split()) for text in texts], [0] * len(texts)
        backend = self.tokenizer.backend
        unknown = backend.token_to_id("[UNK]")
        ids = [item.ids for item in backend.encode_batch_fast(texts)]
        return [len(text) for text in ids], [text.count(unknown) if unknown is not None else 0 for text in ids]
