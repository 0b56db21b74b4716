"""Work spread over processes, by torch's loader."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def each(dataset: Dataset[Any], order: Sequence[Any], workers: int, **options: Any) -> DataLoader[Any]:
    """What a dataset gives for each item of an order, as it is.

    Args:
        dataset: asked for one item at a time.
        order: the items.
        workers: processes; 0 for none.
        options: further ones of the `DataLoader`.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # or the loader draws from the global one
        **options,
    )


def _as_it_is(item: Any) -> Any:  # a function with a name, which goes to processes that are started anew
    return item
