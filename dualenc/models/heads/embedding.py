"""Embeddings of texts: a head whose encoder, and dense layers if any, are trained on pairs of texts."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualenc.data.text.dataset import Needs, Part, Texts
from dualenc.data.text.labels import LabelReader, NumberReader
from dualenc.losses import clip_loss
from dualenc.metrics.pairs import text_pair_bootstrap, text_pair_items
from dualenc.metrics.text import label_bootstrap, label_metrics
from dualenc.models.dual_encoder import unit
from dualenc.models.heads.base import HEADLINES, Examples, Head, HeadConfig, HeldOut, Measured
from dualenc.models.heads.vectors import EmbeddingConfig, dense_layers
from dualenc.models.text_encoder import TextConfig, TextEncoder
from dualenc.report import Description
from dualenc.tokens import Tokens

State = tuple[Tensor, Tensor | None, Tensor | None]  # vectors (2, n, D), labels (n,) and ids (n, 2) of n pairs
# Default scale of the cosines with negatives: that of sentence-transformers (Reimers and Gurevych 2019).
NEGATIVES = 20.0


class PairProblem(ABC):
    """Kind of supervision of pairs of texts: what a label means, how it is learned and how it is measured.

    Attributes:
        name: see `HeadConfig.problem`.
        reader: reader of the labels; None for pairs without labels.
        compares_ranks: see `Head.compares_ranks`.
        scale: default of `HeadConfig.scale`, whose meaning differs between problems.
    """

    name: ClassVar[str]
    reader: ClassVar[LabelReader | None]
    compares_ranks: ClassVar[bool]
    scale: ClassVar[float]

    @abstractmethod
    def loss(self, examples: Examples, scale: float, group: Any) -> Tensor:
        """Return the sum of the loss over n pairs of unit vectors (2, n, D)."""

    @abstractmethod
    def metrics(self, examples: Examples, scale: float) -> Measured:
        """Compute metrics of n pairs of unit vectors (2, n, D)."""

    def metric_names(self) -> Sequence[str]:
        """See `Head.metric_names`."""
        vectors, number = torch.eye(100), torch.arange(100)  # recall@K needs K pairs
        examples = Examples(torch.stack([vectors, vectors]), number.float(), 100, ids=torch.stack([number, number], 1))
        return list(self.metrics(examples, 100.0).metrics)


class Negatives(PairProblem):
    """Pairs that belong together; the other texts of the batch are negatives, except those that equal a positive."""

    name = "negatives"
    reader = None
    compares_ranks = True
    scale = NEGATIVES

    def loss(self, examples: Examples, scale: float, group: Any) -> Tensor:
        """Return the sum of the contrastive loss over the pairs, with the texts of all ranks as negatives."""
        first, second = examples.logits
        more: dict[str, Any] = {"negatives": examples.negatives, "negative_ids": examples.negative_ids}
        if examples.ids is not None:
            more |= {"ids": examples.ids, "duplicates": "mask"}
        return clip_loss(first, second, first.new_full((), scale), group=group, **more) * len(first)

    def metrics(self, examples: Examples, scale: float) -> Measured:
        """Compute retrieval metrics: "first_..." finds the first texts by the second ones, "second_..." the reverse."""
        assert examples.ids is not None
        first, second = examples.logits
        found = text_pair_bootstrap(text_pair_items(first, second, examples.ids))
        return Measured(found.values(), found.intervals(), {}, examples.number)


class Cosine(PairProblem):
    """Pairs with a label, which divided by the scale is the cosine that their vectors should have."""

    name = "cosine"
    reader = NumberReader()
    compares_ranks = False
    scale = 1.0

    def loss(self, examples: Examples, scale: float, group: Any) -> Tensor:
        """Return the sum of the squared errors of the cosines."""
        assert examples.labels is not None
        first, second = examples.logits
        return ((first * second).sum(-1) - examples.labels / scale).square().sum()

    def metrics(self, examples: Examples, scale: float) -> Measured:
        """Compute correlations and errors of the cosines, with intervals."""
        assert examples.labels is not None
        first, second = examples.logits
        cosines, labels = (first * second).sum(-1), examples.labels / scale
        found = label_metrics(cosines, labels, ["cosine"], "regression")
        intervals = label_bootstrap(cosines, labels, ["cosine"], "regression").intervals()
        return Measured(found, intervals, {}, len(labels))


class Embedding(Head):
    """Unit vectors of texts, compared in pairs."""

    pairs = "apart"
    labeled = False
    task = "sentence-similarity"
    result_kind = "text-pairs"
    description = Description("pairs", "texts that belong together", HEADLINES)
    needs_training_data = False
    problems: ClassVar[Mapping[str, PairProblem]] = {one.name: one for one in (Negatives(), Cosine())}

    def settings(self) -> Collection[str]:
        """See `Head.settings`."""
        return *super().settings(), "embedding"

    @property
    def problem(self) -> PairProblem:
        """The problem that the configuration names."""
        return self.problems[self.config.problem]

    @property
    def vectors(self) -> EmbeddingConfig:
        """The settings of the vectors."""
        return self.config.embedding or EmbeddingConfig()

    @property
    def scale(self) -> float:
        """The scale that the configuration names, or the default of the problem."""
        return self.config.scale or self.problem.scale

    @property
    def compares_ranks(self) -> bool:
        """See `Head.compares_ranks`."""
        return self.problem.compares_ranks

    @property
    def needs(self) -> Needs:
        """See `Head.needs`; further texts can be negatives where the pairs of a batch are compared."""
        return replace(super().needs, negatives=self.compares_ranks)

    def label_reader(self) -> LabelReader | None:
        """See `Head.label_reader`."""
        return self.problem.reader

    def build(self, text: TextConfig) -> nn.Module:
        """Return the dense layers, see `Head.build`."""
        return dense_layers(self.vectors.dense, text.width)

    def logits(
        self, module: nn.Module, encoder: TextEncoder, hidden: Tensor, tokens: Tokens, positions: Tensor | None
    ) -> Tensor:
        """Return unit vectors (B, D), see `Head.logits`."""
        return unit(module(encoder.pool(hidden, tokens, self.config.pool)))

    def examples(self, logits: Tensor, batch: Texts, part: Part) -> Examples:
        """See `Head.examples`."""
        assert part.others is not None
        pairs = torch.stack([logits[part.texts], logits[part.others]])
        negatives = None if part.negatives is None else logits[part.negatives]
        return Examples(pairs, part.labels, len(part.texts), None, part.ids, negatives, part.negative_ids)

    def sums(self, examples: Examples, group: Any = None) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the loss over n pairs of vectors (2, n, D), and n; see `Head.sums`."""
        return self.problem.loss(examples, self.scale, group), examples.number

    def observe(self, examples: Examples) -> State:
        """Return vectors (2, n, D), labels and ids on the CPU, from which `metrics` measures; see `Head.observe`."""
        labels, ids = (None if x is None else x.cpu() for x in (examples.labels, examples.ids))
        return examples.logits.cpu(), labels, ids

    def metrics(self, states: Sequence[State], held_out: HeldOut) -> Measured:
        """See `Head.metrics`."""
        vectors = torch.cat([one for one, _, _ in states], 1)
        labels = [one for _, one, _ in states if one is not None]
        ids = torch.cat([one for _, _, one in states if one is not None])
        examples = Examples(vectors, torch.cat(labels) if labels else None, vectors.shape[1], ids=ids)
        return self.problem.metrics(examples, self.scale)

    def metric_names(self) -> Sequence[str]:
        """See `Head.metric_names`."""
        return self.problem.metric_names()

    def answers(self, examples: Examples) -> list[dict[str, Any]]:
        """Return "cosine" of each pair of vectors (2, n, D)."""
        first, second = examples.logits
        return [{"cosine": value} for value in (first * second).sum(-1).tolist()]

    def completed(self, others: Iterable[HeadConfig]) -> HeadConfig:
        """Return the configuration with the vectors of a checkpoint's embedding head, where it leaves them open."""
        found = next((one.embedding for one in others if one.kind == self.config.kind), None)
        return self.config if self.config.embedding is not None else replace(self.config, embedding=found)

    def matches(self, other: Head, same_name: bool) -> bool:
        """See `Head.matches`; neither name nor problem matter."""
        return isinstance(other, Embedding) and other.vectors.dense == self.vectors.dense
