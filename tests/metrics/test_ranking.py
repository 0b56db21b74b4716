import math

import pytest
import torch
import torch.nn.functional as F
from helpers import brute_force, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import dualenc.metrics.ranking as ranking
from dualenc.metrics.ranking import TIE, Operands, QueryPairs, RankCounter, TopK, match_ranks, nearest, score_blocks

NONE = QueryPairs(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
KINDS = ["random", "twins", "coarse", "zero", "collapsed", "near"]


def draw(kind, q, c, width):
    """Draw queries and candidates; most kinds have equal or nearly equal scores."""
    queries, candidates = unit(q, width), unit(c, width)
    if kind == "twins":  # equal rows in both
        queries, candidates = queries[torch.randint(q, (q,))], candidates[torch.randint((c + 1) // 2, (c,))]
    elif kind == "coarse":  # many equal scores of different rows
        queries, candidates = queries.sign() / 2, candidates.sign() / 2
    elif kind == "zero":
        queries = torch.zeros_like(queries)
    elif kind == "collapsed":
        candidates = candidates[:1].expand(c, -1)
    elif kind == "near":  # differences that fp32 products cannot resolve, far above or far below a tie
        base = (candidates[:1] * 64).round() / 64
        queries, candidates = (base + torch.randint(-1, 2, x.shape) * 2.0**-24 for x in (queries, candidates))
    return queries, candidates


def several(queries, candidates, most=4):
    """Draw (Q, P) positives, different in each row, padded with -1 at random places."""
    positives = torch.full((queries, most), -1)
    for row in positives:
        count = int(torch.randint(1, min(most, candidates) + 1, ()))
        row[torch.randperm(most)[:count]] = torch.randperm(candidates)[:count]
    return positives


@pytest.mark.long
@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.integers(1, 80),
    st.integers(1, 20),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 3, 7, 40, 4096]),
    st.sampled_from(KINDS),
)
def test_equals_brute_force(seed, q, c, width, dtype, chunk, kind):
    torch.manual_seed(seed)
    queries, candidates = (x.to(dtype) for x in draw(kind, q, c, width))
    for positives in (torch.randint(c, (q,)), several(q, c)):
        ranks = match_ranks(queries, candidates, positives, chunk=chunk)
        assert ranks.dtype == torch.int64
        assert ranks.tolist() == brute_force(queries, candidates, positives)


@pytest.mark.parametrize("chunk", [1, 3, 7, 4096])
def test_ranks_resolve_score_differences_below_float32(chunk):
    """Candidates whose scores differ by 1e-10 are equal in float32, but ranked correctly."""
    width, count = 16, 23
    base, orthogonal = unit(1, width), unit(1, width)
    orthogonal = F.normalize(orthogonal - (orthogonal @ base.T) * base, dim=-1)
    steps = torch.randperm(count).double() * 1e-10
    candidates = base + steps[:, None] * base + 0.1 * torch.randn(count, 1, dtype=torch.float64) * orthogonal
    queries = base.expand(count, -1).contiguous()
    expected = (count - 1 - torch.round(steps / 1e-10)).long()
    assert len(set((queries.float()[0] @ candidates.float().T).tolist())) < count  # control
    assert torch.equal(match_ranks(queries, candidates, torch.arange(count), chunk=chunk), expected)
    scaled = match_ranks(queries * 3, candidates * 3, torch.arange(count), chunk=chunk)
    assert torch.equal(scaled, expected)
    order, _ = nearest(queries, candidates, count)
    assert order.tolist() == [torch.argsort(expected).tolist()] * count


def test_differences_below_the_tie_count_against_the_query():
    base = unit(1, 8)
    candidates = torch.cat([base, base * (1 - 1e-14), base * (1 + 1e-14), base * (1 - 1e-9), -base])
    assert match_ranks(base.expand(5, -1), candidates, torch.arange(5)).tolist() == [2, 2, 2, 3, 4]
    assert nearest(base, candidates.flip(0), 5)[0].tolist() == [[2, 3, 4, 1, 0]]


def test_ranks_do_not_depend_on_the_blocks():
    """The fp32 scores of near-duplicates depend on the order of summation; their ranks do not."""
    candidates = (unit(1, 64) + 1e-8 * torch.randn(200, 64, dtype=torch.float64)).float()
    queries = (candidates[:50].double() + 1e-8 * torch.randn(50, 64, dtype=torch.float64)).float()
    positives = torch.randint(200, (50,))
    expected = match_ranks(queries, candidates, positives)
    assert expected.tolist() == brute_force(queries, candidates, positives)
    for chunk in (7, 63, 200):
        assert torch.equal(match_ranks(queries, candidates, positives, chunk=chunk), expected)
    order = torch.randperm(200)
    moved = torch.argsort(order)[positives]
    assert torch.equal(match_ranks(queries, candidates[order], moved), expected)


