"""Zero-shot classifiers from class names and templates (CLIP, Radford et al. 2021, section 3.1), and the metrics of any
classifier, computed from the outcome of each image.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dualenc.metrics.bootstrap import BootstrapMetrics, mean
from dualenc.metrics.ranking import TIE
from dualenc.metrics.retrieval import Scores
from dualenc.utils.arguments import strings
from dualenc.utils.text import quoted

BINS = 15
_CELLS = 1 << 22  # scores held at a time


class TextEmbedder(Protocol):
    """An embedder of texts, such as `dualenc.Embedder`."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: (N, E) of unit length."""
        ...


def zero_shot_classifier(embedder: TextEmbedder, names: Iterable[str], templates: Iterable[str]) -> Tensor:
    """Build a classifier from class names: for each class the normalized mean of its prompts' embeddings.

    Args:
        embedder: embeds all C x T prompts in one call, which lets it group texts of equal length.
        names: C class names.
        templates: T sentences with `{c}` in place of the name.

    Returns:
        (C, E) of unit length.

    Raises:
        ValueError: If names or templates are not lists of strings or empty, or a template lacks `{c}`: the prompts of
            all classes would be equal.

    Example:
        >>> import torch
        >>> from dualenc import zero_shot_classifier
        >>> class Lengths:  # stands for the embedder that `dualenc.load` returns
        ...     def embed_texts(self, texts):
        ...         return torch.nn.functional.normalize(torch.tensor([[len(text), 1.0] for text in texts]))
        >>> zero_shot_classifier(Lengths(), ["cat", "horse"], ["a {c}", "a photo of a {c}"]).shape
        torch.Size([2, 2])
    """
    names, templates = strings(names, "names of classes"), strings(templates, "templates")
    if not names or not templates:
        raise ValueError(f"there are no {'templates' if names else 'names of classes'}: pass one or more")
    for template in templates:
        if "{c}" not in template:
            hint = f": write {quoted(template.replace('{}', '{c}'))}" if "{}" in template else ""
            raise ValueError(f"template {quoted(template)} does not have {{c}}, which stands for the class{hint}")
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    embedded = embedder.embed_texts(prompts).unflatten(0, (len(names), len(templates)))  # (C, T, E)
    return F.normalize(embedded.mean(1), dim=-1)


