"""dualenc trains image-text dual encoders and measures them.

Everything here is plain torch; the Lightning modules are in `dualenc.training`.
"""

from importlib.metadata import version

from dualenc.data import BenchmarkSet, DataError, EpochPlan, Preprocess, ShardIndex, Tokenizer
from dualenc.embedder import Embedder, ModelError, load
from dualenc.evaluation import match_ranks, recall_at, zero_shot_classifier
from dualenc.evaluator import evaluate
from dualenc.interop import TextPredictor, load_text
from dualenc.losses import clip_loss, siglip_loss
from dualenc.models import DualEncoder, ImageConfig, TextConfig
from dualenc.tokens import Tokens

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
