"""Retrieval metrics: across image and text, and among the items of one kind.

A model's answers are kept as `items`, the outcome of each query, from which every metric can be computed again: with
other K, with an interval, or as a paired difference of two models.
"""

import math
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualenc.metrics.bootstrap import BootstrapMetrics, Statistic, mean
from dualenc.metrics.ranking import TIE, Counter, First, QueryPairs, Side, blocks, highest

SHOWN = 5  # first candidates kept of each query
DEPTH = 10  # of nDCG
SEVERAL = 32  # positives of a query, up to which counting is faster than sorting
_CELLS = 1 << 20  # float64 numbers at a time


class Scores(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # 95% bootstrap, of the metrics that have one
    chance: dict[str, float]  # expected of an order drawn at random
    items: dict[str, Tensor]  # outcomes of single queries, from which the metrics can be computed again


class Answer(NamedTuple):
    """One query with what came first."""

    query: int
    rank: int  # of the best positive, 0-based
    best: list[int]  # candidates, the highest score first
    scores: list[float]  # of these
    right: list[int]  # the positives, the highest score first


def recall_at(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Tensor]:
    """Share of queries with a positive among the first K: `{"recall@1": ..., ...}`, 0-d float64 each."""
    return {f"recall@{k}": (ranks < k).double().mean() for k in ks}


# Across image and text


def retrieval_metrics(
    image: Tensor, text: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10), *, replicates: int = 1000
) -> Scores:
    """Metrics of a retrieval set by the names of CLIP_benchmark, with 95% bootstrap intervals over its images.

    Args:
        image: (I, E) of unit length.
        text: (T, E) of unit length.
        image_of_text: (T,) the image that each text belongs to; every image needs a text.
        ks: K of the recalls; those above the number of candidates are left out.
        replicates: bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `retrieval_bootstrap`; and as items, with a rank that is 0-based and counts those that tie:
        `owner` (T,) is `image_of_text`; `score_of_pair` (T,) of each text with its image;
        `rank_by_text` (T,) of its image, `rank_by_image` (I,) of its best text;
        `last_by_image` (I,) of its worst text where that is below 10, and else any number from 10 on;
        `ndcg_by_image` (I,) of its texts among the first 10;
        `best_by_text` and `best_by_image` (T or I, 5) the first candidates, fewer where there are fewer, a right one
        after those that tie with it; `score_by_text` and `score_by_image` their scores.
        Scores are float32, nDCG is float64, the rest int64; all on the CPU.
    """
    items = _search(image, text, image_of_text, 4096, every=True)
    bootstrap = retrieval_bootstrap(items, ks)
    own = Tally(torch.bincount(items["owner"]).tolist())
    chance = _chance(bootstrap.statistics, own, len(items["owner"]))
    return Scores(bootstrap.values(), bootstrap.intervals(replicates=replicates), chance, items)


def retrieval_bootstrap(items: dict[str, Tensor], ks: Sequence[int] = (1, 5, 10)) -> BootstrapMetrics:
    """Metrics of a retrieval set as functions of its images' weights.

    Args:
        items: from `retrieval_metrics`.
        ks: K of the recalls; those above the number of candidates are left out.

    Returns:
        `image_retrieval_recall@K`: share of texts whose image is among the first K. `text_retrieval_recall@K`: share of
        images with any own text among the first K; `text_retrieval_all@K`: with all of them, for K up to 10, where an
        image has more than one and none has more than K. `image_retrieval_ndcg@10`, `text_retrieval_ndcg@10`: mean over
        the queries of the sum of 1 / log2(1 + rank) over own candidates at ranks 1 to 10, in parts of its largest value
        (after Järvelin and Kekäläinen 2002, ACM TOIS 20). `mean_recall@1`: mean of the two recalls at 1. `median_rank`
        (1-based) and `mrr`: of the text's own image.
    """
    owner, by_text, by_image = items["owner"], items["rank_by_text"], items["rank_by_image"]
    images, texts, most = len(by_image), len(owner), int(torch.bincount(owner).max())
    found: dict[str, Statistic] = {}
    found |= {f"image_retrieval_recall@{k}": mean(by_text < k, owner) for k in ks if k <= images}
    found |= {f"text_retrieval_recall@{k}": mean(by_image < k) for k in ks if k <= texts}
    if most > 1:
        found |= {
            f"text_retrieval_all@{k}": mean(items["last_by_image"] < k) for k in ks if most <= k <= min(DEPTH, texts)
        }
    found["image_retrieval_ndcg@10"] = mean(_gain(by_text), owner)
    found["text_retrieval_ndcg@10"] = mean(items["ndcg_by_image"])
    one, other = mean(by_text < 1, owner), mean(by_image < 1)
    found["mean_recall@1"] = lambda weights: (one(weights) + other(weights)) / 2
    found["median_rank"] = _median(by_text + 1, owner)
    found["mrr"] = mean(1 / (by_text.double() + 1), owner)
    return BootstrapMetrics(found, images)


