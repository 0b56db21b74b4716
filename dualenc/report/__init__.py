"""Results as a table, as JSON, and as a page of one file."""

from dualenc.report.comparison import Ranked, TwoAnswers, TwoRankings
from dualenc.report.doctor import print_examination, write_examination
from dualenc.report.documents import AnsweredQuery, Documents
from dualenc.report.findings import Answers, ChoiceScores, Classes, Labels
from dualenc.report.html import write_comparison, write_report
from dualenc.report.model import Comparison, Description, Findings, Points, Result, Section
from dualenc.report.terminal import print_comparison, print_table
from dualenc.report.verdict import verdict, verdict_on_two

__all__ = [
    "AnsweredQuery",
    "Answers",
    "ChoiceScores",
    "Classes",
    "Comparison",
    "Description",
    "Documents",
    "Findings",
    "Labels",
    "Points",
    "Ranked",
    "Result",
    "Section",
    "TwoAnswers",
    "TwoRankings",
    "print_comparison",
    "print_examination",
    "print_table",
    "verdict",
    "verdict_on_two",
    "write_comparison",
    "write_examination",
    "write_report",
]
