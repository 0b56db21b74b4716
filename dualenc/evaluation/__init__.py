"""Arrays in, numbers out."""

from dualenc.evaluation.retrieval import match_ranks, recall_at, retrieval_metrics, retrieval_ranks
from dualenc.evaluation.zeroshot import classification_metrics, multilabel_metrics, zero_shot_classifier

__all__ = [
    "classification_metrics",
    "match_ranks",
    "multilabel_metrics",
    "recall_at",
    "retrieval_metrics",
    "retrieval_ranks",
    "zero_shot_classifier",
]
