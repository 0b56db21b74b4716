"""Evaluation sets in shards: the layout of CLIP_benchmark, and plain shards.

What cannot be used is left out, and listed by shard and key.
"""

import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dualenc.data.eval_sets.base import SPLITS, Content, Kind, Problems, SetOptions, problem_list, read_text
from dualenc.data.eval_sets.class_texts import (
    CLASSNAMES,
    TEMPLATE_FILE,
    ClassTexts,
    check_count,
    class_texts,
    read_lines,
)
from dualenc.data.pairs import caption_members, captions_with_source, decode_sample, member_names, no_images
from dualenc.data.shards.index import Sample, ShardIndex
from dualenc.data.shards.patterns import SHARDS, expand_shards
from dualenc.data.shards.sample import image_members
from dualenc.data.shards.shard import hash_name
from dualenc.utils.decoding import is_blank, trimmed
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.text import plural
from dualenc.utils.urls import folder_of, is_remote, join, shown

KINDS = ("classification", "multilabel", "retrieval")  # of the layout
_ESCAPED = re.compile(r"\[([*?[])\]")  # a character that `glob.escape` has made literal
_HUB = re.compile(r"(https://huggingface\.co/datasets/([^/]+)/([^/]+))(?:/(?:tree|resolve|raw)/([^/]+)(/.*)?)?/?")


def files_url(url: str) -> str:
    """Convert the URL of a set's page on the Hugging Face hub to that of its files; others are returned unchanged."""
    if page := _HUB.fullmatch(shown(url)):
        return f"{page[1]}/resolve/{page[4] or 'main'}{page[5] or ''}"
    return url


def set_name(location: str) -> str:
    """Return the name of a set: that of its folder, repository or table, or of the folder of its shards."""
    if is_pattern(location):  # The folders before the first pattern, or of several shards, are the same for all shards.
        parts = shown(location).split("/")
        first = next(i for i, part in enumerate(parts) if has_magic(_ESCAPED.sub("", part)) or "{" in part)
        location = _ESCAPED.sub(r"\1", "/".join(parts[:first])) or "."
    elif re.search(r"(^|/)[0-9]+\.tar$", shown(location)):  # The number of a shard is not a name.
        location = shown(folder_of(location)) or "."
    if not is_remote(location):
        path = Path(location).resolve()
        return path.name if path.is_dir() else path.stem
    url = shown(location)
    on_hub = re.match(r"(?:https://huggingface\.co|hf:/)/datasets/[^/]+/([^/@]+)", url)
    return on_hub[1] if on_hub else url.rstrip("/").rpartition("/")[2].removesuffix(".tar")


# The layout of CLIP_benchmark


def number_of_shards(base: str, split: str) -> str | None:
    """Read `nshards.txt` of a split; None if it does not exist."""
    return read_text(join(base, f"{split}/nshards.txt"))


def read_layout(base: str, split: str, options: SetOptions) -> Content:
    """Read a split of a set in the layout of CLIP_benchmark.

    Args:
        base: folder or URL of the set.
        split: name of the split.
        options: the user's class names and templates.

    Raises:
        DataError: If a file of the layout is missing or wrong.
    """
    problems: Problems = defaultdict(list)
    text = read_text(join(base, "dataset_type.txt"))
    kind = "classification" if text is None else text.strip().lower()
    if kind not in KINDS:
        raise DataError(f"{shown(join(base, 'dataset_type.txt'))}: {kind[:40]!r} is not one of {', '.join(KINDS)}")
    texts = None if kind == "retrieval" else _texts_of_layout(base, options, problems)
    number = (number_of_shards(base, split) or "").strip()
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
    classes = 0 if texts is None else len(texts.classnames or [])
    read_label = {
        "classification": partial(_read_class, classes=classes),
        "multilabel": partial(_read_classes, classes=classes),
        "retrieval": caption_lines,
    }[kind]
    content = _content(cast(Kind, kind), index, read_label, problems)
    return content if texts is None else _with_texts(content, texts)


