"""Joining of samples by key, for images and captions that are in different shards."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from dualenc.data.prepare.pictures import PictureRef
from dualenc.data.shards.index import Sample, ShardIndex
from dualenc.utils.errors import BadSample, DataError


def joined_samples(index: ShardIndex) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield the location and the fields of each image, with the captions that any shard has under its key.

    Keys are compared whole; if no image has a caption then, without the folders in them. The fields are those of all
    `.json` members, with "" for the `PictureRef` and "txt" for the texts, a list if there are several. An image of a
    sample with captions keeps them even if other samples have its key.

    Raises:
        DataError: If captions without an image have the key of several images.
    """
    rows = _rows_of(index, str)
    if not any(len(group) > 1 or _is_complete(index[group[0]]) for group in rows.values()):
        rows = _rows_of(index, os.path.basename)
    for key, group in rows.items():
        samples = [(row, index[row]) for row in group]
        images = [(row, sample) for row, sample in samples if sample.image]
        texts = [sample for _, sample in samples if not sample.image]
        if not images:
            yield f"{samples[0][1]}", {"": None}
        if len(images) > 1 and texts:
            raise DataError(
                f"{texts[0]} has no image, and its key {key!r} has images in {images[0][1].shard} and "
                f"{images[1][1].shard}: keys must differ between images, or join the shards in parts"
            )
        for row, sample in images:
            try:
                yield str(sample), _fields_of([*texts, sample], PictureRef(row, f"{sample.key}.{sample.image}"))
            except BadSample:
                yield str(sample), None


def _rows_of(index: ShardIndex, name: Callable[[str], str]) -> dict[str, list[int]]:
    """Return the rows of each key, after `name` has been applied to the keys."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row in range(len(index)):
        rows[name(index.key(row))].append(row)
    return rows


def _is_complete(sample: Sample) -> bool:
    return sample.image is not None and ("txt" in sample or "json" in sample)


def _fields_of(samples: list[Sample], picture: PictureRef) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for found in (sample.read_json() for sample in samples if "json" in sample):
        fields |= found if isinstance(found, dict) else {}
    texts = [sample.read_text("txt") for sample in samples if "txt" in sample]
    return {**fields, **({"txt": texts if len(texts) > 1 else texts[0]} if texts else {}), "": picture}
