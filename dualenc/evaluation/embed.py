"""Embeddings of evaluation sets, and the cache that keeps them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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

# Wrapper of an iterable that shows progress, such as tqdm.
Track = Callable[[Iterable[Any]], Iterable[Any]]


class SetEmbeddings(NamedTuple):
    """Embeddings of an evaluation set, or of the share of one rank, on the CPU."""

    image: Tensor  # (n, E)
    text: Tensor  # (T, E) captions, or (C, E) the zero-shot classifier; (0, E) where the kind needs no text
    rows: Tensor  # (n,) numbers of the images in the set, ascending; those that cannot be decoded are missing
    bad: list[tuple[int, str]]  # number and error message of each sample whose image cannot be decoded
    others: Mapping[str, "SetEmbeddings"] = {}  # further sets, such as the one a probe learns from

    @staticmethod
    def join(parts: Sequence["SetEmbeddings"]) -> "SetEmbeddings":
        """Join the shares of all ranks, in their order."""
        image = torch.cat([part.image for part in parts])
        text = torch.cat([part.text for part in parts])
        rows = torch.cat([part.rows for part in parts])
        bad = [sample for part in parts for sample in part.bad]
        others = {name: SetEmbeddings.join([part.others[name] for part in parts]) for name in parts[0].others}
        return SetEmbeddings(image, text, rows, bad, others)


class EmbeddingCache:
    """Cache of embeddings; the key is a hash of everything that they depend on, never a name.

    Args:
        embedder: model, whose weights must not change while the cache is in use.
        folder: folder of the cache; None for `embeddings` among the user's cached files.
        limit: largest size in bytes, 20 GiB by default; the least recently used files are removed first.

    Attributes:
        reused: label of each entry that was found, in order.
    """

    def __init__(self, embedder: Embedder, folder: str | os.PathLike[str] | None = None, limit: int = 20 << 30) -> None:
        self.folder, self.limit = Path(folder or cache_folder() / "embeddings"), limit
        weight = next(embedder.model.parameters())
        self._made_by = [embedder.fingerprint, weight.device.type, str(weight.dtype)]
        if embedder.precision != "fp32":
            self._made_by.append(embedder.precision)
        self.reused: list[str] = []

    def get(
        self,
        label: str,
        depends_on: Any,
        make: Callable[[], dict[str, Tensor]],
        keep: Callable[[], bool] = lambda: True,
    ) -> dict[str, Tensor]:
        """Return tensors by name, from the cache or newly made.

        Args:
            label: kind of the entry, such as "images", which is part of the key.
            depends_on: everything that the tensors depend on besides the model; must be serializable as JSON.
            make: function that computes the tensors.
            keep: function that decides after `make` if the cache keeps the tensors.
        """
        key = hashlib.blake2b(json.dumps([self._made_by, label, depends_on]).encode(), digest_size=16).hexdigest()
        path = self.folder / f"{key}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            found = make()
        else:
            with suppress(OSError):  # The file may belong to another user.
                os.utime(path)
            self.reused.append(label)
            return found
        if keep():
            self._write(path, found)
        return found

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        with suppress(OSError, SafetensorError):  # A cache that cannot be written must not fail the evaluation.
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                save_file({name: x.contiguous() for name, x in tensors.items()}, temporary)
            self._make_room()

    def _make_room(self) -> None:
        """Remove the least recently used files until the cache is small enough, but never the newest file."""
        files = sorted(((path.stat(), path) for path in self.folder.iterdir()), key=lambda item: item[0].st_mtime)
        total = sum(status.st_size for status, _ in files)
        for status, path in files[:-1]:
            if total > self.limit:
                path.unlink(missing_ok=True)
                total -= status.st_size


class SetEmbedder:
    """Embedder of the images and texts of evaluation sets, or of the share of one rank.

    Args:
        embedder: model.
        workers: number of worker processes that decode images.
        track: wraps the image batches, for a progress bar.
        cache: cache of the embeddings; None to compute all of them.
        rank: number of the share, from 0.
        world: number of shares, which are consecutive and as equal as possible.
    """

    def __init__(
        self,
        embedder: Embedder,
        workers: int = 0,
        track: Track = iter,
        cache: EmbeddingCache | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.embedder, self.workers, self.track, self.cache = embedder, workers, track, cache
        self.rank, self.world = rank, world

    @property
    def no_text(self) -> Tensor:
        """Text embeddings (0, E) for kinds that need none."""
        return torch.empty(0, self.embedder.model.embed_dim)

    def images(self, data: BenchmarkSet) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        """Embed the images of a set.

        Returns:
            Embeddings (n, E) of the images that can be decoded, the numbers (n,) of their samples, and number and error
            message of each other sample.
        """
        rows, good, bad = self._share(len(data)), [], []

        def make() -> dict[str, Tensor]:
            images = [torch.empty(0, self.embedder.model.embed_dim)]
            batches = self.track(data.images(self.embedder.preprocess, rows, workers=self.workers)) if rows else []
            for batch in batches:
                good.extend(batch.rows)
                bad.extend(batch.bad)
                if batch.images is not None:
                    images.append(self.embedder.embed_images(batch.images, len(batch.images)))
            return {"image": torch.cat(images)}

        # A set with bad images is not kept: the failure may pass, and its message names the place of this copy.
        key = [data.fingerprint, rows.start, rows.stop] if self.cache is not None else None
        image = self._cached("images", key, make, keep=lambda: not bad)["image"]
        # If the embeddings are from the cache, `make` did not run, and then all images are good.
        return image, torch.tensor(good if good or bad else list(rows), dtype=torch.int64), bad

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as (T, E), or this rank's share of them."""
        own = self._own(texts)
        if not own:
            return self.no_text
        return self._cached("captions", own, lambda: {"text": self.embedder.embed_texts(own)})["text"]

    def classifier(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embed classes as (C, E), or this rank's share, each the mean of its prompts; see `zero_shot_classifier`."""
        own = self._own(names)
        if not own:
            return self.no_text
        return self._cached(
            "classifier", [own, templates], lambda: {"text": zero_shot_classifier(self.embedder, own, templates)}
        )["text"]

    def _share(self, count: int) -> range:
        """Return the numbers of this rank's items among `count` items."""
        share = np.array_split(np.arange(count), self.world)[self.rank]
        return range(share[0], share[-1] + 1) if len(share) else range(0)

    def _own(self, items: Sequence[str]) -> Sequence[str]:
        """Return this rank's items."""
        share = self._share(len(items))
        return items[share.start : share.stop]

    def _cached(self, label: str, key: Any, make: Callable[[], dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
        return make() if self.cache is None else self.cache.get(label, key, make, **options)