def _texts_of_layout(base: str, options: SetOptions, problems: Problems) -> ClassTexts:
    """Return class names and templates, all of which the layout has if the user names none."""
    texts = class_texts(base, options, problems, set_name(base))
    for found, name in ((texts.classnames is not None, CLASSNAMES), (texts.has_own, TEMPLATE_FILE)):
        if not found:
            raise DataError(f"{shown(base)} is not in the CLIP_benchmark layout: {name} is missing")
    own = join(base, CLASSNAMES)
    if options.classnames is not None and (names := read_lines(own)) is not None:
        check_count(texts.classnames or [], len(names), options, shown(own))
    return texts


# Plain shards


def is_pattern(location: str) -> bool:
    """Check whether a path or URL names several shards by a pattern."""
    path = shown(location)
    return (has_magic(path) or "{" in path) and (is_remote(location) or not os.path.exists(location))


def names_shards(location: str) -> bool:
    """Check whether a path or URL names shards, rather than a folder, table or page."""
    return shown(location).lower().endswith(SHARDS.endings) or (
        is_pattern(location) and not shown(location).lower().endswith(SHARDS.others)
    )


def holds_shards(folder: Path) -> bool:
    """Check whether shards lie directly in a folder."""
    return any(path.name.lower().endswith(SHARDS.endings) for path in folder.iterdir() if path.is_file())


def shard_folders(root: Path) -> dict[str, Path]:
    """Find the splits of plain shards: the folder itself as "test", or one folder for each split."""
    if holds_shards(root):
        return {"test": root}
    folders = {name: root / name for name in SPLITS if (root / name).is_dir()}
    return {name: folder for name, folder in folders.items() if holds_shards(folder)}


def read_shards(shards: str, options: SetOptions, texts_in: str | None = None) -> Content:
    """Read plain shards as a set for classification or retrieval.

    They are for classification if they have `.cls` and their classes have names, except if they have captions and no
    names; the option `kind` decides otherwise.

    Args:
        shards: pattern of the shards; see `dualenc.data.shards.patterns.find_files`.
        options: see `SetOptions`.
        texts_in: folder of `classnames.txt` and of the templates; None for that of the shards.

    Raises:
        DataError: If there are no shards, or they lack what the kind needs.
    """
    problems: Problems = defaultdict(list)
    paths = expand_shards(shards)
    index = _build_index(paths, problems, options.image)
    if len(index) and not index.having(index.images).any():
        raise no_images(index)
    source = options.captions
    has_class, has_captions = (bool(index.having(names).any()) for names in (["cls"], caption_members(source)))
    texts, wrong_texts = None, defaultdict(list)
    if has_class and options.kind != "retrieval":
        folder = texts_in or folder_of(paths[0]) or "."
        texts = class_texts(folder, options, wrong_texts, set_name(texts_in or shards))
    has_names = texts is not None and texts.classnames is not None
    kind = options.kind or ("classification" if has_class and (has_names or not has_captions) else "retrieval")
    if len(index):
        _require(has_class if kind == "classification" else has_captions, kind, index, source, shown(shards))
    if kind == "retrieval" or texts is None:
        content = _content(kind, index, partial(caption_lines, source=source), problems)
        return replace(content, takes=("captions", "image"))
    if not has_names:
        raise DataError(
            f"{shown(shards)}: the classes have no names: name a file with --classnames, one on each line in the order "
            f"of .cls, or put {CLASSNAMES} next to the shards"
        )
    content = _with_texts(_content(kind, index, _read_class, problems | wrong_texts), texts)
    _refuse_other_classes(content, options, shown(shards))
    return replace(content, takes=(*content.takes, "image"))


def _require(has_labels: bool, kind: Kind, index: ShardIndex, captions: str, where: str) -> None:
    """Refuse plain shards without the labels of a kind."""
    if has_labels:
        return
    among, there = f"among {plural(len(index), 'sample')}", member_names(index)
    if kind == "retrieval":
        way_out = "; `dualenc zeroshot` measures shards with .cls" if index.having(["cls"]).any() else ""
        expected = f"expected .{' or .'.join(caption_members(captions))}"
        raise DataError(f"{where}: no captions {among}; {expected}{there}: name their place with --captions{way_out}")
    way_out = "; `dualenc retrieval` measures shards with captions" if index.having(["txt", "json"]).any() else ""
    raise DataError(f"{where}: no .cls {among}{there}: classification needs the number of the class there{way_out}")


