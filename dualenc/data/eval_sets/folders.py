"""Evaluation sets of image files outside of shards: class folders, caption tables, and sets of choices."""

import json
import os
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dualenc.data.eval_sets.base import SPLITS, Choices, Content, ImageFiles, Problems, SetOptions, problem_list
from dualenc.data.eval_sets.class_texts import CLASSNAMES, check_count, class_texts, note_duplicates
from dualenc.data.prepare.caption_sources import (
    caption_problem,
    class_name,
    clean,
    json_lines,
    read_source,
    tables_in,
)
from dualenc.data.prepare.pictures import PictureFiles, path_inside
from dualenc.data.shards.shard import IMAGE_EXTENSIONS
from dualenc.utils.decoding import read_text, trimmed
from dualenc.utils.errors import DataError

# Class folders


def class_folders(root: Path) -> dict[str, Path]:
    """Find the splits of a set of class folders: the folder itself as "test", or one folder for each split.

    Returns:
        The folder of each split; empty if `root` has no class folders.
    """
    if any(map(_has_image, _subfolders(root))):
        return {"test": root}
    folders = {name: root / name for name in SPLITS if (root / name).is_dir()}
    return {name: folder for name, folder in folders.items() if any(map(_has_image, _subfolders(folder)))}


def read_class_folders(root: Path, split: str, options: SetOptions) -> Content:
    """Read a classification set with a folder for each class.

    The classes are the folder names of all splits, in sorted order.

    Args:
        root: folder of the class folders, or of the splits.
        split: name of the split.
        options: the user's class names and templates.

    Raises:
        DataError: If there are fewer than two class folders, or another number of class names.
    """
    problems: Problems = defaultdict(list)
    splits = class_folders(root)
    folders = sorted({folder.name for split_folder in splits.values() for folder in _subfolders(split_folder)})
    if len(folders) < 2:
        tables = ", ".join(sorted(path.name for path in root.iterdir() if path.suffix in (".json", ".jsonl", ".csv")))
        hint = f"; if a table next to it describes the images, name the table: {tables}" if tables else ""
        raise DataError(f"{root} has one folder with images, {folders[0]}: it needs a folder for each class{hint}")
    texts = class_texts(str(root), options, problems, root.resolve().name)
    names = texts.classnames
    if names is None:
        names = list(map(class_name, folders))
        note_duplicates(names, problems)
    check_count(names, len(folders), options, str(root))
    if len(names) != len(folders):
        raise DataError(
            f"{root / CLASSNAMES} has {len(names)} lines for {len(folders)} class folders: it needs one for each, "
            "in sorted order"
        )
    paths, keys, targets = [], [], []
    for number, name in enumerate(folders):
        folder = splits[split] / name
        images, others = _list_files(folder) if folder.is_dir() else ([], [])
        if others:
            problems[f"not a .{', .'.join(IMAGE_EXTENSIONS)} in a class folder"] += [
                clean(f"{folder}/{file}") for file in others
            ]
        if not images:
            problems["class folder without images"].append(clean(str(folder)))
        paths += [f"{folder}/{file}" for file in images]
        keys += [f"{name}/{file}" for file in images]
        targets += [number] * len(images)
    return Content(
        kind="classification",
        source=ImageFiles(paths, keys),
        problems=problem_list(problems),
        classnames=names,
        templates=texts.templates,
        prompts=texts.prompts,
        targets=torch.tensor(targets, dtype=torch.int64),
        takes=("classnames", "templates"),
    )


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _list_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the images in a folder, and of all other entries that are not hidden."""
    with os.scandir(folder) as found:
        entries = {entry.name: _is_image(entry) for entry in found if not entry.name.startswith(".")}
    return sorted(name for name in entries if entries[name]), sorted(name for name in entries if not entries[name])


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS and entry.is_file()


def _has_image(folder: Path) -> bool:
    with os.scandir(folder) as found:
        return any(_is_image(entry) for entry in found if not entry.name.startswith("."))


# Tables


def is_described(folder: Path) -> bool:
    """Check whether a folder holds a table for `read_table`."""
    return (folder / "examples.jsonl").is_file() or bool(tables_in(folder))


def read_table(path: Path, options: SetOptions) -> Content:
    """Read a caption table as a retrieval set, or a table of Winoground or SugarCrepe as a set of choices.

    Args:
        path: path of the table, or of a folder that holds one, or a pattern of Parquet tables.
        options: the user's folder of images.

    Raises:
        DataError: If the table is not understood, or its images are not found.
    """
    table = path / "examples.jsonl" if (path / "examples.jsonl").is_file() else path
    if rows := _winoground(table) or _sugar_crepe(table):
        return _read_choices(table, rows)
    source = read_source(table, options.images, None, None, None)
    if not isinstance(source.pictures, PictureFiles):
        raise DataError(
            f"{table} has its images inside: write them to shards with `dualenc make-shards {shlex.quote(str(table))} "
            "OUT`, and measure on OUT"
        )
    problems: Problems = defaultdict(list)
    for what, name in source.left_out:
        problems[what].append(name)
    files, keys, texts, owner = [], [], [], []
    for item in source.items:
        file = path_inside(source.images, item.image)
        if file is None or not os.path.isfile(file):
            problems["image missing" if file else "image outside of its folder"].append(clean(item.image))
            continue
        texts += item.captions
        owner += [len(files)] * len(item.captions)
        files.append(file)
        keys.append(item.image)
    return Content(
        kind="retrieval",
        source=ImageFiles(files, keys),
        problems=problem_list(problems),
        captions=(texts, torch.tensor(owner, dtype=torch.int64)),
        takes=("images",),
    )


# Key, one or two image names, and two captions of an instance; None for rows that are not understood.
_Row = tuple[str, list[Any], list[Any]] | tuple[str, None, None]


def _winoground(table: Path) -> Iterator[_Row] | None:
    """Return the rows of Winoground's `examples.jsonl`; None for other tables."""
    fields = ("image_0", "image_1", "caption_0", "caption_1")

    def row(line: str, record: dict[str, Any] | None) -> _Row:
        if record is None or not record.keys() >= set(fields):
            return line, None, None
        values = [record[name] for name in fields]
        return str(record.get("id", line)), values[:2], values[2:]

    if table.suffix.lower() not in (".jsonl", ".ndjson"):
        return None
    first = next((record for _, record in json_lines(table) if record is not None), {})
    if not first.keys() >= set(fields):
        return None
    return (row(*record) for record in json_lines(table))


