"""Places for heads in the formats of Hugging Face's families, one class a kind of head."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from dualenc.formats.huggingface.family import ACTIVATION_NAMES, PROBLEMS, Config, FoundHead, Slot, activation_name
from dualenc.models.heads import HeadConfig
from dualenc.models.text_encoder import Activation, TextConfig
from dualenc.utils.errors import ModelError, first_failure
from dualenc.utils.tags import OUTSIDE, SchemeName, split_tag

# The usual windows of question answering in transformers, which its checkpoints do not name.
LONGEST_WINDOW, SHARED_TOKENS = 384, 128


@dataclass(frozen=True)
class MaskedLanguageSlot(Slot):
    """Masked language modeling; the parameters "output_embeddings" and "bias" are named."""

    kind = "mlm"

    def read(self, found: FoundHead) -> HeadConfig:
        """See `Slot.read`; the output embeddings are tied unless the file has others."""
        activation = self.read_activation(found.config)
        if activation not in (None, found.text.activation):
            raise ModelError(
                f"{found.path}: the encoder's activation is {found.text.activation}, that of its masked-language-model "
                f"head {activation}: dualenc has one for both"
            )
        decoder = found.outer + self.parameters["output_embeddings"][0]
        weights = found.weights
        tied = decoder not in weights or torch.equal(weights[decoder], weights[found.token_embeddings])
        return HeadConfig("mlm", tied=tied)

    def read_activation(self, config: Config) -> Activation | None:
        """Return the activation of the head; None for the encoder's."""
        return self.activation

    def settings(self, text: TextConfig, head: HeadConfig | None) -> Config:
        """See `Slot.settings`."""
        return {"tie_word_embeddings": head is None or head.tied}

    def copied(self, head: HeadConfig) -> Collection[str]:
        """See `Slot.copied`; a decoder of its own has a bias of its own, which Hugging Face writes twice."""
        return () if head.tied else ("bias",)

    def stored(self, head: HeadConfig, names: Collection[str]) -> tuple[dict[str, str], list[str]]:
        """See `Slot.stored`."""
        if head.tied:  # The decoder is a copy of the token embeddings.
            return {}, [self.parameters["output_embeddings"][0]]
        *others, own = self.parameters["bias"]
        return ({"bias": own}, others) if own in names else ({}, [])


@dataclass(frozen=True)
class ReplacedTokenSlot(Slot):
    """Replaced-token detection."""

    kind = "rtd"

    def read(self, found: FoundHead) -> HeadConfig:
        """See `Slot.read`."""
        return HeadConfig("rtd")


@dataclass(frozen=True)
class ClassificationSlot(Slot):
    """Classification of a text or a pair, of the first token's vector."""

    kind = "classification"

    def misfit(self, name: str, text: TextConfig, head: HeadConfig) -> str | None:
        """See `Slot.misfit`."""
        checks = [
            self._same_kind(head),
            (not self.labels or name == self.name, f"name {name}"),
            (not self.labels or head.labels == self.labels, f"labels {head.labels}"),
        ]
        return first_failure([*checks, *_first_token(self, text, head)])

    def read(self, found: FoundHead) -> HeadConfig:
        """See `Slot.read`."""
        labels, problem = self.labels, "single_label"
        if not labels:
            weight = found.weights[f"{found.outer}{self.modules['out']}.weight"]
            labels, problem = _labels(found.config, len(weight) if weight.dim() else 0, found.path)
        try:
            return self.head(labels, problem, found.config)
        except ValueError as error:
            raise ModelError(f"{found.path}: id2label, problem_type: {error}") from None

    def head(self, labels: tuple[str, ...], problem: str, config: Config) -> HeadConfig:
        """Return the head with these labels."""
        return HeadConfig("classification", labels, problem, "cls", self.activation, self.norm)

    def settings(self, text: TextConfig, head: HeadConfig | None) -> Config:
        """See `Slot.settings`."""
        if head is None or self.labels:
            return {}
        return {**_label_keys(head), "problem_type": PROBLEMS[head.problem]}


