"""Lists of samples: keys in a text file, bits for each sample of named shards, or DataComp's array of 128-bit uids.

All of them are looked up in an index with a few bytes a sample: 10 million samples take less than a gigabyte.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dualenc.data.shards.sample import Sample
from dualenc.data.shards.select import describe_fields
from dualenc.data.shards.shard import Shard
from dualenc.utils.decoding import read_text, trimmed
from dualenc.utils.errors import BadSample, DataError, warn_once
from dualenc.utils.files import atomic_write, stand_in
from dualenc.utils.text import plural, printable, quoted

FORMAT = 1  # of a .select file
KEY = "dualenc"  # key of its metadata, a JSON
TEXT, BITS, UIDS = ".txt", ".select", ".npy"  # suffixes of the files
_UID = re.compile("[0-9a-fA-F]{1,32}")
_LINE = re.compile(r"[^\r\n]+")
_DIGEST = np.dtype("S16")  # compared as 16 bytes, since all have this length
_PAIR = np.dtype("<u8,<u8")  # upper and lower half of a uid, the type of DataComp's lists


class _Index(Protocol):
    """The part of `ShardIndex` that a selection needs."""

    parts: list[Shard]
    rows: np.ndarray | None


class Selection(ABC):
    """A choice of samples, as read from a file or made by a filter.

    Attributes:
        digest: hash of what is chosen, as hexadecimal digits; it depends on neither the order of a list nor the path.
        source: name of the selection for messages.
    """

    digest: str
    source: str

    @staticmethod
    def read(path: str | os.PathLike[str]) -> "Selection":
        """Read a file of one of the three forms.

        Args:
            path: `.select` for bits a shard; `.npy` for an array of 128-bit uids as pairs of 64-bit integers, which
                are compared with the field `uid` of each sample's `.json`; any other file for a text with one key a
                line.

        Raises:
            DataError: If the file cannot be read, is damaged, or has a newer format.
        """
        path = Path(path)
        if path.suffix == BITS:
            return _read_bits(path)
        return UidList.from_file(path) if path.suffix == UIDS else KeyList.from_file(path)

    @staticmethod
    def of_masks(masks: Mapping[str, tuple[str, np.ndarray]]) -> "SampleBits":
        """Return a selection of samples by their number in the shard.

        Args:
            masks: name of a shard -> digest of its tar headers, as in `Shard.facts`, and a mask (S,) of its samples.
        """
        entries = [
            ShardBits(name, digest, len(mask), np.packbits(np.asarray(mask, bool)))
            for name, (digest, mask) in masks.items()
        ]
        return SampleBits(entries, "the selection")

    @staticmethod
    def of_index(index: _Index) -> "SampleBits":
        """Return the selection of the samples of an index, such as `index.take(rows)`.

        Raises:
            DataError: If two of its shards have the same name and the same headers.
        """
        return _bits_of(_members(index), "the selection")

    @abstractmethod
    def masks(self, shards: Sequence[Shard]) -> Iterator[np.ndarray]:
        """Yield a mask (S,) of the chosen samples of each shard.

        Raises:
            DataError: If the selection does not fit the shards.
        """

    def rows(self, index: _Index) -> np.ndarray:
        """Return the ascending numbers (N,) int64 of the chosen samples of an index.

        Raises:
            DataError: If a key is in no shard, a shard has changed since it was selected from, or no shard is known.
        """
        chosen = np.concatenate([np.zeros(0, bool), *self.masks(index.parts)])
        return np.flatnonzero(chosen if index.rows is None else chosen[index.rows])

    def save(self, path: str | os.PathLike[str], index: _Index) -> None:
        """Write the chosen samples of an index, in the form that the path's suffix names.

        Args:
            path: file with the suffix `.txt`, `.select` or `.npy`.
            index: index of the shards.

        Raises:
            DataError: If the suffix is another one, or the samples cannot be told apart by their keys or uids.
            OSError: If the file cannot be written.
        """
        path = Path(path)
        if path.suffix not in _WRITERS:
            raise DataError(f"{path} must end with {', '.join(_WRITERS)}: its name decides the form of a selection")
        chosen = [
            (shard, mask & inside)
            for (shard, inside), mask in zip(_members(index), self.masks(index.parts), strict=True)
        ]
        _WRITERS[path.suffix](path, chosen)


def read_selection(choice: str | Sequence[str] | Selection) -> str | Selection:
    """Return the selection of a file or a list of keys; a text that is not the path of a file is returned unchanged."""
    if isinstance(choice, Selection) or (isinstance(choice, str) and not os.path.isfile(choice)):
        return choice
    return Selection.read(choice) if isinstance(choice, str) else KeyList(lambda: choice, "select")


# Keys and uids


class KeyList(Selection):
    """A list of keys. A key that two shards have chooses both samples; a key that no shard has is refused.

    Args:
        keys: function that returns the keys, which is called again for the message about an unknown key.
        source: name of the list for messages.
    """

    def __init__(self, keys: Callable[[], Iterable[str]], source: str) -> None:
        self._keys, self.source = keys, source
        self._wanted = _sorted(_hashed(map(_encoded, keys())))
        self.digest = _digest(self._wanted)

    @classmethod
    def from_file(cls, path: Path) -> "KeyList":
        """Read a text with one key a line; white space around keys and empty lines are left out."""

        def keys() -> Iterator[str]:
            lines = (trimmed(line[0]) for line in _LINE.finditer(read_text(path)))
            return (line for line in lines if line)

        return cls(keys, f"select {path}")

    def masks(self, shards: Sequence[Shard]) -> Iterator[np.ndarray]:
        """Yield a mask of each shard; see `Selection.masks`."""
        seen = np.zeros(len(self._wanted), bool)
        for shard in shards:
            places, found = _look_up(self._wanted, _hashed(_keys_of(shard)))
            seen[places[found]] = True
            yield found
        if not seen.all():
            missing = set(self._wanted[~seen].tolist())
            unknown = {key for key in self._keys() if _hashed([_encoded(key)]).tolist()[0] in missing}
            example = quoted(min(unknown))
            raise DataError(f"{self.source}: {len(unknown)} keys are in no shard, such as {example}")


class UidList(Selection):
    """A list of 128-bit uids, which the field `uid` of a sample's `.json` gives as hexadecimal digits.

    DataComp's lists name samples of a pool of which downloads lack a part, so uids that no shard has are only counted.

    Args:
        uids: (N,) structured array with two fields of 64 bits, the upper half first.
        source: name of the list for messages.
    """

    def __init__(self, uids: np.ndarray, source: str) -> None:
        halves = np.empty((len(uids), 2), ">u8")
        for i, name in enumerate(uids.dtype.names or ()):
            halves[:, i] = uids[name]
        self._wanted, self.source = _sorted(halves.reshape(-1).view(_DIGEST)), source
        self.digest = _digest(self._wanted)
        if repeated := len(uids) - len(self._wanted):
            warn_once(f"{source} repeats {repeated:,} of its uids; each sample is taken once")

    @classmethod
    def from_file(cls, path: Path) -> "UidList":
        """Read an array of uids; pickled objects are refused."""
        what = f"{path} must be an array of 128-bit uids, of the type 'u8,u8'"
        try:
            with open(path, "rb") as file:
                if stand := stand_in(file.read(1024)):
                    raise DataError(f"{path} is {stand}")
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, EOFError, SyntaxError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{what}: it cannot be read as .npy") from None
        if not isinstance(found, np.ndarray) or found.ndim != 1 or not _is_pair(found.dtype):
            described = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "an archive"
            raise DataError(f"{what}; it is {described}")
        return cls(found, f"select {path}")

    def masks(self, shards: Sequence[Shard]) -> Iterator[np.ndarray]:
        """Yield a mask of each shard, of which each `.json` is read; see `Selection.masks`."""
        seen = np.zeros(len(self._wanted), bool)
        lacking: tuple[int, str] = 0, ""  # samples without a uid, and the first of them
        for shard in shards:
            mask = np.zeros(len(shard), bool)
            uids = [_uid_of(shard, i) for i in range(len(shard))]
            if missing := [i for i, uid in enumerate(uids) if uid is None]:
                lacking = lacking[0] + len(missing), lacking[1] or _no_uid(shard, missing[0])
            having = np.array([i for i, uid in enumerate(uids) if uid is not None], np.int64)
            places, found = _look_up(self._wanted, np.frombuffer(b"".join(uid for uid in uids if uid), _DIGEST))
            seen[places[found]] = True
            mask[having[found]] = True
            yield mask
        if lacking[0]:
            line = f"{self.source}: {plural(lacking[0], 'sample')} without a usable uid, such as {lacking[1]}"
            if not seen.any():
                raise DataError(f"{line}; no sample is selected")
            warn_once(line)
        if not seen.all():
            warn_once(
                f"{self.source}: {len(seen) - int(seen.sum()):,} of {plural(len(seen), 'uid')} are in none of these "
                "shards"
            )


def _keys_of(shard: Shard) -> list[bytes]:
    joined, ends = shard.arrays["keys"].tobytes(), shard.arrays["key_end"].tolist()
    return [joined[start:end] for start, end in pairwise([0, *ends])]


def _encoded(key: str) -> bytes:
    """Return the bytes of a key in an index."""
    return key.encode("utf-8", "surrogateescape")


def _uid_of(shard: Shard, number: int) -> bytes | None:
    """Return the 16 bytes of a sample's uid; None if it has none that can be used."""
    sample = Sample(shard, "", shard.members(number))
    try:
        fields = sample.read_json() if "json" in sample else None
    except BadSample:
        return None
    uid = fields.get("uid") if isinstance(fields, dict) else None
    return int(uid, 16).to_bytes(16, "big") if isinstance(uid, str) and _UID.fullmatch(uid) else None


