"""Retrieval metrics: between images and texts, and among items of one kind.

The outcome of each query is kept in `items`, from which every metric can be computed again: with other K, with an
interval, or as a paired difference of two models.
"""

import math
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualenc.metrics.bootstrap import BootstrapMetrics, Statistic, mean
from dualenc.metrics.ranking import TIE, Operands, QueryPairs, RankCounter, TopK, max_per_query, score_blocks

SHOWN = 5  # first candidates kept for each query
DEPTH = 10  # ranks that count for nDCG
MAX_COUNTED = 32  # positives of a query, up to which counting is faster than sorting
_CELLS = 1 << 20  # float64 numbers held at a time


class Scores(NamedTuple):
    """The metrics of an evaluation, with what is needed to judge and to compute them again."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # 95% bootstrap intervals of the metrics that have one
    chance: dict[str, float]  # expected value of each metric for an order drawn at random
    items: dict[str, Tensor]  # outcomes of single queries, from which the metrics can be computed again


class Answer(NamedTuple):
    """One query with its first candidates."""

    query: int
    rank: int  # of the best positive, 0-based
    best: list[int]  # the first candidates, the highest score first
    scores: list[float]  # scores of the first candidates
    right: list[int]  # all positives, the highest score first


def recall_at(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Tensor]:
    """Compute the share of queries with a positive among the first K.

    Args:
        ranks: (Q,) 0-based rank of each query's best positive; see `dualenc.match_ranks`.
        ks: values of K.

    Returns:
        `{"recall@1": ..., ...}`, 0-d float64 each.

    Example:
        >>> import torch
        >>> from dualenc import recall_at
        >>> recall_at(torch.tensor([0, 0, 3, 9]), ks=(1, 5))
        {'recall@1': tensor(0.5000, dtype=torch.float64), 'recall@5': tensor(0.7500, dtype=torch.float64)}
    """
    return {f"recall@{k}": (ranks < k).double().mean() for k in ks}


# Between images and texts


def retrieval_metrics(
    image: Tensor, text: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10), *, replicates: int = 1000
) -> Scores:
    """Compute the metrics of a retrieval set, named as in CLIP_benchmark, with 95% bootstrap intervals over its images.

    Args:
        image: (I, E) of unit length.
        text: (T, E) of unit length.
        image_of_text: (T,) the image that each text belongs to; every image needs a text.
        ks: values of K of the recalls; those above the number of candidates are left out.
        replicates: number of bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `retrieval_bootstrap`. The items are, on the CPU, with 0-based ranks in which ties count:

        - `owner` (T,) int64: `image_of_text`.
        - `score_of_pair` (T,) float32: score of each text with its image.
        - `rank_by_text` (T,) int64: rank of each text's image.
        - `rank_by_image` (I,) int64: rank of each image's best text.
        - `last_by_image` (I,) int64: rank of each image's worst text if it is below 10, else any number from 10.
        - `ndcg_by_image` (I,) float64: nDCG@10 of each image's texts.
        - `best_by_text` (T, 5) and `best_by_image` (I, 5) int64: the first candidates, fewer where there are fewer. A
          positive comes after the candidates that tie with it.
        - `score_by_text` (T, 5) and `score_by_image` (I, 5) float32: the scores of the first candidates.
    """
    items = _search(image, text, image_of_text, 4096, ranks_only=False)
    bootstrap = retrieval_bootstrap(items, ks)
    texts_per_image = Tally(torch.bincount(items["owner"]).tolist())
    chance = _chance(bootstrap.statistics, texts_per_image, len(items["owner"]))
    return Scores(bootstrap.values(), bootstrap.intervals(replicates=replicates), chance, items)


def retrieval_bootstrap(items: dict[str, Tensor], ks: Sequence[int] = (1, 5, 10)) -> BootstrapMetrics:
    """Return the metrics of a retrieval set as functions of its images' weights.

    Args:
        items: items of `retrieval_metrics`.
        ks: values of K of the recalls; those above the number of candidates are left out.

    Returns:
        The metrics:

        - `image_retrieval_recall@K`: share of texts whose image is among the first K.
        - `text_retrieval_recall@K`: share of images with at least one of their texts among the first K.
        - `text_retrieval_all@K`: share of images with all of their texts among the first K; for K up to 10, where some
          image has several texts and no image has more than K.
        - `image_retrieval_ndcg@10`, `text_retrieval_ndcg@10`: mean over the queries of nDCG@10: the sum of
          1 / log2(1 + rank) over positives at ranks 1 to 10, divided by its largest possible value (after Järvelin and
          Kekäläinen 2002, ACM TOIS 20).
        - `mean_recall@1`: mean of the two recalls at 1.
        - `median_rank` (1-based) and `mrr`: median and mean reciprocal of the rank of the text's image.
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
    found["image_retrieval_ndcg@10"] = mean(gain(by_text), owner)
    found["text_retrieval_ndcg@10"] = mean(items["ndcg_by_image"])
    one, other = mean(by_text < 1, owner), mean(by_image < 1)
    found["mean_recall@1"] = lambda weights: (one(weights) + other(weights)) / 2
    found["median_rank"] = weighted_median(by_text + 1, owner)
    found["mrr"] = mean(1 / (by_text.double() + 1), owner)
    return BootstrapMetrics(found, images)


