"""Towers and the dual encoder: plain torch modules."""

from dualenc.models.dual import DualConfig, DualEncoder, Embeddings
from dualenc.models.image import ImageConfig, ImageEncoder
from dualenc.models.text import TextConfig, TextEncoder

__all__ = ["DualConfig", "DualEncoder", "Embeddings", "ImageConfig", "ImageEncoder", "TextConfig", "TextEncoder"]
