"""Engines: what the service asks of a model, whichever library runs it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

Scores = list[tuple[str, float]]


class Engine(ABC):
    """A model that embeds texts, and pictures if it has an image tower. One thread calls it, except `prepare`.

    Attributes:
        name: name of the model in answers.
        fingerprint: fingerprint of the model.
        dims: dimensions of its embeddings.
        images: whether it has an image tower.
        scale: factor from cosines to logits; None for a text model.
        bias: what is added to the logits, for a model whose scores are sigmoids; None for the softmax.
        labels: labels of its classification head; empty if it has none, or several heads.
    """

    name: str
    fingerprint: str
    dims: int
    images: bool
    scale: float | None = None
    bias: float | None = None
    labels: tuple[str, ...] = ()

    @abstractmethod
    def prepare(self, data: bytes) -> Any:
        """Decode the file of a picture to the pixels that the model takes. Several threads call it.

        Raises:
            ImageError: If the picture cannot be decoded, or must not be.
        """

    @abstractmethod
    def embed_pictures(self, pictures: Sequence[Any]) -> np.ndarray:
        """Embed N pictures of `prepare` as (N, E) float32 of unit length."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str], prompt: str | None = None) -> np.ndarray:
        """Embed N texts as (N, E) float32 of unit length.

        Args:
            texts: N texts.
            prompt: text to put before each of them; None for the model's default.
        """

    @abstractmethod
    def count_tokens(self, texts: Sequence[str]) -> int:
        """Return how many tokens the model reads of texts."""

    @abstractmethod
    def label(self, texts: Sequence[str]) -> list[Scores]:
        """Return the score of each label of the classification head, for each text."""

    def probabilities(self, cosines: np.ndarray) -> np.ndarray:
        """Return the scores (N, C) of classes for pictures, as `Embedder.classify` does, from their cosines."""
        assert self.scale is not None
        logits = cosines.astype(np.float32) * np.float32(self.scale)
        if self.bias is not None:
            return 1 / (1 + np.exp(-(logits + np.float32(self.bias))))
        return softmax(logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of logits (N, C) over the classes."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Return rows (N, E) at unit length; a row of zeros stays."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
