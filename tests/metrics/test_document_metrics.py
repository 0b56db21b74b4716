"""Document retrieval: metrics equal to pytrec_eval on the same scores, and orders equal to brute force."""

from itertools import permutations

import numpy as np
import pytest
import pytrec_eval
import torch
import torch.nn.functional as F
from torch import Tensor

import dualenc.metrics.documents as module
from dualenc.metrics import Judgments, document_chance, document_items, find_documents, reranked
from dualenc.metrics.ranking import score_blocks

MEASURES = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100", "map@100": "map_cut_100"}


def judged(rng: np.random.Generator, queries: int, documents: int, missing: bool = True) -> Judgments:
    """Draw graded judgments: some queries have many relevant documents, one has none, some name missing ones."""
    counts = rng.integers(1, min(30, documents), queries)
    counts[rng.integers(queries)] = 0
    query = np.repeat(np.arange(queries), counts)
    document = np.concatenate([rng.permutation(documents)[:n] for n in counts])
    if missing:
        document[rng.random(len(query)) < 0.1] = -1
    return Judgments(*map(torch.from_numpy, (query, document, rng.integers(1, 4, len(query)))))


def vectors(rng: np.random.Generator, count: int, different: int, size: int = 8) -> Tensor:
    """Draw unit vectors with many copies among them, so that scores tie."""
    drawn = F.normalize(torch.from_numpy(rng.normal(size=(different, size))).float(), dim=-1)
    return drawn[torch.arange(count) if different == count else torch.from_numpy(rng.integers(different, size=count))]


def scores_of(queries: Tensor, documents: Tensor) -> np.ndarray:
    return (queries.double() @ documents.double().T).float().numpy()


def trec(scores: np.ndarray, relevant: Judgments, names: list[str]) -> dict[str, list[float]]:
    """Return pytrec_eval's metrics of each query; documents that score -inf are not retrieved."""
    qrels: dict[str, dict[str, int]] = {str(q): {"none": 0} for q in range(len(scores))}
    for i, (q, d, gain) in enumerate(zip(*(x.tolist() for x in relevant), strict=True)):
        qrels[str(q)][names[d] if d >= 0 else f"missing {i}"] = gain
    runs = {
        str(q): {name: float(s) for name, s in zip(names, row, strict=True) if s > -np.inf}
        for q, row in enumerate(scores)
    }
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "map_cut.100"}).evaluate(runs)
    cut = {q: dict(sorted(run.items(), key=lambda x: (x[1], x[0]), reverse=True)[:10]) for q, run in runs.items()}
    first = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(cut)
    every = [str(q) for q in range(len(scores))]
    metrics = {name: [found[q][measure] if q in found else 0.0 for q in every] for name, measure in MEASURES.items()}
    return metrics | {"mrr@10": [first[q]["recip_rank"] if q in first else 0.0 for q in every]}


def against(scores: np.ndarray, relevant: Judgments) -> np.ndarray:
    """Return scores in which documents that tie are moved apart, the less relevant ones first."""
    gain = np.zeros(scores.shape)
    for q, d, g in zip(*(x.tolist() for x in relevant), strict=True):
        if d >= 0:
            gain[q, d] = g
    moved = np.full(scores.shape, -np.inf)
    for q, row in enumerate(scores):
        order = np.lexsort((gain[q], -row))
        moved[q, order] = np.where(np.isinf(row[order]), -np.inf, -np.arange(len(row)))
    return moved


@pytest.mark.parametrize(("documents", "different"), [(7, 3), (150, 150), (400, 60), (400, 2)])
def test_metrics_equal_pytrec_eval_in_both_orders_of_ties(seed: int, documents: int, different: int) -> None:
    rng = np.random.default_rng(seed)
    queries, corpus = vectors(rng, 12, 12), vectors(rng, documents, different)
    relevant = judged(rng, 12, documents)
    skip = torch.from_numpy(rng.integers(-1, documents, 12))
    names = sorted((f"{x:x}é" for x in rng.permutation(10**6)[:documents]), reverse=True)
    found = find_documents(queries, corpus, relevant, skip=skip)
    scores = scores_of(queries, corpus)
    scores[skip >= 0, skip[skip >= 0]] = -np.inf
    for gains, expected in (
        (found.by_name, trec(scores, relevant, names)),
        (found.gain, trec(against(scores, relevant), relevant, names)),
    ):
        for name, values in document_items(gains, relevant).items():
            assert values.tolist() == pytest.approx(expected[name], abs=1e-6), name
    if documents == 400:
        assert not torch.equal(found.gain, found.by_name)


