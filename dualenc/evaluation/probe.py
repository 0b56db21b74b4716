"""Probes: a linear classifier and nearest neighbors on frozen image embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualenc.data.eval_sets.base import ImageSource, Problem
from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.evaluation.base import EvaluationKind, SavedResult, Scored, image_ids, problems
from dualenc.evaluation.classification import by_class, predicted_classes, two_answers
from dualenc.evaluation.embed import SetEmbedder, SetEmbeddings
from dualenc.evaluation.within import prefixed
from dualenc.inference.embedder import Embedder
from dualenc.metrics import BootstrapMetrics, classification_bootstrap, knn_probe, linear_probe
from dualenc.metrics.bootstrap import mean
from dualenc.metrics.probe import FEW_SHOT_C, every_fifth, few_shot_probe
from dualenc.report import Description, Section, TwoAnswers
from dualenc.utils.errors import DataError
from dualenc.utils.text import plural

HELD_OUT = ("val", "valid", "validation")  # names of splits on which hyperparameters may be chosen
# The probes, by the prefixes of the names of their metrics and items.
_PROBES = {"linear_": "logistic regression", "knn_": "nearest neighbors"}
_SHOT = "shot"  # end of the names of metrics of a few images of each class, and of their items


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ProbeSet(BenchmarkSet):
    """A classification set with the sets that the probes learn from.

    Attributes:
        train: set to learn from.
        held_out: set on which the hyperparameters are chosen; None for a fifth of `train`.
        shared: whether the set and `train` are shares of one split.
    """

    train: BenchmarkSet
    held_out: BenchmarkSet | None = None
    shared: bool = False

    @classmethod
    def of(
        cls, data: BenchmarkSet, train: BenchmarkSet, held_out: BenchmarkSet | None = None, shared: bool = False
    ) -> "ProbeSet":
        """Add the sets to learn from to the set to measure on.

        Args:
            data: set to measure on.
            train: set to learn from.
            held_out: set on which the hyperparameters are chosen; None for a fifth of `train`.
            shared: whether both are shares of one split.
        """
        own = {field.name: getattr(data, field.name) for field in fields(BenchmarkSet)}
        return cls(**own, train=train, held_out=held_out, shared=shared)

    @property
    def parts(self) -> dict[str, BenchmarkSet]:
        """The sets besides the one that is measured, by name."""
        return {"train": self.train} | ({} if self.held_out is None else {"held_out": self.held_out})


class FrozenProbes(EvaluationKind):
    """Logistic regression and nearest neighbors on frozen image embeddings.

    Args:
        train: split to learn from. The hyperparameters are chosen on "val", "valid" or "validation" if the set has such
            a split, else on a fifth of the images to learn from. Of a set with a single split a fifth of each class is
            measured, and the rest is learned from.
        shots: numbers of images of each class, for a linear probe of each.
        draws: number of draws of these images.

    Raises:
        DataError: If a number is not positive.
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
        for prefix in _PROBES
        for name, noun in (("target", "labels of images"), ("classes", "classes"))
    }

    def __init__(self, train: str = "train", shots: Sequence[int] = (), draws: int = 5) -> None:
        self.train, self.shots, self.draws = train, sorted(set(shots)), draws
        if draws < 1 or any(number < 1 for number in self.shots):
            raise DataError(f"shots {list(shots)} and draws {draws} must be numbers of at least 1")

    def prepare(self, data: BenchmarkSet, source: str) -> ProbeSet:
        """See `EvaluationKind`."""
        splits = BenchmarkSet.splits(source, data.options)
        if len(splits) == 1 and self.train in ("train", data.split):
            return _two_shares(data)
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

    def settings(self, data: BenchmarkSet) -> dict[str, Any]:
        """See `EvaluationKind`."""
        few = {"shots": self.shots, "draws": self.draws} if self.shots else {}
        return {name: part.fingerprint for name, part in _probe_set(data).parts.items()} | few

    def score(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Scored:
        """See `EvaluationKind`."""
        data = _probe_set(data)
        labeled = {name: (x.image, data.parts[name].targets[x.rows]) for name, x in embedded.others.items()}
        test = embedded.image, data.targets[embedded.rows]
        linear, knn = (
            probe(*labeled["train"], *test, held_out=labeled.get("held_out")) for probe in (linear_probe, knn_probe)
        )
        both = [prefixed(probe.scores, prefix) for probe, prefix in zip((linear, knn), _PROBES)]
        metrics, intervals, chance, items = ({**x, **y} for x, y in zip(*both, strict=True))
        chosen = {
            f"{prefix}{key}": value
            for probe, prefix in zip((linear, knn), _PROBES)
            for key, value in probe.chosen.items()
        }
        missing = [data.classnames[c] for c in linear.missing]
        counts = {data.parts[name].split: len(x) for name, (x, _) in labeled.items()}
        few = few_shot_probe(*labeled["train"], *test, shots=self.shots, draws=self.draws) if self.shots else {}
        for k, found in few.items():
            name = f"linear_acc1_{k}{_SHOT}"
            items[name] = found.right.double().mean(0)
            metrics[name], chance[name] = items[name].mean().item(), chance["linear_acc1"]
            intervals |= {} if found.interval is None else {name: found.interval}
        fewer = {k: [data.classnames[c] for c in found.fewer if c not in linear.missing] for k, found in few.items()}
        return Scored(  # The details by class are those of the linear probe only, which the report shows.
            metrics,
            intervals,
            chance,
            {"ids": image_ids(data, embedded.rows), **items},
            {
                "chosen": chosen,
                "learned_from": counts,
                "notes": [*_notes(data, counts), *self._notes_on_shots(fewer)],
                **by_class(data, linear.scores.items),
            },
            [Problem(f"class without an image to learn from ({data.train.split})", missing)] if missing else [],
        )

    def _notes_on_shots(self, fewer: Mapping[int, Sequence[str]]) -> list[str]:
        """Return sentences on the probes of a few images, given the classes that have fewer than each number."""
        if not self.shots:
            return []
        draws = f"mean over {plural(self.draws, 'draw')} of the images to learn from" if self.draws > 1 else "one draw"
        return [
            f"linear_acc1_K{_SHOT}: K images of each class, C = {FEW_SHOT_C:g}, {draws}",
            *(
                f"linear_acc1_{k}{_SHOT}: fewer images in {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
                for k, names in fewer.items()
                if names
            ),
        ]

    def answers(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ResultKind`."""
        return {f"images by {name}": items[f"{prefix}answer"] for prefix, name in _PROBES.items()}

    def metrics_of_items(self, items: Mapping[str, Tensor]) -> BootstrapMetrics:
        """See `EvaluationKind`."""
        parts = {prefix: classification_bootstrap(_without_prefix(items, prefix)) for prefix in _PROBES}
        both = {f"{prefix}{name}": f for prefix, part in parts.items() for name, f in part.statistics.items()}
        both |= {name: mean(share) for name, share in items.items() if name.endswith(_SHOT)}
        # All probes are measured on the same images, so that their units and strata are the same.
        return parts["linear_"]._replace(statistics=both)

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


class _SomeImages:
    """Some of the images of another source; see `ImageSource`."""

    def __init__(self, source: ImageSource, rows: np.ndarray, hashes: np.ndarray) -> None:
        self.source, self.rows, self._hashes = source, rows, hashes

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        return self.source.key(int(self.rows[i]))

    def decode(self, i: int) -> Tensor:
        return self.source.decode(int(self.rows[i]))

    def hashes(self) -> np.ndarray:
        return self._hashes


def _two_shares(data: BenchmarkSet) -> ProbeSet:
    """Divide a set: a fifth of each class to measure on, and the rest to learn from.

    The shares depend on the content of the images only. Images of the same bytes are in the same share.

    Raises:
        DataError: If no class has two different images.
    """
    hashes, image_of = np.unique(data.item_ids, return_inverse=True)
    targets = torch.zeros(len(hashes), dtype=torch.int64)
    targets.scatter_reduce_(0, torch.from_numpy(image_of), data.targets, "amin", include_self=False)
    try:
        measured = every_fifth(targets, seed=0).numpy()[image_of]
    except ValueError:
        raise DataError(
            f"{data.path} has one split, {data.split}, and no class with two different images: one is needed to learn "
            "from, and one to measure on"
        ) from None

    def share(rows: np.ndarray, **fields: Any) -> BenchmarkSet:
        source = _SomeImages(data.source, rows, data.item_ids[rows])
        return replace(data, source=source, targets=data.targets[rows], **fields)

    # The problems of the split are those of one share only, so that they are counted once.
    rest = share(np.flatnonzero(~measured), split=f"the rest of {data.split}", problems=[])
    return ProbeSet.of(share(np.flatnonzero(measured)), rest, shared=True)


def _notes(data: ProbeSet, counts: Mapping[str, int]) -> list[str]:
    """Return sentences that say which images were learned from, given their number in each split."""
    images = " and ".join(f"{count:,} images of {split}" for split, count in counts.items())
    chosen_on, all_of = ("a fifth of them", "all") if data.held_out is None else (data.held_out.split, "both")
    notes = [f"learned from {images}; C and k were chosen on {chosen_on}, and the last fit is of {all_of}"]
    if data.shared:
        notes.insert(0, f"measured on a fifth of each class of {data.split}, which has no other split to learn from")
    return notes


def _without_prefix(items: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the items of one probe, under the names that classification metrics use."""
    return {name.removeprefix(prefix): x for name, x in items.items() if name.startswith(prefix)}
