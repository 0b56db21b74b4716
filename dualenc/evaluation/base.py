"""The interface of an evaluation kind, and what several kinds share."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dualenc.data.eval_sets.base import Kind, Problem, SetOptions
from dualenc.data.eval_sets.class_texts import NAMED
from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.data.shards.shard import content_hash
from dualenc.evaluation.embed import SetEmbedder, SetEmbeddings
from dualenc.inference.embedder import Embedder, check_spec, load
from dualenc.metrics import BootstrapMetrics
from dualenc.report import Description, Findings, Section, verdict
from dualenc.utils.arguments import Precision
from dualenc.utils.errors import DataError
from dualenc.utils.urls import is_remote, shown

NAMES = 20  # names of bad samples that a result lists for each problem
UNDECODABLE = "image that cannot be decoded"


class Evaluated(NamedTuple):
    """Outcome of an evaluation."""

    section: Section  # the result, and the evidence that a report shows
    items: dict[str, Tensor]  # outcomes of single items, from which `metrics_of_items` computes the metrics again


class Scored(NamedTuple):
    """Outcome of `EvaluationKind.score`."""

    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]  # 95% bootstrap intervals of the metrics that have one
    chance: Mapping[str, float]  # expected values of a random order, where they are known
    items: dict[str, Tensor]  # outcomes of single items, from which `metrics_of_items` computes the metrics again
    facts: Mapping[str, Any] = MappingProxyType({})  # further entries of the result, ready for JSON
    problems: Sequence[Problem] = ()  # problems found while scoring


class SavedResult(NamedTuple):
    """Outcome of an evaluation as read from a file."""

    result: dict[str, Any]
    items: dict[str, Tensor]


class _RandomEmbedder(SetEmbedder):
    """Embedder that gives random unit vectors of two dimensions, and reads neither images nor texts."""

    def images(self, data: BenchmarkSet) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        return _random_vectors(len(data)), torch.arange(len(data)), []

    def texts(self, texts: Sequence[str]) -> Tensor:
        return _random_vectors(len(texts))

    def classifier(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        return _random_vectors(len(names))


def _random_vectors(count: int) -> Tensor:
    """Return unit vectors (count, 2), the same each time, without a change of the global generator."""
    return F.normalize(torch.randn(count, 2, generator=torch.Generator().manual_seed(0)), dim=-1)


class ResultKind(ABC):
    """A measurement of models on data of a kind, and how its results are shown and compared.

    Attributes:
        name: unique name, `kind` in the results.
        command: `dualenc` command that measures it.
        title: title of the report.
        description: explanation of the result for the report; its first headline is the primary metric.
        hub_task: task by the names of the Hugging Face Hub, for the model card.
        task_name: the task in plain words, for the model card.
        identity: items that must be equal where two results are compared, with the noun that a message uses.
    """

    name: ClassVar[str]
    command: ClassVar[str] = "evaluate"
    title: ClassVar[str] = "Evaluation"
    description: ClassVar[Description] = Description()
    hub_task: ClassVar[str] = ""
    task_name: ClassVar[str] = ""
    identity: ClassVar[Mapping[str, str]]

    @abstractmethod
    def load(self, spec: str, precision: Precision = "fp32") -> Any:
        """Load a model that can be measured, which has a `name`, a `fingerprint` and a `precision`.

        Args:
            spec: name of the model.
            precision: precision in which it computes embeddings.

        Raises:
            ModelError: If it cannot be read.
        """

    @abstractmethod
    def check(self, spec: str) -> None:
        """Refuse a spec whose model is missing or unknown, before its weights are read.

        Raises:
            ModelError: If there is no such model.
        """

    @abstractmethod
    def evaluate(self, embedder: Any, data: Any, **options: Any) -> Evaluated:
        """Measure a model; see `dualenc.evaluation.measure.measure` for the options.

        Raises:
            ValueError: If the data cannot be measured.
        """

    @abstractmethod
    def metrics_of_items(self, items: Mapping[str, Tensor]) -> BootstrapMetrics:
        """Return the metrics as functions of the weights of the items, as `compare` needs them.

        Args:
            items: items of the result.
        """

    def answers(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's answer to each unit, (N,) or (N, K), by the noun of the units; by default none.

        A comparison counts the units whose answers differ.

        Args:
            items: items of the result.
        """
        return {}

    def options(self, data: Any) -> dict[str, str]:
        """Return the options that were given for the data, which tell two results of one model apart."""
        return {}

    def settings(self, data: Any) -> dict[str, Any]:
        """Return what a result depends on besides the model and `data.fingerprint`, ready for JSON.

        Results that differ in it are different rows of a table.
        """
        return {}

    def compared(self, first: SavedResult, second: SavedResult) -> Findings | None:
        """Return the evidence that the comparison of two results shows; by default None, which shows the metrics."""
        return None

    def result(
        self, dataset: str, model: str, count: int, scores: Scored, problems: Sequence[Problem] = ()
    ) -> dict[str, Any]:
        """Return the result as it goes to JSON.

        Args:
            dataset: name of the set.
            model: name of the model.
            count: number of units.
            scores: outcome of `score`.
            problems: problems of the set.
        """
        every = [*problems, *scores.problems]
        result = {
            "dataset": dataset,
            "kind": self.name,
            "model": model,
            "n": count,
            "complete": not every,
            "problems": [
                {"what": problem.what, "count": len(problem.names), "names": problem.names[:NAMES]} for problem in every
            ],
            "metrics": dict(scores.metrics),
            "intervals": {name: list(bounds) for name, bounds in scores.intervals.items()},
            "chance": dict(scores.chance),
            **scores.facts,
        }
        return {**result, "verdict": verdict(result, self.description)}


