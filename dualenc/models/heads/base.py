"""The interface of heads: configuration, layers, loss, metrics and answers of a kind, and the table of kinds."""

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor, nn

from dualenc.data.text.dataset import Needs, Pairs, Part, Texts
from dualenc.data.text.labels import LabelReader
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.data.text.windows import WindowReader, Windows
from dualenc.models.heads.class_weights import ClassWeights, check_class_weights
from dualenc.models.heads.vectors import EmbeddingConfig
from dualenc.models.text_encoder import Activation, Pool, TextConfig, TextEncoder
from dualenc.report import Description, Findings
from dualenc.tokens import Tokens
from dualenc.utils.imports import import_by_path
from dualenc.utils.tags import SchemeName
from dualenc.utils.text import did_you_mean

THRESHOLD = 0.5  # score from which a text has a label
HEADS: "dict[str, type[Head]]" = {}  # by kind; `dualenc/models/heads/__init__.py` lists them


@dataclass(frozen=True)
class HeadConfig:
    """Kind and settings of a head, as saved next to its weights.

    A setting that the kind does not have, and that differs from its default, is refused; see `Head.settings`.

    Attributes:
        kind: a key of `HEADS`, or the import path of a subclass of `Head` such as "my_package.my_module.MyHead".
            "mlm" guesses masked tokens; "rtd" detects replaced tokens (ELECTRA); "classification" gives a text, or a
            pair of texts, labels or a number; "token_classification" finds named entities, by a tag for each word;
            "question_answering" finds the answer to a question in a text; "embedding" compares the vectors of texts;
            "pooler" is what remains of a pretrained classification head without its labels.
        labels: labels of a classification, in the order of its logits; the name of the number of a regression. For
            "token_classification" types of entities such as PER, which become the tags of the scheme, "O" first; or, if
            "O" is among them, the tags themselves in the order of the logits, such as O, B-PER, I-PER.
        problem: one label a text ("single_label"), any number of labels ("multi_label"), or a number ("regression").
            For "embedding": the other texts of the batch are negatives ("negatives"), or the label is the cosine
            ("cosine").
        pool: pooling of the text's vector; None for the encoder's `pool`.
        activation: activation between the two layers of a classification head; None for a head of one layer. "mlm" and
            "rtd" have the encoder's.
        norm: LayerNorm after the activation of a classification head (ModernBERT). "token_classification" and
            "question_answering" with it have such a hidden layer, too; else they are one layer, and `activation` has no
            meaning.
        tied: the logits of "mlm" are products with the token embeddings, instead of weights of the head's own.
        scale: factor of the cosines of an embedding with negatives, 20 where it is None; for a cosine problem the label
            that means a cosine of 1, 1 where it is None.
        weight: weight of the loss, where several heads are trained together.
        class_weights: weights of the labels in the training loss, in the order of `labels`, or "balanced" to compute
            them from the training labels; None for equal weights. For one label a text, the loss is the mean over the
            texts weighted by their labels, as that of `torch.nn.CrossEntropyLoss(weight)`; balanced weights are number
            of texts / (number of labels * texts with the label). For any number of labels they multiply the loss of the
            texts that have the label, as `pos_weight` of `torch.nn.BCEWithLogitsLoss`; balanced weights are texts
            without the label / texts with it. The loss of held-out texts is not weighted.
        threshold: for any number of labels, the score from which a text has a label, in answers and metrics.
        embedding: layers, prompts and dimensions of an embedding; None for a pooled vector without a prompt.
        scheme: how "token_classification" writes entities as tags: "iob2", where B begins each entity; "iob1", where B
            begins one that follows another of the same type; or "bioes", where E ends an entity and S is a whole one.
        max_length: longest window of "question_answering" in tokens, at most the encoder's `context_length`; a longer
            context is read in several windows.
        stride: number of the context's tokens that two neighboring windows share.
        no_answer: questions of "question_answering" may lack an answer, as in SQuAD 2.
    """

    # The keys that files of the first release have. Later keys are optional when a file is read.
    REQUIRED: ClassVar = ("kind", "labels", "problem", "pool", "activation", "norm", "tied", "scale", "weight")

    kind: str
    labels: tuple[str, ...] = ()
    problem: str = "single_label"
    pool: Pool | None = None
    activation: Activation | None = "tanh"
    norm: bool = False
    tied: bool = True
    scale: float | None = None
    weight: float = 1.0
    class_weights: ClassWeights = None
    threshold: float = THRESHOLD
    embedding: EmbeddingConfig | None = None
    scheme: SchemeName = "iob2"
    max_length: int = 384
    stride: int = 128
    no_answer: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(HeadConfig).items():
            if getattr(self, name) is None and type(None) not in get_args(hint):
                raise ValueError(f"{name} of a head must not be null: give a value, or leave it out")
        if (self.scale is not None and not self.scale > 0) or not self.weight > 0:
            raise ValueError(f"scale {self.scale} and weight {self.weight} of a head must be positive")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold {self.threshold} of a head must lie between 0 and 1")
        if "." not in self.kind:  # A kind by import path is checked where its module has been imported.
            # A kind may derive the labels of its logits from those that are given, such as tags from types.
            object.__setattr__(self, "labels", tuple(make_head(self).labels))

    def differing(self) -> list[str]:
        """Return the names of the settings that differ from their defaults, without those that all heads have."""
        some = [one for one in fields(self) if one.name not in ("kind", "labels", "weight")]
        return [one.name for one in some if getattr(self, one.name) != one.default]

    @property
    def meaning(self) -> tuple[str, str, tuple[str, ...]]:
        """The meaning of the logits: kind, problem and labels."""
        return self.kind, self.problem, self.labels


