"""Scores of answers against torchmetrics and against the rules of SQuAD's scripts, worked out again."""

import random
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from torchmetrics.functional.text import squad

from dualenc.metrics.answers import (
    answer_bootstrap,
    answer_scores,
    answer_scores_or_none,
    best_no_answer,
    first_sentence,
    normalized_answer,
)

PARTS = ["the", "The", "a", "an", "An", "cat", "Cat", "cat's", "cats", "U.S.", "1,000", "--", "!", "“the”", "é", ""]
PARTS += ["a.n", "the-cat", "\u00a0", "  ", "\n", "_a_", "\uff21", "½", "no", "answer", "B-52", "…", "(the)", "$5"]


def phrase(rng: random.Random) -> str:
    return rng.choice(["", " "]).join(rng.choices(PARTS, k=rng.randrange(0, 5)))


def words_of(text: str) -> list[str]:
    """Return the words of an answer letter by letter: no punctuation, then no articles between word boundaries."""
    letters = [letter for letter in text.lower() if letter not in set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")]
    pieces = re.split(r"(\w+)", "".join(letters))
    return "".join(" " if piece in ("a", "an", "the") else piece for piece in pieces).split()


def harmonic(one: Sequence[str], other: Sequence[str]) -> float:
    left = list(other)
    shared = 0
    for word in one:
        if word in left:
            left.remove(word)
            shared += 1
    return 2 * shared / (len(one) + len(other)) if shared else 0.0


def test_scores_equal_torchmetrics(seed: int) -> None:
    """Compare with torchmetrics, which differs from the script of version 1.1 where both texts are nothing."""
    rng = random.Random(seed)
    right = near = 0
    for number in range(2000):
        answer, truths = phrase(rng), [phrase(rng) for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.2:
            truths[-1] = answer.upper()
        given = {"id": str(number), "answers": {"text": truths, "answer_start": [0] * len(truths)}}
        expected = squad({"prediction_text": answer, "id": str(number)}, given)
        found = answer_scores(answer, truths)
        assert found.exact_match == float(expected["exact_match"]) / 100
        f1 = float(expected["f1"]) / 100 if words_of(answer) else 0.0
        assert found.f1 == pytest.approx(f1, abs=1e-6)
        assert normalized_answer(answer) == " ".join(words_of(answer))
        right += found.exact_match
        near += 0 < found.f1 < 1
    assert min(right, near) > 20


def test_scores_with_questions_without_an_answer(seed: int) -> None:
    """Compare with the rules of version 2: a truth that is nothing is left out, and nothing equals nothing."""
    rng = random.Random(seed)
    differ = 0
    for _ in range(3000):
        answer, truths = phrase(rng), [phrase(rng) for _ in range(rng.randrange(0, 3))]
        said = words_of(answer)
        meant = [words for words in map(words_of, truths) if words] or [[]]
        f1 = max(float(said == words) if not said or not words else harmonic(said, words) for words in meant)
        found = answer_scores_or_none(answer, truths)
        assert found.exact_match == float(said in meant)
        assert found.f1 == pytest.approx(f1, abs=1e-12)
        differ += bool(truths) and found != answer_scores(answer, truths)
    assert differ > 20


def test_scores_worked_by_hand() -> None:
    assert answer_scores("the cat", ["cat", "a dog"]) == (1, 1)
    assert answer_scores("cat and dog", ["the cat"]) == (0, pytest.approx(0.5))
    assert answer_scores("cat cat", ["cat"]) == (0, pytest.approx(2 / 3))
    # Version 1.1 gives two answers of articles alone no F1, and version 2 a whole one.
    assert answer_scores("the", ["a"]) == (1, 0)
    assert answer_scores_or_none("the", []) == (1, 1)
    assert answer_scores_or_none("", ["the", "cat"]) == (0, 0)
    assert answer_scores_or_none("cat", []) == (0, 0)


def script(threshold: float, given: Sequence[str], truths: Sequence[Sequence[str]], empty: Sequence[float]) -> float:
    """Return the mean F1 when answers with a score of "no answer" above a threshold are empty."""
    final = ["" if score > threshold else text for text, score in zip(given, empty)]
    return float(np.mean([answer_scores_or_none(text, own).f1 for text, own in zip(final, truths)]))


@pytest.mark.parametrize("case", ["drawn", "none has an answer", "all have an answer", "all answers are wrong"])
def test_best_threshold_is_the_best_of_all(case: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        count = rng.randrange(1, 12)
        given = ["cat" if rng.random() < 0.5 else "dog" for _ in range(count)]
        share = {"none has an answer": 0.0, "all have an answer": 1.0}.get(case, 0.5)
        truths = [
            ["a cat" if case != "all answers are wrong" else "bird"] if rng.random() < share else [] for _ in given
        ]
        empty = [rng.gauss(0, 3) for _ in given]
        f1 = [answer_scores_or_none(text, own).f1 for text, own in zip(given, truths)]
        best, threshold = best_no_answer(given, f1, empty, [bool(own) for own in truths])
        every = [script(one, given, truths, empty) for one in [min(empty) - 1, *empty]]
        assert best == pytest.approx(max(every), abs=1e-12)
        assert script(threshold, given, truths, empty) == pytest.approx(best, abs=1e-12)


def test_bootstrap_of_both_sorts(seed: int) -> None:
    rng = random.Random(seed)
    truths = [["cat"] if i % 3 else [] for i in range(30)]
    scores = [answer_scores_or_none(rng.choice(["cat", "", "cat dog"]), own) for own in truths]
    found = answer_bootstrap(scores, [bool(own) for own in truths])
    values, bounds = found.values(), found.intervals(replicates=200)

    def of(field: int, keep: Callable[[list[str]], bool]) -> float:
        return float(np.mean([one[field] for one, own in zip(scores, truths) if keep(own)]))

    assert values == {
        "exact_match": pytest.approx(of(0, lambda own: True)),
        "f1": pytest.approx(of(1, lambda own: True)),
        "has_answer_exact_match": pytest.approx(of(0, bool)),
        "has_answer_f1": pytest.approx(of(1, bool)),
        "no_answer_f1": pytest.approx(of(1, lambda own: not own)),
    }
    assert all(low <= values[name] <= high for name, (low, high) in bounds.items())
    assert bounds["f1"][0] < bounds["f1"][1]
    assert set(answer_bootstrap(scores, [True] * 30).values()) == set(values) - {"no_answer_f1"}
    assert set(answer_bootstrap(scores).values()) == {"exact_match", "f1"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One. Two.", "One."),
        (" Is it 3.5? No.", "Is it 3.5?"),
        ("No end", "No end"),
        ('He said "No!" Then', 'He said "No!"'),
        ("A\nb. C", "A\nb."),
        ("", ""),
    ],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert first_sentence(text) == sentence
