"""Towers and the dual encoder: plain torch modules."""

from dualenc.models.dual_encoder import DualConfig, DualEncoder, Embeddings, Projection, embed_pieces, in_pieces
from dualenc.models.heads import HeadConfig, MaskedLanguageHead, TextModel
from dualenc.models.image_encoder import ImageConfig, ImageEncoder
from dualenc.models.text_encoder import TextConfig, TextEncoder

__all__ = [
    "DualConfig",
    "DualEncoder",
    "Embeddings",
    "HeadConfig",
    "ImageConfig",
    "ImageEncoder",
    "MaskedLanguageHead",
    "Projection",
    "TextConfig",
    "TextEncoder",
    "TextModel",
    "embed_pieces",
    "in_pieces",
]
