"""Definition of a family of text encoders on Hugging Face: how its config and tensors map to ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dualenc.models.text_encoder import Activation, Pool, TextConfig

# Hugging Face's names of activations. If several names mean the same activation, the first is written.
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
    """Place for a head in a family's own format.

    Attributes:
        name: Name that the head gets when a checkpoint is read.
        kind: Kind of the head.
        marker: Tensor whose presence shows that a checkpoint has the head.
        modules: Module of the head -> module of the checkpoint; a leading dot marks a module inside the encoder.
        parameters: Parameter of the head -> its names in checkpoints, of which the first is written.
        activation: Activation that the format fixes; None for the encoder's activation.
        norm: See `HeadConfig`.
        labels: Labels that the format fixes; empty if a checkpoint names them.
        architecture: Hugging Face's class for an encoder with this head.
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
    """Format of one `model_type` as data.

    Attributes:
        name: The `model_type`.
        stem: Beginning of its classes' names.
        prefix: Prefix of the encoder's tensors in a checkpoint that also holds a head.
        keys: Field of `TextConfig` -> key of the config, and the value that a missing key means.
        always: Fields of `TextConfig` that are the same for the whole family.
        refused: Key of the config -> the values that dualenc can compute, of which the first is written; any other
            value is refused.
        outside: Module of the encoder outside its blocks -> module of the checkpoint.
        block: Prefix of the tensors of a block, a template with {i}, or with {group} and {member}.
        inside: Module of a block -> module of the checkpoint, or the three that are concatenated to one.
        slots: Places for heads.
        dropouts: Keys that the dropout is written to; it is read from the first.
        token_embeddings: Module of the token embeddings in the checkpoint.
        ignored: Patterns of tensors that are not part of the encoder, in addition to those that any family may have.
        nested: `model_type` of a larger model whose `text_config` is of this family.
        pool: Pooling of a text's vector if the checkpoint does not say.
        read, write: Functions for the rest of a config that no table expresses.
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
