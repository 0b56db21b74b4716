"""What a family of text encoders on Hugging Face is: how its config and its tensors stand for ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Slot:
    """A place for a head in a family's own format.

    Attributes:
        name: of the head that a checkpoint is read as.
        kind: of the head.
        marker: the tensor that tells that a checkpoint has it.
        modules: module of the head -> module of the checkpoint; one with a dot before it is inside the encoder.
        parameters: parameter of the head -> names that it has in a checkpoint, the first being the one written.
        activation: what the format always has; None for what the encoder has.
        norm: see `HeadConfig`.
        labels: of a head whose labels are always these.
        architecture: what Hugging Face calls an encoder with this head.
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
