"""Training, evaluation and use of image-text dual encoders, and of text encoders with heads.

These names need plain torch only; the Lightning modules are in `dualenc.training`. A name is imported at its first use,
so that `import dualenc` is fast.
"""

from dualenc.utils.lazy import lazy_names

TYPE_CHECKING = False  # type checkers take it as true; the module `typing` takes a while to load
if TYPE_CHECKING:
    from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
    from dualenc.data.images import Preprocess
    from dualenc.data.loading.epoch_plan import EpochPlan
    from dualenc.data.shards.index import ShardIndex
    from dualenc.data.text.tokenizer import Tokenizer
    from dualenc.evaluation.score import evaluate
    from dualenc.inference.embed_shards import embed_shards
    from dualenc.inference.embedder import Embedder, load
    from dualenc.inference.text_model import TextPredictor, load_text
    from dualenc.losses import clip_loss, siglip_loss
    from dualenc.metrics.classification import zero_shot_classifier
    from dualenc.metrics.ranking import match_ranks
    from dualenc.metrics.retrieval import recall_at
    from dualenc.models.dual_encoder import DualEncoder
    from dualenc.models.image_encoder import ImageConfig
    from dualenc.models.text_encoder import TextConfig
    from dualenc.search.index import Index
    from dualenc.tokens import Tokens
    from dualenc.utils.errors import DataError, ModelError

__all__ = [
    "BenchmarkSet",
    "DataError",
    "DualEncoder",
    "Embedder",
    "EpochPlan",
    "ImageConfig",
    "Index",
    "ModelError",
    "Preprocess",
    "ShardIndex",
    "TextConfig",
    "TextPredictor",
    "Tokenizer",
    "Tokens",
    "clip_loss",
    "embed_shards",
    "evaluate",
    "load",
    "load_text",
    "match_ranks",
    "recall_at",
    "siglip_loss",
    "zero_shot_classifier",
]

_named, __dir__ = lazy_names(
    __name__,
    {
        "BenchmarkSet": "data.eval_sets.clip_benchmark",
        "DataError": "utils.errors",
        "DualEncoder": "models.dual_encoder",
        "Embedder": "inference.embedder",
        "EpochPlan": "data.loading.epoch_plan",
        "ImageConfig": "models.image_encoder",
        "Index": "search.index",
        "ModelError": "utils.errors",
        "Preprocess": "data.images",
        "ShardIndex": "data.shards.index",
        "TextConfig": "models.text_encoder",
        "TextPredictor": "inference.text_model",
        "Tokenizer": "data.text.tokenizer",
        "Tokens": "tokens",
        "clip_loss": "losses",
        "embed_shards": "inference.embed_shards",
        "evaluate": "evaluation.score",
        "load": "inference.embedder",
        "load_text": "inference.text_model",
        "match_ranks": "metrics.ranking",
        "recall_at": "metrics.retrieval",
        "siglip_loss": "losses",
        "zero_shot_classifier": "metrics.classification",
    },
)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("dualenc")
    return _named(name)
