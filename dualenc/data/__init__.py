"""Shards in, batches out: plain torch, no trainer."""

from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.data.images import Augment, ImageError, Preprocess, decode_image
from dualenc.data.loading.bad_samples import Quarantine
from dualenc.data.loading.epoch_plan import EpochPlan
from dualenc.data.loading.loader import Loader
from dualenc.data.pairs import PairDataset, Pairs
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.remote import Cache
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.utils.errors import BadSample, DataError

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
