"""Evaluation sets, local or remote, in the layout of CLIP_benchmark or of loose files.

The layout is a folder of tar shards for each split, with files of class names and templates next to the folders. What
cannot be used is left out, and listed by shard and key.
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
    ImageSource,
    Kind,
    Problem,
    Problems,
    problem_list,
    read_classnames,
    read_templates,
    read_text,
)
from dualenc.data.eval_sets.folders import class_folders, is_described, read_class_folders, read_table
from dualenc.data.images import thumbnail
from dualenc.data.pairs import decode_sample
from dualenc.data.shards.index import Sample, ShardIndex
from dualenc.data.workers import item_loader, tensor_bytes
from dualenc.utils.arguments import shown_value
from dualenc.utils.decoding import is_blank, trimmed
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.text import plural, printable
from dualenc.utils.urls import is_remote, join, shown

__all__ = ["Batch", "BenchmarkSet", "Choices", "Problem"]
KINDS = ("classification", "multilabel", "retrieval")  # of the layout
_HUB = re.compile(r"(https://huggingface\.co/datasets/([^/]+)/([^/]+))(?:/(?:tree|resolve|raw)/([^/]+)(/.*)?)?/?")


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

    @classmethod
    def open(cls, data: str | os.PathLike[str], split: str | None = None) -> "BenchmarkSet":
        """Read all of a split except its images.

        Args:
            data: one of

                - a folder in the layout of CLIP_benchmark (`<split>/nshards.txt`, `<split>/0.tar` ...,
                  `dataset_type.txt`, `classnames.txt`, `zeroshot_classification_templates.txt`), its URL, or its page
                  `https://huggingface.co/datasets/OWNER/NAME/tree/REV`;
                - a folder with a folder of images for each class, or with such a folder for each split;
                - a caption table as for `make_shards`, for retrieval;
                - the folder of Winoground's `examples.jsonl`, or a JSON of SugarCrepe, for choices.

                The images of tables and choices are searched for next to them.
            split: the split; absent, "test", or the only split.

        Raises:
            DataError: If nothing can be measured: the set is none of these, lacks class names or templates, or no
                sample can be used. All other problems are in `problems`.
        """
        if not isinstance(data, str | os.PathLike):
            raise DataError(f"an evaluation set cannot be {shown_value(data)}: pass a path or a URL")
        location = os.fspath(data)
        try:
            return cls._open(location, split)
        except OSError as error:  # of a local folder or file
            raise DataError(f"{error.filename or location} cannot be read ({error.strerror})") from None

    @classmethod
    def _open(cls, location: str, split: str | None) -> "BenchmarkSet":
        splits, read = _find_splits(location, split)
        if split is None:
            if "test" not in splits and len(splits) > 1:
                raise DataError(f"{shown(location)} has the splits {', '.join(splits)} but no test: name one of them")
            split = "test" if "test" in splits else splits[0]
        elif split not in splits:
            raise DataError(f"{shown(location)} has no split {split!r}, only {', '.join(splits)}")
        content = read(split)
        if not len(content.source):
            where = shown(join(location, split)) if len(splits) > 1 or split != "test" else shown(location)
            causes = ", ".join(f"{problem.what} {len(problem.names):,}" for problem in content.problems)
            example = next((problem.names[0] for problem in content.problems), "")
            raise DataError(
                f"{where} holds no samples that can be used{f' ({causes}), such as {example}' if example else ''}"
            )
        return cls(path=shown(location), name=_set_name(location), split=split, **vars(content))

    @staticmethod
    def splits(data: str | os.PathLike[str]) -> list[str]:
        """Return the splits of a set; of a remote set those of usual names, since not every store can be listed.

        Raises:
            DataError: If `data` is not an evaluation set.
        """
        return _find_splits(os.fspath(data), None, every=True)[0]

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
        if not isinstance(self.source, _ShardImages):
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


def _find_splits(location: str, split: str | None, every: bool = False) -> tuple[list[str], Callable[[str], Content]]:
    """Find the splits of a set.

    Args:
        location: folder, table or URL.
        split: the split that is needed; absent, "test".
        every: whether to find all splits of a remote set, not only the one that is needed.

    Returns:
        The names of the splits, and the function that reads a split.
    """
    if is_remote(location):
        base = _files_url(location)
        first = split or "test"
        if not every and _number_of_shards(base, first) is not None:
            return [first], partial(_read_layout, base)
        splits = [name for name in SPLITS if _number_of_shards(base, name) is not None]
        if not splits:
            raise DataError(
                f"{shown(location)} is not in the CLIP_benchmark layout: no <split>/nshards.txt there, or access is "
                "denied"
            )
        return splits, partial(_read_layout, base)
    path = Path(location)
    if not path.exists():
        raise DataError(f"evaluation set {path} does not exist")
    if splits := sorted(file.parent.name for file in path.glob("*/nshards.txt")):
        return splits, partial(_read_layout, location)
    if not path.is_dir() or is_described(path):
        return ["test"], lambda _: read_table(path)
    if splits := list(class_folders(path)):
        return splits, partial(read_class_folders, path)
    raise DataError(
        f"{path} is not in the CLIP_benchmark layout: no <split>/nshards.txt in it; it also lacks a folder of images "
        "for each class, a caption table, and examples.jsonl"
    )


def _files_url(url: str) -> str:
    """Convert the URL of a set's page on the Hugging Face hub to that of its files; others are returned unchanged."""
    if page := _HUB.fullmatch(shown(url)):
        return f"{page[1]}/resolve/{page[4] or 'main'}{page[5] or ''}"
    return url


