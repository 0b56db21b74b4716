"""Metrics: functions from arrays to numbers."""

from dualenc.metrics.bootstrap import BootstrapMetrics
from dualenc.metrics.choice import choice_bootstrap, choice_metrics
from dualenc.metrics.classification import (
    average_precision,
    calibration,
    classification_bootstrap,
    classification_metrics,
    multilabel_bootstrap,
    multilabel_metrics,
    per_class,
    zero_shot_classifier,
)
from dualenc.metrics.clusters import cluster_bootstrap, k_means
from dualenc.metrics.documents import (
    Found,
    Judgments,
    document_bootstrap,
    document_chance,
    document_items,
    find_documents,
    reranked,
)
from dualenc.metrics.entities import TypeScores, entity_bootstrap, entity_metrics, outside_baseline, type_scores
from dualenc.metrics.probe import Probe, knn_probe, linear_probe
from dualenc.metrics.ranking import match_ranks, nearest
from dualenc.metrics.retrieval import (
    Answer,
    Scores,
    group_bootstrap,
    group_metrics,
    recall_at,
    retrieval_answers,
    retrieval_bootstrap,
    retrieval_metrics,
    retrieval_ranks,
)
from dualenc.metrics.text import (
    label_bootstrap,
    label_metrics,
    majority_baseline,
    mean_baseline,
    perplexity,
    pseudo_perplexity,
    replaced_metrics,
    unigram_perplexity,
)

__all__ = [
    "Answer",
    "BootstrapMetrics",
    "Found",
    "Judgments",
    "Probe",
    "Scores",
    "TypeScores",
    "average_precision",
    "calibration",
    "choice_bootstrap",
    "choice_metrics",
    "classification_bootstrap",
    "classification_metrics",
    "cluster_bootstrap",
    "document_bootstrap",
    "document_chance",
    "document_items",
    "entity_bootstrap",
    "entity_metrics",
    "find_documents",
    "group_bootstrap",
    "group_metrics",
    "k_means",
    "knn_probe",
    "label_bootstrap",
    "label_metrics",
    "linear_probe",
    "majority_baseline",
    "match_ranks",
    "mean_baseline",
    "multilabel_bootstrap",
    "multilabel_metrics",
    "nearest",
    "outside_baseline",
    "per_class",
    "perplexity",
    "pseudo_perplexity",
    "recall_at",
    "replaced_metrics",
    "reranked",
    "retrieval_answers",
    "retrieval_bootstrap",
    "retrieval_metrics",
    "retrieval_ranks",
    "type_scores",
    "unigram_perplexity",
    "zero_shot_classifier",
]
