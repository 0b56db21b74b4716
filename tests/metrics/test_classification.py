import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, top_k_accuracy_score

import dualenc.metrics.classification as classification
from dualenc.metrics.classification import (
    calibration,
    classification_bootstrap,
    classification_metrics,
    multilabel_bootstrap,
    multilabel_metrics,
    per_class,
    zero_shot_classifier,
)
from dualenc.metrics.ranking import match_ranks


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


class Hashed:
    """An embedder whose embeddings depend on the letters of a text; it counts its calls."""

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


# Classification


def draw(classes, images=80, missing=0, noise=0.5):
    """Draw images near their classes; the last `missing` classes have none."""
    classifier, targets = unit(classes, 10), torch.randint(classes - missing, (images,))
    return F.normalize(classifier[targets] + noise * torch.randn(images, 10), dim=-1), classifier, targets


def error_by_definition(right, confidence, weight, bins=15):
    """Compute the calibration error bin by bin (Guo et al. 2017, equation 3); ((m - 1) / 15, m / 15] is bin m."""
    total = 0.0
    for m in range(1, bins + 1):
        own = [i for i in range(len(right)) if (m - 1) / bins < confidence[i] <= m / bins]
        size = sum(weight[i] for i in own)
        if size:
            accuracy = sum(weight[i] * right[i] for i in own) / size
            confident = sum(weight[i] * confidence[i] for i in own) / size
            total += size / sum(weight) * abs(accuracy - confident)
    return total


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@pytest.mark.parametrize("classes", [2, 4, 5, 6, 23])
@pytest.mark.parametrize("missing", [0, 1])
def test_classification_equals_scikit_learn(classes, missing):
    images, classifier, targets = draw(classes, missing=missing)
    metrics, intervals, chance, items = classification_metrics(images, classifier, targets, 7.0)
    scores = (images.double() @ classifier.double().T).numpy()
    answer, confidence = scores.argmax(1), torch.tensor(7 * scores).softmax(1).max(1).values
    expected = {
        "acc1": accuracy_score(targets, answer),
        "mean_per_class_recall": balanced_accuracy_score(targets, answer),
        "ece": error_by_definition((torch.tensor(answer) == targets).tolist(), confidence.tolist(), [1] * len(targets)),
    }
    if classes > 5:  # Of five classes, acc5 is 1 for every model.
        expected["acc5"] = top_k_accuracy_score(targets, scores, k=5, labels=range(classes))
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert set(chance) == set(intervals) == set(metrics) - {"ece"}
    assert all(isinstance(value, float) for value in (*metrics.values(), *chance.values()))
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())
    assert torch.equal(items["target"], targets)
    assert torch.equal(items["rank"], match_ranks(images, classifier, targets))
    assert items["answer"].tolist() == answer.tolist()
    assert (items["confidence"] - confidence).abs().max() < 1e-12
    assert items["confidence"].dtype == torch.float64
    assert (items["classes"].item(), items["classes"].shape) == (classes, ())
    assert classification_bootstrap(items).values() == metrics
    assert {k: v for k, v in classification_bootstrap(items).intervals().items() if k != "ece"} == intervals
    without = classification_metrics(images, classifier, targets, torch.tensor([7.0]), replicates=0)
    assert (without.metrics, without.intervals) == (metrics, {})


def test_weights_equal_copies():
    """Metrics with weights 0, 1, 2, ... are those of data with this many copies of each image."""
    *_, items = classification_metrics(*draw(6, 60, noise=1.0), 4.0, replicates=0)
    weights = torch.randint(4, (5, 60))
    weights[0, items["target"] == 2] = 0
    measures = classification_bootstrap(items)
    for name, statistic in measures.statistics.items():
        found = statistic(weights.double())
        assert found.shape == (5,)
        for value, row in zip(found.tolist(), weights, strict=True):
            copies = {key: x.repeat_interleave(row) if x.dim() else x for key, x in items.items()}
            assert value == pytest.approx(classification_bootstrap(copies).values()[name], abs=1e-12), name
    right, weight = (items["rank"] < 1).tolist(), weights[1].tolist()
    expected = error_by_definition(right, items["confidence"].tolist(), weight)
    assert measures.statistics["ece"](weights[1:2].double()).item() == pytest.approx(expected, abs=1e-12)


def test_bootstrap_samples_keep_the_class_sizes():
    """With one class always right and one always wrong, nothing can vary."""
    classifier, targets = torch.eye(2), torch.tensor([0] * 10 + [1] * 30)
    intervals = classification_metrics(torch.eye(2)[torch.zeros(40, dtype=torch.int64)], classifier, targets).intervals
    assert intervals["acc1"] == (0.25, 0.25)
    assert intervals["mean_per_class_recall"] == (0.5, 0.5)


