"""Embeddings and image features as files: one safetensors file a shard or text file, whole or not there.

A stopped command is continued by the same call: files that are there are kept.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
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
from dualenc.data.pairs import captions_of, check_captions, decode_and_hash
from dualenc.data.prepare.resumable import check_same, other_inputs
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.shard import Shard
from dualenc.data.text.dataset import Use, texts_of
from dualenc.data.text.files import TextFile, TextIndex
from dualenc.data.workers import CurrentSample, TimeoutDataLoader
from dualenc.inference.text_model import TextPredictor
from dualenc.utils.errors import BadSample, DataError
from dualenc.utils.files import atomic_write, write_json, write_text
from dualenc.utils.text import plural

CHUNK = 4096  # lines that are read at a time
Track = Callable[..., Iterable[Any]]  # wraps an iterable, of which `total` says the length


@dataclass(frozen=True)
class Embedded:
    """Files that `embed_shards` or `embed_text_files` wrote.

    Attributes:
        out: the folder.
        what: "features" or "embeddings" of shards, "texts" or "tokens" of text files.
        dims: numbers of each vector.
        samples: samples of the shards; of text files 0.
        texts: captions, or lines of the text files.
        files: how many there are.
        before: files that an earlier call had written.
        bad: what could not be embedded.
        bytes: size of the files.
        done: samples or texts of this call.
        seconds: time that they took.
    """

    out: Path
    what: Literal["features", "embeddings", "texts", "tokens"]
    dims: int
    samples: int
    texts: int
    files: int
    before: int
    bad: list[BadRecord]
    bytes: int
    done: int
    seconds: float

    def lines(self) -> list[str]:
        """For the screen, with what to do next."""
        contents = {
            "features": f"image features of {self.samples:,} samples",
            "embeddings": f"embeddings of {self.samples:,} samples and {self.texts:,} captions",
            "texts": f"vectors of {self.texts:,} texts",
            "tokens": f"vectors of the tokens of {self.texts:,} texts",
        }
        text = [
            f"{self.out}: {contents[self.what]} in {plural(self.files, 'file')}, {self.dims} dimensions, "
            f"{self.bytes / 1e6:,.1f} MB"
        ]
        if self.before:
            there = "all of them" if self.before == self.files else f"{self.before:,} of them"
            text.append(f"{there} were there before")
        if self.done:
            unit = "samples" if self.samples else "texts"
            text.append(f"{self.done:,} {unit} in {self.seconds:.1f} s, {self.done / self.seconds:,.0f} {unit}/s")
        if self.bad and self.samples:
            lack = "image" if self.what == "features" else "image or no caption"
            text.append(
                f"{len(self.bad):,} samples have no {lack} that can be used: {causes(self.bad)}; all are named in "
                f"{self.out / BAD}"
            )
        elif self.bad:
            text.append(f"{len(self.bad):,} texts could not be read: {causes(self.bad)}")
        if self.what == "features":
            text.append(
                f"next: dualenc fit --config run.yaml --model.image_tuning.locked true --data.features {self.out}"
            )
        return text


def _write(path: Path, arrays: dict[str, np.ndarray], about: Mapping[str, Any]) -> None:
    with atomic_write(path) as beside:
        # One key: the library writes several in another order each time.
        save_file(arrays, beside, {KEY: json.dumps(about)})


# Shards


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
    track: Track = lambda items, total: items,
) -> Embedded:
    """Writes image features, or embeddings of images and captions, of every sample of shards.

    The files of a stopped and continued command are the same as without the stop: batches end with their shard.

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
    captions = about["captions"] if of_texts else None
    if captions is not None:
        check_captions(captions)
    if batch_size < 1 or workers < 0:
        raise DataError(f"batch_size {batch_size} must be 1 or more, workers {workers} 0 or more")
    inputs = _inputs(index)
    plan = _begin(out, {"format": FORMAT, **about, "inputs": dict(sorted(inputs.items()))})
    todo = [number for number, name in enumerate(inputs) if not _finished(out, name, plan)]
    for beside in out.glob("*.part"):
        beside.unlink()
    reader = _Reader(index, transform, captions, batch_size)
    with reader.batches(todo, workers, track) as batches:
        for number in todo:
            shard = index.parts[number]
            parts = [_embed(next(batches), about["dims"], of_images, of_texts) for _ in reader.requests(number)]
            _write_shard(out, shard, about, parts)
    files = [EmbeddingFile(out / file_name(name)) for name in inputs]
    bad = _write_bad(out, index, files)
    texts = sum(file.rows("text").get_shape()[0] for file in files if "text" in file.names)
    write_json(out / ABOUT, {**plan, "samples": len(index), "texts": texts, "bad": len(bad)}, indent=1)
    return Embedded(
        out=out,
        what=about["what"],
        dims=about["dims"],
        samples=len(index),
        texts=texts,
        files=len(files),
        before=len(files) - len(todo),
        bad=bad,
        bytes=sum(file.path.stat().st_size for file in files),
        done=sum(len(index.parts[number]) for number in todo),
        seconds=time.monotonic() - began,
    )


