"""Retrieval of images by captions and of captions by images."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualenc.data.eval_sets.base import Problem
from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.evaluation.base import (
    Evaluated,
    EvaluationKind,
    SavedResult,
    Scored,
    image_ids,
    number_of_rows,
    problems,
    reopen,
    text_ids,
    too_few,
)
from dualenc.evaluation.classification import thumbnails
from dualenc.evaluation.embed import SetEmbedder, SetEmbeddings
from dualenc.evaluation.points import points
from dualenc.inference.embedder import Embedder
from dualenc.metrics import BootstrapMetrics, retrieval_answers, retrieval_bootstrap, retrieval_metrics
from dualenc.report import Answers, Description, Ranked, Section, TwoRankings


class _Pairs(NamedTuple):
    """Embeddings of images and of their captions, and what a report shows of them."""

    image: Tensor  # (I, E), embeddings of images that have a caption at least
    text: Tensor  # (T, E), embeddings of the captions
    captions: list[str]  # T
    owner: Tensor  # (T,) number of each caption's image
    picture: Callable[[int], bytes]  # encoded thumbnail of image i
    rows: Tensor  # (I,) numbers of the images before those without a caption were left out

    @classmethod
    def of(
        cls, image: Tensor, text: Tensor, captions: Sequence[str], owner: Tensor, picture: Callable[[int], bytes]
    ) -> "_Pairs":
        """Build the pairs, leaving out images without a caption."""
        rows = torch.unique(owner)
        owner = torch.searchsorted(rows, owner)
        return cls(image[rows], text, list(captions), owner, lambda i: picture(int(rows[i])), rows)


class CrossModalRetrieval(EvaluationKind):
    """Retrieval between images and captions, in both directions."""

    name = "retrieval"
    command = "retrieval"
    title = "Retrieval"
    sets = ("retrieval",)
    description = Description(
        "images",
        "retrieval of images by captions, and of captions by images",
        ("image_retrieval_recall@1", "image_retrieval_recall@10"),
    )
    hub_task = "image-text-retrieval"
    task_name = "retrieval"
    identity = {"ids": "images", "text_ids": "captions", "owner": "images of captions"}

    def embed(self, data: BenchmarkSet, embedder: SetEmbedder) -> SetEmbeddings:
        """See `EvaluationKind`."""
        text = embedder.texts(data.captions[0])
        image, rows, bad = embedder.images(data)
        return SetEmbeddings(image, text, rows, bad)

    def score(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Scored:
        """See `EvaluationKind`."""
        pairs = _pairs(data, embedded)
        found = retrieval_metrics(pairs.image, pairs.text, pairs.owner)
        ids = {"ids": image_ids(data, embedded.rows)[pairs.rows], "text_ids": text_ids(pairs.captions)}
        return Scored(
            found.metrics, found.intervals, found.chance, {**found.items, **ids}, too_few(len(pairs.image), "image")
        )

    def answers(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ResultKind`."""
        return {"captions": items["best_by_text"][:, 0], "images": items["best_by_image"][:, 0]}

    def metrics_of_items(self, items: Mapping[str, Tensor]) -> BootstrapMetrics:
        """See `EvaluationKind`."""
        return retrieval_bootstrap(dict(items))

    def section(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder, scores: Scored) -> Section:
        """See `EvaluationKind`."""
        return self.section_of(_pairs(data, embedded), data.name, embedder.name, scores, problems(data, embedded.bad))

    def section_of(
        self, pairs: _Pairs, dataset: str, model: str, scores: Scored, problems: Sequence[Problem] = ()
    ) -> Section:
        """Return the report's section on pairs; see `section`."""
        modality = [torch.full((len(x),), number) for number, x in enumerate((pairs.image, pairs.text))]
        return Section(
            self.result(dataset, model, len(pairs.image), scores, problems),
            Answers(pairs.captions, retrieval_answers(scores.items), pairs.picture),
            points(torch.cat([pairs.image, pairs.text]), torch.cat(modality), ["images", "captions"], pairs.owner),
            self.description,
        )

    def compared(self, first: SavedResult, second: SavedResult) -> TwoRankings | None:
        """See `EvaluationKind`."""
        opened = reopen(first)
        if opened is None:
            return None
        data, rows = opened
        decoded = np.zeros(len(data), dtype=bool)
        decoded[rows] = True
        texts, owner = data.captions
        captions = [text for text, has_image in zip(texts, decoded[owner.numpy()]) if has_image]
        if len(captions) != len(first.items["owner"]):  # The set on the disk has changed since the evaluation.
            return None
        names = ("rank_by_text", "best_by_text", "rank_by_image", "best_by_image")
        one, other = (Ranked(*(saved.items[name].numpy() for name in names)) for saved in (first, second))
        return TwoRankings(captions, first.items["owner"].numpy(), (one, other), thumbnails(data, rows))


def score_retrieval(
    name: str,
    image: Tensor,
    text: Tensor,
    captions: Sequence[str],
    owner: Tensor,
    picture: Callable[[int], bytes],
    model: str,
) -> Evaluated:
    """Score the embeddings of images and captions that are not an evaluation set; see `CrossModalRetrieval`.

    Args:
        name: name of the data for the report.
        image: (I, E); images without a caption are left out.
        text: (T, E).
        captions: T texts.
        owner: (T,) image that each caption belongs to.
        picture: function that returns the encoded thumbnail of image i.
        model: name of the model.
    """
    pairs = _Pairs.of(image, text, captions, owner, picture)
    scores = Scored(*retrieval_metrics(pairs.image, pairs.text, pairs.owner))
    return Evaluated(CrossModalRetrieval().section_of(pairs, name, model, scores), scores.items)


def _pairs(data: BenchmarkSet, embedded: SetEmbeddings) -> _Pairs:
    """Return the images that could be decoded, with their captions."""
    image, text, rows, _, _ = embedded
    captions, owner = data.captions
    owner = number_of_rows(data, rows)[owner]
    kept = owner >= 0
    captions = [captions[i] for i in torch.nonzero(kept)[:, 0].tolist()]
    return _Pairs.of(image, text[kept], captions, owner[kept], thumbnails(data, rows))
