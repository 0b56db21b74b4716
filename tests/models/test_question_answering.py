"""The question-answering head: its loss and answers against transformers and against all spans of all windows."""

import math
import random
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import WORDS, perturb, tiny_tokenizer
from torch import Tensor
from transformers.loss.loss_utils import ForQuestionAnsweringLoss

from dualenc.data.text.dataset import BatchTexts, Needs, Use
from dualenc.data.text.questions import Question
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.data.text.windows import pack_windows
from dualenc.inference.text_model import TextPredictor
from dualenc.metrics.answers import answer_scores_or_none
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.models.heads import Examples, QuestionAnswering
from dualenc.models.heads.question_answering import CANDIDATES, LONGEST, best_spans
from dualenc.tokens import Tokens

WINDOW, SHARED = 24, 5


def tokenizer_() -> Tokenizer:
    return tiny_tokenizer(12)  # The tokenizer's own length is that of whole texts.


def model_of(**head: Any) -> TextModel:
    settings = {"max_length": WINDOW, "stride": SHARED, **head}
    text = TextConfig(tokenizer_().vocab_size, width=16, layers=2, heads=2, context_length=WINDOW, types=2)
    return perturb(TextModel(text, {"answer": HeadConfig("question_answering", **settings)}), 0.3).eval()


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def drawn(rng: random.Random, count: int) -> list[Question]:
    found = []
    for number in range(count):
        context = words(rng, rng.randrange(3, 50))
        answer = rng.choice(context.split())
        answers = ((answer, context.index(answer)),) if rng.random() < 0.7 else ()
        found.append(Question(words(rng, rng.randrange(1, 6)), context, answers, str(number)))
    return found


def windows_of(model: TextModel, items: list[Question]) -> Any:
    kind = model.kinds["answer"]
    assert isinstance(kind, QuestionAnswering)
    return kind, kind.reader.windows(items, tokenizer_())


def examples_of(model: TextModel, items: list[Question]) -> Examples:
    """Return the examples of a batch as a loader makes it, in which windows of a question need not be neighbors."""
    kind, _ = windows_of(model, items)
    use = Use("answer", label="label", needs=kind.needs)
    texts = BatchTexts(tokenizer_(), items, [use] * len(items), [])
    tokens = Tokens.pack(texts.ids, texts.types)
    part = texts.part(list(range(len(items))), use, tokens)
    assert part.windows is not None
    logits = model(tokens, "answer", part.windows.tokens)
    batch: Any = type("Batch", (), {"tokens": tokens})
    return kind.examples(logits, batch, part)


def alone(model: TextModel, window: Any) -> Tensor:
    """Return the logits (L, 2) of one window without any other."""
    return model(Tokens.pack([window.ids], [window.types]), "answer")


def test_loss_equals_transformers(seed: int) -> None:
    """Compare with the loss that transformers computes itself, for one window at a time, which it does not pad."""
    rng = random.Random(seed)
    model = model_of().double()
    items = drawn(rng, 6)
    kind, samples = windows_of(model, items)
    losses = []
    for window in (window for sample in samples for window in sample.windows):
        (start, end), logits = window.labels[0], alone(model, window)
        ends = {"start_positions": torch.tensor([start]), "end_positions": torch.tensor([end])}
        losses.append(ForQuestionAnsweringLoss(logits[None, :, 0], logits[None, :, 1], **ends))
    examples = examples_of(model, items)
    assert examples.number == len(losses) == sum(len(sample.windows) for sample in samples) > len(items)
    total = kind.loss(examples.logits, examples.labels)
    torch.testing.assert_close(total / examples.number, torch.stack(losses).mean().float(), rtol=1e-5, atol=1e-6)
    padded = examples.logits.masked_fill(examples.logits == -math.inf, 0.0)  # The control counts padding.
    assert not torch.allclose(kind.loss(padded, examples.labels), total, rtol=1e-3)
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def every_span(model: TextModel, item: Question) -> tuple[dict[tuple[int, int], float], float]:
    """Return the score of every span that the recipe allows, by its characters, and the score of "no answer"."""
    _, (sample,) = windows_of(model, [item])
    scores: dict[tuple[int, int], float] = {}
    empty = math.inf
    for window, places in zip(sample.windows, sample.kept.offsets):
        logits = alone(model, window).double()
        start, end = logits[:, 0].tolist(), logits[:, 1].tolist()
        empty = min(empty, start[0] + end[0])
        most = [sorted(values, reverse=True)[:20][-1] for values in (start, end)]
        for i, j in product(range(len(start)), repeat=2):
            if (
                i <= j < i + 30
                and places[i][0] >= 0
                and places[j][0] >= 0
                and start[i] >= most[0]
                and end[j] >= most[1]
            ):
                span = int(places[i][0]), int(places[j][1])
                scores[span] = max(scores.get(span, -math.inf), start[i] + end[j])
    return scores, empty


