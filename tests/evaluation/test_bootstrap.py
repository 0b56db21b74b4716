import numpy as np
import pytest
import torch

from dualenc.evaluation.bootstrap import bootstrap_mean


def test_covers_the_true_mean_about_as_often_as_promised():
    """300 experiments at 95%: fewer than 262 or more than 299 hits have a probability below 1e-6 and 1e-5."""
    hits = 0
    for i in range(300):
        low, high = bootstrap_mean((torch.rand(80) < 0.4).double(), replicates=250, seed=i)
        hits += low <= 0.4 <= high
    assert 258 <= hits <= 299


def test_levels_nest_and_narrow_with_more_data():
    values = torch.randn(400)
    wide, narrow = bootstrap_mean(values, level=0.99), bootstrap_mean(values, level=0.5)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]
    few = bootstrap_mean(values[:40])
    many = bootstrap_mean(values)
    assert few[1] - few[0] > 1.8 * (many[1] - many[0])


def test_clusters_widen_it():
    """Five equal values a group carry the information of one: the interval is sqrt(5) times as wide."""
    group = torch.arange(100).repeat_interleave(5)
    values = torch.randn(100)[group]
    alone, together = bootstrap_mean(values), bootstrap_mean(values, group)
    assert (together[1] - together[0]) / (alone[1] - alone[0]) == pytest.approx(5**0.5, rel=0.2)
    shuffle = torch.randperm(500)
    assert bootstrap_mean(values[shuffle], group[shuffle]) == pytest.approx(together, abs=1e-12)


def test_equals_the_definition_with_numpy():
    """Quantiles of the means of resampled groups of different sizes: another generator, so within its noise."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    sizes = rng.integers(1, 6, 60)
    groups = [rng.normal(size=size) + rng.normal() for size in sizes]
    means = []
    for _ in range(4000):
        drawn = [groups[i] for i in rng.integers(60, size=60)]
        means.append(np.concatenate(drawn).mean())
    expected = np.quantile(means, [0.05, 0.95])
    group = torch.arange(60).repeat_interleave(torch.tensor(sizes))
    found = bootstrap_mean(torch.tensor(np.concatenate(groups)), group, level=0.9, replicates=4000)
    assert found == pytest.approx(expected.tolist(), abs=0.15 * (expected[1] - expected[0]))


def test_is_deterministic_and_leaves_the_global_generator_alone():
    values = torch.rand(50)
    state = torch.get_rng_state()
    first = bootstrap_mean(values)
    assert torch.equal(state, torch.get_rng_state())
    assert bootstrap_mean(values) == first
    assert bootstrap_mean(values, seed=1) != first
    assert all(isinstance(bound, float) for bound in first)


def test_values_without_spread():
    assert bootstrap_mean(torch.ones(9)) == (1.0, 1.0)
    assert bootstrap_mean(torch.tensor([0.25])) == (0.25, 0.25)
