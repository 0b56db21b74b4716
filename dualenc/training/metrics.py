"""Metrics that keep their state across ranks: thin shells around `dualenc.evaluation`."""

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

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("image", "text", "rows"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, image: Tensor, text: Tensor, rows: Tensor) -> None:
        """Takes (B, E) embeddings of pairs and their numbers (B,) in the index."""
        self.image.append(image.float())
        self.text.append(text.float())
        self.rows.append(rows.to(image.device))

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (N,) in ascending order, and (N, E) embeddings of images and of texts."""
        image, text, rows = (torch.cat(x) if isinstance(x, list) else x for x in (self.image, self.text, self.rows))
        order = torch.argsort(rows)
        return rows[order], image[order], text[order]
