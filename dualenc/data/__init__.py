"""Shards in, batches out: plain torch, no trainer."""

from dualenc.data.benchmarks import BenchmarkSet
from dualenc.data.images import Augment, ImageError, Preprocess, decode_image
from dualenc.data.pairs import PairDataset, PairLoader, Pairs
from dualenc.data.plan import EpochPlan
from dualenc.data.shards import DataError, ShardIndex
from dualenc.data.tokenizer import Tokenizer

__all__ = [
    "Augment",
    "BenchmarkSet",
    "DataError",
    "EpochPlan",
    "ImageError",
    "PairDataset",
    "PairLoader",
    "Pairs",
    "Preprocess",
    "ShardIndex",
    "Tokenizer",
    "decode_image",
]
