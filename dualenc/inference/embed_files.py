"""Embeddings and image features in files: one safetensors file for each shard or part of the images.

The same call resumes a stopped one and keeps the files that exist.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import Dataset

from dualenc.data.image_features import (
    ABOUT,
    BAD,
    FORMAT,
    KEY,
    TIMEOUT,
    EmbeddingFile,
    damaged,
    file_name,
    read_about,
)
from dualenc.data.loading.bad_samples import BadRecord, causes
from dualenc.data.pairs import caption_members, captions_of, decode_and_hash
from dualenc.data.prepare.resumable import check_same, other_inputs
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.sample import image_argument
from dualenc.data.shards.shard import IMAGE_EXTENSIONS, Shard
from dualenc.data.workers import CurrentSample, WorkerLoader, tensor_bytes
from dualenc.inference.image_files import FilePart, FileParts
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.files import atomic_write, write_json, write_text
from dualenc.utils.text import plural

Track = Callable[..., Iterable[Any]]  # wraps an iterable whose length is `total`


@dataclass(frozen=True)
class Embedded:
    """Files that `write_embeddings`, for shards or images, or `embed_text_files` wrote.

    Attributes:
        out: the folder.
        what: "features" or "embeddings" for shards, "images" for images, "texts" or "tokens" for text files.
        dims: dimensions of each vector.
        samples: number of samples in the shards, or of images; 0 for text files.
        texts: number of captions, or of lines in the text files.
        files: number of files.
        before: number of files that an earlier call wrote.
        bad: samples or lines that could not be embedded.
        bytes: size of all files.
        done: number of samples or texts that this call embedded.
        seconds: duration of this call.
        images: members of the shards that may hold an image.
        missing: names of the shards, or parts of the images, that have no file yet; other parts of the work write them.
            Until they do, `samples`, `texts`, `bad` and `bytes` are those of the files that are there.
    """

    out: Path
    what: Literal["features", "embeddings", "images", "texts", "tokens"]
    dims: int
    samples: int
    texts: int
    files: int
    before: int
    bad: list[BadRecord]
    bytes: int
    done: int
    seconds: float
    images: tuple[str, ...] = IMAGE_EXTENSIONS
    missing: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return a summary for the terminal, with the next command."""
        contents = {
            "features": f"image features of {self.samples:,} samples",
            "embeddings": f"embeddings of {self.samples:,} samples and {self.texts:,} captions",
            "images": f"embeddings of {plural(self.samples, 'image')}",
            "texts": f"embeddings of {self.texts:,} texts",
            "tokens": f"embeddings of the tokens of {self.texts:,} texts",
        }
        text = [
            f"{self.out}: {contents[self.what]} in {plural(self.files, 'file')}, {self.dims} dimensions, "
            f"{self.bytes / 1e6:,.1f} MB"
        ]
        if self.before:
            kept = "all of them" if self.before == self.files else f"{self.before:,} of them"
            text.append(f"{kept} were there before")
        if self.done:
            unit = "images" if self.what == "images" else "samples" if self.samples else "texts"
            text.append(f"{self.done:,} {unit} in {self.seconds:.1f} s, {self.done / self.seconds:,.0f} {unit}/s")
        if self.bad and self.what == "images":
            text.append(
                f"{plural(len(self.bad), 'image')} cannot be used: {causes(self.bad)}; all are listed in "
                f"{self.out / BAD}"
            )
        elif self.bad and self.samples:
            content = "image" if self.what == "features" else "image or caption"
            text.append(
                f"{len(self.bad):,} samples lack a usable {content}: {causes(self.bad)}; all are listed in "
                f"{self.out / BAD}"
            )
        elif self.bad:
            text.append(f"{len(self.bad):,} texts could not be read: {causes(self.bad)}")
        if self.missing:
            names = ", ".join(file_name(name) for name in self.missing[:3])
            more = ", ..." if len(self.missing) > 3 else ""
            text.append(f"{plural(len(self.missing), 'file')} still missing, which other parts write: {names}{more}")
        elif self.what == "features":
            text.append(
                f"next: dualenc fit --config run.yaml --model.image_tuning.locked true "
                f"--data.features {quote(str(self.out))}{image_argument(self.images)}"
            )
        return text