def _set_name(location: str) -> str:
    if not is_remote(location):
        path = Path(location).resolve()
        return path.name if path.is_dir() else path.stem
    url = shown(location)
    on_hub = re.match(r"(?:https://huggingface\.co|hf:/)/datasets/[^/]+/([^/@]+)", url)
    return on_hub[1] if on_hub else url.rstrip("/").rpartition("/")[2]


# The layout of CLIP_benchmark


def _number_of_shards(base: str, split: str) -> str | None:
    """Read `nshards.txt` of a split; None if it does not exist."""
    return read_text(join(base, f"{split}/nshards.txt"))


def _read_layout(base: str, split: str) -> Content:
    problems: Problems = defaultdict(list)
    text = read_text(join(base, "dataset_type.txt"))
    kind = "classification" if text is None else text.strip().lower()
    if kind not in KINDS:
        raise DataError(f"{shown(join(base, 'dataset_type.txt'))}: {kind[:40]!r} is not one of {', '.join(KINDS)}")
    classnames, templates = None, None
    if kind != "retrieval":
        classnames = read_classnames(join(base, CLASSNAMES), problems)
        templates = read_templates(join(base, TEMPLATE_FILE), problems)
        for found, name in ((classnames, CLASSNAMES), (templates, TEMPLATE_FILE)):
            if found is None:
                raise DataError(f"{shown(base)} is not in the CLIP_benchmark layout: {name} is missing")
    number = (_number_of_shards(base, split) or "").strip()
    if not re.fullmatch("[0-9]{1,6}", number) or int(number) == 0:
        raise DataError(f"{shown(join(base, f'{split}/nshards.txt'))}: {number[:40]!r} is not a number of shards")
    paths = [join(base, f"{split}/{i}.tar") for i in range(int(number))]
    existing: list[str] = []
    for path in paths:
        if is_remote(path) or os.path.isfile(path):
            existing.append(path)
        else:
            problems["shard missing"].append(f"{path}; nshards.txt declares {number} shards")
    index = _build_index(existing, problems)
    _check_counts(join(base, split), index, problems)
    read_label = {
        "classification": partial(_read_class, classes=len(classnames or [])),
        "multilabel": partial(_read_classes, classes=len(classnames or [])),
        "retrieval": caption_lines,
    }[kind]
    rows, labels = _read_labels(index, read_label, problems)
    return Content(
        kind=cast(Kind, kind),
        source=_ShardImages(index if len(rows) == len(index) else index.take(rows)),
        problems=problem_list(problems),
        classnames=classnames or [],
        templates=templates or [],
        **_gather_labels(kind, labels),
    )


def _gather_labels(kind: str, labels: list[Any]) -> dict[str, Any]:
    """Gather the labels of all samples, by their name in `Content`."""
    if kind == "retrieval":
        owner = [i for i, captions in enumerate(labels) for _ in captions]
        return {"captions": ([caption for captions in labels for caption in captions], torch.tensor(owner).long())}
    return {"targets": torch.from_numpy(np.stack(labels)) if labels else torch.empty(0, dtype=torch.int64)}


