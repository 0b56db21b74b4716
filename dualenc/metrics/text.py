"""Text models: labels and numbers of texts, words behind masks, replaced words; each beside what needs no model.

torchmetrics has the usual metrics as pure functions; it is imported inside, as it imports `transformers` where that is
installed. Where it has no answer, such as the correlation with a constant, one is defined here and no warning given.
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

SMOOTHING = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # tried for the unigrams
HELD = 10  # every so many-th training text is left out to choose by


def label_metrics(
    logits: Tensor, labels: Tensor, names: Sequence[str], problem: Problem = "single_label"
) -> dict[str, float]:
    """The metrics of a classification of texts, or of numbers given to them.

    Args:
        logits: (N, C); of a regression (N,) or (N, 1), the numbers themselves.
        labels: (N,) the class of each text ("single_label"), (N, C) booleans ("multi_label"), or (N,) numbers
            ("regression").
        names: of the C classes.
        problem: as a classification head has it.

    Returns:
        "single_label": `accuracy`; `f1` of the last class where there are two, else the mean over the classes that
        occur among labels or predictions; `matthews` (Gorodkin 2004), 0 where all labels or all predictions are of one
        class.
        "multi_label": a label is given where its logit is positive. `accuracy`, of texts with exactly their labels;
        `f1_micro` over all decisions; `f1_macro`, the mean over the labels, where one that no text has and none is
        given counts as 0.
        "regression": `pearson` and `spearman`, nan where all numbers, or all predictions, are the same; `mse`.

    Raises:
        ValueError: shapes do not fit, a label is no class, logits are not finite, or there is no text.
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
    """`accuracy`, or `mse`, of `label_metrics` as a function of the texts' weights, for intervals and differences.

    Args:
        logits, labels, names, problem: see `label_metrics`.

    Raises:
        ValueError: see `label_metrics`.
    """
    logits, labels = _checked(logits, labels, names, problem)
    if problem == "regression":
        return BootstrapMetrics({"mse": mean((logits - labels) ** 2)}, len(labels))
    return BootstrapMetrics({"accuracy": mean(_right(logits, labels, problem))}, len(labels))


def majority_baseline(train_labels: Tensor, labels: Tensor) -> float:
    """Accuracy of always giving the answer most frequent in training, of equally frequent ones the first.

    Args:
        train_labels: (M,) classes, or (M, C) truths where texts have several labels.
        labels: (N,) or (N, C), of the texts that are measured.
    """
    answers, counts = torch.unique(train_labels.long(), dim=0, return_counts=True)
    right = labels.long() == answers[int(counts.argmax())]
    return float(right.reshape(len(labels), -1).all(1).double().mean())


def mean_baseline(train_labels: Tensor, labels: Tensor) -> float:
    """Mean squared error of always giving the mean of the training numbers (M,), on numbers (N,)."""
    return float((labels.double() - train_labels.double().mean()).square().mean())


def _checked(logits: Tensor, labels: Tensor, names: Sequence[str], problem: Problem) -> tuple[Tensor, Tensor]:
    """Logits float64 (N, C) or (N,), labels int64 (N,), (N, C) or float64 (N,), on the CPU."""
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
    """(N,) float64, one where a text has been given exactly what it has."""
    right = ((logits > 0) == labels.bool()).all(1) if problem == "multi_label" else logits.argmax(1) == labels
    return right.double()


# Words


def perplexity(losses: Tensor, counts: Tensor) -> float:
    """exp of the mean loss of all tokens.

    Args:
        losses: (K,) mean loss of each batch's tokens, in nats.
        counts: (K,) number of tokens that each mean is over; a batch of none does not count, whatever its loss.
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
    """Perplexity of a masked-language model (Salazar et al. 2020, section 2).

    Each token but the special ones is hidden once, alone, and guessed from all others of its text: exp of the mean
    negative log-probability over the tokens of all texts. The figure is not a probability of the texts, and does not
    compare with the perplexity of a model that sees the left side only.

    Args:
        guess: from a packed batch of copies and the positions (M,) in `Tokens.ids` of what is hidden, to logits (M, V);
            such as `lambda tokens, positions: model(tokens, "mlm", positions)`, of a model in evaluation mode.
        texts: token ids, special ones included.
        mask_id: of the mask token.
        special_ids: of the tokens that are seen and not scored.
        batch_tokens: in a batch at most, but for a text that is longer by itself.

    Raises:
        ValueError: there is no token to score.
    """
    special, total, count = frozenset(special_ids), 0.0, 0
    copies: list[list[int]] = []
    hidden: list[tuple[int, int]] = []  # place in the copy, what stood there
    room = 0

    def score() -> float:
        tokens = Tokens.pack(copies)
        place, target = torch.tensor(hidden).T
        with torch.no_grad():
            logits = guess(tokens, tokens.offsets[:-1].long()[tokens.rows] + place)
            chosen = logits.double().log_softmax(1).gather(1, target.to(logits.device)[:, None])
        copies.clear()
        hidden.clear()
        return float(chosen.sum())

    for text in sorted(texts, key=len):  # equal lengths together
        ids = [int(i) for i in text]
        for place, target in enumerate(ids):
            if target in special:
                continue
            if copies and room + len(ids) > batch_tokens:
                total, room = total + score(), 0
            copies.append([*ids[:place], mask_id, *ids[place + 1 :]])
            hidden.append((place, target))
            count, room = count + 1, room + len(ids)
    if not count:
        raise ValueError("the texts have no token to score")
    return math.exp(-(total + score()) / count)


def unigram_perplexity(train: Texts, held_out: Texts, vocab_size: int, special_ids: Iterable[int] = ()) -> float:
    """Perplexity of guessing each token by how frequent it is, for the tokens that `pseudo_perplexity` scores.

    k is added to each count (Chen and Goodman 1999, section 2.1); of `SMOOTHING`, the k that guesses every tenth
    training text best from the others.

    Args:
        train: token ids of the texts to count.
        held_out: of the texts to guess.
        vocab_size: ids lie below it.
        special_ids: of the tokens that are neither counted nor scored.

    Raises:
        ValueError: an id is none of the vocabulary, or there is no token to count or to score.
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
    """All tokens of some texts."""
    ids = np.concatenate([np.empty(0, np.int64), *(np.asarray(text, dtype=np.int64) for text in texts)])
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"token ids between {ids.min()} and {ids.max()} are no vocabulary of {vocab_size}")
    return ids


# Replaced words


def replaced_metrics(logits: Tensor, replaced: Tensor, frequent: Tensor | None = None) -> dict[str, float]:
    """The metrics of telling which tokens were replaced; "replaced" is said where a logit is positive.

    Args:
        logits: (N,) of the tokens that are judged.
        replaced: (N,) truths.
        frequent: (N,) whether the token that is seen is a frequent one.

    Returns:
        `accuracy`; `always_original`, that of never saying "replaced", which it must be compared with;
        `balanced_accuracy`, the mean of the shares of replaced and of original tokens that are right; `auroc`, the
        share of pairs of both in which the replaced one has the higher logit, a tie as half; `precision`, `recall` and
        `f1` of "replaced". The same of the frequent tokens and of the others, as `NAME_frequent` and `NAME_rare`. nan
        where there is nothing to divide by.

    Raises:
        ValueError: shapes differ, or logits are not finite.
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
    said, n, positives = logits > 0, len(logits), int(replaced.sum())
    tp, fp, negatives = int((said & replaced).sum()), int((said & ~replaced).sum()), n - positives
    _, place, counts = torch.unique(logits, return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[place]  # from 1; equal logits share the mean of their places
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
