"""Towers and the dual encoder: plain torch modules."""

from dualenc.models.dual import DualConfig, DualEncoder, Embeddings, embed_pieces, in_pieces
from dualenc.models.heads import MaskedLanguageHead
from dualenc.models.image import ImageConfig, ImageEncoder
from dualenc.models.text import TextConfig, TextEncoder

__all__ = [
    "DualConfig",
    "DualEncoder",
    "Embeddings",
    "ImageConfig",
    "ImageEncoder",
    "MaskedLanguageHead",
    "TextConfig",
    "TextEncoder",
    "embed_pieces",
    "in_pieces",
]
