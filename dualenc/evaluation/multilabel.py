"""Zero-shot classification of images that may have several classes."""

from collections.abc import Mapping

from torch import Tensor

from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.evaluation.base import EvaluationKind, Scored, image_ids, problems, too_few
from dualenc.evaluation.embed import SetEmbedder, SetEmbeddings
from dualenc.inference.embedder import Embedder
from dualenc.metrics import BootstrapMetrics, average_precision, multilabel_bootstrap, multilabel_metrics
from dualenc.report import Description, Labels, Section


class MultilabelClassification(EvaluationKind):
    """Zero-shot classification of images that may have several classes."""

    name = "multilabel"
    command = "zeroshot"
    title = "Zero-shot classification"
    sets = ("multilabel",)
    description = Description(
        "images", "zero-shot classification with several labels per image", ("mean_average_precision",)
    )
    hub_task = "zero-shot-image-classification"
    task_name = "zero-shot classification with several labels"
    identity = {"ids": "images", "targets": "labels of images"}

    def embed(self, data: BenchmarkSet, embedder: SetEmbedder) -> SetEmbeddings:
        """See `EvaluationKind`."""
        text = embedder.classifier(data.classnames, data.templates)
        image, rows, bad = embedder.images(data)
        return SetEmbeddings(image, text, rows, bad)

    def score(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Scored:
        """See `EvaluationKind`."""
        found = multilabel_metrics(embedded.image @ embedded.text.T, data.targets[embedded.rows])
        items = {"ids": image_ids(data, embedded.rows), **found.items}
        facts = {"prompts": data.prompts} | too_few(len(embedded.rows), "image")
        return Scored(found.metrics, found.intervals, found.chance, items, facts)

    def answers(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ResultKind`."""
        return {"images": items["scores"].argmax(1)}

    def metrics_of_items(self, items: Mapping[str, Tensor]) -> BootstrapMetrics:
        """See `EvaluationKind`."""
        return multilabel_bootstrap(dict(items))

    def section(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder, scores: Scored) -> Section:
        """See `EvaluationKind`."""
        image, text, rows, bad, _ = embedded
        targets = data.targets[rows]
        precision = average_precision(image @ text.T, targets)
        result = self.result(data.name, embedder.name, len(image), scores, problems(data, bad))
        findings = Labels(data.classnames, targets.sum(0).numpy(), precision.numpy())
        return Section(result, findings, description=self.description)
