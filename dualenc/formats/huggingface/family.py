"""Description of a family of Hugging Face's text encoders: its config, its tensors and its slots for heads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dualenc.models.text_encoder import Activation, Pool, TextConfig

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


@dataclass(frozen=True)
class Slot:
    """A place for a head in a family's own format.

    Attributes:
        name: name of the head that is read from a checkpoint.
        kind: kind of the head.
        marker: name of a tensor that is there if the checkpoint has the head.
        modules: module of the head -> module of the checkpoint; a dot at its front means inside the encoder.
        parameters: parameter of the head -> its names in a checkpoint, of which the first is written.
        activation: activation that the format always has; None for the encoder's.
        norm: see `HeadConfig`.
        labels: labels that the format always has; empty where the config names them.
        architecture: suffix of Hugging Face's class of an encoder with this head.
    """

    name: str
    kind: str
    marker: str
    modules: Mapping[str, str]
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    activation: Activation | None = None
    norm: bool = False
    labels: tuple[str, ...] = ()
    architecture: str = ""


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
