"""Readers of images with captions: tables, COCO's JSON, Flickr's token files, shards, class folders.

Each source becomes a list of items, an image's name and its captions, which no longer depends on the kind of source.
"""

import csv
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dualenc.data.prepare.pictures import (
    PictureFiles,
    PictureRef,
    Pictures,
    ShardPictures,
    TablePictures,
    parquet_rows,
    path_inside,
    picture_columns,
)
from dualenc.data.prepare.sample_join import joined_samples
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.patterns import SHARDS, FileKind, Patterns, find_files, parts_of, require_all
from dualenc.data.shards.shard import IMAGE_EXTENSIONS
from dualenc.utils.decoding import open_text, read_text, text_problem, trimmed
from dualenc.utils.errors import DataError
from dualenc.utils.files import stand_in
from dualenc.utils.urls import is_remote

TEMPLATES = ("a photo of a {c}.",)
_IMAGE_COLUMNS = (
    "image", "image_path", "img_path", "image_file", "image_filename", "image_name", "img", "file", "filename",
    "file_name", "filepath", "file_path", "path",
)  # fmt: skip
_CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "sentences", "description", "comment")
_IMAGE_FOLDERS = (
    "images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images"
)  # fmt: skip
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".token")
_TEXT_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
_TABLE_IN_FOLDER = re.compile(r"(metadata|captions)\.(csv|tsv|jsonl|ndjson|parquet|txt)|results\.csv|.*\.token(\.txt)?")
_SOURCES = FileKind("sources", (".tar", ".parquet"), tuple(sorted({*SHARDS.others} - {".parquet"})))
_PART_OF_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")  # as Hugging Face names the parts of a split
_TOKEN_LINE = re.compile(r"(\S.*)#\d+\t(.*)")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d{1,12})?")

Record = tuple[str, dict[str, Any] | None]  # location in the source, such as "line 3"; its fields, None if unreadable


@dataclass(slots=True)
class CaptionedImage:
    """An image with its captions and further fields."""

    image: str  # path, relative to the image folder or absolute
    captions: list[str]
    fields: dict[str, Any]
    number: int = -1  # of its `PictureRef`; -1 for an image that is a file


