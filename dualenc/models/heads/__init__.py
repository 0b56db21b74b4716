"""Heads of a text encoder, one file a kind; the table `HEADS` lists the kinds."""

from dualenc.models.heads.base import (
    HEADS,
    Examples,
    Head,
    HeadConfig,
    HeldOut,
    Measured,
    head_class,
    import_head,
    make_head,
)
from dualenc.models.heads.classification import Classification, ClassificationHead, Pooler
from dualenc.models.heads.embedding import Embedding
from dualenc.models.heads.masked_language import MaskedLanguage, MaskedLanguageHead
from dualenc.models.heads.question_answering import QuestionAnswering
from dualenc.models.heads.replaced_token import ReplacedToken, ReplacedTokenHead
from dualenc.models.heads.text_model import LoadedHeads, TextModel
from dualenc.models.heads.token_classification import TokenClassification

HEADS.update(
    {
        "mlm": MaskedLanguage,
        "rtd": ReplacedToken,
        "classification": Classification,
        "token_classification": TokenClassification,
        "embedding": Embedding,
        "question_answering": QuestionAnswering,
        "pooler": Pooler,
    }
)

__all__ = [
    "HEADS",
    "Classification",
    "ClassificationHead",
    "Embedding",
    "Examples",
    "Head",
    "HeadConfig",
    "HeldOut",
    "LoadedHeads",
    "MaskedLanguage",
    "MaskedLanguageHead",
    "Measured",
    "Pooler",
    "QuestionAnswering",
    "ReplacedToken",
    "ReplacedTokenHead",
    "TextModel",
    "TokenClassification",
    "head_class",
    "import_head",
    "make_head",
]
