"""Rewriting of the chosen samples of shards into new shards, in their order or shuffled, member by member.

A shard is written to a temporary file, compared with the selection, and renamed; then a line about it is appended to a
journal, from which a stopped run resumes. The output depends only on the chosen samples and the options, so that a
stopped and resumed run makes the same files.
"""

import errno
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

import numpy as np

from dualenc.data.loading.epoch_plan import permutation
from dualenc.data.prepare.resumable import JOURNAL, check_same, read_begun, read_lines
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.remote import Cache
from dualenc.data.shards.selection import Selection
from dualenc.data.shards.shard import Shard, changed_error, scan
from dualenc.data.shards.tar import BLOCK, members, padded
from dualenc.utils.errors import DataError
from dualenc.utils.files import append_lines, atomic_write, write_json, write_text
from dualenc.utils.text import plural
from dualenc.utils.urls import is_remote

FORMAT = 1  # of reshard.json
ABOUT = "reshard.json"
_RECORD = 20 * BLOCK  # a tar is filled up to a multiple of this


@dataclass(frozen=True)
class Resharded:
    """The result of `reshard`, in numbers of shards, samples and bytes."""

    out: Path
    shards: int
    samples: int
    inputs: int  # number of shards that were read from
    samples_before: int  # in all of these
    bytes_before: int
    bytes_after: int
    shuffled: bool
    renamed: bool  # whether the keys have the name of their shard in front
    finished_before: bool

    def lines(self) -> list[str]:
        """Return the lines to print: the result, and the next command."""
        text = [f"{self.out} was finished before; remove it to write it again"] if self.finished_before else []
        text += [
            f"{self.samples:,} of {self.samples_before:,} samples of {plural(self.inputs, 'shard')} are in "
            f"{plural(self.shards, 'shard')}{', shuffled' if self.shuffled else ''}: {self.bytes_after / 1e6:,.1f} of "
            f"{self.bytes_before / 1e6:,.1f} MB",
            "each of them was read again and is the same, byte for byte",
        ]
        if self.renamed:
            text.append("samples of several shards share a key: the name of the shard was put in front of all keys")
        return [*text, f"next: dualenc fit --config run.yaml --data.train {quote(str(self.out))}"]


