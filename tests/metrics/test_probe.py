import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import t
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

import dualenc.metrics.classification as classification
from dualenc.metrics.classification import classification_bootstrap
from dualenc.metrics.probe import (
    NEIGHBORS,
    _interval,
    every_fifth,
    few_shot_probe,
    knn_probe,
    linear_probe,
    logistic_regression,
    student_quantile,
)

PROBES = [linear_probe, knn_probe]


def clouds(classes, sizes, width=12, noise=0.35):
    """Draw a set of unit vectors around class centers for each size; like embeddings they share a common part."""
    centers, common = F.normalize(torch.randn(classes, width), dim=1), F.normalize(torch.randn(1, width), dim=1)
    found = []
    for size in sizes:
        y = torch.randint(classes, (size,))
        found += [F.normalize(centers[y] + 1.5 * common + noise * torch.randn(size, width), dim=1), y]
    return found


# Logistic regression


@pytest.mark.parametrize("c", [1e-4, 0.1, 3.0, 100.0])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_fit_equals_scikit_learn(c, classes):
    x, y = clouds(classes, [150], noise=0.6)
    fit = logistic_regression(x, y, c)
    assert fit.gradient < 1e-7
    # For two classes scikit-learn fits the difference of the rows, which is regularized as both rows at half the C.
    other = LogisticRegression(C=c if classes > 2 else 2 * c, tol=1e-9, max_iter=20000).fit(x.double().numpy(), y)
    weight, bias = torch.tensor(other.coef_), torch.tensor(other.intercept_)
    if classes == 2:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    size = weight.norm()
    assert (fit.weight - weight).norm() / size < 2e-4
    assert (fit.bias - bias - (fit.bias - bias).mean()).abs().max() < 2e-4 * (1 + bias.abs().max())
    logits = x.double() @ fit.weight.T + fit.bias
    expected = torch.tensor(other.predict_proba(x.double().numpy()))
    assert (logits.softmax(1) - expected).abs().max() < 1e-5
    assert fit.classes.tolist() == list(range(classes))


@pytest.mark.parametrize("c", [1e-6, 1e-3, 1.0, 1e6])
def test_the_gradient_of_the_objective_is_zero(monkeypatch, c):
    """Autograd confirms it in the original coordinates, with gaps in the class numbers and blocks of a few images."""
    monkeypatch.setattr(classification, "_CELLS", 40)
    x, y = clouds(4, [90], noise=0.8)
    fit = logistic_regression(x, 3 * y + 1, c)
    assert fit.classes.tolist() == [1, 4, 7, 10]
    weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    loss = F.cross_entropy(x.double() @ weight.T + bias, y) + weight.square().sum() / (2 * c * len(x))
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    # The distance to the minimum is at most the gradient over the curvature, which the penalty bounds from below.
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-6 * max(1, 1 / (c * len(x)) ** 0.5)
    near = F.cross_entropy(x.double() @ weight.T, y) + weight.square().sum() / (2 * c * len(x))
    assert near > loss or bias.abs().max() < 1e-6  # The bias is not regularized.


def test_constant_embeddings():
    """The fit predicts the shares of the classes."""
    y = torch.tensor([0] * 30 + [1] * 10)
    fit = logistic_regression(torch.ones(40, 5), y, 1.0)
    assert fit.weight.abs().max() < 1e-6
    assert fit.bias.softmax(0).tolist() == pytest.approx([0.75, 0.25], abs=1e-6)


def test_the_linear_probe_equals_scikit_learn():
    """The held-out accuracies, the chosen C and the result are those of scikit-learn."""
    x, y, u, v, test, targets = clouds(6, [120, 60, 200], noise=0.7)
    probe = linear_probe(x, y, test, targets, held_out=(u, v))

    def fitted(x, y, c):
        return LogisticRegression(C=c, tol=1e-9, max_iter=20000).fit(x.double().numpy(), y)

    tried = {float(key): value for key, value in probe.held_out_accuracy.items()}
    assert {1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6} <= set(tried)
    assert 10 <= len(tried) <= 15
    exponents = [8 * math.log10(c) for c in tried]
    assert all(abs(exponent - round(exponent)) < 0.02 for exponent in exponents)
    best = max(tried.values())
    chosen = min(c for c, value in tried.items() if value == best)
    assert probe.chosen["C"] == pytest.approx(chosen, rel=1e-2)
    for c, value in tried.items():
        if 1e-3 < c < 1e3:
            exact = 10 ** (round(8 * math.log10(c)) / 8)
            assert value == pytest.approx(accuracy_score(v, fitted(x, y, exact).predict(u.double().numpy())), abs=0.02)
    assert probe.chosen["gradient"] < 1e-7
    final = fitted(torch.cat([x, u]), torch.cat([y, v]), probe.chosen["C"])
    shares = final.predict_proba(test.double().numpy())
    items = probe.scores.items
    if probe.chosen["C"] <= 100:
        assert (items["confidence"] - torch.tensor(shares.max(1))).abs().max() < 1e-4
        metrics = probe.scores.metrics
        assert metrics["acc1"] == pytest.approx(accuracy_score(targets, shares.argmax(1)), abs=0.006)
        assert metrics["acc5"] == pytest.approx(top_k_accuracy_score(targets, shares, k=5), abs=0.006)
        recall = balanced_accuracy_score(targets, shares.argmax(1))
        assert metrics["mean_per_class_recall"] == pytest.approx(recall, abs=0.02)
    assert probe.missing == []


