"""Shards in, batches out: plain torch, no trainer."""

from dualenc.data.benchmarks import BenchmarkSet
from dualenc.data.errors import BadSample, DataError
from dualenc.data.images import Augment, ImageError, Preprocess, decode_image
from dualenc.data.loader import Loader
from dualenc.data.pairs import PairDataset, Pairs
from dualenc.data.plan import EpochPlan
from dualenc.data.quarantine import Quarantine
from dualenc.data.shards import ShardIndex
from dualenc.data.storage import Cache
from dualenc.data.tokenizer import Tokenizer

__all__ = [
    "Augment",
    "BadSample",
    "BenchmarkSet",
    "Cache",
    "DataError",
    "EpochPlan",
    "ImageError",
    "Loader",
    "PairDataset",
    "Pairs",
    "Preprocess",
    "Quarantine",
    "ShardIndex",
    "Tokenizer",
    "decode_image",
]
