"""Classification: class names in sentences become a classifier (CLIP, Radford et al. 2021, section 3.1), and the
metrics of any classifier, each computed from what is kept of every image.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dualenc.metrics.bootstrap import BootstrapMetrics, mean
from dualenc.metrics.ranking import TIE
from dualenc.metrics.retrieval import Scores

BINS = 15
_CELLS = 1 << 22  # scores at a time


class TextEmbedder(Protocol):
    """What embeds texts: an `Embedder`, or anything else with this method."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, E) of unit length."""
        ...


def zero_shot_classifier(embedder: TextEmbedder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One unit vector a class, (C, E): the renormalized mean over the templates of the prompts' embeddings.

    Args:
        embedder: embeds all C x T prompts in one call, so that it can put equal lengths together.
        names: class names.
        templates: sentences with `{c}` for the name.
    """
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    embedded = embedder.embed_texts(prompts).unflatten(0, (len(names), len(templates)))  # (C, T, E)
    return F.normalize(embedded.mean(1), dim=-1)


def classification_metrics(
    images: Tensor, classifier: Tensor, targets: Tensor, scale: float | Tensor = 1.0, *, replicates: int = 1000
) -> Scores:
    """Accuracy by the names of CLIP_benchmark and calibration, with 95% bootstrap intervals over the images.

    Args:
        images: (N, E) of unit length.
        classifier: (C, E) of unit length.
        targets: (N,) class of each image.
        scale: factor that makes the cosines logits, the model's `logit_scale` as it multiplies; ranks do not need it.
        replicates: bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `classification_bootstrap`; all but `ece` have an interval and a value by chance. The items are
        `target` (N,), `rank` (N,) of the right class (0-based; another class with the same score stands before it),
        `answer` (N,) the class that the image was taken for (in a tie with the right class, another one), `confidence`
        (N,) float64 the answer's softmax of scale * cosine, and `classes` (0-d), their number.

    Raises:
        ValueError: embeddings are not finite, or the targets are no classes of the images.
    """
    for name, x in (("images", images), ("classifier", classifier)):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"the {name} hold embeddings that are not finite: they cannot be ranked")
    if len(targets) != len(images):
        raise ValueError(f"{len(targets)} targets for {len(images)} images")
    columns = classifier.double().T
    blocks = (part.double() @ columns for part in images.split(block_rows(len(classifier))))
    return classification_scores(classification_items(blocks, targets, len(classifier), scale), replicates=replicates)


def block_rows(classes: int) -> int:
    """Images at a time, so that their scores for so many classes stay small."""
    return max(1, _CELLS // max(1, classes))


def classification_items(
    blocks: Iterable[Tensor], targets: Tensor, classes: int, scale: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """What `classification_metrics` keeps of every image.

    Args:
        blocks: (n, C) float64 scores of the first images, then of the next; -inf for a class that is never answered.
        targets: (N,) class of each image.
        classes: C.
        scale: factor that makes the scores logits.

    Raises:
        ValueError: a target is no class.
    """
    if not bool(((targets >= 0) & (targets < classes)).all()):
        raise ValueError(f"every image needs a class between 0 and {classes - 1}")
    targets, scale, start = targets.cpu().long(), float(scale), 0
    # One place for all: small tensors that outlive the blocks, between them, would keep the allocator from reuse.
    ranks, answers = torch.empty_like(targets), torch.empty_like(targets)
    confidences = torch.empty(len(targets), dtype=torch.float64)
    for scores in blocks:
        rows = slice(start, start := start + len(scores))
        target = targets[rows].to(scores.device)[:, None]  # (n, 1)
        rank = (scores >= scores.gather(1, target) - TIE).sum(1) - 1  # the right class itself is among them
        others = scores.scatter(1, target, -torch.inf)
        tied = others >= others.max(1, keepdim=True).values - TIE
        other = tied.byte().argmax(1)  # the first of those that tie, however the product was cut
        answer = torch.where(rank < 1, target[:, 0], other)
        logit = scale * scores.gather(1, answer[:, None])[:, 0]
        confidence = (logit - (scale * scores).logsumexp(1)).exp().clamp(max=1)
        ranks[rows], answers[rows], confidences[rows] = rank.cpu(), answer.cpu(), confidence.cpu()
    return {
        "target": targets,
        "rank": ranks,
        "answer": answers,
        "confidence": confidences,
        "classes": torch.tensor(classes),
    }


def classification_scores(items: Mapping[str, Tensor], *, replicates: int = 1000) -> Scores:
    """The metrics of a classification from its items."""
    bootstrap, classes = classification_bootstrap(items), int(items["classes"])
    chance = {name: int(name[3:]) / classes for name in bootstrap.statistics if name.startswith("acc")}
    chance["mean_per_class_recall"] = 1 / classes
    intervals = bootstrap.intervals(replicates=replicates)
    intervals.pop("ece", None)  # see `classification_bootstrap`
    return Scores(bootstrap.values(), intervals, chance, dict(items))


def classification_bootstrap(items: Mapping[str, Tensor]) -> BootstrapMetrics:
    """Metrics of a classification as functions of the images' weights; draws stay within the classes.

    Args:
        items: of `classification_metrics`.

    Returns:
        `acc1` and `acc5` (absent below 5 classes): share of images whose class is the first, or among the first five.
        `mean_per_class_recall`: mean over the classes that have images of the share of them that are right. `ece`: the
        expected calibration error (Guo et al. 2017, equation 3): images go into 15 bins of equal width by confidence,
        and the differences between accuracy and mean confidence are averaged by the share of images in a bin.

        Noise only adds to an absolute value: the `ece` of a sample lies above that of the population, and that of a
        bootstrap sample higher still. Where it is not far above what noise makes of a calibrated model, a percentile
        interval never holds the population's (0% of the times asked for 95%), so results give none.
    """
    target, rank, confidence = items["target"], items["rank"], items["confidence"]
    classes, right = int(items["classes"]), (rank < 1).double()
    present, place = target.unique(return_inverse=True)

    def recall(weights: Tensor) -> Tensor:
        index = place.expand_as(weights)
        empty = torch.zeros(len(weights), len(present), dtype=torch.float64)  # (R, present classes)
        share = empty.scatter_add(1, index, weights * right) / empty.scatter_add(1, index, weights)
        return share.nanmean(1)  # a class of which no image counts has none

    gaps = F.one_hot(_bins(confidence, BINS), BINS).double() * (right - confidence)[:, None]  # (N, bins)
    statistics = {f"acc{k}": mean(rank < k) for k in (1, 5) if k <= max(classes, 1)}
    statistics["mean_per_class_recall"] = recall
    statistics["ece"] = lambda weights: (weights @ gaps).abs().sum(1) / weights.sum(1)
    return BootstrapMetrics(statistics, len(target), target)


def calibration(items: Mapping[str, Tensor], bins: int = BINS) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of the images in each bin that has any, for a reliability plot.

    Args:
        items: of `classification_metrics`.
        bins: of equal width over the confidence; each holds its upper bound.
    """
    right, confidence = (items["rank"] < 1).double(), items["confidence"]
    where = _bins(confidence, bins)
    inside = [where == i for i in where.unique().tolist()]
    return [(confidence[own].mean().item(), right[own].mean().item(), int(own.sum())) for own in inside]


def _bins(confidence: Tensor, bins: int) -> Tensor:
    return torch.bucketize(confidence, torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])


