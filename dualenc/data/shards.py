"""Shards: what lies where in the tar files of a data set.

`ShardIndex` reads tar headers once and keeps plain arrays: for each sample its key, and for each of its members the
extension, the offset in the shard and the size. A sample is read by position, without walking the tar and without any
decoder running on a member's name: nothing in a shard is ever executed, unpickled or used as a path.
"""

import ast
import hashlib
import json
import operator
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from glob import escape, glob
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from dualenc.data.images import IMAGE_EXTENSIONS

FORMAT = 1
_ARRAYS = ("shard", "first", "extension", "offset", "size", "key_end", "key_bytes")


class DataError(ValueError):
    """Data that is missing, broken or not in the layout; the message names the file and the way out."""


def expand_shards(shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Local shard paths of what users write: a path, a glob, a brace pattern, a folder, or a list of these.

    Raises:
        DataError: a part names no file, or is no local path.
    """
    parts = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    paths: list[str] = []
    for part in (os.fspath(part) for part in parts):
        if "://" in part or part.startswith("pipe:"):
            raise DataError(f"shards {part!r}: only local paths are read; copy the shards to a local disk first")
        try:
            patterns = [part] if os.path.exists(part) else list(braceexpand(part))
        except ValueError as error:
            raise DataError(f"shards {part!r}: {error}") from None
        for pattern in patterns:
            if os.path.isdir(pattern):
                found = sorted(glob(os.path.join(escape(pattern), "*.tar")))
            else:
                found = [pattern] if os.path.exists(pattern) else sorted(glob(pattern))
            if not found:
                raise DataError(f"shards {pattern!r} match no file")
            paths += found
    if not paths:
        raise DataError("the list of shards is empty")
    twice = {path for path in paths if paths.count(path) > 1} if len(set(paths)) < len(paths) else set()
    if twice:
        raise DataError(f"shards named twice: {', '.join(sorted(twice)[:3])}")
    return paths


@dataclass(frozen=True)
class Sample:
    """One sample of a shard: where its members lie."""

    shard: str
    key: str
    members: dict[str, tuple[int, int]]  # extension -> offset, size in bytes

    def __contains__(self, extension: str) -> bool:
        return extension in self.members

    def read(self, extension: str) -> bytes:
        """The bytes of one member.

        Raises:
            DataError: there is no such member, or the shard ends before it does.
        """
        if extension not in self.members:
            raise DataError(f"{self}: no .{extension} among its members {sorted(self.members)}")
        offset, size = self.members[extension]
        data = os.pread(_descriptor(self.shard), size, offset)
        if len(data) != size:
            raise DataError(f"{self}: .{extension} is cut off; the shard changed or was not written whole")
        return data

    def read_json(self) -> Any:
        """The parsed `.json` member.

        Raises:
            DataError: it is missing or no JSON.
        """
        data = self.read("json")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:  # DataError, a ValueError, comes from outside the parser only
            raise DataError(f"{self}: .json cannot be read ({error})") from None

    @property
    def image(self) -> str | None:
        """The extension of its picture, or None."""
        return next((extension for extension in IMAGE_EXTENSIONS if extension in self.members), None)

    def __str__(self) -> str:
        return f"{self.shard} sample {self.key!r}"


class _File:
    """An open file that closes when the cache lets it go."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # os.open may have failed
            os.close(self.descriptor)


@lru_cache(maxsize=64)
def _open(path: str, inode: int, changed: int) -> _File:
    """Kept open by what the file is, not only by its name: another file of that name is opened anew."""
    return _File(path)


def _descriptor(path: str) -> int:
    try:
        status = os.stat(path)
        return _open(path, status.st_ino, status.st_mtime_ns).descriptor
    except FileNotFoundError:
        raise DataError(f"shard {path} is gone since it was indexed") from None


class ShardIndex:
    """What lies where in a list of shards. Make one with `build` or `load`."""

    def __init__(self, shards: list[str], extensions: list[str], arrays: dict[str, np.ndarray]) -> None:
        self.shards = shards
        self.extensions = extensions
        self.shard = arrays["shard"]  # (S,) int32, ascending
        self.first = arrays["first"]  # (S+1,) int64 into the member arrays
        self.extension = arrays["extension"]  # (M,) int32 into `extensions`
        self.offset = arrays["offset"]  # (M,) int64, bytes
        self.size = arrays["size"]  # (M,) int64, bytes
        self.key_end = arrays["key_end"]  # (S,) int64 into `key_bytes`
        self.key_bytes = arrays["key_bytes"]  # (K,) uint8, all keys one after the other

    @classmethod
    def build(cls, urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> "ShardIndex":
        """Scans the headers of local tar files.

        A sample is the neighbouring members that share their path up to the first dot of the base name, as webdataset
        defines it.

        Raises:
            DataError: a pattern matches nothing, or a shard is no readable uncompressed tar.
        """
        shards = expand_shards(urls)
        extensions: dict[str, int] = {}
        shard: list[int] = []
        first: list[int] = []
        member: list[tuple[int, int, int]] = []
        keys: list[bytes] = []
        for number, path in enumerate(shards):
            current, seen = None, set[str]()
            for name, offset, size in _members(path):
                folder, _, base = name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not stem or not dot:
                    continue  # hidden files and members without extension belong to no sample
                key = f"{folder}/{stem}" if folder else stem
                extension = extension.lower()
                if key != current:
                    current, seen = key, set()
                    shard.append(number)
                    first.append(len(member))
                    keys.append(key.encode("utf-8", "surrogateescape"))
                if extension in seen:
                    raise DataError(f"{path} sample {key!r}: two members .{extension}; keys must differ")
                seen.add(extension)
                member.append((extensions.setdefault(extension, len(extensions)), offset, size))
        table = np.array(member, dtype=np.int64).reshape(-1, 3)
        arrays = {
            "shard": np.array(shard, dtype=np.int32),
            "first": np.array([*first, len(member)], dtype=np.int64),
            "extension": table[:, 0].astype(np.int32),
            "offset": table[:, 1].copy(),
            "size": table[:, 2].copy(),
            "key_end": np.cumsum([len(key) for key in keys], dtype=np.int64),
            "key_bytes": np.frombuffer(b"".join(keys), dtype=np.uint8),
        }
        return cls(shards, list(extensions), arrays)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index as a plain .npz file."""
        head = json.dumps({"format": FORMAT, "shards": self.shards, "extensions": self.extensions})
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        with open(path, "wb") as file:
            np.savez(file, head=np.frombuffer(head.encode(), dtype=np.uint8), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ShardIndex":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is no index, or of a newer format.
        """
        try:
            with open(path, "rb") as raw, np.lib.npyio.NpzFile(raw, allow_pickle=False) as file:
                head = json.loads(file["head"].tobytes())
                arrays = {name: file[name] for name in _ARRAYS}
                version = head["format"]
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is no shard index ({error})") from None
        if version != FORMAT:
            raise DataError(f"{path} has index format {version}, this version reads {FORMAT}: build it anew")
        return cls(head["shards"], head["extensions"], arrays)

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        members = {
            self.extensions[self.extension[m]]: (int(self.offset[m]), int(self.size[m]))
            for m in range(self.first[i], self.first[i + 1])
        }
        return Sample(self.shards[self.shard[i]], self.key(i), members)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def key(self, i: int) -> str:
        """The key of sample i."""
        start = self.key_end[i - 1] if i else 0
        return self.key_bytes[start : self.key_end[i]].tobytes().decode("utf-8", "surrogateescape")

    def take(self, rows: np.ndarray) -> "ShardIndex":
        """The index of some of the samples, given by ascending numbers."""
        counts = np.diff(self.first)[rows]
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        member = np.repeat(self.first[rows] - first[:-1], counts) + np.arange(first[-1])
        keys = [self.key(i).encode("utf-8", "surrogateescape") for i in rows]
        arrays = {
            "shard": self.shard[rows],
            "first": first,
            "extension": self.extension[member],
            "offset": self.offset[member],
            "size": self.size[member],
            "key_end": np.cumsum([len(key) for key in keys], dtype=np.int64),
            "key_bytes": np.frombuffer(b"".join(keys), dtype=np.uint8),
        }
        return ShardIndex(self.shards, self.extensions, arrays)

    def having(self, extensions: Sequence[str]) -> np.ndarray:
        """Which samples (S,) have a member with one of these extensions."""
        wanted = [i for i, extension in enumerate(self.extensions) if extension in extensions]
        sample = np.repeat(np.arange(len(self)), np.diff(self.first))
        return np.bincount(sample[np.isin(self.extension, wanted)], minlength=len(self)) > 0

    def counts(self) -> list[int]:
        """Samples in each shard."""
        return np.bincount(self.shard, minlength=len(self.shards)).tolist()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every sample's key, place and size, and of the shards' names without their folders."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([[os.path.basename(s) for s in self.shards], self.extensions]).encode())
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return digest.hexdigest()

    def select(self, choice: str | Sequence[str]) -> "ShardIndex":
        """The samples with the given keys, or those whose `.json` fields fulfil an expression.

        Args:
            choice: a list of keys; the path of a text file with one key a line; or an expression such as
                `width >= 200 and licence in ["cc0", "cc-by"]` with names for fields, literals, comparisons, `and`,
                `or`, `not`, `in`. A sample without a field that the expression asks for is not selected.

        Raises:
            DataError: nothing is selected, a key is unknown, or the expression does not parse.
        """
        if isinstance(choice, str) and os.path.isfile(choice):
            where = f"select {choice}"
            choice = [line.strip() for line in Path(choice).read_text("utf-8").splitlines() if line.strip()]
        else:
            where = f"select {choice!r}" if isinstance(choice, str) else "select"
        if isinstance(choice, str):
            test = _expression(choice)
            rows = [i for i, sample in enumerate(self) if "json" in sample and test(sample.read_json())]
        else:
            wanted = set(choice)
            keys = [self.key(i) for i in range(len(self))]
            rows = [i for i, key in enumerate(keys) if key in wanted]
            if unknown := sorted(wanted - set(keys)):
                raise DataError(f"{where}: {len(unknown)} keys are in no shard, such as {unknown[0]!r}")
        if not rows:
            raise DataError(f"{where} selects none of {len(self)} samples")
        return self.take(np.array(rows, dtype=np.int64))

    def split(self, share: float) -> tuple["ShardIndex", "ShardIndex"]:
        """Two parts by image content: about `1 - share` and `share` of the samples.

        Which part a sample falls into depends on the bytes of its image alone, so the same picture never stands in
        both, and adding shards moves nothing. Of a large file a piece is read: equal files have equal pieces.

        Raises:
            DataError: one of the parts would be empty.
        """
        bound = int(share * 2**64)
        held = np.array([_content_number(sample) < bound for sample in self], dtype=bool)
        if not held.any() or held.all():
            raise DataError(f"val: {share} of {len(self)} samples leaves one side empty; give another share or shards")
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))


