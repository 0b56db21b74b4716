"""The evidence behind the metrics of question answering: the most confident mistakes in their contexts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dualenc.report.findings import CONFIDENT, around
from dualenc.report.render import render

TRUTHS = 3  # right answers that are shown
WRONG = 0.5  # F1 below which an answer is a mistake; a different choice of words around the right ones is above it


@dataclass(frozen=True)
class GivenAnswer:
    """An answer to a question about a text.

    Attributes:
        question: the question.
        context: the text.
        place: first character and end of the answer in the context; None for the empty answer.
        truths: the right answers; empty where the context does not have one.
        f1: F1 of the answer.
        confidence: score of the answer, from 0 to 1.
    """

    question: str
    context: str
    place: tuple[int, int] | None
    truths: Sequence[str]
    f1: float
    confidence: float


@dataclass(frozen=True)
class WrongAnswers:
    """Answers of which the page shows the most confident mistakes.

    Attributes:
        answers: answers to all questions.
    """

    answers: Sequence[GivenAnswer]

    def html(self) -> Markup:
        """See `Findings`."""
        wrong = sorted((one for one in self.answers if one.f1 < WRONG), key=lambda one: -one.confidence)
        return render("wrong_answers.jinja", mistakes=[_shown(one) for one in wrong[:CONFIDENT]], limit=WRONG)


def _shown(one: GivenAnswer) -> dict[str, Any]:
    """Return what the template shows of a mistake; without a place the beginning of the context."""
    start, stop = one.place or (0, 0)
    before, after = around(one.context, start, stop)
    return {
        "question": one.question,
        "before": before,
        "answer": one.context[start:stop],
        "after": after,
        "truths": list(dict.fromkeys(one.truths))[:TRUTHS],
        "f1": one.f1,
        "confidence": one.confidence,
    }
