"""Probes: a linear classifier and nearest neighbors on frozen image embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from dualenc.data.eval_sets.base import Problem
from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.evaluation.base import EvaluationKind, SavedResult, Scored, image_ids, problems
from dualenc.evaluation.classification import by_class, predicted_classes, two_answers
from dualenc.evaluation.embed import SetEmbedder, SetEmbeddings
from dualenc.evaluation.within import prefixed
from dualenc.inference.embedder import Embedder
from dualenc.metrics import BootstrapMetrics, classification_bootstrap, knn_probe, linear_probe
from dualenc.report import Description, Section, TwoAnswers
from dualenc.utils.errors import DataError

HELD_OUT = ("val", "valid", "validation")  # names of splits on which hyperparameters may be chosen
_PREFIXES = ("linear_", "knn_")  # of the names of metrics and items, one for each probe


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ProbeSet(BenchmarkSet):
    """A classification set with the sets that the probes learn from.

    Attributes:
        train: set to learn from.
        held_out: set on which the hyperparameters are chosen; None for a fifth of `train`.
    """

    train: BenchmarkSet
    held_out: BenchmarkSet | None = None

    @classmethod
    def of(cls, data: BenchmarkSet, train: BenchmarkSet, held_out: BenchmarkSet | None = None) -> "ProbeSet":
        """Add the sets to learn from to the set to measure on.

        Args:
            data: set to measure on.
            train: set to learn from.
            held_out: set on which the hyperparameters are chosen; None for a fifth of `train`.
        """
        own = {field.name: getattr(data, field.name) for field in fields(BenchmarkSet)}
        return cls(**own, train=train, held_out=held_out)

    @property
    def parts(self) -> dict[str, BenchmarkSet]:
        """The sets besides the one that is measured, by name."""
        return {"train": self.train} | ({} if self.held_out is None else {"held_out": self.held_out})


class FrozenProbes(EvaluationKind):
    """Logistic regression and nearest neighbors on frozen image embeddings.

    Args:
        train: split to learn from. The hyperparameters are chosen on "val", "valid" or "validation" if the set has such
            a split, else on a fifth of the images to learn from.
    """

    name = "probe"
    command = "probe"
    title = "Probes on frozen embeddings"
    sets = ("classification",)
    description = Description(
        "images",
        "logistic regression, shown in detail, and nearest neighbors on frozen embeddings",
        ("linear_acc1", "knn_acc1"),
    )
    hub_task = "image-classification"
    task_name = "probes on frozen embeddings"
    identity = {"ids": "images"} | {
        f"{prefix}{name}": noun
        for prefix in _PREFIXES
        for name, noun in (("target", "labels of images"), ("classes", "classes"))
    }

    def __init__(self, train: str = "train") -> None:
        self.train = train

    def prepare(self, data: BenchmarkSet, source: str) -> ProbeSet:
        """See `EvaluationKind`."""
        splits = BenchmarkSet.splits(source)
        if self.train == data.split:
            raise DataError(
                f"{data.path}: split {self.train!r} cannot be both learned from and measured on: choose two of "
                f"{', '.join(splits)}"
            )
        train = BenchmarkSet.open(source, self.train, data.options)
        held_out = next((name for name in HELD_OUT if name in splits and name not in (self.train, data.split)), None)
        return ProbeSet.of(data, train, None if held_out is None else BenchmarkSet.open(source, held_out, data.options))

    def embed(self, data: BenchmarkSet, embedder: SetEmbedder) -> SetEmbeddings:
        """See `EvaluationKind`."""
        whole = super().embed(data, embedder)
        parts = _probe_set(data).parts.items()
        return whole._replace(others={name: EvaluationKind.embed(self, part, embedder) for name, part in parts})

    def score(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Scored:
        """See `EvaluationKind`."""
        data = _probe_set(data)
        labeled = {name: (x.image, data.parts[name].targets[x.rows]) for name, x in embedded.others.items()}
        train, targets = labeled["train"]
        linear, knn = (
            probe(train, targets, embedded.image, data.targets[embedded.rows], held_out=labeled.get("held_out"))
            for probe in (linear_probe, knn_probe)
        )
        both = [prefixed(probe.scores, prefix) for probe, prefix in zip((linear, knn), _PREFIXES)]
        metrics, intervals, chance, items = ({**x, **y} for x, y in zip(*both, strict=True))
        chosen = {
            f"{prefix}{key}": value
            for probe, prefix in zip((linear, knn), _PREFIXES)
            for key, value in probe.chosen.items()
        }
        missing = [data.classnames[c] for c in linear.missing]
        return Scored(  # The details by class are those of the linear probe only, which the report shows.
            metrics,
            intervals,
            chance,
            {"ids": image_ids(data, embedded.rows), **items},
            {"chosen": chosen, "trained_on": len(train), **by_class(data, linear.scores.items)},
            [Problem(f"class without an image to learn from ({data.train.split})", missing)] if missing else [],
        )

    def metrics_of_items(self, items: Mapping[str, Tensor]) -> BootstrapMetrics:
        """See `EvaluationKind`."""
        parts = {prefix: classification_bootstrap(_without_prefix(items, prefix)) for prefix in _PREFIXES}
        both = {f"{prefix}{name}": f for prefix, part in parts.items() for name, f in part.statistics.items()}
        # Both probes are measured on the same images, so that their units and strata are the same.
        return parts[_PREFIXES[0]]._replace(statistics=both)

    def section(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder, scores: Scored) -> Section:
        """See `EvaluationKind`."""
        data = _probe_set(data)
        bad = [(data, embedded.bad), *((part, embedded.others[name].bad) for name, part in data.parts.items())]
        found = [problem for part, names in bad for problem in problems(part, names, f" ({part.split})")]
        items = _without_prefix(scores.items, "linear_")
        return Section(
            self.result(data.name, embedder.name, len(embedded.image), scores, found),
            predicted_classes(data, embedded.rows, items, scores.metrics["linear_ece"]),
            description=self.description,
        )

    def compared(self, first: SavedResult, second: SavedResult) -> TwoAnswers | None:
        """See `EvaluationKind`."""
        return two_answers(first, second, "linear_")


def _probe_set(data: BenchmarkSet) -> ProbeSet:
    """Return the set if it has a set to learn from.

    Raises:
        ValueError: If it has none.
    """
    if not isinstance(data, ProbeSet):
        raise ValueError(f"{data.name}: probes need a set to learn from: make the set with FrozenProbes.prepare")
    return data


def _without_prefix(items: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the items of one probe, under the names that classification metrics use."""
    return {name.removeprefix(prefix): x for name, x in items.items() if name.startswith(prefix)}
