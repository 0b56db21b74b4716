"""Data sets: shards, evaluation sets, and the loading of batches. It needs torch, but not a trainer."""

from typing import TYPE_CHECKING

from dualenc.utils.lazy import lazy_names

if TYPE_CHECKING:
    from dualenc.data.eval_sets.base import SetOptions
    from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
    from dualenc.data.images import Augment, ImageError, Preprocess, decode_image
    from dualenc.data.loading.bad_samples import BadSampleLog
    from dualenc.data.loading.epoch_plan import EpochPlan
    from dualenc.data.loading.loader import Loader
    from dualenc.data.pairs import PairDataset, Pairs
    from dualenc.data.shards.index import ShardIndex
    from dualenc.data.shards.remote import Cache
    from dualenc.data.text.tokenizer import Tokenizer

__all__ = [
    "Augment",
    "BadSampleLog",
    "BenchmarkSet",
    "Cache",
    "EpochPlan",
    "ImageError",
    "Loader",
    "PairDataset",
    "Pairs",
    "Preprocess",
    "SetOptions",
    "ShardIndex",
    "Tokenizer",
    "decode_image",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Augment": "images",
        "BenchmarkSet": "eval_sets.clip_benchmark",
        "Cache": "shards.remote",
        "EpochPlan": "loading.epoch_plan",
        "ImageError": "images",
        "Loader": "loading.loader",
        "PairDataset": "pairs",
        "Pairs": "pairs",
        "Preprocess": "images",
        "BadSampleLog": "loading.bad_samples",
        "SetOptions": "eval_sets.base",
        "ShardIndex": "shards.index",
        "Tokenizer": "text.tokenizer",
        "decode_image": "images",
    },
)