@pytest.mark.parametrize("kind", ["random", "twins", "collapsed", "near"])
def test_items_do_not_depend_on_the_blocks(monkeypatch, kind):
    """Without ties the answer is the best class; where the right class ties, it is another one."""
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
    items = classification_metrics(images, classifier, targets, 100.0, replicates=0).items
    answer, rank, confidence = items["answer"], items["rank"], items["confidence"]
    assert torch.equal(rank, match_ranks(images, classifier, targets))
    assert torch.equal(answer == targets, rank == 0)
    scores = images.double() @ classifier.double().T
    own = scores.gather(1, answer[:, None])[:, 0]
    assert bool((own >= scores.max(1).values - 1e-11).all())  # one of the best
    assert (confidence - (100 * scores).softmax(1).gather(1, answer[:, None])[:, 0]).abs().max() < 1e-9
    if kind == "random":
        assert torch.equal(answer, scores.argmax(1))
    for cells in (1, 7 * classes, 59 * classes):
        monkeypatch.setattr(classification, "_CELLS", cells)
        again = classification_metrics(images, classifier, targets, 100.0, replicates=0).items
        for name in ("target", "rank", "answer", "classes"):
            assert torch.equal(again[name], items[name])
        assert (again["confidence"] - confidence).abs().max() < 1e-9


def test_the_answer_to_two_equal_classes_is_the_wrong_one():
    classifier = unit(6, 8)
    classifier[3] = classifier[2]
    targets = torch.tensor([2, 3, 1])
    metrics, _, _, items = classification_metrics(classifier[targets], classifier, targets)
    assert items["answer"].tolist() == [3, 2, 1]
    assert items["rank"].tolist() == [1, 1, 0]
    assert metrics["acc1"] == pytest.approx(1 / 3)
    assert metrics["acc5"] == 1
    assert metrics["mean_per_class_recall"] == pytest.approx(1 / 3)


def test_a_scale_whose_exponentials_overflow():
    items = classification_metrics(torch.eye(3), torch.eye(3), torch.arange(3), 1e5, replicates=0).items
    assert items["confidence"].tolist() == [1, 1, 1]
    assert calibration(items) == [(1.0, 1.0, 3)]


def test_one_class():
    metrics, _, chance, items = classification_metrics(unit(4, 3), unit(1, 3), torch.zeros(4).long(), 10.0)
    assert metrics == {"acc1": 1.0, "mean_per_class_recall": 1.0, "ece": 0.0}
    assert items["rank"].tolist() == [0] * 4
    assert chance == {"acc1": 1.0, "mean_per_class_recall": 1.0}


def test_mean_per_class_recall_weighs_classes_equally():
    classifier = torch.eye(3)
    targets = torch.tensor([0] * 98 + [1, 2])
    images = torch.eye(3)[torch.tensor([0] * 98 + [0, 0])]
    metrics = classification_metrics(images, classifier, targets).metrics
    assert metrics["acc1"] == pytest.approx(0.98)
    assert metrics["mean_per_class_recall"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_calibration_error_averages_over_the_bins(bins):
    items = classification_metrics(*draw(7, 300, noise=1.0), 5.0, replicates=0).items
    right, confidence = (items["rank"] == 0).tolist(), items["confidence"].tolist()
    found = calibration(items, bins)
    assert sum(count for *_, count in found) == 300
    assert all(count > 0 for *_, count in found)
    numbers = [math.ceil(mean * bins) for mean, _, _ in found]
    assert numbers == sorted(set(numbers))
    error = sum(count / 300 * abs(accuracy - mean) for mean, accuracy, count in found)
    assert error == pytest.approx(error_by_definition(right, confidence, [1] * 300, bins), abs=1e-12)
    if bins == 15:
        assert calibration(items) == found
        assert classification_bootstrap(items).values()["ece"] == pytest.approx(error, abs=1e-12)


def test_calibration_at_the_bounds_of_the_bins():
    confidence = torch.tensor([0.0, 0.25, 0.5, 0.5 + 1e-9, 1.0], dtype=torch.float64)
    items = {"rank": torch.tensor([0, 1, 0, 0, 0]), "confidence": confidence}
    assert [(accuracy, count) for _, accuracy, count in calibration(items, 4)] == [(0.5, 2), (1, 1), (1, 1), (1, 1)]


def test_per_class():
    items = classification_metrics(*draw(7, 50, missing=2, noise=1.0), replicates=0).items
    right, total = per_class(items)
    for c in range(7):
        mine = [int(rank) for rank, target in zip(items["rank"], items["target"], strict=True) if target == c]
        assert (right[c], total[c]) == (mine.count(0), len(mine))
    assert (right.dtype, total.dtype) == (torch.int64, torch.int64)
    assert total[-2:].tolist() == [0, 0]


def test_non_finite_embeddings_are_refused():
    images = unit(5, 4)
    images[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"images .* not finite"):
        classification_metrics(images, unit(3, 4), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="the classifier hold"):
        classification_metrics(unit(3, 4), images, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        multilabel_metrics(images, torch.ones(5, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("targets", "cause"), [([0, 1], "2 targets for 3 images"), ([0, 4, 1], "0 and 3"), ([0, -1, 1], "0 and 3")]
)
def test_targets_that_do_not_fit_are_refused(targets, cause):
    with pytest.raises(ValueError, match=cause):
        classification_metrics(unit(3, 4), unit(4, 4), torch.tensor(targets))


# Several labels


def average_precision(scores, truth, weight=None):
    """Average the precision at each hit, as CLIP_benchmark does; among equal scores the negatives come first.

    With weights, the copies of an image count as one for the image itself, and as copies for the others.
    """
    weight = [1] * len(truth) if weight is None else weight
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], truth[i]))
    hits, total, precisions = 0, 0, []
    for i in order:
        if truth[i]:
            precisions += [(1 + hits) / (1 + total)] * weight[i]
        hits, total = hits + weight[i] * truth[i], total + weight[i]
    return sum(precisions) / max(len(precisions), 1)


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
    again = multilabel_metrics(scores, targets.long())
    assert (again.metrics, again.intervals) == (result.metrics, result.intervals)
    assert multilabel_bootstrap(result.items).values() == result.metrics
    assert (result.items["scores"].dtype, result.items["targets"].dtype) == (scores.dtype, torch.bool)
    low, high = result.intervals["mean_average_precision"]
    assert low < found < high
    assert multilabel_metrics(scores, targets, replicates=0).intervals == {}
    assert classification.average_precision(scores, targets).tolist() == pytest.approx(each, abs=1e-12)
    if not ties and not empty:  # scikit-learn's definition agrees where there is nothing to decide
        assert found == pytest.approx(
            average_precision_score(targets.numpy(), scores.numpy(), average="macro"), abs=1e-9
        )


