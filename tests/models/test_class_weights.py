"""Class weights and thresholds of classification heads: the loss, the answers, the metrics, and what is saved."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_tokenizer
from sklearn.metrics import accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight

import dualenc
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.models.heads import Examples, make_head
from dualenc.training.ranks import mean_over_ranks

NAMES = ("a", "b", "c")


def mean_loss(config, logits, labels, train=None):
    head = make_head(config)
    head.prepare(lambda: train)
    total, number = head.sums(Examples(logits, labels, len(logits)))
    return mean_over_ranks(total, [number], 1)


def test_weights_of_one_label_a_text_are_those_of_torch(seed):
    logits, labels = torch.randn(40, 3, requires_grad=True), torch.randint(3, (40,))
    weights = tuple((0.01 + torch.rand(3)).tolist())  # small ones too: their sum may be below 1
    got = mean_loss(HeadConfig("classification", NAMES, class_weights=weights), logits[:5], labels[:5])
    want = F.cross_entropy(logits[:5], labels[:5], torch.tensor(weights))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])
    plain = mean_loss(HeadConfig("classification", NAMES), logits[:5], labels[:5])
    torch.testing.assert_close(plain, F.cross_entropy(logits[:5], labels[:5]))
    train = torch.cat([torch.arange(3), torch.randint(3, (50,)), torch.zeros(20, dtype=torch.int64)])
    balanced = compute_class_weight("balanced", classes=np.arange(3), y=train.numpy())
    got = mean_loss(HeadConfig("classification", NAMES, class_weights="balanced"), logits, labels, train)
    torch.testing.assert_close(got, F.cross_entropy(logits, labels, torch.tensor(balanced).float()))
    assert abs(got - F.cross_entropy(logits, labels)) > 1e-6  # control


def test_weights_of_several_labels_are_those_of_torch(seed):
    logits, labels = torch.randn(40, 3), torch.randint(2, (40, 3)).float()
    weights = tuple((0.1 + 5 * torch.rand(3)).tolist())
    config = HeadConfig("classification", NAMES, "multi_label", class_weights=weights)
    want = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(weights))
    torch.testing.assert_close(mean_loss(config, logits, labels), want)
    train = torch.cat([torch.eye(3), torch.randint(2, (20, 3)).float()])
    positives = train.sum(0)
    config = HeadConfig("classification", NAMES, "multi_label", class_weights="balanced")
    want = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=(len(train) - positives) / positives)
    torch.testing.assert_close(mean_loss(config, logits, labels, train), want)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.85])
def test_the_threshold_decides_answers_and_metrics(seed, threshold):
    logits, labels = 2 * torch.randn(50, 3), torch.randint(2, (50, 3)).float()
    head = make_head(HeadConfig("classification", NAMES, "multi_label", threshold=threshold))
    given = logits.double().sigmoid().numpy() >= threshold
    answers = head.answers(Examples(logits, None, 50))
    assert [answer["labels"] for answer in answers] == [[n for n, one in zip(NAMES, row) if one] for row in given]
    held_out = SimpleNamespace(train_labels=lambda: labels, text=str)
    found = head.metrics([head.observe(Examples(logits, labels, 50))], held_out)
    assert found.metrics["accuracy"] == pytest.approx(accuracy_score(labels.numpy(), given))
    for average in ("micro", "macro"):
        expected = f1_score(labels.numpy(), given, average=average, zero_division=0)
        assert found.metrics[f"f1_{average}"] == pytest.approx(expected)
    low, high = found.intervals["accuracy"]
    assert low <= found.metrics["accuracy"] <= high
    # The held-out loss is not weighted.
    assert found.metrics["loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, labels)), abs=1e-6)
    if threshold != 0.5:  # control
        other = make_head(HeadConfig("classification", NAMES, "multi_label")).answers(Examples(logits, None, 50))
        assert other != answers


def test_both_are_saved_and_older_files_lack_them(tmp_path, seed):
    tokenizer = tiny_tokenizer()
    config = TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=12, types=2)
    head = HeadConfig("classification", NAMES, "multi_label", class_weights=(1.0, 2.5, 0.5), threshold=0.3)
    model = TextModel(
        config, {"topic": head, "mood": HeadConfig("classification", ("x", "y"), class_weights="balanced")}
    )
    dualenc.TextPredictor(model.eval(), tokenizer).save(tmp_path / "model")
    loaded = dualenc.load_text(tmp_path / "model", "cpu")
    assert loaded.model.head_configs == model.head_configs
    assert not {"threshold", "class_weights"} & json.loads((tmp_path / "model" / "config.json").read_text()).keys()
    about = json.loads((tmp_path / "model" / "dualenc.json").read_text())
    for fields in about["heads"].values():
        del fields["threshold"], fields["class_weights"]
    (tmp_path / "model" / "dualenc.json").write_text(json.dumps(about))
    older = dualenc.load_text(tmp_path / "model", "cpu").model
    assert [(one.class_weights, one.threshold) for one in older.head_configs.values()] == [(None, 0.5)] * 2
    assert older.load_pretrained(model).whole == ("topic", "mood")  # these settings do not change the logits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_weights": (1.0, 2.0)}, "each of the 3 labels"),
        ({"class_weights": (1.0, 2.0, 0.0)}, "above 0"),
        ({"class_weights": (1.0, 2.0, float("nan"))}, "above 0"),
        ({"threshold": 0.4}, "threshold has no meaning for a head of kind classification and problem single_label"),
        ({"problem": "multi_label", "threshold": 1.0}, "between 0 and 1"),
        ({"problem": "regression", "labels": ("n",), "class_weights": "balanced"}, "class_weights has no meaning"),
        ({"kind": "mlm", "labels": (), "class_weights": "balanced"}, "class_weights has no meaning"),
        ({"kind": "embedding", "problem": "negatives", "labels": (), "threshold": 0.4}, "threshold has no meaning"),
        ({"scheme": "iob1"}, "scheme has no meaning"),
        ({"max_length": 8}, "max_length has no meaning"),
        ({"no_answer": True}, "no_answer has no meaning"),
        ({"kind": "question_answering", "labels": (), "scheme": "bioes"}, "scheme has no meaning"),
        ({"kind": "question_answering", "labels": (), "norm": True, "activation": None}, "name its activation"),
        ({"kind": "token_classification", "problem": "multi_label"}, "problem has no meaning"),
        ({"kind": "token_classification", "stride": 4}, "stride has no meaning"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**{"kind": "classification", "labels": NAMES, **settings})


@pytest.mark.parametrize(
    ("problem", "train", "message"),
    [
        ("single_label", torch.tensor([0, 0, 2]), "no training text has the label b"),
        ("multi_label", torch.tensor([[1.0, 1, 0], [0, 1, 0]]), "every training text has the label b"),
        ("multi_label", torch.tensor([[1.0, 1, 0], [0, 0, 0]]), "no training text has the label c"),
    ],
)
def test_labels_that_cannot_be_balanced_are_named(problem, train, message):
    head = make_head(HeadConfig("classification", NAMES, problem, class_weights="balanced"))
    with pytest.raises(ValueError, match=message):
        head.prepare(lambda: train)


def test_settings_that_do_not_change_the_logits_do_not_keep_weights_from_a_head(seed):
    """Check that heads of tokens take up weights whatever the activation of a hidden layer that they lack."""
    config = TextConfig(40, width=16, layers=1, heads=2, context_length=384)
    tags = HeadConfig("token_classification", ("PER",), class_weights=(1.0, 2.0, 3.0), activation=None, weight=2.0)
    windows = HeadConfig("question_answering", max_length=8, stride=2, activation="gelu")
    plain = {"tags": HeadConfig("token_classification", ("PER",)), "other": HeadConfig("question_answering")}
    source, model = TextModel(config, {"tags": tags, "answer": windows}), TextModel(config, plain)
    assert model.load_pretrained(source).whole == ("tags", "other")
    torch.testing.assert_close(model.heads["tags"].state_dict(), source.heads["tags"].state_dict(), rtol=0, atol=0)
    layered = replace(plain["tags"], norm=True)
    other = TextModel(model.config, {"tags": layered, "names": plain["tags"]})
    assert other.load_pretrained(source).random == ("tags", "names")
