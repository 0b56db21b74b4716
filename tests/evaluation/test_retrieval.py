import math
import statistics
from itertools import permutations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dualenc.evaluation import match_ranks, recall_at, retrieval_answers, retrieval_metrics, retrieval_ranks


def brute_force(queries, candidates, positives):
    """Ranks by their definition, pair by pair, in float64; a difference below 1e-12 is a tie and counts."""
    ranks = []
    for query, own in zip(queries.double(), positives.reshape(len(queries), -1).tolist(), strict=True):
        own = {i for i in own if i >= 0}
        scores = [math.fsum((query * candidate).tolist()) for candidate in candidates.double()]
        best = max(scores[i] for i in own)
        ranks.append(sum(score >= best - 1e-12 for i, score in enumerate(scores) if i not in own))
    return ranks


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def several(queries, candidates, most=4):
    """(Q, P) positives, different ones in a row, padded with -1 at random places."""
    positives = torch.full((queries, most), -1)
    for row in positives:
        count = int(torch.randint(1, min(most, candidates) + 1, ()))
        row[torch.randperm(most)[:count]] = torch.randperm(candidates)[:count]
    return positives


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.integers(1, 14),
    st.integers(1, 20),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 3, 7, 4096]),
    st.sampled_from(["random", "twins", "coarse", "zero"]),
)
def test_equals_brute_force(seed, q, c, width, dtype, chunk, kind):
    torch.manual_seed(seed)
    queries, candidates = unit(q, width), unit(c, width)
    if kind == "twins":  # equal rows among both
        queries, candidates = queries[torch.randint(q, (q,))], candidates[torch.randint((c + 1) // 2, (c,))]
    elif kind == "coarse":  # many equal scores of different rows
        queries, candidates = queries.sign() / 2, candidates.sign() / 2
    elif kind == "zero":
        queries = torch.zeros_like(queries)
    queries, candidates = queries.to(dtype), candidates.to(dtype)
    for positives in (torch.randint(c, (q,)), several(q, c)):
        ranks = match_ranks(queries, candidates, positives, chunk=chunk)
        assert ranks.dtype == torch.int64
        assert ranks.tolist() == brute_force(queries, candidates, positives)


@pytest.mark.parametrize("chunk", [1, 3, 7, 4096])
def test_differences_that_single_precision_cannot_see(chunk):
    """Candidates apart by 1e-10 in score: all equal as float32, ranked right all the same."""
    width, count = 16, 23
    base, aside = unit(1, width), unit(1, width)
    aside = F.normalize(aside - (aside @ base.T) * base, dim=-1)
    steps = torch.randperm(count).double() * 1e-10
    candidates = base + steps[:, None] * base + 0.1 * torch.randn(count, 1, dtype=torch.float64) * aside
    queries = base.expand(count, -1).contiguous()
    expected = (count - 1 - torch.round(steps / 1e-10)).long()
    assert len(set((queries.float()[0] @ candidates.float().T).tolist())) < count  # the control
    assert torch.equal(match_ranks(queries, candidates, torch.arange(count), chunk=chunk), expected)
    scaled = match_ranks(queries * 3, candidates * 3, torch.arange(count), chunk=chunk)
    assert torch.equal(scaled, expected)


def test_differences_below_the_tie_count_against_the_query():
    base = unit(1, 8)
    candidates = torch.cat([base, base * (1 - 1e-14), base * (1 + 1e-14), base * (1 - 1e-9), -base])
    assert match_ranks(base.expand(5, -1), candidates, torch.arange(5)).tolist() == [2, 2, 2, 3, 4]


def test_ranks_do_not_depend_on_how_the_product_was_cut():
    """Near-duplicates, whose fp32 scores differ with the order of summation."""
    candidates = (unit(1, 64) + 1e-8 * torch.randn(200, 64, dtype=torch.float64)).float()
    queries = (candidates[:50].double() + 1e-8 * torch.randn(50, 64, dtype=torch.float64)).float()
    positives = torch.randint(200, (50,))
    expected = match_ranks(queries, candidates, positives)
    assert expected.tolist() == brute_force(queries, candidates, positives)
    for chunk in (7, 63, 200):
        assert torch.equal(match_ranks(queries, candidates, positives, chunk=chunk), expected)
    turn = torch.randperm(200)
    where = torch.argsort(turn)
    assert torch.equal(match_ranks(queries, candidates[turn], where[positives]), expected)


def test_another_matmul_precision_changes_nothing_and_comes_back():
    torch.set_float32_matmul_precision("medium")
    try:
        queries, candidates, positives = unit(9, 40).float(), unit(30, 40).float(), torch.randint(30, (9,))
        assert match_ranks(queries, candidates, positives).tolist() == brute_force(queries, candidates, positives)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_collapsed_model_has_the_worst_ranks():
    """All embeddings equal: a metric that breaks ties in its own favour would call this perfect."""
    same = unit(1, 8).expand(20, -1).float()
    assert match_ranks(same, same, torch.arange(20)).tolist() == [19] * 20
    metrics = retrieval_metrics(same, same, torch.arange(20)).metrics
    assert metrics["image_retrieval_recall@10"] == metrics["text_retrieval_recall@10"] == 0


def test_a_positive_named_twice_counts_once():
    queries, candidates = unit(6, 8), unit(9, 8)
    positives = torch.randint(9, (6,))
    twice = torch.stack([positives, positives, torch.full((6,), -1)], 1)
    assert torch.equal(match_ranks(queries, candidates, twice), match_ranks(queries, candidates, positives))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["queries", "candidates"])
def test_what_is_not_finite_is_refused(value, side):
    arrays = {"queries": unit(3, 4), "candidates": unit(5, 4)}
    arrays[side][1, 2] = value
    with pytest.raises(ValueError, match=f"the {side} hold embeddings that are not finite"):
        match_ranks(**arrays, positives=torch.zeros(3, dtype=torch.int64))


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


# Both directions


def ownership(images, texts):
    """Which image each text belongs to: all have one at least, in no order."""
    return torch.cat([torch.arange(images), torch.randint(images, (texts - images,))])[torch.randperm(texts)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(0, 20), st.sampled_from([1, 3, 7, 4096]), st.booleans())
def test_both_directions_equal_two_single_calls(seed, images, more, chunk, twins):
    torch.manual_seed(seed)
    owner = ownership(images, images + more)
    image, text = unit(images, 6), unit(len(owner), 6)
    if twins:
        text = text[torch.randint(len(text), (len(text),))]
    by_text, by_image = retrieval_ranks(image.float(), text.float(), owner, chunk=chunk)
    own = [torch.nonzero(owner == i)[:, 0].tolist() for i in range(images)]
    most = max(map(len, own))
    padded = torch.tensor([row + [-1] * (most - len(row)) for row in own])
    assert torch.equal(by_text, match_ranks(text.float(), image.float(), owner, chunk=chunk))
    assert torch.equal(by_image, match_ranks(image.float(), text.float(), padded, chunk=chunk))
    assert by_text.tolist() == brute_force(text.float(), image.float(), owner)
    assert by_image.tolist() == brute_force(image.float(), text.float(), padded)


@pytest.mark.parametrize("owner", [[0, 1, 1], [0, 1, 2, 3], [0, 2, 2]])
def test_an_image_without_text_is_refused(owner):
    with pytest.raises(ValueError, match="every image from 0 to 2"):
        retrieval_ranks(unit(3, 4), unit(len(owner), 4), torch.tensor(owner))


def test_recall_at():
    recall = recall_at(torch.tensor([0, 0, 3, 9, 10]), (1, 4, 10, 11))
    assert {name: round(value.item(), 6) for name, value in recall.items()} == {
        "recall@1": 0.4, "recall@4": 0.6, "recall@10": 0.8, "recall@11": 1.0}  # fmt: skip
    assert list(recall_at(torch.tensor([1]))) == ["recall@1", "recall@5", "recall@10"]


def clip_benchmark_recalls(image, text, owner, k):
    """CLIP_benchmark's definition (metrics/zeroshot_retrieval.py), in other words: sort, look at the first K."""
    scores = text.double() @ image.double().T
    hits = {"image": [], "text": []}
    for t in range(len(text)):
        hits["image"].append(int(owner[t]) in sorted(range(len(image)), key=lambda i: -scores[t, i])[:k])
    for i in range(len(image)):
        first = sorted(range(len(text)), key=lambda t: -scores[t, i])[:k]
        hits["text"].append(any(int(owner[t]) == i for t in first))
    return {f"{name}_retrieval_recall@{k}": sum(found) / len(found) for name, found in hits.items()}


@pytest.mark.parametrize("images", [10, 25])
def test_metrics_are_clip_benchmarks(images):
    owner = ownership(images, images * 4)
    image = unit(images, 12).float()
    text = F.normalize(image[owner] + 1.5 * unit(len(owner), 12).float(), dim=-1)
    metrics, intervals, chance, both_ways = retrieval_metrics(image, text, owner)
    expected = {}
    for k in (1, 5, 10):
        expected |= clip_benchmark_recalls(image, text, owner, k)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert 0.05 < expected["image_retrieval_recall@1"] < 1
    ranks = [rank + 1 for rank in brute_force(text, image, owner)]
    middle = sorted(ranks)
    assert metrics["median_rank"] == (middle[len(ranks) // 2 - 1] + middle[len(ranks) // 2]) / 2
    assert metrics["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks), abs=1e-12)
    both = expected["image_retrieval_recall@1"] + expected["text_retrieval_recall@1"]
    assert metrics["mean_recall@1"] == pytest.approx(both / 2, abs=1e-12)
    assert set(metrics) == {*expected, "mean_recall@1", "median_rank", "mrr"}
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())
    assert all(isinstance(value, float) for value in (*metrics.values(), *chance.values()))
    assert set(chance) == set(metrics)
    by_text, by_image = retrieval_ranks(image, text, owner)
    assert set(both_ways) == {"text", "image"}
    assert torch.equal(both_ways["text"], by_text)
    assert torch.equal(both_ways["image"], by_image)


def test_a_k_above_the_number_of_candidates_is_left_out():
    metrics, intervals, chance, _ = retrieval_metrics(unit(4, 5), unit(7, 5), torch.tensor([0, 1, 2, 3, 3, 3, 3]))
    assert set(chance) == set(metrics)
    assert {name for name in metrics if "@" in name} == {
        "image_retrieval_recall@1", "text_retrieval_recall@1", "text_retrieval_recall@5", "mean_recall@1"}  # fmt: skip
    assert set(intervals) <= set(metrics)


def test_other_ks():
    metrics = retrieval_metrics(unit(9, 5), unit(9, 5), torch.arange(9), ks=(2, 3)).metrics
    assert {"image_retrieval_recall@2", "text_retrieval_recall@3"} <= set(metrics)
    assert "image_retrieval_recall@1" not in metrics
    one = retrieval_metrics(unit(1, 5), unit(1, 5), torch.tensor([0]))
    for found in (one.metrics, one.chance):
        assert found["image_retrieval_recall@1"] == found["text_retrieval_recall@1"] == found["mrr"] == 1
        assert found["median_rank"] == found["mean_recall@1"] == 1


def test_the_order_of_images_and_texts_does_not_matter():
    owner = ownership(12, 30)
    image, text = unit(12, 6), unit(30, 6)
    metrics = retrieval_metrics(image, text, owner).metrics
    turn, shuffle = torch.randperm(12), torch.randperm(30)
    moved = retrieval_metrics(image[turn], text[shuffle], torch.argsort(turn)[owner[shuffle]]).metrics
    assert moved == pytest.approx(metrics, abs=1e-12)


# Chance


def test_chance_over_all_orders_there_are():
    """Three images with one, one and two captions: every joint order of the four queries, every order of the texts."""
    owner = torch.tensor([0, 1, 2, 2])[torch.randperm(4)]
    chance = retrieval_metrics(unit(3, 4), unit(4, 4), owner, ks=(1, 2, 3, 4), replicates=0).chance
    orders = list(permutations(range(3)))
    found: dict[str, list[float]] = {
        "median_rank": [],
        "mrr": [],
        **{f"image_retrieval_recall@{k}": [] for k in (1, 2, 3)},
    }
    for joint in product(orders, repeat=4):
        ranks = [order.index(own) + 1 for order, own in zip(joint, owner.tolist(), strict=True)]
        found["median_rank"].append(statistics.median(ranks))
        found["mrr"].append(statistics.mean(1 / rank for rank in ranks))
        for k in (1, 2, 3):
            found[f"image_retrieval_recall@{k}"].append(statistics.mean(rank <= k for rank in ranks))
    for k in (1, 2, 3, 4):
        found[f"text_retrieval_recall@{k}"] = [
            any(owner[text] == image for text in order[:k]) for image in range(3) for order in permutations(range(4))
        ]
    expected = {name: statistics.mean(map(float, values)) for name, values in found.items()}
    expected["mean_recall@1"] = (expected["image_retrieval_recall@1"] + expected["text_retrieval_recall@1"]) / 2
    assert chance == pytest.approx(expected, abs=1e-12)


def test_chance_is_the_mean_over_random_orders(seed):
    """Some images with many captions and some with one; 3,000 random orders, within 6 standard errors."""
    rng, images, draws = np.random.default_rng(seed), int(torch.randint(11, 16, ())), 3000
    owner = torch.cat([ownership(images, images + 12), torch.full((9,), 3)])
    chance = retrieval_metrics(unit(images, 4), unit(len(owner), 4), owner, replicates=0).chance
    own, texts = owner.numpy(), len(owner)
    scores = rng.random((draws, texts, images))
    by_text = (scores > scores[:, np.arange(texts), own][..., None]).sum(-1) + 1  # (D, T), 1-based
    scores = rng.random((draws, images, texts))
    mine = own == np.arange(images)[:, None]
    by_image = (scores > np.where(mine, scores, 0).max(-1, keepdims=True)).sum(-1) + 1  # (D, I)
    found = {f"image_retrieval_recall@{k}": (by_text <= k).mean(1) for k in (1, 5, 10)}
    found |= {f"text_retrieval_recall@{k}": (by_image <= k).mean(1) for k in (1, 5, 10)}
    found["mean_recall@1"] = (found["image_retrieval_recall@1"] + found["text_retrieval_recall@1"]) / 2
    found["median_rank"], found["mrr"] = np.median(by_text, 1), (1 / by_text).mean(1)
    assert set(chance) == set(found)
    for name, values in found.items():
        assert chance[name] == pytest.approx(values.mean(), abs=6 * values.std() / draws**0.5), name


# Answers


def scored(query, candidates):
    """Scores in float64, to 12 digits: what lies closer is a tie."""
    return [round(math.fsum((query.double() * candidate).tolist()), 12) for candidate in candidates.double()]


@pytest.mark.parametrize("kind", ["random", "twins", "coarse", "collapsed", "near"])
def test_answers_equal_brute_force(kind):
    images = int(torch.randint(2, 14, ()))
    owner = ownership(images, images + int(torch.randint(0, 20, ())))
    image = unit(images, 16)
    text = F.normalize(image[owner] + 0.8 * unit(len(owner), 16), dim=1)
    if kind == "twins":
        image, text = image[torch.randint(images, (images,))], text[torch.randint(len(text), (len(text),))]
    elif kind == "coarse":
        image, text = image.sign() / 4, text.sign() / 4
    elif kind == "collapsed":
        image, text = image[:1].expand(images, -1), image[:1].expand(len(text), -1)
    elif kind == "near":  # apart by less than fp32 products can tell
        image = F.normalize(image[:1] + 1e-7 * unit(images, 16), dim=1)
        text = F.normalize(image[:1] + 1e-7 * unit(len(text), 16), dim=1)
    image, text = image.float(), text.float()
    ranks = retrieval_metrics(image, text, owner, replicates=0).ranks
    count, k = int(torch.randint(1, 5, ())), int(torch.randint(1, 8, ()))
    found = retrieval_answers(image, text, owner, ranks, count, k)
    assert found == retrieval_answers(image, text, owner, ranks, count, k)
    assert set(found) == {"text", "image"}
    for asked, queries, candidates in (("text", text, image), ("image", image, text)):
        answers = found[asked]
        right = [answer.rank == 0 for answer in answers]
        assert right == sorted(right, reverse=True)
        assert sum(right) == min(count, int((ranks[asked] == 0).sum()))
        assert len(right) - sum(right) == min(count, int((ranks[asked] > 0).sum()))
        assert len({answer.query for answer in answers}) == len(answers)
        for answer in answers:
            assert answer.rank == ranks[asked][answer.query]
            scores = scored(queries[answer.query], candidates)
            own = [int(owner[answer.query])] if asked == "text" else torch.nonzero(owner == answer.query)[:, 0].tolist()
            order = sorted(range(len(scores)), key=lambda i: (-scores[i], i in own))
            assert len(answer.best) == min(k, len(scores))
            assert [(scores[i], i in own) for i in answer.best] == [(scores[i], i in own) for i in order[:k]]
            assert answer.scores == pytest.approx([scores[i] for i in answer.best], abs=1e-6)
            assert sorted(answer.right) == own
            assert [scores[i] for i in answer.right] == sorted((scores[i] for i in own), reverse=True)
            places = [place for place, i in enumerate(answer.best) if i in own]
            assert (answer.rank < len(answer.best)) == bool(places)
            assert not places or places[0] == answer.rank


def test_the_draw_of_answers_does_not_look_at_the_scores():
    """Whoever picks the nicest answers looks at them: other scores behind the same ranks must give the same queries."""
    owner = ownership(20, 45)
    image, text = unit(20, 8), unit(45, 8)
    ranks = {"text": torch.randint(3, (45,)), "image": torch.randint(3, (20,))}
    one = retrieval_answers(image, text, owner, ranks)
    two = retrieval_answers(unit(20, 8), unit(45, 8), owner, ranks)
    assert all([a.query for a in one[asked]] == [b.query for b in two[asked]] for asked in one)
    state = torch.get_rng_state()
    retrieval_answers(image, text, owner, ranks)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rank", [0, 4])
def test_answers_where_all_are_right_or_all_wrong(rank):
    ranks = {"text": torch.full((9,), rank), "image": torch.full((9,), rank)}
    found = retrieval_answers(unit(9, 5), unit(9, 5), torch.arange(9), ranks, count=4)
    assert [[answer.rank for answer in answers] for answers in found.values()] == [[rank] * 4] * 2
