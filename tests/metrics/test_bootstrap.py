import numpy as np
import pytest
import torch
from scipy.stats import binom

import dualenc.metrics.bootstrap as bootstrap
from dualenc.metrics.bootstrap import BootstrapMetrics, mean
from dualenc.metrics.classification import classification_bootstrap, multilabel_bootstrap

EXPERIMENTS = 400


def is_nominal(hits):
    """Check that the coverage of 95% intervals is plausible.

    Of 400 intervals, fewer than 342 or all 400 hits have a probability below 1e-6 for a coverage between 92 and 96.5%.
    The percentile interval of a few hundred units, from 200 replicates, covers about 94%.
    """
    return binom.ppf(1e-6, EXPERIMENTS, 0.92) <= hits < EXPERIMENTS


def count_hits(truth, experiment):
    """Count the intervals of independent experiments that contain the truth."""
    found = [experiment(i) for i in range(EXPERIMENTS)]
    return sum(low <= truth <= high for low, high in found)


def only(measures, name):
    return measures._replace(statistics={name: measures.statistics[name]})


# Coverage


def test_coverage_of_a_mean_over_clusters():
    """The values of a unit, up to five, are correlated: the bootstrap must draw units, not values."""
    of_values = []

    def experiment(i):
        unit = torch.arange(150).repeat_interleave(torch.randint(1, 6, (150,)))
        values = 0.3 + torch.randn(150)[unit] + 0.5 * torch.randn(len(unit))
        of_values.append(BootstrapMetrics({"m": mean(values)}, len(unit)).intervals(replicates=200, seed=i)["m"])
        return BootstrapMetrics({"m": mean(values, unit)}, 150).intervals(replicates=200, seed=i)["m"]

    assert is_nominal(count_hits(0.3, experiment))
    assert sum(low <= 0.3 <= high for low, high in of_values) < 0.85 * EXPERIMENTS  # control


def outcome(target, chance_of_right):
    """Draw items of a classification into four classes, with the given probability of being right for each image."""
    rank = (torch.rand(len(target)) >= chance_of_right).long()
    confidence = torch.full((len(target),), 0.5, dtype=torch.float64)
    return {"target": target, "rank": rank, "confidence": confidence, "classes": torch.tensor(4)}


@pytest.mark.parametrize("name", ["acc1", "mean_per_class_recall"])
def test_coverage_of_accuracy_with_classes_as_strata(name):
    """The class sizes are fixed, so samples that vary them give intervals that are too wide."""
    target = torch.tensor([0] * 150 + [1] * 100 + [3] * 50)
    easy = torch.tensor([0.95, 0.15, 0.0, 0.6])
    truth = easy[target].mean().item() if name == "acc1" else easy[[0, 1, 3]].mean().item()
    widths = []

    def experiment(i):
        measures = only(classification_bootstrap(outcome(target, easy[target])), name)
        low, high = measures.intervals(replicates=200, seed=i)[name]
        if i < 20:
            unstratified = measures._replace(strata=None).intervals(replicates=200, seed=i)[name]
            widths.append((unstratified[1] - unstratified[0]) / (high - low))
        return low, high

    assert is_nominal(count_hits(truth, experiment))
    assert name != "acc1" or np.mean(widths) > 1.3


@pytest.mark.long
def test_coverage_of_paired_differences():
    """Two models fail on the same images: unpaired intervals would be wider."""
    target = torch.arange(4).repeat_interleave(75)
    widths = []

    def experiment(i):
        hard = torch.rand(300) < 0.3  # for both models
        one = outcome(target, torch.full((300,), 0.95).masked_fill(hard, 0.05))
        other = outcome(target, torch.full((300,), 0.98).masked_fill(hard, 0.08))
        one, other = (only(classification_bootstrap(items), "acc1") for items in (one, other))
        difference, low, high = one.differences(other, replicates=200, seed=i)["acc1"]
        assert difference == pytest.approx(other.values()["acc1"] - one.values()["acc1"], abs=1e-12)
        if i < 20:
            unpaired = [x.intervals(replicates=200, seed=i)["acc1"] for x in (one, other)]
            widths.append(sum((b - a) ** 2 for a, b in unpaired) ** 0.5 / (high - low))
        return low, high

    assert is_nominal(count_hits(0.03, experiment))
    assert np.mean(widths) > 1.3