def write_arrays(path: Path, arrays: dict[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically."""
    with atomic_write(path) as partial:
        # A single key makes the bytes reproducible: safetensors writes several keys in random order.
        save_file(arrays, partial, {KEY: json.dumps(about)})


# Shards


def write_embeddings(
    index: ShardIndex | FileParts,
    out: str | os.PathLike[str],
    about: Mapping[str, Any],
    transform: Callable[[Tensor], Tensor],
    of_images: Callable[[Tensor], Tensor],
    of_texts: Callable[[list[str]], Tensor] | None = None,
    *,
    part: tuple[int, int] = (0, 1),
    workers: int = 2,
    batch_size: int = 64,
    track: Track = lambda items, total: items,
) -> Embedded:
    """Write image features, or embeddings of images and captions, for every sample of shards, or for image files.

    A resumed call writes the same files as one without a stop, since batches end with their shard. So do several
    processes, each with a part of the shards: whoever finds the files of all shards writes the totals.

    Args:
        index: index of complete shards, or image files in parts.
        out: folder for a file of each shard or part, `embed.json` and `bad.jsonl`.
        about: content of `embed.json`: `what` is "features", "embeddings" or, for image files, "images"; `made_by` a
            fingerprint, `precision` the one of the towers, `model` the name of the model, `captions` the source of the
            captions, `dims` the dimensions of each vector.
        transform: function from uint8 (3, H, W) to uint8 (3, S, S).
        of_images: function from uint8 (B, 3, S, S) to (B, dims).
        of_texts: function from n strings to (n, dims); None for features and image files.
        part: (i, n) to embed only the shards whose number is i modulo n.
        workers: processes that decode; 0 to decode in this process.
        batch_size: images per forward pass.
        track: wraps the batches, whose number is `total`, for a progress bar.

    Raises:
        DataError: If two shards share a name, a shard cannot be read, or the folder was begun with other options.
    """
    out, began = Path(out), time.monotonic()
    captions = about["captions"] if of_texts else None
    if captions is not None:
        caption_members(captions)  # raises if it is not understood
    check_loading(batch_size, workers)
    inputs = _inputs(index)
    mine = part_numbers(part, len(inputs))
    plan = _begin(out, {**about, "members": list(index.images)}, inputs)
    names = list(inputs)
    todo = [number for number in mine if not _finished(out, names[number], plan)]
    embed = Towers(transform, of_images, about["dims"], of_texts, captions)
    for number, parts in embed_parts(index, todo, embed, workers=workers, batch_size=batch_size, track=track):
        _write_shard(out, index.parts[number], about, parts)
    return _embedded(index, out, about, plan, todo, began)


def _embedded(
    index: ShardIndex | FileParts,
    out: Path,
    about: Mapping[str, Any],
    plan: Mapping[str, Any],
    todo: Sequence[int],
    began: float,
) -> Embedded:
    """Return what the folder holds after this call has embedded `todo`, and write the totals if nothing is missing."""
    names = [part.facts["name"] for part in index.parts]
    there = [number for number, name in enumerate(names) if _finished(out, name, plan)]
    files = {number: EmbeddingFile(out / file_name(names[number])) for number in there}
    bad = _bad_samples(index, files)
    texts = sum(file.rows("text").get_shape()[0] for file in files.values() if "text" in file.names)
    if len(there) == len(names):
        _finish(out, {**plan, "samples": len(index), "texts": texts, "bad": len(bad)}, bad)
    return Embedded(
        out=out,
        what=about["what"],
        dims=about["dims"],
        samples=sum(len(index.parts[number]) for number in there),
        texts=texts,
        files=len(there),
        before=len(there) - len(todo),
        bad=bad,
        bytes=sum(file.path.stat().st_size for file in files.values()),
        done=sum(len(index.parts[number]) for number in todo),
        seconds=time.monotonic() - began,
        images=index.images,
        missing=tuple(name for number, name in enumerate(names) if number not in files),
    )


def part_numbers(part: tuple[int, int], count: int) -> range:
    """Return the numbers below `count` that are i modulo n, for a part (i, n) of the work.

    Raises:
        DataError: If i is not from 0 to n - 1.
    """
    first, step = part
    if not 0 <= first < step:
        raise DataError(f"part {first}/{step} must be I/N with I from 0 to N - 1")
    return range(first, count, step)


def missing_files(out: str | os.PathLike[str], index: ShardIndex | FileParts) -> list[str]:
    """Return the names of the shards, or parts of the images, whose embeddings a folder lacks.

    Args:
        out: folder of `write_embeddings`.
        index: index of the shards, or image files in parts.

    Raises:
        DataError: If the folder was not begun, or with other shards, or a file is damaged.
    """
    out = Path(out)
    plan = read_about(out)
    if plan is None:
        raise DataError(f"{out} holds no {ABOUT}: nothing was embedded there")
    inputs = dict(sorted(_inputs(index).items()))
    check_same(out, plan, {"inputs": inputs}, {"inputs": other_inputs(plan["inputs"], inputs)})
    return [name for name in _inputs(index) if not _finished(out, name, plan)]


def check_loading(batch_size: int, workers: int) -> None:
    """Refuse a number of images at once, or of workers, that is out of range.

    Raises:
        DataError: If it is.
    """
    if batch_size < 1 or workers < 0:
        raise DataError(f"batch_size {batch_size} must be 1 or more, workers {workers} 0 or more")


class Towers(NamedTuple):
    """The functions that embed the content of samples.

    Attributes:
        transform: function from uint8 (3, H, W) to uint8 (3, S, S).
        of_images: function from uint8 (B, 3, S, S) to (B, dims).
        dims: dimensions of each vector.
        of_texts: function from n strings to (n, dims); None to embed images only.
        captions: source of the captions for it.
    """

    transform: Callable[[Tensor], Tensor]
    of_images: Callable[[Tensor], Tensor]
    dims: int
    of_texts: Callable[[list[str]], Tensor] | None = None
    captions: str | None = None


def embed_parts(
    index: ShardIndex | FileParts,
    numbers: Sequence[int],
    towers: Towers,
    *,
    workers: int = 2,
    batch_size: int = 64,
    track: Track = lambda items, total: items,
) -> Iterator[tuple[int, list["EmbeddedBatch"]]]:
    """Embed shards, or parts of image files, and yield the number of each with its batches, which end with it.

    Args:
        index: index of complete shards, or image files in parts.
        numbers: numbers of the parts to embed.
        towers: functions that embed.
        workers, batch_size, track: see `write_embeddings`.

    Raises:
        DataError: If a shard cannot be read.
    """
    reader = _Reader(index, towers.transform, towers.captions, batch_size)
    with reader.batches(numbers, workers, track) as batches:
        for number in numbers:
            yield number, [_embed(next(batches), towers) for _ in reader.requests(number)]


def _bad_samples(index: ShardIndex | FileParts, files: Mapping[int, EmbeddingFile]) -> list[BadRecord]:
    """Return the samples that could not be embedded, which the files name, by the number of their shard."""
    return [
        BadRecord(index.starts[number] + place, str(index.parts[number]), index.parts[number].key(place), *why)
        for number, file in files.items()
        for place, why in file.bad.items()
    ]


def _finish(out: Path, about: Mapping[str, Any], bad: Sequence[BadRecord]) -> None:
    """Write the totals and the list of bad samples, and remove partial files; several processes may do so at once."""
    if bad:
        lines = ({"shard": x.shard, "key": x.key, "cause": x.cause, "detail": x.detail} for x in bad)
        write_text(out / BAD, "".join(json.dumps(line) + "\n" for line in lines))
    write_json(out / ABOUT, about, indent=1)
    for partial in out.glob("*.part"):
        partial.unlink(missing_ok=True)


def _inputs(index: ShardIndex | FileParts) -> dict[str, str]:
    """Return the digests of the shards by name."""
    found: dict[str, Shard | FilePart] = {}
    for shard in index.parts:
        name = shard.facts["name"]
        if (other := found.setdefault(name, shard)) is not shard:
            raise DataError(
                f"{other} and {shard} would both be written to {file_name(name)}: embed them into two folders"
            )
    return {name: shard.facts["digest"] for name, shard in found.items()}


def _begin(out: Path, about: dict[str, Any], inputs: dict[str, str]) -> dict[str, Any]:
    """Create the folder with its `embed.json`, or check that it was begun with the same options; return these."""
    plan = {"format": FORMAT, **about, "inputs": dict(sorted(inputs.items()))}
    begun = read_about(out) or _create(out, plan)
    begun = {"precision": "fp32", **begun}  # Folders of the first release do not name it.
    same = "in weights, architecture or preprocessing"
    descriptions = {
        "what": {"features": "--features", "images": "image files"}.get(begun["what"], "shards and no --features"),
        "made_by": f"another model ({begun['model']}, which differs {same})",
        "precision": f"--precision {begun['precision']}",
        "members": f"--image {';'.join(begun['members'])}",
        "inputs": "other images, or images that have changed since"
        if begun["what"] == "images"
        else other_inputs(begun["inputs"], plan["inputs"]),
    }
    check_same(
        out,
        begun,
        {name: plan[name] for name in ("format", "what", "captions", "members", "made_by", "precision", "inputs")},
        descriptions,
    )
    return plan


def _create(out: Path, plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """Create the folder with its `embed.json`, unless another process does so first; return its content."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} must be a folder")
    out.mkdir(parents=True, exist_ok=True)
    if any(path.suffix != ".part" for path in out.iterdir()):
        begun = read_about(out)  # Another process may have written it since it was looked for.
        if begun is None:
            raise DataError(f"{out} holds files that embed did not write: name a new folder")
        return begun
    temporary = out / f".{ABOUT}-{uuid4().hex}.part"
    write_json(temporary, plan, indent=1)
    try:
        # A link fails where the file exists, which may have the totals of another process by then.
        os.link(temporary, out / ABOUT)
    except FileExistsError:
        return read_about(out) or plan
    except OSError:  # some file systems have no links
        os.replace(temporary, out / ABOUT)
    finally:
        temporary.unlink(missing_ok=True)
    return plan


def _finished(out: Path, name: str, plan: Mapping[str, Any]) -> bool:
    """Return whether an earlier call wrote the file of a shard."""
    path = out / file_name(name)
    if not path.exists():
        return False
    file = EmbeddingFile(path)
    if (file.about["digest"], file.about["made_by"]) != (plan["inputs"][name], plan["made_by"]):
        raise damaged(path)
    return True


@dataclass
class ReadBatch:
    """Consecutive samples of a shard, decoded.

    Attributes:
        first: number of the first sample in its shard.
        images: images of the good samples, uint8 (G, 3, S, S).
        good: numbers of the samples with an image.
        sizes: height and width of the good images before the transform.
        hashes: hash of the image file of each sample; 0 for a bad one.
        texts: captions of all samples.
        text_rows: number of the sample of each caption.
        bad: number, cause and detail of each bad sample.
    """

    first: int
    images: Tensor
    good: list[int]
    sizes: list[tuple[int, int]]
    hashes: list[int]
    texts: list[str]
    text_rows: list[int]
    bad: list[tuple[int, str, str]]


class _Reader(Dataset["ReadBatch"]):
    """Reader of shards in batches that end with their shard."""

    def __init__(
        self,
        index: ShardIndex | FileParts,
        transform: Callable[[Tensor], Tensor],
        captions: str | None,
        batch_size: int,
    ) -> None:
        self.current_sample = CurrentSample()
        self.index: Any = index  # whose samples have the same methods
        self.transform, self.captions, self.batch_size = transform, captions, batch_size

    def requests(self, number: int) -> list[tuple[int, range]]:
        """Return the batches of a shard, at least one, as pairs of its number and rows of the index."""
        start, stop = self.index.starts[number : number + 2]
        firsts = range(start, max(stop, start + 1), self.batch_size)
        return [(number, range(first, min(first + self.batch_size, stop))) for first in firsts]

    @contextmanager
    def batches(self, numbers: Sequence[int], workers: int, track: Track) -> Iterator[Iterator["ReadBatch"]]:
        """Give an iterator over the batches of shards, shard by shard."""
        requests = [request for number in numbers for request in self.requests(number)]
        workers = workers if requests else 0
        size = self.batch_size * tensor_bytes(self.transform) if workers else 0
        loader = WorkerLoader(self, workers=workers, timeout=TIMEOUT, sampler=requests, batch_bytes=size)
        try:
            batches = iter(track(loader, total=len(requests)))
            yield batches
            for _ in batches:  # An exhausted iterator closes its progress bar.
                pass
        finally:
            loader.close()

    def __getitem__(self, request: tuple[int, range]) -> ReadBatch:
        shard, rows = request
        start = self.index.starts[shard]
        out = ReadBatch(rows.start - start, torch.empty(0), [], [], [], [], [], [])
        images = []
        for row in rows:
            self.current_sample.start(row)
            sample, number = self.index[row], row - start
            try:
                image, image_hash = decode_and_hash(sample)
                images.append(self.transform(image))
                out.good.append(number)
                out.sizes.append((image.shape[-2], image.shape[-1]))
                out.hashes.append(image_hash)
            except BadSample as error:
                out.bad.append((number, error.cause, error.detail))
                out.hashes.append(0)
            if self.captions is None:
                continue
            try:
                texts = captions_of(sample, self.captions)
                out.texts += texts
                out.text_rows += [number] * len(texts)
            except BadSample as error:
                if number in out.good:  # A bad sample is listed once.
                    out.bad.append((number, error.cause, error.detail))
        if images:
            out.images = torch.stack(images)
        self.current_sample.finish()
        return out

    def locate(self, row: int) -> tuple[str, str]:
        """See `dualenc.data.workers.WatchedDataset.locate`."""
        sample = self.index[row]
        return sample.shard, str(sample)


@dataclass
class EmbeddedBatch:
    """Embeddings of consecutive samples of a shard.

    Attributes:
        images: (n, D), with rows of NaN for bad samples.
        texts: (m, D) of the captions; None for features.
        read: the samples, without their images.
    """

    images: np.ndarray
    texts: np.ndarray | None
    read: ReadBatch


def _embed(read: ReadBatch, towers: Towers) -> EmbeddedBatch:
    """Embed a batch, and mark samples whose embedding is non-finite as bad."""
    images = np.full((len(read.hashes), towers.dims), np.nan, np.float32)
    if read.good:
        images[np.array(read.good) - read.first] = towers.of_images(read.images).numpy()
        for number in read.good:
            if not np.isfinite(images[number - read.first]).all():
                images[number - read.first] = np.nan
                read.bad.append((number, "the embedding is non-finite", ""))
    texts = None
    if towers.of_texts is not None:
        texts = towers.of_texts(read.texts).numpy() if read.texts else np.zeros((0, towers.dims), np.float32)
    read.images = torch.empty(0)  # This frees the memory before the shard is complete.
    return EmbeddedBatch(images, texts, read)


def _write_shard(out: Path, shard: Shard | FilePart, about: Mapping[str, Any], parts: list[EmbeddedBatch]) -> None:
    """Write the file of a shard."""
    reads = [part.read for part in parts]
    arrays = {"piece": np.array([x for read in reads for x in read.hashes], np.uint64).view(np.int64)}
    images = np.concatenate([part.images for part in parts])
    arrays["features" if about["what"] == "features" else "image"] = images
    if about["what"] == "embeddings":
        arrays["text_rows"] = np.array([row for read in reads for row in read.text_rows], np.int64)
        arrays["text"] = np.concatenate([part.texts for part in parts if part.texts is not None])
    bad = sorted(item for read in reads for item in read.bad)
    once = {item[0]: item for item in reversed(bad)}  # the first cause of each sample
    metadata = {
        "format": FORMAT,
        "digest": shard.facts["digest"],
        "made_by": about["made_by"],
        "keys": [shard.key(number) for number in range(len(shard))],
        "bad": [once[number] for number in sorted(once)],
    }
    path = out / file_name(shard.facts["name"])
    try:
        write_arrays(path, arrays, metadata)
    except FileNotFoundError:
        # A process that finished the folder has removed the temporary file, since this shard has its file.
        if not path.exists():
            raise