@dataclass
class CaptionSource:
    """The content of a source."""

    images: str  # folder that the image names are relative to; empty if the images are not files
    items: list[CaptionedImage]
    total: int  # items, and rows that are unusable before any image is read
    left_out: list[list[str]]  # cause, location or name
    classnames: list[str] = field(default_factory=list)
    pictures: Pictures = field(default_factory=Pictures)

    def fingerprint(self) -> str:
        """Hash all of the content, except the image files."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self.items:
            digest.update(json.dumps([item.image, item.captions, item.fields]).encode())
        digest.update(json.dumps([self.left_out, self.classnames, self.pictures.content]).encode())
        return digest.hexdigest()


def read_source(
    sources: Patterns,
    images: str | os.PathLike[str] | None,
    image_column: str | None,
    caption_column: str | None,
    templates: Sequence[str] | None,
) -> CaptionSource:
    """Read a source of any kind; the arguments are those of `make_shards`.

    Raises:
        DataError: If the source does not exist, is not understood, or holds nothing.
    """
    if images is not None and not os.path.isdir(images):
        raise DataError(f"images {images} must be a folder")
    paths = _resolve(parts_of(sources))
    if len(paths) == 1 and os.path.isdir(paths[0]):
        if image_column or caption_column or images is not None:
            raise DataError(f"{paths[0]} has class folders: columns and images are options for tables only")
        return _class_folders(Path(paths[0]), templates or TEMPLATES)
    if templates:
        raise DataError(f"{paths[0]} has captions: templates are for folders of classes only")
    if paths[0].lower().endswith(SHARDS.endings):
        if images is not None:
            raise DataError(f"{paths[0]} is a shard: images is an option for tables only")
        return _read_shards(paths, image_column, caption_column)
    return _read_tables(list(map(Path, paths)), images, image_column, caption_column)


def _resolve(sources: list[str]) -> list[str]:
    """Return the paths of shards, of Parquet tables, of one other table, or of a folder of class folders."""
    parts = list(map(os.path.expanduser, sources))
    source = Path(parts[0]) if len(parts) == 1 and not is_remote(parts[0]) else None
    if source is not None and source.is_dir() and (described := tables_in(source)):
        if len(described) > 1:
            names = " and ".join(path.name for path in described)
            raise DataError(f"{source} holds {names}: name one of them as the source")
        return [str(described[0])]
    if source is not None and source.is_file():
        return [str(source)]
    if source is not None and not source.exists() and not has_magic(parts[0]) and "{" not in parts[0]:
        raise DataError(f"source {source} does not exist")
    paths, missing = find_files(parts, _SOURCES)
    if source is not None and source.is_dir() and missing:
        return [str(source)]
    if other := [part for part in parts if os.path.isfile(part) and part.lower().endswith(_TEXT_TABLES)]:
        raise DataError(f"{other[0]}: only .parquet tables and shards may be several: name one table")
    paths = require_all(paths, missing, _SOURCES)
    shards = [path for path in paths if path.lower().endswith(SHARDS.endings)]
    splits = sorted({found[1] for path in paths if (found := _PART_OF_SPLIT.fullmatch(os.path.basename(path)))})
    if not shards and len(splits) > 1:
        raise DataError(
            f"{parts[0]} has tables of the splits {', '.join(splits)}, which must not be mixed: name one of them, such "
            f"as {os.path.join(os.path.dirname(paths[0]), splits[-1])}-*.parquet"
        )
    return shards or paths


def _read_tables(
    tables: list[Path], images: str | os.PathLike[str] | None, image_column: str | None, caption_column: str | None
) -> CaptionSource:
    """Read a table, or several Parquet tables of the same columns; the arguments are those of `make_shards`."""
    table = tables[0]
    try:
        for path in tables:
            with open(path, "rb") as file:
                if what := stand_in(file.read(1024)):
                    raise DataError(f"{path} is {what}")
        inside = picture_columns(tables) if table.suffix.lower() == ".parquet" else {}
        records, coco = (parquet_rows(tables, inside), False) if table.suffix.lower() == ".parquet" else _records(table)
        first = list(islice(records, 100))
        columns = list(dict.fromkeys(name for _, record in first for name in record or ()))
        if not columns:
            raise DataError(f"{table} has no rows with values: give a row for each image")
        if coco and (image_column or caption_column):
            raise DataError(f"{table} is COCO's captions JSON: columns are options for tables only")
        image = "file_name" if coco else _find_image_column(table, columns, image_column, list(inside))
        caption = "caption" if coco else _find_column(table, columns, caption_column, _CAPTION_COLUMNS, "caption")
        found = _gather(chain(first, records), image, caption)
    except OSError as error:
        raise DataError(f"{table} cannot be read ({error.strerror})") from None
    _refuse_empty(str(table), found)
    if image in inside:
        if images is not None:
            raise DataError(f"{table} has the images in its column {image!r}: images is an option for names of files")
        found.pictures = TablePictures(tables, inside[image])
        return found
    if table.suffix.lower() in (".csv", ".tsv", ".txt"):
        _parse_numbers(found.items)
    found.images = os.path.abspath(images) if images is not None else _find_images(table, found.items)
    found.pictures = PictureFiles(found.images)
    return found


def _read_shards(paths: list[str], image: str | None, caption_column: str | None) -> CaptionSource:
    """Read shards, whose images and captions may be in different shards, under the same keys."""
    index = ShardIndex.build(paths, image=image)
    where = index.shards[0]
    if not index.having(index.images).any():
        raise DataError(
            f"{where}: no images among {len(index)} samples, expected .{', .'.join(index.images)}: name the shards of "
            "images too, or their member with --image_column"
        )
    records = joined_samples(index)
    first = list(islice(records, 100))
    columns = list(dict.fromkeys(name for _, record in first for name in record or () if name))
    if not columns:
        raise DataError(f"{where}: no captions, neither .txt nor .json with fields: name the shards of captions too")
    caption = _find_column(Path(where), columns, caption_column, ("captions", "txt", *_CAPTION_COLUMNS), "caption")
    found = _gather(chain(first, records), "", caption)
    _refuse_empty(where, found)
    found.pictures = ShardPictures(index)
    found.total = len(found.items)  # a part of the images with captions of all, or the reverse, is understood
    return found


def _refuse_empty(where: str, found: CaptionSource) -> None:
    """Raise if a source has no item with an image and a caption."""
    if not found.items:
        causes = ", ".join(f"{cause} {n}" for cause, n in Counter(cause for cause, _ in found.left_out).items())
        raise DataError(f"{where}: no row has an image and a caption ({causes or 'it is empty'})")


def tables_in(folder: Path) -> list[Path]:
    """Return the tables in a folder whose names say that they describe its images."""
    return sorted(path for path in folder.iterdir() if _TABLE_IN_FOLDER.fullmatch(path.name))


def class_name(folder: str) -> str:
    """Return the class name of a class folder."""
    return " ".join(clean(folder).replace("_", " ").replace("-", " ").split())


def _class_folders(source: Path, templates: Sequence[str]) -> CaptionSource:
    if wrong := [template for template in templates if "{c}" not in template or not template.strip()]:
        raise DataError(f"templates: {wrong[0]!r} must have {{c}} for the class name")
    folders = {}
    for folder in sorted(source.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
            if any(Path(name).suffix.lower()[1:] in IMAGE_EXTENSIONS for name in names):
                folders[folder.name] = names
    if not folders:
        tables = [path.name for path in sorted(source.iterdir()) if path.suffix in _TABLES]
        below = [path.name for path in sorted(source.iterdir()) if path.is_dir()]
        raise DataError(
            f"{source} has no class folders with images and no metadata.csv or similar table, .parquet or .tar (found "
            f"{', '.join([*tables, *below]) or 'nothing'}): name a table or a folder of class folders as the source"
        )
    found = CaptionSource(str(source), [], 0, [])
    for folder, names in folders.items():
        name = class_name(folder)
        found.classnames += [name] if name not in found.classnames else []
        filled = [template.replace("{c}", name) for template in templates]
        for file in names:
            first = len(found.items) % len(filled)  # the templates take turns as the first caption
            found.items.append(CaptionedImage(f"{folder}/{file}", filled[first:] + filled[:first], {"class": name}))
    found.images, found.total = os.path.abspath(source), len(found.items)
    found.pictures = PictureFiles(found.images)
    return found


def _records(table: Path) -> tuple[Iterator[Record], bool]:
    """Return the rows of a table, and whether they are COCO's annotations."""
    kind = table.suffix.lower()
    if kind not in _TABLES:
        raise DataError(f"source {table} must be a folder, or a table {', '.join(_TABLES)}")
    if kind in (".jsonl", ".ndjson"):
        return json_lines(table), False
    if kind == ".json":
        text = read_text(table)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{table} cannot be read as JSON ({error})") from None
        if isinstance(content, list):
            return ((f"entry {i}", row if isinstance(row, dict) else None) for i, row in enumerate(content)), False
        return _coco(table, content), True
    return _delimited(table), False


