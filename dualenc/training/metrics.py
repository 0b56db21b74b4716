"""Metrics that keep their state across ranks: thin shells around `dualenc.evaluation`."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dualenc.evaluation import retrieval_metrics


class PairRetrieval(Metric):
    """Retrieval among held-out pairs, one caption an image; see `retrieval_metrics`."""

    full_state_update = False
    image: list[Tensor]
    text: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("image", default=[], dist_reduce_fx="cat")
        self.add_state("text", default=[], dist_reduce_fx="cat")

    def update(self, image: Tensor, text: Tensor) -> None:
        """Takes (B, E) embeddings of pairs."""
        self.image.append(image.float())
        self.text.append(text.float())

    def compute(self) -> dict[str, float]:
        """The metrics over all pairs of all ranks."""
        image, text = (torch.cat(x) if isinstance(x, list) else x for x in (self.image, self.text))
        return retrieval_metrics(image, text, torch.arange(len(image), device=image.device), replicates=0)[0]
