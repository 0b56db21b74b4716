"""Zero-shot classification: class names in sentences become a classifier (CLIP, Radford et al. 2021, section 3.1)."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dualenc.evaluation.bootstrap import bootstrap_mean
from dualenc.evaluation.retrieval import TIE, Scores, match_ranks


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


def classification_metrics(images: Tensor, classifier: Tensor, targets: Tensor) -> Scores:
    """Accuracy by the names of CLIP_benchmark, with 95% bootstrap intervals over the images.

    Args:
        images: (N, E) of unit length.
        classifier: (C, E) of unit length.
        targets: (N,) class of each image.

    Returns:
        `acc1`, `acc5` (absent below 5 classes), `mean_per_class_recall` (mean over the classes that have images of
        the share of them that are right). A tie between the right class and another counts as wrong.
    """
    ranks, classes = match_ranks(images, classifier, targets), len(classifier)
    metrics = {f"acc{k}": (ranks < k).double().mean().item() for k in (1, 5) if k <= max(classes, 1)}
    intervals = {name: bootstrap_mean((ranks < int(name[3:])).double()) for name in metrics}
    chance = {name: int(name[3:]) / classes for name in metrics}
    right, total = per_class(ranks, targets, classes)
    metrics["mean_per_class_recall"] = (right[total > 0] / total[total > 0]).mean().item()
    chance["mean_per_class_recall"] = 1 / classes
    return Scores(metrics, intervals, chance, {"image": ranks})


def per_class(ranks: Tensor, targets: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Of each class the number of its images that are right, and of all its images: (C,) float64 and (C,) int64."""
    targets = targets.cpu()
    right = torch.zeros(classes, dtype=torch.float64).index_add_(0, targets, (ranks < 1).double())
    return right, torch.bincount(targets, minlength=classes)


def predictions(images: Tensor, classifier: Tensor, targets: Tensor, ranks: Tensor, chunk: int = 4096) -> Tensor:
    """The class (N,) that each image was taken for; in a tie with the right class, the other one.

    Args:
        images: (N, E).
        classifier: (C, E).
        targets: (N,).
        ranks: (N,) of the right class, from `classification_metrics`, with which the answer agrees.
        chunk: images at a time.
    """
    found, columns = [], classifier.double().T
    for part, target in zip(images.split(chunk), targets.to(images.device).split(chunk)):
        scores = (part.double() @ columns).scatter_(1, target[:, None], -torch.inf)  # of the wrong ones
        best = scores >= scores.max(1, keepdim=True).values - TIE
        found.append(best.int().argmax(1).cpu())  # the first of those that tie, however the product was cut
    return torch.where(ranks < 1, targets.cpu(), torch.cat(found))


def multilabel_metrics(scores: Tensor, targets: Tensor) -> Scores:
    """`mean_average_precision`: the mean over classes of the average precision over images.

    Args:
        scores: (N, C).
        targets: (N, C), true where the class is on the image.

    Returns:
        The metric. A class without images counts as 0, as in CLIP_benchmark; among equal scores the wrong ones stand
        first. By chance it is the mean over orders (Bestgen 2015, The Prague Bulletin of Mathematical Linguistics 103).
    """
    precision = average_precision(scores, targets)
    images, relevant = len(targets), targets.bool().sum(0).double()
    harmonic = sum(1 / rank for rank in range(1, images + 1))
    by_chance = (harmonic + (relevant - 1) / max(1, images - 1) * (images - harmonic)) / images
    chance = (by_chance * (relevant > 0)).mean().item()
    name = "mean_average_precision"
    return Scores({name: precision.mean().item()}, {}, {name: chance}, {})


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision over images of each class (C,), float64; see `multilabel_metrics`."""
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("the scores are not finite: they cannot be ranked")
    found = []
    for score, truth in zip(scores.T.double(), targets.T.bool(), strict=True):
        wrong_first = torch.argsort(truth.long(), stable=True)
        order = wrong_first[torch.argsort(score[wrong_first], descending=True, stable=True)]
        hits = truth[order].double()
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        found.append((precision * hits).sum() / hits.sum().clamp(min=1))
    return torch.stack(found)
