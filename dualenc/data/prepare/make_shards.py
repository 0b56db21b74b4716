"""Writing of shards from images and captions in tables and folders.

The items of a source are put in a random order. Each image is decoded once, since training must be able to decode it.
A line is appended to a journal for each complete shard, so that a stopped run resumes after the last complete one.
"""

import hashlib
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from webdataset.writer import TarWriter

from dualenc.data.images import ImageError, decode_image
from dualenc.data.loading.epoch_plan import permutation
from dualenc.data.prepare.caption_sources import (
    TEMPLATES,
    CaptionedImage,
    CaptionSource,
    clean,
    read_source,
)
from dualenc.data.prepare.pictures import NO_PICTURE, Pictures, image_kind
from dualenc.data.prepare.resumable import JOURNAL, check_same, read_lines
from dualenc.data.shards.patterns import Patterns, parts_of
from dualenc.data.workers import item_loader
from dualenc.utils.errors import DataError
from dualenc.utils.files import append_lines, atomic_write, stand_in, write_json, write_text
from dualenc.utils.text import plural
from dualenc.utils.urls import is_remote, shown

FORMAT = 1  # of summary.json and of the journal


@dataclass(frozen=True)
class Summary:
    """The result of `make_shards`, also in `summary.json`: counts of what was written, and names of what was not."""

    out: str
    shards: int
    samples: int
    captions: int
    words: float  # mean number of words of a caption
    bytes: int  # of all shards
    duplicates: int  # samples with the same image as an earlier sample; they are kept
    held_out: int  # samples of the evaluation set in OUT/held_out
    classes: int  # number of class folders, or 0
    left_out: dict[str, list[str]]  # cause -> names of what was left out
    finished_before: bool = False

    def lines(self) -> list[str]:
        """Return the lines to print: the result, and the next command."""
        text = [f"{self.out} was finished before; remove it to write it again"] if self.finished_before else []
        text.append(
            f"{self.samples:,} samples with {self.captions:,} captions of {self.words:.1f} words"
            f" in {plural(self.shards, 'shard')}, {self.bytes / 1e6:,.1f} MB"
        )
        if self.held_out:
            text.append(f"{self.held_out:,} more samples are held out for evaluation")
        if self.duplicates:
            text.append(f"{self.duplicates:,} have the same image as an earlier one; they are kept")
        for cause, names in self.left_out.items():
            examples = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            text.append(f"left out, {cause}: {len(names):,}: {examples}")
        if self.left_out:
            text.append(f"everything that was left out is named in {Path(self.out) / 'summary.json'}")
        text.append(f"next: dualenc fit --config run.yaml --data.train {shlex.quote(self.out)}")
        text.append("`dualenc configs small > run.yaml` writes a configuration to begin with")
        if self.held_out:
            command = "zeroshot" if self.classes else "retrieval"
            text.append(f"then: dualenc {command} RUN {shlex.quote(str(Path(self.out) / 'held_out'))}")
        return text


@dataclass
class _Part:
    """A line of the journal: one shard, and the items that were held out or left out while it was written.

    The names of the fields are those in the journal.
    """

    stop: int = 0  # position in the random order after its last item
    samples: int = 0
    captions: int = 0
    words: int = 0
    bytes: int = 0
    left_out: list[list[str]] = field(default_factory=list)  # cause, name
    held: list[int] = field(default_factory=list)  # positions of the items for the evaluation set
    pictures: list[str] = field(default_factory=list)  # hash of each image

    def count(self, item: CaptionedImage) -> None:
        """Count an item that was written to the shard."""
        self.samples += 1
        self.captions += len(item.captions)
        self.words += sum(len(caption.split()) for caption in item.captions)