def _delimited(path: Path) -> Iterator[Record]:
    """Yield the rows of a text table.

    It is CSV with commas or semicolons, whose values may be quoted and have line ends; a table with tabs or bars and
    one row per line; or Flickr's `name#number<TAB>caption`.
    """
    with open_text(path, newline="") as file:
        head = file.readline().rstrip("\r\n")
        if _TOKEN_LINE.fullmatch(head):
            for number, line in enumerate(chain([head], file), 1):
                match = _TOKEN_LINE.fullmatch(line.rstrip("\r\n"))
                if line.strip():
                    yield f"line {number}", {"image": match[1], "caption": match[2]} if match else None
            return
        delimiter = "\t" if path.suffix == ".tsv" else max(",\t|;", key=head.count)
        rows = _quoted_rows(file, delimiter) if delimiter in ",;" else _plain_rows(file, delimiter)
        columns = [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]
        for location, row in rows:
            complete = row is not None and len(row) == len(columns)
            yield location, dict(zip(columns, row)) if row and complete else None


def _quoted_rows(file: Iterable[str], delimiter: str) -> Iterator[tuple[str, list[str] | None]]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)  # not strict, an open quote swallows all further rows
    while True:
        first = reader.line_num + 2
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            row = None
        last = reader.line_num + 1
        if row is None or row:
            yield f"line {first}" if first >= last or row else f"lines {first} to {last}", row


def _plain_rows(file: Iterable[str], delimiter: str) -> Iterator[tuple[str, list[str] | None]]:
    for number, line in enumerate(file, 2):
        if line.strip():
            row = [value.strip() for value in line.rstrip("\r\n").split(delimiter)]
            quoted = [len(value) > 1 and value[0] == value[-1] == '"' for value in row]
            yield f"line {number}", [v[1:-1].replace('""', '"') if q else v for v, q in zip(row, quoted)]


def json_lines(path: Path) -> Iterator[Record]:
    """Yield the objects of a JSON Lines file."""
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield f"line {number}", record if isinstance(record, dict) else None


def _coco(path: Path, content: Any) -> Iterator[Record]:
    try:
        images = {image["id"]: {"file_name": None, **image, "caption": None} for image in content["images"]}
        annotations = [(item["id"], item["image_id"], item["caption"]) for item in content["annotations"]]
        uncaptioned = dict.fromkeys(images.keys())
        for _, image, _ in annotations:
            uncaptioned.pop(image, None)
    except (KeyError, TypeError):
        raise DataError(
            f"{path} is neither a list of objects nor COCO's captions JSON, with `images` (id, file_name) and "
            "`annotations` (id, image_id, caption)"
        ) from None
    for id, image, caption in annotations:
        yield f"annotation {id}", {**images[image], "caption": caption} if image in images else None
    for id in uncaptioned:
        yield f"image {id}", images[id]