def per_class(items: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of each class the number of its images that are right, and of all its images: (C,) int64 each."""
    target, classes = items["target"], int(items["classes"])
    right = torch.bincount(target[items["rank"] < 1], minlength=classes)
    return right, torch.bincount(target, minlength=classes)


def multilabel_metrics(scores: Tensor, targets: Tensor, *, replicates: int = 1000) -> Scores:
    """`mean_average_precision`, with its 95% bootstrap interval over the images.

    Args:
        scores: (N, C).
        targets: (N, C), true where the class is on the image.
        replicates: bootstrap samples; 0 for no interval.

    Returns:
        The metric of `multilabel_bootstrap`. By chance it is the mean over orders (Bestgen 2015, The Prague Bulletin of
        Mathematical Linguistics 103). The items are `scores` as given and `targets` (N, C) bool.

    Raises:
        ValueError: scores are not finite, or the shapes differ.
    """
    items = {"scores": scores.cpu(), "targets": targets.cpu().bool()}
    bootstrap = multilabel_bootstrap(items)
    images, relevant = len(targets), items["targets"].sum(0).double()
    harmonic = sum(1 / rank for rank in range(1, images + 1))
    by_chance = (harmonic + (relevant - 1) / max(1, images - 1) * (images - harmonic)) / images
    chance = {"mean_average_precision": (by_chance * (relevant > 0)).mean().item()}
    return Scores(bootstrap.values(), bootstrap.intervals(replicates=replicates), chance, items)


def multilabel_bootstrap(items: Mapping[str, Tensor]) -> BootstrapMetrics:
    """`mean_average_precision` as a function of the images' weights: the mean over classes of the average precision.

    The precision at a right image is (1 + the weight of the right ones above it) / (1 + the weight of all above it): a
    copy of it neither helps nor hinders it, since in other data it has none. (With copies at their own place, as with
    scikit-learn's `sample_weight`, the replicates of rare classes lie far above the metric.) Among equal scores the
    wrong ones stand first. A class without images counts as 0, as in CLIP_benchmark. One whose images are merely not
    drawn has an unknown value, and 0 would pull the interval down: the mean is then over the others.

    Args:
        items: of `multilabel_metrics`.
    """
    targets = items["targets"]
    precision = _precision(items["scores"], targets)
    share = targets.any(0).double().mean()  # of classes that have images

    def statistic(weights: Tensor) -> Tensor:
        return precision(weights).nanmean(1).nan_to_num() * share

    return BootstrapMetrics({"mean_average_precision": statistic}, len(targets))


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision over images of each class (C,), float64; see `multilabel_bootstrap`."""
    return _precision(scores, targets)(torch.ones(1, len(targets), dtype=torch.float64))[0].nan_to_num()


def _precision(scores: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Of weights (R, N) the average precision of each class, (R, C); nan where none of its images counts."""
    if scores.shape != targets.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} need one shape")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("the scores are not finite: they cannot be ranked")
    classes = []
    for score, truth in zip(scores.cpu().T, targets.cpu().T.bool()):
        wrong_first = torch.argsort(truth.long(), stable=True)
        order = wrong_first[torch.argsort(score[wrong_first], descending=True, stable=True)]
        classes.append((order, torch.nonzero(truth[order])[:, 0]))

    def statistic(weights: Tensor) -> Tensor:
        columns, found = weights.T.contiguous(), []  # (N, R): one gathered row is one copy
        for order, places in classes:
            own = columns[order[places]]  # (P, R)
            above = columns[order].cumsum(0)[places] - own
            right = own.cumsum(0) - own
            found.append((own * (1 + right) / (1 + above)).sum(0) / own.sum(0))
        return torch.stack(found, 1)

    return statistic
