"""Evaluation sets in the layout of CLIP_benchmark: a folder of tar shards with names and templates beside them."""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dualenc.data.images import thumbnail
from dualenc.data.pairs import decode_sample
from dualenc.data.shards import DataError, ShardIndex
from dualenc.data.workers import deaf

Kind = Literal["classification", "multilabel", "retrieval"]
KINDS = ("classification", "multilabel", "retrieval")


@dataclass(frozen=True)
class BenchmarkSet:
    """One split of an evaluation set. Make one with `open`."""

    path: Path
    split: str
    kind: Kind
    index: ShardIndex
    classnames: list[str]  # empty for retrieval
    templates: list[str]  # with {c} for the name; empty for retrieval

    @classmethod
    def open(cls, path: str | os.PathLike[str], split: str | None = None) -> "BenchmarkSet":
        """Reads the layout: `dataset_type.txt`, `classnames.txt`, `zeroshot_classification_templates.txt`, `<split>/`.

        Args:
            path: the set's folder.
            split: absent, "test", or the only split there is.

        Raises:
            DataError: something of the layout is missing or wrong; names the file.
        """
        path = Path(path)
        if not path.is_dir():
            raise DataError(f"evaluation set {path} is no folder")
        splits = sorted(folder.parent.name for folder in path.glob("*/nshards.txt"))
        if not splits:
            raise DataError(f"{path} is not in the CLIP_benchmark layout: no <split>/nshards.txt in it")
        if split is None:
            split = "test" if "test" in splits else splits[0]
            if len(splits) > 1 and split != "test":
                raise DataError(f"{path} has the splits {', '.join(splits)} and no test: name one")
        elif split not in splits:
            raise DataError(f"{path} has no split {split!r}, only {', '.join(splits)}")
        kind = _text(path / "dataset_type.txt").strip() if (path / "dataset_type.txt").exists() else "classification"
        if kind not in KINDS:
            raise DataError(f"{path / 'dataset_type.txt'}: {kind!r} is none of {', '.join(KINDS)}")
        classnames, templates = [], []
        if kind != "retrieval":
            classnames = _lines(path / "classnames.txt")
            templates = _lines(path / "zeroshot_classification_templates.txt")
            if without := [template for template in templates if "{c}" not in template]:
                raise DataError(f"{path / 'zeroshot_classification_templates.txt'}: {without[0]!r} has no {{c}}")
        number = _text(path / split / "nshards.txt").strip()
        if not number.isdecimal() or len(number) > 9 or int(number) == 0:
            raise DataError(f"{path / split / 'nshards.txt'}: {number!r} is no number of shards")
        shards = [path / split / f"{i}.tar" for i in range(int(number))]
        if absent := [str(shard) for shard in shards if not shard.is_file()]:
            raise DataError(f"{absent[0]} is missing; nshards.txt promises {number} shards")
        index = ShardIndex.build(shards)
        if not len(index):
            raise DataError(f"{path / split} holds no samples")
        return cls(path, split, kind, index, classnames, templates)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    def images(
        self,
        transform: Callable[[Tensor], Tensor],
        rows: Sequence[int] | None = None,
        batch_size: int = 64,
        workers: int = 0,
    ) -> DataLoader:
        """Batches (B, 3, S, S) uint8 of all images in order, or of some.

        A picture that cannot be decoded raises `DataError`.
        """
        rows = range(len(self)) if rows is None else rows
        images = _Images(self.index, transform, rows)
        return DataLoader(images, batch_size, num_workers=workers, worker_init_fn=deaf)  # type: ignore[arg-type]

    def thumbnail(self, i: int) -> bytes:
        """Image i for a page; see `dualenc.data.images.thumbnail`."""
        return thumbnail(decode_sample(self.index[i]))

    @cached_property
    def targets(self) -> Tensor:
        """Class of each image (N,) int64, or whether each class is on it (N, C) bool (multilabel).

        Raises:
            DataError: a label is missing, unreadable or out of range; names the sample.
        """
        labels = []
        for sample in self.index:
            if self.kind == "multilabel":
                data = sample.read("npy")
                try:
                    label = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False).reshape(-1)
                except (ValueError, EOFError, MemoryError) as error:
                    raise DataError(f"{sample}: .npy cannot be read ({error})") from None
                if label.dtype.kind not in "biuf":
                    raise DataError(f"{sample}: .npy holds {label.dtype} and no numbers")
                if len(label) != len(self.classnames):
                    raise DataError(f"{sample}: {len(label)} labels for {len(self.classnames)} classes")
                labels.append(torch.from_numpy(label != 0))
            else:
                text = sample.read("cls").decode("utf-8", "replace").strip()
                if not text.isdecimal() or len(text) > 9 or int(text) >= len(self.classnames):
                    raise DataError(f"{sample}: class {text!r} is none of 0 to {len(self.classnames) - 1}")
                labels.append(torch.tensor(int(text)))
        return torch.stack(labels)

    @cached_property
    def captions(self) -> tuple[list[str], Tensor]:
        """All captions of a retrieval set, and the number of the image (T,) that each belongs to.

        Raises:
            DataError: a sample has no caption, or it is no UTF-8; names the sample.
        """
        texts: list[str] = []
        owner: list[int] = []
        for i, sample in enumerate(self.index):
            try:
                lines = [line for line in sample.read("txt").decode("utf-8").split("\n") if line.strip()]
            except UnicodeDecodeError as error:
                raise DataError(f"{sample}: .txt is not UTF-8 ({error})") from None
            if not lines:
                raise DataError(f"{sample}: no caption")
            texts += [line.strip() for line in lines]
            owner += [i] * len(lines)
        return texts, torch.tensor(owner)


class _Images(Dataset[Tensor]):
    def __init__(self, index: ShardIndex, transform: Callable[[Tensor], Tensor], rows: Sequence[int]) -> None:
        self.index, self.transform, self.rows = index, transform, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(decode_sample(self.index[self.rows[i]])).contiguous()


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path.parent} is not in the CLIP_benchmark layout: {path.name} is missing")
    lines = [line.strip() for line in _text(path).rstrip().splitlines()]
    if not lines:
        raise DataError(f"{path} is empty")
    if "" in lines:
        raise DataError(f"{path}: line {lines.index('') + 1} is blank, which would shift what follows")
    return lines
