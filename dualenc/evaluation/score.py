"""Evaluation of a model on an evaluation set, in one call or in two: embed on all ranks, then score.

The kind of the set selects the `EvaluationKind`.
"""

import os
from typing import Any

from dualenc.data.eval_sets.beir import is_document_folder, open_documents
from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.evaluation.base import Evaluated
from dualenc.evaluation.documents import DocumentRetrieval
from dualenc.evaluation.embed import EmbeddingCache, SetEmbedder, SetEmbeddings, Track
from dualenc.evaluation.kinds import KINDS
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor
from dualenc.inference.text_tower import TextTower
from dualenc.report.formatting import number
from dualenc.utils.arguments import shown_value
from dualenc.utils.progress import progress as progress_bar
from dualenc.utils.text import printable


class EvaluationResult(dict[str, Any]):
    """Result of `evaluate`: a dictionary, ready for JSON, which is shown as a table of its metrics."""

    def __repr__(self) -> str:
        head = f"{printable(self['dataset'])}: {self['kind']} of {self['n']:,} by {printable(self['model'])}"
        width = max((len(name) for name in self["metrics"]), default=0)
        lines = [head if self["complete"] else f"{head}, incomplete"]
        for name, value in self["metrics"].items():
            bounds, chance = self["intervals"].get(name), self["chance"].get(name)
            about = [f"95% interval {number(bounds[0])} to {number(bounds[1])}"] if bounds else []
            about += [f"chance {number(chance)}"] if chance is not None else []
            lines.append(f"  {name:{width}}  {number(value)}" + (f"  ({', '.join(about)})" if about else ""))
        lines += [f"  {printable(problem['what'])}: {problem['count']:,}" for problem in self["problems"]]
        return "\n".join(lines)


def evaluate(
    embedder: Embedder | TextPredictor,
    data: BenchmarkSet | str | os.PathLike[str],
    workers: int = 0,
    *,
    progress: bool = False,
) -> EvaluationResult:
    """Embed and score an evaluation set: zero-shot classification, retrieval or compositional choice, by its kind.

    Args:
        embedder: model; for documents also a text model.
        data: evaluation set, or anything that `BenchmarkSet.open` takes; or a folder of documents, see
            `dualenc.data.eval_sets.beir.open_documents`.
        workers: number of worker processes that decode images.
        progress: show a progress bar, on a terminal or in a notebook.

    Returns:
        A dictionary of plain Python, ready for JSON, which is printed as a table of the metrics: `dataset`, `kind`,
        `model`, `n` (number of images), `complete` (false if the set has problems), `problems` (`what`, `count` and
        some `names` for each problem), `metrics` (name to value), `intervals` (name to lower and upper 95% bound),
        `chance` (expected values of a random order, where they are known), `verdict` (a sentence, empty
        where the intervals tell nothing); for classes also `per_class` and `calibration`.

    Raises:
        DataError: If nothing can be measured.
        ValueError: If `embedder` is not one.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> import dualenc
        >>> tokenizer = dualenc.Tokenizer.train(["a cat", "a dog"], vocab_size=40, context_length=8)
        >>> image = dualenc.ImageConfig(
        ...     "vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
        ... )
        >>> text = dualenc.TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=8)
        >>> model = dualenc.DualEncoder(image, text, embed_dim=8)
        >>> embedder = dualenc.Embedder(model.eval(), tokenizer, dualenc.Preprocess(32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for color in ("red", "blue"):
        ...         (Path(folder) / color).mkdir()
        ...         Image.new("RGB", (40, 40), color).save(f"{folder}/{color}/1.png")
        ...     result = dualenc.evaluate(embedder, folder)
        >>> result["kind"], result["n"], sorted(result["metrics"])
        ('classification', 2, ['acc1', 'ece', 'mean_per_class_recall'])
    """
    if isinstance(data, str | os.PathLike) and is_document_folder(data):
        tower, documents = TextTower(embedder), open_documents(data)
        track = progress_bar(documents.name, stderr=True) if progress else iter
        return EvaluationResult(DocumentRetrieval().evaluate(tower, documents, track=track).section.result)
    if not isinstance(embedder, Embedder):
        raise ValueError(f"the model is {shown_value(embedder)}: pass an Embedder, such as dualenc.load(SPEC)")
    data = data if isinstance(data, BenchmarkSet) else BenchmarkSet.open(data)
    track = progress_bar(data.name, stderr=True) if progress else iter
    return EvaluationResult(KINDS[data.kind].evaluate(embedder, data, workers=workers, track=track).section.result)


def embed_set(
    embedder: Embedder,
    data: BenchmarkSet,
    workers: int = 0,
    track: Track = iter,
    cache: EmbeddingCache | None = None,
    rank: int = 0,
    world: int = 1,
) -> SetEmbeddings:
    """Embed an evaluation set, or the share of one rank. `score` takes the gathered shares.

    Args:
        embedder: model.
        data: evaluation set.
        workers: number of worker processes that decode images.
        track: wraps the image batches, for a progress bar.
        cache: cache of the embeddings of whole sets.
        rank: number of the share, from 0.
        world: number of shares, which are consecutive and as equal as possible.
    """
    return KINDS[data.kind].embed(data, SetEmbedder(embedder, workers, track, cache, rank, world))


def score(data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Evaluated:
    """Score the embeddings of a whole evaluation set.

    Args:
        data: evaluation set.
        embedded: its embeddings.
        embedder: model.

    Returns:
        The section of the report, with the dictionary that `evaluate` returns as `result`, and the outcomes of single
        items.

    Raises:
        ValueError: If nothing is left to measure, or the embeddings are not finite.
    """
    return KINDS[data.kind].evaluated(data, embedded, embedder)