@pytest.mark.parametrize("no_answer", [False, True])
def test_answers_are_the_best_of_all_spans(no_answer: bool, seed: int) -> None:
    rng = random.Random(seed)
    model = model_of(no_answer=no_answer).double()
    items = drawn(rng, 25)
    predictor = TextPredictor(model, tokenizer_())
    found = predictor.answer([one.question for one in items], [one.context for one in items], n=5, batch_size=3)
    several = emptied = 0
    for item, answers in zip(items, found, strict=True):
        scores, empty = every_span(model, item)
        best = sorted(scores.items(), key=lambda one: -one[1])[:20]
        if no_answer:
            best = sorted([*best, ((0, 0), empty)], key=lambda one: -one[1])
        whole = sum(math.exp(score - best[0][1]) for _, score in best)
        expected = [(span, math.exp(score - best[0][1]) / whole) for span, score in best[:5]]
        assert [(one["start"], one["end"]) for one in answers] == [span for span, _ in expected]
        assert [one["score"] for one in answers] == pytest.approx([share for _, share in expected], rel=1e-4)
        assert [one["text"] for one in answers] == [item.context[start:end] for (start, end), _ in expected]
        several += len(windows_of(model, [item])[1][0].windows) > 1
        emptied += answers[0]["text"] == ""
    assert several > 3
    assert no_answer or not emptied
    single = predictor.answer(items[0].question, items[0].context, 5)
    assert [one["text"] for one in single] == [one["text"] for one in found[0]]
    turned = predictor.answer(items[0].question, items[0].context, 100, no_answer=not no_answer)
    assert ("" in [one["text"] for one in turned]) is not no_answer


def test_answers_of_a_batch_and_of_the_predictor_agree(seed: int) -> None:
    rng = random.Random(seed)
    items = drawn(rng, 9)
    model = model_of(no_answer=True)
    kind = model.kinds["answer"]
    lines = kind.answers(examples_of(model, items))
    found = TextPredictor(model, tokenizer_()).answer([one.question for one in items], [one.context for one in items])
    for item, line, (answer,) in zip(items, lines, found, strict=True):
        assert (line["id"], line["answer"], line["start"], line["end"]) == (
            item.name, answer["text"], answer["start"], answer["end"],
        )  # fmt: skip
        assert line["score"] == pytest.approx(answer["score"], rel=1e-4)
        scores, empty = every_span(model, item)
        (start, end), best = max(scores.items(), key=lambda one: one[1])
        assert line["no_answer"] == pytest.approx(empty - best, abs=1e-4)
        assert line["best_answer"] == item.context[start:end]
        assert (line["answer"] == "") == (line["no_answer"] > 0)


def test_an_answer_has_at_most_30_tokens_of_one_window(seed: int) -> None:
    """Give one start and one end the highest logits: they are an answer if, and only if, they are near enough."""
    rng = np.random.default_rng(seed)
    places = np.array([(-1, -1), *((3 * i, 3 * i + 2) for i in range(80)), (-1, -1)])
    for distance in (0, 1, LONGEST - 1, LONGEST, LONGEST + 5, -1):
        logits = rng.standard_normal((2, 82, 2))
        start = int(rng.integers(6, 40))
        logits[0, start, 0] = logits[0, start + distance, 1] = 50.0
        logits[1, 0] = 90.0
        spans = best_spans(list(logits), [places, places])
        wanted = (3 * (start - 1), 3 * (start + distance - 1) + 2)
        assert ((spans[0].start, spans[0].stop) == wanted) == (0 <= distance < LONGEST)
        assert len(spans) == CANDIDATES == len({(one.start, one.stop) for one in spans})
        assert all(0 < one.stop - one.start <= 3 * LONGEST for one in spans)


