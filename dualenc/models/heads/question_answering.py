"""Extractive question answering: a head that finds the answer to a question as a part of a text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualenc.data.text.dataset import Part, Texts
from dualenc.data.text.questions import Question, QuestionReader, ReadQuestion
from dualenc.data.text.windows import WindowReader
from dualenc.metrics.answers import (
    AnswerScores,
    answer_bootstrap,
    answer_scores,
    answer_scores_or_none,
    best_no_answer,
    first_sentence,
)
from dualenc.models.heads.base import Examples, Head, HeldOut, Measured
from dualenc.models.heads.classification import ClassificationHead
from dualenc.models.text_encoder import TextConfig, TextEncoder
from dualenc.report import Description
from dualenc.report.wrong_answers import GivenAnswer, WrongAnswers
from dualenc.tokens import Tokens

CANDIDATES = 20  # starts and ends of a window that are combined, and answers of a question that are kept
LONGEST = 30  # most tokens of an answer


class Span(NamedTuple):
    """A part of a context."""

    start: int  # first character
    stop: int  # end
    score: float  # sum of the logits of its first and its last token


class Observed(NamedTuple):
    """One held-out question and its answer."""

    item: Question
    best: Span  # the best answer of all windows
    probability: float  # of the answer that is given
    empty: float  # score of "no answer" minus that of the best answer


class QuestionAnswering(Head):
    """Start and end of the answer to a question in a text, by two logits of each token (Devlin et al. 2019).

    A question and its context are read together. Of a long context there are several windows that overlap. The loss is
    the mean of the cross entropies of the start and of the end over all tokens of a window, whose first token stands
    for "no answer here".
    """

    labeled = False
    settings = ("max_length", "stride", "no_answer")
    task = "question-answering"
    result_kind = "question-answering"
    description = Description(
        "questions",
        "answers found in a text",
        ("f1", "exact_match"),
        unbounded=("best_f1_threshold",),
    )
    needs_training_data = False

    def check(self) -> None:
        """See `Head.check`."""
        super().check()
        length, stride = self.config.max_length, self.config.stride
        if not 0 <= stride < length:
            raise ValueError(f"a head of kind {self.config.kind}: stride {stride} must lie in 0 to max_length {length}")

    @property
    def reader(self) -> QuestionReader:
        """The reader of questions."""
        return QuestionReader(self.config.max_length, self.config.stride, self.config.no_answer)

    def window_reader(self) -> WindowReader:
        """See `Head.window_reader`."""
        return self.reader

    def build(self, text: TextConfig) -> nn.Module:
        """Return the layers: one, or with `norm` two as in ModernBERT.

        Raises:
            ValueError: If a window would be longer than the encoder reads, or the encoder needs padding.
        """
        if self.config.max_length > text.context_length:
            raise ValueError(
                f"max_length {self.config.max_length} of a head of kind {self.config.kind} is above the encoder's "
                f"context_length {text.context_length}: lower it, and stride with it"
            )
        if text.pad_to is not None:
            raise ValueError(f"a head of kind {self.config.kind} cannot use an encoder that pads texts (pad_to)")
        activation = self.config.activation if self.config.norm else None
        # The format of most families has no dropout before the last layer.
        return ClassificationHead(replace(text, dropout=0.0), 2, activation, self.config.norm)

    def logits(
        self, module: nn.Module, encoder: TextEncoder, hidden: Tensor, tokens: Tokens, positions: Tensor | None
    ) -> Tensor:
        """Return the logits (M, 2) of start and end for the tokens at `positions`, or all, see `Head.logits`."""
        return module(hidden if positions is None else hidden[positions])

    def examples(self, logits: Tensor, batch: Texts, part: Part) -> Examples:
        """Return the logits of w windows (w, L, 2), minus infinity after the end of a window; see `Head.examples`."""
        windows = part.windows
        assert windows is not None
        count = len(windows.samples)
        first = torch.searchsorted(windows.windows, torch.arange(count, device=logits.device))
        place = torch.arange(len(logits), device=logits.device) - first[windows.windows]
        padded = logits.new_full((count, batch.tokens.max_len, 2), -torch.inf)
        padded[windows.windows, place] = logits
        return Examples(padded, part.labels, count, windows)

    def loss(self, logits: Tensor, labels: Tensor | None, group: Any = None) -> Tensor:
        """Return the sum over w windows of the mean cross entropy of start and end, see `Head.loss`.

        Args:
            logits: (w, L, 2).
            labels: (w, 2) places of the first and the last token of the answer.
            group: not used.
        """
        assert labels is not None
        return F.cross_entropy(logits.float(), labels, reduction="sum") / 2

    # Answers

    def spans(self, examples: Examples) -> list[tuple[ReadQuestion, list[Span], float]]:
        """Return for each question its best spans, at most `CANDIDATES`, and the score of "no answer"."""
        windows = examples.windows
        assert windows is not None
        logits = examples.logits.detach().double().cpu().numpy()
        owners = windows.samples.cpu().numpy()
        found = []
        for number, read in enumerate(windows.kept):
            assert isinstance(read, ReadQuestion)
            own = logits[owners == number]
            rows = [row[: len(places)] for row, places in zip(own, read.offsets, strict=True)]
            found.append((read, best_spans(rows, read.offsets), min(float(row[0].sum()) for row in rows)))
        return found

    def candidates(
        self, examples: Examples, count: int = CANDIDATES, no_answer: bool | None = None
    ) -> list[list[dict[str, Any]]]:
        """Return for each question its best answers, the best first.

        Args:
            examples: the logits.
            count: most answers of a question.
            no_answer: allow the empty answer; None for the setting of the head.

        Returns:
            Dicts with "text", which is the part of the context from character "start" to "end", and "score", the
            softmax of the sums of two logits over the `CANDIDATES` best spans and, if allowed, the empty answer, which
            is from 0 to 0.
        """
        allowed = self.config.no_answer if no_answer is None else no_answer
        return [ranked(read.item.context, spans, empty, allowed)[:count] for read, spans, empty in self.spans(examples)]

    def answers(self, examples: Examples) -> list[dict[str, Any]]:
        """Return for each question "id", the "answer", its "start" and "end" in the context, and its "score".

        Where questions may lack an answer, also "best_answer", the best one that is not empty, and "no_answer", the
        score of the empty answer minus that of the best one: the answer is empty if it is above 0.
        """
        found = []
        for read, spans, empty in self.spans(examples):
            best, *_ = ranked(read.item.context, spans, empty, self.config.no_answer)
            line = {
                "id": read.item.name,
                "answer": best["text"],
                **{key: best[key] for key in ("start", "end", "score")},
            }
            if self.config.no_answer:
                top = _best(spans, empty)
                line |= {"best_answer": read.item.context[top.start : top.stop], "no_answer": empty - top.score}
            found.append(line)
        return found

    # Metrics

    def observe(self, examples: Examples) -> tuple[float, int, list[Observed]]:
        """Return the sum of the losses, the number of windows, and the questions with their answers."""
        observed = []
        for read, spans, empty in self.spans(examples):
            given, *_ = ranked(read.item.context, spans, empty, self.config.no_answer)
            top = _best(spans, empty)
            observed.append(Observed(read.item, top, given["score"], empty - top.score))
        return self.loss(examples.logits, examples.labels).item(), examples.number, observed

    def metrics(self, states: Sequence[tuple[float, int, list[Observed]]], held_out: HeldOut) -> Measured:
        """Compute `exact_match` and `f1` as SQuAD's scripts, with intervals by question, and the loss by window.

        The baseline is the first sentence of the context; where questions may lack an answer it is the empty answer if
        that has a higher F1.
        """
        observed = [one for _, _, own in states for one in own]
        truths = [[text for text, _ in one.item.answers] for one in observed]
        best = [one.item.context[one.best.start : one.best.stop] for one in observed]
        may_lack = self.config.no_answer
        given = ["" if may_lack and one.empty > 0 else text for one, text in zip(observed, best)]
        answered = [bool(own) for own in truths] if may_lack else None
        score = answer_scores_or_none if may_lack else answer_scores

        def scored(texts: Sequence[str]) -> list[AnswerScores]:
            return [score(text, own) for text, own in zip(texts, truths, strict=True)]

        scores = scored(given)
        statistics = answer_bootstrap(scores, answered)
        found = statistics.values()
        baselines = {
            "the first sentence": answer_bootstrap(scored([first_sentence(one.item.context) for one in observed]))
        }
        if answered is not None:
            f1 = [one.f1 for one in scored(best)]
            empty = [one.empty for one in observed]
            found["best_f1"], found["best_f1_threshold"] = best_no_answer(best, f1, empty, answered)
            baselines["no answer"] = answer_bootstrap(scored([""] * len(observed)))
        found["loss"] = sum(loss for loss, _, _ in states) / sum(number for _, number, _ in states)
        name, baseline = max(baselines.items(), key=lambda one: one[1].values()["f1"])
        given_answers = [
            GivenAnswer(
                one.item.question, one.item.context, (one.best.start, one.best.stop) if text else None,
                own, two.f1, one.probability,
            )
            for one, text, own, two in zip(observed, given, truths, scores)
        ]  # fmt: skip
        findings = WrongAnswers(given_answers)
        return Measured(found, statistics.intervals(), baseline.values(), len(observed), name, findings)

    def metric_names(self) -> Sequence[str]:
        """See `Head.metric_names`."""
        names = ["exact_match", "f1"]
        if self.config.no_answer:
            names += ["has_answer_exact_match", "has_answer_f1", "no_answer_f1", "best_f1", "best_f1_threshold"]
        return [*names, "loss", "baseline_exact_match", "baseline_f1"]

    def matches(self, other: Head, same_name: bool) -> bool:
        """See `Head.matches`; the name does not matter, and neither do the windows."""
        mine, theirs = self.config, other.config
        return (theirs.kind, theirs.norm) == (mine.kind, mine.norm) and (
            not mine.norm or theirs.activation == mine.activation
        )


def best_spans(logits: Sequence[np.ndarray], offsets: Sequence[np.ndarray], count: int = CANDIDATES) -> list[Span]:
    """Return the best spans of a question, the best first, as the reference recipe of transformers finds them.

    In each window the tokens with the `count` highest logits of a start and of an end are combined. Of spans inside the
    context with at most `LONGEST` tokens, the best of all windows are returned, each once.

    Args:
        logits: for each window (L, 2) of start and end.
        offsets: for each window (L, 2), see `ReadQuestion.offsets`.
        count: most spans.
    """
    found = []
    for rows, places in zip(logits, offsets, strict=True):
        start, end = (np.argsort(-rows[:, side], kind="stable")[:count] for side in (0, 1))
        first, last = (grid.ravel() for grid in np.meshgrid(start, end, indexing="ij"))
        fits = (places[first, 0] >= 0) & (places[last, 0] >= 0) & (first <= last) & (last - first < LONGEST)
        first, last = first[fits], last[fits]
        scores = rows[first, 0] + rows[last, 1]
        found += zip(places[first, 0].tolist(), places[last, 1].tolist(), scores.tolist())
    best: dict[tuple[int, int], Span] = {}
    for span in sorted(map(Span._make, found), key=lambda one: -one.score):
        if span.start < span.stop:  # Some tokens stand for a blank only, without a character.
            best.setdefault((span.start, span.stop), span)
        if len(best) == count:
            break
    return list(best.values())


def ranked(context: str, spans: Sequence[Span], empty: float, no_answer: bool) -> list[dict[str, Any]]:
    """Return answers of a question, the best first; see `QuestionAnswering.candidates`.

    Args:
        context: the context.
        spans: the best spans, the best first.
        empty: score of "no answer".
        no_answer: the empty answer is one of them; without any span it is the only one.
    """
    every = list(spans)
    if no_answer or not spans:
        # An answer with the same score as "no answer" comes first.
        every = sorted([*spans, Span(0, 0, empty)], key=lambda one: -one.score)
    shares = np.exp(np.array([span.score for span in every]) - every[0].score)
    return [
        {"text": context[span.start : span.stop], "start": span.start, "end": span.stop, "score": float(share)}
        for span, share in zip(every, shares / shares.sum())
    ]


def _best(spans: Sequence[Span], empty: float) -> Span:
    """Return the best span, or an empty one for a context without tokens."""
    return spans[0] if spans else Span(0, 0, empty)
