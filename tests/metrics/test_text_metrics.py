"""Metrics of text models, compared with scikit-learn, SciPy and their definitions."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    matthews_corrcoef,
    mean_squared_error,
    precision_score,
    recall_score,
    roc_auc_score,
)

import dualenc.metrics.text as text_module
from dualenc.metrics.text import (
    label_bootstrap,
    label_metrics,
    majority_baseline,
    mean_baseline,
    perplexity,
    pseudo_perplexity,
    replaced_metrics,
    unigram_perplexity,
)
from dualenc.models import TextConfig
from dualenc.models.heads import HeadConfig, TextModel

# Labels


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("count", [5, 200])
def test_single_label_metrics_are_those_of_scikit_learn(classes, count):
    """With 5 texts, some of 7 classes are missing among labels, predictions or both."""
    labels = torch.cat([torch.arange(2), torch.randint(classes, (count - 2,))])
    logits = torch.randn(count, classes)
    logits[torch.arange(count), labels] += 1
    answers = logits.argmax(1)
    found = label_metrics(logits, labels, [f"class {c}" for c in range(classes)])
    assert found == pytest.approx(
        {
            "accuracy": accuracy_score(labels, answers),
            "f1": f1_score(labels, answers, average="binary" if classes == 2 else "macro", zero_division=0),
            "matthews": matthews_corrcoef(labels, answers),
        },
        abs=1e-6,
    )


def test_multi_label_metrics_are_those_of_scikit_learn():
    labels = (torch.rand(60, 5) < torch.tensor([0.5, 0.3, 0.1, 0.9, 0.0])).long()  # No text has the last label,
    logits = torch.randn(60, 5) + labels
    logits[:, 4] = -1  # and it is never predicted.
    given = (logits > 0).numpy()
    found = label_metrics(logits, labels, list("abcde"), "multi_label")
    assert found == pytest.approx(
        {
            "accuracy": accuracy_score(labels, given),
            "f1_micro": f1_score(labels, given, average="micro"),
            "f1_macro": f1_score(labels, given, average="macro", zero_division=0),
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("column", [False, True])
def test_regression_is_that_of_scipy(column):
    numbers = torch.randint(0, 6, (150,)) * 1.0  # This gives many ties.
    guesses = (numbers + torch.randn(150)).round(decimals=1)
    found = label_metrics(guesses[:, None] if column else guesses, numbers, ["score"], "regression")
    expected = {
        "pearson": pearsonr(guesses.double(), numbers.double()).statistic,
        "spearman": spearmanr(guesses, numbers).statistic,
        "mse": mean_squared_error(numbers.double(), guesses.double()),
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_undefined_metrics_have_a_value_and_give_no_warning():
    """Warnings are errors in this suite."""
    one = torch.zeros(6, dtype=torch.long)
    for labels, answers in (
        (one, one),
        (one, 1 - one),
        (one, torch.tensor([0, 1] * 3)),
        (torch.tensor([0, 1] * 3), one),
    ):
        found = label_metrics(torch.nn.functional.one_hot(answers, 2).float(), labels, ["a", "b"])
        assert found["matthews"] == 0
        assert found["f1"] == pytest.approx(f1_score(labels, answers, zero_division=0))
    for guesses, numbers in ((torch.ones(5), torch.randn(5)), (torch.randn(5), torch.ones(5))):
        found = label_metrics(guesses, numbers, ["score"], "regression")
        assert math.isnan(found["pearson"])
        assert math.isnan(found["spearman"])
        assert found["mse"] > 0
    nothing = label_metrics(-torch.ones(4, 3), torch.zeros(4, 3), list("abc"), "multi_label")
    assert nothing == {"accuracy": 1, "f1_micro": 0, "f1_macro": 0}


@pytest.mark.parametrize(
    ("logits", "labels", "problem", "message"),
    [
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "single_label", "between 0 and 1"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), "single_label", "between 0 and 1"),
        (torch.zeros(3, 2), torch.zeros(4), "single_label", "problem single_label"),
        (torch.zeros(3, 3), torch.zeros(3), "single_label", "with 2 names"),
        (torch.zeros(0, 2), torch.zeros(0), "single_label", "no texts"),
        (torch.zeros(3, 2), torch.zeros(3), "multi_label", "problem multi_label"),
        (torch.zeros(3, 2), torch.zeros(3), "regression", "problem regression"),
        (torch.full((3, 2), torch.nan), torch.zeros(3), "single_label", "not finite"),
    ],
)
def test_labels_that_do_not_fit_are_refused(logits, labels, problem, message):
    for function in (label_metrics, label_bootstrap):
        with pytest.raises(ValueError, match=message):
            function(logits, labels, ["a", "b"], problem)


@pytest.mark.parametrize(
    ("problem", "name"), [("single_label", "accuracy"), ("multi_label", "accuracy"), ("regression", "mse")]
)
def test_the_bootstrap_has_the_metrics_and_draws_texts(problem, name):
    labels = {
        "single_label": torch.randint(3, (40,)),
        "multi_label": torch.randint(2, (40, 3)),
        "regression": torch.randn(40),
    }
    logits, names = torch.randn(40, 1 if problem == "regression" else 3), ["a", "b", "c"]
    measures = label_bootstrap(logits, labels[problem], names, problem)
    assert measures.values() == pytest.approx({name: label_metrics(logits, labels[problem], names, problem)[name]})
    weights = torch.randint(0, 3, (40,)).index_fill_(0, torch.tensor([2]), 1)
    again = [x.repeat_interleave(weights, 0) for x in (logits, labels[problem])]
    expected = label_metrics(*again, names, problem)[name]
    assert measures.statistics[name](weights[None].double()).item() == pytest.approx(expected)
    low, high = measures.intervals(replicates=100)[name]
    assert low <= measures.values()[name] <= high


def test_baselines_are_those_of_scikit_learn():
    train, labels = torch.randint(4, (50,)), torch.randint(4, (30,))
    dummy = DummyClassifier(strategy="most_frequent").fit(train[:, None], train)
    assert majority_baseline(train, labels) == pytest.approx(dummy.score(labels[:, None], labels))
    rows, asked = torch.randint(2, (50, 2)), torch.randint(2, (30, 2))
    best = Counter(map(tuple, rows.tolist())).most_common()
    top = min(row for row, n in best if n == best[0][1])
    expected = np.mean([tuple(row) == top for row in asked.tolist()])
    assert majority_baseline(rows, asked) == pytest.approx(expected)
    numbers, others = torch.randn(40), torch.randn(20)
    guess = DummyRegressor().fit(numbers[:, None], numbers).predict(others[:, None])
    assert mean_baseline(numbers, others) == pytest.approx(mean_squared_error(others, guess), rel=1e-5)


# Masked tokens


def test_perplexity_is_over_tokens():
    tokens = [torch.rand(n) * 5 for n in (3, 1, 8)]
    losses = torch.tensor([*(x.mean() for x in tokens), torch.nan])
    expected = torch.cat(tokens).double().mean().exp().item()
    assert perplexity(losses, torch.tensor([3, 1, 8, 0])) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="no tokens"):
        perplexity(torch.zeros(1), torch.zeros(1))


V, CLS, SEP, MASK = 12, 0, 1, 2
SPECIAL = (CLS, SEP, MASK)


def drawn_texts(rng, count):
    """Return texts of one to six ordinary tokens between the special ones, and one of special tokens alone."""
    words = (rng.zipf(1.5, rng.integers(1, 7)) % (V - 3) + 3 for _ in range(count))
    return [[CLS, SEP], *([CLS, *ids.tolist(), SEP] for ids in words)]


@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
def test_pseudo_perplexity_is_that_of_one_token_at_a_time(seed, batch_tokens):
    config = TextConfig(V, width=16, layers=2, heads=2, context_length=12)
    model = TextModel(config, {"mlm": HeadConfig("mlm")}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    texts = drawn_texts(np.random.default_rng(seed), 9)
    logs = []
    for text in texts:
        for place, target in enumerate(text):
            if target not in SPECIAL:
                ids = torch.tensor([text])
                ids[0, place] = MASK
                with torch.no_grad():
                    hidden = model.encoder.forward_padded(ids, torch.ones_like(ids))[0, place]
                    logits = model.heads["mlm"](hidden[None], model.encoder.embeddings.token_embeddings.weight)[0]
                logs.append(logits.log_softmax(0)[target].item())
    most = []

    def guess(tokens, places):
        most.append(len(tokens.ids))
        return model(tokens, "mlm", places)

    found = pseudo_perplexity(guess, texts, MASK, SPECIAL, batch_tokens=batch_tokens)
    assert found == pytest.approx(math.exp(-np.mean(logs)), rel=1e-4)
    assert max(most) <= max(batch_tokens, max(map(len, texts)))
    assert len(most) == {1: len(logs), 100_000: 1}.get(batch_tokens, len(most))


def test_pseudo_perplexity_of_equal_logits_is_the_vocabulary_size():
    texts = drawn_texts(np.random.default_rng(1), 5)
    same = pseudo_perplexity(lambda tokens, places: torch.zeros(len(places), V), texts, MASK, SPECIAL)
    assert same == pytest.approx(V)
    with pytest.raises(ValueError, match="no tokens to score"):
        pseudo_perplexity(lambda tokens, places: torch.zeros(len(places), V), [[CLS, SEP]], MASK, SPECIAL)


def test_unigram_perplexity_is_that_of_the_definition(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    train, held_out = drawn_texts(rng, 30), drawn_texts(rng, 20)

    def expected(seen, asked, k):
        counts = Counter(i for text in seen for i in text if i not in SPECIAL)
        p = [(counts[i] + k) / (counts.total() + k * (V - 3)) for i in range(V)]
        return math.exp(-np.mean([math.log(p[i]) for text in asked for i in text if i not in SPECIAL]))

    rest, tenth = [text for i, text in enumerate(train) if i % 10], train[::10]
    best = min(text_module.SMOOTHING, key=lambda k: expected(rest, tenth, k))
    assert unigram_perplexity(train, held_out, V, SPECIAL) == pytest.approx(expected(train, held_out, best))
    monkeypatch.setattr(text_module, "SMOOTHING", (0.5,))
    assert unigram_perplexity(train, held_out, V, SPECIAL) == pytest.approx(expected(train, held_out, 0.5))


def test_texts_that_cannot_be_counted_are_refused():
    with pytest.raises(ValueError, match="vocabulary of 12"):
        unigram_perplexity([[0, 12, 1]], [[0, 5, 1]], V, SPECIAL)
    with pytest.raises(ValueError, match="vocabulary of 12"):
        unigram_perplexity([[0, 5, 1]], [[0, -1, 1]], V, SPECIAL)
    for train, held_out in (([[0, 1]], [[0, 5, 1]]), ([[0, 5, 1]], [[0, 1]]), ([], [[5]]), ([[5]], [])):
        with pytest.raises(ValueError, match="no tokens to count, or none to score"):
            unigram_perplexity(train, held_out, V, SPECIAL)
    assert 1 < unigram_perplexity([[0, 5, 6, 1]], [[0, 6, 1], [7]], V, SPECIAL) < 1000  # 7 was not counted


# Replaced tokens


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_of_replaced_tokens_are_those_of_scikit_learn(ties):
    replaced, frequent = torch.rand(400) < 0.2, torch.rand(400) < 0.7
    logits = (torch.randn(400) + 2 * replaced - 1) * 30  # Sigmoids of such logits would often be 1.
    logits = (logits / 20).round() if ties else logits
    found = replaced_metrics(logits, replaced, frequent)
    expected = {}
    for name, rows in (("", torch.ones(400, dtype=torch.bool)), ("_frequent", frequent), ("_rare", ~frequent)):
        truth, score, predicted = replaced[rows], logits[rows], logits[rows] > 0
        expected |= {
            f"accuracy{name}": accuracy_score(truth, predicted),
            f"always_original{name}": accuracy_score(truth, torch.zeros_like(truth)),
            f"balanced_accuracy{name}": balanced_accuracy_score(truth, predicted),
            f"auroc{name}": roc_auc_score(truth, score),
            f"precision{name}": precision_score(truth, predicted),
            f"recall{name}": recall_score(truth, predicted),
            f"f1{name}": f1_score(truth, predicted),
        }
    assert found == pytest.approx(expected, abs=1e-12)
    whole = {name: value for name, value in found.items() if not name.endswith(("_frequent", "_rare"))}
    assert replaced_metrics(logits, replaced) == whole


def test_metrics_without_replaced_tokens():
    found = replaced_metrics(-torch.rand(5) - 1, torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool))
    assert found["accuracy"] == found["always_original"] == found["accuracy_frequent"] == 1
    for name in ("auroc", "recall", "precision", "f1", "balanced_accuracy", "accuracy_rare"):
        assert math.isnan(found[name])
    with pytest.raises(ValueError, match="one entry for each token"):
        replaced_metrics(torch.zeros(3), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="not finite"):
        replaced_metrics(torch.tensor([torch.inf]), torch.ones(1, dtype=torch.bool))
