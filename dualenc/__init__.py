"""dualenc trains image-text dual encoders and measures them.

Everything here is plain torch; the Lightning modules are in `dualenc.training`.
"""

from importlib.metadata import version

from dualenc.data import BenchmarkSet, DataError, EpochPlan, Preprocess, ShardIndex, Tokenizer
from dualenc.evaluation import evaluate
from dualenc.inference.embedder import Embedder, load
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.losses import clip_loss, siglip_loss
from dualenc.metrics import match_ranks, recall_at, zero_shot_classifier
from dualenc.models import DualEncoder, ImageConfig, TextConfig
from dualenc.tokens import Tokens
from dualenc.utils.errors import ModelError

__version__ = version("dualenc")

__all__ = [
    "BenchmarkSet",
    "DataError",
    "DualEncoder",
    "Embedder",
    "EpochPlan",
    "ImageConfig",
    "ModelError",
    "Preprocess",
    "ShardIndex",
    "TextConfig",
    "TextPredictor",
    "Tokenizer",
    "Tokens",
    "clip_loss",
    "evaluate",
    "load",
    "load_text",
    "match_ranks",
    "recall_at",
    "siglip_loss",
    "zero_shot_classifier",
]
