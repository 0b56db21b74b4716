import math
import statistics
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import brute_force, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score
from torch.utils._python_dispatch import TorchDispatchMode

import dualenc.metrics.ranking as ranking
import dualenc.metrics.retrieval as retrieval
from dualenc.metrics.ranking import match_ranks
from dualenc.metrics.retrieval import (
    group_bootstrap,
    group_metrics,
    recall_at,
    retrieval_answers,
    retrieval_bootstrap,
    retrieval_metrics,
    retrieval_ranks,
)


def test_a_collapsed_model_has_the_worst_ranks():
    """A metric that breaks ties in favor of the query would call equal embeddings perfect."""
    same = unit(1, 8).expand(20, -1).float()
    assert match_ranks(same, same, torch.arange(20)).tolist() == [19] * 20
    metrics = retrieval_metrics(same, same, torch.arange(20)).metrics
    assert metrics["image_retrieval_recall@10"] == metrics["text_retrieval_recall@10"] == 0
    assert metrics["image_retrieval_ndcg@10"] == metrics["text_retrieval_ndcg@10"] == 0
    grouped = group_metrics(same, torch.arange(20) // 2).metrics
    assert grouped["recall@10"] == grouped["ndcg@10"] == 0
    assert grouped["mean_average_precision"] == pytest.approx(1 / 19)


# Both directions


def ownership(images, texts):
    """Draw the image of each text, in random order; each image has at least one text."""
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
    """Compute the recalls as in CLIP_benchmark (metrics/zeroshot_retrieval.py), by sorting."""
    scores = text.double() @ image.double().T
    hits = {"image": [], "text": []}
    for t in range(len(text)):
        hits["image"].append(int(owner[t]) in sorted(range(len(image)), key=lambda i: -scores[t, i])[:k])
    for i in range(len(image)):
        first = sorted(range(len(text)), key=lambda t: -scores[t, i])[:k]
        hits["text"].append(any(int(owner[t]) == i for t in first))
    return {f"{name}_retrieval_recall@{k}": sum(found) / len(found) for name, found in hits.items()}


@pytest.mark.parametrize("images", [10, 25])
def test_metrics_equal_clip_benchmark(images):
    owner = ownership(images, images * 4)
    image = unit(images, 12).float()
    text = F.normalize(image[owner] + 1.5 * unit(len(owner), 12).float(), dim=-1)
    metrics, intervals, chance, items = retrieval_metrics(image, text, owner)
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
    assert {name for name in metrics if "_all" not in name and "ndcg" not in name} == {
        *expected, "mean_recall@1", "median_rank", "mrr"}  # fmt: skip
    assert set(intervals) == set(metrics)
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())
    assert all(isinstance(value, float) for value in (*metrics.values(), *chance.values()))
    assert set(chance) == set(metrics)
    by_text, by_image = retrieval_ranks(image, text, owner)
    assert torch.equal(items["rank_by_text"], by_text)
    assert torch.equal(items["rank_by_image"], by_image)


def test_a_k_above_the_number_of_candidates_is_left_out():
    metrics, intervals, chance, _ = retrieval_metrics(unit(4, 5), unit(7, 5), torch.tensor([0, 1, 2, 3, 3, 3, 3]))
    assert set(chance) == set(metrics)
    assert {name for name in metrics if "@" in name} == {
        "image_retrieval_recall@1", "text_retrieval_recall@1", "text_retrieval_recall@5", "text_retrieval_all@5",
        "image_retrieval_ndcg@10", "text_retrieval_ndcg@10", "mean_recall@1"}  # fmt: skip
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
    images, texts = torch.randperm(12), torch.randperm(30)
    shuffled = retrieval_metrics(image[images], text[texts], torch.argsort(images)[owner[texts]]).metrics
    assert shuffled == pytest.approx(metrics, abs=1e-12)


# Chance