def test_metrics_are_those_of_the_answers(seed: int) -> None:
    rng = random.Random(seed)
    model = model_of(no_answer=True)
    kind = model.kinds["answer"]
    items = drawn(rng, 40)
    parts = [items[:11], items[11:12], items[12:]]
    states = [kind.observe(examples_of(model, part)) for part in parts]
    held_out: Any = None  # Nothing of the training data is needed.
    measured = kind.metrics(states, held_out)
    lines = [line for part in parts for line in kind.answers(examples_of(model, part))]
    truths = [[text for text, _ in one.answers] for one in items]
    right = [answer_scores_or_none(line["answer"], own).exact_match for line, own in zip(lines, truths)]
    assert measured.number == len(items)
    assert measured.metrics["exact_match"] == pytest.approx(np.mean(right))
    assert measured.metrics["no_answer_f1"] == pytest.approx(np.mean([r for r, own in zip(right, truths) if not own]))
    assert measured.metrics["best_f1"] >= measured.metrics["f1"] - 1e-12
    baselines = {
        "no answer": [answer_scores_or_none("", own).f1 for own in truths],
        "the first sentence": [answer_scores_or_none(one.context, own).f1 for one, own in zip(items, truths)],
    }  # Each context is one sentence.
    assert measured.chance["f1"] == pytest.approx(max(map(np.mean, baselines.values())))
    assert measured.chance["f1"] == pytest.approx(np.mean(baselines[measured.baseline]))
    names = [*measured.metrics, *(f"baseline_{name}" for name in measured.chance)]
    assert set(names) == set(kind.metric_names() or ())
    whole = examples_of(model, items)
    assert measured.metrics["loss"] == pytest.approx(
        kind.loss(whole.logits, whole.labels).item() / whole.number, rel=1e-4
    )
    page = measured.findings.html() if measured.findings else ""
    assert "Most confident mistakes" in page


def test_without_answers_only_the_answer_counts(seed: int) -> None:
    rng = random.Random(seed)
    model = model_of()
    kind = model.kinds["answer"]
    items = [one for one in drawn(rng, 30) if one.answers]
    items = [*items, Question("who <b>", "A <i>cat</i> sits. It sleeps.", (("cat", 5), ("A <i>cat</i> sits.", 0)), "x")]
    held_out: Any = None
    measured = kind.metrics([kind.observe(examples_of(model, items))], held_out)
    lines = kind.answers(examples_of(model, items))
    assert set(lines[0]) == {"id", "answer", "start", "end", "score"}
    assert all(line["answer"] == one.context[line["start"] : line["end"]] != "" for line, one in zip(lines, items))
    assert measured.baseline == "the first sentence"
    assert measured.chance["exact_match"] >= 1 / len(items)  # "A <i>cat</i> sits." is a first sentence.
    assert set(kind.metric_names() or ()) == {*measured.metrics, *(f"baseline_{name}" for name in measured.chance)}
    page = str(measured.findings.html()) if measured.findings else ""
    assert "<i>" not in page


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"max_length": 25}, "max_length 25 .* above the encoder's context_length 24"),
        ({"stride": WINDOW}, "stride 24 must lie in 0 to max_length 24"),
        ({"stride": -1}, "stride -1 must lie"),
        ({"labels": ("a",)}, "does not have labels"),
        ({"scheme": "bioes"}, "scheme has no meaning for a head of kind question_answering: leave it out"),
        ({"problem": "regression"}, "problem has no meaning for a head of kind question_answering: leave it out"),
        ({"stride": None}, "stride of a head must not be null"),
        ({"labels": None}, "labels of a head must not be null"),
    ],
)
def test_settings_that_do_not_fit(head: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**head)


def test_wrong_arguments(seed: int) -> None:
    predictor = TextPredictor(model_of(), tokenizer_(), "it")
    long = "cat " * 60
    for arguments, message in [
        (("who", ["a cat"]), "must both be strings, or both lists"),
        ((["who"], ["a cat", "a dog"]), "1 questions and 2 contexts"),
        (("", "a cat"), "the question is empty"),
        ((["who", "who"], ["a cat", " "]), "context 1 is empty"),
        ((["who", 3], ["a cat", "a dog"]), "questions must be strings, but number 1"),
        ((3, 4), "questions are 3"),
        (("cat " * 17, long), "leaves at most stride 5 of max_length 24 tokens .*takes 20 with the special tokens"),
        (("who", "a cat", 0), "n is 0"),
        (("who", "a cat", True), "n is True"),
    ]:
        with pytest.raises(ValueError, match=message):
            predictor.answer(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size is 0"):
        predictor.answer("who", "a cat", batch_size=0)
    with pytest.raises(ValueError, match="it has no head 'x' for question-answering: name one of answer"):
        predictor.answer("who", "a cat", head="x")
    assert predictor.answer([], []) == []
    assert predictor.answer("cat " * 17, "dog")[0]["text"] in ("dog", "")  # It fits, so that nothing is cut.


def test_padding_of_packed_windows_does_not_matter(seed: int) -> None:
    """Check that logits of a window do not depend on the others of a batch, which are longer."""
    rng = random.Random(seed)
    model = model_of()
    items = drawn(rng, 5)
    _, samples = windows_of(model, items)
    tokens, windows = pack_windows(samples, segments=True)
    logits = model(tokens, "answer", windows.tokens)
    own = torch.cat([alone(model, window) for sample in samples for window in sample.windows])
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-5)
    assert not math.isclose(F.mse_loss(logits, own.roll(1, 0)).item(), 0, abs_tol=1e-4)
    assert Needs().windows is None
