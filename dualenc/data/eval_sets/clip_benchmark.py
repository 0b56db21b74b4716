"""Evaluation sets: in the layout of CLIP_benchmark, here or elsewhere, or of loose files.

The layout is a folder of tar shards for each split, with names and templates beside them. What cannot be used of a set
is left out and listed, by shard and key.
"""

import hashlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dualenc.data.eval_sets.base import (
    CLASSNAMES,
    SPLITS,
    TEMPLATE_FILE,
    Choices,
    Content,
    Kind,
    Pictures,
    Problem,
    Problems,
    listed,
    read_classnames,
    read_templates,
    read_text,
)
from dualenc.data.eval_sets.folders import class_folders, is_described, read_class_folders, read_table
from dualenc.data.images import thumbnail
from dualenc.data.pairs import decode_sample
from dualenc.data.shards.index import Sample, ShardIndex
from dualenc.data.workers import each
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.urls import is_remote, join, shown

__all__ = ["Batch", "BenchmarkSet", "Choices", "Problem"]
KINDS = ("classification", "multilabel", "retrieval")  # of the layout
_HUB = re.compile(r"(https://huggingface\.co/datasets/([^/]+)/([^/]+))(?:/(?:tree|resolve|raw)/([^/]+)(/.*)?)?/?")


class Batch(NamedTuple):
    """Some images of a set."""

    rows: list[int]  # numbers of the b images that could be decoded
    images: Tensor | None  # (b, 3, S, S); None if b is 0
    bad: list[tuple[int, str]]  # numbers of the others, and what is wrong with each