def test_chance_is_the_mean_over_all_orders():
    """With one, one and two captions of three images: all joint orders of the four queries, all orders of the texts."""
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
    every = list(permutations(range(4)))
    own = [[t for t in range(4) if owner[t] == i] for i in range(3)]
    for k in (2, 3, 4):
        expected[f"text_retrieval_all@{k}"] = statistics.mean(
            float(set(own[i]) <= set(order[:k])) for i in range(3) for order in every
        )
    gains = [1 / math.log2(rank + 1) for rank in (1, 2, 3, 4)]
    expected["image_retrieval_ndcg@10"] = statistics.mean(gains[:3])
    expected["text_retrieval_ndcg@10"] = statistics.mean(
        sum(gains[order.index(t)] for t in own[i]) / sum(gains[: len(own[i])]) for i in range(3) for order in every
    )
    assert chance == pytest.approx(expected, abs=1e-12)


def test_chance_is_the_mean_over_random_orders(seed):
    """The chance values are within 6 standard errors of 3,000 random orders; images have one or many captions."""
    rng, images, draws = np.random.default_rng(seed), int(torch.randint(11, 16, ())), 3000
    owner = torch.cat([ownership(images, images + 12), torch.full((10,), 3)])
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
    place = (-scores).argsort(-1).argsort(-1)  # (D, I, T), 0-based
    gain = np.where(place < 10, 1 / np.log2(place + 2), 0)
    ideal = np.array([sum(1 / np.log2(r + 2) for r in range(min(10, n))) for n in mine.sum(1)])
    found["text_retrieval_ndcg@10"] = ((gain * mine).sum(-1) / ideal).mean(1)
    found["image_retrieval_ndcg@10"] = np.where(by_text <= 10, 1 / np.log2(by_text + 1), 0).mean(1)
    assert set(chance) == set(found)  # An image has more than 10 texts, so there is no text_retrieval_all@K.
    for name, values in found.items():
        assert chance[name] == pytest.approx(values.mean(), abs=6 * values.std() / draws**0.5), name


# Answers


def scored(query, candidates):
    """Compute the scores in float64, with ties made equal."""
    scores = [math.fsum((query.double() * candidate).tolist()) for candidate in candidates.double()]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    for one, after in pairwise(order):
        if scores[one] - scores[after] < 1e-12:
            scores[after] = scores[one]
    return scores


KINDS = ["random", "twins", "coarse", "collapsed", "near"]


def draw(kind, images, owner):
    """Draw embeddings of images and of their texts; most kinds have equal or nearly equal scores."""
    image = unit(images, 16)
    text = F.normalize(image[owner] + 0.8 * unit(len(owner), 16), dim=1)
    if kind == "twins":
        image, text = image[torch.randint(images, (images,))], text[torch.randint(len(text), (len(text),))]
    elif kind == "coarse":
        image, text = image.sign() / 4, text.sign() / 4
    elif kind == "collapsed":
        image, text = image[:1].expand(images, -1), image[:1].expand(len(text), -1)
    elif kind == "near":  # differences that fp32 products cannot resolve, far above or far below a tie
        base = (image[:1] * 64).round() / 64
        image, text = (base + torch.randint(-1, 2, x.shape) * 2.0**-24 for x in (image, text))
    return image.float(), text.float()


def orders(queries, candidates, own):
    """Sort the candidates of each query, the best first and positives after ties; return the orders and the scores."""
    found = []
    for query, right in zip(queries, own, strict=True):
        scores = scored(query, candidates)
        found.append((sorted(range(len(scores)), key=lambda i: (-scores[i], i in right, i)), scores))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cells", [64, 1 << 21])
