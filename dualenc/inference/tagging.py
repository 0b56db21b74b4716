"""Named entities of texts that are not lines of files."""

from collections.abc import Sequence
from typing import TypedDict

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.data.text.words import split_text
from dualenc.inference.judging import judge
from dualenc.models.heads import TextModel


class TaggedEntity(TypedDict):
    """An entity of a text."""

    label: str  # its type
    start: int  # its first character
    end: int  # the character after its last one
    text: str
    score: float  # mean of the probabilities of the tags of its words


def tag_texts(
    model: TextModel, tokenizer: Tokenizer, head: str, texts: Sequence[str], batch_size: int
) -> list[list[TaggedEntity]]:
    """Return the entities of each text, in order.

    A text is split into words as BERT does, at blanks and around punctuation marks, and each word is tokenized by
    itself, as the words of files are.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        head: name of a head of kind "token_classification".
        texts: the texts.
        batch_size: see `judge`.
    """
    answers = judge(model, tokenizer, head, [split_text(text) for text in texts], batch_size)
    return [answer["entities"] for answer in answers]