def retrieval_ranks(image: Tensor, text: Tensor, image_of_text: Tensor, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Ranks in both directions from one product.

    Args:
        image: (I, E).
        text: (T, E).
        image_of_text: (T,) the image that each text belongs to; every image needs a text.
        chunk: most rows and most columns of a block of the product.

    Returns:
        (T,) rank of its image for each text, and (I,) rank of its best text for each image; 0-based.
    """
    items = _search(image, text, image_of_text, chunk, every=False)
    return items["rank_by_text"], items["rank_by_image"]


def retrieval_answers(items: dict[str, Tensor], count: int = 4) -> dict[str, list[Answer]]:
    """Some queries of each direction, right and wrong ones, drawn blindly, with their first candidates.

    Args:
        items: from `retrieval_metrics`.
        count: how many right and how many wrong ones of each direction.

    Returns:
        By "text" (which look for an image) and by "image": the answers, right ones first. The draw is the same for the
        same number of right and wrong ones.
    """
    owner, score = items["owner"], items["score_of_pair"]
    found = {}
    for asked in ("text", "image"):
        ranks, best, scores = (items[f"{what}_by_{asked}"] for what in ("rank", "best", "score"))
        chosen: list[int] = []
        for kind in (ranks == 0, ranks > 0):
            rows = torch.nonzero(kind)[:, 0]
            chosen += rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]].tolist()
        found[asked] = []
        for query in chosen:
            texts = torch.nonzero(owner == query)[:, 0]
            right = owner[query : query + 1] if asked == "text" else texts[torch.argsort(-score[texts], stable=True)]
            first = best[query].tolist(), scores[query].tolist()
            found[asked].append(Answer(query, int(ranks[query]), *first, right.tolist()))
    return found


def _search(image: Tensor, text: Tensor, owner: Tensor, chunk: int, every: bool) -> dict[str, Tensor]:
    """The items of `retrieval_metrics`, or without `every` only the ranks; from one product.

    The pairs are taken out of the product: what is counted and what is found are the wrong candidates, and the right
    ones are put among them by their exact scores.
    """
    images, texts = len(image), len(text)
    own = torch.bincount(owner, minlength=images)
    if len(owner) != texts or len(own) > images or not bool((own > 0).all()):
        raise ValueError(f"image_of_text must name every image from 0 to {images - 1} at least once")
    side = Side.of(text, image)
    owner, own = owner.to(text.device), own.to(text.device)
    pairs = QueryPairs(torch.arange(texts, device=text.device), owner)
    score = side.exact(*pairs)
    by_text, by_image = Counter(side, score), Counter(side.turned(), highest(owner, score, images))
    text_side: list[Counter | First] = [by_text]
    image_side: list[Counter | First] = [by_image]
    first_images, first_texts = First(side, min(SHOWN, images)), First(side.turned(), min(DEPTH, texts))
    if every:
        text_side.append(first_images)
        image_side.append(first_texts)
    for i, j, block, turned in blocks(side, pairs, chunk):
        for one in text_side:
            one.take(block, i, j)
        for one in image_side:
            one.take(turned, j, i)
    ranks = {"rank_by_text": by_text.number.cpu(), "rank_by_image": by_image.number.cpu()}
    if not every:
        return ranks
    owner, own, score = owner.cpu(), own.cpu(), score.cpu()
    found = {"owner": owner, "score_of_pair": score.float(), **ranks}
    order, place = _places(owner, score, images)
    _, best_images, image_scores = _merged(pairs.query.cpu(), owner, score, torch.zeros_like(owner), first_images)
    rank, best_texts, text_scores = _merged(owner[order], order, score[order], place, first_texts)
    return found | {
        "last_by_image": torch.zeros(images, dtype=torch.int64).scatter_reduce_(0, owner[order], rank, "amax"),
        "ndcg_by_image": _sums(owner[order], _gain(rank), images) / _ideal(own),
        "best_by_text": best_images,
        "score_by_text": image_scores,
        "best_by_image": best_texts,
        "score_by_image": text_scores,
    }


def _places(asker: Tensor, score: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """An order (n,) of the pairs of `size` askers by asker and falling score, and in it the place among the asker's."""
    order = torch.argsort(score, descending=True, stable=True)
    order = order[torch.argsort(asker[order], stable=True)]
    counts = torch.bincount(asker, minlength=size)
    return order, torch.arange(len(order)) - (counts.cumsum(0) - counts)[asker[order]]


def _merged(asker: Tensor, right: Tensor, score: Tensor, place: Tensor, first: First) -> tuple[Tensor, Tensor, Tensor]:
    """Right candidates (n,) put among the first wrong ones; place counts the asker's right ones before it.

    Returns:
        Ranks (n,), those above the number of wrong ones given perhaps too small; the first candidates; their scores.
    """
    index, scores = first.found()  # (Q, k)
    before = (scores[asker] >= score[:, None] - TIE).sum(1)  # wrong ones
    rank = before + place
    width = min(SHOWN, len(first.side.candidates))
    best, of_best = torch.full((len(index), width), -1), torch.zeros(len(index), width)
    shown = rank < width
    best[asker[shown], rank[shown]], of_best[asker[shown], rank[shown]] = right[shown], score[shown].float()
    passed = torch.zeros(len(index), index.shape[1] + 1, dtype=torch.int64)
    passed.index_put_((asker, before), torch.ones_like(asker), accumulate=True)
    column = passed.cumsum(1)[:, :-1] + torch.arange(index.shape[1])  # of the wrong ones
    query, wrong = torch.nonzero((column < width) & (index >= 0)).unbind(1)
    best[query, column[query, wrong]] = index[query, wrong]
    of_best[query, column[query, wrong]] = scores[query, wrong].float()
    return rank, best, of_best


def _gain(rank: Tensor) -> Tensor:
    """What a right candidate adds to nDCG@10 before it is normalized."""
    return (rank < DEPTH) / torch.log2(rank.double() + 2)


def _ideal(own: Tensor) -> Tensor:
    """The largest sum of gains that so many right candidates can have."""
    sums = torch.cat((torch.zeros(1, dtype=torch.float64), _gain(torch.arange(DEPTH)).cumsum(0)))
    return sums[own.clamp(max=DEPTH)]


def _sums(index: Tensor, values: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64).index_add_(0, index, values)


def _median(values: Tensor, unit: Tensor) -> Statistic:
    """Median of values (M,), each as often as its unit counts; of an even number the middle of two."""
    values, order = values.double().sort()
    unit = unit[order]

    def search(weights: Tensor, since: int, until: int) -> tuple[Tensor, bool]:
        """Medians (R,) if they are among these of the sorted values, and whether all are."""
        before = weights @ torch.bincount(unit[:since], minlength=weights.shape[1]).double()
        upto = before[:, None] + weights[:, unit[since:until]].cumsum(1)
        half = (weights @ torch.bincount(unit, minlength=weights.shape[1]).double())[:, None] / 2
        low, high = torch.searchsorted(upto, half), torch.searchsorted(upto, half, right=True)
        inside = bool(((before[:, None] < half) | (since == 0)).all() & (half < upto[:, -1:]).all())
        last = until - since - 1
        return (values[since + low.clamp(max=last)] + values[since + high.clamp(max=last)])[:, 0] / 2, inside

    def statistic(weights: Tensor) -> Tensor:
        found = []
        for part in weights.split(max(1, _CELLS // len(values))):
            eighth = len(values) // 8
            medians, inside = search(part, 3 * eighth, 5 * eighth + 1)  # medians of samples lie close together
            found.append(medians if inside else search(part, 0, len(values))[0])
        return torch.cat(found)

    return statistic


def _chance(names: Iterable[str], own: Tally[int], texts: int) -> dict[str, float]:
    """What an order drawn at random gives: `own` says how many images have so many texts."""
    images = sum(own.values())
    one_right = _gain(torch.arange(min(DEPTH, images))).sum().item() / images
    found = {
        "image_retrieval_ndcg@10": one_right,
        "text_retrieval_ndcg@10": _expected(own, _ndcg_by_chance, texts),
        "mean_recall@1": 1 / images,  # both ways: an image has T / I of the T texts, in the mean
        "median_rank": (images + 1) / 2,
        "mrr": sum(1 / rank for rank in range(1, images + 1)) / images,
    }
    for name in names:
        kind, _, number = name.partition("@")
        if kind == "image_retrieval_recall":
            found[name] = int(number) / images
        elif kind == "text_retrieval_recall":
            found[name] = _expected(own, _any_by_chance, texts, int(number))
        elif kind == "text_retrieval_all":
            found[name] = _expected(own, _all_by_chance, texts, int(number))
    return {name: found[name] for name in names}


def _expected(queries: Tally[int], value: Callable[..., float], *args: int) -> float:
    """Mean over queries, of which so many have so many right candidates."""
    return sum(many * value(right, *args) for right, many in queries.items()) / sum(queries.values())


def _any_by_chance(right: int, candidates: int, k: int) -> float:
    """One less the share of draws of k candidates that miss all right ones."""
    return 1 - math.comb(candidates - right, k) / math.comb(candidates, k)


def _all_by_chance(right: int, candidates: int, k: int) -> float:
    """The share of draws of k candidates that hold all right ones."""
    return math.comb(candidates - right, k - right) / math.comb(candidates, k)


def _ndcg_by_chance(right: int, candidates: int) -> float:
    """Each of the first places holds a right one as often as any other does."""
    gains = _gain(torch.arange(min(DEPTH, candidates))).sum() * right / candidates
    return float(gains / _ideal(torch.tensor(right)))


def _precision_by_chance(right: int, candidates: int) -> float:
    """Mean of the average precision over orders (Bestgen 2015, The Prague Bulletin of Mathematical Linguistics 103)."""
    harmonic = sum(1 / rank for rank in range(1, candidates + 1))
    return (harmonic + (right - 1) / max(1, candidates - 1) * (candidates - harmonic)) / candidates


# Among the items of one kind


def group_metrics(
    x: Tensor,
    group: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    unit: Tensor | None = None,
    replicates: int = 1000,
) -> Scores:
    """How well items find the others of their group among all others, with 95% bootstrap intervals.

    Args:
        x: (N, E) of unit length.
        group: (N,) number of each item's group. An item alone in its group does not ask, but is a candidate.
        ks: K of the recalls; those above the number of candidates are left out.
        unit: (N,) what the intervals draw, such as each caption's image; absent, the items.
        replicates: bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `group_bootstrap`; and as items: `group` (N,); and of each item that asks, in order: `query` (M,)
        its number, `unit` (M,) its unit, numbered anew, `rank` (M,) of the best of its group (0-based, with those that
        tie), `ndcg` (M,) at 10 and `precision` (M,), its average precision; float64 both.

    Raises:
        ValueError: no group has two items, or numbers are missing.
    """
    group = group.cpu()
    if len(group) != len(x) or (unit is not None and len(unit) != len(x)):
        raise ValueError(f"{len(x)} embeddings need {len(x)} numbers of groups and units")
    _, group_of, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    query = torch.nonzero(sizes[group_of] > 1)[:, 0]
    if not len(query):
        raise ValueError("no group has two items: there is nothing to find")
    rank, ndcg, precision = (_sorted if int(sizes.max()) > SEVERAL + 1 else _counted)(x, group_of, query)
    units = torch.unique((torch.arange(len(x)) if unit is None else unit.cpu())[query], return_inverse=True)[1]
    items = {"group": group, "query": query, "unit": units, "rank": rank, "ndcg": ndcg, "precision": precision}
    bootstrap = group_bootstrap(items, ks)
    right, others = Tally((sizes[group_of][query] - 1).tolist()), len(x) - 1
    chance = {f"recall@{k}": _expected(right, _any_by_chance, others, k) for k in ks if k <= others}
    chance["ndcg@10"] = _expected(right, _ndcg_by_chance, others)
    chance["mean_average_precision"] = _expected(right, _precision_by_chance, others)
    return Scores(bootstrap.values(), bootstrap.intervals(replicates=replicates), chance, items)


def group_bootstrap(items: dict[str, Tensor], ks: Sequence[int] = (1, 5, 10)) -> BootstrapMetrics:
    """Metrics of a search within one kind as functions of the weights of its units.

    Args:
        items: from `group_metrics`.
        ks: K of the recalls; those above the number of candidates are left out.

    Returns:
        `recall@K`: share of queries with any of their group among the first K. `ndcg@10`: see `retrieval_bootstrap`.
        `mean_average_precision`: mean over the queries of the mean, over the others of the group, of the share of their
        group among the candidates down to each.
    """
    unit, rank = items["unit"], items["rank"]
    found = {f"recall@{k}": mean(rank < k, unit) for k in ks if k < len(items["group"])}
    found["ndcg@10"] = mean(items["ndcg"], unit)
    found["mean_average_precision"] = mean(items["precision"], unit)
    return BootstrapMetrics(found, int(unit.max()) + 1)


def _counted(x: Tensor, group: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rank, nDCG@10 and average precision (M,) of items; counts the wrong candidates before each right one."""
    sizes = torch.bincount(group)
    order = torch.argsort(group, stable=True)
    start, place = _starts(group, order)
    most = int(sizes.max()) - 1
    # The s-th next in the group, round and round, for each s below its size.
    steps = torch.arange(1, most + 1)
    some, step = torch.nonzero(steps < sizes[group[query]][:, None]).unbind(1)  # (n,), by rising query
    asking = query[some]
    right = order[start[asking] + (place[asking] + 1 + step) % sizes[group[asking]]]
    side = Side.of(x if len(query) == len(x) else x[query.to(x.device)], x)
    score = side.exact(some, right)
    sorting, at = _places(some, score.cpu(), len(query))
    some, score, right = some[sorting], score[sorting.to(x.device)], right[sorting]
    thresholds = score.new_full((most, len(query)), torch.inf)
    thresholds[at.to(x.device), some.to(x.device)] = score
    counters = [Counter(side, threshold) for threshold in thresholds]
    itself = QueryPairs(torch.cat((some, torch.arange(len(query)))), torch.cat((right, query)))
    masked = torch.argsort(itself.query, stable=True)
    for i, j, block, _ in blocks(side, QueryPairs(itself.query[masked], itself.candidate[masked])):
        for counter in counters:
            counter.take(block, i, j)
    rank = torch.stack([counter.number for counter in counters]).cpu()[at, some] + at
    own = torch.bincount(some, minlength=len(query))
    precision = _sums(some, (at + 1) / (rank + 1).double(), len(query)) / own
    return rank[at == 0], _sums(some, _gain(rank), len(query)) / _ideal(own), precision


def _starts(group: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Of each item, where its group starts in an order by group, and its place from there on."""
    sizes = torch.bincount(group)
    start = (sizes.cumsum(0) - sizes)[group]
    return start, torch.empty_like(order).scatter_(0, order, torch.arange(len(order))) - start


def _sorted(x: Tensor, group: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Like `_counted`, where groups are large: sorts the float64 scores of each item."""
    whole, group, found = x.detach().double(), group.to(x.device), []
    Side.of(x, x)  # refuses what cannot be ranked
    for asking in query.to(x.device).split(max(1, _CELLS // len(x))):
        right = group[asking][:, None] == group  # (m, N)
        right.scatter_(1, asking[:, None], False)
        scores = (whole[asking] @ whole.T).sub_(TIE * right)  # a right one loses a tie
        order = scores.scatter_(1, asking[:, None], -torch.inf).argsort(1, descending=True)
        hits = right.gather(1, order).double()
        own = hits.sum(1)
        precision = hits.cumsum(1).div_(torch.arange(1, len(x) + 1, device=x.device)).mul_(hits).sum(1) / own
        gains = hits[:, :DEPTH].cpu() @ _gain(torch.arange(min(DEPTH, len(x))))
        found.append((hits.argmax(1).cpu(), gains / _ideal(own.long().cpu()), precision.cpu()))
    rank, ndcg, precision = (torch.cat(parts) for parts in zip(*found))
    return rank, ndcg, precision
