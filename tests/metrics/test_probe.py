import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

import dualenc.metrics.classification as zeroshot
from dualenc.metrics.classification import classification_bootstrap
from dualenc.metrics.probe import NEIGHBOURS, _every_fifth, knn_probe, linear_probe, logistic_regression

PROBES = [linear_probe, knn_probe]


def clouds(classes, sizes, width=12, noise=0.35):
    """Unit vectors around a center of their class, as many sets as sizes, with much in common as embeddings have."""
    centers, common = F.normalize(torch.randn(classes, width), dim=1), F.normalize(torch.randn(1, width), dim=1)
    found = []
    for size in sizes:
        y = torch.randint(classes, (size,))
        found += [F.normalize(centers[y] + 1.5 * common + noise * torch.randn(size, width), dim=1), y]
    return found


# Logistic regression


@pytest.mark.parametrize("c", [1e-4, 0.1, 3.0, 100.0])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_fit_is_scikit_learns(c, classes):
    x, y = clouds(classes, [150], noise=0.6)
    fit = logistic_regression(x, y, c)
    assert fit.gradient < 1e-7
    # Of two classes scikit-learn has the difference, which is as long as both rows at half the strength.
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
    """In plain coordinates, by autograd, for class numbers with gaps; blocks of a few images."""
    monkeypatch.setattr(zeroshot, "_CELLS", 40)
    x, y = clouds(4, [90], noise=0.8)
    fit = logistic_regression(x, 3 * y + 1, c)
    assert fit.classes.tolist() == [1, 4, 7, 10]
    weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    loss = F.cross_entropy(x.double() @ weight.T + bias, y) + weight.square().sum() / (2 * c * len(x))
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    # A step of the gradient's size over the curvature, which the penalty bounds from below.
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-6 * max(1, 1 / (c * len(x)) ** 0.5)
    near = F.cross_entropy(x.double() @ weight.T, y) + weight.square().sum() / (2 * c * len(x))
    assert near > loss or bias.abs().max() < 1e-6  # the bias is not held back


def test_embeddings_without_spread():
    """Nothing to learn from: the shares of the classes remain."""
    y = torch.tensor([0] * 30 + [1] * 10)
    fit = logistic_regression(torch.ones(40, 5), y, 1.0)
    assert fit.weight.abs().max() < 1e-6
    assert fit.bias.softmax(0).tolist() == pytest.approx([0.75, 0.25], abs=1e-6)


def test_the_linear_probe_end_to_end():
    """Each held-out accuracy, the choice and the result are those of scikit-learn."""
    x, y, u, v, test, targets = clouds(6, [120, 60, 200], noise=0.7)
    probe = linear_probe(x, y, test, targets, held=(u, v))

    def fitted(x, y, c):
        return LogisticRegression(C=c, tol=1e-9, max_iter=20000).fit(x.double().numpy(), y)

    tried = {float(key): value for key, value in probe.held.items()}
    assert {1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6} <= set(tried)
    assert 10 <= len(tried) <= 15
    places = [8 * math.log10(c) for c in tried]
    assert all(abs(place - round(place)) < 0.02 for place in places)
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


# Neighbors


def vote(distance):
    return np.exp((1 - distance) / 0.07)


def test_the_neighbors_probe_is_scikit_learns():
    x, y, u, v, test, targets = clouds(6, [300, 80, 150], noise=0.7)
    x, u, test = (F.normalize(part.double(), dim=1) for part in (x, u, test))  # scikit-learn does it in any case
    probe = knn_probe(x, y, test, targets, held=(u, v))

    def fitted(x, y, k):
        return KNeighborsClassifier(k, weights=vote, metric="cosine", algorithm="brute").fit(x, y)

    ks = [k for k in NEIGHBOURS if k <= 300]
    assert list(probe.held) == [str(k) for k in ks]
    expected = {str(k): accuracy_score(v, fitted(x, y, k).predict(u)) for k in ks}
    assert probe.held == pytest.approx(expected, abs=1e-12)
    k = max(k for k in ks if expected[str(k)] == max(expected.values()))
    assert probe.chosen == {"k": k}
    shares = fitted(torch.cat([x, u]), torch.cat([y, v]), k).predict_proba(test)
    items = probe.scores.items
    assert (items["confidence"] - torch.tensor(shares.max(1))).abs().max() < 1e-9
    own = shares[np.arange(150), targets]
    close = np.isclose(shares, own[:, None], atol=1e-12, rtol=1e-10)
    assert items["rank"].tolist() == (((shares > own[:, None]) | close).sum(1) - 1).tolist()
    assert probe.scores.metrics["acc1"] == pytest.approx(accuracy_score(targets, shares.argmax(1)), abs=1e-12)