class Examples(NamedTuple):
    """Logits and labels of the n texts, pairs of texts or tokens of a batch that belong to one head."""

    logits: Tensor  # (n, ...); of pairs that are read apart the vectors (2, n, D)
    labels: Tensor | None  # (n, ...)
    number: int  # n
    windows: Windows | None = None  # of a head that judges tokens: the n tokens, and the samples that they belong to
    ids: Tensor | None = None  # (n, 2) of pairs that are read apart, see `Part.ids`
    negatives: Tensor | None = None  # (m, D) vectors of texts that belong to no pair
    negative_ids: Tensor | None = None  # (m,)


class Measured(NamedTuple):
    """Metrics of the held-out texts of a head."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    chance: dict[str, float]  # metrics of a baseline that does not read the texts
    number: int  # of texts, pairs or tokens
    baseline: str = ""  # what the baseline answers, such as "the most frequent training label"
    findings: Findings | None = None  # evidence for the report
    notes: tuple[str, ...] = ()  # further sentences for the report


@dataclass(frozen=True)
class HeldOut:
    """Access to data and model of a head, for metrics that compare with baselines.

    Attributes:
        stage: "val" or "test".
        train_labels: function that returns the labels of the training texts.
        texts: function that returns the texts of "train" or "held_out".
        tokenizer: the run's tokenizer.
        logits: function of tokens and masked positions that returns the logits of the head.
        text: function that returns measured text i, in the order of the states; both texts of a pair.
        seed: seed of draws.
        scored_tokens: number of held-out tokens to score one by one.
    """

    stage: Literal["val", "test"]
    train_labels: Callable[[], Tensor]
    texts: Callable[[Literal["train", "held_out"]], Iterable[str]]
    tokenizer: Tokenizer
    logits: Callable[[Tokens, Tensor], Tensor]
    text: Callable[[int], str]
    seed: int
    scored_tokens: int


HEADLINES = ("accuracy", "spearman", "perplexity", "auroc")  # metrics at the top of the report


class Head(ABC):
    """A kind of head: its layers, what it needs of the data, its loss, its metrics and its answers.

    Weights are in the module that `build` returns. This class is for heads that give their layers one vector of each
    text or joined pair; subclass it for a kind of your own, and name the subclass in `model.heads.NAME.kind`.

    Args:
        config: settings of the head.

    Attributes:
        pairs: see `Needs.pairs`.
        masking: see `Needs.masking`.
        problems: problems that the kind knows, by `HeadConfig.problem`; empty where it has one.
        labeled: the configuration may name labels.
        task: Hugging Face's name of the use: `TextPredictor` and model cards choose heads by it.
        result_kind: kind of the results in reports.
        description: explanation of the results in reports.
        trained_by: task that trains the kind; None for none.
        needs_training_data: metrics need the training data, for baselines.

    Raises:
        ValueError: If the settings do not fit the kind.
    """

    pairs: ClassVar[Pairs] = "joined"
    masking: ClassVar[tuple[float, float] | None] = None
    problems: ClassVar[Mapping[str, Any]] = {}
    labeled: ClassVar[bool] = True
    task: ClassVar[str] = "text-classification"
    result_kind: ClassVar[str] = "labels"
    description: ClassVar[Description] = Description("texts", "labels of texts, or numbers", HEADLINES)
    trained_by: ClassVar[str | None] = "TextTask"
    needs_training_data: ClassVar[bool] = True

    def __init__(self, config: HeadConfig) -> None:
        self.config = config
        self.check()

    def check(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If they do not fit the kind.
        """
        kind, labels = self.config.kind, self.config.labels
        if self.problems and self.config.problem not in self.problems:
            raise ValueError(f"a head of kind {kind}: problem must be {' or '.join(self.problems)}")
        if labels and not self.labeled:
            raise ValueError(f"a head of kind {kind} does not have labels: leave them out")
        if len(set(labels)) < len(labels):
            raise ValueError(f"a head of kind {kind} must have each of its labels once")
        if without := [name for name in self.config.differing() if name not in self.settings()]:
            problem = f" and problem {self.config.problem}" if self.problems else ""
            raise ValueError(f"{without[0]} has no meaning for a head of kind {kind}{problem}: leave it out")
        check_class_weights(self.config.class_weights, self.labels)

    def settings(self) -> Collection[str]:
        """Return the names of the settings that the kind has, except kind, labels and weight; others are refused.

        By default they are those of the first release, whose files name all of them for each kind.
        """
        return HeadConfig.REQUIRED

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the logits, in their order."""
        return self.config.labels

    # Data

    @property
    def needs(self) -> Needs:
        """The data that the head needs."""
        return Needs(self.label_reader(), self.pairs, self.masking, self.config.meaning, self.window_reader())

    def label_reader(self) -> LabelReader | None:
        """Return the reader of the labels; None for a head without labels."""
        return None

    def window_reader(self) -> WindowReader | None:
        """Return the reader of the lines of a head that judges tokens; None for a head of whole texts."""
        return None

    @property
    def of_tokens(self) -> bool:
        """True if the head's logits are those of tokens, not of texts."""
        return self.masking is not None or self.window_reader() is not None

    # Layers

    @abstractmethod
    def build(self, text: TextConfig) -> nn.Module:
        """Return the layers with random weights.

        Args:
            text: architecture of the encoder.
        """

    def logits(
        self, module: nn.Module, encoder: TextEncoder, hidden: Tensor, tokens: Tokens, positions: Tensor | None
    ) -> Tensor:
        """Return the logits (B, ...) of B texts in the caller's order.

        Args:
            module: the layers.
            encoder: encoder of the texts.
            hidden: (N, D) hidden states of the encoder.
            tokens: the texts.
            positions: (M,) the masked or judged tokens among the N, for heads that judge tokens; None for all.
        """
        return module(encoder.pool(hidden, tokens, self.config.pool))

    def examples(self, logits: Tensor, batch: Texts, part: Part) -> Examples:
        """Return the logits and labels of the head's own samples.

        Args:
            logits: logits of the whole batch, see `logits`.
            batch: the batch.
            part: the head's samples in the batch.
        """
        if part.windows is not None:
            return Examples(logits, part.labels, len(logits), part.windows)
        return Examples(logits[part.texts], part.labels, len(part.texts))

    # Loss, metrics, answers

    @property
    def compares_ranks(self) -> bool:
        """True if the loss compares the texts of all ranks, which must then have equally many."""
        return False

    def prepare(self, train_labels: Callable[[], Tensor]) -> None:  # noqa: B027 (a kind may need nothing)
        """Take what the loss needs to know about the training labels, such as their frequencies; by default nothing.

        It is called before the training.

        Args:
            train_labels: function that returns the labels of the training texts.

        Raises:
            ValueError: If the labels are not enough.
        """

    def loss(self, logits: Tensor, labels: Tensor | None, group: Any = None) -> Tensor:
        """Return the sum of the loss over the n examples of this rank.

        Args:
            logits: (n, ...), see `Examples`.
            labels: (n, ...); None for a head without labels.
            group: process group of all ranks, for losses that compare the texts of all ranks; None for one rank.
        """
        raise NotImplementedError

    def sums(self, examples: Examples, group: Any = None) -> tuple[Tensor, Tensor | int]:
        """Return the sum of the loss over the examples of this rank, and their number or the sum of their weights.

        The loss of a step is the sum over all ranks of the first, divided by that of the second. By default the first
        is `loss`.

        Args:
            examples: the logits and labels.
            group: see `loss`.
        """
        return self.loss(examples.logits, examples.labels, group), examples.number

    def observe(self, examples: Examples) -> Any:
        """Return what is kept of a batch of held-out texts, on the CPU; here logits and labels."""
        labels = None if examples.labels is None else examples.labels.cpu()
        return examples.logits.float().cpu(), labels

    def metrics(self, states: Sequence[Any], held_out: HeldOut) -> Measured:
        """Compute metrics.

        Args:
            states: returns of `observe` for all batches of all ranks.
            held_out: access to data and model, for baselines.

        Raises:
            ValueError: If metrics cannot be computed.
        """
        raise NotImplementedError

    def metric_names(self) -> Sequence[str] | None:
        """Return the names of the metrics during training, with "baseline_" before those of `Measured.chance`.

        They are compared with `run.monitor` before the first step. None if they are not known before they are measured.
        """
        return None

    def answers(self, examples: Examples) -> list[dict[str, Any]]:
        """Return a prediction for each text or pair, or for each sample of `Examples.windows`, as JSON.

        Args:
            examples: the logits; labels are not used.
        """
        raise NotImplementedError

    @property
    def predicts(self) -> bool:
        """True if the kind has answers."""
        return type(self).answers is not Head.answers

    # Settings and weights of another model

    def completed(self, others: Iterable[HeadConfig]) -> HeadConfig:
        """Return the configuration with what it leaves open and a head of a checkpoint sets; here nothing.

        Args:
            others: configurations of the checkpoint's heads.
        """
        return self.config

    def matches(self, other: "Head", same_name: bool) -> bool:
        """Return whether the weights of another head mean the same.

        Args:
            other: head of another model.
            same_name: both heads are called the same.
        """
        mine, theirs = self.config, other.config
        training = {name: getattr(mine, name) for name in ("weight", "scale", "pool", "class_weights", "threshold")}
        return same_name and replace(theirs, **training) == mine

    def copy_weights(self, module: nn.Module, source: nn.Module, encoder: TextEncoder) -> None:
        """Copy the weights of a head that matches.

        Args:
            module: own layers.
            source: layers of the other head.
            encoder: encoder of the other model.
        """
        module.load_state_dict(source.state_dict())

    def copy_first_layer(self, module: nn.Module, other: "Head", source: nn.Module) -> bool:
        """Copy the first layer of a head that does not match, where it fits; return whether it does.

        Args:
            module: own layers.
            other: the other head.
            source: layers of the other head.
        """
        return False