@dataclass(frozen=True)
class PoolerSlot(Slot):
    """The hidden layer of a classification without labels."""

    kind = "pooler"
    yields = True

    def misfit(self, name: str, text: TextConfig, head: HeadConfig) -> str | None:
        """See `Slot.misfit`."""
        return first_failure([self._same_kind(head), *_first_token(self, text, head)])

    def precedence(self, name: str) -> int:
        """See `Slot.precedence`: last, since a classification uses the same modules."""
        return 2

    def read(self, found: FoundHead) -> HeadConfig:
        """See `Slot.read`."""
        return HeadConfig("pooler", pool="cls", activation=self.activation)


@dataclass(frozen=True)
class TokenClassificationSlot(Slot):
    """A tag for each word: one layer on the states of tokens."""

    kind = "token_classification"

    def misfit(self, name: str, text: TextConfig, head: HeadConfig) -> str | None:
        """See `Slot.misfit`."""
        return first_failure([self._same_kind(head), (head.norm == self.norm, f"norm {head.norm}")])

    def read(self, found: FoundHead) -> HeadConfig | str:
        """See `Slot.read`; the scheme is IOB1 where a type has a tag with I and none with B."""
        weight = found.weights[f"{found.outer}{self.modules['out']}.weight"]
        labels, _ = _labels(found.config, len(weight) if weight.dim() else 0, found.path)
        tags = [split_tag(label) for label in labels if label != OUTSIDE]
        begin, inside = ({label for prefix, label in tags if prefix == one} for one in "BI")
        scheme: SchemeName = "bioes"
        if {prefix for prefix, _ in tags} <= {"B", "I"}:
            scheme = "iob2" if inside <= begin else "iob1"
        try:
            if OUTSIDE not in labels:
                raise ValueError(f"label {OUTSIDE!r} is missing")
            return self.head(labels, scheme, found.config)
        except ValueError as error:
            return f"id2label is not a set of tags of named entities ({error})"

    def head(self, labels: tuple[str, ...], scheme: SchemeName, config: Config) -> HeadConfig:
        """Return the head with these tags."""
        return HeadConfig("token_classification", labels, scheme=scheme)

    def settings(self, text: TextConfig, head: HeadConfig | None) -> Config:
        """See `Slot.settings`."""
        return {} if head is None else _label_keys(head)


