"""Segments of an index: safetensors files with the embeddings of some rows, and what is needed to show these rows."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dualenc.utils.errors import DataError
from dualenc.utils.files import atomic_write

FORMAT = 1
KEY = "dualenc"  # key of a file's metadata, a JSON
DTYPES = {"F16": np.float16, "I64": np.int64, "U8": np.uint8}
BLOCK = 1 << 20  # numbers of a block in fp32, which the cache of a core holds


class Contents(NamedTuple):
    """The rows of a segment.

    Attributes:
        embeddings: (n, E) of unit length.
        records: what is known of each row: its key, captions, fields, and the place of its bytes.
        content: (n,) uint64 hashes of what was embedded, by which a later build keeps an embedding.
        bad: key, cause and detail of each item that could not be embedded, and has no row.
    """

    embeddings: np.ndarray
    records: list[dict[str, Any]]
    content: np.ndarray
    bad: list[tuple[str, str, str]]


class Segment:
    """The file of a segment, mapped into memory, so that only the rows in use are read.

    Args:
        path: path of the file.

    Attributes:
        embeddings: (n, E) fp16.
        content: see `Contents`.
        digest: digest of the source of the rows, and of the options they were made with.
        bad: see `Contents`.

    Raises:
        DataError: If the file is missing, damaged, or of a newer format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            about, arrays = _mapped(path)
            self.embeddings, self.content = arrays["embeddings"], arrays["content"].view(np.uint64)
            self._records, self._ends = arrays["records"], arrays["ends"]
            self.digest, self.bad, self._check = about["digest"], about["bad"], about["check"]
            if not len(self.embeddings) == len(self.content) == len(self._ends):
                raise ValueError
        except FileNotFoundError:
            raise DataError(f"{path} is missing: run the same dualenc build-search again") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise damaged(path) from None

    def __len__(self) -> int:
        return len(self.embeddings)

    def record(self, i: int) -> dict[str, Any]:
        """Return what is known of row i; see `Contents`.

        Raises:
            DataError: If the file is damaged.
        """
        start = int(self._ends[i - 1]) if i else 0
        try:
            return json.loads(self._records[start : int(self._ends[i])].tobytes())
        except ValueError:
            raise damaged(self.path) from None

    def verify(self) -> None:
        """Check the content of the file, all of which is read.

        Raises:
            DataError: If the file is damaged.
        """
        if _checksum((self.embeddings, self.content, self._records, self._ends)) != self._check:
            raise damaged(self.path)


def write_segment(path: Path, digest: str, contents: Contents) -> None:
    """Write the file of a segment atomically; the same content gives the same bytes."""
    lines = [json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") for record in contents.records]
    arrays = {
        "embeddings": np.ascontiguousarray(contents.embeddings, np.float16),
        "content": np.asarray(contents.content, np.uint64).view(np.int64),
        "records": np.frombuffer(b"".join(lines), np.uint8),
        "ends": np.array(list(accumulate(map(len, lines))), np.int64),
    }
    about = {"format": FORMAT, "digest": digest, "bad": contents.bad, "check": _checksum(tuple(arrays.values()))}
    with atomic_write(path) as partial:
        # A single key makes the bytes reproducible: safetensors writes several keys in random order.
        save_file(arrays, partial, {KEY: json.dumps(about)})


def damaged(path: Path) -> DataError:
    """Return the error of a segment that is damaged."""
    return DataError(f"{path} is damaged: run the same dualenc build-search again, which makes it again")


def _mapped(path: Path) -> tuple[Mapping[str, Any], dict[str, np.ndarray]]:
    """Return the metadata of a safetensors file, and its arrays mapped into memory.

    Raises:
        SafetensorError: If the file is not a whole safetensors file.
    """
    with safe_open(path, "numpy") as file:  # checks the header, and the size of the file
        about = json.loads(file.metadata()[KEY])
    if about["format"] > FORMAT:
        raise DataError(f"{path} has format {about['format']}, this dualenc reads up to {FORMAT}: upgrade dualenc")
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        whole = np.memmap(file, np.uint8, "r").view(np.ndarray)[8 + size :]
    arrays = {}
    for name, tensor in header.items():
        if name != "__metadata__":
            start, stop = tensor["data_offsets"]
            arrays[name] = whole[start:stop].view(DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return about, arrays


def _checksum(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def to_fp32(halves: np.ndarray) -> np.ndarray:
    """Return finite fp16 numbers as fp32, six times as fast as `astype`, which converts them one by one.

    Moved by 13 bits, the bits of fp16 are those of fp32 except that the exponent is too small by 112.
    """
    bits = halves.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70000001)  # clears the three copies of the sign below it
    found = bits.view(np.float32)
    found *= np.float32(2.0**112)
    return found


class Rows:
    """The embeddings of several segments as one matrix (N, E), of which only the parts in use are read.

    Args:
        arrays: the embeddings of each segment, fp16.
        dims: number of dimensions, E.
    """

    def __init__(self, arrays: Sequence[np.ndarray], dims: int) -> None:
        self.arrays, self.dims = list(arrays), dims
        self.starts = [0, *accumulate(map(len, self.arrays))]

    def __len__(self) -> int:
        return self.starts[-1]

    def find(self, row: int) -> tuple[int, int]:
        """Return the number of the segment of a row, and the row's number within the segment.

        Raises:
            IndexError: If there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self):,}")
        segment = bisect_right(self.starts, row) - 1
        return segment, row - self.starts[segment]

    def blocks(self, most: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yield consecutive rows as (n, E) fp32, with the number of the first row.

        Args:
            most: rows of a block; by default as many as the cache holds.
        """
        size = max(1, BLOCK // self.dims) if most is None else most
        for start, array in zip(self.starts, self.arrays):
            for first in range(0, len(array), size):
                yield start + first, to_fp32(array[first : first + size])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return some rows as (n, E) fp16."""
        out = np.empty((len(rows), self.dims), np.float16)
        segments = np.searchsorted(self.starts, rows, side="right") - 1
        for segment in np.unique(segments).tolist():
            here = np.flatnonzero(segments == segment)
            out[here] = self.arrays[segment][rows[here] - self.starts[segment]]
        return out
