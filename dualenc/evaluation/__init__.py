"""Arrays in, numbers out."""

from dualenc.evaluation.retrieval import (
    Answer,
    Scores,
    match_ranks,
    recall_at,
    retrieval_answers,
    retrieval_metrics,
    retrieval_ranks,
)
from dualenc.evaluation.zeroshot import (
    average_precision,
    classification_metrics,
    multilabel_metrics,
    per_class,
    predictions,
    zero_shot_classifier,
)

__all__ = [
    "Answer",
    "Scores",
    "average_precision",
    "classification_metrics",
    "match_ranks",
    "multilabel_metrics",
    "per_class",
    "predictions",
    "recall_at",
    "retrieval_answers",
    "retrieval_metrics",
    "retrieval_ranks",
    "zero_shot_classifier",
]