# A few images of each class


def test_few_shot_probes_equal_scikit_learn(seed):
    """Every draw takes K images of each class at most, the draws are nested, and the answers are scikit-learn's."""
    x, y, test, targets = clouds(4, [160, 90], noise=0.7)
    y[:3], y[3:] = 3, y[3:] % 3  # class 3 has three images
    found = few_shot_probe(x, y, test, targets, shots=(1, 8, 2), draws=3, seed=seed)
    assert list(found) == [1, 8, 2]
    assert {k: few.fewer for k, few in found.items()} == {1: [], 8: [3], 2: []}
    generator = torch.Generator().manual_seed(seed)
    for draw in range(3):
        shuffled = torch.randperm(160, generator=generator).tolist()
        for k, few in found.items():
            rows = [i for c in range(4) for i in [i for i in shuffled if y[i] == c][:k]]
            fit = LogisticRegression(tol=1e-9, max_iter=20000).fit(x[rows].double().numpy(), y[rows])
            expected = torch.tensor(fit.predict(test.double().numpy()))
            # An answer may differ where two classes have nearly the same score.
            assert (few.right[draw] != (expected == targets)).sum() <= 1
    assert not torch.equal(found[1].right[0], found[1].right[1])


def test_intervals_of_few_shots_cover_the_truth():
    """The mean over many draws and images lies in 95% of the intervals, of which each is of 4 draws and 100 images."""
    targets = torch.arange(4).repeat_interleave(25)
    inside, repeats = 0, 400
    for _ in range(repeats):
        difficulty, luck = torch.rand(100) - 0.5, torch.randn(4, 1) * 0.08  # of the images, of the draws
        right = torch.rand(4, 100) < 0.5 + 0.6 * difficulty + luck
        low, high = _interval(right, targets)
        inside += low <= 0.5 <= high
    assert 0.90 < inside / repeats < 0.99  # 95%, of which 400 intervals may miss four standard deviations
    assert _interval(right[:1], targets) is None


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 100])
def test_quantiles_are_those_of_student(freedom):
    assert student_quantile(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=0.01)


# Neighbors


def vote(distance):
    return np.exp((1 - distance) / 0.07)


def test_the_knn_probe_equals_scikit_learn():
    x, y, u, v, test, targets = clouds(6, [300, 80, 150], noise=0.7)
    x, u, test = (F.normalize(part.double(), dim=1) for part in (x, u, test))  # Scikit-learn normalizes by itself.
    probe = knn_probe(x, y, test, targets, held_out=(u, v))

    def fitted(x, y, k):
        return KNeighborsClassifier(k, weights=vote, metric="cosine", algorithm="brute").fit(x, y)

    ks = [k for k in NEIGHBORS if k <= 300]
    assert list(probe.held_out_accuracy) == [str(k) for k in ks]
    expected = {str(k): accuracy_score(v, fitted(x, y, k).predict(u)) for k in ks}
    assert probe.held_out_accuracy == pytest.approx(expected, abs=1e-12)
    k = max(k for k in ks if expected[str(k)] == max(expected.values()))
    assert probe.chosen == {"k": k}
    shares = fitted(torch.cat([x, u]), torch.cat([y, v]), k).predict_proba(test)
    items = probe.scores.items
    assert (items["confidence"] - torch.tensor(shares.max(1))).abs().max() < 1e-9
    own = shares[np.arange(150), targets]
    close = np.isclose(shares, own[:, None], atol=1e-12, rtol=1e-10)
    assert items["rank"].tolist() == (((shares > own[:, None]) | close).sum(1) - 1).tolist()
    assert probe.scores.metrics["acc1"] == pytest.approx(accuracy_score(targets, shares.argmax(1)), abs=1e-12)


