"""The evidence behind document retrieval: queries with their first documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from dualenc.report.render import render


class AnsweredQuery(NamedTuple):
    """One query with its first documents."""

    query: str
    rank: int | None  # of the first relevant document, from 1; None if it was not searched for that far
    best: Sequence[tuple[str, float, int]]  # text, score and gain of the first documents
    missed: str  # a relevant document, if no relevant one is among these
    relevant: int  # number of relevant documents


@dataclass(frozen=True)
class Documents:
    """Some queries with their first documents."""

    answers: Sequence[AnsweredQuery]

    def html(self) -> Markup:
        """See `Findings`."""
        return render("documents.jinja", answers=self.answers)
