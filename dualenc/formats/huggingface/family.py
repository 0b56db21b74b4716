"""Description of a family of Hugging Face's text encoders: its config, its tensors and its slots for heads."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from dualenc.models.heads import HeadConfig
from dualenc.models.text_encoder import Activation, Pool, TextConfig
from dualenc.utils.errors import first_failure

# Hugging Face's names of activations; of two names with one meaning the first is written.
ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
PROBLEMS = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
Config = dict[str, Any]


def activation_name(activation: Activation, usual: str = "gelu") -> str:
    """Return Hugging Face's name of an activation: the usual one of a family, where it means the same."""
    if ACTIVATION_NAMES[usual] == activation:
        return usual
    return next(theirs for theirs, ours in ACTIVATION_NAMES.items() if ours == activation)


class FoundHead(NamedTuple):
    """A checkpoint of Hugging Face's that has a head.

    Attributes:
        text: architecture of its encoder.
        config: the parsed `config.json`.
        path: path of that file, for errors.
        weights: tensors by name.
        outer: prefix of the tensors of heads.
        token_embeddings: name of the tensor of token embeddings.
    """

    text: TextConfig
    config: Config
    path: Path
    weights: Mapping[str, Tensor]
    outer: str
    token_embeddings: str


@dataclass(frozen=True)
class Slot(ABC):
    """A place for a head in a family's own format.

    Attributes:
        name: name of the head that is read from a checkpoint.
        marker: name of a tensor that is there if the checkpoint has the head.
        modules: module of the head -> module of the checkpoint; a dot at its front means inside the encoder.
        parameters: parameter of the head -> its names in a checkpoint, of which the first is written.
        activation: activation that the format always has; None for the encoder's.
        norm: see `HeadConfig`.
        labels: labels that the format always has; empty where the config names them.
        architecture: suffix of Hugging Face's class of an encoder with this head.
        kind: kind of the head.
        yields: another head that uses the same modules takes precedence in reading.
    """

    name: str
    marker: str
    modules: Mapping[str, str]
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    activation: Activation | None = None
    norm: bool = False
    labels: tuple[str, ...] = ()
    architecture: str = ""

    kind: ClassVar[str]
    yields: ClassVar[bool] = False

    def misfit(self, name: str, text: TextConfig, head: HeadConfig) -> str | None:
        """Return what a head has that the format does not have in this slot; None if it fits.

        Args:
            name: name of the head.
            text: architecture of the encoder.
            head: configuration of the head.
        """
        fits = self.activation in (None, text.activation)
        return first_failure([self._same_kind(head), (fits, f"activation {text.activation!r}")])

    def _same_kind(self, head: HeadConfig) -> tuple[bool, str]:
        """Return a check that a head is of the slot's kind, with the reason to give."""
        return head.kind == self.kind, f"kind {head.kind!r}"

    def precedence(self, name: str) -> int:
        """Return the order in which a head of this kind may take a slot: 0 for first."""
        return int(name == "nsp")

    @abstractmethod
    def read(self, found: FoundHead) -> HeadConfig | str:
        """Return the configuration of a checkpoint's head, or the reason why the head is left out.

        Raises:
            ModelError: If dualenc cannot compute the head; the message names the file and the key.
        """

    def settings(self, text: TextConfig, head: HeadConfig | None) -> Config:
        """Return the keys of `config.json` that describe the head in this slot, or that there is none."""
        return {}

    def copied(self, head: HeadConfig) -> Collection[str]:
        """Return the parameters that are written under all of their names."""
        return ()

    def stored(self, head: HeadConfig, names: Collection[str]) -> tuple[dict[str, str], list[str]]:
        """Return the parameters that a checkpoint has under another name than the first, and tensors without a use.

        Args:
            head: configuration of the head.
            names: names of tensors without the prefix of heads.

        Returns:
            Name by parameter, and names of tensors that are passed over.
        """
        return {}, []


@dataclass(frozen=True)
class Family:
    """The format of one `model_type`.

    Attributes:
        name: the `model_type`.
        stem: prefix of the names of its classes.
        prefix: prefix of the encoder's tensors in a checkpoint with a head.
        keys: field of `TextConfig` -> key of the config and the value of an absent key.
        always: values of fields of `TextConfig` that the whole family has.
        refused: key -> the values that can be computed, of which the first is written.
        outside: module of the encoder -> module of the checkpoint, except for the blocks.
        block: module of block i in the checkpoint, with {i}; or with {group} and {member}.
        inside: module of a block -> module of the checkpoint, or the three that are joined to one.
        slots: slots for heads.
        dropouts: keys to which the dropout is written; it is read from the first.
        token_embeddings: module of the token embeddings in the checkpoint.
        ignored: patterns of tensors outside the encoder, in addition to those that every family may have.
        nested: `model_type` of a larger model whose config contains the family's.
        pool: pooling of a text's vector, where the checkpoint does not name one.
        read: function that completes the fields of a config that is read.
        write: function that completes a config that is written.
    """

    name: str
    stem: str
    prefix: str
    keys: Mapping[str, tuple[str, Any]]
    always: Mapping[str, Any]
    refused: Mapping[str, tuple[Any, ...]]
    outside: Mapping[str, str]
    block: str
    inside: Mapping[str, str | tuple[str, str, str]]
    slots: tuple[Slot, ...] = ()
    dropouts: tuple[str, ...] = ()
    token_embeddings: str = "embeddings.word_embeddings"
    ignored: tuple[str, ...] = ()
    nested: str | None = None
    pool: Pool = "cls"
    read: Callable[[Config, Config], None] | None = None
    write: Callable[[TextConfig, Config], None] | None = None