def classification_metrics(
    images: Tensor, classifier: Tensor, targets: Tensor, scale: float | Tensor = 1.0, *, replicates: int = 1000
) -> Scores:
    """Compute accuracy, named as in CLIP_benchmark, and calibration, with 95% bootstrap intervals over the images.

    Args:
        images: (N, E) of unit length.
        classifier: (C, E) of unit length.
        targets: (N,) class of each image.
        scale: factor from cosines to logits, the exponential of the model's `logit_scale`; ranks do not depend on it.
        replicates: number of bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `classification_bootstrap`; all except `ece` have an interval and a chance value. The items are:

        - `target` (N,): class of each image.
        - `rank` (N,): rank of that class, 0-based; a class with the same score comes before it.
        - `answer` (N,): the predicted class; in a tie with the right class, another one.
        - `confidence` (N,) float64: softmax of scale * cosine for the answer.
        - `classes` (0-d): the number of classes.

    Raises:
        ValueError: If embeddings are not finite, or a target is not the number of a class.
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
    """Return the number of images whose scores for this many classes are held at a time."""
    return max(1, _CELLS // max(1, classes))


def classification_items(
    blocks: Iterable[Tensor], targets: Tensor, classes: int, scale: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """Compute the items of `classification_metrics`.

    Args:
        blocks: (n, C) float64 scores of consecutive blocks of images; -inf for a class that is never predicted.
        targets: (N,) class of each image.
        classes: C, the number of classes.
        scale: factor from scores to logits.

    Raises:
        ValueError: If a target is not the number of a class.
    """
    if not bool(((targets >= 0) & (targets < classes)).all()):
        raise ValueError(f"every image needs a class between 0 and {classes - 1}")
    targets, scale, start = targets.cpu().long(), float(scale), 0
    # The results are allocated first: small tensors between the blocks in memory would keep the allocator from reuse.
    ranks, answers = torch.empty_like(targets), torch.empty_like(targets)
    confidences = torch.empty(len(targets), dtype=torch.float64)
    for scores in blocks:
        rows = slice(start, start := start + len(scores))
        target = targets[rows].to(scores.device)[:, None]  # (n, 1)
        rank = (scores >= scores.gather(1, target) - TIE).sum(1) - 1  # The right class itself is counted too.
        others = scores.scatter(1, target, -torch.inf)
        tied = others >= others.max(1, keepdim=True).values - TIE
        other = tied.byte().argmax(1)  # The first that ties, so that the answer does not depend on the blocks.
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
    """Compute the metrics of a classification from its items."""
    bootstrap, classes = classification_bootstrap(items), int(items["classes"])
    chance = {name: int(name[3:]) / classes for name in bootstrap.statistics if name.startswith("acc")}
    chance["mean_per_class_recall"] = 1 / classes
    intervals = bootstrap.intervals(replicates=replicates)
    intervals.pop("ece", None)  # see `classification_bootstrap`
    return Scores(bootstrap.values(), intervals, chance, dict(items))


def classification_bootstrap(items: Mapping[str, Tensor]) -> BootstrapMetrics:
    """Return the metrics of a classification as functions of the images' weights, with the classes as strata.

    Args:
        items: items of `classification_metrics`.

    Returns:
        The metrics:

        - `acc1`, `acc5` (only of more than 5 classes): share of images whose class is first, or among the first five.
        - `mean_per_class_recall`: mean of `acc1` over the classes that have images.
        - `ece`: expected calibration error (Guo et al. 2017, equation 3). Images are put into 15 bins of equal width by
          confidence; the absolute differences of accuracy and mean confidence are averaged over the images.

        Noise only increases an absolute value: the `ece` of a sample is above that of the population, and that of a
        bootstrap sample is higher still. Unless `ece` is far above that of a calibrated model with the same noise, a
        percentile interval never contains the population's value (0% coverage at a level of 95%). Results therefore
        give no interval for it.
    """
    target, rank, confidence = items["target"], items["rank"], items["confidence"]
    classes, right = int(items["classes"]), (rank < 1).double()
    present, index_of = target.unique(return_inverse=True)

    def recall(weights: Tensor) -> Tensor:
        index = index_of.expand_as(weights)
        zeros = torch.zeros(len(weights), len(present), dtype=torch.float64)  # (R, present classes)
        share = zeros.scatter_add(1, index, weights * right) / zeros.scatter_add(1, index, weights)
        return share.nanmean(1)  # A class whose images all have weight 0 is left out.

    gaps = F.one_hot(_bins(confidence, BINS), BINS).double() * (right - confidence)[:, None]  # (N, bins)
    statistics = {f"acc{k}": mean(rank < k) for k in (1, 5) if k < max(classes, 2)}
    statistics["mean_per_class_recall"] = recall
    statistics["ece"] = lambda weights: (weights @ gaps).abs().sum(1) / weights.sum(1)
    return BootstrapMetrics(statistics, len(target), target)


def calibration(items: Mapping[str, Tensor], bins: int = BINS) -> list[tuple[float, float, int]]:
    """Compute mean confidence, accuracy and number of images of each bin that is not empty, for a reliability plot.

    Args:
        items: items of `classification_metrics`.
        bins: number of bins of equal width over the confidence; each includes its upper bound.
    """
    right, confidence = (items["rank"] < 1).double(), items["confidence"]
    bin_of = _bins(confidence, bins)
    masks = [bin_of == i for i in bin_of.unique().tolist()]
    return [(confidence[mask].mean().item(), right[mask].mean().item(), int(mask.sum())) for mask in masks]


def _bins(confidence: Tensor, bins: int) -> Tensor:
    return torch.bucketize(confidence, torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])


def per_class(items: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Count the right images and all images of each class, (C,) int64 each."""
    target, classes = items["target"], int(items["classes"])
    right = torch.bincount(target[items["rank"] < 1], minlength=classes)
    return right, torch.bincount(target, minlength=classes)