def test_votes_are_weighted_and_ties_are_wrong():
    """Two neighbors of one class at 0.9 lose against one at 1, since 2 exp(0.9 / 0.07) is less than exp(1 / 0.07)."""
    test = torch.tensor([[1.0, 0.0]])
    near, far = [1.0, 0.0], [0.9, 0.19**0.5]
    held_out = (torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    train = torch.tensor([near, far, far, [-1.0, 0.0], [-1.0, 0.0]])
    y = torch.tensor([0, 1, 1, 2, 2])
    probe = knn_probe(train, y, test, torch.tensor([0]), held_out=held_out)
    assert probe.chosen == {"k": 5}
    assert probe.scores.metrics["acc1"] == 1
    near_votes, far_votes = 2.0, 2 * math.exp(-0.1 / 0.07)  # with the held-out image, divided by exp(1 / 0.07)
    expected = near_votes / (near_votes + far_votes)
    assert probe.scores.items["confidence"].item() == pytest.approx(expected, abs=1e-6)
    tied = knn_probe(train[:1].expand(4, -1), torch.tensor([0, 0, 1, 1]), test, torch.tensor([1]))
    assert tied.scores.items["rank"].tolist() == [1]


# Both probes


@pytest.mark.parametrize("probe", PROBES)
def test_results_repeat_and_follow_from_the_items(probe):
    x, y, test, targets = clouds(5, [100, 60], noise=0.3)
    state = torch.get_rng_state()
    found = probe(x, y, test, targets, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    again = probe(x, y, test, targets, seed=3)
    assert (again.scores[:3], again.chosen, again.held_out_accuracy, again.missing) == (
        found.scores[:3], found.chosen, found.held_out_accuracy, found.missing)  # fmt: skip
    metrics, intervals, chance, items = found.scores
    assert set(metrics) == set(intervals) | {"ece"} == {"acc1", "mean_per_class_recall", "ece"}
    assert chance == pytest.approx({"acc1": 0.2, "mean_per_class_recall": 0.2})
    assert classification_bootstrap(items).values() == metrics
    assert torch.equal(items["target"], targets)
    assert metrics["acc1"] > 0.3
    assert probe(x, y, test, targets, seed=3, replicates=0).scores.intervals == {}


@pytest.mark.parametrize("probe", PROBES)
def test_the_final_fit_includes_the_held_out_images(probe):
    """Class 2 has images only in the held-out set, classes 5 and 7 only in the test set."""
    x, y, u, v, test, targets = clouds(8, [90, 60, 80], noise=0.04)
    kept = (y != 2) & (y != 5) & (y != 7)
    here = (v != 5) & (v != 7)
    found = probe(x[kept], y[kept], test, targets, held_out=(u[here], v[here]))
    assert found.missing == [5, 7]
    items = found.scores.items
    answer = items["answer"]
    assert not bool(((answer == 5) | (answer == 7)).any())
    assert bool((items["rank"][targets == 2] < 6).any())
    lost = (targets == 5) | (targets == 7)
    assert bool((items["rank"][lost] == 7).all())  # All other classes come before, and the two tie.
    assert items["classes"].item() == 8


@pytest.mark.parametrize("probe", PROBES)
def test_the_seed_determines_the_split(probe):
    x, y, test, targets = clouds(4, [100, 40], noise=0.9)
    out = every_fifth(y, 7)
    given = probe(x[~out], y[~out], test, targets, held_out=(x[out], y[out]), replicates=0)
    drawn = probe(x, y, test, targets, seed=7, replicates=0)
    assert drawn.held_out_accuracy == given.held_out_accuracy
    assert drawn.chosen["C" if probe is linear_probe else "k"] == given.chosen["C" if probe is linear_probe else "k"]
    assert drawn.scores.metrics == pytest.approx(given.scores.metrics, abs=1e-5)


def test_a_fifth_of_each_class_is_held_out(seed):
    sizes = torch.randint(1, 40, (12,))
    sizes[0], sizes[1] = 1, 2
    y = torch.arange(12).repeat_interleave(sizes)[torch.randperm(int(sizes.sum()))]
    out = every_fifth(y, seed)
    for number, size in enumerate(sizes.tolist()):
        held = int(out[y == number].sum())
        assert size > 1 or held == 0
        assert size == 1 or size // 5 <= held <= -(-size // 5)
        assert held < size
    assert abs(int(out.sum()) - (y.bincount()[y] > 1).sum() / 5) < 1
    assert torch.equal(every_fifth(y, seed), out)
    assert not torch.equal(every_fifth(y, seed + 1), out)


@pytest.mark.parametrize("probe", PROBES)
def test_wrong_data_is_refused(probe):
    x, y, test, targets = clouds(3, [30, 10])
    with pytest.raises(ValueError, match="no class has two images"):
        probe(x[:3], torch.arange(3), test, targets)
    with pytest.raises(ValueError, match="train has 30 embeddings and 29 classes"):
        probe(x, y[:29], test, targets)
    with pytest.raises(ValueError, match="held_out has 0 embeddings"):
        probe(x, y, test, targets, held_out=(x[:0], y[:0]))
    with pytest.raises(ValueError, match="test holds a negative class"):
        probe(x, y, test, targets - 5)
    test[3, 2] = float("inf")
    with pytest.raises(ValueError, match="test holds embeddings that are not finite"):
        probe(x, y, test, targets)


@pytest.mark.parametrize("probe", PROBES)
def test_inference_mode_changes_nothing(probe):
    x, y, test, targets = clouds(3, [40, 10])
    expected = probe(x, y, test, targets, replicates=0)
    with torch.inference_mode():
        assert probe(x.double().float(), y, test, targets, replicates=0).scores.metrics == expected.scores.metrics
