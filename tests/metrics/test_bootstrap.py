import numpy as np
import pytest
import torch
from scipy.stats import binom

import dualenc.metrics.bootstrap as bootstrap
from dualenc.metrics.bootstrap import BootstrapMetrics, mean
from dualenc.metrics.classification import classification_bootstrap, multilabel_bootstrap

EXPERIMENTS = 400


def kept_its_promise(hits):
    """At 95%, of 400: fewer than 342 or 400 hits have a probability below 1e-6 for a coverage between 92 and 96.5%.

    The percentile interval of a few hundred units, from 200 replicates, covers about 94%.
    """
    return binom.ppf(1e-6, EXPERIMENTS, 0.92) <= hits < EXPERIMENTS


def covered(truth, experiment):
    """How many of the intervals of independent experiments hold the truth."""
    found = [experiment(i) for i in range(EXPERIMENTS)]
    return sum(low <= truth <= high for low, high in found)


def only(measures, name):
    return measures._replace(statistics={name: measures.statistics[name]})


# Coverage


def test_a_mean_over_clusters():
    """Up to five values a unit, with much in common: the units must be drawn, not the values."""
    alone = []

    def experiment(i):
        unit = torch.arange(150).repeat_interleave(torch.randint(1, 6, (150,)))
        values = 0.3 + torch.randn(150)[unit] + 0.5 * torch.randn(len(unit))
        alone.append(BootstrapMetrics({"m": mean(values)}, len(unit)).intervals(replicates=200, seed=i)["m"])
        return BootstrapMetrics({"m": mean(values, unit)}, 150).intervals(replicates=200, seed=i)["m"]

    assert kept_its_promise(covered(0.3, experiment))
    assert sum(low <= 0.3 <= high for low, high in alone) < 0.85 * EXPERIMENTS  # the control


def outcome(target, chance_of_right):
    """Items of a classification into four classes, in which each image is right with its own chance."""
    rank = (torch.rand(len(target)) >= chance_of_right).long()
    confidence = torch.full((len(target),), 0.5, dtype=torch.float64)
    return {"target": target, "rank": rank, "confidence": confidence, "classes": torch.tensor(4)}


@pytest.mark.parametrize("name", ["acc1", "mean_per_class_recall"])
def test_an_accuracy_within_classes(name):
    """An easy and a hard class: of their sizes nothing is to be learned, so drawing across them is too wide."""
    target = torch.tensor([0] * 150 + [1] * 100 + [3] * 50)
    easy = torch.tensor([0.95, 0.15, 0.0, 0.6])
    truth = easy[target].mean().item() if name == "acc1" else easy[[0, 1, 3]].mean().item()
    widths = []

    def experiment(i):
        measures = only(classification_bootstrap(outcome(target, easy[target])), name)
        low, high = measures.intervals(replicates=200, seed=i)[name]
        if i < 20:
            across = measures._replace(strata=None).intervals(replicates=200, seed=i)[name]
            widths.append((across[1] - across[0]) / (high - low))
        return low, high

    assert kept_its_promise(covered(truth, experiment))
    assert name != "acc1" or np.mean(widths) > 1.3


@pytest.mark.long
def test_differences_of_models_that_fail_on_the_same():
    target, hard = torch.arange(4).repeat_interleave(75), 0.3
    widths = []

    def experiment(i):
        failed = torch.rand(300) < hard  # both
        here = outcome(target, torch.full((300,), 0.95).masked_fill(failed, 0.05))
        there = outcome(target, torch.full((300,), 0.98).masked_fill(failed, 0.08))
        here, there = (only(classification_bootstrap(items), "acc1") for items in (here, there))
        difference, low, high = here.differences(there, replicates=200, seed=i)["acc1"]
        assert difference == pytest.approx(there.values()["acc1"] - here.values()["acc1"], abs=1e-12)
        if i < 20:
            alone = [x.intervals(replicates=200, seed=i)["acc1"] for x in (here, there)]
            widths.append(sum((b - a) ** 2 for a, b in alone) ** 0.5 / (high - low))
        return low, high

    assert kept_its_promise(covered(0.03, experiment))
    assert np.mean(widths) > 1.3  # than what unpaired data would give


def labelled(images, classes, share):
    targets = torch.rand(images, classes) < share
    return multilabel_bootstrap({"scores": torch.randn(images, classes) + 1.2 * targets, "targets": targets})


@pytest.mark.slow
def test_mean_average_precision():
    """Its mean over samples of this size; 1,500 samples give it to 1/40 of the spread of one."""
    name = "mean_average_precision"
    truth = np.mean([labelled(200, 4, 0.2).values()[name] for _ in range(1500)])
    found = covered(truth, lambda i: labelled(200, 4, 0.2).intervals(replicates=200, seed=i)[name])
    assert kept_its_promise(found)


def test_replicates_of_rare_classes_lie_around_the_metric():
    """With copies of an image at its own place their median lies 0.8 spreads higher."""
    name, shifts = "mean_average_precision", []
    for i in range(40):
        measures = labelled(400, 20, 0.02)
        low, high = measures.intervals(replicates=200, seed=i)[name]
        median, _ = measures.intervals(level=1e-9, replicates=200, seed=i)[name]
        shifts.append((median - measures.values()[name]) / ((high - low) / 3.92))
    assert abs(np.mean(shifts)) < 0.35


@pytest.mark.long
def test_the_calibration_error_of_a_model_that_is_far_off():
    """Confidences between 1/2 and 1 that should be 0.2 lower."""

    def drawn(images):
        confidence = 0.5 + 0.5 * torch.rand(images, dtype=torch.float64)
        rank = (torch.rand(images) >= confidence - 0.2).long()
        target = torch.zeros(images, dtype=torch.int64)
        items = {"target": target, "rank": rank, "confidence": confidence, "classes": torch.tensor(4)}
        return only(classification_bootstrap(items), "ece")

    assert kept_its_promise(covered(0.2, lambda i: drawn(600).intervals(replicates=200, seed=i)["ece"]))


# The definition


def test_equals_the_definition_with_numpy():
    """Quantiles of the means of resampled units of different sizes: another generator, so within its noise."""
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
def test_every_draw_has_as_many_units_of_each_stratum_as_there_are(monkeypatch, cells):
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


def test_an_even_draw():
    """The counts of 40 units in 2,000 draws: their mean is within 6 standard errors of one, their variance near one."""
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


def test_is_deterministic_and_leaves_the_global_generator_alone():
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


def test_no_replicates_no_intervals():
    assert BootstrapMetrics({"m": mean(torch.rand(9))}, 9).intervals(replicates=0) == {}


def test_differences_are_of_the_metrics_that_both_have():
    here = BootstrapMetrics({"a": mean(torch.zeros(8)), "b": mean(torch.ones(8))}, 8)
    there = BootstrapMetrics({"b": mean(torch.full((8,), 3)), "c": mean(torch.ones(8))}, 8)
    assert here.differences(there) == {"b": (2, 2, 2)}


@pytest.mark.parametrize(
    ("units", "strata"), [(7, [0] * 7), (6, None), (6, [0, 0, 0, 1, 1, 0]), (6, [1, 1, 1, 2, 2, 2])]
)
def test_differences_of_other_units_are_refused(units, strata):
    here = BootstrapMetrics({"m": mean(torch.rand(6))}, 6, torch.tensor([0, 0, 0, 1, 1, 1]))
    there = BootstrapMetrics({"m": mean(torch.rand(units))}, units, None if strata is None else torch.tensor(strata))
    for one, other in ((here, there), (there, here)):
        with pytest.raises(ValueError, match="the same units"):
            one.differences(other)