def multilabel_metrics(scores: Tensor, targets: Tensor, *, replicates: int = 1000) -> Scores:
    """Compute `mean_average_precision`, with its 95% bootstrap interval over the images.

    Args:
        scores: (N, C) score of each class for each image.
        targets: (N, C), true where the class is on the image.
        replicates: number of bootstrap samples; 0 for no interval.

    Returns:
        The metric of `multilabel_bootstrap`. Its chance value is the mean over all orders (Bestgen 2015, The Prague
        Bulletin of Mathematical Linguistics 103). The items are `scores` as given and `targets` (N, C) bool.

    Raises:
        ValueError: If scores are not finite, or the shapes differ.
    """
    items = {"scores": scores.cpu(), "targets": targets.cpu().bool()}
    bootstrap = multilabel_bootstrap(items)
    images, relevant = len(targets), items["targets"].sum(0).double()
    harmonic = sum(1 / rank for rank in range(1, images + 1))
    expected = (harmonic + (relevant - 1) / max(1, images - 1) * (images - harmonic)) / images
    chance = {"mean_average_precision": (expected * (relevant > 0)).mean().item()}
    return Scores(bootstrap.values(), bootstrap.intervals(replicates=replicates), chance, items)


def multilabel_bootstrap(items: Mapping[str, Tensor]) -> BootstrapMetrics:
    """Return `mean_average_precision`, the mean over classes of the average precision, as a function of the weights.

    The precision at a positive image is (1 + weight of the positives above it) / (1 + weight of all images above it).
    Copies of the image itself do not count, since in new data it has none. (If they count, as with scikit-learn's
    `sample_weight`, the replicates of rare classes are far above the metric.) Among equal scores the negatives come
    first.

    A class without images counts as 0, as in CLIP_benchmark. A class whose images are only not drawn has an unknown
    value, and 0 would pull the interval down: such classes are left out of the mean.

    Args:
        items: items of `multilabel_metrics`.
    """
    targets = items["targets"]
    precision = _precision(items["scores"], targets)
    share = targets.any(0).double().mean()  # share of the classes that have images

    def statistic(weights: Tensor) -> Tensor:
        return precision(weights).nanmean(1).nan_to_num() * share

    return BootstrapMetrics({"mean_average_precision": statistic}, len(targets))


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Compute the average precision of each class (C,), float64; see `multilabel_bootstrap`."""
    return _precision(scores, targets)(torch.ones(1, len(targets), dtype=torch.float64))[0].nan_to_num()


def _precision(scores: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function from weights (R, N) to the average precision of each class (R, C).

    The value is NaN for a class whose images all have weight 0.
    """
    if scores.shape != targets.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} must have the same shape")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("the scores are not finite: they cannot be ranked")
    classes = []
    for score, target in zip(scores.cpu().T, targets.cpu().T.bool()):
        negatives_first = torch.argsort(target.long(), stable=True)
        order = negatives_first[torch.argsort(score[negatives_first], descending=True, stable=True)]
        classes.append((order, torch.nonzero(target[order])[:, 0]))

    def statistic(weights: Tensor) -> Tensor:
        columns, found = weights.T.contiguous(), []  # (N, R), so that gathering a row is one copy
        for order, ranks in classes:
            own = columns[order[ranks]]  # (P, R) weights of the positives
            above = columns[order].cumsum(0)[ranks] - own
            positives_above = own.cumsum(0) - own
            found.append((own * (1 + positives_above) / (1 + above)).sum(0) / own.sum(0))
        return torch.stack(found, 1)

    return statistic
