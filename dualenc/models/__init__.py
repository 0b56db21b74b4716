"""The towers, the dual encoder and the heads: plain torch modules."""

from dualenc.models.dual_encoder import (
    DualConfig,
    DualEncoder,
    Embeddings,
    Projection,
    embed_micro_batches,
    map_micro_batches,
)
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
    "embed_micro_batches",
    "map_micro_batches",
]
