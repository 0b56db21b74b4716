"""Metrics of text models: labels and numbers of texts, masked tokens and replaced tokens, each with a baseline.

torchmetrics has the usual metrics as pure functions. It is imported inside of functions, because it imports
`transformers` where that is installed. Where a metric is undefined, such as the correlation with a constant, its value
is defined here, without a warning.
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
Texts = Sequence[Sequence[int] | np.ndarray]  # token ids of each text, special ones included

SMOOTHING = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # pseudo-counts to try for the unigrams
HELD = 10  # every HELD-th training text is held out to choose the pseudo-count


def label_metrics(
    logits: Tensor, labels: Tensor, names: Sequence[str], problem: Problem = "single_label"
) -> dict[str, float]:
    """Compute the metrics of a classification or a regression of texts.

    Args:
        logits: logits (N, C); for a regression the predicted numbers (N,) or (N, 1).
        labels: class of each text (N,) ("single_label"), booleans (N, C) ("multi_label"), or numbers (N,)
            ("regression").
        names: names of the C classes.
        problem: kind of problem, as in the configuration of a classification head.

    Returns:
        "single_label": `accuracy`; `f1` of the last class if there are two, else the mean over the classes that occur
        among labels or predictions; `matthews` (Gorodkin 2004), 0 if all labels or all predictions are of one class.
        "multi_label": a label is predicted if its logit is positive. `accuracy`, the share of texts with exactly their
        labels; `f1_micro` over all decisions; `f1_macro`, the mean over the labels, in which a label counts as 0 if no
        text has it and it is never predicted.
        "regression": `pearson` and `spearman`, nan if all numbers, or all predictions, are the same; `mse`.

    Raises:
        ValueError: If the shapes do not fit, a label is not a class, logits are not finite, or there is no text.
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

        given, count = (logits > 0).long(), len(names)
        return {
            "accuracy": float(_right(logits, labels, problem).mean()),
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
        "accuracy": float(_right(logits, labels, problem).mean()),
        "f1": float(f1),
        "matthews": 0.0 if constant else float(multiclass_matthews_corrcoef(answers, labels, classes)),
    }


def label_bootstrap(
    logits: Tensor, labels: Tensor, names: Sequence[str], problem: Problem = "single_label"
) -> BootstrapMetrics:
    """Return `accuracy`, or `mse`, of `label_metrics` as a function of the texts' weights, for bootstrap intervals.

    Args:
        logits, labels, names, problem: see `label_metrics`.

    Raises:
        ValueError: If `label_metrics` raises it.
    """
    logits, labels = _checked(logits, labels, names, problem)
    if problem == "regression":
        return BootstrapMetrics({"mse": mean((logits - labels) ** 2)}, len(labels))
    return BootstrapMetrics({"accuracy": mean(_right(logits, labels, problem))}, len(labels))


def majority_baseline(train_labels: Tensor, labels: Tensor) -> float:
    """Compute the accuracy of always predicting the most frequent training label; the first one of a tie.

    Args:
        train_labels: classes (M,), or booleans (M, C) if texts have several labels.
        labels: classes (N,) or booleans (N, C) of the evaluated texts.
    """
    answers, counts = torch.unique(train_labels.long(), dim=0, return_counts=True)
    right = labels.long() == answers[int(counts.argmax())]
    return float(right.reshape(len(labels), -1).all(1).double().mean())


def mean_baseline(train_labels: Tensor, labels: Tensor) -> float:
    """Compute the mean squared error of always predicting the mean of the training numbers (M,), on numbers (N,)."""
    return float((labels.double() - train_labels.double().mean()).square().mean())


def _checked(logits: Tensor, labels: Tensor, names: Sequence[str], problem: Problem) -> tuple[Tensor, Tensor]:
    """Return logits float64 (N, C) or (N,) and labels int64 (N,) or (N, C), or float64 (N,), on the CPU."""
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
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} are not of a problem of kind {problem} "
            f"with {len(names)} names, or there is no text"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the logits are not finite: they cannot be measured")
    classes = 2 if problem == "multi_label" else len(names)
    if problem != "regression" and not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"every label must lie between 0 and {classes - 1}")
    return logits, labels


def _right(logits: Tensor, labels: Tensor, problem: Problem) -> Tensor:
    """Return 1 for each text whose prediction is exactly its label or labels, else 0: (N,) float64."""
    right = ((logits > 0) == labels.bool()).all(1) if problem == "multi_label" else logits.argmax(1) == labels
    return right.double()


# Masked tokens