def _write_bad(out: Path, index: ShardIndex, files: Sequence[EmbeddingFile]) -> list[BadRecord]:
    """Write OUT/bad.jsonl, if the files name samples that could not be embedded, and return them."""
    bad = [
        BadRecord(start + place, str(shard), shard.key(place), *why)
        for shard, file, start in zip(index.parts, files, index.starts)
        for place, why in file.bad.items()
    ]
    if bad:
        lines = ({"shard": x.shard, "key": x.key, "cause": x.cause, "detail": x.detail} for x in bad)
        write_text(out / BAD, "".join(json.dumps(line) + "\n" for line in lines))
    return bad


def _inputs(index: ShardIndex) -> dict[str, str]:
    """The shards' names and digests."""
    found: dict[str, Shard] = {}
    for shard in index.parts:
        name = shard.facts["name"]
        if (other := found.setdefault(name, shard)) is not shard:
            raise DataError(f"{other} and {shard} would both become {file_name(name)}: embed them into two folders")
    return {name: shard.facts["digest"] for name, shard in found.items()}


def _begin(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Makes the folder, or looks whether it was begun with the same."""
    begun = read_about(out)
    if begun is None:
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is no folder")
        if out.exists() and any(path.suffix != ".part" for path in out.iterdir()):
            raise DataError(f"{out} holds files that are not of embed: name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / ABOUT, plan, indent=1)
        return plan
    same = "in weights, architecture or preprocessing"
    tell = {
        "what": "--features" if begun["what"] == "features" else "no --features",
        "made_by": f"another model ({begun['model']}, which differs {same})",
        "inputs": other_inputs(begun["inputs"], plan["inputs"]),
    }
    check_same(out, begun, {name: plan[name] for name in ("format", "what", "captions", "made_by", "inputs")}, tell)
    return plan


def _finished(out: Path, name: str, plan: dict[str, Any]) -> bool:
    """Whether an earlier call has written the file of a shard."""
    path = out / file_name(name)
    if not path.exists():
        return False
    file = EmbeddingFile(path)
    if (file.about["digest"], file.about["made_by"]) != (plan["inputs"][name], plan["made_by"]):
        raise damaged(path)
    return True


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


class _Reader(Dataset["_Read"]):
    """Reads shards in batches that end with their shard."""

    def __init__(
        self, index: ShardIndex, transform: Callable[[Tensor], Tensor], captions: str | None, batch_size: int
    ) -> None:
        self.current_sample = CurrentSample()
        self.index, self.transform, self.captions, self.batch_size = index, transform, captions, batch_size

    def requests(self, number: int) -> list[tuple[int, range]]:
        """The batches of a shard; an empty one has one."""
        start, stop = self.index.starts[number : number + 2]
        firsts = range(start, max(stop, start + 1), self.batch_size)
        return [(number, range(first, min(first + self.batch_size, stop))) for first in firsts]

    @contextmanager
    def batches(self, numbers: Sequence[int], workers: int, track: Track) -> Iterator[Iterator["_Read"]]:
        """The batches of shards, one shard after the other."""
        requests = [request for number in numbers for request in self.requests(number)]
        workers = workers if requests else 0
        options = {"prefetch_factor": 4} if workers else {}
        loader = TimeoutDataLoader(self, workers=workers, timeout=TIMEOUT, sampler=requests, **options)
        try:
            batches = iter(track(loader, total=len(requests)))
            yield batches
            for _ in batches:  # the bar's end
                pass
        finally:
            loader.close()

    def __getitem__(self, request: tuple[int, range]) -> _Read:
        number, rows = request
        start = self.index.starts[number]
        out = _Read(rows.start - start, torch.empty(0), [], [], [], [], [])
        images = []
        for row in rows:
            self.current_sample.start(row)
            sample, place = self.index[row], row - start
            try:
                picture, piece = decode_and_hash(sample)
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
        self.current_sample.finish()
        return out

    def locate(self, row: int) -> tuple[str, str]:
        """See `dualenc.data.workers.WatchedDataset.locate`."""
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


def _write_shard(out: Path, shard: Shard, about: Mapping[str, Any], parts: list[_Part]) -> None:
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
    _write(out / file_name(shard.facts["name"]), arrays, metadata)


# Files of texts


def embed_text_files(
    predictor: TextPredictor,
    files: Sequence[str],
    out: str | os.PathLike[str],
    column: str = "text",
    *,
    tokens: bool = False,
    batch_size: int = 256,
    track: Track = lambda items, total: items,
) -> Embedded:
    """Writes OUT/NAME.safetensors for each file of texts.

    `embeddings` (N, D) are unit vectors of the lines; or, of `tokens`, `tokens` (M, D) are the hidden states of the
    tokens of all lines, special ones included, `ids` (M,) their ids, and line i is `offsets[i]` to `offsets[i + 1]` of
    (N + 1,). A line that cannot be read has a row of NaN, or no token, and is named in the result.

    Args:
        predictor: the model.
        files: `.txt`, `.tsv`, `.csv`, `.jsonl`: paths, globs, brace patterns.
        out: folder, made if missing.
        column: of the text.
        tokens: writes vectors of the tokens.
        batch_size: texts a forward pass.
        track: wraps the chunks of lines, of which `total` says how many there are, for a progress bar.

    Raises:
        DataError: a file is missing, has no such column, or shares its name with another; or a file of OUT is of
            another model or other texts.
    """
    out, began = Path(out), time.monotonic()
    index = TextIndex.build(list(files), [column])
    names = [Path(file.url).name for file in index.parts]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise DataError(f"two files are called {twice[0]}: embed them into two folders")
    out.mkdir(parents=True, exist_ok=True)
    what: Literal["texts", "tokens"] = "tokens" if tokens else "texts"
    common = {"made_by": predictor.fingerprint, "column": column, "what": what}
    paths, bad = [out / f"{name}.safetensors" for name in names], []
    todo: list[tuple[TextFile, Path, dict[str, Any]]] = []
    for file, path in zip(index.parts, paths):
        about = {"digest": file.digest, **common}
        if path.exists():
            bad += _bad_lines(path, about)
        else:
            todo.append((file, path, about))
    bad += _write_texts(predictor, todo, batch_size, track)
    return Embedded(
        out=out,
        what=what,
        dims=predictor.model.config.width,
        samples=0,
        texts=len(index),
        files=len(paths),
        before=len(paths) - len(todo),
        bad=bad,
        bytes=sum(path.stat().st_size for path in paths),
        done=sum(len(file) for file, _, _ in todo),
        seconds=time.monotonic() - began,
    )


def _write_texts(
    predictor: TextPredictor, todo: list[tuple[TextFile, Path, dict[str, Any]]], batch_size: int, track: Track
) -> list[BadRecord]:
    """Write a file for each file of texts, and return the lines that cannot be read."""
    chunks = [(n, first) for n, (file, _, _) in enumerate(todo) for first in range(0, len(file), CHUNK)]
    parts: list[dict[str, np.ndarray]] = []
    bad, here = [], []
    for n, first in track(chunks, total=len(chunks)):
        file, path, about = todo[n]
        tokens, use = about["what"] == "tokens", Use("", about["column"])
        rows, texts = _read_lines(file, use, range(first, min(first + CHUNK, len(file))), here)
        parts.append(_vectors(predictor, rows, texts, min(CHUNK, len(file) - first), tokens, batch_size))
        if first + CHUNK >= len(file):
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            if tokens:
                arrays["offsets"] = np.concatenate([[0], np.cumsum(arrays.pop("lengths"))])
            _write(path, arrays, {**about, "bad": here})
            bad, parts, here = [*bad, *here], [], []
    return bad


def _bad_lines(path: Path, about: Mapping[str, Any]) -> list[BadRecord]:
    """The bad lines of a file that an earlier call has written.

    Raises:
        DataError: it is damaged, or of something else.
    """
    try:
        with safe_open(path, "numpy") as file:
            kept = json.loads(file.metadata()[KEY])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged or not of dualenc embed: remove it, or name a new folder") from None
    if {name: kept.get(name) for name in about} != about:
        raise DataError(f"{path} is of another model, other texts or another choice: name a new folder")
    return [BadRecord(*item) for item in kept["bad"]]


def _read_lines(file: TextFile, use: Use, numbers: range, bad: list[BadRecord]) -> tuple[list[int], list[str]]:
    """The texts of lines, and their places among these; `bad` takes the others."""
    own = TextIndex([file])
    rows, texts = [], []
    for row in numbers:
        try:
            texts.append(texts_of(own[row], use)[0])
            rows.append(row - numbers.start)
        except BadSample as error:
            bad.append(BadRecord(row, file.url, file.key(row), error.cause, error.detail))
    return rows, texts


def _vectors(
    predictor: TextPredictor, rows: list[int], texts: list[str], count: int, tokens: bool, batch_size: int
) -> dict[str, np.ndarray]:
    width = predictor.model.config.width
    if not tokens:
        found = np.full((count, width), np.nan, np.float32)
        if texts:
            found[rows] = predictor.embed(texts, batch_size).numpy()
        return {"embeddings": found}
    lengths, ids, vectors = np.zeros(count, np.int64), [np.zeros(0, np.int64)], [np.zeros((0, width), np.float32)]
    for row, own, (_, hidden) in zip(rows, predictor.tokenizer.encode(texts), predictor.embed_tokens(texts)):
        lengths[row] = len(own)
        ids.append(np.array(own, np.int64))
        vectors.append(hidden.numpy())
    return {"lengths": lengths, "ids": np.concatenate(ids), "tokens": np.concatenate(vectors)}
