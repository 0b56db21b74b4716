"""Metrics of text models: labels and scores of texts, masked tokens, replaced tokens; each with a baseline.

torchmetrics has the usual metrics as pure functions. It is imported inside functions, because it imports
`transformers` where that is installed. Where a metric is undefined, such as the correlation with a constant, this
module defines a value and gives no warning.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dualenc.metrics.bootstrap import BootstrapMetrics, mean
from dualenc.tokens import Tokens

Problem = Literal["single_label", "multi_label", "regression"]
Texts = Sequence[Sequence[int] | np.ndarray]  # Token ids of each text, including special tokens.

SMOOTHING = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # The values of k that the unigram baseline tries.
HELD = 10  # The unigram baseline holds out one of this many training texts to choose k.


def label_metrics(
    logits: Tensor,
    labels: Tensor,
    names: Sequence[str],
    problem: Problem = "single_label",
    *,
    threshold: float = 0.5,
) -> dict[str, float]:
    """Compute the metrics of a classification of texts, or of a regression.

    Args:
        logits: (N, C) logits; for a regression the predictions, (N,) or (N, 1).
        labels: (N,) the class of each text ("single_label"), (N, C) booleans ("multi_label"), or (N,) numbers
            ("regression").
        names: names of the C classes.
        problem: the problem of the classification head.
        threshold: see `reaches`, for "multi_label".

    Returns:
        For "single_label": `accuracy`; `f1` of the last class if there are two, otherwise the mean over the classes
        that occur among labels or predictions; `matthews` (Gorodkin 2004), 0 where all labels or all predictions are of
        one class.
        For "multi_label", where labels that reach the threshold are predicted: `accuracy`, the share of texts with
        exactly their labels; `f1_micro` over all decisions; `f1_macro`, the mean over the labels, in which a label that
        neither occurs nor is predicted counts as 0.
        For "regression": `pearson` and `spearman`, nan where all numbers or all predictions are equal; `mse`.

    Raises:
        ValueError: If shapes do not fit, a label is not a class, logits are non-finite, or there are no texts.
    """
    logits, labels = _checked(logits, labels, names, problem)
    if problem == "regression":
        from torchmetrics.functional.regression import mean_squared_error, pearson_corrcoef, spearman_corrcoef

        constant = bool((logits == logits[0]).all() or (labels == labels[0]).all())
        return {
            "pearson": math.nan if constant else float(pearson_corrcoef(logits, labels)),
            "spearman": math.nan if constant else float(spearman_corrcoef(logits, labels)),
            "mse": float(mean_squared_error(logits, labels)),
        }
    if problem == "multi_label":
        from torchmetrics.functional.classification import multilabel_f1_score

        given, count = reaches(logits, threshold).long(), len(names)
        return {
            "accuracy": float(_correct(logits, labels, problem, threshold).mean()),
            "f1_micro": float(multilabel_f1_score(given, labels, count, average="micro")),
            "f1_macro": float(multilabel_f1_score(given, labels, count, average="macro")),
        }
    from torchmetrics.functional.classification import (
        binary_f1_score,
        multiclass_f1_score,
        multiclass_matthews_corrcoef,
    )

    answers, classes = logits.argmax(1), len(names)
    f1 = binary_f1_score(answers, labels) if classes == 2 else multiclass_f1_score(answers, labels, classes)
    constant = bool((answers == answers[0]).all() or (labels == labels[0]).all())
    return {
        "accuracy": float(_correct(logits, labels, problem, threshold).mean()),
        "f1": float(f1),
        "matthews": 0.0 if constant else float(multiclass_matthews_corrcoef(answers, labels, classes)),
    }


def label_bootstrap(
    logits: Tensor,
    labels: Tensor,
    names: Sequence[str],
    problem: Problem = "single_label",
    *,
    threshold: float = 0.5,
) -> BootstrapMetrics:
    """Return `accuracy` or `mse` of `label_metrics` as a function of the texts' weights, for intervals and differences.

    Args:
        logits, labels, names, problem, threshold: see `label_metrics`.

    Raises:
        ValueError: As `label_metrics` does.
    """
    logits, labels = _checked(logits, labels, names, problem)
    if problem == "regression":
        return BootstrapMetrics({"mse": mean((logits - labels) ** 2)}, len(labels))
    return BootstrapMetrics({"accuracy": mean(_correct(logits, labels, problem, threshold))}, len(labels))


def reaches(logits: Tensor, threshold: float) -> Tensor:
    """Return for which logits the score, the sigmoid of the logit, is at least the threshold."""
    return logits.double().sigmoid() >= threshold


def majority_baseline(train_labels: Tensor, labels: Tensor) -> float:
    """Compute the accuracy of always predicting the most frequent training label, in a tie the first one.

    Args:
        train_labels: (M,) classes, or (M, C) booleans if texts have several labels.
        labels: (N,) or (N, C) labels of the texts that are measured.
    """
    answers, counts = torch.unique(train_labels.long(), dim=0, return_counts=True)
    right = labels.long() == answers[int(counts.argmax())]
    return float(right.reshape(len(labels), -1).all(1).double().mean())


def mean_baseline(train_labels: Tensor, labels: Tensor) -> float:
    """Compute the mean squared error of always predicting the mean of the training numbers (M,), on numbers (N,)."""
    return float((labels.double() - train_labels.double().mean()).square().mean())


def _checked(logits: Tensor, labels: Tensor, names: Sequence[str], problem: Problem) -> tuple[Tensor, Tensor]:
    """Return logits as float64 (N, C) or (N,) and labels as int64 (N,), (N, C) or float64 (N,), on the CPU."""
    logits = logits.detach().double().cpu()
    labels = labels.detach().cpu()
    if problem == "regression":
        logits, labels = logits.reshape(len(logits), -1).squeeze(1), labels.double()
        wanted = (len(labels),)
    else:
        labels = labels.long()
        wanted = (len(labels), len(names))
    shape = wanted if problem == "multi_label" else (len(labels),)
    if not len(labels) or tuple(logits.shape) != wanted or tuple(labels.shape) != shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit the problem {problem} with "
            f"{len(names)} names, or there are no texts"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the logits are not finite: they cannot be measured")
    classes = 2 if problem == "multi_label" else len(names)
    if problem != "regression" and not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"every label must lie between 0 and {classes - 1}")
    return logits, labels


def _correct(logits: Tensor, labels: Tensor, problem: Problem, threshold: float) -> Tensor:
    """Return 1 for each text whose prediction equals its labels, otherwise 0, (N,) float64."""
    if problem == "multi_label":
        return (reaches(logits, threshold) == labels.bool()).all(1).double()
    return (logits.argmax(1) == labels).double()


# Masked tokens


def perplexity(losses: Tensor, counts: Tensor) -> float:
    """Compute exp of the mean loss of all tokens.

    Args:
        losses: (K,) mean loss of each batch's tokens, in nats.
        counts: (K,) number of tokens behind each mean. The loss of a batch without tokens is ignored.

    Raises:
        ValueError: If there are no tokens.
    """
    losses, counts = losses.detach().double().cpu(), counts.detach().double().cpu()
    if not float(counts.sum()) > 0:
        raise ValueError("there are no tokens to measure")
    return math.exp(float((losses * counts)[counts > 0].sum() / counts.sum()))


def pseudo_perplexity(
    guess: Callable[[Tokens, Tensor], Tensor],
    texts: Sequence[Sequence[int]],
    mask_id: int,
    special_ids: Iterable[int],
    *,
    batch_tokens: int = 8192,
) -> float:
    """Compute the pseudo-perplexity of a masked-language model (Salazar et al. 2020, section 2).

    Each token except the special tokens is masked once, alone, and predicted from all other tokens of its text. The
    result is exp of the mean negative log-probability over the tokens of all texts. It is not a probability of the
    texts and cannot be compared with the perplexity of a model that sees the left side only.

    Args:
        guess: function from a packed batch of copies and the masked positions (M,) in `Tokens.ids` to logits (M, V),
            such as `lambda tokens, positions: model(tokens, "mlm", positions)` of a model in evaluation mode.
        texts: token ids, including special tokens.
        mask_id: id of the mask token.
        special_ids: ids of the tokens that are seen and not scored.
        batch_tokens: most tokens of a batch; a longer text is a batch by itself.

    Raises:
        ValueError: If there are no tokens to score.
    """
    special, total, count = frozenset(special_ids), 0.0, 0
    copies: list[list[int]] = []
    masked: list[tuple[int, int]] = []  # The masked position in each copy, and the token there.
    size = 0  # tokens of the copies

    def score() -> float:
        tokens = Tokens.pack(copies)
        position, target = torch.tensor(masked).T
        with torch.no_grad():
            logits = guess(tokens, tokens.offsets[:-1].long()[tokens.rows] + position)
            chosen = logits.double().log_softmax(1).gather(1, target.to(logits.device)[:, None])
        copies.clear()
        masked.clear()
        return float(chosen.sum())

    for text in sorted(texts, key=len):  # Texts of similar length share a batch.
        ids = [int(i) for i in text]
        for position, target in enumerate(ids):
            if target in special:
                continue
            if copies and size + len(ids) > batch_tokens:
                total, size = total + score(), 0
            copies.append([*ids[:position], mask_id, *ids[position + 1 :]])
            masked.append((position, target))
            count, size = count + 1, size + len(ids)
    if not count:
        raise ValueError("the texts have no tokens to score")
    return math.exp(-(total + score()) / count)


def unigram_perplexity(train: Texts, held_out: Texts, vocab_size: int, special_ids: Iterable[int] = ()) -> float:
    """Compute the perplexity of predicting each token by its frequency, on the tokens that `pseudo_perplexity` scores.

    k is added to each count (Chen and Goodman 1999, section 2.1). Of `SMOOTHING`, it is the k that predicts every tenth
    training text best from the others.

    Args:
        train: token ids of the training texts, whose tokens are counted.
        held_out: token ids of the texts to predict.
        vocab_size: number of ids.
        special_ids: ids of the tokens that are neither counted nor scored.

    Raises:
        ValueError: If an id is outside the vocabulary, or there are no tokens to count or to score.
    """
    special = sorted(set(special_ids))
    rest = [text for i, text in enumerate(train) if i % HELD]
    counted, scored, most, tenth = (
        _ordinary(texts, vocab_size, special) for texts in (train, held_out, rest, train[::HELD])
    )
    if not len(counted) or not len(scored):
        raise ValueError("the texts have no tokens to count, or none to score")

    def loss(seen: np.ndarray, predicted: np.ndarray, k: float) -> float:
        counts = np.bincount(seen, minlength=vocab_size)
        return float(-np.log((counts[predicted] + k) / (len(seen) + k * (vocab_size - len(special)))).mean())

    k = min(SMOOTHING, key=lambda k: loss(most, tenth, k)) if len(most) and len(tenth) else SMOOTHING[0]
    return math.exp(loss(counted, scored, k))


def _ordinary(texts: Texts, vocab_size: int, special: Sequence[int]) -> np.ndarray:
    """Return all tokens of some texts, except the special tokens."""
    ids = np.concatenate([np.empty(0, np.int64), *(np.asarray(text, dtype=np.int64) for text in texts)])
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"token ids lie between {ids.min()} and {ids.max()}, outside a vocabulary of {vocab_size}")
    return ids[~np.isin(ids, special)]


# Replaced tokens


def replaced_metrics(logits: Tensor, replaced: Tensor, frequent: Tensor | None = None) -> dict[str, float]:
    """Compute the metrics of detecting replaced tokens; a token with a positive logit is predicted as replaced.

    Args:
        logits: (N,) logits of the tokens.
        replaced: (N,) booleans, true for replaced tokens.
        frequent: (N,) booleans, true for tokens that are frequent.

    Returns:
        `accuracy`, and its baseline `always_original`, the accuracy of never predicting "replaced";
        `balanced_accuracy`, the mean of the recalls of replaced and of original tokens; `auroc`, the share of pairs of
        a replaced and an original token in which the replaced one has the higher logit, a tie as half; `precision`,
        `recall` and `f1` of "replaced". With `frequent` also the same of frequent and of rare tokens, as
        `NAME_frequent` and `NAME_rare`. A value is nan where its denominator is 0.

    Raises:
        ValueError: If shapes differ, or logits are non-finite.
    """
    logits, replaced = logits.detach().double().cpu(), replaced.detach().bool().cpu()
    frequent = None if frequent is None else frequent.detach().bool().cpu()
    if logits.ndim != 1 or logits.shape != replaced.shape or (frequent is not None and frequent.shape != logits.shape):
        raise ValueError("logits, replaced and frequent must have one entry for each token")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the logits are not finite: they cannot be measured")
    found = _replaced(logits, replaced)
    if frequent is not None:
        for name, rows in (("frequent", frequent), ("rare", ~frequent)):
            found |= {f"{key}_{name}": value for key, value in _replaced(logits[rows], replaced[rows]).items()}
    return found


def _replaced(logits: Tensor, replaced: Tensor) -> dict[str, float]:
    predicted, n, positives = logits > 0, len(logits), int(replaced.sum())
    tp, fp, negatives = int((predicted & replaced).sum()), int((predicted & ~replaced).sum()), n - positives
    _, index, counts = torch.unique(logits, return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[index]  # Ranks begin at 1; equal logits share their mean rank.
    above = float(rank[replaced].sum()) - positives * (positives + 1) / 2  # The U of Mann and Whitney.
    recall = _over(tp, positives)
    return {
        "accuracy": _over(tp + negatives - fp, n),
        "always_original": _over(negatives, n),
        "balanced_accuracy": (recall + _over(negatives - fp, negatives)) / 2,
        "auroc": _over(above, positives * negatives),
        "precision": _over(tp, tp + fp),
        "recall": recall,
        "f1": _over(2 * tp, tp + fp + positives),
    }


def _over(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