def perplexity(losses: Tensor, counts: Tensor) -> float:
    """Compute exp of the mean loss of all tokens.

    Args:
        losses: mean loss of each batch's tokens (K,), in nats.
        counts: number of tokens in each mean (K,); a batch without tokens is ignored, whatever its loss.
    """
    losses, counts = losses.detach().double().cpu(), counts.detach().double().cpu()
    if not float(counts.sum()) > 0:
        raise ValueError("there is no token to measure")
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

    Each token except the special ones is masked once, alone, and predicted from all others of its text. The result is
    exp of the mean negative log-probability over the tokens of all texts. It is not a probability of the texts, and
    cannot be compared with the perplexity of a model that sees only the left side.

    Args:
        guess: function from a packed batch of copies and the positions (M,) of the masked tokens in `Tokens.ids` to
            logits (M, V), such as `lambda tokens, positions: model(tokens, "mlm", positions)` in evaluation mode.
        texts: token ids of each text, with the special ones.
        mask_id: id of the mask token.
        special_ids: ids of the tokens that are not scored.
        batch_tokens: maximum number of tokens in a batch, which a single longer text may exceed.

    Raises:
        ValueError: If there is no token to score.
    """
    special, total, count = frozenset(special_ids), 0.0, 0
    copies: list[list[int]] = []
    masked: list[tuple[int, int]] = []  # position in the copy, and the original token
    room = 0

    def score() -> float:
        tokens = Tokens.pack(copies)
        position, target = torch.tensor(masked).T
        with torch.no_grad():
            logits = guess(tokens, tokens.offsets[:-1].long()[tokens.rows] + position)
            chosen = logits.double().log_softmax(1).gather(1, target.to(logits.device)[:, None])
        copies.clear()
        masked.clear()
        return float(chosen.sum())

    for text in sorted(texts, key=len):  # Texts of equal lengths share batches.
        ids = [int(i) for i in text]
        for position, target in enumerate(ids):
            if target in special:
                continue
            if copies and room + len(ids) > batch_tokens:
                total, room = total + score(), 0
            copies.append([*ids[:position], mask_id, *ids[position + 1 :]])
            masked.append((position, target))
            count, room = count + 1, room + len(ids)
    if not count:
        raise ValueError("the texts have no token to score")
    return math.exp(-(total + score()) / count)


def unigram_perplexity(train: Texts, held_out: Texts, vocab_size: int, special_ids: Iterable[int] = ()) -> float:
    """Compute the perplexity of token frequencies, for the tokens that `pseudo_perplexity` scores.

    k is added to each count (Chen and Goodman 1999, section 2.1). Of `SMOOTHING`, k is the value with which the other
    training texts predict every tenth one best.

    Args:
        train: token ids of the texts to count.
        held_out: token ids of the texts to predict.
        vocab_size: number of ids in the vocabulary.
        special_ids: ids of the tokens that are neither counted nor scored.

    Raises:
        ValueError: If an id is outside the vocabulary, or there is no token to count or to score.
    """
    ordinary = _ordinary(vocab_size, special_ids)
    parts = [_ids(texts, vocab_size) for texts in (train, held_out)]
    counted, scored = (part[ordinary[part]] for part in parts)
    if not len(counted) or not len(scored):
        raise ValueError("the texts have no token to count, or none to score")

    def loss(seen: np.ndarray, asked: np.ndarray, k: float) -> float:
        counts = np.bincount(seen, minlength=vocab_size)
        return float(-np.log((counts[asked] + k) / (len(seen) + k * ordinary.sum())).mean())

    tuning = [_ids(texts, vocab_size) for texts in ([t for i, t in enumerate(train) if i % HELD], train[::HELD])]
    seen, asked = (part[ordinary[part]] for part in tuning)
    k = min(SMOOTHING, key=lambda k: loss(seen, asked, k)) if len(seen) and len(asked) else SMOOTHING[0]
    return math.exp(loss(counted, scored, k))


def _ordinary(vocab_size: int, special_ids: Iterable[int]) -> np.ndarray:
    """Return which ids are counted and scored (V,)."""
    ordinary = np.ones(vocab_size, dtype=bool)
    ordinary[list(special_ids)] = False
    return ordinary


def _ids(texts: Texts, vocab_size: int) -> np.ndarray:
    """Return the tokens of all texts, one after another."""
    ids = np.concatenate([np.empty(0, np.int64), *(np.asarray(text, dtype=np.int64) for text in texts)])
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"token ids between {ids.min()} and {ids.max()} must lie in the vocabulary of {vocab_size}")
    return ids


# Replaced tokens


def replaced_metrics(logits: Tensor, replaced: Tensor, frequent: Tensor | None = None) -> dict[str, float]:
    """Compute the metrics of replaced-token detection, in which a positive logit predicts "replaced".

    Args:
        logits: logits (N,) of the tokens.
        replaced: booleans (N,), true for replaced tokens.
        frequent: booleans (N,), true if the token in the text is a frequent one.

    Returns:
        `accuracy`; `always_original`, its baseline, which never predicts "replaced"; `balanced_accuracy`, the mean of
        the shares of replaced and of original tokens that are right; `auroc`, the share of pairs of a replaced and an
        original token in which the replaced one has the higher logit, a tie as half; `precision`, `recall` and `f1` of
        "replaced". The same metrics of the frequent tokens and of the others, as `NAME_frequent` and `NAME_rare`. A
        metric is nan if its denominator is 0.

    Raises:
        ValueError: If the shapes differ, or logits are not finite.
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
    _, group, counts = torch.unique(logits, return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[group]  # from 1; equal logits share the mean of their ranks
    above = float(rank[replaced].sum()) - positives * (positives + 1) / 2  # Mann and Whitney's U
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