def multilabel(images, classes, share):
    targets = torch.rand(images, classes) < share
    return multilabel_bootstrap({"scores": torch.randn(images, classes) + 1.2 * targets, "targets": targets})


@pytest.mark.slow
def test_coverage_of_mean_average_precision():
    """The truth is the mean over 1,500 samples of this size, known to 1/40 of the spread of one sample."""
    name = "mean_average_precision"
    truth = np.mean([multilabel(200, 4, 0.2).values()[name] for _ in range(1500)])
    found = count_hits(truth, lambda i: multilabel(200, 4, 0.2).intervals(replicates=200, seed=i)[name])
    assert is_nominal(found)


def test_replicates_of_rare_classes_are_not_biased():
    """If copies of an image counted for the image itself, their median would be 0.8 standard deviations too high."""
    name, shifts = "mean_average_precision", []
    for i in range(40):
        measures = multilabel(400, 20, 0.02)
        low, high = measures.intervals(replicates=200, seed=i)[name]
        median, _ = measures.intervals(level=1e-9, replicates=200, seed=i)[name]
        shifts.append((median - measures.values()[name]) / ((high - low) / 3.92))
    assert abs(np.mean(shifts)) < 0.35


@pytest.mark.long
def test_coverage_of_the_calibration_error_of_a_miscalibrated_model():
    """All confidences, between 1/2 and 1, are 0.2 too high."""

    def draw(images):
        confidence = 0.5 + 0.5 * torch.rand(images, dtype=torch.float64)
        rank = (torch.rand(images) >= confidence - 0.2).long()
        target = torch.zeros(images, dtype=torch.int64)
        items = {"target": target, "rank": rank, "confidence": confidence, "classes": torch.tensor(4)}
        return only(classification_bootstrap(items), "ece")

    assert is_nominal(count_hits(0.2, lambda i: draw(600).intervals(replicates=200, seed=i)["ece"]))


# The definition


