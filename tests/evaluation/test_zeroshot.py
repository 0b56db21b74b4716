import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from dualenc.evaluation import classification_metrics, multilabel_metrics, zero_shot_classifier


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


class Hashed:
    """Embeds a text by its letters, and counts the calls."""

    def __init__(self, width=8):
        self.calls, self.width = 0, width

    def embed_texts(self, texts):
        self.calls += 1
        rows = []
        for text in texts:
            generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**60)
            rows.append(torch.randn(self.width, generator=generator))
        return F.normalize(torch.stack(rows), dim=-1)


def test_classifier_equals_the_naive_loop():
    names, templates = ["cat", "two dogs", "a {c} in braces", "été"], ["a photo of a {c}.", "{c}", "{c} and {c}!"]
    embedder = Hashed()
    classifier = zero_shot_classifier(embedder, names, templates)
    assert embedder.calls == 1
    rows = []
    for name in names:
        vectors = [Hashed().embed_texts([template.replace("{c}", name)])[0].double() for template in templates]
        mean = sum(vectors) / len(vectors)
        rows.append(mean / mean.norm())
    assert classifier.shape == (4, 8)
    assert (classifier - torch.stack(rows)).abs().max() < 1e-6


def by_definition(images, classifier, targets):
    """CLIP_benchmark's acc1, acc5 and mean_per_class_recall (metrics/zeroshot_classification.py) by sorting."""
    scores = images.double() @ classifier.double().T
    orders = [sorted(range(len(classifier)), key=lambda c: -row[c]) for row in scores.tolist()]
    expected = {}
    for k in (1, 5):
        if k <= len(classifier):
            expected[f"acc{k}"] = sum(int(t) in o[:k] for t, o in zip(targets, orders, strict=True)) / len(targets)
    predicted = [o[0] for o in orders]
    expected["mean_per_class_recall"] = balanced_accuracy_score(targets.tolist(), predicted)
    return expected


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
@pytest.mark.parametrize("classes", [2, 4, 5, 6, 23])
@pytest.mark.parametrize("missing", [0, 1])
def test_classification_equals_the_definition(classes, missing):
    classifier = unit(classes, 10)
    targets = torch.randint(classes - missing, (80,))
    images = F.normalize(classifier[targets] + 0.5 * torch.randn(80, 10), dim=-1)
    metrics, intervals = classification_metrics(images, classifier, targets)
    assert metrics == pytest.approx(by_definition(images, classifier, targets), abs=1e-12)
    assert ("acc5" in metrics) == (classes >= 5)
    assert set(intervals) == set(metrics) & {"acc1", "acc5"}
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())


def test_a_tie_with_the_right_class_is_wrong():
    classifier = unit(6, 8)
    classifier[3] = classifier[2]
    images = classifier[[2, 3, 1]]
    metrics, _ = classification_metrics(images, classifier, torch.tensor([2, 3, 1]))
    assert metrics["acc1"] == pytest.approx(1 / 3)
    assert metrics["acc5"] == 1
    assert metrics["mean_per_class_recall"] == pytest.approx(1 / 3)


def test_classes_weigh_the_same_whatever_their_size():
    classifier = torch.eye(3)
    targets = torch.tensor([0] * 98 + [1, 2])
    images = torch.eye(3)[torch.tensor([0] * 98 + [0, 0])]
    metrics, _ = classification_metrics(images, classifier, targets)
    assert metrics["acc1"] == pytest.approx(0.98)
    assert metrics["mean_per_class_recall"] == pytest.approx(1 / 3)


def test_not_finite_embeddings_are_refused():
    images = unit(5, 4)
    images[2, 1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        classification_metrics(images, unit(3, 4), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        multilabel_metrics(images, torch.ones(5, 4, dtype=torch.bool))


def average_precision(scores, truth):
    """Precision at each hit, averaged, as CLIP_benchmark does; among equal scores the wrong ones first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], truth[i]))
    hits, precisions = 0, []
    for place, i in enumerate(order, 1):
        if truth[i]:
            hits += 1
            precisions.append(hits / place)
    return sum(precisions) / max(hits, 1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_multilabel_equals_the_definition(ties, empty):
    scores, targets = torch.randn(60, 7), torch.rand(60, 7) < 0.3
    if ties:
        scores = (scores * 2).round() / 2
    targets[0] = True
    if empty:
        targets[:, 3] = False
    found = multilabel_metrics(scores, targets)["mean_average_precision"]
    each = [average_precision(scores[:, c].tolist(), targets[:, c].tolist()) for c in range(7)]
    assert found == pytest.approx(sum(each) / 7, abs=1e-12)
    assert multilabel_metrics(scores, targets.long())["mean_average_precision"] == found
    if not ties and not empty:  # scikit-learn's definition agrees where there is nothing to decide
        assert found == pytest.approx(
            average_precision_score(targets.numpy(), scores.numpy(), average="macro"), abs=1e-9
        )


def test_multilabel_of_equal_scores_does_not_depend_on_the_order():
    scores, targets = torch.zeros(20, 2), torch.rand(20, 2) < 0.5
    targets[0], targets[1] = True, False
    turn = torch.randperm(20)
    assert multilabel_metrics(scores, targets) == pytest.approx(multilabel_metrics(scores[turn], targets[turn]))
    assert multilabel_metrics(scores, targets)["mean_average_precision"] < targets.double().mean() + 0.2


def test_multilabel_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError):
        multilabel_metrics(torch.zeros(5, 3), torch.zeros(5, 4, dtype=torch.bool))