def _find_image_column(table: Path, columns: list[str], given: str | None, inside: list[str]) -> str:
    """Return the column of the images, or of their names; columns with images inside come first.

    Args:
        table: the table, for messages.
        columns: all columns.
        given: the column that the user names.
        inside: columns with images inside.
    """
    if given is None and len(inside) == 1:
        return inside[0]
    usual = (*IMAGE_EXTENSIONS, *_IMAGE_COLUMNS)
    return _find_column(table, inside if given is None and inside else columns, given, usual, "image")


def _find_column(table: Path, columns: list[str], given: str | None, usual: Sequence[str], kind: str) -> str:
    if given is not None and given in columns:
        return given
    known = {name.lower(): name for name in reversed(columns)}
    found = [known[name] for name in usual if name in known] if given is None else []
    if not found:
        wanted = f"column {given!r}" if given is not None else f"column with a usual name for {kind}s"
        raise DataError(
            f"{table} does not have a {wanted}, only {', '.join(map(repr, columns)) or 'none'}: "
            f"name the column with --{kind}_column of make-shards"
        )
    return found[0]


def _gather(records: Iterable[Record], image: str, caption: str) -> CaptionSource:
    """Merge the rows of each image into one item, which keeps the further columns in which they agree."""
    items: dict[str | int, CaptionedImage] = {}
    broken, left_out = 0, []
    for location, record in records:
        if record is None:
            broken += 1
            left_out.append(["row broken", location])
            continue
        name = record.get(image)
        number = -1
        if isinstance(name, PictureRef):
            number, name = name.number, name.name or location
        if not isinstance(name, str) or not name.strip():
            broken += 1
            left_out.append(["image not named" if image else "caption without an image", location])
            continue
        name = name.strip()
        fields = {
            clean(key): clean(value) for key, value in record.items()
            if key not in (image, caption, "") and _is_scalar(value)
        }  # fmt: skip
        key = os.path.normpath(name) if number < 0 else number
        item = items.setdefault(key, CaptionedImage(name, [], fields, number))
        item.fields = {key: value for key, value in item.fields.items() if key in fields and fields[key] == value}
        texts = record.get(caption)
        for text in texts if isinstance(texts, list) and texts else [texts]:
            if problem := caption_problem(text):
                left_out.append([problem, f"{location}: {clean(name)}"])
            else:
                item.captions.append(" ".join(trimmed(str(text)).split()))
    usable = [item for item in items.values() if item.captions]
    return CaptionSource("", usable, len(items) + broken, left_out)


def caption_problem(caption: Any) -> str | None:
    """Return the reason why a caption cannot be used, or None."""
    problem = text_problem(caption)
    return problem and f"caption {problem}"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def clean(value: Any) -> Any:
    """Replace the characters of a text that cannot be written as UTF-8; return other values unchanged."""
    return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace") if isinstance(value, str) else value


def _parse_numbers(items: list[CaptionedImage]) -> None:
    """Parse the columns of a text table that hold numbers only, so that expressions can compare them."""
    texts = {key for item in items for key, value in item.fields.items() if value and not _NUMBER.fullmatch(value)}
    for item in items:
        item.fields = {
            key: value if key in texts else float(value) if "." in value else int(value)
            for key, value in item.fields.items()
            if value or key in texts
        }


def _find_images(table: Path, items: list[CaptionedImage]) -> str:
    """Return the folder in or near the table's folder that has most of 50 of its images."""
    folder = os.path.dirname(os.path.abspath(table))
    split = table.stem.rpartition("_")[2]  # captions_train2017.json belongs to train2017/
    usual = [*_IMAGE_FOLDERS, split, f"images/{split}"]
    candidates = [
        folder,
        *(os.path.normpath(os.path.join(base, name)) for base in (folder, f"{folder}/..") for name in usual),
    ]
    names = [item.image for item in items[:: max(1, len(items) // 50)]]
    hits = [sum(os.path.isfile(path_inside(candidate, name) or "") for name in names) for candidate in candidates]
    if not any(hits):
        searched = ", ".join(os.path.relpath(candidate, folder) for candidate in candidates)
        raise DataError(
            f"{table}: images such as {clean(names[0])!r} are not in {folder} (searched {searched}): "
            "name the folder that they are relative to with --images"
        )
    return candidates[hits.index(max(hits))]