def test_neighbors_that_tie_are_wrong_and_votes_are_weighed():
    """Two neighbors of one class at 0.9, one of another at 1: 2 exp(0.9 / 0.07) is less than exp(1 / 0.07)."""
    test = torch.tensor([[1.0, 0.0]])
    near, far = [1.0, 0.0], [0.9, 0.19**0.5]
    held = (torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    train = torch.tensor([near, far, far, [-1.0, 0.0], [-1.0, 0.0]])
    y = torch.tensor([0, 1, 1, 2, 2])
    probe = knn_probe(train, y, test, torch.tensor([0]), held=held)
    assert probe.chosen == {"k": 5}
    assert probe.scores.metrics["acc1"] == 1
    strong, weak = 2.0, 2 * math.exp(-0.1 / 0.07)  # with the one held out, over exp(1 / 0.07)
    assert probe.scores.items["confidence"].item() == pytest.approx(strong / (strong + weak), abs=1e-6)
    tied = knn_probe(train[:1].expand(4, -1), torch.tensor([0, 0, 1, 1]), test, torch.tensor([1]))
    assert tied.scores.items["rank"].tolist() == [1]


# Both


@pytest.mark.parametrize("probe", PROBES)
def test_the_result_is_of_its_items_and_repeats(probe):
    x, y, test, targets = clouds(5, [100, 60], noise=0.3)
    state = torch.get_rng_state()
    found = probe(x, y, test, targets, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    again = probe(x, y, test, targets, seed=3)
    assert (again.scores[:3], again.chosen, again.held, again.missing) == (
        found.scores[:3], found.chosen, found.held, found.missing)  # fmt: skip
    metrics, intervals, chance, items = found.scores
    assert set(metrics) == set(intervals) | {"ece"} == {"acc1", "acc5", "mean_per_class_recall", "ece"}
    assert chance == pytest.approx({"acc1": 0.2, "acc5": 1.0, "mean_per_class_recall": 0.2})
    assert classification_bootstrap(items).values() == metrics
    assert torch.equal(items["target"], targets)
    assert metrics["acc1"] > 0.3
    assert probe(x, y, test, targets, seed=3, replicates=0).scores.intervals == {}


@pytest.mark.parametrize("probe", PROBES)
def test_what_is_held_out_is_learned_from_in_the_end(probe):
    """Of a class that stands only there, and classes that stand nowhere but in the test."""
    x, y, u, v, test, targets = clouds(8, [90, 60, 80], noise=0.04)
    kept = (y != 2) & (y != 5) & (y != 7)
    here = (v != 5) & (v != 7)
    found = probe(x[kept], y[kept], test, targets, held=(u[here], v[here]))
    assert found.missing == [5, 7]
    items = found.scores.items
    answer = items["answer"]
    assert not bool(((answer == 5) | (answer == 7)).any())
    assert bool((items["rank"][targets == 2] < 6).any())
    lost = (targets == 5) | (targets == 7)
    assert bool((items["rank"][lost] == 7).all())  # all others stand before, and the two tie
    assert items["classes"].item() == 8


@pytest.mark.parametrize("probe", PROBES)
def test_the_split_is_what_the_seed_says(probe):
    x, y, test, targets = clouds(4, [100, 40], noise=0.9)
    out = _every_fifth(y, 7)
    apart = probe(x[~out], y[~out], test, targets, held=(x[out], y[out]), replicates=0)
    alone = probe(x, y, test, targets, seed=7, replicates=0)
    assert alone.held == apart.held
    assert alone.chosen["C" if probe is linear_probe else "k"] == apart.chosen["C" if probe is linear_probe else "k"]
    assert alone.scores.metrics == pytest.approx(apart.scores.metrics, abs=1e-5)


def test_a_fifth_of_each_class_is_held_out(seed):
    sizes = torch.randint(1, 40, (12,))
    sizes[0], sizes[1] = 1, 2
    y = torch.arange(12).repeat_interleave(sizes)[torch.randperm(int(sizes.sum()))]
    out = _every_fifth(y, seed)
    for number, size in enumerate(sizes.tolist()):
        held = int(out[y == number].sum())
        assert size > 1 or held == 0
        assert size == 1 or size // 5 <= held <= -(-size // 5)
        assert held < size
    assert abs(int(out.sum()) - (y.bincount()[y] > 1).sum() / 5) < 1
    assert torch.equal(_every_fifth(y, seed), out)
    assert not torch.equal(_every_fifth(y, seed + 1), out)


@pytest.mark.parametrize("probe", PROBES)
def test_what_cannot_be_probed_is_refused(probe):
    x, y, test, targets = clouds(3, [30, 10])
    with pytest.raises(ValueError, match="no class has two images"):
        probe(x[:3], torch.arange(3), test, targets)
    with pytest.raises(ValueError, match="train has 30 embeddings and 29 classes"):
        probe(x, y[:29], test, targets)
    with pytest.raises(ValueError, match="held has 0 embeddings"):
        probe(x, y, test, targets, held=(x[:0], y[:0]))
    with pytest.raises(ValueError, match="test holds a negative class"):
        probe(x, y, test, targets - 5)
    test[3, 2] = float("inf")
    with pytest.raises(ValueError, match="test holds embeddings that are not finite"):
        probe(x, y, test, targets)


@pytest.mark.parametrize("probe", PROBES)
def test_in_inference_mode_as_well(probe):
    x, y, test, targets = clouds(3, [40, 10])
    expected = probe(x, y, test, targets, replicates=0)
    with torch.inference_mode():
        assert probe(x.double().float(), y, test, targets, replicates=0).scores.metrics == expected.scores.metrics
