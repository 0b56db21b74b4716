"""Surveys of samples for `dualenc doctor`.

Worker processes read and decode each sample once, as a run does. What they keep of a sample is its sizes, 8-byte hashes
of its image and captions, and its problems.
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
from dualenc.utils.files import stand_in

_CHUNK = 32  # samples that a worker returns at a time
_DETAILS = 100  # details kept for each cause
# First bytes of a file -> what the file is, to explain why it cannot be decoded.
_OTHER_FORMATS = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"<": "HTML or XML",
    b"{": "JSON",
}


class Survey(NamedTuple):
    """The summary of n samples with m captions."""

    image: np.ndarray  # (n,) uint64 hash of the image's bytes
    size: np.ndarray  # (n,) int64 size of the image in bytes; 0 where it cannot be read
    shape: np.ndarray  # (n, 2) int64 width and height in pixels; 0 where the image was not decoded
    plain: np.ndarray  # (n,) bool, true for an image of one color
    caption: np.ndarray  # (m,) uint64 hash of the caption
    owner: np.ndarray  # (m,) int64 row of the caption's sample
    length: np.ndarray  # (m,) int64 number of tokens, or words
    unknown: np.ndarray  # (m,) int64 number of unknown tokens
    problems: list[tuple[int, str, str]]  # row, cause, detail; details only of the first problems of each cause


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
    """Read and summarize samples.

    Args:
        index: index of the shards.
        rows: (n,) numbers of the samples.
        captions: reader of the captions of a sample; absent, captions are not read.
        tokenizer: tokenizer that measures captions in tokens, without truncation; absent, words are counted.
        decode: whether to decode the images, or only to read them.
        workers: number of processes; 0 for none.
        track: wrapper of the loop over chunks of samples.
    """
    reader = _Reader(index, captions, tokenizer, decode)
    chunks = item_loader(reader, [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)], workers)
    parts: list[Survey] = [reader[rows[:0]]]  # An empty part gives the dtypes if there are no samples.
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
    """Data set that is indexed by rows (n,) and returns the `Survey` of these samples."""

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
            sample, image = self.index[row], (0, 0, 0, 0, False)  # as `_image` returns it, for one that is not read
            for read in (self._image, self._captions):  # The captions are read even if the image is bad.
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
        length, unknown = self._measure(texts)
        problems += [(row, "caption without any token", "") for row, n in zip(owner, length) if n == 0]
        # "Q" is uint64, "q" int64 and "?" bool, in the order of what `_image` returns.
        columns = [np.array([image[i] for image in images], dtype) for i, dtype in enumerate("Qqqq?")]
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
        """Return hash, size in bytes, width and height of the image, and whether it has only one color."""
        if sample.image is None:
            return 0, 0, 0, 0, False
        data = sample.read(sample.image)
        if not self.decode:
            return content_hash(data), len(data), 0, 0, False
        try:
            image = decode_sample(sample)  # (3, H, W)
        except BadSample:
            other = next((name for magic, name in _OTHER_FORMATS.items() if data.lstrip().startswith(magic)), None)
            # The containers of AVIF, HEIC and MP4 have "ftyp" after four bytes of length.
            other = "AVIF, HEIC or a video" if data[4:8] == b"ftyp" else other if data else "an empty file"
            other = stand_in(data) or other
            if other:
                raise BadSample(sample, f".{sample.image} is {other}") from None
            raise
        corner = image[:, :1, :1]
        # Every sixteenth row and column is enough to see that most images have several colors, which saves time.
        plain = bool((image[:, ::16, ::16] == corner).all()) and bool((image == corner).all())
        return content_hash(data), len(data), image.shape[2], image.shape[1], plain

    def _captions(self, sample: Sample) -> list[str]:
        """Return the captions of a sample."""
        return self.captions(sample) if self.captions else []

    def _measure(self, texts: list[str]) -> tuple[list[int], list[int]]:
        """Count the words, or the tokens and the unknown tokens, of each text."""
        if self.tokenizer is None:
            return [len(text.split()) for text in texts], [0] * len(texts)
        backend = self.tokenizer.backend
        unknown = backend.token_to_id("[UNK]")
        ids = [item.ids for item in backend.encode_batch_fast(texts)]
        return [len(text) for text in ids], [text.count(unknown) if unknown is not None else 0 for text in ids]
