"""Evaluation of a model on evaluation sets, in training and offline: metrics with intervals."""

from dualenc.evaluation.base import Evaluated, EvaluationKind, SavedResult, Scored, image_ids, text_ids
from dualenc.evaluation.embed import EmbeddingCache, SetEmbedder, SetEmbeddings
from dualenc.evaluation.kinds import KINDS, find_kind, kinds_of_command, open_sets
from dualenc.evaluation.results import check_out, compare, origin, place, with_origin, write_results
from dualenc.evaluation.retrieval import score_retrieval
from dualenc.evaluation.score import embed_set, evaluate, score
from dualenc.evaluation.table import ResultTable

__all__ = [
    "KINDS",
    "EmbeddingCache",
    "Evaluated",
    "EvaluationKind",
    "ResultTable",
    "SavedResult",
    "Scored",
    "SetEmbedder",
    "SetEmbeddings",
    "check_out",
    "compare",
    "embed_set",
    "evaluate",
    "find_kind",
    "image_ids",
    "kinds_of_command",
    "open_sets",
    "origin",
    "place",
    "score",
    "score_retrieval",
    "text_ids",
    "with_origin",
    "write_results",
]
