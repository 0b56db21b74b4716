"""Questions about texts: lines with question, context and answers become windows of which only the context is cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Encoding

from dualenc.data.text.dataset import field, text_field
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.data.text.windows import Window, Windowed, WindowReader
from dualenc.utils.decoding import is_blank
from dualenc.utils.errors import BadSample, DataError

if TYPE_CHECKING:
    from dualenc.data.text.files import Line, TextIndex


@dataclass(frozen=True)
class Question:
    """A question about a text, in which its answer is found.

    Attributes:
        question: the question.
        context: the text.
        answers: texts of the answers and the characters at which they start; the first is learned. None of them for a
            question that the context does not answer.
        name: id of the question; None without one.
    """

    question: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()
    name: str | None = None


@dataclass(frozen=True, eq=False)
class ReadQuestion:
    """A question together with the places of its windows' tokens in the context.

    Attributes:
        item: the question.
        offsets: for each window (L, 2) int32, first character and end of each token in the context; -1 for other
            tokens.
    """

    item: Question
    offsets: tuple[np.ndarray, ...]


class QuestionReader(WindowReader):
    """Reader of SQuAD's JSON, and of JSON Lines with the same fields.

    Args:
        max_length: longest window in tokens.
        stride: number of the context's tokens that two neighboring windows share.
        no_answer: questions may lack an answer.
    """

    endings = (".json", ".jsonl")

    def __init__(self, max_length: int, stride: int, no_answer: bool) -> None:
        self.max_length, self.stride, self.no_answer = max_length, stride, no_answer

    @property
    def facts(self) -> list[Any]:
        """See `WindowReader.facts`."""
        return [self.max_length, self.stride, self.no_answer]

    def check(self, index: "TextIndex", head: str) -> None:
        """Refuse files of another kind, and questions without an answer where the head expects one.

        Raises:
            DataError: See `WindowReader.check`.
        """
        for part in index.parts:
            if part.kind not in self.endings:
                raise DataError(f"{part}: head {head!r} reads questions from {' or '.join(self.endings)} only")
        for sample in index if not self.no_answer else ():
            try:
                item = self.read(sample, True)
            except BadSample:
                continue
            if not item.answers:
                raise DataError(
                    f"{sample}: question {_named(item)} does not have an answer: set model.heads.{head}.no_answer to "
                    "true, as for SQuAD 2"
                )

    def read(self, sample: "Line", labeled: bool) -> Question:
        """Return a question; see `WindowReader.read`."""
        fields = sample.read()
        # Blanks before a question would be tokens of some tokenizers, and take room from the context.
        question, context = text_field(sample, fields, "question").lstrip(), text_field(sample, fields, "context")
        name = fields.get("id")
        item = Question(question, context, (), None if name is None else str(name))
        if not labeled or fields.get("is_impossible") is True:
            return item
        answers = _answers(field(sample, fields, "answers"))
        if answers is None:
            cause = "its answers are not a list of objects with text and answer_start"
            raise BadSample(sample, cause, f"question {_named(item)}")
        for text, start in answers:
            if is_blank(text):
                raise BadSample(sample, "an answer is empty", f"question {_named(item)}")
            if start < 0 or not context.startswith(text, start):
                where = (
                    f"{text[:80]!r} at {start}, where the context has {context[max(0, start) :][: len(text)][:80]!r}"
                )
                raise BadSample(sample, "an answer is not in its context", f"question {_named(item)}: {where}")
        return Question(question, context, answers, item.name)

    def problem(self, item: Question, tokenizer: Tokenizer) -> tuple[str, str] | None:
        """Return why the question leaves too little room for the context; see `WindowReader.problem`."""
        own = tokenizer.count(item.question) + tokenizer.backend.num_special_tokens_to_add(True)
        if own + self.stride < self.max_length:
            return None
        (whole,) = tokenizer.encode_whole_pairs([(item.question, item.context)])
        if len(whole.ids) <= self.max_length:
            return None
        return (
            f"its question leaves at most stride {self.stride} of max_length {self.max_length} tokens to the context",
            f"question {_named(item)} takes {own} with the special tokens; lower stride, or raise max_length",
        )

    def texts(self, item: Question) -> list[str]:
        """Return question and context."""
        return [item.question, item.context]

    def windows(self, items: Sequence[Question], tokenizer: Tokenizer) -> list[Windowed]:
        """Return the windows of each question; see `WindowReader.windows`.

        The label of a window is the start and the end token of the first answer, or twice 0, the place of the opening
        token, where the window does not hold the whole answer.

        Raises:
            DataError: If the tokenizer does not have an opening token, or a question leaves no room.
        """
        encodings = tokenizer.encode_whole_pairs([(item.question, item.context) for item in items])
        return [self._windowed(item, encoding) for item, encoding in zip(items, encodings, strict=True)]

    def _windowed(self, item: Question, encoding: Encoding) -> Windowed:
        sequences = encoding.sequence_ids
        if sequences[0] is not None:
            raise DataError(
                "the tokenizer puts no token such as [CLS] before a question, which stands for 'no answer': give its "
                "tokenizer.json a post-processor"
            )
        inside = [i for i, number in enumerate(sequences) if number == 1]
        first, stop = (inside[0], inside[-1] + 1) if inside else (len(sequences), len(sequences))
        room = self.max_length - (len(sequences) - len(inside))
        cuts = [(0, min(room, len(inside)))]
        while cuts[-1][1] < len(inside):
            if room <= self.stride:  # Callers check `problem` before.
                raise DataError(f"question {_named(item)} leaves no room for the context in {self.max_length} tokens")
            start = cuts[-1][0] + room - self.stride
            cuts.append((start, min(start + room, len(inside))))
        windows, offsets = [], []
        for start, end in cuts:
            kept = [*range(first), *range(first + start, first + end), *range(stop, len(sequences))]
            places = np.full((len(kept), 2), -1, np.int32)
            places[first : first + end - start] = np.reshape(encoding.offsets[first + start : first + end], (-1, 2))
            ids, types = ([row[i] for i in kept] for row in (encoding.ids, encoding.type_ids))
            label = _label(item.answers[0], places) if item.answers else (0, 0)
            windows.append(Window(ids, types, list(range(len(kept))), [label]))
            offsets.append(places)
        return Windowed(windows, ReadQuestion(item, tuple(offsets)))


def _label(answer: tuple[str, int], places: np.ndarray) -> tuple[int, int]:
    """Return the first and the last token of an answer in a window; twice 0 if the window does not hold all of it.

    The first token is the last one that begins at or before the answer, and the last token the first one that ends at
    or after it, as in the reference recipe of transformers (examples/pytorch/question-answering).

    Args:
        answer: its text and the character at which it starts.
        places: (L, 2), see `ReadQuestion.offsets`.
    """
    start, end = answer[1], answer[1] + len(answer[0])
    inside = np.flatnonzero(places[:, 0] >= 0)
    if not len(inside) or places[inside[0], 0] > start or places[inside[-1], 1] < end:
        return 0, 0
    starts, ends = places[inside, 0], places[inside, 1]
    return int(inside[np.flatnonzero(starts <= start)[-1]]), int(inside[np.flatnonzero(ends >= end)[0]])


def _answers(value: Any) -> tuple[tuple[str, int], ...] | None:
    """Return texts and starts of answers: a list of objects, or an object of lists; None if it is neither."""
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
            return None
        pairs = list(zip(texts, starts))
    elif isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        pairs = [(one.get("text"), one.get("answer_start")) for one in value]
    else:
        return None
    fits = all(isinstance(text, str) and type(start) is int for text, start in pairs)
    return tuple(pairs) if fits else None


def _named(item: Question) -> str:
    """Return the id of a question for messages, or its first words."""
    return repr(item.name if item.name is not None else item.question[:60])
