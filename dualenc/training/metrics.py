"""Metrics that keep their state across ranks: thin shells around `dualenc.metrics`."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class PairEmbeddings(Metric):
    """Embeddings of held-out pairs, from all ranks, in the order of the index."""

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
        """Takes (B, E) embeddings of pairs, their numbers (B,) in the index, and (B, 2) hashes of image and text."""
        self.image.append(image.float())
        self.text.append(text.float())
        self.rows.append(rows.to(image.device))
        self.ids.append(ids.to(image.device))

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows (N,) in ascending order, (N, E) embeddings of images and of texts, (N, 2) hashes."""
        states = (self.rows, self.image, self.text, self.ids)
        rows, image, text, ids = (torch.cat(x) if isinstance(x, list) else x for x in states)
        order = torch.argsort(rows)
        return rows[order], image[order], text[order], ids[order]