class Batches(Protocol):
    """Batches, and how many."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BenchmarkSet(Content):
    """One split of an evaluation set; see `Content` for what it holds. Make one with `open`.

    Attributes:
        path: folder, table or URL, for people.
        name: of the folder or table.
        split: "test" where there are no splits.
    """

    path: str
    name: str
    split: str

    @classmethod
    def open(cls, data: str | os.PathLike[str], split: str | None = None) -> "BenchmarkSet":
        """Reads all of a split but its images.

        Args:
            data: a folder in the layout of CLIP_benchmark (`<split>/nshards.txt`, `<split>/0.tar` ...,
                `dataset_type.txt`, `classnames.txt`, `zeroshot_classification_templates.txt`), or its URL, or its page
                `https://huggingface.co/datasets/OWNER/NAME/tree/REV`; a folder with a folder of images for each class,
                or with such a folder for each split; a caption table as `make_shards` takes it, for retrieval; the
                folder of Winoground's `examples.jsonl`, or a JSON of SugarCrepe, for choices. Their images are looked
                for beside them.
            split: absent, "test", or the only split there is.

        Raises:
            DataError: nothing can be measured: it is none of these, or lacks names or templates, or no sample can be
                used. Whatever else is wrong is in `problems`.
        """
        place = os.fspath(data)
        try:
            return cls._open(place, split)
        except OSError as error:  # of a folder or file here
            raise DataError(f"{error.filename or place} cannot be read ({error.strerror})") from None

    @classmethod
    def _open(cls, place: str, split: str | None) -> "BenchmarkSet":
        splits, read = _found(place, split)
        if split is None:
            if "test" not in splits and len(splits) > 1:
                raise DataError(f"{shown(place)} has the splits {', '.join(splits)} and no test: name one")
            split = "test" if "test" in splits else splits[0]
        elif split not in splits:
            raise DataError(f"{shown(place)} has no split {split!r}, only {', '.join(splits)}")
        content = read(split)
        if not len(content.pictures):
            where = shown(join(place, split)) if len(splits) > 1 or split != "test" else shown(place)
            causes = ", ".join(f"{problem.what} {len(problem.names):,}" for problem in content.problems)
            some = next((problem.names[0] for problem in content.problems), "")
            raise DataError(
                f"{where} holds no samples that can be used{f' ({causes}), such as {some}' if some else ''}"
            )
        return cls(path=shown(place), name=_name(place), split=split, **vars(content))

    @staticmethod
    def splits(data: str | os.PathLike[str]) -> list[str]:
        """The splits of a set; of one elsewhere those of usual names, as not every store can be listed.

        Raises:
            DataError: it is no evaluation set.
        """
        return _found(os.fspath(data), None, every=True)[0]

    def __len__(self) -> int:
        """Images that can be used, as far as is known without decoding them."""
        return len(self.pictures)

    @property
    def index(self) -> ShardIndex:
        """Where the samples lie in their shards.

        Raises:
            DataError: it is a set of loose files.
        """
        if not isinstance(self.pictures, _InShards):
            raise DataError(f"{self.path} is a set of loose files, and no shards")
        return self.pictures.index

    def key(self, i: int) -> str:
        """What image i is called: its key in its shard, or the file."""
        return self.pictures.key(i)

    def images(
        self,
        transform: Callable[[Tensor], Tensor],
        rows: Sequence[int] | np.ndarray | None = None,
        batch_size: int = 64,
        workers: int = 0,
    ) -> Batches:
        """Batches of all images in order, or of some.

        Args:
            transform: uint8 (3, H, W) to (3, S, S).
            rows: numbers of the images.
            batch_size: images that a batch asks for.
            workers: processes that decode.

        Raises:
            DataError: (from the iteration) a shard is gone. An image that cannot be decoded is in its batch's `bad`.
        """
        numbers = list(map(int, range(len(self)) if rows is None else rows))
        batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        return cast(Batches, each(_Images(self.pictures, transform), batches, workers))

    def thumbnail(self, i: int) -> bytes:
        """Image i for a page; see `dualenc.data.images.thumbnail`."""
        return thumbnail(self.pictures.decode(i))

    @cached_property
    def item_ids(self) -> np.ndarray:
        """(N,) uint64, hashes of the images' bytes; of shards they are kept in the index."""
        return self.pictures.hashes()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images and of what is asked of them, but of no name of a file or class, and no template."""
        texts, owner = self.captions
        asked = [texts, owner.tolist(), self.texts, self.choices.images.tolist(), self.choices.texts.tolist()]
        whole = [self.kind, self.item_ids.tolist(), self.targets.long().tolist(), asked]
        return hashlib.blake2b(json.dumps(whole).encode(), digest_size=16).hexdigest()


class _Images(Dataset[Batch]):
    """Asked for a batch at a time."""

    def __init__(self, pictures: Pictures, transform: Callable[[Tensor], Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __getitem__(self, rows: list[int]) -> Batch:
        good, images, bad = [], [], []
        for row in rows:
            try:
                images.append(self.transform(self.pictures.decode(row)))
                good.append(row)
            except BadSample as error:
                bad.append((row, str(error)))
        return Batch(good, torch.stack(images) if images else None, bad)


# What there is


def _found(place: str, split: str | None, every: bool = False) -> tuple[list[str], Callable[[str], Content]]:
    """The splits of a set, and what reads one.

    Of a set elsewhere the split that is asked for, or else the test, is enough, unless every one is wanted.
    """
    if is_remote(place):
        base = _files_of(place)
        first = split or "test"
        if not every and _number_of_shards(base, first) is not None:
            return [first], partial(_read_layout, base)
        splits = [name for name in SPLITS if _number_of_shards(base, name) is not None]
        if not splits:
            raise DataError(
                f"{shown(place)} is not in the CLIP_benchmark layout: no <split>/nshards.txt there, or it is not for "
                "you to see"
            )
        return splits, partial(_read_layout, base)
    path = Path(place)
    if not path.exists():
        raise DataError(f"evaluation set {path} does not exist")
    if splits := sorted(file.parent.name for file in path.glob("*/nshards.txt")):
        return splits, partial(_read_layout, place)
    if not path.is_dir() or is_described(path):
        return ["test"], lambda _: read_table(path)
    if splits := list(class_folders(path)):
        return splits, partial(read_class_folders, path)
    raise DataError(
        f"{path} is not in the CLIP_benchmark layout: no <split>/nshards.txt in it; nor are there a folder of images "
        "for each class, a caption table, or examples.jsonl"
    )


def _files_of(url: str) -> str:
    """Where the files lie whose page on the Hugging Face hub this may be."""
    if page := _HUB.fullmatch(shown(url)):
        return f"{page[1]}/resolve/{page[4] or 'main'}{page[5] or ''}"
    return url


def _name(place: str) -> str:
    if not is_remote(place):
        path = Path(place).resolve()
        return path.name if path.is_dir() else path.stem
    url = shown(place)
    on_hub = re.match(r"(?:https://huggingface\.co|hf:/)/datasets/[^/]+/([^/@]+)", url)
    return on_hub[1] if on_hub else url.rstrip("/").rpartition("/")[2]


# The layout


def _number_of_shards(base: str, split: str) -> str | None:
    """What `nshards.txt` says."""
    return read_text(join(base, f"{split}/nshards.txt"))


def _read_layout(base: str, split: str) -> Content:
    problems: Problems = defaultdict(list)
    text = read_text(join(base, "dataset_type.txt"))
    kind = "classification" if text is None else text.strip().lower()
    if kind not in KINDS:
        raise DataError(f"{shown(join(base, 'dataset_type.txt'))}: {kind[:40]!r} is none of {', '.join(KINDS)}")
    classnames, templates = None, None
    if kind != "retrieval":
        classnames = read_classnames(join(base, CLASSNAMES), problems)
        templates = read_templates(join(base, TEMPLATE_FILE), problems)
        for found, name in ((classnames, CLASSNAMES), (templates, TEMPLATE_FILE)):
            if found is None:
                raise DataError(f"{shown(base)} is not in the CLIP_benchmark layout: {name} is missing")
    number = (_number_of_shards(base, split) or "").strip()
    if not re.fullmatch("[0-9]{1,6}", number) or int(number) == 0:
        raise DataError(f"{shown(join(base, f'{split}/nshards.txt'))}: {number[:40]!r} is no number of shards")
    paths = [join(base, f"{split}/{i}.tar") for i in range(int(number))]
    there: list[str] = []
    for path in paths:
        if is_remote(path) or os.path.isfile(path):
            there.append(path)
        else:
            problems["shard missing"].append(f"{path}; nshards.txt promises {number} shards")
    index = _index(there, problems)
    _compare(join(base, split), index, problems)
    label = {
        "classification": partial(_class_of, classes=len(classnames or [])),
        "multilabel": partial(_classes_of, classes=len(classnames or [])),
        "retrieval": _captions_of,
    }[kind]
    rows, labels = _labelled(index, label, problems)
    return Content(
        kind=cast(Kind, kind),
        pictures=_InShards(index if len(rows) == len(index) else index.take(rows)),
        problems=listed(problems),
        classnames=classnames or [],
        templates=templates or [],
        **_put_together(kind, labels),
    )


def _put_together(kind: str, labels: list[Any]) -> dict[str, Any]:
    """The labels of all samples, by their name in `Content`."""
    if kind == "retrieval":
        owner = [i for i, captions in enumerate(labels) for _ in captions]
        return {"captions": ([caption for captions in labels for caption in captions], torch.tensor(owner).long())}
    return {"targets": torch.from_numpy(np.stack(labels)) if labels else torch.empty(0, dtype=torch.int64)}


def _index(paths: list[str], problems: Problems) -> ShardIndex:
    """The index of the shards that can be read. What is not known yet, or no longer as it is, is scanned."""
    unreadable: list[DataError] = []
    try:
        parts = ShardIndex.build(paths, unreadable=unreadable).parts if paths else []
    except DataError:  # the index itself is damaged
        parts = []
    known = {part.url: part for part in parts}
    if others := [path for path in paths if path not in known]:
        unreadable.clear()
        known |= {part.url: part for part in ShardIndex.build(others, anew=True, unreadable=unreadable).parts}
    if unreadable:
        problems["shard cannot be read"] += map(str, unreadable)
    return ShardIndex([known[path] for path in paths if path in known])


def _compare(folder: str, index: ShardIndex, problems: Problems) -> None:
    """Counts against what `sizes.json` (samples of each shard) or `__len__` (of all) promise, as open_clip has them."""
    wrong = problems["other number of samples than promised"]
    for name in ("sizes.json", "__len__"):
        path = join(folder, name)
        text = read_text(path)
        if text is None:
            continue
        try:
            promised = json.loads(text)
            if name == "__len__":
                if int(promised) != len(index):
                    wrong.append(f"{shown(folder)}: {len(index):,} in place of {int(promised):,} ({name})")
                continue
            for part in index.parts:
                size = promised.get(part.facts["name"], len(part))
                if int(size) != len(part):
                    wrong.append(f"{part}: {len(part):,} in place of {int(size):,} ({name})")
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            problems["promise of samples not understood"].append(shown(path))


def _labelled(index: ShardIndex, label: Callable[[Sample], Any], problems: Problems) -> tuple[np.ndarray, list[Any]]:
    """The numbers of the samples that have an image and a label, and the labels."""
    labels: dict[int, Any] = {}
    lost: set[str] = set()
    for row, sample in enumerate(index):
        if sample.source.url in lost:
            continue
        try:
            if sample.image is None:
                raise BadSample(sample, "no image among its members", ", ".join(sorted(sample.members)))
            labels[row] = label(sample)
        except BadSample as error:
            problems[error.cause].append(str(error))
        except DataError as error:  # one elsewhere that is fetched now
            problems["shard cannot be read"].append(str(error))
            lost.add(sample.source.url)
    rows = [row for row in labels if not lost or index.find(row)[0].url not in lost]
    return np.array(rows, np.int64), [labels[row] for row in rows]


def _class_of(sample: Sample, classes: int) -> np.ndarray:
    text = sample.read("cls").decode("utf-8", "replace").strip()
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise BadSample(sample, ".cls is no class number", repr(text[:40]))
    if not 0 <= int(text) < classes:
        raise BadSample(sample, "class out of range", f"{text} is none of 0 to {classes - 1}")
    return np.array(int(text))


def _classes_of(sample: Sample, classes: int) -> np.ndarray:
    data = sample.read("npy")
    try:
        label = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False).reshape(-1)
    except Exception as error:  # numpy raises nearly everything on broken data
        raise BadSample(sample, ".npy cannot be read", str(error)) from None
    if label.dtype.kind not in "biuf" or not np.isfinite(label).all():
        raise BadSample(sample, ".npy holds other things than numbers", str(label.dtype))
    if len(label) != classes:
        raise BadSample(sample, "labels for another number of classes", f"{len(label)} for {classes}")
    return label != 0


def _captions_of(sample: Sample) -> list[str]:
    try:
        lines = [line.strip() for line in sample.read("txt").decode("utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise BadSample(sample, ".txt is not UTF-8", str(error)) from None
    if not any(lines):
        raise BadSample(sample, "no caption in its .txt")
    return [line for line in lines if line]


class _InShards:
    """The images of an index."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def key(self, i: int) -> str:
        return self.index.key(i)

    def decode(self, i: int) -> Tensor:
        return decode_sample(self.index[i])

    def hashes(self) -> np.ndarray:
        parts = self.index.parts
        kept = ShardIndex.build([part.url for part in parts], hashes=("image",), unreadable=[])
        known = {part.url: part for part in kept.parts}
        hashed = [known[part.url] if part.url in known else part.hashed("image") for part in parts]
        return ShardIndex(hashed, self.index.rows).hashes("image")
