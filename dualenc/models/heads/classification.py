"""Classification of texts and of pairs: one label, any number of labels, or a number; and what a pooler keeps of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualenc.data.text.labels import LabelReader, ManyLabelsReader, NumberReader, OneLabelReader
from dualenc.metrics.text import label_bootstrap, label_metrics, majority_baseline, mean_baseline, reaches
from dualenc.models.heads.base import Examples, Head, HeadConfig, HeldOut, Measured, concatenated, linear
from dualenc.models.heads.class_weights import balanced_weights, cross_entropy_sums
from dualenc.models.text_encoder import ACTIVATIONS, Activation, TextConfig, layer_norm
from dualenc.report import Classes, Findings


class ClassificationHead(nn.Module):
    """Layers from a text's vector to logits: one, or two with an activation between (BERT's pooler and classifier).

    Args:
        config: architecture of the text encoder.
        outputs: number of logits; 0 for the hidden layer alone.
        activation: activation of the hidden layer; None for no hidden layer.
        norm: LayerNorm after the activation.
    """

    def __init__(self, config: TextConfig, outputs: int, activation: Activation | None = "tanh", norm: bool = False):
        super().__init__()
        hidden = activation is not None
        self.dense = linear(config.width, config.width, config.bias) if hidden else nn.Identity()
        self.activation = ACTIVATIONS[activation]() if activation is not None else nn.Identity()
        self.norm = layer_norm(config) if norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.out = linear(config.width, outputs) if outputs else nn.Identity()

    def forward(self, pooled: Tensor) -> Tensor:
        """Return logits (B, C) of vectors (B, D)."""
        return self.out(self.dropout(self.norm(self.activation(self.dense(pooled)))))


class LabelProblem(ABC):
    """The meaning of the logits of a classification.

    Attributes:
        name: see `HeadConfig.problem`.
        metric_names: see `Head.metric_names`.
        baseline_name: what the baseline answers.
        settings: those that only some problems have, see `Head.settings`.
    """

    name: ClassVar[Literal["single_label", "multi_label", "regression"]]
    metric_names: ClassVar[tuple[str, ...]]
    baseline_name: ClassVar[str] = "the most frequent training label"
    settings: ClassVar[Collection[str]] = ("class_weights",)

    def check(self, labels: Sequence[str]) -> None:
        """Raise ValueError if there are too few labels or too many."""
        if len(labels) < 2:
            raise ValueError(f"a head for {self.name} classification needs 2 or more labels")

    @abstractmethod
    def reader(self, names: tuple[str, ...]) -> LabelReader:
        """Return the reader of the labels."""

    @abstractmethod
    def sums(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the loss over n texts of logits (n, C), and the number that it is divided by.

        Args:
            logits: (n, C).
            labels: labels of the n texts.
            weights: (C,) weights of the labels; None for 1.
        """

    def baseline(self, train: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the metric of always giving the most frequent answer of the training labels."""
        return {"accuracy": majority_baseline(train, labels)}

    def findings(
        self, logits: Tensor, labels: Tensor, names: Sequence[str], text: Callable[[int], str]
    ) -> Findings | None:
        """Return the evidence for the report; by default None, which shows the metrics alone.

        Args:
            logits: (N, C).
            labels: labels of the N texts.
            names: names of the labels.
            text: function that returns text i.
        """
        return None

    @abstractmethod
    def answers(self, logits: Tensor, config: HeadConfig) -> list[dict[str, Any]]:
        """Return the predictions of logits (n, C)."""

    def relevance(self, logits: Tensor, names: Sequence[str]) -> Tensor:
        """Return how relevant the texts of each pair are to each other (n,), from logits (n, C).

        Raises:
            ValueError: If the logits do not say it.
        """
        raise ValueError(f"it has the labels {', '.join(names)}: relevance is a number, or the second of two labels")


class SingleLabel(LabelProblem):
    """One label a text."""

    name = "single_label"
    metric_names = ("accuracy", "f1", "matthews", "loss", "baseline_accuracy")

    def reader(self, names: tuple[str, ...]) -> LabelReader:
        """See `LabelProblem.reader`."""
        return OneLabelReader(names)

    def sums(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the cross entropy, of labels (n,), and the sum of their weights."""
        return cross_entropy_sums(logits, labels, weights)

    def findings(self, logits: Tensor, labels: Tensor, names: Sequence[str], text: Callable[[int], str]) -> Classes:
        """Return the predicted label of each text; see `LabelProblem.findings`."""
        confidence, predicted = logits.double().softmax(-1).max(-1)
        return Classes(names, labels.numpy(), predicted.numpy(), text, confidence.numpy(), unit="texts")

    def relevance(self, logits: Tensor, names: Sequence[str]) -> Tensor:
        """Return the log-odds of the second of two labels; see `LabelProblem.relevance`."""
        return logits[:, 1] - logits[:, 0] if len(names) == 2 else super().relevance(logits, names)

    def answers(self, logits: Tensor, config: HeadConfig) -> list[dict[str, Any]]:
        """Return "label", its "score" and the "scores" of all labels, which sum to 1."""
        found = []
        for row in logits.softmax(-1).tolist():
            scores = dict(zip(config.labels, row, strict=True))
            best = max(scores, key=scores.__getitem__)
            found.append({"label": best, "score": scores[best], "scores": scores})
        return found


class MultiLabel(LabelProblem):
    """Any number of labels a text."""

    name = "multi_label"
    metric_names = ("accuracy", "f1_micro", "f1_macro", "loss", "baseline_accuracy")
    baseline_name = "the most frequent training labels"
    settings = ("class_weights", "threshold")

    def reader(self, names: tuple[str, ...]) -> LabelReader:
        """See `LabelProblem.reader`."""
        return ManyLabelsReader(names)

    def sums(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | int]:
        """Return the sum over the texts of the mean binary cross entropy, of labels (n, C), and n."""
        losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none")
        return losses.mean(-1).sum(), len(labels)

    def answers(self, logits: Tensor, config: HeadConfig) -> list[dict[str, Any]]:
        """Return "labels", those whose score is at least the threshold, and the "scores" of all labels."""
        found = []
        for row, given in zip(logits.sigmoid().tolist(), reaches(logits, config.threshold).tolist(), strict=True):
            labels = [name for name, has in zip(config.labels, given, strict=True) if has]
            found.append({"labels": labels, "scores": dict(zip(config.labels, row, strict=True))})
        return found


class Regression(LabelProblem):
    """A number."""

    name = "regression"
    metric_names = ("pearson", "spearman", "mse", "loss", "baseline_mse")
    baseline_name = "the mean of the training numbers"
    settings = ()

    def check(self, labels: Sequence[str]) -> None:
        """Raise ValueError if there is not exactly one label."""
        if len(labels) != 1:
            raise ValueError("a head for regression has one label, the name of its number")

    def reader(self, names: tuple[str, ...]) -> LabelReader:
        """See `LabelProblem.reader`."""
        return NumberReader()

    def sums(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the squared errors, of labels (n,), and n."""
        return (logits[:, 0] - labels).square().sum(), len(labels)

    def baseline(self, train: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the error of always giving the mean of the training labels."""
        return {"mse": mean_baseline(train, labels)}

    def relevance(self, logits: Tensor, names: Sequence[str]) -> Tensor:
        """Return the number; see `LabelProblem.relevance`."""
        return logits[:, 0]

    def answers(self, logits: Tensor, config: HeadConfig) -> list[dict[str, Any]]:
        """Return "value"."""
        return [{"value": value} for value in logits[:, 0].tolist()]


class Classification(Head):
    """Classification of a text, or of a pair of texts."""

    problems: ClassVar[Mapping[str, LabelProblem]] = {
        one.name: one for one in (SingleLabel(), MultiLabel(), Regression())
    }

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        given = config.class_weights
        # Balanced weights are computed by `prepare`, since only training has them.
        self.weights = torch.tensor(given) if isinstance(given, tuple) else None

    @property
    def problem(self) -> LabelProblem:
        """The meaning of the logits."""
        return self.problems[self.config.problem]

    def settings(self) -> Collection[str]:
        """See `Head.settings`; they depend on the problem."""
        return *super().settings(), *self.problem.settings

    def check(self) -> None:
        """See `Head.check`."""
        super().check()
        self.problem.check(self.config.labels)

    def label_reader(self) -> LabelReader:
        """See `Head.label_reader`."""
        return self.problem.reader(self.config.labels)

    def build(self, text: TextConfig) -> nn.Module:
        """See `Head.build`."""
        return ClassificationHead(text, len(self.config.labels), self.config.activation, self.config.norm)

    def prepare(self, train_labels: Callable[[], Tensor]) -> None:
        """Compute balanced weights of the labels, if the configuration asks for them; see `Head.prepare`."""
        if self.config.class_weights == "balanced":
            self.weights = balanced_weights(train_labels(), self.config.labels)

    def sums(self, examples: Examples, group: Any = None) -> tuple[Tensor, Tensor | int]:
        """See `Head.sums`."""
        assert examples.labels is not None
        if self.weights is not None:  # They stay on the device: a copy in each step would wait for its work.
            self.weights = self.weights.to(examples.logits.device)
        return self.problem.sums(examples.logits.float(), examples.labels, self.weights)

    def metrics(self, states: Sequence[tuple[Tensor, Tensor]], held_out: HeldOut) -> Measured:
        """Compute `label_metrics` with intervals, and the baseline of always giving one answer; see `Head.metrics`."""
        logits, labels = concatenated(states)
        names, problem = self.config.labels, self.problem
        threshold = self.config.threshold
        found = label_metrics(logits, labels, names, problem.name, threshold=threshold)
        intervals = label_bootstrap(logits, labels, names, problem.name, threshold=threshold).intervals()
        chance = problem.baseline(held_out.train_labels(), labels)
        found["loss"] = float(problem.sums(logits, labels)[0]) / len(labels)
        findings = problem.findings(logits, labels, names, held_out.text)
        return Measured(found, intervals, chance, len(labels), problem.baseline_name, findings)

    def metric_names(self) -> Sequence[str]:
        """See `Head.metric_names`."""
        return self.problem.metric_names

    def answers(self, examples: Examples) -> list[dict[str, Any]]:
        """Return a prediction for each text: "label", "labels" or "value", by the problem; see `LabelProblem`."""
        return self.problem.answers(examples.logits.detach().float().cpu(), self.config)

    def copy_first_layer(self, module: nn.Module, other: Head, source: nn.Module) -> bool:
        """Copy the hidden layer of a pooler, or of a classification with other labels."""
        mine, theirs = self.config, other.config
        alike = (theirs.activation, theirs.norm) == (mine.activation, mine.norm)
        if mine.activation is None or not alike or not isinstance(source, ClassificationHead):
            return False
        assert isinstance(module, ClassificationHead)
        module.dense.load_state_dict(source.dense.state_dict())
        module.norm.load_state_dict(source.norm.state_dict())
        return True


class Pooler(Head):
    """The hidden layer of a classification, as pretrained models have it: nothing trains or measures it."""

    labeled = False
    task = ""
    trained_by = None

    def build(self, text: TextConfig) -> nn.Module:
        """See `Head.build`."""
        return ClassificationHead(text, 0, self.config.activation, self.config.norm)
