"""Metrics that collect their state from all ranks: thin shells around `dualenc.metrics`."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class PairEmbeddings(Metric):
    """Embeddings of held-out pairs from all ranks, in the order of the index."""

    full_state_update = False
    image: list[Tensor]
    text: list[Tensor]
    rows: list[Tensor]
    ids: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("image", "text", "rows", "ids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, image: Tensor, text: Tensor, rows: Tensor, ids: Tensor) -> None:
        """Add the pairs of a batch.

        Args:
            image: (B, E) embeddings of the images.
            text: (B, E) embeddings of the texts.
            rows: (B,) numbers of the pairs in the index.
            ids: (B, 2) hashes of image and text.
        """
        self.image.append(image.float())
        self.text.append(text.float())
        self.rows.append(rows.to(image.device))
        self.ids.append(ids.to(image.device))

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rows (N,) in ascending order, embeddings of images and of texts (N, E), and hashes (N, 2)."""
        states = (self.rows, self.image, self.text, self.ids)
        rows, image, text, ids = (torch.cat(x) if isinstance(x, list) else x for x in states)
        order = torch.argsort(rows)
        return rows[order], image[order], text[order], ids[order]
