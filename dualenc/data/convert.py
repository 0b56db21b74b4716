"""Pictures and captions as people keep them, to shards: tables, COCO, Flickr's token files, class folders.

Every source is read to a list of items, an image's name and its captions; the rest does not know where they came from.
The items are put in a random order, and their pictures are read and decoded once to know that they can be. A journal
gets a line for each whole shard, so that a run stopped anywhere goes on after the last of them.
"""

import csv
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from webdataset.writer import TarWriter

from dualenc.data.images import IMAGE_EXTENSIONS, ImageError, decode_image
from dualenc.data.plan import permutation
from dualenc.data.shards import DataError

FORMAT = 1
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
_TABLE_IN_FOLDER = re.compile(r"(metadata|captions)\.(csv|tsv|jsonl|ndjson|parquet|txt)|results\.csv|.*\.token(\.txt)?")
_TOKEN_LINE = re.compile(r"(\S.*)#\d+\t(.*)")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d{1,12})?")
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}

Record = tuple[str, dict[str, Any] | None]  # where in the source, and what is there; None for what cannot be read


@dataclass(frozen=True)
class Summary:
    """What `make_shards` wrote and what it left out; also `summary.json`."""

    out: str
    shards: int
    samples: int
    captions: int
    words: float  # a caption, in the mean
    bytes: int  # of the shards
    duplicates: int  # samples with the same picture as an earlier one; they are kept
    held_out: int  # samples of the evaluation set in OUT/val
    classes: int  # of class folders, or 0
    left_out: dict[str, list[str]]  # cause -> which
    finished_before: bool = False

    def lines(self) -> list[str]:
        """For the screen, with what to do next."""
        text = [f"{self.out} was finished before; remove it to make it anew"] if self.finished_before else []
        text.append(
            f"{self.samples:,} samples with {self.captions:,} captions of {self.words:.1f} words"
            f" in {self.shards:,} shards, {self.bytes / 1e6:,.1f} MB"
        )
        if self.held_out:
            text.append(f"{self.held_out:,} samples more are held out for evaluation")
        if self.duplicates:
            text.append(f"{self.duplicates:,} of them have the same picture as another one; they are kept")
        for cause, names in self.left_out.items():
            some = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            text.append(f"left out, {cause}: {len(names):,}: {some}")
        if self.left_out:
            text.append(f"all that was left out is named in {Path(self.out) / 'summary.json'}")
        text.append(f"next: dualenc fit --config run.yaml --data.train {self.out} --data.captions json.captions")
        if self.held_out:
            text.append(f"then: dualenc {'zeroshot' if self.classes else 'retrieval'} RUN {Path(self.out) / 'val'}")
        return text


@dataclass(slots=True)
class _Item:
    image: str  # relative to the image folder, or absolute
    captions: list[str]
    fields: dict[str, Any]


@dataclass
class _Source:
    images: str  # folder
    items: list[_Item]
    total: int  # items, and what is lost before any picture is read
    left_out: list[list[str]]  # cause, which
    classnames: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for item in self.items:
            digest.update(json.dumps([item.image, item.captions, item.fields]).encode())
        digest.update(json.dumps([self.left_out, self.classnames]).encode())
        return digest.hexdigest()


