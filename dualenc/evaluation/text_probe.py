"""Probes of texts: logistic regression and clusters of frozen sentence embeddings."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualenc.data.eval_sets.labeled_texts import LabeledTexts
from dualenc.evaluation.base import Evaluated, ResultKind, Scored, text_ids
from dualenc.evaluation.embed import Track
from dualenc.evaluation.points import points
from dualenc.inference.text_tower import TextTower, check_text_tower, load_text_tower
from dualenc.metrics import BootstrapMetrics, cluster_bootstrap, k_means, linear_probe, majority_baseline
from dualenc.metrics.bootstrap import mean
from dualenc.report import Classes, Description, Section
from dualenc.utils.arguments import Precision

CHUNK = 1024  # texts that are embedded at a time
SHUFFLES = 200  # permutations of the labels that give the agreement of clusters by chance


class TextProbe(ResultKind):
    """Logistic regression and clusters of frozen sentence embeddings."""

    name = "text-probe"
    command = "probe"
    title = "Probes on frozen sentence embeddings"
    description = Description(
        "texts",
        "logistic regression, shown in detail, and clusters of frozen sentence embeddings",
        ("accuracy", "v_measure"),
    )
    hub_task = "text-classification"
    task_name = "probes on frozen sentence embeddings"
    identity = {"ids": "texts", "target": "labels of texts", "classes": "labels"}

    def load(self, spec: str, precision: Precision = "fp32") -> TextTower:
        """See `ResultKind`."""
        return load_text_tower(spec, precision=precision)

    def check(self, spec: str) -> None:
        """See `ResultKind`."""
        check_text_tower(spec)

    def options(self, data: LabeledTexts) -> dict[str, str]:
        """See `ResultKind`."""
        text, label = data.columns
        return {"train": os.path.abspath(data.train_path), "text": " ".join(text), "label": label}

    def settings(self, data: LabeledTexts) -> dict[str, Any]:
        """See `ResultKind`."""
        return {"text": list(data.columns[0]), "label": data.columns[1]}

    def answers(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `ResultKind`."""
        return {"texts": items["answer"]}

    def metrics_of_items(self, items: Mapping[str, Tensor]) -> BootstrapMetrics:
        """See `ResultKind`."""
        clusters = cluster_bootstrap(items["cluster"], items["target"])
        return clusters._replace(statistics={"accuracy": mean(items["rank"] < 1), **clusters.statistics})

    def evaluate(self, embedder: TextTower, data: LabeledTexts, *, track: Track = iter, **options: Any) -> Evaluated:
        """Embed the texts, train a logistic regression, and cluster what is measured.

        Args:
            embedder: model.
            data: labeled texts.
            track: wraps the chunks of texts, for a progress bar.
            options: options of other kinds, which have no use here.
        """
        every = [*data.train, *data.texts]
        chunks = track([every[i : i + CHUNK] for i in range(0, len(every), CHUNK)])
        train, test = torch.cat([embedder.embed(chunk) for chunk in chunks]).split([len(data.train), len(data.texts)])
        probe = linear_probe(train, data.train_targets, test, data.targets, replicates=0)
        clusters = k_means(test, min(len(data.labels), len(test)))
        items = {"ids": text_ids(data.texts), "cluster": clusters, **probe.scores.items}
        bootstrap = self.metrics_of_items(items)
        chance = {"accuracy": majority_baseline(data.train_targets, data.targets), **_by_chance(clusters, data.targets)}
        notes = [
            f"learned from {len(train):,} texts; C = {probe.chosen['C']:.3g} was chosen on a fifth of them",
            f"{len(clusters.unique())} clusters of the measured texts, by k-means; intervals hold for these clusters",
        ]
        facts = {
            "baseline": "the most frequent training label (for clusters, shuffled labels)",
            "chosen": probe.chosen,
            "notes": notes,
        }
        scores = Scored(bootstrap.values(), bootstrap.intervals(), chance, items, facts)
        result = self.result(data.name, embedder.name, len(test), scores)
        target, answer, confidence = (items[name].numpy() for name in ("target", "answer", "confidence"))
        findings = Classes(data.labels, target, answer, data.texts.__getitem__, confidence, unit="texts")
        plane = points(test, data.targets, data.labels, unit="texts")
        return Evaluated(Section(result, findings, plane, self.description), items)


def _by_chance(clusters: Tensor, targets: Tensor) -> dict[str, float]:
    """Compute how the clusters agree with shuffled labels, on average."""
    generator = torch.Generator().manual_seed(0)
    every = [
        cluster_bootstrap(clusters, targets[torch.randperm(len(targets), generator=generator)]).values()
        for _ in range(SHUFFLES)
    ]
    return {name: sum(one[name] for one in every) / SHUFFLES for name in every[0]}
