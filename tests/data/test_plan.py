import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualenc.data import EpochPlan


def order(counts, seed, epoch, batch, window):
    plan = EpochPlan(counts, seed, epoch, batch, window)
    return [plan[k] for k in range(len(plan))]


def reference(counts, seed, epoch, batch, window):
    """The plan by its definition in DESIGN.md, with lists: shards permuted, windows of W, permuted inside."""

    def permuted(items, *key):
        raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(len(items)) if items else []
        return [items[i] for _, i in sorted((int(value), i) for i, value in enumerate(raw))]

    numbers = iter(range(sum(counts)))
    shards = [list(itertools.islice(numbers, count)) for count in counts]
    shards = permuted(shards, seed, epoch, 0)
    samples = []
    for number, start in enumerate(range(0, len(shards), window)):
        inside = [sample for shard in shards[start : start + window] for sample in shard]
        samples += permuted(inside, seed, epoch, number + 1)
    return [samples[k * batch : (k + 1) * batch] for k in range(len(samples) // batch)]


layouts = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0)
seeds = st.integers(0, 2**40)


@settings(max_examples=40, deadline=None)
@given(layouts, seeds, st.integers(0, 1000), st.integers(1, 12), st.integers(1, 10))
def test_equals_an_independent_computation(counts, seed, epoch, batch, window):
    batch = min(batch, sum(counts))
    assert [b.tolist() for b in order(counts, seed, epoch, batch, window)] == reference(
        counts, seed, epoch, batch, window
    )


@settings(max_examples=80, deadline=None)
@given(layouts, seeds, st.integers(1, 12), st.integers(1, 10))
def test_each_sample_at_most_once_and_full_batches_only(counts, seed, batch, window):
    batch = min(batch, sum(counts))
    batches = order(counts, seed, 0, batch, window)
    seen = np.concatenate(batches)
    assert len(batches) == sum(counts) // batch
    assert len(seen) == batch * len(batches) == len(set(seen.tolist()))
    assert seen.min() >= 0
    assert seen.max() < sum(counts)


@settings(max_examples=50, deadline=None)
@given(layouts, seeds, st.integers(1, 10))
def test_batch_of_one_covers_everything(counts, seed, window):
    assert sorted(np.concatenate(order(counts, seed, 3, 1, window)).tolist()) == list(range(sum(counts)))


def test_is_a_pure_function(seed):
    counts = [50, 0, 70, 31]
    plan = EpochPlan(counts, seed, 2, 8, 2)
    forward = [plan[k].tolist() for k in range(len(plan))]
    again = EpochPlan(counts, seed, 2, 8, 2)
    backward = [again[k].tolist() for k in reversed(range(len(again)))][::-1]  # whatever was asked before
    assert forward == backward


def test_other_seed_and_other_epoch_differ(seed):
    counts = [40, 60, 20]
    base = np.concatenate(order(counts, seed, 5, 10, 2)).tolist()
    assert base != np.concatenate(order(counts, seed + 1, 5, 10, 2)).tolist()
    assert base != np.concatenate(order(counts, seed, 6, 10, 2)).tolist()
    assert base != sorted(base)


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_a_batch_comes_from_its_windows_shards_alone(seed, window):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 30, 11).tolist()
    shard_of = np.repeat(np.arange(len(counts)), counts)
    shards = np.argsort(np.random.Philox(np.random.SeedSequence((seed, 1, 0))).random_raw(len(counts)))
    windows = [shards[i : i + window].tolist() for i in range(0, len(counts), window)]
    bounds = np.cumsum([sum(counts[shard] for shard in part) for part in windows])
    for k, rows in enumerate(order(counts, seed, 1, 7, window)):
        first, last = np.searchsorted(bounds, [k * 7, k * 7 + 6], side="right")
        allowed = {shard for part in windows[first : last + 1] for shard in part}
        assert set(shard_of[rows].tolist()) <= allowed


def test_the_order_is_uniform_enough(seed):
    """Each of the 6 orders of 3 samples is as frequent as chance has it: chi-square, 5 degrees, below 30 (1.5e-5)."""
    found: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        key = tuple(np.concatenate(order([1, 2], seed, epoch, 1, 2)).tolist())
        found[key] = found.get(key, 0) + 1
    assert len(found) == 6
    assert sum((n - 200) ** 2 / 200 for n in found.values()) < 30


@pytest.mark.parametrize(("batch", "counts"), [(11, [4, 6]), (1, []), (1, [0, 0])])
def test_a_batch_larger_than_the_data_is_refused_with_both_numbers(batch, counts):
    with pytest.raises(ValueError, match=rf"{batch} is larger than the data, which has {sum(counts)} samples"):
        EpochPlan(counts, 0, 0, batch)


def test_senseless_sizes_are_refused():
    with pytest.raises(ValueError, match="batch size 0"):
        EpochPlan([3], 0, 0, 0)
    with pytest.raises(ValueError, match="window 0"):
        EpochPlan([3], 0, 0, 1, 0)


def test_no_batch_outside_the_epoch(seed):
    plan = EpochPlan([5, 5], seed, 0, 4)
    for k in (-1, 2, 3):
        with pytest.raises(IndexError):
            plan[k]
