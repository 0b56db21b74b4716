"""Settings of text embeddings: dense layers after pooling, prompts before the texts, the number of dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from dualenc.models.dual_encoder import unit

DENSE_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


@dataclass(frozen=True)
class DenseConfig:
    """A linear layer after pooling.

    Attributes:
        width: dimensions of its output.
        bias: whether it has a bias.
        activation: activation after it; None for none.
    """

    width: int
    bias: bool = True
    activation: Literal["tanh", "gelu", "relu", "silu"] | None = "tanh"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width {self.width} of a dense layer must be at least 1")
        if self.activation is not None and self.activation not in DENSE_ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} of a dense layer must be {', '.join(DENSE_ACTIVATIONS)} or null"
            )


@dataclass(frozen=True)
class EmbeddingConfig:
    """Settings of the vectors of a text model, as folders of sentence-transformers have them.

    Training uses the dense layers alone: no prompts, and all dimensions.

    Attributes:
        dense: layers between the pooling and the normalization.
        prompts: text to put before each text, by name.
        default_prompt: name of the prompt that is used where none is named; None for no prompt.
        dim: number of dimensions that are kept, the first ones (Matryoshka, Kusupati et al. 2022), before the vectors
            are normalized again; None for all.
    """

    dense: tuple[DenseConfig, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        for name, text in self.prompts.items():
            if not isinstance(text, str):
                raise ValueError(f"prompts: {name} must be a string, found {text!r}")
        if self.default_prompt is not None and self.default_prompt not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ValueError(f"default_prompt {self.default_prompt!r} is not one of the prompts: {known}")
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"dim {self.dim} must be at least 1")

    def width(self, pooled: int) -> int:
        """Return the dimensions of the vectors before any are left out.

        Args:
            pooled: dimensions of a pooled vector, the width of the encoder.
        """
        return self.dense[-1].width if self.dense else pooled


def dense_layers(dense: Sequence[DenseConfig], pooled: int) -> nn.Sequential:
    """Return the layers, each followed by its activation, with torch's initial weights.

    Args:
        dense: the layers.
        pooled: dimensions of a pooled vector.
    """
    modules: list[nn.Module] = []
    for layer in dense:
        modules.append(nn.Linear(pooled, layer.width, layer.bias))
        modules.append(nn.Identity() if layer.activation is None else DENSE_ACTIVATIONS[layer.activation]())
        pooled = layer.width
    return nn.Sequential(*modules)


def shortened(vectors: Tensor, dim: int) -> Tensor:
    """Return the first dimensions of unit vectors (B, E) as unit vectors (B, dim)."""
    return vectors if dim >= vectors.shape[1] else unit(vectors[:, :dim])