def make_shards(
    source: Patterns,
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
    """Write webdataset shards of images and captions from tables, a folder or other shards.

    A sample has the bytes of the image file (`.jpg`, `.png` or `.webp`, by content), its first caption (`.txt`), and a
    `.json` with all `captions`, the name of the `file` and the further columns. White space and line ends in a caption
    become single spaces. The samples are in a random order, so that all shards are similar. If the process was stopped,
    the same call resumes it and writes the same shards.

    Args:
        source: a table (.csv, .tsv, .jsonl, .parquet, or .json with a list) with columns of image files and captions;
            COCO's captions JSON; a token file of Flickr8k or Flickr30k; a folder that holds such a `metadata.*`,
            `captions.*`, `results.csv` or `*.token.txt`; or a folder with a folder of images for each class. Or one or
            several patterns (see `dualenc.data.shards.patterns.find_files`) of Parquet tables, which may have the
            images inside, or of shards, whose images and captions are joined by key.
        out: new folder for `train-000000.tar` ... and `summary.json`.
        images: folder that the image names are relative to; by default it is searched in and near the table's folder.
        image_column: column of the image names, or in Parquet of the images, or member of shards that is the image,
            such as "input.jpg"; by default the one with a usual name.
        caption_column: column of captions or lists of captions, likewise; rows of one image become one sample.
        templates: captions of class folders, with `{c}` for the class name; they take turns as the first caption.
        val: share of the samples, by image content, that go to an evaluation set in OUT/held_out instead, in the layout
            of CLIP_benchmark. Equal images are never on both sides.
        samples: number of samples in a shard.
        seed: seed of the order.
        workers: number of processes that read and decode; 0 for none.
        track: wrapper of the loop over all images, for a progress bar.

    Raises:
        DataError: If the source is not understood, more than half of it is unusable, or OUT holds something else.
    """
    if samples < 1 or workers < 0 or seed < 0:
        raise DataError(f"samples {samples} must be at least 1, workers {workers} and seed {seed} at least 0")
    if not 0 <= val < 1:
        raise DataError(f"val {val} must be at least 0 and below 1")
    out = Path(out)
    found = read_source(source, images, image_column, caption_column, templates)
    plan = {
        "format": FORMAT, "source": _absolute(source), "images": found.images, "image_column": image_column,
        "caption_column": caption_column, "templates": list(templates) if templates else None, "val": val,
        "samples": samples, "seed": seed, "content": found.fingerprint(),
    }  # fmt: skip
    if finished := _finished(out, plan):
        return finished
    parts = _resume(out, plan)
    with found.pictures.opened(out):
        _write(out, found, parts, plan, workers, track)
    return _finish(out, found, parts, plan)


def _absolute(source: Patterns) -> str:
    """Return the patterns of a source as one text, with absolute paths."""
    return ", ".join(shown(part) if is_remote(part) else os.path.abspath(part) for part in parts_of(source))


def _write(
    out: Path,
    found: CaptionSource,
    parts: list[_Part],
    plan: dict[str, Any],
    workers: int,
    track: Callable[[Iterable[Any]], Iterable[Any]],
) -> None:
    """Write the remaining shards and the evaluation set, with the options in the plan; see `make_shards`."""
    order = permutation(len(found.items), plan["seed"]).tolist()
    start = parts[-1].stop if parts else 0
    pictures = enumerate(track(_read_pictures(found, order[start:], workers)), start)
    items = ((position, found.items[order[position]], *picture) for position, picture in pictures)
    unusable = _UnusableCount(plan["source"], found, parts)
    _write_train(out, parts, items, len(order), unusable, plan["val"], plan["samples"])
    if not any(part.samples for part in parts):
        raise unusable.none_left(plan["val"])
    if held := [order[position] for part in parts for position in part.held]:
        pairs = zip(held, _read_pictures(found, held, workers))
        _write_val(out / "held_out", pairs, found, plan["templates"], plan["samples"])


def _write_train(
    out: Path,
    parts: list[_Part],
    items: Iterator[tuple[int, CaptionedImage, str | None, Any]],
    total: int,
    unusable: "_UnusableCount",
    val: float,
    samples: int,
) -> None:
    """Write the remaining shards, and append each to `parts` and to the journal."""
    while (start := parts[-1].stop if parts else 0) < total:
        path = _shard_path(out, len(parts))
        part = _Part(start)
        with _tar_writer(path) as tar:
            for position, item, kind, data in items:
                part.stop = position + 1
                if kind is None:  # Then `data` is the reason why the image is unusable; see `_read_pictures`.
                    status = item.fields.get("status") if data == NO_PICTURE else None  # of img2dataset's tables
                    part.left_out.append([f"{data} ({status})" if status else data, clean(item.image)])
                    unusable.add(*part.left_out[-1])
                    continue
                # The hash decides on the side, so that equal images are on the same side whatever the order.
                digest = hashlib.blake2b(data, digest_size=8).digest()
                part.pictures.append(digest.hex())
                if int.from_bytes(digest, "big") < int(val * 2**64):
                    part.held.append(position)
                    continue
                tar.write(_members(position, item, kind, data))
                part.count(item)
                if part.samples == samples:
                    break
        if part.samples:
            part.bytes = path.stat().st_size
            append_lines(out / JOURNAL, [json.dumps(asdict(part))], sync=True)
        else:  # The last items were held out or unusable: there is no shard, and a resumed run reads them again.
            path.unlink()
        parts.append(part)


def _finish(out: Path, found: CaptionSource, parts: list[_Part], plan: dict[str, Any]) -> Summary:
    """Write OUT/summary.json, which marks the shards as complete, and remove the journal."""
    summary = _summary(out, found, parts)
    about = {**asdict(summary), "sizes": [part.bytes for part in parts if part.samples], "made_with": plan}
    del about["out"], about["finished_before"]
    write_json(out / "summary.json", about, indent=1)
    (out / JOURNAL).unlink()
    return summary


# Output of earlier runs


def _finished(out: Path, plan: dict[str, Any]) -> Summary | None:
    """Return the summary of an earlier run that finished with these options, or None if there is no finished run."""
    if not (out / "summary.json").exists():
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} must be a folder")
        others = out.exists() and any(path.suffix != ".part" for path in out.iterdir())
        if others and not (out / JOURNAL).exists():
            raise DataError(f"{out} holds files that make-shards did not write: name a new folder")
        return None
    try:
        summary = json.loads((out / "summary.json").read_text("utf-8"))
        made_with, sizes = summary.pop("made_with"), summary.pop("sizes")
        found = Summary(out=str(out), finished_before=True, **summary)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{out / 'summary.json'} was not written by make-shards: name a new folder") from None
    _check_same(out, made_with, plan)
    for number, size in enumerate(sizes):
        path = _shard_path(out, number)
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(
                f"{path} is missing or was changed since it was written: remove {out} and run this command again"
            )
    (out / JOURNAL).unlink(missing_ok=True)  # the run may have been stopped just before it removed the journal
    return found


