"""Answers to questions, found in texts that a caller gives."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from dualenc.data.text.questions import Question
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.inference.judging import judge
from dualenc.models.heads import QuestionAnswering, TextModel
from dualenc.utils.arguments import shown_value, strings
from dualenc.utils.decoding import text_problem


def find_answers(
    model: TextModel,
    tokenizer: Tokenizer,
    head: str,
    question: str | Sequence[str],
    context: str | Sequence[str],
    n: int,
    no_answer: bool | None,
    batch_size: int,
) -> list[Any]:
    """Return the best answers to questions; see `TextPredictor.answer`, which has the same arguments.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        head: name of a head of kind "question_answering".
        question, context, n, no_answer, batch_size: see `TextPredictor.answer`.

    Raises:
        ValueError: If an argument is not valid.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n is {shown_value(n)}: it must be a number of at least 1")
    single = isinstance(question, str)
    if single != isinstance(context, str):
        raise ValueError("question and context must both be strings, or both lists of strings: one context a question")
    questions, contexts = strings(question, "questions", one=True), strings(context, "contexts", one=True)
    if len(questions) != len(contexts):
        raise ValueError(f"there are {len(questions)} questions and {len(contexts)} contexts: give one context each")
    kind = model.kinds[head]
    assert isinstance(kind, QuestionAnswering)
    reader = kind.reader
    items = [Question(one.lstrip(), text) for one, text in zip(questions, contexts)]
    for i, item in enumerate(items):
        for name, text in (("question", item.question), ("context", item.context)):
            if problem := text_problem(text):
                raise ValueError(f"{name} {i} is {problem}" if not single else f"the {name} is {problem}")
        if found := reader.problem(item, tokenizer):
            raise ValueError(f"{found[0]} ({found[1]})")
    every = judge(model, tokenizer, head, items, batch_size, partial(kind.candidates, count=n, no_answer=no_answer))
    return every[0] if single else every