def _build_index(paths: list[str], problems: Problems) -> ShardIndex:
    """Build the index of the shards that can be read; shards that are new or have changed are scanned."""
    unreadable: list[DataError] = []
    try:
        parts = ShardIndex.build(paths, unreadable=unreadable).parts if paths else []
    except DataError:  # The index file itself is damaged.
        parts = []
    known = {part.url: part for part in parts}
    if others := [path for path in paths if path not in known]:
        unreadable.clear()
        known |= {part.url: part for part in ShardIndex.build(others, rescan=True, unreadable=unreadable).parts}
    if unreadable:
        problems["shard cannot be read"] += map(str, unreadable)
    return ShardIndex([known[path] for path in paths if path in known])


def _check_counts(folder: str, index: ShardIndex, problems: Problems) -> None:
    """Compare the numbers of samples with open_clip's `sizes.json` (of each shard) and `__len__` (of all shards)."""
    wrong = problems["unexpected number of samples"]
    for name in ("sizes.json", "__len__"):
        path = join(folder, name)
        text = read_text(path)
        if text is None:
            continue
        try:
            expected = json.loads(text)
            if name == "__len__":
                if int(expected) != len(index):
                    wrong.append(f"{shown(folder)}: {len(index):,}, expected {int(expected):,} ({name})")
                continue
            for part in index.parts:
                size = expected.get(part.facts["name"], len(part))
                if int(size) != len(part):
                    wrong.append(f"{part}: {len(part):,}, expected {int(size):,} ({name})")
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            problems["invalid number of samples"].append(shown(path))


def _read_labels(
    index: ShardIndex, read_label: Callable[[Sample], Any], problems: Problems
) -> tuple[np.ndarray, list[Any]]:
    """Return the numbers of the samples that have an image and a label, and the labels."""
    labels: dict[int, Any] = {}
    lost: set[str] = set()  # URLs of shards that cannot be read
    for row, sample in enumerate(index):
        if sample.source.url in lost:
            continue
        try:
            if sample.image is None:
                raise BadSample(sample, "no image among its members", ", ".join(sorted(sample.members)))
            labels[row] = read_label(sample)
        except BadSample as error:
            problems[error.cause].append(str(error))
        except DataError as error:  # A remote shard is downloaded only now.
            problems["shard cannot be read"].append(str(error))
            lost.add(sample.source.url)
    rows = [row for row in labels if not lost or index.find(row)[0].url not in lost]
    return np.array(rows, np.int64), [labels[row] for row in rows]


def _read_class(sample: Sample, classes: int) -> np.ndarray:
    """Read the class of a sample, 0-d."""
    text = trimmed(sample.read_text("cls"))
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise BadSample(sample, ".cls is not a class number", repr(text[:40]))
    if not 0 <= int(text) < classes:
        raise BadSample(sample, "class out of range", f"{text} is not one of 0 to {classes - 1}")
    return np.array(int(text))


def _read_classes(sample: Sample, classes: int) -> np.ndarray:
    """Read the labels of a multilabel sample, (C,) bool."""
    data = sample.read("npy")
    try:
        label = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False).reshape(-1)
    except Exception as error:  # numpy raises nearly any error on broken data.
        raise BadSample(sample, ".npy cannot be read", str(error)) from None
    if label.dtype.kind not in "biuf" or not np.isfinite(label).all():
        raise BadSample(sample, ".npy does not hold finite numbers", str(label.dtype))
    if len(label) != classes:
        raise BadSample(sample, "wrong number of labels", f"{len(label)} for {classes} classes")
    return label != 0


def caption_lines(sample: Sample) -> list[str]:
    """Read the captions of a sample of a retrieval set, one on each line of its .txt; blank lines are left out.

    Raises:
        BadSample: If there is no caption, or the .txt is not a text.
    """
    lines = [trimmed(line) for line in sample.read_text("txt").split("\n") if not is_blank(line)]
    if not lines:
        raise BadSample(sample, "no caption in its .txt")
    return lines


class _ShardImages:
    """The images of an index of shards; see `ImageSource`."""

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
        indexed = ShardIndex.build([part.url for part in parts], hashes=("image",), unreadable=[])
        known = {part.url: part for part in indexed.parts}
        hashed = [known[part.url] if part.url in known else part.with_hashes("image") for part in parts]
        return ShardIndex(hashed, self.index.rows).hashes("image")
