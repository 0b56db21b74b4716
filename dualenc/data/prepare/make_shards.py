"""Pictures and captions as people keep them, to shards.

The items of a source are put in a random order, and their pictures are read and decoded once to know that they can be.
A journal gets a line for each whole shard, so that a run stopped anywhere goes on after the last of them.
"""

import hashlib
import json
import os
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
from dualenc.data.prepare.caption_sources import TEMPLATES, CaptionedImage, CaptionSource, clean, inside, read_source
from dualenc.data.prepare.resumable import JOURNAL, check_same, read_lines
from dualenc.data.workers import item_loader
from dualenc.utils.errors import DataError
from dualenc.utils.files import append_lines, atomic_write, write_json, write_text
from dualenc.utils.text import plural

FORMAT = 1
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}


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
    held_out: int  # samples of the evaluation set in OUT/held_out
    classes: int  # of class folders, or 0
    left_out: dict[str, list[str]]  # cause -> which
    finished_before: bool = False

    def lines(self) -> list[str]:
        """For the screen, with what to do next."""
        text = [f"{self.out} was finished before; remove it to make it anew"] if self.finished_before else []
        text.append(
            f"{self.samples:,} samples with {self.captions:,} captions of {self.words:.1f} words"
            f" in {plural(self.shards, 'shard')}, {self.bytes / 1e6:,.1f} MB"
        )
        if self.held_out:
            text.append(f"{self.held_out:,} samples more are held out for evaluation")
        if self.duplicates:
            text.append(f"{self.duplicates:,} have the same picture as an earlier one; they are kept")
        for cause, names in self.left_out.items():
            some = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            text.append(f"left out, {cause}: {len(names):,}: {some}")
        if self.left_out:
            text.append(f"all that was left out is named in {Path(self.out) / 'summary.json'}")
        text.append(f"next: dualenc fit --config run.yaml --data.train {self.out} --data.captions json.captions")
        if self.held_out:
            command = "zeroshot" if self.classes else "retrieval"
            text.append(f"then: dualenc {command} RUN {Path(self.out) / 'held_out'}")
        return text


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

    def count(self, item: CaptionedImage) -> None:
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
            both sides. Written to OUT/held_out in the layout of CLIP_benchmark.
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
    found = read_source(source, images, image_column, caption_column, templates)
    plan = {
        "format": FORMAT, "source": os.path.abspath(source), "images": found.images, "image_column": image_column,
        "caption_column": caption_column, "templates": list(templates) if templates else None, "val": val,
        "samples": samples, "seed": seed, "content": found.fingerprint(),
    }  # fmt: skip
    if finished := _finished(out, plan):
        return finished
    parts = _begin(out, plan)
    order = permutation(len(found.items), seed).tolist()
    start = parts[-1].stop if parts else 0
    pictures = enumerate(track(_pictures(found, order[start:], workers)), start)
    items = ((place, found.items[order[place]], *picture) for place, picture in pictures)
    _write_train(out, parts, items, len(order), _Tally(source, found, parts), val, samples)
    if not any(part.samples for part in parts):
        raise DataError(f"{source}: val {val} leaves none of {len(order)} samples for training")
    held = [order[place] for part in parts for place in part.held]
    if held:
        _write_val(out / "held_out", zip(held, _pictures(found, held, workers)), found, templates, samples)
    return _finish(out, found, parts, plan)


def _write_train(
    out: Path,
    parts: list[_Part],
    items: Iterator[tuple[int, CaptionedImage, str | None, Any]],
    total: int,
    tally: "_Tally",
    val: float,
    samples: int,
) -> None:
    """Write the rest of the shards, and append each to `parts` and to the journal."""
    while (start := parts[-1].stop if parts else 0) < total:
        path = _shard(out, len(parts))
        part = _Part(start)
        with _tar(path) as tar:
            for place, item, kind, data in items:
                part.stop = place + 1
                if kind is None:
                    part.left_out.append([data, clean(item.image)])
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
        if part.samples:
            part.bytes = path.stat().st_size
            append_lines(out / JOURNAL, [json.dumps(asdict(part))], sync=True)
        else:  # nothing was left but held-out and unusable pictures: no shard, and a stopped run reads them again
            path.unlink()
        parts.append(part)