class EvaluationKind(ResultKind):
    """An evaluation kind of image sets: how a model of images and texts is measured on a set.

    A subclass sets `name` and defines `score` and `metrics_of_items`; the defaults do for the rest. `KINDS` lists the
    kinds of this package. Any other one is named by its import path: `--kind my_module.MyKind` on the command line, or
    `kind: my_module.MyKind` under `dualenc.training.Evaluation` in a YAML file.

    Attributes:
        sets: kinds of the evaluation sets that it can measure; see `ResultKind` for the other attributes.
    """

    sets: ClassVar[tuple[str, ...]] = get_args(Kind)
    identity: ClassVar[Mapping[str, str]] = {"ids": "images"}

    def load(self, spec: str, precision: Precision = "fp32") -> Embedder:
        """See `ResultKind`."""
        return load(spec, precision=precision)

    def check(self, spec: str) -> None:
        """See `ResultKind`."""
        check_spec(spec)

    def prepare(self, data: BenchmarkSet, source: str) -> BenchmarkSet:
        """Return the set with everything else that the evaluation needs, such as a set to learn from.

        Args:
            data: evaluation set.
            source: path or URL that the set was opened from.

        Raises:
            DataError: If something is missing.
        """
        return data

    def options(self, data: BenchmarkSet) -> dict[str, str]:
        """Return the options by which a set can be opened again, with whole paths and without the secrets of URLs."""
        files = {"classnames", "images", "templates"}
        return {
            name: os.path.abspath(value)
            if name in files and not is_remote(value) and value not in NAMED
            else shown(value)
            for name, value in data.options.given().items()
        }

    def settings(self, data: BenchmarkSet) -> dict[str, Any]:
        """Return a hash of the prompts by default; see `ResultKind`.

        Args:
            data: evaluation set, as `prepare` returns it.
        """
        if not data.templates:
            return {}
        prompts = json.dumps([data.classnames, data.templates]).encode()
        return {"prompts": hashlib.blake2b(prompts, digest_size=8).hexdigest()}

    def embed(self, data: BenchmarkSet, embedder: SetEmbedder) -> SetEmbeddings:
        """Embed what the evaluation needs of a set, or the share of one rank; by default its images."""
        image, rows, bad = embedder.images(data)
        return SetEmbeddings(image, embedder.no_text, rows, bad)

    @abstractmethod
    def score(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Scored:
        """Compute the metrics from the embeddings of a whole set.

        Returns:
            Metrics, intervals, chance, and the items that `metrics_of_items` takes. An item `ids` lets `compare` know
            that two results belong to the same images; see `image_ids`.

        Raises:
            ValueError: If nothing is left to measure, or the embeddings are not finite.
        """

    def metric_names(self, data: BenchmarkSet, embedder: Embedder) -> list[str]:
        """Return the names of the metrics of a set, from random embeddings, without decoding an image.

        Args:
            data: evaluation set, as `prepare` returns it.
            embedder: model.
        """
        return list(self.score(data, self.embed(data, _RandomEmbedder(embedder)), embedder).metrics)

    def section(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder, scores: Scored) -> Section:
        """Return what the report shows; by default the metrics alone.

        Args:
            data: evaluation set.
            embedded: embeddings of the whole set.
            embedder: model.
            scores: outcome of `score`.
        """
        result = self.result(data.name, embedder.name, len(embedded.rows), scores, problems(data, embedded.bad))
        return Section(result, description=self.description)

    def evaluate(self, embedder: Embedder, data: BenchmarkSet, **options: Any) -> Evaluated:
        """Embed and score a set.

        Args:
            embedder: model.
            data: evaluation set, as `prepare` returns it.
            options: see `SetEmbedder`.
        """
        return self.evaluated(data, self.embed(data, SetEmbedder(embedder, **options)), embedder)

    def evaluated(self, data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Evaluated:
        """Score the embeddings of a whole set.

        Raises:
            ValueError: If no image of the set can be decoded, or as `score` does.
        """
        if embedded.bad and not len(embedded.image):
            raise ValueError(f"{data.name}: no image can be decoded, such as {embedded.bad[0][1]}")
        scores = self.score(data, embedded, embedder)
        return Evaluated(self.section(data, embedded, embedder, scores), scores.items)


def problems(data: BenchmarkSet, bad: Sequence[tuple[int, str]], suffix: str = "") -> list[Problem]:
    """Return the problems of a set, with its images that cannot be decoded.

    Args:
        data: evaluation set.
        bad: `bad` of its embeddings.
        suffix: end of each description, such as the name of the split.
    """
    found = [*data.problems]
    if bad:
        found.append(Problem(UNDECODABLE, [cause for _, cause in bad]))
    return [Problem(problem.what + suffix, problem.names) for problem in found]


def too_few(count: int, noun: str) -> dict[str, Any]:
    """Return a note for the facts of a result whose metrics mean nothing, since there is one of what is told apart.

    Args:
        count: number of what the model tells apart.
        noun: name of one of them.
    """
    return (
        {"notes": [f"there is one {noun} only, so that nothing is told apart: the metrics mean nothing"]}
        if (count == 1)
        else {}
    )


def image_ids(data: BenchmarkSet, rows: Tensor) -> Tensor:
    """Return a hash of the bytes of some images, (n,) int64.

    Args:
        data: evaluation set.
        rows: (n,) numbers of the samples.
    """
    return torch.from_numpy(data.item_ids.view(np.int64))[rows]


def text_ids(texts: Sequence[str]) -> Tensor:
    """Return a hash of each text, (T,) int64."""
    return torch.tensor([content_hash(text.encode()) >> 1 for text in texts])


def number_of_rows(data: BenchmarkSet, rows: Tensor) -> Tensor:
    """Return for each sample of a set its place among some rows, (N,) int64; -1 where it is missing."""
    return torch.full((len(data),), -1).index_put((rows,), torch.arange(len(rows)))


def reopen(saved: SavedResult) -> tuple[BenchmarkSet, list[int]] | None:
    """Open the set that a result was measured on.

    Returns:
        The set, and the number of each measured image in it; None if the set is gone or holds other images.
    """
    try:
        options = SetOptions(**saved.result.get("options", {}))
        data = BenchmarkSet.open(saved.result["data"], saved.result["split"], options)
        row_of = {int(x): i for i, x in enumerate(data.item_ids.view(np.int64))}
        return data, [row_of[int(x)] for x in saved.items["ids"]]
    except (DataError, KeyError, TypeError):
        return None