def test_multilabel_with_weights_equals_the_definition():
    """A class whose images are not drawn is left out of the mean; one that has none counts as 0."""
    scores, targets = (torch.randn(40, 6) * 2).round() / 2, torch.rand(40, 6) < 0.3
    scores[:, 3:] = torch.randn(40, 3)
    targets[0] = True
    targets[:, 2] = False
    weights = torch.randint(3, (4, 40))
    weights[1, targets[:, 4]] = 0
    weights[2] = 0
    found = multilabel_bootstrap({"scores": scores, "targets": targets}).statistics["mean_average_precision"]
    found = found(weights.double()).tolist()
    for value, row in zip(found, weights, strict=True):
        each = [
            average_precision(scores[:, c].tolist(), targets[:, c].tolist(), row.tolist())
            for c in range(6)
            if row[targets[:, c]].sum()
        ]
        assert value == pytest.approx(5 / 6 * sum(each) / max(1, len(each)), abs=1e-12)
    assert found[2] == 0


def test_multilabel_of_equal_scores_does_not_depend_on_the_order():
    scores, targets = torch.zeros(20, 2), torch.rand(20, 2) < 0.5
    targets[0], targets[1] = True, False
    order = torch.randperm(20)
    found = multilabel_metrics(scores, targets).metrics
    assert found == pytest.approx(multilabel_metrics(scores[order], targets[order]).metrics)
    assert found["mean_average_precision"] < targets.double().mean() + 0.2


def test_multilabel_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 3\) .* \(5, 4\) must"):
        multilabel_metrics(torch.zeros(5, 3), torch.zeros(5, 4, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_average_precision_equals_scikit_learn(dtype):
    scores = torch.stack([torch.randperm(90) for _ in range(8)], 1).to(dtype) / 128  # all different, in bfloat16 too
    targets = torch.rand(90, 8) < torch.linspace(0.05, 0.95, 8)
    targets[0] = True
    found = classification.average_precision(scores, targets)
    assert found.dtype == torch.float64
    expected = average_precision_score(targets.numpy(), scores.double().numpy(), average=None)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


# Chance


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_chance_is_the_mean_over_random_orders(seed, classes):
    """The chance values are within 6 standard errors of 4,000 random orders, with classes of very different size."""
    rng, draws = np.random.default_rng(seed), 4000
    targets = torch.cat([torch.zeros(20, dtype=torch.int64), torch.randint(classes - 1, (15,))])
    chance = classification_metrics(unit(35, 6), unit(classes, 6), targets, replicates=0).chance
    scores = rng.random((draws, 35, classes))
    ranks = (scores > scores[:, np.arange(35), targets.numpy()][..., None]).sum(-1)
    found = {f"acc{k}": (ranks < k).mean(1) for k in (1, 5) if k < classes}
    present = sorted(set(targets.tolist()))
    found["mean_per_class_recall"] = np.mean([(ranks[:, targets == c] < 1).mean(1) for c in present], 0)
    assert set(chance) == set(found)
    for name, values in found.items():
        assert chance[name] == pytest.approx(values.mean(), abs=6 * values.std() / draws**0.5 + 1e-12), name


@pytest.mark.parametrize("images", [1, 2, 4, 6])
def test_multilabel_chance_is_the_mean_over_all_orders(images):
    """Labels have any number of images, 0 included; all orders of the images are equally likely."""
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
