"""Retrieval of documents by queries: embedding, exact search, re-ranking, and metrics by judgments."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualenc.data.eval_sets.beir import DocumentSet
from dualenc.data.text.passages import cut_passages
from dualenc.evaluation.base import Evaluated, ResultKind, Scored, text_ids
from dualenc.evaluation.embed import Track
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.inference.text_tower import (
    DOCUMENT_PROMPTS,
    QUERY_PROMPTS,
    TextTower,
    check_text_tower,
    load_text_tower,
)
from dualenc.metrics import (
    BootstrapMetrics,
    Found,
    Judgments,
    document_bootstrap,
    document_chance,
    document_items,
    find_documents,
    reranked,
)
from dualenc.metrics.documents import LIST_DEPTH, METRICS
from dualenc.models.heads.classification import Classification
from dualenc.report import AnsweredQuery, Description, Documents, Section
from dualenc.utils.arguments import Precision
from dualenc.utils.errors import DataError, ModelError

CHUNK = 1024  # documents that are read and embedded at a time
QUERIES_AT_ONCE = 8  # queries whose documents are re-ranked at a time
SHOWN, DRAWN = 5, 4  # documents of a query in the report, and queries of each sort
RERANKED = "reranked_"  # beginning of the names of metrics after re-ranking


@dataclass(frozen=True)
class DocumentOptions:
    """Options of document retrieval.

    Attributes:
        query_prompt: text before each query, or the name of one of the model's prompts; None for its prompt "query",
            or else its default.
        document_prompt: the same for each document or passage; None for its prompt "document", "passage" or "corpus",
            or else its default.
        dim: number of dimensions to keep, the first ones; None for all.
        ignore_identical_ids: leave out the document that has the query's id.
        max_passage: longest passage in tokens of the document; longer documents are cut, and their score is that of
            their best passage; None to embed whole documents, as far as the model reads them.
        stride: tokens that a passage has in common with the one before.
        rerank: spec of a text model whose classification head reads a query and a document, and sorts the first
            documents again; None for none.
        rerank_top: number of documents that it sorts.

    Raises:
        DataError: If a number is out of range, or an option has no use without another.
    """

    query_prompt: str | None = None
    document_prompt: str | None = None
    dim: int | None = None
    ignore_identical_ids: bool = False
    max_passage: int | None = None
    stride: int = 0
    rerank: str | None = None
    rerank_top: int = 100

    def __post_init__(self) -> None:
        if self.dim is not None and self.dim < 1:
            raise DataError(f"dim {self.dim} must be 1 or more")
        if self.max_passage is None and self.stride:
            raise DataError(f"stride {self.stride} has no use without max_passage")
        if self.max_passage is not None and not 0 <= self.stride < self.max_passage:
            raise DataError(f"stride {self.stride} must lie between 0 and max_passage {self.max_passage}, less one")
        if self.rerank is None and self.rerank_top != 100:
            raise DataError(f"rerank_top {self.rerank_top} has no use without rerank")
        if self.rerank_top < 1:
            raise DataError(f"rerank_top {self.rerank_top} must be 1 or more")

    def given(self) -> dict[str, str]:
        """Return the options that differ from their defaults, by name."""
        return {one.name: str(x) for one in fields(self) if (x := getattr(self, one.name)) != one.default}


class Reranker:
    """Text model whose head reads a query and a document together, and says how relevant the document is.

    Args:
        predictor: text model with one classification head: of a number, or of two labels, where the second stands for
            a relevant document.

    Raises:
        ModelError: If the model lacks such a head.
    """

    def __init__(self, predictor: TextPredictor) -> None:
        self.predictor, name = predictor, predictor.name
        heads = predictor.model.heads_for("text-classification")
        if len(heads) != 1:
            raise ModelError(f"{name} has {len(heads) or 'no'} classification heads: re-ranking needs one")
        self.head, kind = heads[0], predictor.model.kinds[heads[0]]
        assert isinstance(kind, Classification)  # the only kind for this task
        self.kind, self.labels = kind, predictor.model.head_configs[self.head].labels
        try:
            kind.problem.relevance(torch.zeros(1, len(self.labels)), self.labels)
        except ValueError as error:
            raise ModelError(f"{name} cannot re-rank by its head {self.head!r}: {error}") from None

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Compute the relevance (n,) of pairs of a query and a document."""
        return self.kind.problem.relevance(self.predictor.logits(pairs, self.head), self.labels)


class _Passages(NamedTuple):
    """Embedded documents."""

    vectors: Tensor  # (P, E)
    owner: Tensor | None  # (P,) document of each passage; None where each document is one