@pytest.mark.parametrize("blocks", [4096, 5])
def test_the_best_passages_are_found(seed: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One document has most of the passages, so that the search must look further; blocks do not matter."""
    monkeypatch.setattr(module, "score_blocks", lambda *given: score_blocks(*given, blocks))
    rng = np.random.default_rng(seed)
    sizes = torch.from_numpy(rng.integers(1, 4, 30))
    sizes[int(rng.integers(30))] = 200
    owner = torch.arange(30).repeat_interleave(sizes)
    queries, passages = vectors(rng, 9, 9), vectors(rng, len(owner), 150)
    relevant = judged(rng, 9, 30)
    found = find_documents(queries, passages, relevant, owner=owner, depth=12)
    scores = torch.full((9, 30), -torch.inf)
    every = torch.from_numpy(scores_of(queries, passages))
    scores = scores.scatter_reduce(1, owner.expand(9, -1), every, "amax")
    moved = torch.from_numpy(against(scores.numpy(), relevant))
    assert torch.equal(found.score, scores.gather(1, moved.topk(12).indices))
    assert torch.equal(found.score, every.gather(1, found.passage))
    assert torch.equal(owner[found.passage], found.document)
    assert all(len(set(row)) == 12 for row in found.document.tolist())
    whole = find_documents(queries, passages, relevant, owner=owner, depth=30)
    assert torch.equal(whole.gain[:, :12], found.gain)


def test_scores_that_differ_by_less_than_fp32_tie(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = F.normalize(torch.from_numpy(rng.normal(size=(1, 16))), dim=-1).float()
    worse = x.clone()
    near = x[0].abs().argmin()
    worse[0, near] = torch.nextafter(worse[0, near], torch.tensor(0.0))
    exact = (x.double() @ torch.cat([x, worse]).double().T)[0]
    relevant = Judgments(*(torch.tensor([n]) for n in (0, 0, 1)))
    found = find_documents(x, torch.cat([x, worse]), relevant)
    ties = exact[0].float() == exact[1].float()
    assert found.gain.tolist() == [[0, 1] if ties else [1, 0]]
    assert exact[0] > exact[1]


def test_reranking_sorts_the_first_documents_against_the_query(seed: int) -> None:
    rng = np.random.default_rng(seed)
    relevant = judged(rng, 6, 40, missing=False)
    found = find_documents(vectors(rng, 6, 6), vectors(rng, 40, 40), relevant)
    scores = torch.from_numpy(rng.integers(0, 4, (6, 15))).float()
    gains = reranked(found, scores)
    assert torch.equal(gains[:, 15:], found.gain[:, 15:])
    for row, own, old in zip(gains, scores, found.gain, strict=True):
        expected = sorted(range(15), key=lambda i: (-own[i].item(), old[i].item()))
        assert row[:15].tolist() == old[expected].tolist()
    one = Judgments(torch.arange(6), torch.ones(6).long(), torch.ones(6).long())
    few = find_documents(vectors(rng, 6, 6), vectors(rng, 4, 4), one, skip=torch.zeros(6).long())
    assert reranked(few, torch.tensor([0, 0, 0, 9]).expand(6, 4)).tolist() == [[0, 0, 1, 0]] * 6


def test_chance_is_the_mean_over_all_orders(seed: int) -> None:
    rng = np.random.default_rng(seed)
    relevant = judged(rng, 3, 5)
    gain = torch.zeros(3, 5, dtype=torch.int64)
    known = relevant.document >= 0
    gain[relevant.query[known], relevant.document[known]] = relevant.gain[known]
    every = [document_items(gain[:, list(order)], relevant) for order in permutations(range(5))]
    for name, value in document_chance(relevant, 3, 5).items():
        assert value == pytest.approx(np.mean([items[name].mean() for items in every])), name


def test_what_cannot_be_ranked_is_refused() -> None:
    none = Judgments(*(torch.zeros(0).long(),) * 3)
    with pytest.raises(ValueError, match="no documents"):
        find_documents(torch.ones(1, 2), torch.ones(0, 2), none)
    with pytest.raises(ValueError, match="not finite"):
        find_documents(torch.ones(1, 2), torch.full((1, 2), torch.nan), none)
