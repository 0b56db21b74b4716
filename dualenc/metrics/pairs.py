"""Retrieval among pairs of texts, in both directions, by distinct text: equal texts are one query and one candidate."""

import torch
from torch import Tensor

from dualenc.metrics.bootstrap import BootstrapMetrics, Statistic, mean
from dualenc.metrics.ranking import TIE, Operands, QueryPairs, RankCounter, TopK, max_per_query, score_blocks
from dualenc.metrics.retrieval import DEPTH, gain, ideal_gain, sort_pairs, sum_by_index, weighted_median


def text_pair_items(first: Tensor, second: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Compute the outcome of each distinct text of pairs, which finds the texts that it is paired with.

    Args:
        first: (N, E) unit vectors of the first texts.
        second: (N, E) unit vectors of the second texts.
        ids: (N, 2) int64, equal where texts are equal.

    Returns:
        For F distinct first texts and S distinct second texts:

        - `rank_by_first` (F,) int64: rank of the best positive among the second texts, 0-based, in which ties count.
        - `ndcg_by_first` (F,) float64: nDCG@10.
        - `unit_of_first` (F,) int64: group of texts that pairs connect, directly or by other texts.
        - `rank_by_second`, `ndcg_by_second`, `unit_of_second` (S,): the same of the second texts.

    Raises:
        ValueError: If vectors are not finite.
    """
    (own, firsts), (other, seconds) = (_distinct(column) for column in ids.unbind(1))
    found = {}
    for name, pairs, queries, candidates in (
        ("first", (own, other), first[firsts], second[seconds]),
        ("second", (other, own), second[seconds], first[firsts]),
    ):
        key = (pairs[0] * len(candidates) + pairs[1]).unique()
        relevant = QueryPairs(key // len(candidates), key % len(candidates))
        found[f"rank_by_{name}"], found[f"ndcg_by_{name}"] = _outcomes(queries, candidates, relevant)
    units = _connected(own, other)
    return found | {"unit_of_first": units[firsts], "unit_of_second": units[seconds]}


def text_pair_bootstrap(items: dict[str, Tensor]) -> BootstrapMetrics:
    """Return the metrics of pairs of texts as functions of the weights of groups of texts that pairs connect.

    Args:
        items: items of `text_pair_items`.

    Returns:
        The metrics, each the mean over distinct texts:

        - `first_retrieval_recall@K`: share of the second texts with a first text of theirs among the first K, for K of
          1, 5 and 10 up to the number of distinct first texts. `second_retrieval_recall@K`: the reverse.
        - `first_retrieval_ndcg@10`, `second_retrieval_ndcg@10`: see `dualenc.metrics.retrieval.retrieval_bootstrap`.
        - `mean_recall@1`: mean of the two recalls at 1.
        - `median_rank` (1-based) and `mrr`: median and mean reciprocal of the rank of the second texts' best first
          text.
    """
    found: dict[str, Statistic] = {}
    # The texts that are found are on the other side than the queries.
    sides = {"first": "second", "second": "first"}
    for name, by in sides.items():
        rank, unit = items[f"rank_by_{by}"], items[f"unit_of_{by}"]
        count = len(items[f"rank_by_{name}"])
        found |= {f"{name}_retrieval_recall@{k}": mean(rank < k, unit) for k in (1, 5, 10) if k <= count}
    for name, by in sides.items():
        found[f"{name}_retrieval_ndcg@10"] = mean(items[f"ndcg_by_{by}"], items[f"unit_of_{by}"])
    one, reverse = found["first_retrieval_recall@1"], found["second_retrieval_recall@1"]
    found["mean_recall@1"] = lambda weights: (one(weights) + reverse(weights)) / 2
    rank, unit = items["rank_by_second"] + 1, items["unit_of_second"]
    found["median_rank"] = weighted_median(rank, unit)
    found["mrr"] = mean(1 / rank.double(), unit)
    return BootstrapMetrics(found, int(items["unit_of_first"].max()) + 1)


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number (N,) of each text among the distinct ones, and the first place (F,) of each distinct one."""
    _, number = ids.unique(return_inverse=True)
    places = torch.full((int(number.max()) + 1,), len(ids)).scatter_reduce_(0, number, torch.arange(len(ids)), "amin")
    return number, places


def _connected(own: Tensor, other: Tensor) -> Tensor:
    """Return the group (N,) of each pair, numbered from 0: pairs that share a text are of one group, and so on."""
    group = torch.arange(len(own))
    while True:
        before = group
        for text in (own, other):
            smallest = torch.full((int(text.max()) + 1,), len(own)).scatter_reduce_(0, text, group, "amin")
            group = smallest[text]
        if torch.equal(before, group):
            return group.unique(return_inverse=True)[1]


def _outcomes(queries: Tensor, candidates: Tensor, relevant: QueryPairs) -> tuple[Tensor, Tensor]:
    """Return the rank (Q,) of each query's best positive, and nDCG@10 (Q,)."""
    operands, number = Operands.from_embeddings(queries, candidates), len(queries)
    score = operands.exact_scores(*relevant)
    best = RankCounter(operands, max_per_query(relevant.query, score, number))
    top = TopK(operands, min(DEPTH, len(candidates)))  # of the negatives
    for i, j, block, _ in score_blocks(operands, relevant):
        best.update(block, i, j)
        top.update(block, i, j)
    order, place = sort_pairs(relevant.query, score, number)
    query = relevant.query[order]
    rank = place + (top.result()[1][query] >= score[order, None] - TIE).sum(1)
    return best.counts, sum_by_index(query, gain(rank), number) / ideal_gain(torch.bincount(query, minlength=number))
