import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dualenc.data import EpochPlan


def order(counts, seed, epoch, batch, window, sources=None):
    plan = EpochPlan(counts, seed, epoch, batch, window, sources)
    return [plan[k] for k in range(len(plan))]


def reference(counts, seed, epoch, batch, window, sources):
    """Compute the plan by its definition, sample by sample, with lists and fractions."""

    def permuted(items, *key):
        raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(len(items)) if items else []
        return [items[i] for _, i in sorted((int(value), i) for i, value in enumerate(raw))]

    numbers = iter(range(sum(counts)))
    shards = [list(itertools.islice(numbers, count)) for count in counts]
    source_of = [i for i, (number, _) in enumerate(sources) for _ in range(number)]
    wanted = [
        round(w * sum(map(len, (s for s, o in zip(shards, source_of) if o == i)))) for i, (_, w) in enumerate(sources)
    ]
    steps = sum(wanted) // batch
    edges = [sum(wanted[:i]) * steps * batch // sum(wanted) for i in range(len(wanted) + 1)]
    chunks = []  # (time, shard, samples)
    for i in range(len(sources)):
        take = edges[i + 1] - edges[i]
        own = permuted([s for s, owner in enumerate(source_of) if owner == i], seed, 1, i)
        endless = [(s, sample) for s in own for sample in shards[s]]
        taken = [endless[(epoch * take + n) % len(endless)] for n in range(take)]
        for number, start in enumerate(range(0, take, max(1, len(endless)))):
            part = taken[start : start + len(endless)]
            cuts = [n for n in range(len(part)) if not n or part[n][0] != part[n - 1][0] or part[n][1] < part[n - 1][1]]
            here = [part[a:b] for a, b in zip(cuts, [*cuts[1:], len(part)])]
            order = permuted(list(range(len(here))), seed, 2, epoch, i, number)
            for rank, at in enumerate(order):
                when = start / take + len(part) / take * (rank + 0.5) / len(here)
                chunks.append((when, here[at][0][0], [sample for _, sample in here[at]]))
    chunks.sort(key=lambda piece: piece[:2])
    samples = []
    for number, start in enumerate(range(0, len(chunks), window)):
        inside = [sample for *_, piece in chunks[start : start + window] for sample in piece]
        samples += permuted(inside, seed, 3, epoch, number)
    return [samples[k * batch : (k + 1) * batch] for k in range(steps)]


layouts = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0)
seeds = st.integers(0, 2**40)


weights = st.sampled_from([1, 1.0, 2, 0.5, 0.3, 1.7, 3.25, 0.01])


@st.composite
def several(draw):
    """Draw a layout and its sources: the shards are cut anywhere, and each part gets a weight."""
    counts = draw(layouts)
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(counts) - 1)), max_size=3)) if len(counts) > 1 else [])
    numbers = np.diff([0, *cuts, len(counts)]).tolist()
    sources = [(number, draw(weights)) for number in numbers]
    assume(length(counts, sources) > 0)
    return counts, sources


def length(counts, sources):
    edges = np.cumsum([0, *(number for number, _ in sources)])
    return sum(round(w * sum(counts[a:b])) for a, b, (_, w) in zip(edges, edges[1:], sources))


@settings(max_examples=150, deadline=None)
@given(several(), seeds, st.integers(0, 1000), st.integers(1, 12), st.integers(1, 10))
def test_equals_an_independent_computation(layout, seed, epoch, batch, window):
    counts, sources = layout
    batch = min(batch, length(counts, sources))
    found = [b.tolist() for b in order(counts, seed, epoch, batch, window, sources)]
    assert found == reference(counts, seed, epoch, batch, window, sources)
    if len(sources) == 1 and sources[0][1] == 1:
        assert found == [b.tolist() for b in order(counts, seed, epoch, batch, window)]


@settings(max_examples=60, deadline=None)
@given(several(), seeds, st.integers(1, 12), st.integers(1, 10))
def test_over_the_epochs_each_sample_of_a_source_is_used_equally_often(layout, seed, batch, window):
    """The left-out tail changes, and so do the parts that small weights take: counts differ by at most 1."""
    counts, sources = layout
    batch = min(batch, length(counts, sources))
    seen = np.zeros(sum(counts), dtype=int)
    edges = np.cumsum([0, *(number for number, _ in sources)])
    starts = np.cumsum([0, *counts])
    for epoch in range(12):
        batches = order(counts, seed, epoch, batch, window, sources)
        assert {len(b) for b in batches} == {batch}
        seen += np.bincount(np.concatenate(batches), minlength=len(seen))
        assert len(batches) == length(counts, sources) // batch
        for a, b in itertools.pairwise(edges):
            assert np.ptp(seen[starts[a] : starts[b]]) <= 1 if starts[b] > starts[a] else True
    for a, b, (_, weight) in zip(edges, edges[1:], sources):
        own = seen[starts[a] : starts[b]]
        # Less than a batch of an epoch is left out, of all sources in proportion.
        assert own.sum() <= 12 * round(weight * len(own))
        assert own.sum() > 12 * (round(weight * len(own)) * (1 - batch / length(counts, sources)) - 1) - 1