def test_items_equal_brute_force(monkeypatch, kind, cells):
    monkeypatch.setattr(ranking, "CPU_SCORES", cells)
    monkeypatch.setattr(ranking, "MAX_PENDING", 16)
    images = int(torch.randint(1, 14, ()))
    owner = ownership(images, images + int(torch.randint(0, 60, ())))
    image, text = draw(kind, images, owner)
    items = retrieval_metrics(image, text, owner, replicates=0).items
    assert torch.equal(items["owner"], owner)
    own = [torch.nonzero(owner == i)[:, 0].tolist() for i in range(images)]
    for direction, queries, candidates, positives in (
        ("text", text, image, [[int(i)] for i in owner]),
        ("image", image, text, own),
    ):
        best, score = items[f"best_by_{direction}"], items[f"score_by_{direction}"]
        assert best.shape == score.shape == (len(queries), min(5, len(candidates)))
        for query, (order, scores) in enumerate(orders(queries, candidates, positives)):
            ranks = [rank for rank, i in enumerate(order) if i in positives[query]]
            assert items[f"rank_by_{direction}"][query] == ranks[0]
            assert [(scores[i], i in positives[query]) for i in best[query].tolist()] == [
                (scores[i], i in positives[query]) for i in order[: best.shape[1]]]  # fmt: skip
            assert len(set(best[query].tolist())) == best.shape[1]
            assert score[query].tolist() == pytest.approx([scores[i] for i in order[: best.shape[1]]], abs=1e-7)
            if direction == "image":
                # A positive comes after all negatives that tie with it; positives are sorted by score.
                negative = [scores[i] for i in range(len(scores)) if i not in positives[query]]
                positive = sorted((scores[i] for i in positives[query]), reverse=True)
                ranks = [sum(s >= one for s in negative) + j for j, one in enumerate(positive)]
                assert min(int(items["last_by_image"][query]), 10) == min(ranks[-1], 10)
                gains = sum(1 / math.log2(rank + 2) for rank in ranks if rank < 10)
                ideal = sum(1 / math.log2(rank + 2) for rank in range(min(10, len(positive))))
                assert items["ndcg_by_image"][query] == pytest.approx(gains / ideal, abs=1e-12)
    pairs = [scored(text[t], image)[owner[t]] for t in range(len(text))]
    assert items["score_of_pair"].tolist() == pytest.approx(pairs, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_items_do_not_depend_on_the_blocks(monkeypatch, kind):
    owner = ownership(60, 200)
    image, text = draw(kind, 60, owner)
    whole = retrieval_metrics(image, text, owner)
    for cells, pending, pairs in ((100, 8, 64), (3000, 1000, 1 << 18)):
        monkeypatch.setattr(ranking, "CPU_SCORES", cells)
        monkeypatch.setattr(ranking, "MAX_PENDING", pending)
        monkeypatch.setattr(ranking, "CPU_PAIRS", pairs)
        again = retrieval_metrics(image, text, owner)
        assert again.metrics == whole.metrics
        assert again.intervals == whole.intervals
        assert all(torch.equal(again.items[name], values) for name, values in whole.items.items())


def test_ndcg_and_retrieval_all_equal_the_definition():
    """nDCG equals scikit-learn's, which treats ties differently: there are none."""
    owner = ownership(12, 40)
    image, text = unit(12, 8), F.normalize(unit(12, 8)[owner] + unit(40, 8), dim=1)
    metrics = retrieval_metrics(image, text, owner, ks=(1, 3, 8, 10, 20), replicates=0).metrics
    scores, truth = (text @ image.T).numpy(), F.one_hot(owner, 12).numpy()
    assert metrics["image_retrieval_ndcg@10"] == pytest.approx(ndcg_score(truth, scores, k=10), abs=1e-12)
    assert metrics["text_retrieval_ndcg@10"] == pytest.approx(ndcg_score(truth.T, scores.T, k=10), abs=1e-12)
    most = int(truth.sum(0).max())
    for k in (1, 3, 8, 10, 20):
        first = (-scores.T).argsort(1)[:, :k]
        every = [set(np.nonzero(truth[:, i])[0]) <= set(first[i]) for i in range(12)]
        assert (f"text_retrieval_all@{k}" in metrics) == (most <= k <= 10)
        if most <= k <= 10:
            assert metrics[f"text_retrieval_all@{k}"] == pytest.approx(np.mean(every), abs=1e-12)
    alone = retrieval_metrics(image, text[:12], torch.arange(12), replicates=0).metrics
    assert not [name for name in alone if "_all" in name]


def test_weights_equal_copies_of_images():
    """An image with weight n counts like n copies of its outcome; the ranks are those of the data without copies."""
    owner = (torch.arange(51) % 15)[torch.randperm(51)]
    items = retrieval_metrics(*draw("random", 15, owner), owner, replicates=0).items
    weights = torch.randint(0, 4, (15,)).index_fill_(0, torch.randint(15, (1,)), 1)
    texts = torch.repeat_interleave(torch.arange(51), weights[owner])
    by_text, by_image = items["rank_by_text"][texts], items["rank_by_image"].repeat_interleave(weights)
    last, ndcg = (items[name].repeat_interleave(weights) for name in ("last_by_image", "ndcg_by_image"))
    gain = [1 / math.log2(rank + 2) if rank < 10 else 0 for rank in by_text.tolist()]
    expected = {
        **{f"image_retrieval_{name}": value.item() for name, value in recall_at(by_text).items()},
        **{f"text_retrieval_{name}": value.item() for name, value in recall_at(by_image).items()},
        "text_retrieval_all@10": (last < 10).double().mean().item(),
        "image_retrieval_ndcg@10": statistics.mean(gain),
        "text_retrieval_ndcg@10": ndcg.mean().item(),
        "mean_recall@1": ((by_text < 1).double().mean() + (by_image < 1).double().mean()).item() / 2,
        "median_rank": statistics.median((by_text + 1).tolist()),
        "mrr": statistics.mean((1 / (by_text.double() + 1)).tolist()),
    }
    measures = retrieval_bootstrap(items)
    found = {name: f(weights[None].double()).item() for name, f in measures.statistics.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_weighted_medians(monkeypatch):
    """The medians are found inside and outside of the middle values, and with several parts of the weights."""
    monkeypatch.setattr(retrieval, "_CELLS", 600)
    values, unit_of = torch.randint(0, 50, (200,)), torch.randint(0, 30, (200,))
    unit_of[:30] = torch.arange(30)
    weights = torch.cat((torch.randint(0, 3, (20, 30)), torch.eye(30, dtype=torch.int64)))
    expected = [statistics.median(values.repeat_interleave(row[unit_of]).tolist()) for row in weights if int(row.sum())]
    found = retrieval.weighted_median(values, unit_of)(weights[weights.sum(1) > 0].double())
    assert found.tolist() == expected


def draw_items(kind):
    images = int(torch.randint(2, 14, ()))
    owner = ownership(images, images + int(torch.randint(0, 20, ())))
    image, text = draw(kind, images, owner)
    return image, text, owner, retrieval_metrics(image, text, owner, replicates=0).items


@pytest.mark.parametrize("kind", KINDS)
def test_answers_equal_brute_force(kind):
    image, text, owner, items = draw_items(kind)
    count = int(torch.randint(1, 5, ()))
    found = retrieval_answers(items, count)
    assert found == retrieval_answers(items, count)
    assert set(found) == {"text", "image"}
    for direction, queries, candidates in (("text", text, image), ("image", image, text)):
        answers, ranks = found[direction], items[f"rank_by_{direction}"]
        right = [answer.rank == 0 for answer in answers]
        assert right == sorted(right, reverse=True)
        assert sum(right) == min(count, int((ranks == 0).sum()))
        assert len(right) - sum(right) == min(count, int((ranks > 0).sum()))
        assert len({answer.query for answer in answers}) == len(answers)
        for answer in answers:
            assert answer.rank == ranks[answer.query]
            scores = scored(queries[answer.query], candidates)
            texts = torch.nonzero(owner == answer.query)[:, 0].tolist()
            own = [int(owner[answer.query])] if direction == "text" else texts
            order = sorted(range(len(scores)), key=lambda i: (-scores[i], i in own))
            assert len(answer.best) == min(5, len(scores))
            assert [(scores[i], i in own) for i in answer.best] == [(scores[i], i in own) for i in order[:5]]
            assert answer.scores == pytest.approx([scores[i] for i in answer.best], abs=1e-6)
            assert sorted(answer.right) == own
            positive = [scores[i] for i in answer.right]
            assert positive == pytest.approx(sorted(positive, reverse=True), abs=1e-7)
            shown = [rank for rank, i in enumerate(answer.best) if i in own]
            assert (answer.rank < len(answer.best)) == bool(shown)
            assert not shown or shown[0] == answer.rank


def test_the_draw_of_answers_does_not_depend_on_the_scores():
    """Other scores with the same ranks give the same queries: the nicest answers are not picked."""
    owner = ownership(20, 45)
    ranks = {"rank_by_text": torch.randint(3, (45,)), "rank_by_image": torch.randint(3, (20,))}
    one, two = (
        retrieval_answers(retrieval_metrics(unit(20, 8), unit(45, 8), owner, replicates=0).items | ranks)
        for _ in range(2)
    )
    assert all([a.query for a in one[name]] == [b.query for b in two[name]] for name in one)
    items = retrieval_metrics(unit(20, 8), unit(45, 8), owner, replicates=0).items
    state = torch.get_rng_state()
    retrieval_answers(items)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rank", [0, 4])
def test_answers_where_all_are_right_or_all_wrong(rank):
    items = retrieval_metrics(unit(9, 5), unit(9, 5), torch.arange(9), replicates=0).items
    same = {"rank_by_text": torch.full((9,), rank), "rank_by_image": torch.full((9,), rank)}
    found = retrieval_answers(items | same, count=4)
    assert [[answer.rank for answer in answers] for answers in found.values()] == [[rank] * 4] * 2


# Among items of one kind


def draw_groups(kind, count, groups):
    """Draw embeddings (N, 16) and groups (N,), with some items alone and at least one pair."""
    group = torch.cat((torch.randint(groups, (count - 2,)), torch.full((2,), groups)))[torch.randperm(count)]
    x, _ = draw(kind, count, torch.arange(count))
    return F.normalize(x + 0.2 * torch.randn(groups + 1, 16)[group], dim=1) if kind == "random" else x, group


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["counting", "sorting"])
def test_groups_equal_brute_force(monkeypatch, kind, method):
    monkeypatch.setattr(retrieval, "MAX_COUNTED", 0 if method == "sorting" else 64)
    monkeypatch.setattr(retrieval, "_CELLS", 200)
    monkeypatch.setattr(ranking, "CPU_SCORES", 300)
    x, group = draw_groups(kind, int(torch.randint(3, 50, ())), int(torch.randint(1, 30, ())))
    metrics, intervals, chance, items = group_metrics(x, group, (1, 2, 5), replicates=20)
    ranks, ndcg, precision = [], [], []
    queries = [i for i in range(len(x)) if int((group == group[i]).sum()) > 1]
    assert items["query"].tolist() == queries
    for query in queries:
        own = {i for i in range(len(x)) if group[i] == group[query] and i != query}
        scores = scored(x[query], x)
        order = sorted((i for i in range(len(x)) if i != query), key=lambda i: (-scores[i], i in own))
        found = [rank for rank, i in enumerate(order) if i in own]
        ranks.append(found[0])
        gains = [1 / math.log2(rank + 2) for rank in range(10)]
        ndcg.append(sum(gains[rank] for rank in found if rank < 10) / sum(gains[: len(found)]))
        precision.append(statistics.mean((j + 1) / (rank + 1) for j, rank in enumerate(found)))
    assert items["rank"].tolist() == ranks
    assert items["ndcg"].tolist() == pytest.approx(ndcg, abs=1e-12)
    assert items["precision"].tolist() == pytest.approx(precision, abs=1e-12)
    assert metrics["ndcg@10"] == pytest.approx(statistics.mean(ndcg), abs=1e-12)
    assert metrics["mean_average_precision"] == pytest.approx(statistics.mean(precision), abs=1e-12)
    for k in (1, 2, 5):
        assert (f"recall@{k}" in metrics) == (k < len(x))
        if k < len(x):
            assert metrics[f"recall@{k}"] == pytest.approx(statistics.mean(rank < k for rank in ranks), abs=1e-12)
    assert set(metrics) == set(intervals) == set(chance)


@pytest.mark.parametrize("max_counted", [0, 64])
def test_groups_equal_scikit_learn(monkeypatch, max_counted):
    monkeypatch.setattr(retrieval, "MAX_COUNTED", max_counted)
    x, group = draw_groups("random", 80, 11)
    items = group_metrics(x.double(), group, replicates=0).items
    scores = (x.double() @ x.double().T).numpy()
    for m, query in enumerate(items["query"].tolist()):
        others = np.arange(80) != query
        truth = (group == group[query]).numpy()[others]
        assert items["precision"][m] == pytest.approx(average_precision_score(truth, scores[query, others]), abs=1e-12)
        assert items["ndcg"][m] == pytest.approx(ndcg_score([truth], [scores[query, others]], k=10), abs=1e-12)


def test_chance_of_groups_is_the_mean_over_random_orders():
    """The chance values are within 6 standard errors of random orders of 14 items in groups of 1, 2, 4 and 7."""
    group = torch.tensor([0] * 7 + [1] * 4 + [2] * 2 + [3])[torch.randperm(14)]
    chance = group_metrics(unit(14, 5), group, (1, 5, 10), replicates=0).chance
    found: dict[str, list[float]] = {name: [] for name in chance}
    for _ in range(400):
        # The order of each query is independent of its group.
        scores = torch.rand(14, 14, dtype=torch.float64)
        rows = [torch.nonzero(group == group[i])[:, 0].tolist() for i in range(14)]
        outcomes: dict[str, list[float]] = {name: [] for name in chance}
        for query in range(14):
            own = [i for i in rows[query] if i != query]
            if own:
                order = sorted((i for i in range(14) if i != query), key=lambda i: -scores[query, i])
                ranks = sorted(order.index(i) for i in own)
                gains = [1 / math.log2(rank + 2) for rank in range(10)]
                for k in (1, 5, 10):
                    outcomes[f"recall@{k}"].append(ranks[0] < k)
                outcomes["ndcg@10"].append(sum(gains[rank] for rank in ranks if rank < 10) / sum(gains[: len(own)]))
                outcomes["mean_average_precision"].append(
                    statistics.mean((j + 1) / (rank + 1) for j, rank in enumerate(ranks))
                )
        for name, values in outcomes.items():
            found[name].append(statistics.mean(values))
    for name, values in found.items():
        error = 6 * statistics.stdev(values) / len(values) ** 0.5
        assert chance[name] == pytest.approx(statistics.mean(values), abs=error + 1e-12), name


def test_intervals_of_groups_draw_units():
    """The bootstrap draws images, each with all of its captions."""
    x = F.normalize(torch.randn(60, 1, 8) + 0.7 * torch.randn(60, 2, 8), dim=2).flatten(0, 1)
    group = torch.arange(60).repeat_interleave(2)
    found = group_metrics(x, group, unit=group + 7, replicates=200)
    assert found.items["unit"].tolist() == group.tolist()
    measures = group_bootstrap(found.items)
    assert measures.units == 60
    assert found.intervals == measures.intervals(replicates=200)
    weights = torch.randint(0, 3, (1, 60)).index_fill_(1, torch.tensor([3]), 1).double()
    each = (found.items["rank"] < 1).double().view(60, 2).mean(1)
    expected = ((weights @ each) / weights.sum()).item()
    assert measures.statistics["recall@1"](weights).item() == pytest.approx(expected, abs=1e-12)


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no group has two items"):
        group_metrics(unit(4, 3), torch.arange(4))
    with pytest.raises(ValueError, match=r"4 .* groups and units"):
        group_metrics(unit(4, 3), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        group_metrics(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.int64))


# Memory


class Largest(TorchDispatchMode):
    """A mode that measures the largest tensor storage of any operation, in numbers."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return found


@pytest.mark.parametrize("kind", ["random", "collapsed"])
@pytest.mark.parametrize("max_counted", [0, 64])
def test_no_tensor_holds_the_whole_product(monkeypatch, kind, max_counted):
    monkeypatch.setattr(retrieval, "MAX_COUNTED", max_counted)
    monkeypatch.setattr(retrieval, "_CELLS", 1 << 13)
    for name in ("CPU_SCORES", "CPU_PAIRS", "MAX_PENDING"):
        monkeypatch.setattr(ranking, name, 1 << 13)
    owner = ownership(500, 1000)
    image, text = draw(kind, 500, owner)
    with Largest() as seen:
        retrieval_metrics(image, text, owner, replicates=0)
        group_metrics(text, torch.arange(1000) // 2, replicates=0)
    assert seen.most < 500 * 1000 / 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_counted", [0, 64])
def test_cuda_equals_cpu(monkeypatch, kind, max_counted):
    monkeypatch.setattr(retrieval, "MAX_COUNTED", max_counted)
    owner = ownership(70, 200)
    image, text = draw(kind, 70, owner)
    for cpu, cuda in (
        (retrieval_metrics(image, text, owner), retrieval_metrics(image.cuda(), text.cuda(), owner)),
        (group_metrics(text, owner), group_metrics(text.cuda(), owner)),
    ):
        assert cuda.metrics == pytest.approx(cpu.metrics, abs=1e-12)
        for name, values in cpu.items.items():
            assert torch.allclose(cuda.items[name], values, rtol=0, atol=1e-6), name
