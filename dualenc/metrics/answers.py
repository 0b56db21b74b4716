"""Metrics of answers to questions about texts, equal to those of the official scripts of SQuAD 1.1 and 2.

The scripts print percent; here all values lie between 0 and 1.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dualenc.metrics.bootstrap import BootstrapMetrics, mean

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE = re.compile(r".*?[.!?][\"'\u201d\u2019)\]]*(?=\s|$)", re.DOTALL)


class AnswerScores(NamedTuple):
    """Two scores of an answer, each between 0 and 1."""

    exact_match: float
    f1: float


def normalized_answer(text: str) -> str:
    """Return an answer in lower case, without ASCII punctuation and English articles, with single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def answer_scores(answer: str, truths: Sequence[str]) -> AnswerScores:
    """Compute the scores of an answer as the script of SQuAD 1.1 (Rajpurkar et al. 2016): the best over the truths.

    Args:
        answer: the predicted answer.
        truths: the right answers, one at least.

    Example:
        >>> answer_scores("the Eiffel Tower!", ["Eiffel tower", "Tower"])
        AnswerScores(exact_match=1.0, f1=1.0)
        >>> answer_scores("tower of Paris", ["the Eiffel tower"])
        AnswerScores(exact_match=0.0, f1=0.4)
    """
    predicted, right = normalized_answer(answer), [normalized_answer(text) for text in truths]
    return AnswerScores(float(predicted in right), max(_overlap(predicted, text) for text in right))


def answer_scores_or_none(answer: str, truths: Sequence[str]) -> AnswerScores:
    """Compute the scores of an answer as the script of SQuAD 2 (Rajpurkar et al. 2018).

    It differs from `answer_scores` where a text is empty after normalization: truths of that kind are left out, and
    without any truth the right answer is the empty one; two empty texts are equal.

    Args:
        answer: the predicted answer; empty for none.
        truths: the right answers; empty for a question without one.
    """
    predicted, right = normalized_answer(answer), [text for text in map(normalized_answer, truths) if text] or [""]
    f1 = max(float(predicted == text) if not (predicted and text) else _overlap(predicted, text) for text in right)
    return AnswerScores(float(predicted in right), f1)


def _overlap(one: str, other: str) -> float:
    """Return the harmonic mean of precision and recall of the words of two normalized texts."""
    first, second = one.split(), other.split()
    shared = sum((Counter(first) & Counter(second)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(first), shared / len(second)
    return 2 * precision * recall / (precision + recall)


def answer_bootstrap(scores: Sequence[AnswerScores], answered: Sequence[bool] | None = None) -> BootstrapMetrics:
    """Return the metrics of N questions as statistics; a unit is a question.

    Args:
        scores: scores of the N answers.
        answered: for SQuAD 2, which of the questions have an answer. Samples keep the number of both sorts.

    Returns:
        `exact_match` and `f1`; for SQuAD 2 also `has_answer_exact_match`, `has_answer_f1` and `no_answer_f1`, those of
        the questions with and without an answer, where there are any. Without an answer both scores are the same.
    """
    columns = {
        name: torch.tensor([getattr(one, name) for one in scores], dtype=torch.float64) for name in AnswerScores._fields
    }
    statistics = {name: mean(values) for name, values in columns.items()}
    if answered is None:
        return BootstrapMetrics(statistics, len(scores))
    sort = torch.tensor(list(answered), dtype=torch.bool)
    for name, part, chosen in (
        ("has_answer_exact_match", "exact_match", sort),
        ("has_answer_f1", "f1", sort),
        ("no_answer_f1", "f1", ~sort),
    ):
        if rows := torch.flatten(chosen.nonzero()).tolist():
            statistics[name] = mean(columns[part][rows], torch.tensor(rows))
    return BootstrapMetrics(statistics, len(scores), sort.long())


def best_no_answer(
    answers: Sequence[str], f1: Sequence[float], empty: Sequence[float], answered: Sequence[bool]
) -> tuple[float, float]:
    """Find the threshold of the score of "no answer" that gives the highest mean F1, as the script of SQuAD 2.

    It is tuned on the same questions that it is measured on.

    Args:
        answers: best answer other than "no answer" for each of N questions.
        f1: F1 of these answers.
        empty: score of "no answer" for each question; the answer is empty if it is above the threshold.
        answered: which of the questions have an answer.

    Returns:
        The mean F1, and the threshold, which is below all scores where answering nothing is best.
    """
    total = best = float(len(answered) - sum(answered))
    threshold = min(empty) - 1.0
    # Each step answers one more question, the one that is most likely to have an answer first.
    for i in sorted(range(len(f1)), key=empty.__getitem__):
        total += f1[i] if answered[i] else -float(bool(answers[i]))
        if total > best:
            best, threshold = total, empty[i]
    return best / len(f1), threshold


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, a baseline for answers: up to a full stop and a blank, or the whole text.

    Example:
        >>> first_sentence("It rains. It snows.")
        'It rains.'
    """
    text = text.strip()
    found = _SENTENCE.match(text)
    return text if found is None else found[0]