def test_a_positive_named_twice_counts_once():
    queries, candidates = unit(6, 8), unit(9, 8)
    positives = torch.randint(9, (6,))
    twice = torch.stack([positives, positives, torch.full((6,), -1)], 1)
    assert torch.equal(match_ranks(queries, candidates, twice), match_ranks(queries, candidates, positives))


def test_embeddings_that_require_gradients():
    queries, candidates = unit(6, 8).requires_grad_(), unit(9, 8).requires_grad_()
    positives = torch.randint(9, (6,))
    ranks = match_ranks(queries, candidates, positives)
    assert ranks.tolist() == brute_force(queries.detach(), candidates.detach(), positives)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["queries", "candidates"])
def test_non_finite_embeddings_are_refused(value, side):
    arrays = {"queries": unit(3, 4), "candidates": unit(5, 4)}
    arrays[side][1, 2] = value
    with pytest.raises(ValueError, match=f"the {side} hold embeddings that are not finite"):
        match_ranks(**arrays, positives=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"the {side} hold embeddings that are not finite"):
        nearest(**arrays, k=1)


def test_products_that_overflow_are_refused():
    with pytest.raises(ValueError, match="normalize them"):
        nearest(1e20 * unit(3, 4), 1e20 * unit(3, 4), 1)


@pytest.mark.parametrize(
    ("positives", "cause"),
    [
        ([0, 1], "2 rows of positives for 3 queries"),
        ([0, 1, 5], "between 0 and 4"),
        ([0, 1, -1], "every query needs a positive"),
        ([[0, 1], [1, -1], [-1, -1]], "every query needs a positive"),
    ],
)
def test_positives_that_do_not_fit_are_refused(positives, cause):
    with pytest.raises(ValueError, match=cause):
        match_ranks(unit(3, 4), unit(5, 4), torch.tensor(positives))


# Nearest candidates