def _finish(out: Path, found: CaptionSource, parts: list[_Part], plan: dict[str, Any]) -> Summary:
    """Write OUT/summary.json, which says that the shards are whole, and remove the journal."""
    summary = _summary(out, found, parts)
    about = {**asdict(summary), "sizes": [part.bytes for part in parts if part.samples], "made_with": plan}
    del about["out"], about["finished_before"]
    write_json(out / "summary.json", about, indent=1)
    (out / JOURNAL).unlink()
    return summary


# What a stopped run left, and what a whole one


def _finished(out: Path, plan: dict[str, Any]) -> Summary | None:
    """The summary of an earlier run that came to its end; of one with other options there is only an error."""
    if not (out / "summary.json").exists():
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is no folder")
        others = out.exists() and any(path.suffix != ".part" for path in out.iterdir())
        if others and not (out / JOURNAL).exists():
            raise DataError(f"{out} holds files that are not of make-shards: name a new folder")
        return None
    try:
        summary = json.loads((out / "summary.json").read_text("utf-8"))
        made_with, sizes = summary.pop("made_with"), summary.pop("sizes")
        found = Summary(out=str(out), finished_before=True, **summary)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{out / 'summary.json'} is not of make-shards: name a new folder") from None
    _check_same(out, made_with, plan)
    for number, size in enumerate(sizes):
        path = _shard(out, number)
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path} is gone or was changed since it was written: remove {out} and make it anew")
    (out / JOURNAL).unlink(missing_ok=True)  # where the run was stopped before its last line
    return found


def _begin(out: Path, plan: dict[str, Any]) -> list[_Part]:
    """What the journal says of whole shards; after this it holds that and nothing else."""
    journal, parts = out / JOURNAL, []
    whole = read_lines(journal)
    for line in whole[1:]:
        part, path = _Part(**line), _shard(out, len(parts))
        if not path.is_file() or path.stat().st_size != part.bytes:
            break
        parts.append(part)
    if parts:  # before the first shard, nothing binds to what was asked for
        _check_same(out, whole[0], plan)
    out.mkdir(parents=True, exist_ok=True)
    write_text(journal, "".join(json.dumps(line) + "\n" for line in [plan, *whole[1 : len(parts) + 1]]))
    kept = {_shard(out, number) for number in range(len(parts))}
    for path in {*out.glob("train-*.tar*"), *out.glob(".*.part")} - kept:
        path.unlink()
    return parts


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    check_same(out, before, now, {"content": f"other rows or files of {now['source']}"})


# Writing


def _shard(out: Path, number: int) -> Path:
    return out / f"train-{number:06d}.tar"


@contextmanager
def _tar(path: Path) -> Iterator[TarWriter]:
    with atomic_write(path) as beside, open(beside, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:  # pyright: ignore[reportArgumentType]
            yield tar


def _members(number: int, item: CaptionedImage, kind: str, data: bytes) -> dict[str, Any]:
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
        (beside / "zeroshot_classification_templates.txt").write_text("\n".join(templates or TEMPLATES) + "\n", "utf-8")
    else:
        (beside / "dataset_type.txt").write_text("retrieval\n")
    beside.replace(folder)


def _summary(out: Path, found: CaptionSource, parts: list[_Part]) -> Summary:
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


def _pictures(found: CaptionSource, order: list[int], workers: int) -> Iterable[tuple[str | None, Any]]:
    """(kind, bytes) of the items' pictures in this order; (None, cause) of one that is unusable."""
    names = [item.image for item in found.items]
    return item_loader(_Pictures(found.images, names), order, workers, prefetch_factor=4 if workers else None)


class _Pictures(Dataset[tuple[str | None, Any]]):
    def __init__(self, folder: str, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def __getitem__(self, i: int) -> tuple[str | None, Any]:
        name = self.names[i]
        path = inside(self.folder, name)
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


class _Tally:
    """Counts what is unusable, and ends the work when that is more than half."""

    def __init__(self, source: Path, found: CaptionSource, parts: list[_Part]) -> None:
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