def _sugar_crepe(table: Path) -> Iterator[_Row] | None:
    """Return the rows of a `.json` of SugarCrepe, in order; None for other tables."""
    fields = ("filename", "caption", "negative_caption")

    def row(key: str, record: Any) -> _Row:
        if not isinstance(record, dict) or not record.keys() >= set(fields):
            return key, None, None
        return key, [record["filename"]], [record["caption"], record["negative_caption"]]

    if table.suffix.lower() != ".json":
        return None
    try:
        content = json.loads(read_text(table))
    except (ValueError, RecursionError):  # The reader of the other tables will report the error.
        return None
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    first = next((record for _, record in items if isinstance(record, dict)), {})
    if "negative_caption" not in first:
        return None
    items = content.items() if isinstance(content, dict) else enumerate(content)
    return (row(str(key), record) for key, record in items)


def _read_choices(table: Path, rows: Iterator[_Row]) -> Content:
    """Read a set of choices; instances that lack an image or have a bad caption are problems of the set.

    An image or a text that several instances share is listed once.
    """
    problems: Problems = defaultdict(list)
    root = os.path.dirname(os.path.abspath(table))
    folders = [os.path.normpath(os.path.join(root, name)) for name in _IMAGE_FOLDERS]
    files: dict[str, tuple[int, str]] = {}  # path -> number and name
    texts: dict[str, int] = {}
    images: list[list[int]] = []
    captions: list[list[int]] = []
    keys: list[str] = []
    for key, names, two_captions in rows:
        where = f"{table} {clean(key)!r}"
        if names is None or two_captions is None:
            problems["row broken"].append(where)
            continue
        if wrong := next(filter(None, map(caption_problem, two_captions)), None):
            problems[wrong].append(where)
            continue
        found = [_locate(folders, name) for name in names]
        if None in found:
            problems["image missing"].append(f"{where}: {clean(names[found.index(None)])!r}")
            continue
        numbers = [files.setdefault(str(path), (len(files), name))[0] for path, name in zip(found, names)]
        images.append([*numbers, -1][:2])  # -1 is in place of the second image, which SugarCrepe does not have.
        captions.append([texts.setdefault(trimmed(text), len(texts)) for text in two_captions])
        keys.append(clean(key))
    return Content(
        kind="choice",
        source=ImageFiles(list(files), [name for _, name in files.values()]),
        problems=problem_list(problems),
        texts=list(texts),
        choices=Choices(
            torch.tensor(images, dtype=torch.int64).view(-1, 2),
            torch.tensor(captions, dtype=torch.int64).view(-1, 2),
            keys,
        ),
    )


# Where the images of Winoground and SugarCrepe (COCO's val2017) may be, relative to the table.
_IMAGE_FOLDERS = ("images", "val2017", "images/val2017", ".", "../images", "../val2017")


def _locate(folders: Sequence[str], name: Any) -> str | None:
    """Return the path of an image, whose name may lack the extension; None if it is not in any of the folders."""
    if not isinstance(name, str) or not name.strip():
        return None
    for folder in folders:
        for suffix in ("", *(f".{extension}" for extension in IMAGE_EXTENSIONS)):
            path = path_inside(folder, f"{name}{suffix}")
            if path is not None and os.path.isfile(path):
                return path
    return None