def _refuse_other_classes(content: Content, options: SetOptions, where: str) -> None:
    """Refuse class names that cannot be those of plain shards, since a class has no name."""
    count, last = len(content.classnames), int(content.targets.max()) if len(content.targets) else 0
    if last >= count:
        source = f"classnames {shown(options.classnames)}" if options.classnames else CLASSNAMES
        raise DataError(f"{where}: .cls has classes up to {last:,}, but {source} names only 0 to {count - 1:,}")


# Samples of both


def _content(kind: Kind, index: ShardIndex, read_label: Callable[[Sample], Any], problems: Problems) -> Content:
    """Read the labels of the samples, without class names and templates."""
    rows, labels = _read_labels(index, read_label, problems)
    return Content(
        kind=kind,
        source=ShardImages(index if len(rows) == len(index) else index.take(rows)),
        problems=problem_list(problems),
        **_gather_labels(kind, labels),
    )


def _with_texts(content: Content, texts: ClassTexts) -> Content:
    """Add class names and templates."""
    return replace(
        content,
        classnames=texts.classnames or [],
        templates=texts.templates,
        prompts=texts.prompts,
        takes=("classnames", "templates"),
    )


def _gather_labels(kind: str, labels: list[Any]) -> dict[str, Any]:
    """Gather the labels of all samples, by their name in `Content`."""
    if kind == "retrieval":
        owner = [i for i, captions in enumerate(labels) for _ in captions]
        return {"captions": ([caption for captions in labels for caption in captions], torch.tensor(owner).long())}
    return {"targets": torch.from_numpy(np.stack(labels)) if labels else torch.empty(0, dtype=torch.int64)}


def _build_index(paths: list[str], problems: Problems, image: str | None = None) -> ShardIndex:
    """Build the index of the shards that can be read; shards that are new or have changed are scanned."""
    unreadable: list[DataError] = []
    images = image_members(image)
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
    return ShardIndex([known[path] for path in paths if path in known], images=images)


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


def _read_class(sample: Sample, classes: int | None = None) -> np.ndarray:
    """Read the class of a sample, 0-d; any class that is not negative if their number is not given."""
    text = trimmed(sample.read_text("cls"))
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise BadSample(sample, ".cls is not a class number", repr(text[:40]))
    if int(text) < 0 or (classes is not None and int(text) >= classes):
        last = "" if classes is None else f" to {classes - 1}"
        raise BadSample(sample, "class out of range", f"{text} is not one of 0{last}")
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


def caption_lines(sample: Sample, source: str = "txt") -> list[str]:
    """Read the captions of a sample of an evaluation set; a text file has one on each line.

    Args:
        sample: the sample.
        source: place of the captions; see `captions_of`.

    Raises:
        BadSample: If there is no caption, or it is not a text.
    """
    captions, found = captions_with_source(sample, source)
    if "json" in found.split(".")[:-1]:  # a field, which may have any name
        return captions
    return [trimmed(line) for caption in captions for line in caption.split("\n") if not is_blank(line)]


class ShardImages:
    """Images of an index of shards; see `ImageSource`."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def key(self, i: int) -> str:
        """See `ImageSource`."""
        return self.index.key(i)

    def decode(self, i: int) -> Tensor:
        """See `ImageSource`."""
        return decode_sample(self.index[i])

    def hashes(self) -> np.ndarray:
        """See `ImageSource`."""
        parts, images = self.index.parts, self.index.images
        indexed = ShardIndex.build(
            [part.url for part in parts], image=";".join(images), hashes=("image",), unreadable=[]
        )
        known, name = {part.url: part for part in indexed.parts}, hash_name("image", images)
        hashed = [known[part.url] if part.url in known else part.with_hashes(name) for part in parts]
        return ShardIndex(hashed, self.index.rows, images).hashes("image")
