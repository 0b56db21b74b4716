"""Compositional choice: captions, and images, that differ in little."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.evaluation.base import (
    EvaluationKind,
    Scored,
    image_ids,
    number_of_rows,
    problems,
    text_ids,
)
from dualenc.evaluation.classification import thumbnails
from dualenc.evaluation.embed import SetEmbedder, SetEmbeddings
from dualenc.inference.embedder import Embedder
from dualenc.metrics import BootstrapMetrics, choice_bootstrap, choice_metrics
from dualenc.report import ChoiceScores, Description, Section


class _Instances(NamedTuple):
    """Instances whose images could all be decoded."""

    images: Tensor  # (n, 1 or 2) numbers among the embedded images
    texts: Tensor  # (n, 2) numbers among the texts of the set


class CompositionalChoice(EvaluationKind):
    """Choice between two captions, and two images, of an instance: Winoground, SugarCrepe."""

    name = "choice"
    command = "choice"
    title = "Compositional choice"
    sets = ("choice",)
    description = Description("instances", "matching similar images and captions", ("text_score", "group_score"))
    hub_task = "image-text-matching"
    task_name = "compositional choice"
    identity = {"ids": "instances"}

    def embed(self, data: BenchmarkSet, embedder: SetEmbedder) -> SetEmbeddings:
        """See `EvaluationKind`."""
        text = embedder.texts(data.texts)
        image, rows, bad = embedder.images(data)
        return SetEmbeddings(image, text, rows, bad)

    def score(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Scored:
        """See `EvaluationKind`."""
        images, texts = _instances(data, embedded)
        found = choice_metrics(embedded.image, embedded.text, images, texts)
        ids = torch.cat([image_ids(data, embedded.rows)[images], text_ids(data.texts)[texts]], 1)
        return Scored(found.metrics, found.intervals, found.chance, {"ids": ids, **found.items})

    def answers(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ResultKind`."""
        return {"instances": items["scores"].argmax(2)}

    def metrics_of_items(self, items: Mapping[str, Tensor]) -> BootstrapMetrics:
        """See `EvaluationKind`."""
        return choice_bootstrap(items)

    def section(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder, scores: Scored) -> Section:
        """See `EvaluationKind`."""
        images, texts = _instances(data, embedded)
        captions = [[data.texts[i] for i in pair] for pair in texts.tolist()]
        picture = thumbnails(data, embedded.rows)
        findings = ChoiceScores(captions, images.numpy(), scores.items["scores"].numpy(), picture)
        result = self.result(data.name, embedder.name, len(texts), scores, problems(data, embedded.bad))
        return Section(result, findings, description=self.description)


def _instances(data: BenchmarkSet, embedded: SetEmbeddings) -> _Instances:
    """Return the instances whose images could all be decoded.

    Raises:
        ValueError: If there are none.
    """
    number = number_of_rows(data, embedded.rows)
    images, texts, _ = data.choices
    images = images if bool((images >= 0).all()) else images[:, :1]
    kept = (number[images] >= 0).all(1)
    if not bool(kept.any()):
        raise ValueError(f"{data.name}: no instance has all of its images, such as {embedded.bad[0][1]}")
    return _Instances(number[images[kept]], texts[kept])
