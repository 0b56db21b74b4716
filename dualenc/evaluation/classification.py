"""Zero-shot classification: an image belongs to the class whose prompts are nearest."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.evaluation.base import EvaluationKind, SavedResult, Scored, image_ids, problems, reopen, too_few
from dualenc.evaluation.embed import SetEmbedder, SetEmbeddings
from dualenc.evaluation.points import points
from dualenc.inference.embedder import Embedder
from dualenc.metrics import (
    BootstrapMetrics,
    calibration,
    classification_bootstrap,
    classification_metrics,
    per_class,
)
from dualenc.report import Classes, Description, Section, TwoAnswers


class ZeroShotClassification(EvaluationKind):
    """Zero-shot classification of images with one class each."""

    name = "classification"
    command = "zeroshot"
    title = "Zero-shot classification"
    sets = ("classification",)
    description = Description("images", "zero-shot classification", ("acc1",))
    hub_task = "zero-shot-image-classification"
    task_name = "zero-shot classification"
    identity = {"ids": "images", "target": "labels of images", "classes": "classes"}

    def embed(self, data: BenchmarkSet, embedder: SetEmbedder) -> SetEmbeddings:
        """See `EvaluationKind`."""
        text = embedder.classifier(data.classnames, data.templates)
        image, rows, bad = embedder.images(data)
        return SetEmbeddings(image, text, rows, bad)

    def score(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Scored:
        """See `EvaluationKind`."""
        scale = float(embedder.model.logits()[0].detach())
        found = classification_metrics(embedded.image, embedded.text, data.targets[embedded.rows], scale)
        items = {"ids": image_ids(data, embedded.rows), **found.items}
        facts = {"prompts": data.prompts} | by_class(data, found.items) | too_few(len(data.classnames), "class")
        return Scored(found.metrics, found.intervals, found.chance, items, facts)

    def answers(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ResultKind`."""
        return {"images": items["answer"]}

    def metrics_of_items(self, items: Mapping[str, Tensor]) -> BootstrapMetrics:
        """See `EvaluationKind`."""
        return classification_bootstrap(dict(items))

    def section(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder, scores: Scored) -> Section:
        """See `EvaluationKind`."""
        image, _, rows, bad, _ = embedded
        result = self.result(data.name, embedder.name, len(image), scores, problems(data, bad))
        return Section(
            result,
            predicted_classes(data, rows, scores.items, scores.metrics["ece"]),
            points(image, data.targets[rows], data.classnames),
            self.description,
        )

    def compared(self, first: SavedResult, second: SavedResult) -> TwoAnswers | None:
        """See `EvaluationKind`."""
        return two_answers(first, second)


def by_class(data: BenchmarkSet, items: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the result of a classification holds besides its metrics: accuracy by class, and calibration.

    Args:
        data: evaluation set.
        items: items of `dualenc.metrics.classification_metrics`.
    """
    right, total = per_class(items)
    return {
        "per_class": [[name, float(r / n), int(n)] for name, r, n in zip(data.classnames, right, total) if n],
        "calibration": [list(row) for row in calibration(items)],
    }


def predicted_classes(data: BenchmarkSet, rows: Tensor, items: Mapping[str, Tensor], ece: float) -> Classes:
    """Return the predictions of a classification for the report.

    Args:
        data: evaluation set.
        rows: (n,) numbers of the samples.
        items: items of `dualenc.metrics.classification_metrics`.
        ece: expected calibration error.
    """
    return Classes(
        data.classnames,
        items["target"].numpy(),
        items["answer"].numpy(),
        thumbnails(data, rows),
        items["confidence"].numpy(),
        calibration(items),
        ece,
    )


def thumbnails(data: BenchmarkSet, rows: Tensor | list[int]) -> Callable[[int], bytes]:
    """Return a function that draws the image of one of some rows small."""
    return lambda i: data.thumbnail(int(rows[i]))


def two_answers(first: SavedResult, second: SavedResult, prefix: str = "") -> TwoAnswers | None:
    """Return the predictions of two models for the report; None if their set is gone.

    Args:
        first: result of the first model.
        second: result of the second model.
        prefix: beginning of the items' names.
    """
    opened = reopen(first)
    if opened is None:
        return None
    data, rows = opened
    answers, confidence = (
        (first.items[f"{prefix}{name}"].numpy(), second.items[f"{prefix}{name}"].numpy())
        for name in ("answer", "confidence")
    )
    truth = first.items[f"{prefix}target"].numpy()
    return TwoAnswers(data.classnames, truth, answers, confidence, thumbnails(data, rows))
