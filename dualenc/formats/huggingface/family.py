"""What a family of text encoders on Hugging Face is: how its config and its tensors stand for ours."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from dualenc.models.heads import HeadConfig
from dualenc.models.text_encoder import Activation, Pool, TextConfig

# Hugging Face's names of activations; of two that mean the same the first is the one that is written.
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

    def fits(self, name: str, text: TextConfig, head: HeadConfig) -> bool:
        """Return whether a head is what the format has in this slot.

        Args:
            name: name of the head.
            text: architecture of the encoder.
            head: configuration of the head.
        """
        return head.kind == self.kind and self.activation in (None, text.activation)

    def precedence(self, name: str) -> int:
        """Return the order in which a head of this kind may take a slot: 0 for first."""
        return int(name == "nsp")

    @abstractmethod
    def read(self, found: FoundHead) -> HeadConfig:
        """Return the configuration of a checkpoint's head.

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
    """How one `model_type` is written.

    Attributes:
        name: the `model_type`.
        stem: what its classes' names begin with.
        prefix: of the encoder's tensors beside a head's.
        keys: field of `TextConfig` -> key of the config and the value that an absent key means.
        always: fields of `TextConfig` that all of the family have.
        refused: key -> the values that can be computed, the first being the one that is written.
        outside: module of the encoder -> module of the checkpoint, but for the blocks.
        block: where the tensors of block i are, {i}; or {group} and {member}.
        inside: module of a block -> module of the checkpoint, or the three that are joined to one.
        slots: for heads.
        dropouts: keys that the dropout is written to; it is read from the first.
        token_embeddings: module of the token embeddings in the checkpoint.
        ignored: patterns of tensors, besides those that every family may have, that stand for no part of the encoder.
        nested: key of the config, and `model_type`, in which the family stands inside a bigger model.
        pool: of a text's vector, where the checkpoint does not say.
        read, write: what is left to say of a config.
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