def _content_number(sample: Sample) -> int:
    extension = sample.image
    if extension is None:
        raise DataError(f"{sample}: no image among its members {sorted(sample.members)}")
    offset, size = sample.members[extension]
    piece = min(size, 8192)
    middle = Sample(sample.shard, sample.key, {extension: (offset + (size - piece) // 2, piece)})
    digest = hashlib.blake2b(middle.read(extension), digest_size=8, person=size.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files of an uncompressed tar."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.issparse():
                    raise DataError(f"shard {path}: {info.name!r} is stored sparse; pack it without --sparse")
                if info.isreg():
                    if info.offset_data + info.size > size:
                        raise DataError(f"shard {path} is cut off inside {info.name!r}")
                    yield info.name, info.offset_data, info.size
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile keeps every header it has seen
            file.seek(tar.offset)  # tarfile takes a header that is cut or broken for the end
            if (end := file.read(512)).strip(b"\0") or not end:
                raise DataError(f"shard {path} is cut off or broken at byte {tar.offset:,}: no tar header, no end mark")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"shard {path} cannot be read as an uncompressed tar ({error})") from None


_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


def _expression(text: str) -> Callable[[Any], bool]:
    """A test of a dict of fields, from a small part of Python's expressions: never `eval`."""

    def value(node: ast.expr, fields: Any) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return fields[node.id]
            case ast.List() | ast.Tuple():
                return [value(item, fields) for item in node.elts]
            case ast.UnaryOp(op=ast.Not()):
                return not value(node.operand, fields)
            case ast.UnaryOp(op=ast.USub()):
                return -value(node.operand, fields)
            case ast.BoolOp():
                parts = (value(item, fields) for item in node.values)
                return all(parts) if isinstance(node.op, ast.And) else any(parts)
            case ast.Compare() if all(type(op) in _COMPARE for op in node.ops):
                items = [value(item, fields) for item in (node.left, *node.comparators)]
                return all(_COMPARE[type(op)](*pair) for op, pair in zip(node.ops, pairwise(items), strict=True))
        raise AssertionError(node)

    def check(node: ast.expr) -> None:
        match node:
            case ast.Constant() | ast.Name() | ast.UnaryOp(op=ast.Not() | ast.USub()) | ast.BoolOp():
                pass
            case ast.List() | ast.Tuple():
                pass
            case ast.Compare() if all(type(op) in _COMPARE for op in node.ops):
                pass
            case _:
                raise DataError(f"select {text!r}: {ast.unparse(node)!r} is not understood; see ShardIndex.select")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                check(child)

    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise DataError(f"select {text!r} is neither a file of keys nor an expression ({error.msg})") from None

    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}

    def test(fields: Any) -> bool:
        if not isinstance(fields, dict) or not names <= fields.keys():
            return False
        try:
            return bool(value(tree, fields))
        except TypeError:  # not comparable: no match
            return False

    check(tree)  # an expression that is not understood fails here, before any sample is read
    return test
