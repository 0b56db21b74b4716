"""Evaluation of a model on evaluation sets, in training and offline: metrics with intervals."""

from dualenc.evaluation.base import Evaluated, EvaluationKind, ResultKind, SavedResult, Scored, image_ids, text_ids
from dualenc.evaluation.documents import DocumentOptions, DocumentRetrieval
from dualenc.evaluation.embed import EmbeddingCache, SetEmbedder, SetEmbeddings
from dualenc.evaluation.kinds import KINDS, RESULT_KINDS, find_kind, kinds_of_command, open_sets
from dualenc.evaluation.results import check_out, compare, origin, place, with_origin, write_results
from dualenc.evaluation.retrieval import score_retrieval
from dualenc.evaluation.score import embed_set, evaluate, score
from dualenc.evaluation.table import ResultTable
from dualenc.evaluation.text_probe import TextProbe

__all__ = [
    "KINDS",
    "RESULT_KINDS",
    "DocumentOptions",
    "DocumentRetrieval",
    "EmbeddingCache",
    "Evaluated",
    "EvaluationKind",
    "ResultKind",
    "ResultTable",
    "SavedResult",
    "Scored",
    "SetEmbedder",
    "SetEmbeddings",
    "TextProbe",
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
