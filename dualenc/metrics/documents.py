"""Metrics of document retrieval by graded judgments, as trec_eval defines them, and the exact search behind them.

The score of a document is the product of two embeddings rounded to fp32, so that it does not depend on how the products
were cut into blocks. Documents of equal score are ordered against the query: the less relevant one comes first.
trec_eval sorts them by their names instead, see `Found.by_name`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dualenc.metrics.bootstrap import BootstrapMetrics, mean
from dualenc.metrics.ranking import Operands, QueryPairs, TopK, score_blocks

GAIN_DEPTH, LIST_DEPTH = 10, 100  # ranks that count for nDCG and MRR, and for recall and MAP
METRICS = (f"ndcg@{GAIN_DEPTH}", f"recall@{LIST_DEPTH}", f"map@{LIST_DEPTH}", f"mrr@{GAIN_DEPTH}")


class Judgments(NamedTuple):
    """Relevant documents of queries. Documents that were judged not to be relevant are not listed."""

    query: Tensor  # (n,) int64
    document: Tensor  # (n,) int64; -1 for a relevant document that is not in the corpus and cannot be found
    gain: Tensor  # (n,) int64, 1 or more


class Found(NamedTuple):
    """The first K documents of each query; entries are -1 and -inf where there are fewer."""

    document: Tensor  # (Q, K) int64
    passage: Tensor  # (Q, K) int64, the best passage of each document
    score: Tensor  # (Q, K) float32
    gain: Tensor  # (Q, K) int64, 0 for documents that are not relevant
    by_name: Tensor  # (Q, K) int64, the gains if documents of equal score are sorted by their number


class _Scored(NamedTuple):
    """Scored documents of queries, in any order."""

    query: Tensor  # (n,) int64
    document: Tensor  # (n,)
    passage: Tensor  # (n,)
    score: Tensor  # (n,) float64

    def take(self, chosen: Tensor) -> "_Scored":
        return _Scored(*(x[chosen] for x in self))

    def best_passages(self, documents: int) -> "_Scored":
        """Keep the best passage of each document of a query; of equal ones the first."""
        order = _sorted(self.passage, -self.score, self.query * documents + self.document)
        found = self.take(order)
        return found.take(_is_first(found.query * documents + found.document))


def find_documents(
    queries: Tensor,
    passages: Tensor,
    judgments: Judgments,
    *,
    owner: Tensor | None = None,
    skip: Tensor | None = None,
    depth: int = LIST_DEPTH,
) -> Found:
    """Find the first documents of each query, exactly, without the whole matrix of scores in memory.

    The relevant documents are left out of the search, and inserted by their exact scores.

    Args:
        queries: (Q, E) embeddings.
        passages: (P, E) embeddings of the documents, or of their passages.
        judgments: relevant documents.
        owner: (P,) document of each passage, ascending from 0; None where each document is one passage. The score of a
            document is that of its best passage.
        skip: (Q,) document to leave out for the query, such as the query itself; -1 for none.
        depth: K, the number of documents to find; all where there are fewer.

    Raises:
        ValueError: If embeddings are not finite, or there are none.

    Example:
        >>> import torch
        >>> from dualenc.metrics import Judgments, find_documents
        >>> queries, documents = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [1.0, 0.0], [1.0, 0.0]])
        >>> relevant = Judgments(torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))
        >>> found = find_documents(queries, documents, relevant)
        >>> found.document, found.gain
        (tensor([[2, 1, 0]]), tensor([[0, 1, 0]]))
    """
    if not len(queries) or not len(passages):
        raise ValueError("there are no queries" if not len(queries) else "there are no documents")
    queries, passages = queries.detach().cpu(), passages.detach().cpu()
    owner = torch.arange(len(passages)) if owner is None else owner
    documents = int(owner[-1]) + 1
    depth = min(depth, documents)
    bounds = torch.searchsorted(owner, torch.arange(documents + 1))  # passages of document d: bounds[d] to bounds[d+1]
    known = judgments.document >= 0
    if skip is None:
        skip = torch.full((len(queries),), -1)
    pairs = judgments.query[known] * documents + judgments.document[known]
    left_out = torch.nonzero(skip >= 0)[:, 0]
    skipped = left_out * documents + skip[left_out]
    relevant = pairs[~torch.isin(pairs, skipped)]
    operands = Operands.from_embeddings(queries, passages)
    masked = _passages_of(torch.cat([pairs, skipped]).unique(), bounds, documents)
    others = _search(operands, masked, owner, depth)
    own = _passages_of(relevant, bounds, documents)
    scores = operands.exact_scores(own.query, own.candidate)
    best = _Scored(own.query, owner[own.candidate], own.candidate, scores).best_passages(documents)
    gain_of = torch.zeros(0) if not len(pairs) else judgments.gain[known]
    order = torch.argsort(pairs)
    place = torch.searchsorted(pairs[order], best.query * documents + best.document)
    gain = torch.cat([gain_of[order][place].long(), torch.zeros(len(others.query), dtype=torch.int64)])
    return _first(_Scored(*(torch.cat(two) for two in zip(best, others))), gain, len(queries), depth)


def _passages_of(pairs: Tensor, bounds: Tensor, documents: int) -> QueryPairs:
    """Return the passages of pairs of a query and a document, sorted by query.

    Args:
        pairs: (n,) query * documents + document.
        bounds: (D + 1,) first passage of each document.
        documents: D, the number of documents.
    """
    pairs = pairs.sort().values
    query, document = pairs // documents, pairs % documents
    sizes = bounds[document + 1] - bounds[document]
    inside = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return QueryPairs(query.repeat_interleave(sizes), bounds[document].repeat_interleave(sizes) + inside)


def _search(operands: Operands, masked: QueryPairs, owner: Tensor, depth: int) -> _Scored:
    """Find `depth` documents or more of each query among those that are not masked, or all of them.

    Twice as many passages are searched for at first. Queries whose passages belong to too few documents are searched
    again with twice the number.
    """
    documents, found = int(owner[-1]) + 1, []
    left, k = torch.arange(len(operands.queries)), 2 * depth
    while len(left):
        k = min(k, len(owner))
        part = operands._replace(queries=operands.queries[left], query_norms=operands.query_norms[left])
        here = torch.isin(masked.query, left)
        mask = QueryPairs(torch.searchsorted(left, masked.query[here]), masked.candidate[here])
        top = TopK(part, k)
        for i, j, block, _ in score_blocks(part, mask):
            top.update(block, i, j)
        index, score = top.result()  # (q, k), -1 where there are fewer
        row, column = torch.nonzero(index >= 0).unbind(1)
        passage = index[row, column]
        best = _Scored(row, owner[passage], passage, score[row, column]).best_passages(documents)
        counts = torch.bincount(best.query, minlength=len(left))
        done = (counts >= depth) | (index[:, -1] < 0) | (k == len(owner))
        kept = best.take(done[best.query])
        found.append(kept._replace(query=left[kept.query]))
        left, k = left[~done], 2 * k
    return _Scored(*(torch.cat(parts) for parts in zip(*found)))


def _first(scored: _Scored, gain: Tensor, queries: int, depth: int) -> Found:
    """Sort documents (n,) with their gains by query and score, and keep the first ones of each query."""
    score = scored.score.float()

    def tables(order: Tensor, *columns: tuple[Tensor, float]) -> list[Tensor]:
        """Return columns (n,) as tables (Q, K), given what stands in empty places."""
        rank = rank_in_group(scored.query[order])
        order, rank = order[rank < depth], rank[rank < depth]
        out = [torch.full((queries, depth), empty, dtype=column.dtype) for column, empty in columns]
        for table, (column, _) in zip(out, columns):
            table[scored.query[order], rank] = column[order]
        return out

    (by_name,) = tables(_sorted(scored.document, -score, scored.query), (gain, 0))
    columns = (scored.document, -1), (scored.passage, -1), (score, -torch.inf), (gain, 0)
    order = _sorted(scored.document, gain, -score, scored.query)
    document, passage, best, gains = tables(order, *columns)
    return Found(document, passage, best, gains, by_name)


def reranked(found: Found, scores: Tensor) -> Tensor:
    """Return the gains (Q, K) after the first k documents of each query are sorted by other scores.

    Documents of equal score are ordered against the query. The documents after the first k keep their places.

    Args:
        found: documents of the first stage.
        scores: (Q, k) scores of the first k documents; those of missing documents do not matter.
    """
    k = scores.shape[1]
    gain = found.gain[:, :k]
    scores = scores.double().masked_fill(found.document[:, :k] < 0, -torch.inf)
    order = torch.argsort(gain, stable=True)
    order = order.gather(1, torch.argsort(-scores.gather(1, order), stable=True))
    return torch.cat([gain.gather(1, order), found.gain[:, k:]], 1)


def document_items(gain: Tensor, judgments: Judgments) -> dict[str, Tensor]:
    """Compute the metrics of each query from the gains of its documents in order.

    - `ndcg@10`: sum of gain / log2(1 + rank) over the first 10 documents, divided by its largest possible value
      (Järvelin and Kekäläinen 2002, ACM TOIS 20, with linear gain).
    - `recall@100`: share of the relevant documents among the first 100.
    - `map@100`: sum of the precision at each relevant document among the first 100, divided by their number in the
      judgments.
    - `mrr@10`: reciprocal of the rank of the first relevant document; 0 if it is not among the first 10.

    Args:
        gain: (Q, K) gains of the first documents, with K of at least 100 or all documents.
        judgments: relevant documents; a query without any has zeros.

    Returns:
        (Q,) float64 for each metric.

    Example:
        >>> import torch
        >>> from dualenc.metrics import Judgments, document_items
        >>> relevant = Judgments(torch.tensor([0, 0]), torch.tensor([4, 7]), torch.tensor([1, 2]))
        >>> {name: round(x.item(), 3) for name, x in document_items(torch.tensor([[0, 2, 0, 1]]), relevant).items()}
        {'ndcg@10': 0.643, 'recall@100': 1.0, 'map@100': 0.5, 'mrr@10': 0.5}
    """
    top, hits = gain[:, :GAIN_DEPTH].double(), (gain[:, :LIST_DEPTH] > 0).double()
    relevant = torch.bincount(judgments.query, minlength=len(gain)).double()
    best = _ideal(judgments, len(gain))
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    first = 1 / torch.arange(1, top.shape[1] + 1).double()
    values = (
        top @ _discount(top.shape[1]) / best.clamp(min=1e-30),
        hits.sum(1) / relevant.clamp(min=1),
        (hits * precision).sum(1) / relevant.clamp(min=1),
        ((top > 0) * first).amax(1) if top.shape[1] else torch.zeros(len(gain)).double(),
    )
    return dict(zip(METRICS, values, strict=True))


def document_bootstrap(items: Mapping[str, Tensor]) -> BootstrapMetrics:
    """Return the means over the queries as functions of the queries' weights.

    Args:
        items: (Q,) values of each metric, by name.
    """
    return BootstrapMetrics({name: mean(x) for name, x in items.items()}, len(next(iter(items.values()))))


def document_chance(judgments: Judgments, queries: int, documents: int) -> dict[str, float]:
    """Compute the expected nDCG@10 and Recall@100 of documents in random order.

    Args:
        judgments: relevant documents.
        queries: Q, the number of queries.
        documents: number of documents in the corpus.
    """
    known = judgments.document >= 0
    gains = torch.zeros(queries).double().index_add_(0, judgments.query[known], judgments.gain[known].double())
    relevant = torch.bincount(judgments.query, minlength=queries).double()
    there = torch.bincount(judgments.query[known], minlength=queries).double()
    discounts = _discount(min(GAIN_DEPTH, documents)).sum()
    ndcg = gains / documents * discounts / _ideal(judgments, queries).clamp(min=1e-30)
    recall = there / relevant.clamp(min=1) * min(1.0, LIST_DEPTH / documents)
    return dict(zip(METRICS[:2], (ndcg.mean().item(), recall.mean().item()), strict=True))


def _ideal(judgments: Judgments, queries: int) -> Tensor:
    """Return the largest possible sum of discounted gains (Q,) float64."""
    order = _sorted(-judgments.gain, judgments.query)
    query, gain = judgments.query[order], judgments.gain[order].double()
    rank = rank_in_group(query)
    counted = rank < GAIN_DEPTH
    sums = torch.zeros(queries, dtype=torch.float64)
    return sums.index_add_(0, query[counted], gain[counted] * _discount(GAIN_DEPTH)[rank[counted]])


def _discount(count: int) -> Tensor:
    """Return the weights (count,) of the ranks in nDCG."""
    return 1 / torch.arange(2, count + 2).double().log2()


def _sorted(*keys: Tensor) -> Tensor:
    """Return the order (n,) by several keys, the last of which is the first to decide."""
    order = torch.arange(len(keys[0]))
    for key in keys:
        order = order[torch.argsort(key[order], stable=True)]
    return order


def _is_first(group: Tensor) -> Tensor:
    """Mark the first member of each run of equal numbers (n,)."""
    first = torch.ones(len(group), dtype=torch.bool)
    first[1:] = group[1:] != group[:-1]
    return first


def rank_in_group(group: Tensor) -> Tensor:
    """Return the place of each member in its run of equal numbers (n,), 0-based."""
    starts = torch.nonzero(_is_first(group))[:, 0]
    sizes = torch.diff(torch.cat([starts, torch.tensor([len(group)])]))
    return torch.arange(len(group)) - starts.repeat_interleave(sizes)
