"""One evaluator, in training and offline: a model and an evaluation set in, figures with intervals out."""

from dualenc.evaluation.embed import EmbeddingCache, SetEmbeddings, embed_set
from dualenc.evaluation.results import compare, write_results
from dualenc.evaluation.score import Evaluated, evaluate, measures, probe, score, score_retrieval, score_within

__all__ = [
    "EmbeddingCache",
    "Evaluated",
    "SetEmbeddings",
    "compare",
    "embed_set",
    "evaluate",
    "measures",
    "probe",
    "score",
    "score_retrieval",
    "score_within",
    "write_results",
]