def test_equals_the_definition_with_numpy():
    """The intervals equal the quantiles of means of resampled units up to noise, since the generators differ."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    sizes = rng.integers(1, 6, 60)
    groups = [rng.normal(size=size) + rng.normal() for size in sizes]
    kind = rng.integers(0, 3, 60) * 2  # strata; 1 and 3 are empty
    means = []
    for _ in range(4000):
        rows = np.concatenate([rng.choice(np.flatnonzero(kind == k), (kind == k).sum()) for k in set(kind.tolist())])
        means.append(np.concatenate([groups[i] for i in rows]).mean())
    expected = np.quantile(means, [0.05, 0.95])
    values, unit = torch.tensor(np.concatenate(groups)), torch.arange(60).repeat_interleave(torch.tensor(sizes))
    shuffle = torch.randperm(len(unit))
    measures = BootstrapMetrics({"m": mean(values[shuffle], unit[shuffle])}, 60, torch.tensor(kind))
    assert measures.values()["m"] == pytest.approx(values.mean().item(), abs=1e-12)
    found = measures.intervals(level=0.9, replicates=4000)["m"]
    assert found == pytest.approx(expected.tolist(), abs=0.15 * (expected[1] - expected[0]))


@pytest.mark.parametrize("cells", [1, 300, 1 << 22])
def test_every_sample_keeps_the_sizes_of_the_strata(monkeypatch, cells):
    monkeypatch.setattr(bootstrap, "_CELLS", cells)
    strata = torch.randint(7, (90,)) * 3
    seen = []

    def watch(weights):
        seen.append(weights)
        return weights[:, 0]

    BootstrapMetrics({"w": watch}, 90, strata).intervals(replicates=50)
    weights = torch.cat(seen)
    assert weights.shape == (50, 90)
    assert torch.equal(weights, weights.round())
    assert len(weights.unique(dim=0)) == 50
    for number in strata.unique():
        own = weights[:, strata == number]
        assert bool((own.sum(1) == own.shape[1]).all())
    alone = torch.bincount(strata)[strata] == 1
    assert bool((weights[:, alone] == 1).all())


def test_all_units_are_equally_likely():
    """The counts of 40 units in 2,000 samples have a mean within 6 standard errors of one and a variance near one."""
    seen = []

    def watch(weights):
        seen.append(weights)
        return weights[:, 0]

    BootstrapMetrics({"w": watch}, 40).intervals(replicates=2000)
    weights = torch.cat(seen)
    assert bool(((weights.mean(0) - 1).abs() < 6 / 2000**0.5).all())
    assert weights.var(0).mean().item() == pytest.approx(1 - 1 / 40, rel=0.1)


def test_levels_nest_and_narrow_with_more_data():
    values = torch.randn(400)
    measures = BootstrapMetrics({"m": mean(values)}, 400)
    wide, narrow = (measures.intervals(level=level)["m"] for level in (0.99, 0.5))
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    few, many = BootstrapMetrics({"m": mean(values[:40])}, 40).intervals()["m"], measures.intervals()["m"]
    assert few[1] - few[0] > 1.8 * (many[1] - many[0])
    shifted = BootstrapMetrics({"m": mean(values + 1)}, 400)
    wide, narrow = (measures.differences(shifted, level=level)["m"] for level in (0.99, 0.5))
    assert wide == pytest.approx((1, 1, 1), abs=1e-6)
    assert narrow == pytest.approx((1, 1, 1), abs=1e-6)
    other = BootstrapMetrics({"m": mean(values + torch.randn(400))}, 400)
    wide, narrow = (measures.differences(other, level=level)["m"] for level in (0.99, 0.5))
    assert wide[1] < narrow[1] < wide[0] == narrow[0] < narrow[2] < wide[2]


def test_is_deterministic_without_the_global_generator():
    measures = BootstrapMetrics({"m": mean(torch.rand(50))}, 50, torch.randint(3, (50,)))
    state = torch.get_rng_state()
    first = measures.intervals()
    assert measures.differences(measures) == {"m": (0, 0, 0)}
    assert torch.equal(state, torch.get_rng_state())
    assert measures.intervals() == first
    assert measures.intervals(seed=1) != first
    assert all(isinstance(bound, float) for bound in first["m"])


def test_values_without_spread():
    assert BootstrapMetrics({"m": mean(torch.ones(9))}, 9).intervals() == {"m": (1.0, 1.0)}
    assert BootstrapMetrics({"m": mean(torch.tensor([0.25]))}, 1).intervals() == {"m": (0.25, 0.25)}


def test_zero_replicates_give_no_intervals():
    assert BootstrapMetrics({"m": mean(torch.rand(9))}, 9).intervals(replicates=0) == {}


def test_differences_of_the_metrics_that_both_have():
    one = BootstrapMetrics({"a": mean(torch.zeros(8)), "b": mean(torch.ones(8))}, 8)
    other = BootstrapMetrics({"b": mean(torch.full((8,), 3)), "c": mean(torch.ones(8))}, 8)
    assert one.differences(other) == {"b": (2, 2, 2)}


@pytest.mark.parametrize(
    ("units", "strata"), [(7, [0] * 7), (6, None), (6, [0, 0, 0, 1, 1, 0]), (6, [1, 1, 1, 2, 2, 2])]
)
def test_differences_of_other_units_are_refused(units, strata):
    metrics = BootstrapMetrics({"m": mean(torch.rand(6))}, 6, torch.tensor([0, 0, 0, 1, 1, 1]))
    others = BootstrapMetrics({"m": mean(torch.rand(units))}, units, None if strata is None else torch.tensor(strata))
    for one, other in ((metrics, others), (others, metrics)):
        with pytest.raises(ValueError, match="the same units"):
            one.differences(other)
