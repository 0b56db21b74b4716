from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, balanced_accuracy_score

import dualenc.evaluation
from dualenc.evaluation import (
    classification_metrics,
    match_ranks,
    multilabel_metrics,
    per_class,
    predictions,
    zero_shot_classifier,
)


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
    metrics, intervals, chance, ranks = classification_metrics(images, classifier, targets)
    assert metrics == pytest.approx(by_definition(images, classifier, targets), abs=1e-12)
    assert ("acc5" in metrics) == (classes >= 5)
    assert set(intervals) == set(metrics) & {"acc1", "acc5"}
    assert set(chance) == set(metrics)
    assert torch.equal(ranks["image"], match_ranks(images, classifier, targets))
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())


def test_a_tie_with_the_right_class_is_wrong():
    classifier = unit(6, 8)
    classifier[3] = classifier[2]
    images = classifier[[2, 3, 1]]
    metrics = classification_metrics(images, classifier, torch.tensor([2, 3, 1])).metrics
    assert metrics["acc1"] == pytest.approx(1 / 3)
    assert metrics["acc5"] == 1
    assert metrics["mean_per_class_recall"] == pytest.approx(1 / 3)


def test_classes_weigh_the_same_whatever_their_size():
    classifier = torch.eye(3)
    targets = torch.tensor([0] * 98 + [1, 2])
    images = torch.eye(3)[torch.tensor([0] * 98 + [0, 0])]
    metrics = classification_metrics(images, classifier, targets).metrics
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
    result = multilabel_metrics(scores, targets)
    assert set(result.metrics) == set(result.chance) == {"mean_average_precision"}
    found = result.metrics["mean_average_precision"]
    each = [average_precision(scores[:, c].tolist(), targets[:, c].tolist()) for c in range(7)]
    assert found == pytest.approx(sum(each) / 7, abs=1e-12)
    assert multilabel_metrics(scores, targets.long()) == result
    assert dualenc.evaluation.average_precision(scores, targets).tolist() == pytest.approx(each, abs=1e-12)
    if not ties and not empty:  # scikit-learn's definition agrees where there is nothing to decide
        assert found == pytest.approx(
            average_precision_score(targets.numpy(), scores.numpy(), average="macro"), abs=1e-9
        )


def test_multilabel_of_equal_scores_does_not_depend_on_the_order():
    scores, targets = torch.zeros(20, 2), torch.rand(20, 2) < 0.5
    targets[0], targets[1] = True, False
    turn = torch.randperm(20)
    found = multilabel_metrics(scores, targets).metrics
    assert found == pytest.approx(multilabel_metrics(scores[turn], targets[turn]).metrics)
    assert found["mean_average_precision"] < targets.double().mean() + 0.2


def test_multilabel_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError):
        multilabel_metrics(torch.zeros(5, 3), torch.zeros(5, 4, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_average_precision_is_scikit_learns_class_by_class(dtype):
    scores = torch.stack([torch.randperm(90) for _ in range(8)], 1).to(dtype) / 128  # no two equal, in bfloat16 too
    targets = torch.rand(90, 8) < torch.linspace(0.05, 0.95, 8)
    targets[0] = True
    found = dualenc.evaluation.average_precision(scores, targets)
    assert found.dtype == torch.float64
    expected = average_precision_score(targets.numpy(), scores.double().numpy(), average=None)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


# Chance


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_chance_is_the_mean_over_random_orders(seed, classes):
    """Classes of very different size, one without images; 4,000 random orders, within 6 standard errors."""
    rng, draws = np.random.default_rng(seed), 4000
    targets = torch.cat([torch.zeros(20, dtype=torch.int64), torch.randint(classes - 1, (15,))])
    chance = classification_metrics(unit(35, 6), unit(classes, 6), targets).chance
    scores = rng.random((draws, 35, classes))
    ranks = (scores > scores[:, np.arange(35), targets.numpy()][..., None]).sum(-1)
    found = {f"acc{k}": (ranks < k).mean(1) for k in (1, 5) if k <= classes}
    present = sorted(set(targets.tolist()))
    found["mean_per_class_recall"] = np.mean([(ranks[:, targets == c] < 1).mean(1) for c in present], 0)
    assert set(chance) == set(found)
    for name, values in found.items():
        assert chance[name] == pytest.approx(values.mean(), abs=6 * values.std() / draws**0.5 + 1e-12), name


@pytest.mark.parametrize("images", [1, 2, 4, 6])
def test_multilabel_chance_over_all_orders_there_are(images):
    """Labels with any number of images, 0 among them; each order of the images has the same chance."""
    targets = torch.stack([torch.arange(images) < count for count in range(images + 1)], 1)
    targets = targets[torch.randperm(images)][:, torch.randperm(images + 1)]
    chance = multilabel_metrics(torch.randn(images, images + 1), targets).chance["mean_average_precision"]
    each = [
        average_precision(list(order), targets[:, c].tolist())
        for c in range(images + 1)
        for order in permutations(range(images))
    ]
    assert chance == pytest.approx(sum(each) / len(each), abs=1e-12)
    without = multilabel_metrics(torch.randn(images, 3), torch.zeros(images, 3, dtype=torch.bool))
    assert without.chance == without.metrics == {"mean_average_precision": 0.0}


# What each image was taken for


@pytest.mark.parametrize("kind", ["random", "twins", "collapsed", "near"])
def test_predictions(kind):
    """The best of all where nothing is tied; never the right class where the metrics call it wrong."""
    classes = int(torch.randint(1, 12, ()))
    classifier, targets = unit(classes, 16), torch.randint(classes, (60,))
    images = F.normalize(classifier[targets] + 0.8 * unit(60, 16), dim=1)
    if kind == "twins":
        classifier = classifier[torch.randint(classes, (classes,))]
    elif kind == "collapsed":
        classifier = classifier[:1].expand(classes, -1)
    elif kind == "near":
        classifier = F.normalize(classifier[:1] + 1e-7 * unit(classes, 16), dim=1)
        images = classifier[targets]
    ranks = classification_metrics(images, classifier, targets).ranks["image"]
    found = predictions(images, classifier, targets, ranks)
    assert found.dtype == torch.int64
    assert torch.equal(found == targets, ranks == 0)
    scores = images.double() @ classifier.double().T
    assert bool((scores.gather(1, found[:, None])[:, 0] >= scores.max(1).values - 1e-6).all())  # one of the best
    if kind == "random":
        assert torch.equal(found, scores.argmax(1))
    for chunk in (1, 7, 59):
        assert torch.equal(predictions(images, classifier, targets, ranks, chunk=chunk), found)


def test_predictions_of_each_twin_are_the_other_one():
    classifier = unit(6, 8)
    classifier[3] = classifier[2]
    targets = torch.tensor([2, 3, 1])
    images = classifier[targets]
    ranks = classification_metrics(images, classifier, targets).ranks["image"]
    assert predictions(images, classifier, targets, ranks).tolist() == [3, 2, 1]


def test_per_class():
    targets, ranks = torch.randint(7, (50,)), torch.randint(4, (50,))
    right, total = per_class(ranks, targets, 9)
    for c in range(9):
        mine = [int(rank) for rank, target in zip(ranks, targets, strict=True) if target == c]
        assert (right[c], total[c]) == (mine.count(0), len(mine))
    assert (right.dtype, total.dtype) == (torch.float64, torch.int64)
