"""Embeddings and image features of whole shards: one safetensors file a shard, written once."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from dualenc.data.image_features import ABOUT, BAD, FORMAT, KEY, TIMEOUT, _about, _damaged, _File, _file_name
from dualenc.data.loading.bad_samples import Bad, causes
from dualenc.data.pairs import captions_of, read_picture
from dualenc.data.prepare.resumable import check_same, other_inputs, write_whole
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.shard import Shard
from dualenc.data.workers import Noting, PatientLoader
from dualenc.utils.errors import BadSample, DataError


@dataclass(frozen=True)
class Embedded:
    """What `embed_shards` wrote."""

    out: str
    what: str
    dims: int
    samples: int
    texts: int
    shards: int
    before: int  # shards that an earlier call had written
    bad: list[Bad]
    seconds: float
    done: int  # samples in these seconds
    bytes: int

    def lines(self) -> list[str]:
        """For the screen, with what to do next."""
        images = "image features" if self.what == "features" else "embeddings"
        text = [
            f"{self.out}: {images} of {self.samples:,} samples"
            f"{f' and {self.texts:,} captions' if self.what != 'features' else ''} in {self.shards:,} "
            f"file{'s' * (self.shards != 1)}, {self.dims} dimensions, {self.bytes / 1e6:,.1f} MB"
        ]
        if self.before:
            there = "all of them" if self.before == self.shards else f"{self.before:,} of them"
            text.append(f"{there} were there before")
        if self.done:
            text.append(f"{self.done:,} samples in {self.seconds:.1f} s, {self.done / self.seconds:,.0f} samples/s")
        if self.bad:
            lack = "image" if self.what == "features" else "image or no caption"
            text.append(
                f"{len(self.bad):,} samples have no {lack} that can be used: {causes(self.bad)}; all are named in "
                f"{Path(self.out) / BAD}"
            )
        if self.what == "features":
            text.append(
                f"next: dualenc fit --config run.yaml --model.image_tuning.locked true --data.features {self.out}"
            )
        return text


def embed_shards(
    index: ShardIndex,
    out: str | os.PathLike[str],
    about: Mapping[str, Any],
    transform: Callable[[Tensor], Tensor],
    of_images: Callable[[Tensor], Tensor],
    of_texts: Callable[[list[str]], Tensor] | None = None,
    *,
    workers: int = 2,
    batch_size: int = 64,
    track: Callable[..., Iterable[Any]] = lambda items, total: items,
) -> Embedded:
    """Writes image features, or embeddings of images and captions, of every sample of shards.

    The same call again goes on where a stopped one was, and the files are the same as without the stop: batches end
    with their shard.

    Args:
        index: whole shards.
        out: folder for a file of each shard, `embed.json` and `bad.jsonl`.
        about: for `embed.json`; `what` is "features" or "embeddings", `made_by` a fingerprint, `model` a name for
            people, `captions` where they are read from, `dims` how many numbers each image becomes.
        transform: uint8 (3, H, W) to uint8 (3, S, S).
        of_images: uint8 (B, 3, S, S) to (B, dims).
        of_texts: n strings to (n, dims); absent for features.
        workers: processes that decode; 0 for none.
        batch_size: images at once.
        track: wraps the batches, of which `total` says how many there are, for a progress bar.

    Raises:
        DataError: two shards have one name, OUT holds something else or was begun otherwise, a shard cannot be read.
    """
    out, began = Path(out), time.monotonic()
    captions = about["captions"] if of_texts is not None else None
    if captions not in (None, "txt") and not captions.startswith("json."):
        raise DataError(f"captions {captions!r} must be 'txt' or 'json.FIELD'")
    if batch_size < 1 or workers < 0:
        raise DataError(f"batch_size {batch_size} must be 1 or more, workers {workers} 0 or more")
    inputs = _inputs(index)
    plan = {"format": FORMAT, **about, "inputs": dict(sorted(inputs.items()))}
    _begin(out, plan)
    ready = {name: file for name in inputs if (file := _finished(out, name, plan)) is not None}
    todo = [number for number, name in enumerate(inputs) if name not in ready]
    for beside in out.glob("*.part"):
        beside.unlink()
    starts = np.cumsum([0, *(len(shard) for shard in index.parts)]).tolist()
    requests = [
        (number, range(first, min(first + batch_size, starts[number + 1])))
        for number in todo
        for first in range(starts[number], max(starts[number + 1], starts[number] + 1), batch_size)
    ]
    reader = _Reader(index, transform, captions)
    options = {"prefetch_factor": 4} if workers and requests else {}
    workers = workers if requests else 0
    loader = PatientLoader(reader, workers=workers, timeout=TIMEOUT, sampler=requests, **options)
    try:
        batches = iter(track(loader, total=len(requests)))
        for number in todo:
            shard = index.parts[number]
            count = max(1, -(-len(shard) // batch_size))
            parts = [_embed(next(batches), about["dims"], of_images, of_texts) for _ in range(count)]
            _write(out / _file_name(shard.facts["name"]), shard, about, parts)
        for _ in batches:  # the bar's end
            pass
    finally:
        loader.close()
    files = [_File(out / _file_name(name)) for name in inputs]
    bad = [
        Bad(start + place, str(shard), shard.key(place), *why)
        for shard, file, start in zip(index.parts, files, starts)
        for place, why in file.bad.items()
    ]
    names = ("shard", "key", "cause", "detail")
    if bad:
        lines = (json.dumps({name: getattr(item, name) for name in names}) + "\n" for item in bad)
        write_whole(out / BAD, "".join(lines))
    counts = {
        "samples": len(index),
        "texts": sum(file.rows("text").get_shape()[0] for file in files if "text" in file.names),
        "bad": len(bad),
    }
    write_whole(out / ABOUT, json.dumps({**plan, **counts}, indent=1) + "\n")
    return Embedded(
        out=str(out),
        what=about["what"],
        dims=about["dims"],
        samples=counts["samples"],
        texts=counts["texts"],
        shards=len(files),
        before=len(ready),
        bad=bad,
        seconds=time.monotonic() - began,
        done=sum(len(index.parts[number]) for number in todo),
        bytes=sum(file.path.stat().st_size for file in files),
    )


def _inputs(index: ShardIndex) -> dict[str, str]:
    """The shards' names and digests."""
    found: dict[str, Shard] = {}
    for shard in index.parts:
        name = shard.facts["name"]
        if (other := found.setdefault(name, shard)) is not shard:
            raise DataError(f"{other} and {shard} would both become {_file_name(name)}: embed them into two folders")
    return {name: shard.facts["digest"] for name, shard in found.items()}


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Makes the folder, or looks whether it was begun with the same."""
    begun = _about(out)
    if begun is None:
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is no folder")
        if out.exists() and any(path.suffix != ".part" for path in out.iterdir()):
            raise DataError(f"{out} holds files that are not of embed: name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / ABOUT, json.dumps(plan, indent=1) + "\n")
        return
    same = "in weights, architecture or preprocessing"
    tell = {
        "what": "--features" if begun["what"] == "features" else "no --features",
        "made_by": f"another model ({begun['model']}, which differs {same})",
        "inputs": other_inputs(begun["inputs"], plan["inputs"]),
    }
    check_same(out, begun, {name: plan[name] for name in ("format", "what", "captions", "made_by", "inputs")}, tell)


def _finished(out: Path, name: str, plan: dict[str, Any]) -> _File | None:
    """The file of a shard that an earlier call has written."""
    path = out / _file_name(name)
    if not path.exists():
        return None
    file = _File(path)
    if (file.about["digest"], file.about["made_by"]) != (plan["inputs"][name], plan["made_by"]):
        raise _damaged(path)
    return file


@dataclass
class _Read:
    """Some samples of a shard, one after the other."""

    first: int  # number of the first in its shard
    images: Tensor  # uint8 (good, 3, S, S)
    good: list[int]  # numbers in the shard
    pieces: list[int]  # of all of them
    texts: list[str]
    text_rows: list[int]
    bad: list[tuple[int, str, str]]  # number, cause, detail


class _Reader(Noting):
    def __init__(self, index: ShardIndex, transform: Callable[[Tensor], Tensor], captions: str | None) -> None:
        super().__init__()
        self.index, self.transform, self.captions = index, transform, captions

    def __getitem__(self, request: tuple[int, range]) -> _Read:
        number, rows = request
        start = self.index.starts[number]
        out = _Read(rows.start - start, torch.empty(0), [], [], [], [], [])
        images = []
        for row in rows:
            self.begin(row)
            sample, place = self.index[row], row - start
            try:
                picture, piece = read_picture(sample)
                images.append(self.transform(picture))
                out.good.append(place)
                out.pieces.append(piece)
            except BadSample as error:
                out.bad.append((place, error.cause, error.detail))
                out.pieces.append(0)
            if self.captions is None:
                continue
            try:
                texts = captions_of(sample, self.captions)
                out.texts += texts
                out.text_rows += [place] * len(texts)
            except BadSample as error:
                if place in out.good:  # one cause is enough
                    out.bad.append((place, error.cause, error.detail))
        if images:
            out.images = torch.stack(images)
        self.done()
        return out

    def where(self, row: int) -> tuple[str, str]:
        """See `Noting.where`."""
        sample = self.index[row]
        return sample.shard, str(sample)


@dataclass
class _Part:
    """Of a file."""

    images: np.ndarray  # (n, D), rows of NaN for the bad ones
    texts: np.ndarray | None  # (m, D)
    read: _Read


def _embed(
    read: _Read,
    dims: int,
    of_images: Callable[[Tensor], Tensor],
    of_texts: Callable[[list[str]], Tensor] | None,
) -> _Part:
    images = np.full((len(read.pieces), dims), np.nan, np.float32)
    if read.good:
        images[np.array(read.good) - read.first] = of_images(read.images).numpy()
        for place in read.good:
            if not np.isfinite(images[place - read.first]).all():
                images[place - read.first] = np.nan
                read.bad.append((place, "the model makes of it what is not finite", ""))
    texts = None
    if of_texts is not None:
        texts = of_texts(read.texts).numpy() if read.texts else np.zeros((0, dims), np.float32)
    read.images = torch.empty(0)  # its memory is free before the shard is done
    return _Part(images, texts, read)


def _write(path: Path, shard: Shard, about: Mapping[str, Any], parts: list[_Part]) -> None:
    reads = [part.read for part in parts]
    arrays = {"piece": np.array([piece for read in reads for piece in read.pieces], np.uint64).view(np.int64)}
    images = np.concatenate([part.images for part in parts])
    if about["what"] == "features":
        arrays["features"] = images
    else:
        arrays["text_rows"] = np.array([row for read in reads for row in read.text_rows], np.int64)
        arrays["image"] = images
        arrays["text"] = np.concatenate([part.texts for part in parts if part.texts is not None])
    bad = sorted(item for read in reads for item in read.bad)
    once = {item[0]: item for item in reversed(bad)}  # a sample whose caption and embedding are bad
    metadata = {
        "format": FORMAT,
        "digest": shard.facts["digest"],
        "made_by": about["made_by"],
        "keys": [shard.key(place) for place in range(len(shard))],
        "bad": [once[place] for place in sorted(once)],
    }
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # One key: the library writes several in another order each time.
        save_file(arrays, beside, {KEY: json.dumps(metadata)})
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