@dataclass(frozen=True)
class QuestionAnsweringSlot(Slot):
    """Extractive question answering by one layer."""

    kind = "question_answering"

    def misfit(self, name: str, text: TextConfig, head: HeadConfig) -> str | None:
        """See `Slot.misfit`."""
        return first_failure([self._same_kind(head), (head.norm == self.norm, f"norm {head.norm}")])

    def read(self, found: FoundHead) -> HeadConfig:
        """See `Slot.read`; the windows are those of the reference recipe, or shorter for a short encoder."""
        length = min(LONGEST_WINDOW, found.text.context_length)
        head = HeadConfig(self.kind, norm=self.norm, max_length=length, stride=min(SHARED_TOKENS, length // 2))
        return dataclasses.replace(head, activation=self.read_activation(found.config) or head.activation)

    def read_activation(self, config: Config) -> Activation | None:
        """Return the activation between two layers; None for one layer."""
        return None


@dataclass(frozen=True)
class ModernMaskedLanguageSlot(MaskedLanguageSlot):
    """Masked language modeling of ModernBERT, whose config names the activation."""

    def read_activation(self, config: Config) -> Activation | None:
        """See `MaskedLanguageSlot.read_activation`."""
        return ACTIVATION_NAMES[config.get("classifier_activation", "gelu")]


@dataclass(frozen=True)
class ModernClassificationSlot(ClassificationSlot):
    """Classification of ModernBERT, whose config names activation and pooling."""

    def misfit(self, name: str, text: TextConfig, head: HeadConfig) -> str | None:
        """See `Slot.misfit`."""
        pool = head.pool or text.pool
        checks = [
            self._same_kind(head),
            (head.activation is not None, "activation None"),
            (head.norm, "norm False"),
            (pool in ("cls", "mean"), f"pool {pool!r}"),
        ]
        return first_failure(checks)

    def head(self, labels: tuple[str, ...], problem: str, config: Config) -> HeadConfig:
        """See `ClassificationSlot.head`."""
        activation = ACTIVATION_NAMES[config.get("classifier_activation", "gelu")]
        return HeadConfig(
            "classification", labels, problem, config.get("classifier_pooling", "cls"), activation, self.norm
        )

    def settings(self, text: TextConfig, head: HeadConfig | None) -> Config:
        """See `Slot.settings`."""
        activation, pool = (None, "cls") if head is None else (head.activation, head.pool or text.pool)
        named = activation_name(activation or text.activation)
        return {**super().settings(text, head), "classifier_activation": named, "classifier_pooling": pool}


@dataclass(frozen=True)
class ModernTokenClassificationSlot(TokenClassificationSlot):
    """A tag for each word by ModernBERT, with a hidden layer whose activation the config names."""

    def head(self, labels: tuple[str, ...], scheme: SchemeName, config: Config) -> HeadConfig:
        """See `TokenClassificationSlot.head`."""
        activation = ACTIVATION_NAMES[config.get("classifier_activation", "gelu")]
        return HeadConfig("token_classification", labels, activation=activation, norm=True, scheme=scheme)

    def settings(self, text: TextConfig, head: HeadConfig | None) -> Config:
        """See `Slot.settings`."""
        if head is None:
            return {}
        assert head.activation is not None  # A head with a norm has an activation.
        return {**super().settings(text, head), "classifier_activation": activation_name(head.activation)}


@dataclass(frozen=True)
class ModernQuestionAnsweringSlot(QuestionAnsweringSlot):
    """Extractive question answering of ModernBERT by two layers, of which the config names the activation."""

    def read_activation(self, config: Config) -> Activation | None:
        """See `QuestionAnsweringSlot.read_activation`."""
        return ACTIVATION_NAMES[config.get("classifier_activation", "gelu")]

    def settings(self, text: TextConfig, head: HeadConfig | None) -> Config:
        """See `Slot.settings`."""
        if head is None:
            return {}
        assert head.activation is not None  # A head with a norm has an activation.
        return {"classifier_activation": activation_name(head.activation)}


def _first_token(slot: Slot, text: TextConfig, head: HeadConfig) -> list[tuple[bool, str]]:
    """Return the checks that a head is a layer without a norm on the first token's vector, with the reasons to give."""
    pool = head.pool or text.pool
    return [
        (head.activation == slot.activation, f"activation {head.activation!r}"),
        (not head.norm, "norm True"),
        (pool == "cls", f"pool {pool!r}"),
    ]


def _label_keys(head: HeadConfig) -> Config:
    """Return the keys of `config.json` that name the labels of a head."""
    return {
        "id2label": {str(i): label for i, label in enumerate(head.labels)},
        "label2id": {label: i for i, label in enumerate(head.labels)},
    }


def _labels(config: Config, outputs: int, path: Path) -> tuple[tuple[str, ...], str]:
    """Return the labels of a classification in the order of its logits, and its problem."""
    given = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(outputs)}
    try:
        labels = tuple(str(label) for _, label in sorted((int(i), label) for i, label in given.items()))
    except (AttributeError, TypeError, ValueError):
        raise ModelError(f"{path}: id2label must map numbers to labels, found {given!r}") from None
    if len(labels) != outputs:
        raise ModelError(f"{path}: id2label has {len(labels)} labels, the head {outputs}")
    named = {theirs: ours for ours, theirs in PROBLEMS.items()}
    kind = config.get("problem_type") or PROBLEMS["regression" if outputs == 1 else "single_label"]
    if kind not in named:
        raise ModelError(f"{path}: problem_type {kind!r} must be one of {', '.join(named)}")
    return labels, named[kind]