def test_sources_are_mixed_in_every_part_of_an_epoch(seed):
    """Every window of 20 shards has its share of a source with a tenth of the shards, whatever the seed."""
    counts, sources = [50] * 220, [(200, 1.0), (10, 1.0), (10, 2.0)]
    batches = order(counts, seed, 1, 100, 20, sources)
    for part in np.array_split(np.concatenate(batches), 11):  # 23 chunks each
        assert 0 < (part // 50 // 200 == 1).sum() < len(part) / 3


def test_each_epoch_leaves_out_another_tail(seed):
    left = [set(range(103)) - set(np.concatenate(order([50, 53], seed, epoch, 10, 2)).tolist()) for epoch in range(34)]
    assert all(len(part) == 3 for part in left)
    assert len(set.union(*left)) == 102  # 34 x 3: no sample is left out twice before all others were left out


def test_a_hundred_million_samples_need_little_memory(seed):
    """Ten thousand shards of ten thousand samples: only shards and three windows are in memory, not 2 GB of samples."""
    sources = [(8_000, 1.0), (2_000, 1.5)]
    tracemalloc.start()
    plan = EpochPlan([10_000] * 10_000, seed, 3, 32_768, 64, sources)
    for k in (0, len(plan) // 2, len(plan) - 1):
        assert len(np.unique(plan[k])) == 32_768
        assert plan[k].max() < 10**8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(plan) == 110_000_000 // 32_768
    assert peak < 100e6


def test_the_shards_of_a_window_are_those_of_its_batches(seed):
    counts, sources = [7, 0, 12, 5, 9, 30], [(4, 1.5), (2, 0.5)]
    plan = EpochPlan(counts, seed, 2, 4, 2, sources)
    shard_of = np.repeat(np.arange(6), counts)
    touched: dict[int, set[int]] = {}
    for k in range(len(plan)):
        first = plan.window_of(k)
        here = set(shard_of[plan[k]].tolist())
        last = plan.window_of(k + 1) if k + 1 < len(plan) else plan.windows - 1
        allowed = {int(s) for w in range(first, last + 1) for s in plan.shards_of(w)}
        assert here <= allowed
        touched.setdefault(first, set()).update(here)
    assert set.union(*touched.values()) == {int(s) for w in range(plan.windows) for s in plan.shards_of(w)}
    assert len(plan.shards_of(plan.windows)) == 0


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
    backward = [again[k].tolist() for k in reversed(range(len(again)))][
        ::-1
    ]  # the order of the requests does not matter
    assert forward == backward


def test_other_seed_and_other_epoch_differ(seed):
    counts = [40, 60, 20]
    base = np.concatenate(order(counts, seed, 5, 10, 2)).tolist()
    assert base != np.concatenate(order(counts, seed + 1, 5, 10, 2)).tolist()
    assert base != np.concatenate(order(counts, seed, 6, 10, 2)).tolist()
    assert base != sorted(base)


def test_the_order_is_uniform_enough(seed):
    """Each of the 6 orders of 3 samples is equally frequent: chi-square with 5 degrees below 30 (p = 1.5e-5)."""
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


def test_invalid_sizes_are_refused():
    with pytest.raises(ValueError, match="batch size 0"):
        EpochPlan([3], 0, 0, 0)
    with pytest.raises(ValueError, match="window 0"):
        EpochPlan([3], 0, 0, 1, 0)
    for weight in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"weight .* must be positive"):
            EpochPlan([3, 4], 0, 0, 1, 2, [(1, 1.0), (1, weight)])
    with pytest.raises(ValueError, match=r"sources have 3 shards .*expected 2"):
        EpochPlan([3, 4], 0, 0, 1, 2, [(1, 1.0), (2, 1.0)])


def test_batch_numbers_out_of_range(seed):
    plan = EpochPlan([5, 5], seed, 0, 4)
    for k in (-1, 2, 3):
        with pytest.raises(IndexError):
            plan[k]