def _resume(out: Path, plan: dict[str, Any]) -> list[_Part]:
    """Return the complete shards of a stopped run, and remove everything else from the journal and the folder."""
    journal, parts = out / JOURNAL, []
    lines = read_lines(journal)
    for line in lines[1:]:
        part, path = _Part(**line), _shard_path(out, len(parts))
        if not path.is_file() or path.stat().st_size != part.bytes:
            break
        parts.append(part)
    if parts:  # Without a complete shard the run starts from the beginning, so that its options may be others.
        _check_same(out, lines[0], plan)
    out.mkdir(parents=True, exist_ok=True)
    write_text(journal, "".join(json.dumps(line) + "\n" for line in [plan, *lines[1 : len(parts) + 1]]))
    kept = {_shard_path(out, number) for number in range(len(parts))}
    for path in {*out.glob("train-*.tar*"), *out.glob(".*.part")} - kept:
        path.unlink()
    return parts


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise if an earlier run had other options or another source."""
    check_same(out, before, now, {"content": f"other rows or files of {now['source']}"})


# Writing


def _shard_path(out: Path, number: int) -> Path:
    return out / f"train-{number:06d}.tar"


@contextmanager
def _tar_writer(path: Path) -> Iterator[TarWriter]:
    """Write a shard to a temporary file, which gets its name when it is complete."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:  # pyright: ignore[reportArgumentType]
            yield tar


def _members(number: int, item: CaptionedImage, kind: str, data: bytes) -> dict[str, Any]:
    """Return the members of a sample, for webdataset's writer."""
    fields = {**item.fields, "captions": item.captions, "file": clean(item.image)}
    about = json.dumps(fields, ensure_ascii=False).encode()
    return {"__key__": f"{number:09d}", kind: data, "txt": item.captions[0].encode(), "json": about}


