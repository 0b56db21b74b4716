"""The plane of a map of embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dualenc.report import Points

POINTS = 2000  # points of a map, at most


def points(x: Tensor, label: Tensor, names: Sequence[str], owner: Tensor | None = None, unit: str = "images") -> Points:
    """Project embeddings, or a random sample of them, onto their first two principal components.

    Args:
        x: embeddings (N, E).
        label: (N,) index into the names.
        names: names of the labels.
        owner: (T,) image of each caption, if `x` holds images followed by T captions: the sample is then of images,
            each with its first caption.
        unit: what the embeddings are of, in the plural.
    """
    pairs, note = None, unit
    if owner is None:
        chosen = _sample(len(x), POINTS)
    else:
        images = len(x) - len(owner)
        few = _sample(images, POINTS // 2)
        first = torch.full((images,), len(x)).scatter_reduce(0, owner, torch.arange(images, len(x)), "amin")
        chosen, note = torch.cat([few, first[few]]), "images and the first caption of each, joined by a line"
        pairs = torch.arange(2 * len(few)).view(2, -1).T.numpy()
    sample = x[chosen].double()
    sample = sample - sample.mean(0)
    values, vectors = torch.linalg.eigh(sample.T @ sample)
    share = values[-2:].flip(0) / values.sum().clamp(min=1e-30)
    directions = vectors[:, -2:].flip(1)
    # An eigenvector may point either way: the sign of its largest entry decides.
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    return Points(
        (sample @ directions).numpy(),
        label[chosen].numpy(),
        list(names),
        (float(share[0]), float(share[1])),
        pairs,
        f"{len(chosen) if pairs is None else len(pairs):,} {note}, in the two directions of the largest spread "
        "(principal components).",
    )


def _sample(count: int, most: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values