def retrieval_ranks(image: Tensor, text: Tensor, image_of_text: Tensor, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Compute the ranks in both directions from one product.

    Args:
        image: (I, E) embeddings.
        text: (T, E) embeddings.
        image_of_text: (T,) the image that each text belongs to; every image needs a text.
        chunk: largest number of rows and of columns of a block of the product.

    Returns:
        (T,) rank of each text's image, and (I,) rank of each image's best text; 0-based.
    """
    items = _search(image, text, image_of_text, chunk, ranks_only=True)
    return items["rank_by_text"], items["rank_by_image"]


def retrieval_answers(items: dict[str, Tensor], count: int = 4) -> dict[str, list[Answer]]:
    """Draw queries of each direction, right and wrong ones, without regard to their scores.

    Args:
        items: items of `retrieval_metrics`.
        count: number of right and of wrong ones in each direction.

    Returns:
        "text": answers to texts, which search for an image, the right ones first.
        "image": answers to images. The draw depends only on the number of right and wrong ones.
    """
    owner, score = items["owner"], items["score_of_pair"]
    found = {}
    for direction in ("text", "image"):
        ranks, best, scores = (items[f"{name}_by_{direction}"] for name in ("rank", "best", "score"))
        chosen: list[int] = []
        for outcome in (ranks == 0, ranks > 0):
            rows = torch.nonzero(outcome)[:, 0]
            chosen += rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]].tolist()
        found[direction] = []
        for query in chosen:
            texts = torch.nonzero(owner == query)[:, 0]
            is_text = direction == "text"
            right = owner[query : query + 1] if is_text else texts[torch.argsort(-score[texts], stable=True)]
            first = best[query].tolist(), scores[query].tolist()
            found[direction].append(Answer(query, int(ranks[query]), *first, right.tolist()))
    return found


def _search(image: Tensor, text: Tensor, owner: Tensor, chunk: int, ranks_only: bool) -> dict[str, Tensor]:
    """Compute the items of `retrieval_metrics`, or only the ranks, from one product.

    The pairs are masked in the product, which leaves the negatives to be counted and searched. The positives are then
    inserted among the negatives by their exact scores.
    """
    images, texts = len(image), len(text)
    owned = torch.bincount(owner, minlength=images)  # texts of each image
    if len(owner) != texts or len(owned) > images or not bool((owned > 0).all()):
        raise ValueError(f"image_of_text must name every image from 0 to {images - 1} at least once")
    operands = Operands.from_embeddings(text, image)
    owner, owned = owner.to(text.device), owned.to(text.device)
    pairs = QueryPairs(torch.arange(texts, device=text.device), owner)
    score = operands.exact_scores(*pairs)
    by_text = RankCounter(operands, score)
    by_image = RankCounter(operands.swap(), max_per_query(owner, score, images))
    top_images, top_texts = TopK(operands, min(SHOWN, images)), TopK(operands.swap(), min(DEPTH, texts))
    for_texts: list[RankCounter | TopK] = [by_text] if ranks_only else [by_text, top_images]
    for_images: list[RankCounter | TopK] = [by_image] if ranks_only else [by_image, top_texts]
    for i, j, block, transposed in score_blocks(operands, pairs, chunk):
        for consumer in for_texts:
            consumer.update(block, i, j)
        for consumer in for_images:
            consumer.update(transposed, j, i)
    ranks = {"rank_by_text": by_text.counts.cpu(), "rank_by_image": by_image.counts.cpu()}
    if ranks_only:
        return ranks
    owner, owned, score = owner.cpu(), owned.cpu(), score.cpu()
    found = {"owner": owner, "score_of_pair": score.float(), **ranks}
    order, place = sort_pairs(owner, score, images)
    _, best_images, image_scores = _merge(pairs.query.cpu(), owner, score, torch.zeros_like(owner), top_images)
    rank, best_texts, text_scores = _merge(owner[order], order, score[order], place, top_texts)
    return found | {
        "last_by_image": torch.zeros(images, dtype=torch.int64).scatter_reduce_(0, owner[order], rank, "amax"),
        "ndcg_by_image": sum_by_index(owner[order], gain(rank), images) / ideal_gain(owned),
        "best_by_text": best_images,
        "score_by_text": image_scores,
        "best_by_image": best_texts,
        "score_by_image": text_scores,
    }


def sort_pairs(query: Tensor, score: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by query and, for each query, by descending score.

    Args:
        query: (n,) the query of each pair.
        score: (n,) the score of each pair.
        size: number of queries.

    Returns:
        The order (n,), and for each pair in it the number of the query's pairs before it.
    """
    order = torch.argsort(score, descending=True, stable=True)
    order = order[torch.argsort(query[order], stable=True)]
    counts = torch.bincount(query, minlength=size)
    return order, torch.arange(len(order)) - (counts.cumsum(0) - counts)[query[order]]


def _merge(
    query: Tensor, positive: Tensor, score: Tensor, place: Tensor, negatives: TopK
) -> tuple[Tensor, Tensor, Tensor]:
    """Insert positives among the first negatives.

    Args:
        query: (n,) the query of each positive.
        positive: (n,) candidates.
        score: (n,) exact scores.
        place: (n,) number of the query's positives before it.
        negatives: the first negatives.

    Returns:
        The ranks (n,) of the positives, which may be too small where they are at least the number of negatives given;
        the first candidates (Q, 5); their scores.
    """
    index, scores = negatives.result()  # (Q, k)
    before = (scores[query] >= score[:, None] - TIE).sum(1)  # negatives before each positive
    rank = before + place
    width = min(SHOWN, len(negatives.operands.candidates))
    best, best_scores = torch.full((len(index), width), -1), torch.zeros(len(index), width)
    shown = rank < width
    best[query[shown], rank[shown]], best_scores[query[shown], rank[shown]] = positive[shown], score[shown].float()
    inserted = torch.zeros(len(index), index.shape[1] + 1, dtype=torch.int64)  # positives before each negative
    inserted.index_put_((query, before), torch.ones_like(query), accumulate=True)
    column = inserted.cumsum(1)[:, :-1] + torch.arange(index.shape[1])  # ranks of the negatives
    row, negative = torch.nonzero((column < width) & (index >= 0)).unbind(1)
    best[row, column[row, negative]] = index[row, negative]
    best_scores[row, column[row, negative]] = scores[row, negative].float()
    return rank, best, best_scores


def gain(rank: Tensor) -> Tensor:
    """Compute the contribution of a positive to nDCG@10 before normalization."""
    return (rank < DEPTH) / torch.log2(rank.double() + 2)


def ideal_gain(positives: Tensor) -> Tensor:
    """Compute the largest possible sum of gains of this many positives."""
    sums = torch.cat((torch.zeros(1, dtype=torch.float64), gain(torch.arange(DEPTH)).cumsum(0)))
    return sums[positives.clamp(max=DEPTH)]


def sum_by_index(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sum the values of each index."""
    return torch.zeros(size, dtype=torch.float64).index_add_(0, index, values)


def weighted_median(values: Tensor, unit: Tensor) -> Statistic:
    """Return the weighted median of values (M,), each with the weight of its unit; the mean of two middle values."""
    values, order = values.double().sort()
    unit = unit[order]

    def search(weights: Tensor, since: int, until: int) -> tuple[Tensor, bool]:
        """Search a range of the sorted values; return the medians (R,), and whether all of them are in the range."""
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
            medians, inside = search(part, 3 * eighth, 5 * eighth + 1)  # The medians of samples are close together.
            found.append(medians if inside else search(part, 0, len(values))[0])
        return torch.cat(found)

    return statistic


def _chance(names: Iterable[str], texts_per_image: Tally[int], texts: int) -> dict[str, float]:
    """Compute the expected value of metrics for an order drawn at random.

    Args:
        names: the metrics.
        texts_per_image: number of images for each number of texts that an image has.
        texts: number of texts.
    """
    images = sum(texts_per_image.values())
    found = {
        "image_retrieval_ndcg@10": gain(torch.arange(min(DEPTH, images))).sum().item() / images,
        "text_retrieval_ndcg@10": _expected(texts_per_image, _ndcg_by_chance, texts),
        "mean_recall@1": 1 / images,  # in both directions: an image has on average T / I of the T texts
        "median_rank": (images + 1) / 2,
        "mrr": sum(1 / rank for rank in range(1, images + 1)) / images,
    }
    for name in names:
        kind, _, number = name.partition("@")
        if kind == "image_retrieval_recall":
            found[name] = int(number) / images
        elif kind == "text_retrieval_recall":
            found[name] = _expected(texts_per_image, _any_by_chance, texts, int(number))
        elif kind == "text_retrieval_all":
            found[name] = _expected(texts_per_image, _all_by_chance, texts, int(number))
    return {name: found[name] for name in names}


def _expected(queries: Tally[int], value: Callable[..., float], *args: int) -> float:
    """Average `value(positives, *args)` over queries, given the number of queries for each number of positives."""
    return sum(count * value(positives, *args) for positives, count in queries.items()) / sum(queries.values())


def _any_by_chance(positives: int, candidates: int, k: int) -> float:
    """Compute the probability that k candidates drawn at random include a positive."""
    return 1 - math.comb(candidates - positives, k) / math.comb(candidates, k)


def _all_by_chance(positives: int, candidates: int, k: int) -> float:
    """Compute the probability that k candidates drawn at random include all positives."""
    return math.comb(candidates - positives, k - positives) / math.comb(candidates, k)


def _ndcg_by_chance(positives: int, candidates: int) -> float:
    """Compute the expected nDCG@10: a positive is equally likely at each rank."""
    gains = gain(torch.arange(min(DEPTH, candidates))).sum() * positives / candidates
    return float(gains / ideal_gain(torch.tensor(positives)))


def _precision_by_chance(positives: int, candidates: int) -> float:
    """Compute the expected average precision (Bestgen 2015, The Prague Bulletin of Mathematical Linguistics 103)."""
    harmonic = sum(1 / rank for rank in range(1, candidates + 1))
    return (harmonic + (positives - 1) / max(1, candidates - 1) * (candidates - harmonic)) / candidates


# Among items of one kind


def group_metrics(
    x: Tensor,
    group: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    unit: Tensor | None = None,
    replicates: int = 1000,
) -> Scores:
    """Measure how well items retrieve the others of their group among all items, with 95% bootstrap intervals.

    Args:
        x: (N, E) of unit length.
        group: (N,) number of each item's group. An item alone in its group is a candidate, but not a query.
        ks: values of K of the recalls; those above the number of candidates are left out.
        unit: (N,) the unit that the bootstrap draws for each item, such as the image of a caption; absent, the item.
        replicates: number of bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `group_bootstrap`. The items are, for the M queries in order:

        - `group` (N,): as given.
        - `query` (M,): number of the item.
        - `unit` (M,): its unit, renumbered from 0.
        - `rank` (M,): rank of the best other item of its group, 0-based, in which ties count.
        - `ndcg` (M,) float64: nDCG@10.
        - `precision` (M,) float64: average precision.

    Raises:
        ValueError: If no group has two items, or the lengths of the arguments differ.
    """
    group = group.cpu()
    if len(group) != len(x) or (unit is not None and len(unit) != len(x)):
        raise ValueError(f"{len(x)} embeddings need {len(x)} numbers of groups and units")
    _, group_of, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    query = torch.nonzero(sizes[group_of] > 1)[:, 0]
    if not len(query):
        raise ValueError("no group has two items: there is nothing to find")
    rank_queries = _rank_by_sorting if int(sizes.max()) > MAX_COUNTED + 1 else _rank_by_counting
    rank, ndcg, precision = rank_queries(x, group_of, query)
    units = torch.unique((torch.arange(len(x)) if unit is None else unit.cpu())[query], return_inverse=True)[1]
    items = {"group": group, "query": query, "unit": units, "rank": rank, "ndcg": ndcg, "precision": precision}
    bootstrap = group_bootstrap(items, ks)
    positives, others = Tally((sizes[group_of][query] - 1).tolist()), len(x) - 1
    chance = {f"recall@{k}": _expected(positives, _any_by_chance, others, k) for k in ks if k <= others}
    chance["ndcg@10"] = _expected(positives, _ndcg_by_chance, others)
    chance["mean_average_precision"] = _expected(positives, _precision_by_chance, others)
    return Scores(bootstrap.values(), bootstrap.intervals(replicates=replicates), chance, items)


def group_bootstrap(items: dict[str, Tensor], ks: Sequence[int] = (1, 5, 10)) -> BootstrapMetrics:
    """Return the metrics of `group_metrics` as functions of the weights of the units.

    Args:
        items: items of `group_metrics`.
        ks: values of K of the recalls; those above the number of candidates are left out.

    Returns:
        The metrics:

        - `recall@K`: share of queries with at least one positive among the first K.
        - `ndcg@10`: see `retrieval_bootstrap`.
        - `mean_average_precision`: mean over the queries of the average precision: the mean, over the positives, of the
          share of positives among the candidates down to that positive.
    """
    unit, rank = items["unit"], items["rank"]
    found = {f"recall@{k}": mean(rank < k, unit) for k in ks if k < len(items["group"])}
    found["ndcg@10"] = mean(items["ndcg"], unit)
    found["mean_average_precision"] = mean(items["precision"], unit)
    return BootstrapMetrics(found, int(unit.max()) + 1)


def _rank_by_counting(x: Tensor, group: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the metrics of each query by counting the negatives before each positive.

    Args:
        x: (N, E) embeddings.
        group: (N,) number of each item's group.
        query: (M,) items that are queries.

    Returns:
        The rank of the best positive, nDCG@10 and average precision, (M,) each.
    """
    sizes = torch.bincount(group)
    order = torch.argsort(group, stable=True)
    start, place = _places_in_group(group, order)
    most = int(sizes.max()) - 1
    # The positives of an item are the next ones in its group, in a cycle.
    steps = torch.arange(1, most + 1)
    row, step = torch.nonzero(steps < sizes[group[query]][:, None]).unbind(1)  # (n,), sorted by query
    item = query[row]
    positive = order[start[item] + (place[item] + 1 + step) % sizes[group[item]]]
    operands = Operands.from_embeddings(x if len(query) == len(x) else x[query.to(x.device)], x)
    score = operands.exact_scores(row, positive)
    sorting, nth = sort_pairs(row, score.cpu(), len(query))
    row, score, positive = row[sorting], score[sorting.to(x.device)], positive[sorting]
    thresholds = score.new_full((most, len(query)), torch.inf)
    thresholds[nth.to(x.device), row.to(x.device)] = score
    counters = [RankCounter(operands, threshold) for threshold in thresholds]
    # The positives and the query itself are left out.
    masked_query, masked = torch.cat((row, torch.arange(len(query)))), torch.cat((positive, query))
    by_query = torch.argsort(masked_query, stable=True)
    for i, j, block, _ in score_blocks(operands, QueryPairs(masked_query[by_query], masked[by_query])):
        for counter in counters:
            counter.update(block, i, j)
    rank = torch.stack([counter.counts for counter in counters]).cpu()[nth, row] + nth
    positives = torch.bincount(row, minlength=len(query))
    precision = sum_by_index(row, (nth + 1) / (rank + 1).double(), len(query)) / positives
    return rank[nth == 0], sum_by_index(row, gain(rank), len(query)) / ideal_gain(positives), precision


def _places_in_group(group: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each item the start of its group in an order by group, and its own place after that start."""
    sizes = torch.bincount(group)
    start = (sizes.cumsum(0) - sizes)[group]
    return start, torch.empty_like(order).scatter_(0, order, torch.arange(len(order))) - start


def _rank_by_sorting(x: Tensor, group: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as `_rank_by_counting` by sorting the float64 scores of each item, for large groups."""
    embeddings, group, found = x.detach().double(), group.to(x.device), []
    Operands.from_embeddings(x, x)  # refuses embeddings that cannot be ranked
    for items in query.to(x.device).split(max(1, _CELLS // len(x))):
        positive = group[items][:, None] == group  # (m, N)
        positive.scatter_(1, items[:, None], False)
        scores = (embeddings[items] @ embeddings.T).sub_(TIE * positive)  # A positive loses a tie.
        order = scores.scatter_(1, items[:, None], -torch.inf).argsort(1, descending=True)
        hits = positive.gather(1, order).double()
        positives = hits.sum(1)
        precision = hits.cumsum(1).div_(torch.arange(1, len(x) + 1, device=x.device)).mul_(hits).sum(1) / positives
        gains = hits[:, :DEPTH].cpu() @ gain(torch.arange(min(DEPTH, len(x))))
        found.append((hits.argmax(1).cpu(), gains / ideal_gain(positives.long().cpu()), precision.cpu()))
    rank, ndcg, precision = (torch.cat(parts) for parts in zip(*found))
    return rank, ndcg, precision