@dataclass
class _Part:
    """A line of the journal: one shard, and what was met on the way to its end."""

    stop: int = 0  # place in the order after it
    samples: int = 0
    captions: int = 0
    words: int = 0
    bytes: int = 0
    left_out: list[list[str]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # places of samples for the evaluation set
    pictures: list[str] = field(default_factory=list)  # a hash of each

    def count(self, item: _Item) -> None:
        self.samples += 1
        self.captions += len(item.captions)
        self.words += sum(len(caption.split()) for caption in item.captions)


def make_shards(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    templates: Sequence[str] | None = None,
    val: float = 0.0,
    samples: int = 1000,
    seed: int = 0,
    workers: int = 2,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Summary:
    """Writes webdataset shards of one's own pictures and captions.

    A sample is the picture as it is, byte for byte (`.jpg`, `.png` or `.webp`, by content), its first caption (`.txt`)
    and a `.json` with all `captions`, the `file` it was and the further columns. White space in a caption, line ends
    too, becomes one space. The samples stand in a random order, so that all shards are alike.

    The same call again goes on where a stopped one was, and the shards are the same as without the stop.

    Args:
        source: a table (.csv, .tsv, .jsonl, .parquet, or .json with a list) with columns of image files and captions;
            COCO's captions JSON; a token file of Flickr8k or Flickr30k; a folder that holds such a `metadata.*`,
            `captions.*`, `results.csv` or `*.token.txt`; or a folder with a folder of images for each class.
        out: new folder for `train-000000.tar` ... and `summary.json`.
        images: folder that the image names start from; absent, looked for beside the table.
        image_column: of a table; absent, guessed by the usual names.
        caption_column: likewise; several rows of one image are one sample, and a list is several captions.
        templates: captions of class folders, with `{c}` for the name. All of them become the sample's `captions`; the
            first one, and so the `.txt`, takes turns.
        val: share of the samples that go to an evaluation set instead, by image content: the same picture is never on
            both sides. Written to OUT/val in the layout of CLIP_benchmark.
        samples: in a shard.
        seed: of the order.
        workers: processes that read and decode; 0 for none.
        track: wraps the loop over all pictures, for a progress bar.

    Raises:
        DataError: the source is not understood, more than half of it is unusable, or OUT holds something else.
    """
    if samples < 1 or workers < 0 or seed < 0 or not 0 <= val < 1:
        raise DataError(f"samples {samples} from 1, workers {workers} and seed {seed} from 0, val {val} from 0 below 1")
    source, out = Path(source), Path(out)
    found = _read(source, images, image_column, caption_column, templates)
    plan = {
        "format": FORMAT, "source": os.path.abspath(source), "images": found.images, "image_column": image_column,
        "caption_column": caption_column, "templates": list(templates) if templates else None, "val": val,
        "samples": samples, "seed": seed, "content": found.fingerprint(),
    }  # fmt: skip
    if finished := _finished(out, plan):
        return finished
    journal = out / "unfinished.jsonl"
    parts = _begin(journal, plan)
    tally = _Tally(source, found, parts)
    order = permutation(len(found.items), seed).tolist()
    start = parts[-1].stop if parts else 0
    checked = enumerate(track(_pictures(found, order[start:], workers)), start)
    while start < len(order):
        path = _shard(out, len(parts))
        beside = path.with_suffix(".tar.part")
        with _tar(beside) as tar:
            part = _Part(start)
            for place, (kind, data) in checked:
                item = found.items[order[place]]
                part.stop = place + 1
                if kind is None:
                    part.left_out.append([data, _clean(item.image)])
                    tally.add(*part.left_out[-1])
                    continue
                digest = hashlib.blake2b(data, digest_size=8).digest()
                part.pictures.append(digest.hex())
                if int.from_bytes(digest, "big") < int(val * 2**64):
                    part.held.append(place)
                    continue
                tar.write(_members(place, item, kind, data))
                part.count(item)
                if part.samples == samples:
                    break
        start, part.bytes = part.stop, beside.stat().st_size
        if part.samples:
            beside.replace(path)
            _append(journal, asdict(part))
        else:  # nothing was left but held-out and unusable pictures: no shard, and a stopped run reads them again
            beside.unlink()
        parts.append(part)
    if not any(part.samples for part in parts):
        raise DataError(f"{source}: val {val} leaves none of {len(order)} samples for training")
    held = [order[place] for part in parts for place in part.held]
    if held:
        samples_of = zip(held, _pictures(found, held, workers))
        _write_val(out / "val", samples_of, found, templates or TEMPLATES, samples)
    summary = _summary(out, found, parts)
    about = {**asdict(summary), "sizes": [part.bytes for part in parts if part.samples], "made_with": plan}
    del about["out"], about["finished_before"]
    _write_whole(out / "summary.json", json.dumps(about, indent=1))
    journal.unlink()
    return summary


# What a stopped run left, and what a whole one


def _finished(out: Path, plan: dict[str, Any]) -> Summary | None:
    """The summary of an earlier run that came to its end; of one with other options there is only an error."""
    if not (out / "summary.json").exists():
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is no folder")
        others = out.exists() and any(path.suffix != ".part" for path in out.iterdir())
        if others and not (out / "unfinished.jsonl").exists():
            raise DataError(f"{out} holds files that are not of make-shards: name a new folder")
        return None
    try:
        summary = json.loads((out / "summary.json").read_text("utf-8"))
        made_with, sizes = summary.pop("made_with"), summary.pop("sizes")
        found = Summary(out=str(out), finished_before=True, **summary)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{out / 'summary.json'} is not of make-shards: name a new folder") from None
    _same(out, made_with, plan)
    for number, size in enumerate(sizes):
        path = _shard(out, number)
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path} is gone or was changed since it was written: remove {out} and make it anew")
    (out / "unfinished.jsonl").unlink(missing_ok=True)  # where the run was stopped before its last line
    return found


def _begin(journal: Path, plan: dict[str, Any]) -> list[_Part]:
    """What the journal says of whole shards; after this it holds that and nothing else."""
    out, whole, parts = journal.parent, [], []
    for line in journal.read_bytes().splitlines(keepends=True) if journal.exists() else []:
        if not line.endswith(b"\n"):  # the stop cut it
            break
        whole.append(json.loads(line))
    for line in whole[1:]:
        part, path = _Part(**line), _shard(out, len(parts))
        if not path.is_file() or path.stat().st_size != part.bytes:
            break
        parts.append(part)
    if parts:  # before the first shard, nothing binds to what was asked for
        _same(out, whole[0], plan)
    out.mkdir(parents=True, exist_ok=True)
    _write_whole(journal, "".join(json.dumps(line) + "\n" for line in [plan, *whole[1 : len(parts) + 1]]))
    kept = {_shard(out, number) for number in range(len(parts))}
    for path in set(out.glob("train-*.tar*")) - kept:
        path.unlink()
    return parts


def _same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in now:
        if before.get(name) != now[name]:
            what = f"{name} {before.get(name)!r}, not {now[name]!r}"
            if name == "content":
                what = f"other rows or files of {now['source']}"
            raise DataError(f"{out} was begun with {what}: give the same, remove the folder, or name a new one")


def _append(journal: Path, line: dict[str, Any]) -> None:
    with open(journal, "ab") as file:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.part")
    with open(beside, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


# Writing


def _shard(out: Path, number: int) -> Path:
    return out / f"train-{number:06d}.tar"


@contextmanager
def _tar(path: Path) -> Iterator[TarWriter]:
    with open(path, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:  # pyright: ignore[reportArgumentType]
            yield tar
        file.flush()
        os.fsync(file.fileno())


def _members(number: int, item: _Item, kind: str, data: bytes) -> dict[str, Any]:
    fields = {**item.fields, "captions": item.captions, "file": _clean(item.image)}
    about = json.dumps(fields, ensure_ascii=False).encode()
    return {"__key__": f"{number:09d}", kind: data, "txt": item.captions[0].encode(), "json": about}


def _write_val(
    folder: Path,
    pictures: Iterable[tuple[int, tuple[str | None, Any]]],
    found: _Source,
    templates: Sequence[str],
    samples: int,
) -> None:
    """An evaluation set of items by their numbers: zero-shot classification of class folders, else retrieval."""
    beside = folder.with_name("val.part")
    for old in (folder, beside):  # of a stopped run: that one did not come to its summary
        shutil.rmtree(old, ignore_errors=True)
    (beside / "test").mkdir(parents=True)
    shards, rest = 0, enumerate(pictures)
    while chunk := list(islice(rest, samples)):
        with _tar(beside / "test" / f"{shards}.tar") as tar:
            for number, (i, (kind, data)) in chunk:
                item = found.items[i]
                if kind is None:
                    raise DataError(f"{item.image} was changed while the shards were made: {data}")
                members = _members(number, item, kind, data)
                if found.classnames:
                    members["cls"] = str(found.classnames.index(item.fields["class"])).encode()
                else:
                    members["txt"] = "\n".join(item.captions).encode()
                tar.write(members)
        shards += 1
    (beside / "test" / "nshards.txt").write_text(f"{shards}\n")
    if found.classnames:
        (beside / "classnames.txt").write_text("\n".join(found.classnames) + "\n", "utf-8")
        (beside / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n", "utf-8")
    else:
        (beside / "dataset_type.txt").write_text("retrieval\n")
    beside.replace(folder)


def _summary(out: Path, found: _Source, parts: list[_Part]) -> Summary:
    left_out: dict[str, list[str]] = {}
    for cause, name in chain(found.left_out, *(part.left_out for part in parts)):
        left_out.setdefault(cause, []).append(name)
    pictures = [picture for part in parts for picture in part.pictures]
    captions, held = sum(part.captions for part in parts), sum(len(part.held) for part in parts)
    return Summary(
        out=str(out),
        shards=sum(part.samples > 0 for part in parts),
        samples=sum(part.samples for part in parts),
        captions=captions,
        words=sum(part.words for part in parts) / captions,
        bytes=sum(part.bytes for part in parts if part.samples),
        duplicates=len(pictures) - len(set(pictures)),
        held_out=held,
        classes=len(found.classnames),
        left_out=left_out,
    )


# Pictures


def _pictures(found: _Source, order: list[int], workers: int) -> Iterable[tuple[str | None, Any]]:
    """(kind, bytes) of the items' pictures in this order; (None, cause) of one that is unusable."""
    return DataLoader(
        _Pictures(found.images, [item.image for item in found.items]),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # or the loader draws from the global one
        prefetch_factor=4 if workers else None,
    )


def _as_it_is(picture: Any) -> Any:
    return picture


class _Pictures(Dataset[tuple[str | None, Any]]):
    def __init__(self, folder: str, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def __getitem__(self, i: int) -> tuple[str | None, Any]:
        name = self.names[i]
        path = _inside(self.folder, name)
        if path is None:
            return None, "an address and no file" if "://" in name else "outside of the image folder"
        if not os.path.isfile(path):  # a pipe or a device would be waited for
            return None, "no image file" if os.path.exists(path) else "image missing"
        try:
            with open(path, "rb") as file:
                data = file.read(12)
                kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
                if kind is None or (kind == "webp" and data[8:] != b"WEBP"):
                    return None, "neither JPEG, PNG nor WebP"
                data += file.read()
        except OSError as error:
            return None, f"image cannot be read ({error.strerror})"
        try:
            decode_image(data)
        except ImageError:
            return None, "image broken"
        return kind, data


def _inside(folder: str, name: str) -> str | None:
    """The path of an image, unless its name leads out of the folder. Links in the folder are the owner's choice."""
    path = os.path.normpath(os.path.join(folder, name))
    return path if "\0" not in path and "://" not in name and path.startswith(folder.rstrip("/") + "/") else None


class _Tally:
    """Counts what is unusable, and ends the work when that is more than half."""

    def __init__(self, source: Path, found: _Source, parts: list[_Part]) -> None:
        self.source, self.images, self.total = source, found.images, found.total
        self.bad, self.causes = found.total - len(found.items), Counter(cause for cause, _ in found.left_out)
        if found.left_out:
            self._check(*found.left_out[-1])
        for cause, name in chain.from_iterable(part.left_out for part in parts):
            self.add(cause, name)

    def add(self, cause: str, name: str) -> None:
        self.bad += 1
        self.causes[cause] += 1
        self._check(cause, name)

    def _check(self, cause: str, name: str) -> None:
        if 2 * self.bad > self.total:
            counts = ", ".join(f"{cause} {count}" for cause, count in self.causes.most_common())
            raise DataError(
                f"{self.source}: more than half of {self.total} samples are unusable ({counts}), such as {name!r}: "
                f"{cause}; the images were looked for in {self.images}, another folder is named by --images"
            )


# Sources


def _read(
    source: Path,
    images: str | os.PathLike[str] | None,
    image_column: str | None,
    caption_column: str | None,
    templates: Sequence[str] | None,
) -> _Source:
    if not source.exists():
        raise DataError(f"source {source} does not exist")
    if images is not None and not os.path.isdir(images):
        raise DataError(f"images {images} is no folder")
    table = source
    if source.is_dir():
        tables = sorted(path for path in source.iterdir() if _TABLE_IN_FOLDER.fullmatch(path.name))
        if len(tables) > 1:
            raise DataError(
                f"{source} holds {' and '.join(path.name for path in tables)}: name one of them as the source"
            )
        if not tables:
            if image_column or caption_column or images is not None:
                raise DataError(f"{source}: columns and images are for tables, these are folders of classes")
            return _class_folders(source, templates or TEMPLATES)
        table = tables[0]
    if templates:
        raise DataError(f"{table}: templates are for folders of classes; its captions are its own")
    try:
        records, coco = _records(table)
        first = list(islice(records, 100))
        columns = list(dict.fromkeys(name for _, record in first for name in record or ()))
        if coco and (image_column or caption_column):
            raise DataError(f"{table}: columns are for tables, this is COCO's captions JSON")
        image = "image" if coco else _column(table, columns, image_column, _IMAGE_COLUMNS, "image")
        caption = "caption" if coco else _column(table, columns, caption_column, _CAPTION_COLUMNS, "caption")
        found = _gather(chain(first, records), image, caption)
    except OSError as error:
        raise DataError(f"{table} cannot be read ({error.strerror})") from None
    if not found.items:
        causes = ", ".join(f"{cause} {n}" for cause, n in Counter(cause for cause, _ in found.left_out).items())
        raise DataError(f"{table}: no row has an image and a caption ({causes or 'it is empty'})")
    if table.suffix.lower() in (".csv", ".tsv", ".txt"):
        _to_numbers(found.items)
    found.images = os.path.abspath(images) if images is not None else _find_images(table, found.items)
    return found


def _class_folders(source: Path, templates: Sequence[str]) -> _Source:
    if without := [template for template in templates if "{c}" not in template or not template.strip()]:
        raise DataError(f"templates: {without[0]!r} has no {{c}}")
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
            f"{source} has no folders with images in them, one for each class, and no metadata.csv or the like; name "
            f"a table or a folder of class folders as the source (here are: {', '.join([*tables, *below]) or 'none'})"
        )
    found = _Source(str(source), [], 0, [])
    for folder, names in folders.items():
        name = " ".join(_clean(folder).replace("_", " ").replace("-", " ").split())
        found.classnames += [name] if name not in found.classnames else []
        filled = [template.replace("{c}", name) for template in templates]
        for file in names:
            turn = len(found.items) % len(filled)
            found.items.append(_Item(f"{folder}/{file}", filled[turn:] + filled[:turn], {"class": name}))
    found.images, found.total = os.path.abspath(source), len(found.items)
    return found


def _records(table: Path) -> tuple[Iterator[Record], bool]:
    """The rows of a table, and whether they are COCO's."""
    kind = table.suffix.lower()
    if kind not in _TABLES:
        raise DataError(f"source {table}: a folder, or a table {', '.join(_TABLES)} is wanted")
    if kind == ".parquet":
        return _parquet(table), False
    if kind in (".jsonl", ".ndjson"):
        return _json_lines(table), False
    if kind == ".json":
        try:
            content = json.loads(table.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{table} is no JSON ({error})") from None
        if isinstance(content, list):
            return ((f"entry {i}", row if isinstance(row, dict) else None) for i, row in enumerate(content)), False
        return _coco(table, content), True
    return _delimited(table), False


def _delimited(path: Path) -> Iterator[Record]:
    """CSV with commas or semicolons, quoted; tabs or bars, a row a line; or Flickr's `name#number<TAB>caption`."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
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
        for place, row in rows:
            whole = row is not None and len(row) == len(columns)
            yield place, dict(zip(columns, row)) if row and whole else None


def _quoted_rows(file: Iterable[str], delimiter: str) -> Iterator[tuple[str, list[str] | None]]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)  # else an open quote swallows what follows
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


def _json_lines(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield f"line {number}", record if isinstance(record, dict) else None


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path}: Parquet files are read by pyarrow, which is missing: pip install pyarrow") from None
    try:
        number = 0
        for batch in ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", record
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error})") from None


def _coco(path: Path, content: Any) -> Iterator[Record]:
    try:
        images = {image["id"]: {**image, "image": image["file_name"], "caption": None} for image in content["images"]}
        notes = [(note["id"], note["image_id"], note["caption"]) for note in content["annotations"]]
        without = dict.fromkeys(images.keys())
        for _, image, _ in notes:
            without.pop(image, None)
    except (KeyError, TypeError):
        raise DataError(
            f"{path} is neither a list of objects nor COCO's captions JSON, with `images` (id, file_name) and "
            "`annotations` (id, image_id, caption)"
        ) from None
    for id, image, caption in notes:
        yield f"annotation {id}", {**images[image], "caption": caption} if image in images else None
    for id in without:
        yield f"image {id}", images[id]


def _column(table: Path, columns: list[str], given: str | None, usual: Sequence[str], what: str) -> str:
    if given is not None and given in columns:
        return given
    known = {name.lower(): name for name in reversed(columns)}
    found = [known[name] for name in usual if name in known] if given is None else []
    if not found:
        wrong = f"no column {given!r}" if given is not None else f"no column that is known to hold the {what}s"
        raise DataError(
            f"{table} has {wrong}, only {', '.join(map(repr, columns)) or 'none'}: name it by --{what}_column"
        )
    return found[0]


def _gather(records: Iterable[Record], image: str, caption: str) -> _Source:
    """Rows to items: the rows of an image are one, which keeps the further columns that they agree in."""
    items: dict[str, _Item] = {}
    broken, left_out = 0, []
    for place, record in records:
        if record is None:
            broken += 1
            left_out.append(["row broken", place])
            continue
        name = record.get(image)
        if not isinstance(name, str) or not name.strip():
            broken += 1
            left_out.append(["image not named", place])
            continue
        name = name.strip()
        fields = {
            _clean(key): _clean(value) for key, value in record.items()
            if key not in (image, caption, "") and _is_scalar(value)
        }  # fmt: skip
        item = items.setdefault(os.path.normpath(name), _Item(name, [], fields))
        item.fields = {key: value for key, value in item.fields.items() if key in fields and fields[key] == value}
        texts = record.get(caption)
        for text in texts if isinstance(texts, list) and texts else [texts]:
            if isinstance(text, str) and text.strip() and text == _clean(text):
                item.captions.append(" ".join(text.split()))
            else:
                left_out.append([_fault(text), f"{place}: {_clean(name)}"])
    usable = [item for item in items.values() if item.captions]
    return _Source("", usable, len(items) + broken, left_out)


def _fault(caption: Any) -> str:
    if isinstance(caption, str) and caption.strip():
        return "caption not UTF-8"
    nothing = caption is None or caption == [] or caption != caption  # NaN is how pandas writes nothing
    return "caption empty" if nothing or isinstance(caption, str) else "caption no text"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _clean(value: Any) -> Any:
    """Text that can be written as UTF-8; other values as they are."""
    return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace") if isinstance(value, str) else value


def _to_numbers(items: list[_Item]) -> None:
    """Columns of a text table that hold nothing but numbers: expressions over the fields compare them."""
    words = {key for item in items for key, value in item.fields.items() if value and not _NUMBER.fullmatch(value)}
    for item in items:
        item.fields = {
            key: value if key in words else float(value) if "." in value else int(value)
            for key, value in item.fields.items()
            if value or key in words
        }


def _find_images(table: Path, items: list[_Item]) -> str:
    """The folder beside a table that holds most of a sample of its images."""
    folder = os.path.dirname(os.path.abspath(table))
    split = table.stem.rpartition("_")[2]  # captions_train2017.json belongs to train2017/
    below = [*_IMAGE_FOLDERS, split, f"images/{split}"]
    places = [
        folder,
        *(os.path.normpath(os.path.join(base, name)) for base in (folder, f"{folder}/..") for name in below),
    ]
    some = [item.image for item in items[:: max(1, len(items) // 50)]]
    hits = [sum(os.path.isfile(_inside(place, name) or "") for name in some) for place in places]
    if not any(hits):
        near = ", ".join(os.path.relpath(place, folder) for place in places)
        raise DataError(
            f"{table}: {_clean(some[0])!r} and the like are not in {folder} nor in ({near}) beside it; "
            "name the folder that the names start from by --images"
        )
    return places[hits.index(max(hits))]
