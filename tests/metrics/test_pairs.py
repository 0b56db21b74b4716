import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dualenc.metrics.bootstrap import BootstrapMetrics
from dualenc.metrics.pairs import text_pair_bootstrap, text_pair_items
from dualenc.metrics.retrieval import retrieval_metrics

DIM = 6


def unit(count, dim=DIM):
    return F.normalize(torch.randn(count, dim), dim=1)


def draw(firsts, seconds, count):
    """Draw pairs of texts, some of which occur again and again; return their vectors, ids, and the relation."""
    vectors = unit(firsts), unit(seconds)
    number = torch.stack([torch.randint(firsts, (count,)), torch.randint(seconds, (count,))], 1)
    names = [torch.randint(-(2**62), 2**62, (size,)) for size in (firsts, seconds)]
    ids = torch.stack([names[side][number[:, side]] for side in (0, 1)], 1)
    return *(vectors[side][number[:, side]] for side in (0, 1)), ids, number.tolist(), vectors


def by_hand(number, vectors):
    """Compute the metrics by their definition, one query at a time."""
    found = {}
    for name, by in (("first", 1), ("second", 0)):
        relevant = {}
        for pair in number:
            relevant.setdefault(pair[by], set()).add(pair[1 - by])
        candidates = {pair[1 - by] for pair in number}
        best, ndcg = [], []
        for query, right in relevant.items():
            score = {c: float(vectors[by][query].double() @ vectors[1 - by][c].double()) for c in candidates}
            order = sorted(candidates, key=lambda c: (-score[c], c in right))  # a tie counts against the query
            ranks = [rank for rank, c in enumerate(order) if c in right]
            best.append(ranks[0])
            ideal = sum(1 / math.log2(2 + rank) for rank in range(min(10, len(right))))
            ndcg.append(sum(1 / math.log2(2 + rank) for rank in ranks if rank < 10) / ideal)
        for k in (1, 5, 10):
            if k <= len(candidates):
                found[f"{name}_retrieval_recall@{k}"] = sum(rank < k for rank in best) / len(best)
        found[f"{name}_retrieval_ndcg@10"] = sum(ndcg) / len(ndcg)
        if name == "first":
            found["median_rank"] = float(torch.tensor(best).double().quantile(0.5)) + 1
            found["mrr"] = sum(1 / (1 + rank) for rank in best) / len(best)
    both = [found[f"{name}_retrieval_recall@1"] for name in ("first", "second")]
    return {**found, "mean_recall@1": sum(both) / 2}


@pytest.mark.parametrize(("firsts", "seconds", "count"), [(1, 1, 1), (1, 4, 6), (30, 4, 60), (25, 30, 40), (3, 2, 30)])
def test_metrics_equal_a_loop_over_distinct_texts(firsts, seconds, count):
    first, second, ids, number, vectors = draw(firsts, seconds, count)
    found = text_pair_bootstrap(text_pair_items(first, second, ids)).values()
    assert found == pytest.approx(by_hand(number, vectors), abs=1e-12)
    order = torch.randperm(count)
    again = text_pair_bootstrap(text_pair_items(first[order], second[order], ids[order])).values()
    assert again == pytest.approx(found, abs=1e-12)


def test_distinct_pairs_have_the_metrics_of_images_with_captions():
    """A passage and its questions are an image and its captions; without equal texts every pair has its own."""
    for passages, count in ((30, 30), (8, 40)):
        owner = torch.cat([torch.arange(passages), torch.randint(passages, (count - passages,))])
        passage, question = unit(passages), unit(count)
        ids = torch.stack([torch.arange(count), owner], 1)
        found = text_pair_bootstrap(text_pair_items(question, passage[owner], ids))
        reverse = text_pair_bootstrap(text_pair_items(passage[owner], question, ids.flip(1)))
        expected = retrieval_metrics(passage, question, owner, replicates=200)
        names = {"image_retrieval": "first_retrieval", "text_retrieval": "second_retrieval"}
        for name, value in expected.metrics.items():
            if "all@" in name:
                continue
            for old, new in names.items():
                name = name.replace(old, new)
            assert reverse.values()[name] == pytest.approx(value, abs=1e-12)
        assert found.values()["second_retrieval_recall@1"] == reverse.values()["first_retrieval_recall@1"]
        # The units are the passages, whose numbers are in another order.
        assert reverse.units == passages
        wide = reverse.intervals(replicates=200)["first_retrieval_recall@5"]
        assert wide == pytest.approx(expected.intervals["image_retrieval_recall@5"], abs=0.25)


def relabeled(number):
    """Return the group of each pair: those that share a text, by a search over the pairs."""
    groups = []
    for pair in number:
        keys = {("first", pair[0]), ("second", pair[1])}
        touching = [group for group in groups if group & keys]
        groups = [group for group in groups if not group & keys] + [keys.union(*touching)]
    return groups


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=30), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_a_perfect_retriever_has_perfect_metrics(relation, number):
    """Texts that pairs connect have one vector, so every negative is orthogonal; a shuffled retriever fails."""
    torch.manual_seed(number)
    groups = relabeled(relation)
    # Only where a group is complete, all texts of the other side are positives.
    complete = [
        (one, other)
        for group in groups
        for kind, one in group
        for to, other in group
        if (kind, to) == ("first", "second")
    ]
    pairs = torch.tensor(complete + [complete[i] for i in torch.randint(len(complete), (5,)).tolist()])
    group_of = {key: i for i, group in enumerate(groups) for key in group}
    side = [
        torch.tensor([group_of[kind, one] for one in pairs[:, k].tolist()])
        for k, kind in enumerate(("first", "second"))
    ]
    basis = torch.eye(len(groups) + 1)
    items = text_pair_items(basis[side[0]], basis[side[1]], pairs)
    metrics = text_pair_bootstrap(items)
    values = metrics.values()
    assert values == pytest.approx(dict.fromkeys(values, 1.0), abs=1e-12)
    assert metrics.units == len(groups) == len(items["unit_of_first"].unique())
    if len(groups) > 1:
        shuffled = text_pair_bootstrap(
            text_pair_items(basis[side[0]], basis[(side[1] + 1) % len(groups)], pairs)
        ).values()
        assert shuffled["mean_recall@1"] == 0
    # Without equal texts the same vectors would not be perfect, since equal texts tie with each other.
    blind = text_pair_bootstrap(
        text_pair_items(basis[side[0]], basis[side[1]], torch.arange(len(pairs))[:, None].expand(-1, 2))
    )
    assert blind.values()["mean_recall@1"] < 1


def test_five_questions_of_a_passage():
    """The case that showed the fault: recall@1 was 0.2 for a perfect retriever."""
    passage = unit(20).repeat_interleave(5, 0)
    question = F.normalize(passage + 1e-3 * torch.randn(100, DIM), dim=1)
    ids = torch.stack([torch.arange(100), torch.arange(20).repeat_interleave(5)], 1)
    metrics = text_pair_bootstrap(text_pair_items(question, passage, ids))
    assert metrics.values()["second_retrieval_recall@1"] == metrics.values()["first_retrieval_recall@1"] == 1
    assert isinstance(metrics, BootstrapMetrics)
    assert metrics.units == 20
    blind = retrieval_metrics(question, passage, torch.arange(100), replicates=0).metrics
    assert blind["text_retrieval_recall@1"] == 0