def nearest_by_sorting(queries, candidates, k, skip):
    """Sort the float64 scores of all pairs, ties by index, and return the first k of each query with their scores."""
    found, found_scores = [], []
    for query, skipped in zip(queries.double(), skip.tolist(), strict=True):
        scores = [math.fsum((query * candidate).tolist()) for candidate in candidates.double()]
        order = sorted((i for i in range(len(scores)) if i != skipped), key=lambda i: -scores[i])
        tied = dict.fromkeys(order, 0.0)
        for before, i in zip([order[0], *order], order):
            tied[i] = tied[before] if i != before and scores[before] - scores[i] < 1e-12 else scores[i]
        found.append(sorted(order, key=lambda i: (-tied[i], i))[:k])
        found_scores.append([scores[i] for i in found[-1]])
    return torch.tensor(found), torch.tensor(found_scores, dtype=torch.float64)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(2, 150),
    st.integers(1, 200),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from(KINDS),
    st.sampled_from([16, 512, 1 << 21]),
    st.booleans(),
)
def test_nearest_equals_sorting(seed, q, c, k, dtype, kind, cells, skipping):
    torch.manual_seed(seed)
    queries, candidates = (x.to(dtype) for x in draw(kind, q, c, 12))
    skip = torch.randint(-1, c, (q,)) if skipping else torch.full((q,), -1)
    k = min(k, c - int(skip.max() >= 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "CPU_SCORES", cells)
        patch.setattr(ranking, "MAX_PENDING", cells // 8)
        index, score = nearest(queries, candidates, k, skip=skip)
    expected, scores = nearest_by_sorting(queries, candidates, k, skip)
    assert index.dtype == torch.int64
    assert score.dtype == torch.float64
    assert torch.equal(index, expected)
    assert torch.allclose(score, scores, rtol=0, atol=2e-12)


def test_nearest_among_many_blocks_of_candidates(monkeypatch):
    """The bound of `TopK` rises from block to block: sorted candidates are its worst and its best case."""
    queries, candidates = unit(5, 8).float(), unit(900, 8).float()
    for direction in (1, -1):
        ordered = candidates[torch.argsort(direction * (candidates @ queries[0]))]
        expected, _ = nearest_by_sorting(queries, ordered, 20, torch.full((5,), -1))
        operands = Operands.from_embeddings(queries, ordered)
        top = TopK(operands, 20)
        monkeypatch.setattr(ranking, "MAX_PENDING", 50)
        for i, j, block, _ in score_blocks(operands, NONE, 33):
            top.update(block, i, j)
        assert torch.equal(top.result()[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_transposed_blocks_serve_the_other_direction(kind):
    """Ranks and first candidates with the candidates as queries are correct for every size of the blocks."""
    queries, candidates = (x.float() for x in draw(kind, 70, 110, 12))
    operands = Operands.from_embeddings(queries, candidates)
    query, candidate = torch.nonzero(torch.rand(70, 110) < 0.1).unbind(1)
    exact = (candidates.double() @ queries.double().T).index_put((candidate, query), torch.tensor(-torch.inf).double())
    threshold = exact.masked_fill(exact == -torch.inf, 0)[:, 0]
    for chunk in (5, 32, 50, 4096):
        counter, top = RankCounter(operands.swap(), threshold), TopK(operands.swap(), 6)
        for i, j, _, transposed in score_blocks(operands, QueryPairs(query, candidate), chunk):
            counter.update(transposed, j, i)
            top.update(transposed, j, i)
        assert torch.equal(counter.counts, (exact >= threshold[:, None] - TIE).sum(1))
        index, score = top.result()
        best = exact.topk(6).values
        assert torch.allclose(score, best, rtol=0, atol=2e-12)
        assert torch.allclose(exact.gather(1, index.clamp(min=0)).masked_fill(index < 0, -torch.inf), score)


def test_nearest_with_few_candidates():
    queries, candidates = unit(3, 4), unit(5, 4)
    assert nearest(queries, candidates, 9)[0].shape == (3, 5)
    assert nearest(queries, candidates, 9, skip=torch.tensor([-1, 2, -1]))[0].shape == (3, 4)
    with pytest.raises(ValueError, match="no neighbors among 1 candidates"):
        nearest(queries, candidates[:1], 2, skip=torch.tensor([0, -1, -1]))
    with pytest.raises(ValueError, match="no neighbors among 5 candidates"):
        nearest(queries, candidates, 0)
    with pytest.raises(ValueError, match="skip needs 3 indices below 5"):
        nearest(queries, candidates, 2, skip=torch.tensor([5, -1, -1]))


class Largest(TorchDispatchMode):
    """A mode that measures the largest tensor storage of any operation, in numbers."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return found


@pytest.mark.parametrize("kind", ["random", "collapsed", "near"])
def test_no_tensor_holds_the_whole_product(monkeypatch, kind):
    monkeypatch.setattr(ranking, "CPU_SCORES", 1 << 12)
    monkeypatch.setattr(ranking, "CPU_PAIRS", 1 << 10)
    monkeypatch.setattr(ranking, "MAX_PENDING", 1 << 12)
    queries, candidates = (x.float() for x in draw(kind, 600, 700, 8))
    with Largest() as whole:
        queries @ candidates.T
    assert whole.most == 600 * 700  # control
    with Largest() as seen:
        match_ranks(queries, candidates, torch.randint(700, (600,)), chunk=128)
        nearest(queries, candidates, 7)
    assert seen.most < 600 * 700 / 8


@pytest.mark.parametrize("kind", ["collapsed", "near"])
def test_few_pairs_are_gathered_where_all_scores_are_undecided(monkeypatch, kind):
    """Gathering all pairs of a collapsed model one by one would take minutes."""
    queries, candidates = (x.float() for x in draw(kind, 300, 640, 8))
    gathered, exact = [], Operands.exact_scores

    def count(self, query, candidate):
        gathered.append(len(query))
        return exact(self, query, candidate)

    monkeypatch.setattr(Operands, "exact_scores", count)
    match_ranks(queries, candidates, torch.randint(640, (300,)))
    assert gathered == [300]  # the positives
    nearest(queries, candidates, 5)
    assert sum(gathered) < 300 * 640 / 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_equals_cpu(kind):
    queries, candidates = (x.float() for x in draw(kind, 70, 300, 48))
    positives = several(70, 300)
    torch.set_float32_matmul_precision("medium")
    try:
        ranks = match_ranks(queries.cuda(), candidates.cuda(), positives, chunk=100)
        index, score = nearest(queries.cuda(), candidates.cuda(), 20, skip=positives.amax(1))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(ranks, match_ranks(queries, candidates, positives))
    expected, scores = nearest(queries, candidates, 20, skip=positives.amax(1))
    assert torch.equal(index, expected)
    assert torch.allclose(score, scores, rtol=0, atol=1e-13)