def reshard(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    select: str | Sequence[str] | Selection | None = None,
    *,
    shuffle: int | None = None,
    size: int = 1000,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Resharded:
    """Write the chosen samples of shards into new shards; the bytes of their members are copied.

    The headers of a member are copied too, with its time, owner and long name, except if it is renamed: then a new
    header keeps the time in seconds, the owner and the mode. Members that belong to no sample and the global header of
    a tar are left out.

    Each new shard is read again and compared with what was read from the old ones before it gets its name. If the
    process was stopped, the same call resumes it and writes the same files.

    Args:
        shards: paths, globs, brace patterns, folders or URLs.
        out: output folder, for `000000.tar`, ..., their index and `reshard.json`.
        select: the samples, see `ShardIndex.select`; None for all of them.
        shuffle: seed of the order of the samples, over all shards; None to keep their order.
        size: samples in a new shard.
        track: wrapper of the loop over the new shards, for a progress bar.

    Raises:
        DataError: If a shard cannot be read, no sample is chosen, remote shards that are to be shuffled do not fit the
            cache, or OUT holds other files or was begun with other options.
        OSError: If a file cannot be written, or does not hold what was written.
    """
    if size < 1 or (shuffle is not None and shuffle < 0):
        raise DataError(f"size {size} must be 1 or more, shuffle {shuffle} 0 or more")
    out = Path(out)
    begun = read_begun(out / ABOUT, "reshard")
    cache = Cache()
    index = ShardIndex.build(shards, cache=cache)
    chosen = index if select is None else index.select(select)
    if any(os.path.realpath(os.path.dirname(str(shard))) == os.path.realpath(out) for shard in index.parts):
        raise DataError(f"{out} is the folder of shards that are read: name another one")
    _check_cache(index, cache, shuffle)
    order = np.arange(len(chosen)) if shuffle is None else permutation(len(chosen), shuffle)
    inputs = {str(i): [shard.facts["name"], shard.facts["digest"]] for i, shard in enumerate(index.parts)}
    options = {"format": FORMAT, "shuffle": shuffle, "size": size, "chosen": chosen.fingerprint, "inputs": inputs}
    writer = _Writer(chosen, order, size, out)
    lines = _resume(out, begun, options)
    finished_before = len(lines) == len(writer) and not (out / JOURNAL).exists()
    if not finished_before:
        _write_rest(out, writer, lines, options, track)
    return Resharded(
        out=out,
        shards=len(writer),
        samples=len(chosen),
        inputs=len(index.parts),
        samples_before=len(index),
        bytes_before=sum(shard.facts["size"] for shard in index.parts),
        bytes_after=sum(line["bytes"] for line in lines.values()),
        shuffled=shuffle is not None,
        renamed=bool(writer.folders),
        finished_before=finished_before,
    )


def _write_rest(
    out: Path,
    writer: "_Writer",
    lines: dict[str, dict[str, Any]],
    options: dict[str, Any],
    track: Callable[[Iterable[Any]], Iterable[Any]],
) -> None:
    """Write the new shards that `lines` lacks, and add their lines; then check and describe the whole folder."""
    for number in track([i for i in range(len(writer)) if writer.name(i) not in lines]):
        line = writer.write(number)
        append_lines(out / JOURNAL, [json.dumps(line)], sync=True)
        lines[line["shard"]] = line
    _check_all(out, writer, lines)
    write_json(out / ABOUT, {**options, "shards": [lines[name] for name in sorted(lines)]}, indent=1)
    (out / JOURNAL).unlink()


def _check_cache(index: ShardIndex, cache: Cache, shuffle: int | None) -> None:
    """Refuse to shuffle remote shards that the cache cannot hold: each would be fetched for every new shard."""
    remote = sum(shard.facts["size"] for shard in index.parts if is_remote(shard.url))
    if shuffle is not None and remote > cache.limit:
        raise DataError(
            f"shuffle reads from all shards at once, and {remote / 1e9:,.0f} GB of remote shards do not fit the cache "
            f"of {cache.limit / 1e9:,.0f} GB: copy them to a disk, or keep the order"
        )


def _resume(out: Path, begun: dict[str, Any], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Begin the folder, or return the lines of the shards that an earlier call finished, by name.

    Raises:
        DataError: If the folder was begun with other options.
    """
    if begun:
        check_same(out, begun, options, {"inputs": "other shards", "chosen": "another selection"})
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / ABOUT, options, indent=1)
    journal = out / JOURNAL
    found = {line["shard"]: line for line in [*begun.get("shards", []), *read_lines(journal)]}
    lines = {name: line for name, line in found.items() if _size(out / name) == line["bytes"]}
    if len(lines) < len(begun.get("shards", [])) or "shards" not in begun or journal.exists():
        write_text(journal, "".join(json.dumps(line) + "\n" for line in lines.values()))
        for temporary in out.glob("*.part"):
            temporary.unlink()
    return lines


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _check_all(out: Path, writer: "_Writer", lines: dict[str, dict[str, Any]]) -> None:
    """Write the index of the new shards, and check that it has each of the chosen samples once."""
    found = ShardIndex.build([str(out / writer.name(i)) for i in range(len(writer))])
    digests = [lines[shard.facts["name"]]["headers"] for shard in found.parts]
    if digests != [shard.facts["digest"] for shard in found.parts] or len(found) != len(writer.order):
        message = "it was changed while it was written: remove it, and run the same command again"
        raise OSError(errno.EIO, message, str(out))


class _Writer:
    """Writer of the new shards.

    Args:
        chosen: index of the chosen samples.
        order: (N,) their numbers in the order of the new shards.
        size: samples in a shard.
        out: output folder.

    Attributes:
        folders: texts to put in front of the keys of each old shard; empty if keys are kept.
    """

    def __init__(self, chosen: ShardIndex, order: np.ndarray, size: int, out: Path) -> None:
        self.chosen, self.order, self.size, self.out = chosen, order, size, out
        self.folders: dict[str, str] = {}
        self._starts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if any(self._repeats(number) for number in range(len(self))):
            stems = [shard.facts["name"].removesuffix(".tar") for shard in chosen.parts]
            if len(set(stems)) < len(stems):
                stems = [f"{number}-{stem}" for number, stem in enumerate(stems)]
            self.folders = {shard.url: f"{stem}/" for shard, stem in zip(chosen.parts, stems, strict=True)}

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def name(self, number: int) -> str:
        """Return the file name of a new shard."""
        return f"{number:06d}.tar"

    def write(self, number: int) -> dict[str, Any]:
        """Write a shard, compare it with what was read, and return its line of the journal."""
        copied: list[tuple[str, str, str]] = []  # key, extension and hash of each member
        path = self.out / self.name(number)
        with atomic_write(path) as partial:
            with open(partial, "wb") as file:
                for i in self._numbers(number):
                    copied += self._copy(file, *self.chosen.find(i))
                file.write(bytes(2 * BLOCK))
                file.write(bytes(-file.tell() % _RECORD))
            written = scan(str(partial), self.chosen.parts[0].cache)
            if list(_contents(written)) != copied:
                raise OSError(errno.EIO, "it does not hold what was written", str(path))
            size = partial.stat().st_size
        return {
            "shard": path.name,
            "bytes": size,
            "samples": len(written),
            "headers": written.facts["digest"],
            "content": hashlib.blake2b(json.dumps(copied).encode(), digest_size=16).hexdigest(),
        }

    def _numbers(self, number: int) -> list[int]:
        """Return the numbers of the samples of a new shard."""
        return self.order[number * self.size : (number + 1) * self.size].tolist()

    def _repeats(self, number: int) -> bool:
        """Return whether two samples of a new shard would have the same key."""
        keys = [self.chosen.key(i) for i in self._numbers(number)]
        return len(set(keys)) < len(keys)

    def _copy(self, file: BinaryIO, shard: Shard, number: int) -> Iterator[tuple[str, str, str]]:
        """Copy the members of a sample; yield the key, the extension and the hash of the data of each."""
        key = f"{self.folders.get(shard.url, '')}{shard.key(number)}"
        for extension, (offset, size) in shard.members(number).items():
            data = shard.read(offset, size)
            file.write(self._header(shard, f"{key}.{extension}", offset, size))
            file.write(data)
            file.write(bytes(padded(size) - size))
            yield key, extension, _hash(data)

    def _header(self, shard: Shard, name: str, offset: int, size: int) -> bytes:
        """Return the headers of a member: those that it had, or a new one if its name is another."""
        if shard.url not in self._starts:
            self._starts[shard.url] = _header_starts(shard)
        offsets, starts = self._starts[shard.url]
        place = int(np.searchsorted(offsets, offset))
        if place == len(offsets) or offsets[place] != offset:
            raise changed_error(shard.url)
        start = int(starts[place])
        headers = shard.read(start, offset - start)
        if not self.folders:
            return headers
        try:
            info = tarfile.TarInfo.frombuf(headers[-BLOCK:], "utf-8", "surrogateescape")
        except tarfile.HeaderError:  # the fields that nobody needs may be broken
            info = tarfile.TarInfo()
        info.name, info.size, info.type, info.linkname = name, size, tarfile.REGTYPE, ""
        # GNU headers store any name; PAX headers need a kilobyte for each name that is not ASCII.
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _header_starts(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """Return the ascending offsets (M,) of the data of a shard's members, and the offsets of their first headers."""
    path = shard.cache.path(shard.remote_file) if is_remote(shard.url) else shard.url
    with open(path, "rb", buffering=0) as file:
        found = np.array([(member.offset, member.start) for member in members(file)], np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _contents(shard: Shard) -> Iterator[tuple[str, str, str]]:
    """Yield the key, the extension and the hash of the data of each member of a shard."""
    for number in range(len(shard)):
        for extension, (offset, size) in shard.members(number).items():
            yield shard.key(number), extension, _hash(shard.read(offset, size))


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