def _write_val(
    folder: Path,
    pictures: Iterable[tuple[int, tuple[str | None, Any]]],
    found: CaptionSource,
    templates: Sequence[str] | None,
    samples: int,
) -> None:
    """Write an evaluation set: zero-shot classification if the source is class folders, else retrieval."""
    temporary = folder.with_name("val.part")
    for old in (folder, temporary):  # a run that was stopped before its summary may have left them
        shutil.rmtree(old, ignore_errors=True)
    (temporary / "test").mkdir(parents=True)
    shards, rest = 0, enumerate(pictures)
    while chunk := list(islice(rest, samples)):
        with _tar_writer(temporary / "test" / f"{shards}.tar") as tar:
            for number, (i, (kind, data)) in chunk:
                item = found.items[i]
                if kind is None:
                    raise DataError(
                        f"{item.image} was changed while the shards were made ({data}): run this command again"
                    )
                members = _members(number, item, kind, data)
                if found.classnames:
                    members["cls"] = str(found.classnames.index(item.fields["class"])).encode()
                else:
                    members["txt"] = "\n".join(item.captions).encode()
                tar.write(members)
        shards += 1
    (temporary / "test" / "nshards.txt").write_text(f"{shards}\n")
    if found.classnames:
        (temporary / "classnames.txt").write_text("\n".join(found.classnames) + "\n", "utf-8")
        lines = "\n".join(templates or TEMPLATES) + "\n"
        (temporary / "zeroshot_classification_templates.txt").write_text(lines, "utf-8")
    else:
        (temporary / "dataset_type.txt").write_text("retrieval\n")
    temporary.replace(folder)


def _summary(out: Path, found: CaptionSource, parts: list[_Part]) -> Summary:
    """Sum up the lines of the journal."""
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


# Images


def _read_pictures(found: CaptionSource, order: list[int], workers: int) -> Iterable[tuple[str | None, Any]]:
    """Read images in an order; yield extension and bytes of each, or None and the reason why it is unusable."""
    names = [(item.image, item.number) for item in found.items]
    return item_loader(_PictureReader(found.pictures, names), order, workers)


class _PictureReader(Dataset[tuple[str | None, Any]]):
    """Data set of images, each as its extension and bytes, or as None and the reason why it is unusable."""

    def __init__(self, pictures: Pictures, names: list[tuple[str, int]]) -> None:
        self.pictures, self.names = pictures, names

    def __getitem__(self, i: int) -> tuple[str | None, Any]:
        try:
            data = self.pictures.read(*self.names[i])
        except ImageError as error:
            return None, error.cause
        kind = image_kind(data)
        if kind is None:
            return None, stand_in(data) or "neither JPEG, PNG nor WebP"
        try:
            decode_image(data)
        except ImageError:
            return None, "image broken"
        return kind, data


class _UnusableCount:
    """Count of the unusable samples by cause.

    A source of which more than half is unusable was probably not understood, so that the count then raises.
    """

    def __init__(self, source: str, found: CaptionSource, parts: list[_Part]) -> None:
        self.source, self.where, self.total = source, found.pictures.where, found.total
        self.bad, self.causes = found.total - len(found.items), Counter(cause for cause, _ in found.left_out)
        if found.left_out:
            self._check(*found.left_out[-1])
        for cause, name in chain.from_iterable(part.left_out for part in parts):
            self.add(cause, name)

    def add(self, cause: str, name: str) -> None:
        """Count an unusable sample.

        Raises:
            DataError: If more than half of all samples are unusable.
        """
        self.causes[cause] += 1
        if not cause.startswith(NO_PICTURE):  # a table of downloads is understood even if most of them failed
            self.bad += 1
            self._check(cause, name)

    def none_left(self, val: float) -> DataError:
        """Return the error of a source of which no sample is left for training."""
        counts = ", ".join(f"{cause} {count}" for cause, count in self.causes.most_common())
        left_out = f" ({counts})" if counts else ""
        return DataError(f"{self.source}: val {val} leaves 0 of {self.total} samples for training{left_out}: lower val")

    def _check(self, cause: str, name: str) -> None:
        if 2 * self.bad > self.total:
            counts = ", ".join(f"{cause} {count}" for cause, count in self.causes.most_common())
            raise DataError(
                f"{self.source}: more than half of {self.total} samples are unusable ({counts}), such as {name!r}: "
                f"{cause}; {self.where}"
            )
