"""The findings of named entities: which mistake is which, and their words in context."""

from dualenc.report.entities import TaggedTexts
from dualenc.report.findings import AROUND
from dualenc.utils.tags import Entity

TEXT = "<i> Kim Lee of Acme & Sons in Rome, Italy"
SPANS = [(0, 3), (4, 7), (8, 11), (12, 14), (15, 19), (20, 21), (22, 26), (27, 29), (30, 34), (34, 35), (36, 41)]
TRUE = [Entity("PER", 1, 3), Entity("ORG", 4, 7), Entity("LOC", 8, 9), Entity("LOC", 10, 11)]
PREDICTED = [
    Entity("ORG", 0, 1), Entity("PER", 1, 2), Entity("LOC", 4, 5), Entity("ORG", 6, 7), Entity("LOC", 10, 11),
]  # fmt: skip
TYPES = {"PER": {"f1": 0.5, "precision": 1.0, "recall": 0.25, "true": 1, "predicted": 1}}


def test_mistakes_in_context() -> None:
    findings = TaggedTexts([(TEXT, SPANS)], [TRUE], [PREDICTED], TYPES)
    assert findings.mistakes() == {
        ("PER", "PER"): [(0, TRUE[0], PREDICTED[1])],
        ("ORG", "LOC"): [(0, TRUE[1], PREDICTED[2])],
        ("LOC", ""): [(0, TRUE[2], None)],
        ("", "ORG"): [(0, None, PREDICTED[0]), (0, None, PREDICTED[3])],
    }
    page = findings.html()
    assert "<q>&lt;i&gt; <b>Kim Lee</b> of Acme &amp; Sons in Rome, Italy</q>" in page
    assert "<q><b>&lt;i&gt;</b> Kim Lee of" in page
    for words in (
        "<b>PER</b> found with other words", "<b>ORG</b> predicted as <b>LOC</b>", "<b>LOC</b> not found",
        "<b>ORG</b> found where there is none<br><small>2 entities", "predicted: Acme</figcaption>",
    ):  # fmt: skip
        assert words in page
    assert "<th>PER</th><td>0.500</td>" in page


def test_long_texts_are_cut() -> None:
    words = "x" * 500 + " Rome " + "y" * 500
    page = TaggedTexts([(words, [(501, 505)])], [[Entity("LOC", 0, 1)]], [[]], {}).html()
    assert f"<q>…{'x' * (AROUND - 1)} <b>Rome</b> {'y' * (AROUND - 1)}…</q>" in page
    assert TaggedTexts([(words, [(501, 505)])], [[]], [[]], {}).html().strip() == ""
