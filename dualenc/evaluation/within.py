"""Retrieval within one modality: captions of the same image, or images of the same class."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.evaluation.base import EvaluationKind, Scored, image_ids, problems, text_ids, too_few
from dualenc.evaluation.embed import SetEmbedder, SetEmbeddings
from dualenc.inference.embedder import Embedder
from dualenc.metrics import BootstrapMetrics, Scores, group_bootstrap, group_metrics
from dualenc.report import Description, Section


class _Within(EvaluationKind):
    """Retrieval of the other items of an item's group; the names of metrics and items begin with a prefix."""

    command = "retrieval"
    title = "Retrieval"
    prefix: str

    def settings(self, data: BenchmarkSet) -> dict[str, Any]:
        """See `EvaluationKind`; class names and templates are not used."""
        return {}

    def answers(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ResultKind`."""
        return {"queries": items[f"{self.prefix}rank"]}

    def metrics_of_items(self, items: Mapping[str, Tensor]) -> BootstrapMetrics:
        """See `EvaluationKind`."""
        part = group_bootstrap({name.removeprefix(self.prefix): x for name, x in items.items()})
        return part._replace(statistics={f"{self.prefix}{name}": f for name, f in part.statistics.items()})


class CaptionRetrieval(_Within):
    """Retrieval of the other captions of a caption's image."""

    name = "text-text"
    prefix = "text_text_retrieval_"
    sets = ("retrieval",)
    description = Description("captions", "retrieval of the other captions of the same image", (f"{prefix}recall@1",))
    hub_task = "text-retrieval"
    task_name = "retrieval among captions"
    identity = {
        "text_ids": "captions",
        f"{prefix}group": "images of captions",
        f"{prefix}query": "queries",
        f"{prefix}unit": "images of queries",
    }

    def embed(self, data: BenchmarkSet, embedder: SetEmbedder) -> SetEmbeddings:
        """See `EvaluationKind`."""
        text = embedder.texts(data.captions[0])
        return SetEmbeddings(torch.empty(0, text.shape[1]), text, torch.empty(0, dtype=torch.int64), [])

    def score(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Scored:
        """See `EvaluationKind`."""
        captions, owner = data.captions
        found = prefixed(group_metrics(embedded.text, owner, unit=owner), self.prefix)
        items = {"text_ids": text_ids(captions), **found.items}
        return Scored(found.metrics, found.intervals, found.chance, items, too_few(len(owner.unique()), "image"))

    def section(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder, scores: Scored) -> Section:
        """See `EvaluationKind`."""
        result = self.result(data.name, embedder.name, len(embedded.text), scores, problems(data, []))
        return Section(result, description=self.description)


class ImageRetrieval(_Within):
    """Retrieval of the other images of an image's class."""

    name = "image-image"
    prefix = "image_image_retrieval_"
    sets = ("classification",)
    description = Description("images", "retrieval of the other images of the same class", (f"{prefix}recall@1",))
    hub_task = "image-to-image-retrieval"
    task_name = "retrieval among images"
    identity = {
        "ids": "images",
        f"{prefix}group": "labels of images",
        f"{prefix}query": "queries",
        f"{prefix}unit": "queries",
    }

    def score(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Scored:
        """See `EvaluationKind`."""
        group = data.targets[embedded.rows]
        found = prefixed(group_metrics(embedded.image, group), self.prefix)
        items = {"ids": image_ids(data, embedded.rows), **found.items}
        return Scored(found.metrics, found.intervals, found.chance, items, too_few(len(group.unique()), "class"))


def prefixed(scores: Scores, prefix: str) -> Scores:
    """Return scores in which the names of all metrics and items begin with a prefix."""
    parts: list[Any] = [{f"{prefix}{name}": x for name, x in part.items()} for part in scores]
    return Scores(*parts)
