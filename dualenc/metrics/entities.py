"""Metrics of named entities, as seqeval 1.2.2 defines them: precision, recall and F1 of whole entities."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualenc.metrics.bootstrap import BootstrapMetrics, Statistic, mean
from dualenc.utils.tags import OUTSIDE, SCHEMES, Entity, SchemeName, find_entities

Tags = Sequence[Sequence[str]]  # tags of the words of each text
FOUND, PREDICTED, TRUE = range(3)  # columns of the counts


class TypeScores(NamedTuple):
    """The scores of the entities of one type."""

    precision: float
    recall: float
    f1: float
    true: int  # entities of the type
    predicted: int  # predicted entities of the type


def entity_metrics(truth: Tags, predicted: Tags, scheme: SchemeName) -> dict[str, float]:
    """Compute the metrics of predicted tags.

    An entity is right if its type, its first and its last word are. A ratio whose denominator is 0 counts as 0.

    Args:
        truth: tags of the words of N texts.
        predicted: predicted tags of the same words.
        scheme: scheme of the tags.

    Returns:
        `precision`, `recall` and `f1` over all entities, which seqeval gives by default: an entity begins where a tag
        continues nothing. `f1_macro`, the mean of the F1 of the types that occur. `f1_strict`, the F1 of the entities
        that are written as the scheme allows, as seqeval's strict mode. `accuracy`, the share of words whose tags are
        right.

    Raises:
        ValueError: If the numbers of words differ, or there are no words.
    """
    counts, _ = _checked_counts(truth, predicted, find_entities)
    strict, _ = _checked_counts(truth, predicted, SCHEMES[scheme].find_strict)
    precision, recall, f1 = _scores(counts.sum((0, 1)))
    each = _scores(counts.sum(0).T)[2]
    return {
        "f1": float(f1),
        "precision": float(precision),
        "recall": float(recall),
        "f1_macro": float(each.mean()) if len(each) else 0.0,
        "f1_strict": float(_scores(strict.sum((0, 1)))[2]),
        "accuracy": float(np.mean(_right(truth, predicted))),
    }


def entity_bootstrap(truth: Tags, predicted: Tags, scheme: SchemeName) -> BootstrapMetrics:
    """Return the metrics of `entity_metrics` as functions of the texts' weights, for intervals and differences.

    Args:
        truth, predicted, scheme: see `entity_metrics`.

    Raises:
        ValueError: As `entity_metrics` does.
    """
    counts = torch.from_numpy(_checked_counts(truth, predicted, find_entities)[0]).double()  # (N, T, 3)
    strict = torch.from_numpy(_checked_counts(truth, predicted, SCHEMES[scheme].find_strict)[0]).double()
    text = torch.arange(len(truth)).repeat_interleave(torch.tensor([len(tags) for tags in truth]))
    statistics = {
        "f1": _ratio(counts.sum(1), 2.0, (PREDICTED, TRUE)),
        "precision": _ratio(counts.sum(1), 1.0, (PREDICTED,)),
        "recall": _ratio(counts.sum(1), 1.0, (TRUE,)),
        "f1_macro": _macro(counts),
        "f1_strict": _ratio(strict.sum(1), 2.0, (PREDICTED, TRUE)),
        "accuracy": mean(torch.tensor(_right(truth, predicted)), text),
    }
    return BootstrapMetrics(statistics, len(truth))


def type_scores(truth: Tags, predicted: Tags) -> dict[str, TypeScores]:
    """Compute the scores of each type that occurs, by its name in alphabetical order; see `entity_metrics`."""
    counts, labels = _checked_counts(truth, predicted, find_entities)
    found = {}
    for label, row in zip(labels, counts.sum(0), strict=True):
        precision, recall, f1 = (float(x) for x in _scores(row))
        found[label] = TypeScores(precision, recall, f1, int(row[TRUE]), int(row[PREDICTED]))
    return found


def outside_baseline(truth: Tags) -> dict[str, float]:
    """Compute the metrics of always predicting "O": an F1 of 0, and the share of words outside of entities."""
    tags = [tag for text in truth for tag in text]
    return {"f1": 0.0, "accuracy": tags.count(OUTSIDE) / len(tags)}


def _checked_counts(
    truth: Tags, predicted: Tags, find: Callable[[Sequence[str]], list[Entity]]
) -> tuple[np.ndarray, list[str]]:
    """Count the right, the predicted and the true entities of each text and type.

    Returns:
        Counts (N, T, 3), and the T types.
    """
    if [len(tags) for tags in truth] != [len(tags) for tags in predicted] or not any(map(len, truth)):
        raise ValueError("truth and predictions must have a tag for each word of the same texts, and some words")
    pairs = [(set(find(one)), set(find(other))) for one, other in zip(truth, predicted, strict=True)]
    labels = sorted({entity.label for pair in pairs for entities in pair for entity in entities})
    number: Mapping[str, int] = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(pairs), len(labels), 3), np.int64)
    for row, (true, guessed) in zip(counts, pairs, strict=True):
        for column, entities in ((FOUND, true & guessed), (PREDICTED, guessed), (TRUE, true)):
            for entity in entities:
                row[number[entity.label], column] += 1
    return counts, labels


def _scores(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and F1 of counts (3, ...), by the formulas of seqeval, so that no digit differs."""
    found, predicted, true = (np.asarray(x, np.float64) for x in counts)
    precision, recall = found / np.maximum(predicted, 1), found / np.maximum(true, 1)
    total = precision + recall
    return precision, recall, 2.0 * precision * recall / np.where(total == 0, 1.0, total)


def _right(truth: Tags, predicted: Tags) -> list[bool]:
    return [a == b for one, other in zip(truth, predicted, strict=True) for a, b in zip(one, other, strict=True)]


def _ratio(counts: Tensor, factor: float, columns: tuple[int, ...]) -> Statistic:
    """Return `factor` times the right entities over the sum of some columns of counts (N, 3)."""
    below = counts[:, list(columns)].sum(1)

    def statistic(weights: Tensor) -> Tensor:
        # All counts are integers, so that 1 replaces only a denominator of 0.
        return factor * (weights @ counts[:, FOUND]) / (weights @ below).clamp(min=1)

    return statistic


def _macro(counts: Tensor) -> Statistic:
    """Return the mean F1 of the types that occur, from counts (N, T, 3)."""
    below = counts[:, :, PREDICTED] + counts[:, :, TRUE]

    def statistic(weights: Tensor) -> Tensor:
        total = weights @ below  # (R, T)
        each = 2 * (weights @ counts[:, :, FOUND]) / total.clamp(min=1)
        return each.sum(1) / (total > 0).sum(1).clamp(min=1)

    return statistic