def _no_uid(shard: Shard, number: int) -> str:
    """Return the name of a sample without a usable uid, and what its `.json` has."""
    sample = Sample(shard, shard.key(number), shard.members(number))
    try:
        fields = sample.read_json()
    except BadSample as error:
        return printable(str(error))
    uid = fields.get("uid") if isinstance(fields, dict) else None
    what = f"has the uid {quoted(str(uid), 40)}" if uid is not None else f"has {describe_fields(fields)}"
    return f"{quoted(sample.key)}, whose .json {what}"


def _is_pair(dtype: np.dtype[Any]) -> bool:
    fields = dtype.names or ()
    return len(fields) == 2 and all(dtype[name].kind == "u" and dtype[name].itemsize == 8 for name in fields)


def _hashed(values: Iterable[bytes]) -> np.ndarray:
    """Return 128 bits of BLAKE2b of each value; different values are the same with a probability of 2^-128."""
    return np.frombuffer(b"".join(hashlib.blake2b(value, digest_size=16).digest() for value in values), _DIGEST)


def _sorted(digests: np.ndarray) -> np.ndarray:
    return np.unique(digests)


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).hexdigest()


def _look_up(wanted: np.ndarray, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each digest (n,) in ascending ones, and a mask of those that are there."""
    if not len(wanted):
        return np.zeros(len(digests), np.int64), np.zeros(len(digests), bool)
    places = np.minimum(np.searchsorted(wanted, digests), len(wanted) - 1)
    return places, wanted[places] == digests


# Bits


class ShardBits(NamedTuple):
    """The chosen samples of one shard."""

    name: str
    digest: str  # of the shard's tar headers
    samples: int  # number of samples in the shard
    bits: np.ndarray  # (ceil(samples / 8),) uint8; the first sample is the highest bit of the first byte


class SampleBits(Selection):
    """A bit for each sample of shards, which are known by their name and the digest of their headers.

    A shard of an index that it does not name gives nothing. A shard of a name that it has, but with other headers, is
    refused, since its samples are not those that were chosen.

    Args:
        entries: the shards, each with its bits.
        source: name of the selection for messages.

    Raises:
        DataError: If two entries are of one shard.
    """

    def __init__(self, entries: Sequence[ShardBits], source: str) -> None:
        self.entries, self.source = list(entries), source
        self._entries = {entry[:2]: entry for entry in entries}
        if len(self._entries) < len(entries):
            (name, _), _ = Counter(entry[:2] for entry in entries).most_common(1)[0]
            raise DataError(f"{source}: two shards are called {name} and have the same headers: rename one")
        digest = hashlib.blake2b(digest_size=16)
        for _, entry in sorted(self._entries.items(), key=lambda item: item[0]):
            digest.update(json.dumps(entry[:3]).encode())
            digest.update(entry.bits.tobytes())
        self.digest = digest.hexdigest()

    def masks(self, shards: Sequence[Shard]) -> Iterator[np.ndarray]:
        """Yield a mask of each shard; see `Selection.masks`."""
        found = [self._entries.get((shard.facts["name"], shard.facts["digest"])) for shard in shards]
        known = {entry.name for entry in found if entry is not None}
        names = {name for name, _ in self._entries}
        unnamed = []
        for shard, entry in zip(shards, found, strict=True):
            if entry is None and shard.facts["name"] in names - known:
                raise DataError(
                    f"{self.source} was made of another {shard.facts['name']} than {shard}, whose tar headers differ: "
                    "give the shards that were scored, or make the selection again"
                )
            if entry is not None and entry.samples != len(shard):
                raise DataError(f"{self.source} has {entry.samples:,} samples of {shard}, which has {len(shard):,}")
            if entry is None:
                unnamed.append(shard)
        if len(unnamed) == len(shards) and self._entries:
            raise DataError(
                f"{self.source} is of other shards, such as {min(names)}, not of {unnamed[0]}: give the shards "
                "that were scored"
            )
        if unnamed:
            warn_once(
                f"{self.source} does not name {plural(len(unnamed), 'shard')} of {len(shards):,}, such as "
                f"{printable(str(unnamed[0]))}: nothing of them is selected"
            )
        for shard, entry in zip(shards, found, strict=True):
            yield np.zeros(len(shard), bool) if entry is None else _unpacked(entry)


def _count(entry: ShardBits) -> int:
    return int(_unpacked(entry).sum())


def _unpacked(entry: ShardBits) -> np.ndarray:
    return np.unpackbits(entry.bits, count=entry.samples).view(bool)


def _read_bits(path: Path) -> SampleBits:
    """Read a `.select` file: a safetensors file with one tensor, and the shards in its metadata."""
    damaged = DataError(f"{path} is damaged, or not a selection: write it again with dualenc filter")
    try:
        with open(path, "rb") as file:
            if stand := stand_in(file.read(1024)):
                raise DataError(f"{path} is {stand}")
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()[KEY])
            if not isinstance(about["format"], int) or about["format"] > FORMAT:
                raise DataError(
                    f"{path} has format {about['format']}, this dualenc reads up to {FORMAT}: upgrade dualenc"
                )
            bits = file.get_tensor("bits")
        if bits.dtype != np.uint8 or bits.ndim != 1:
            raise damaged
        entries, start = [], 0
        for shard in about["shards"]:
            name, digest, samples, selected = (shard[key] for key in ("name", "digest", "samples", "selected"))
            stop = start + (samples + 7) // 8
            entry = ShardBits(str(name), str(digest), samples, bits[start:stop])
            start = stop
            same = samples >= 0 and len(entry.bits) == (samples + 7) // 8 and _count(entry) == selected
            if not same or (np.packbits(_unpacked(entry)) != entry.bits).any():
                raise damaged
            entries.append(entry)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise (error if isinstance(error, DataError) else damaged) from None
    if start != len(bits):
        raise damaged
    return SampleBits(entries, f"select {path}")


# Writing

_Chosen = Sequence[tuple[Shard, np.ndarray]]  # shards, each with a mask (S,) of its chosen samples


def _members(index: _Index) -> _Chosen:
    """Return the shards of an index, each with a mask of the samples that are in the index."""
    chosen = np.full(sum(map(len, index.parts)), index.rows is None)
    if index.rows is not None:
        chosen[index.rows] = True
    ends = np.cumsum([len(shard) for shard in index.parts], dtype=np.int64)
    return list(zip(index.parts, np.split(chosen, ends)))


def _bits_of(chosen: _Chosen, source: str) -> SampleBits:
    """Return the selection of the chosen samples."""
    facts = [(shard.facts["name"], shard.facts["digest"], len(shard)) for shard, _ in chosen]
    return SampleBits([ShardBits(*about, np.packbits(mask)) for about, (_, mask) in zip(facts, chosen)], source)


def _write_bits(path: Path, chosen: _Chosen) -> None:
    """Write a bit for each sample of each shard."""
    entries = _bits_of(chosen, str(path)).entries
    shards = [
        {"name": entry.name, "digest": entry.digest, "samples": entry.samples, "selected": _count(entry)}
        for entry in entries
    ]
    bits = np.concatenate([np.zeros(0, np.uint8), *(entry.bits for entry in entries)])
    with atomic_write(path) as partial:
        # A single key makes the bytes reproducible: safetensors writes several keys in random order.
        save_file({"bits": bits}, partial, {KEY: json.dumps({"format": FORMAT, "shards": shards})})


def _write_keys(path: Path, chosen: _Chosen) -> None:
    """Write the key of each chosen sample on a line of its own."""
    with atomic_write(path) as partial:
        with open(partial, "wb") as file:
            for shard, mask in chosen:
                keys = _keys_of(shard)
                file.writelines(keys[i] + b"\n" for i in np.flatnonzero(mask))
        _check_list(path, chosen, lambda: KeyList.from_file(partial))


def _write_uids(path: Path, chosen: _Chosen) -> None:
    """Write the uids of the chosen samples in ascending order, as DataComp's tools do."""
    found = []
    for shard, mask in chosen:
        for number in np.flatnonzero(mask).tolist():
            uid = _uid_of(shard, number)
            if uid is None:
                raise DataError(f"{path} needs the uid of each sample: {_no_uid(shard, number)}; write a {BITS}")
            found.append(uid)
    uids = np.frombuffer(b"".join(sorted(found)), ">u8").astype("<u8").view(_PAIR)
    with atomic_write(path) as partial:
        with open(partial, "wb") as file:
            np.save(file, uids, allow_pickle=False)
        _check_list(path, chosen, lambda: UidList(uids, str(path)))


def _check_list(path: Path, chosen: _Chosen, read: Callable[[], Selection]) -> None:
    """Refuse a list that chooses other samples, because samples share a key or uid, or a key is not a line of text."""
    try:
        again = list(read().masks([shard for shard, _ in chosen]))
        differing = [(shard, np.flatnonzero(mask != other)) for (shard, mask), other in zip(chosen, again, strict=True)]
        also = [f"{quoted(shard.key(int(rows[0])))} of {shard}" for shard, rows in differing if len(rows)]
        problem = f"it would also select {also[0]}" if also else ""
    except DataError as error:
        problem = str(error)
    if problem:
        raise DataError(f"{path} cannot name the chosen samples alone: {problem}; write a {BITS}")


_WRITERS: dict[str, Callable[[Path, _Chosen], None]] = {TEXT: _write_keys, BITS: _write_bits, UIDS: _write_uids}