def make_head(config: HeadConfig) -> Head:
    """Return the head of a configuration.

    Raises:
        ValueError: If the kind is unknown, its module has not been imported, or the settings do not fit it.
    """
    return head_class(config.kind)(config)


def head_class(kind: str) -> type[Head]:
    """Return the class of a kind.

    The module of an import path must have been imported: saved models come from strangers and must not run code.

    Raises:
        ValueError: If there is no such class, or its module has not been imported.
    """
    if kind in HEADS:
        return HEADS[kind]
    module, _, name = kind.rpartition(".")
    if not module:
        hint = did_you_mean(kind, HEADS, f"choose one of {', '.join(HEADS)}, or the import path of a Head class")
        raise ValueError(f"unknown kind {kind!r} of a head: {hint}")
    if (loaded := sys.modules.get(module)) is None:
        raise ValueError(f"kind {kind} is a class of {module}: import {module} first, in Python")
    # Read from the dictionary, because looking up an attribute of a lazy module may import others.
    found = vars(loaded).get(name)
    if not (isinstance(found, type) and issubclass(found, Head)) or inspect.isabstract(found):
        raise ValueError(f"kind {kind} must be a class that derives from dualenc.models.heads.Head")
    return found


def import_head(kind: str) -> type[Head]:
    """Return the class of a kind, and import its module where it has not been imported.

    Only for kinds from a configuration of the user's own, which may run code.

    Raises:
        ValueError: If there is no such class.
    """
    if "." in kind and kind not in HEADS:
        try:
            import_by_path(kind)
        except ImportError as error:
            raise ValueError(f"kind {kind}: {kind.rpartition('.')[0]} cannot be imported ({error})") from None
    return head_class(kind)


def linear(width: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Return a linear layer with BERT's initial weights (Devlin et al. 2019)."""
    layer = nn.Linear(width, outputs, bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def concatenated(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return logits (N, ...) and labels (N, ...) of all batches, as `Head.observe` kept them."""
    return torch.cat([logits for logits, _ in states]), torch.cat([labels for _, labels in states])
