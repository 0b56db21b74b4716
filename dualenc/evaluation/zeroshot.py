"""Zero-shot classification: class names in sentences become a classifier (CLIP, Radford et al. 2021, section 3.1)."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dualenc.evaluation.bootstrap import bootstrap_mean
from dualenc.evaluation.retrieval import match_ranks


class TextEmbedder(Protocol):
    """What embeds texts: an `Embedder`, or anything else with this method."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, E) of unit length."""
        ...


def zero_shot_classifier(embedder: TextEmbedder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One unit vector a class, (C, E): the renormalised mean over the templates of the prompts' embeddings.

    Args:
        embedder: embeds all C x T prompts in one call, so that it can put equal lengths together.
        names: class names.
        templates: sentences with `{c}` for the name.
    """
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    embedded = embedder.embed_texts(prompts).unflatten(0, (len(names), len(templates)))  # (C, T, E)
    return F.normalize(embedded.mean(1), dim=-1)


def classification_metrics(
    images: Tensor, classifier: Tensor, targets: Tensor
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Accuracy by the names of CLIP_benchmark, and 95% bootstrap intervals over the images.

    Args:
        images: (N, E) of unit length.
        classifier: (C, E) of unit length.
        targets: (N,) class of each image.

    Returns:
        `acc1`, `acc5` (absent below 5 classes), `mean_per_class_recall` (mean over the classes that have images of
        the share of them that are right). A tie between the right class and another counts as wrong.
    """
    ranks = match_ranks(images, classifier, targets)
    metrics = {f"acc{k}": (ranks < k).double().mean().item() for k in (1, 5) if k <= max(len(classifier), 1)}
    intervals = {name: bootstrap_mean((ranks < int(name[3:])).double()) for name in metrics}
    targets = targets.cpu()
    right = torch.zeros(len(classifier), dtype=torch.float64).index_add_(0, targets, (ranks < 1).double())
    total = torch.bincount(targets, minlength=len(classifier))
    metrics["mean_per_class_recall"] = (right[total > 0] / total[total > 0]).mean().item()
    return metrics, intervals


def multilabel_metrics(scores: Tensor, targets: Tensor) -> dict[str, float]:
    """`mean_average_precision`: the mean over classes of the average precision over images.

    Args:
        scores: (N, C).
        targets: (N, C), true where the class is on the image.

    Returns:
        The metric. A class without images counts as 0, as in CLIP_benchmark; among equal scores the wrong ones stand
        first.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("the scores are not finite: they cannot be ranked")
    precisions = []
    for score, truth in zip(scores.T.double(), targets.T.bool(), strict=True):
        wrong_first = torch.argsort(truth.long(), stable=True)
        order = wrong_first[torch.argsort(score[wrong_first], descending=True, stable=True)]
        hits = truth[order].double()
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        precisions.append((precision * hits).sum() / hits.sum().clamp(min=1))
    return {"mean_average_precision": torch.stack(precisions).mean().item()}
