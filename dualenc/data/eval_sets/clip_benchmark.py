"""Evaluation sets: a split with its images, and how the layout of a set is found by what the user names."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dualenc.data.eval_sets.base import NO_OPTIONS, SPLITS, Choices, Content, ImageSource, Problem, SetOptions
from dualenc.data.eval_sets.folders import class_folders, is_described, read_class_folders, read_table
from dualenc.data.eval_sets.known_sets import find_known, near_names
from dualenc.data.eval_sets.shard_sets import (
    ShardImages,
    files_url,
    is_pattern,
    names_shards,
    number_of_shards,
    read_layout,
    read_shards,
    set_name,
    shard_folders,
)
from dualenc.data.images import thumbnail
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.patterns import expand_shards
from dualenc.data.workers import item_loader, tensor_bytes
from dualenc.utils.arguments import shown_value
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.text import plural, printable
from dualenc.utils.urls import is_remote, join, shown

__all__ = ["Batch", "BenchmarkSet", "Choices", "Problem", "SetOptions"]
_Reader = Callable[[str, SetOptions], Content]  # from the name of a split


class Batch(NamedTuple):
    """A batch of images of a set."""

    rows: list[int]  # numbers of the b images that could be decoded
    images: Tensor | None  # (b, 3, S, S); None if b is 0
    bad: list[tuple[int, str]]  # numbers and errors of the other images


class Batches(Protocol):
    """A sized iterable of batches."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BenchmarkSet(Content):
    """A split of an evaluation set, opened by `BenchmarkSet.open`; see `Content` for its attributes.

    Attributes:
        path: folder, table or URL, for display.
        name: name of the folder or table.
        split: name of the split; "test" for sets without splits.
        options: options that the set was opened with.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from dualenc import BenchmarkSet, Preprocess
        >>> from dualenc.data.images import thumbnail
        >>> folder = tempfile.TemporaryDirectory()
        >>> for name in ("cat", "dog"):  # a folder of images for each class
        ...     path = Path(folder.name, name, "1.jpg")
        ...     path.parent.mkdir()
        ...     _ = path.write_bytes(thumbnail(torch.zeros(3, 32, 32, dtype=torch.uint8)))
        >>> data = BenchmarkSet.open(folder.name)
        >>> data.kind, data.classnames, data.targets
        ('classification', ['cat', 'dog'], tensor([0, 1]))
        >>> [batch.images.shape for batch in data.images(Preprocess(16))]
        [torch.Size([2, 3, 16, 16])]
        >>> folder.cleanup()
    """

    path: str
    name: str
    split: str
    options: SetOptions = NO_OPTIONS

    @classmethod
    def open(
        cls, data: str | os.PathLike[str], split: str | None = None, options: SetOptions = NO_OPTIONS
    ) -> "BenchmarkSet":
        """Read all of a split except its images.

        Args:
            data: one of

                - a folder in the layout of CLIP_benchmark (`<split>/nshards.txt`, `<split>/0.tar` ...,
                  `dataset_type.txt`, `classnames.txt`, `zeroshot_classification_templates.txt`), its URL, or its page
                  `https://huggingface.co/datasets/OWNER/NAME/tree/REV`;
                - the name of a well-known set in that layout; see `dualenc.data.eval_sets.known_sets`;
                - plain shards: a path, glob, brace pattern or URL, a folder of shards, or with one for each split;
                - a folder with a folder of images for each class, or with such a folder for each split;
                - a caption table as for `make_shards`, for retrieval;
                - the folder of Winoground's `examples.jsonl`, or a JSON of SugarCrepe, for choices.

                The images of tables and choices are searched for next to them.
            split: the split; absent, "test", or the only split.
            options: class names, templates, captions and images, where the set does not say them.

        Raises:
            DataError: If nothing can be measured: the set is none of these, lacks class names or templates, or no
                sample can be used. All other problems are in `problems`.
        """
        if not isinstance(data, str | os.PathLike):
            raise DataError(f"an evaluation set cannot be {shown_value(data)}: pass a path or a URL")
        location = os.fspath(data)
        try:
            return cls._open(location, split, options)
        except OSError as error:  # of a local folder or file
            raise DataError(f"{error.filename or location} cannot be read ({error.strerror})") from None

    @classmethod
    def _open(cls, location: str, split: str | None, options: SetOptions) -> "BenchmarkSet":
        found = _find(location, split, options)
        location, splits = found.location, found.splits
        if split is None:
            if "test" not in splits and len(splits) > 1:
                raise DataError(f"{shown(location)} has the splits {', '.join(splits)} but no test: name one of them")
            split = "test" if "test" in splits else splits[0]
        elif split not in splits:
            raise DataError(f"{shown(location)} has no split {split!r}, only {', '.join(splits)}")
        content = found.read(split, options)
        if not len(content.source):
            where = shown(join(location, split)) if len(splits) > 1 or split != "test" else shown(location)
            causes = ", ".join(f"{problem.what} {len(problem.names):,}" for problem in content.problems)
            example = next((problem.names[0] for problem in content.problems), "")
            raise DataError(
                f"{where} holds no samples that can be used{f' ({causes}), such as {example}' if example else ''}"
            )
        return cls(path=shown(location), name=found.name, split=split, options=options, **vars(content))

    @staticmethod
    def splits(data: str | os.PathLike[str], options: SetOptions = NO_OPTIONS) -> list[str]:
        """Return the splits of a set; of a remote set those of usual names, since not every store can be listed.

        Args:
            data: see `open`.
            options: options with which the set is opened, since they decide between a table and class folders.

        Raises:
            DataError: If `data` is not an evaluation set.
        """
        return _find(os.fspath(data), None, options, every=True).splits

    def __len__(self) -> int:
        """Return the number of images that can be used, as far as is known without decoding them."""
        return len(self.source)

    def __repr__(self) -> str:
        about = [self.kind, f"split {self.split}", plural(len(self), "image")]
        about += [f"{len(self.classnames):,} classes"] if self.classnames else []
        about += [plural(len(self.captions[0]), "caption")] if self.captions[0] else []
        about += ["incomplete, see problems"] if self.problems else []
        return f"BenchmarkSet({printable(self.name)}: {', '.join(about)})"

    @property
    def index(self) -> ShardIndex:
        """The index of the samples in their shards.

        Raises:
            DataError: If the set consists of loose files.
        """
        if not isinstance(self.source, ShardImages):
            raise DataError(f"{self.path} is a set of loose files, without shards")
        return self.source.index

    def key(self, i: int) -> str:
        """Return the name of image i: its key in its shard, or its file."""
        return self.source.key(i)

    def images(
        self,
        transform: Callable[[Tensor], Tensor],
        rows: Sequence[int] | np.ndarray | None = None,
        batch_size: int = 64,
        workers: int = 0,
    ) -> Batches:
        """Return an iterable of batches of all images in order, or of some.

        Args:
            transform: transform from uint8 (3, H, W) to (3, S, S).
            rows: numbers of the images; absent, all.
            batch_size: number of images of a batch, bad ones included.
            workers: number of processes that decode; 0 for none.

        Raises:
            DataError: (from the iteration) If a shard is gone. An image that cannot be decoded is in `Batch.bad`.
        """
        numbers = list(map(int, range(len(self)) if rows is None else rows))
        batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        size = batch_size * tensor_bytes(transform) if workers else 0
        return cast(Batches, item_loader(_Images(self.source, transform), batches, workers, batch_bytes=size))

    def thumbnail(self, i: int) -> bytes:
        """Encode image i for a page; see `dualenc.data.images.thumbnail`."""
        return thumbnail(self.source.decode(i))

    @cached_property
    def item_ids(self) -> np.ndarray:
        """Hashes of the images' bytes, (N,) uint64; for shards they are stored in the index."""
        return self.source.hashes()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the images, targets, captions and choices, independent of file names, class names and templates."""
        texts, owner = self.captions
        labels = [texts, owner.tolist(), self.texts, self.choices.images.tolist(), self.choices.texts.tolist()]
        content = [self.kind, self.item_ids.tolist(), self.targets.long().tolist(), labels]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


class _Images(Dataset[Batch]):
    """Data set of batches, by request of image numbers."""

    def __init__(self, source: ImageSource, transform: Callable[[Tensor], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, rows: list[int]) -> Batch:
        good, images, bad = [], [], []
        for row in rows:
            try:
                images.append(self.transform(self.source.decode(row)))
                good.append(row)
            except BadSample as error:
                bad.append((row, str(error)))
        return Batch(good, torch.stack(images) if images else None, bad)


# Layouts of a set


class _Found(NamedTuple):
    """A set that was found: its place, the name of its splits, and the function that reads a split."""

    location: str
    name: str
    splits: list[str]
    read: _Reader


def _find(location: str, split: str | None, options: SetOptions, every: bool = False) -> _Found:
    """Find a set and its splits.

    Args:
        location: folder, table, shards, URL or name of a known set.
        split: the split that is needed; absent, "test".
        options: options of the set.
        every: whether to find all splits of a remote set, not only the one that is needed.
    """
    if known := find_known(location, split or "test"):
        return _find(known[1].url, split, options, every)._replace(name=known[0])
    if not is_remote(location) and Path(location, "nshards.txt").is_file():  # a split of the layout of CLIP_benchmark
        whole = Path(os.path.abspath(location))  # the location may be "."
        return _find(str(whole.parent), split, options)._replace(splits=[whole.name])
    name = set_name(location)
    if names_shards(location) and not Path(location).is_dir():
        return _Found(location, name, ["test"], lambda _, given: read_shards(location, given))
    splits, read = _find_remote(location, split, every) if is_remote(location) else _find_local(location, options)
    return _Found(location, name, splits, read)


def _find_remote(location: str, split: str | None, every: bool) -> tuple[list[str], _Reader]:
    base = files_url(location)
    first = split or "test"
    if not every and number_of_shards(base, first) is not None:
        return [first], partial(read_layout, base)
    if splits := [name for name in SPLITS if number_of_shards(base, name) is not None]:
        return splits, partial(read_layout, base)
    hint = ""
    if not location.startswith("http"):  # Other stores can be listed.
        try:
            expand_shards(location)
            return ["test"], lambda _, given: read_shards(location, given)
        except DataError as error:
            hint = f"; {error}"
    raise DataError(
        f"{shown(location)} is not in the CLIP_benchmark layout: no <split>/nshards.txt there, or access is denied; "
        f"plain shards are named by their files, such as {{000000..000099}}.tar{hint}"
    )


def _find_local(location: str, options: SetOptions) -> tuple[list[str], _Reader]:
    path = Path(location)
    if not path.exists():
        if is_pattern(location):  # of tables, since shards were found before
            return ["test"], lambda _, given: read_table(path, given)
        raise DataError(f"evaluation set {path} does not exist{near_names(location)}")
    if splits := sorted(file.parent.name for file in path.glob("*/nshards.txt")):
        return splits, partial(read_layout, location)
    classes = class_folders(path) if path.is_dir() else {}
    if not path.is_dir() or (is_described(path) and not (classes and options.kind == "classification")):
        return ["test"], lambda _, given: read_table(path, given)
    if classes:
        return list(classes), partial(read_class_folders, path)
    if folders := shard_folders(path):
        return list(folders), lambda name, given: read_shards(str(folders[name]), given, location)
    if any(path.glob("*.parquet")):
        return ["test"], lambda _, given: read_table(path, given)
    raise DataError(
        f"{path} is not in the CLIP_benchmark layout: no <split>/nshards.txt in it; it also lacks shards, a folder of "
        "images for each class, a caption table, and examples.jsonl"
    )