class DocumentRetrieval(ResultKind):
    """Retrieval of documents by queries.

    Args:
        options: how documents are embedded and sorted.

    Raises:
        ModelError: If the model that re-ranks cannot be used.
    """

    name = "document-retrieval"
    command = "retrieval"
    title = "Document retrieval"
    description = Description("queries", "retrieval of documents by queries", METRICS[:2])
    hub_task = "text-retrieval"
    task_name = "retrieval of documents"
    identity = {"ids": "queries", "judged": "judgments of queries", "corpus": "corpora"}

    def __init__(self, options: DocumentOptions = DocumentOptions()) -> None:
        self.given = options
        self.reranker = None if options.rerank is None else Reranker(load_text(options.rerank))

    def load(self, spec: str, precision: Precision = "fp32") -> TextTower:
        """See `ResultKind`."""
        return load_text_tower(spec, precision=precision)

    def check(self, spec: str) -> None:
        """See `ResultKind`."""
        check_text_tower(spec)

    def options(self, data: DocumentSet) -> dict[str, str]:
        """See `ResultKind`."""
        return self.given.given()

    def settings(self, data: DocumentSet) -> dict[str, Any]:
        """See `ResultKind`; another model under the same name of a reranker gives another result."""
        own = self.given.given()
        return own if self.reranker is None else own | {"reranker": self.reranker.predictor.fingerprint}

    def answers(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ResultKind`."""
        return {"queries": items["ndcg@10"]}

    def metrics_of_items(self, items: Mapping[str, Tensor]) -> BootstrapMetrics:
        """See `ResultKind`."""
        return document_bootstrap({name: x for name, x in items.items() if name.removeprefix(RERANKED) in METRICS})

    def evaluate(self, embedder: TextTower, data: DocumentSet, *, track: Track = iter, **options: Any) -> Evaluated:
        """Embed queries and documents, search, and compute the metrics.

        Args:
            embedder: model.
            data: documents and queries.
            track: wraps the chunks of documents, and then those of queries to re-rank, for a progress bar.
            options: options of other kinds, which have no use here.
        """
        began, given = monotonic(), self.given
        queries = embedder.embed(data.queries, embedder.prompt(given.query_prompt, QUERY_PROMPTS), given.dim)
        passages = self._embed(embedder, data, track)
        relevant = Judgments(*map(torch.from_numpy, (data.query, data.document, data.gain)))
        found = find_documents(
            queries,
            passages.vectors,
            relevant,
            owner=passages.owner,
            skip=torch.from_numpy(data.own_documents) if given.ignore_identical_ids else None,
            depth=LIST_DEPTH if self.reranker is None else max(LIST_DEPTH, given.rerank_top),
        )
        items, seconds = document_items(found.gain, relevant), {"retrieval": round(monotonic() - began, 2)}
        facts = {"documents": len(data), "passages": len(passages.vectors), "seconds": seconds}
        notes, chance = list(data.notes), document_chance(relevant, len(queries), len(data))
        if passages.owner is not None:
            notes.append(f"{len(data):,} documents in {len(passages.vectors):,} passages")
        facts |= _trec_order(items, document_items(found.by_name, relevant), notes)
        if self.reranker is not None:
            began = monotonic()
            gains = reranked(found, self._scores(self.reranker, embedder, data, found, passages.owner, track))
            seconds["reranking"] = round(monotonic() - began, 2)
            items |= {f"{RERANKED}{name}": x for name, x in document_items(gains, relevant).items()}
            notes.append(_timing(given, self.reranker, seconds))
        bootstrap = self.metrics_of_items(items)
        items |= _identity(data)
        scores = Scored(bootstrap.values(), bootstrap.intervals(), chance, items, {**facts, "notes": notes})
        result = self.result(data.name, embedder.name, len(queries), scores, data.problems)
        return Evaluated(Section(result, _answers(data, found, relevant), None, self.description), items)

    def _embed(self, embedder: TextTower, data: DocumentSet, track: Track) -> _Passages:
        """Embed all documents, or their passages."""
        given, parts, owners = self.given, [], []
        prompt = embedder.prompt(given.document_prompt, DOCUMENT_PROMPTS)
        if given.max_passage is not None:
            _check_room(embedder, given.max_passage, prompt)
        for rows in track([range(i, min(i + CHUNK, len(data))) for i in range(0, len(data), CHUNK)]):
            texts = data.texts(rows)
            if given.max_passage is not None:
                cut = cut_passages(embedder.tokenizer, texts, given.max_passage, given.stride)
                owners.append(torch.arange(rows.start, rows.stop).repeat_interleave(torch.tensor(list(map(len, cut)))))
                texts = [passage for passages in cut for passage in passages]
            parts.append(embedder.embed(texts, prompt, given.dim))
        vectors, start = torch.empty(sum(map(len, parts)), parts[0].shape[1]), 0
        while parts:  # A part is freed once it is copied: the memory holds all vectors once, not twice.
            part = parts.pop(0)
            vectors[start : start + len(part)] = part
            start += len(part)
        return _Passages(vectors, torch.cat(owners) if owners else None)

    def _scores(
        self,
        reranker: Reranker,
        embedder: TextTower,
        data: DocumentSet,
        found: Found,
        owner: Tensor | None,
        track: Track,
    ) -> Tensor:
        """Compute the relevance (Q, k) of the first documents of each query, or of their best passages."""
        documents, passages = (x[:, : self.given.rerank_top] for x in (found.document, found.passage))
        scores = torch.full(documents.shape, -torch.inf)
        for start in track(range(0, len(documents), QUERIES_AT_ONCE)):
            row, column = torch.nonzero(documents[start : start + QUERIES_AT_ONCE] >= 0).unbind(1)
            row += start
            chosen = documents[row, column]
            texts = data.texts(chosen.tolist())
            if owner is not None and self.given.max_passage is not None:
                first = torch.searchsorted(owner, chosen)
                cut = cut_passages(embedder.tokenizer, texts, self.given.max_passage, self.given.stride)
                texts = [one[i] for one, i in zip(cut, (passages[row, column] - first).tolist(), strict=True)]
            pairs = [(data.queries[i], text) for i, text in zip(row.tolist(), texts, strict=True)]
            scores[row, column] = reranker.scores(pairs)
        return scores


def _check_room(embedder: TextTower, size: int, prompt: str) -> None:
    """Refuse passages that the model would truncate."""
    taken, longest = len(embedder.tokenizer.encode([prompt])[0]), embedder.tokenizer.context_length
    if size + taken > longest:
        raise DataError(
            f"max_passage {size} is too long: {embedder.name} reads {longest} tokens, of which {taken} are special "
            "tokens and the prompt"
        )


def _trec_order(items: Mapping[str, Tensor], by_name: Mapping[str, Tensor], notes: list[str]) -> dict[str, Any]:
    """Return the metrics that differ in the order of trec_eval, and note them."""
    values = {name: (items[name].mean().item(), x.mean().item()) for name, x in by_name.items()}
    different = {name: other for name, (own, other) in values.items() if not math.isclose(own, other, abs_tol=1e-9)}
    if not different:
        return {}
    figures = ", ".join(f"{name} {value:.4f}" for name, value in different.items())
    notes.append(f"documents of equal score count against the query; in trec_eval's order, by their ids: {figures}")
    return {"trec_order": different}


def _timing(given: DocumentOptions, reranker: Reranker, seconds: Mapping[str, float]) -> str:
    """Return a sentence on re-ranking."""
    by = f"label {reranker.labels[1]!r}" if len(reranker.labels) > 1 else f"head {reranker.head!r}"
    return (
        f"{RERANKED}: the first {given.rerank_top} documents of each query, sorted by {given.rerank} ({by}) in "
        f"{seconds['reranking']:.1f} seconds, after {seconds['retrieval']:.1f} seconds of embedding and search"
    )


def _identity(data: DocumentSet) -> dict[str, Tensor]:
    """Return the items by which two results are known to be of the same queries, judgments and documents."""
    judged = [hashlib.blake2b(digest_size=16) for _ in data.queries]
    for query, document, gain in zip(data.query.tolist(), data.document.tolist(), data.gain.tolist(), strict=True):
        judged[query].update(f"{data.ids[document] if document >= 0 else ''}\n{gain}\n".encode())
    return {
        "ids": text_ids([f"{name}\n{text}" for name, text in zip(data.query_ids, data.queries, strict=True)]),
        "judged": text_ids([digest.hexdigest() for digest in judged]),
        "corpus": text_ids([data.corpus_fingerprint]),
    }


def _answers(data: DocumentSet, found: Found, relevant: Judgments) -> Documents:
    """Draw queries whose first document is relevant, and queries where it is not, for the report."""
    known = torch.bincount(relevant.query, minlength=len(data.queries)) > 0
    chosen: list[int] = []
    for outcome in (found.gain[:, 0] > 0, (found.gain[:, 0] == 0) & known):
        rows = torch.nonzero(outcome)[:, 0]
        chosen += rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:DRAWN]].tolist()
    answers = []
    for query in chosen:
        here = found.document[query, :SHOWN] >= 0
        documents = found.document[query, :SHOWN][here].tolist()
        gains = found.gain[query, :SHOWN][here].tolist()
        best, missed = torch.nonzero(found.gain[query])[:, 0], ""
        own = relevant.document[(relevant.query == query) & (relevant.document >= 0)]
        if not any(gains) and len(own):
            missed = data.texts([int(own[0])])[0]
        rank = int(best[0]) + 1 if len(best) else None
        shown = list(zip(data.texts(documents), found.score[query, : len(documents)].tolist(), gains, strict=True))
        answers.append(AnsweredQuery(data.queries[query], rank, shown, missed, len(own)))
    return Documents(answers)
