"""Embeddings of evaluation sets, and the cache that keeps them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.inference.embedder import Embedder
from dualenc.metrics import zero_shot_classifier
from dualenc.utils.files import atomic_write
from dualenc.utils.urls import cache_folder

Track = Callable[[Iterable[Any]], Iterable[Any]]


class SetEmbeddings(NamedTuple):
    """An evaluation set, or the share of a rank, in the common space; on the CPU."""

    image: Tensor  # (n, E)
    text: Tensor  # (T, E), the captions; or (C, E), the zero-shot classifier
    rows: Tensor  # (n,) numbers of the samples that the images are of, ascending
    bad: list[tuple[int, str]]  # numbers of samples whose picture cannot be decoded; name and cause


class EmbeddingCache:
    """Embeddings that were made before, found by all that they depend on and never by a name.

    Args:
        embedder: whose weights stay as they are.
        folder: absent, `embeddings` among the user's cached files.
        limit: bytes; the files that were not used for longest go first.
    """

    def __init__(self, embedder: Embedder, folder: str | os.PathLike[str] | None = None, limit: int = 20 << 30) -> None:
        self.folder, self.limit = Path(folder or cache_folder() / "embeddings"), limit
        weight = next(embedder.model.parameters())
        self._made_by = [embedder.fingerprint, weight.device.type, str(weight.dtype)]
        self.reused: list[str] = []  # what was found

    def get(
        self,
        what: str,
        depends_on: Any,
        make: Callable[[], dict[str, Tensor]],
        keep: Callable[[], bool] = lambda: True,
    ) -> dict[str, Tensor]:
        """Tensors by name, made if they are not there.

        Args:
            what: for people.
            depends_on: all that they depend on beside the embedder; goes into JSON.
            make: makes them.
            keep: whether what was made is to be kept.
        """
        key = hashlib.blake2b(json.dumps([self._made_by, what, depends_on]).encode(), digest_size=16).hexdigest()
        path = self.folder / f"{key}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            found = make()
        else:
            with suppress(OSError):  # another user's
                os.utime(path)
            self.reused.append(what)
            return found
        if keep():
            self._write(path, found)
        return found

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        with suppress(OSError, SafetensorError):  # a cache that cannot be written is none
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as beside:
                save_file({name: x.contiguous() for name, x in tensors.items()}, beside)
            self._make_room()

    def _make_room(self) -> None:
        files = sorted(((path.stat(), path) for path in self.folder.iterdir()), key=lambda item: item[0].st_mtime)
        total = sum(status.st_size for status, _ in files)
        for status, path in files[:-1]:
            if total > self.limit:
                path.unlink(missing_ok=True)
                total -= status.st_size


def embed_set(
    embedder: Embedder,
    data: BenchmarkSet,
    workers: int = 0,
    track: Track = iter,
    cache: EmbeddingCache | None = None,
    rank: int = 0,
    world: int = 1,
) -> SetEmbeddings:
    """Embeddings of an evaluation set, or of the share of one rank; `score` takes those of the whole set.

    Args:
        embedder: the model.
        data: the set.
        workers: processes that decode.
        track: wraps the image batches, for a progress bar.
        cache: of embeddings; for whole sets.
        rank, world: which of how many parts, in order and as equal as they can be.
    """

    def part(count: int) -> range:
        share = np.array_split(np.arange(count), world)[rank]
        return range(share[0], share[-1] + 1) if len(share) else range(0)

    text = torch.empty(0, embedder.model.embed_dim)
    if data.kind in ("retrieval", "choice"):
        texts = data.texts or data.captions[0]
        if own := part(len(texts)):
            text = _embed_texts(embedder, texts[own.start : own.stop], cache)
    elif own := part(len(data.classnames)):
        text = _classifier(embedder, data.classnames[own.start : own.stop], data.templates, cache)
    image, rows, bad = embed_pictures(embedder, data, part(len(data)), workers, track, cache)
    return SetEmbeddings(image, text, rows, bad)


def embed_pictures(
    embedder: Embedder,
    data: BenchmarkSet,
    rows: range,
    workers: int = 0,
    track: Track = iter,
    cache: EmbeddingCache | None = None,
) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
    """Embeddings (n, E) of the pictures that can be decoded, their numbers (n,), and the others with their causes."""

    good, bad = [], []

    def make() -> dict[str, Tensor]:
        images = [torch.empty(0, embedder.model.embed_dim)]
        for batch in track(data.images(embedder.preprocess, rows, workers=workers)) if rows else []:
            good.extend(batch.rows)
            bad.extend(batch.bad)
            if batch.images is not None:
                images.append(embedder.embed_images(batch.images, len(batch.images)))
        return {"image": torch.cat(images)}

    if cache is None:
        image = make()["image"]
    else:  # what failed now may do so no more, and is called something else elsewhere: only whole sets are kept
        image = cache.get("images", [data.fingerprint, rows.start, rows.stop], make, keep=lambda: not bad)["image"]
    return image, torch.tensor(good if good or bad else list(rows), dtype=torch.int64), bad


def _embed_texts(embedder: Embedder, texts: Sequence[str], cache: EmbeddingCache | None) -> Tensor:
    if cache is None:
        return embedder.embed_texts(texts)
    return cache.get("captions", texts, lambda: {"text": embedder.embed_texts(texts)})["text"]


def _classifier(
    embedder: Embedder, names: Sequence[str], templates: Sequence[str], cache: EmbeddingCache | None
) -> Tensor:
    if cache is None:
        return zero_shot_classifier(embedder, names, templates)
    made = cache.get(
        "classifier", [names, templates], lambda: {"text": zero_shot_classifier(embedder, names, templates)}
    )
    return made["text"]
