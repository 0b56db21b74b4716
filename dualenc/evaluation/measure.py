"""Measurement of a model on several evaluation sets, with a table that keeps what is measured."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dualenc.evaluation.base import Evaluated, ResultKind
from dualenc.evaluation.embed import EmbeddingCache, Track
from dualenc.evaluation.results import origin, with_origin
from dualenc.evaluation.table import ResultTable
from dualenc.report import verdict
from dualenc.utils.errors import DataError


class MeasuredSet(NamedTuple):
    """Result of a model on a set."""

    result: dict[str, Any]
    found: Evaluated | None  # None for a result that was in the table


def measure(
    embedder: Any,
    sets: Sequence[tuple[ResultKind, Any]],
    *,
    table: ResultTable | None = None,
    again: bool = False,
    incomplete: bool = False,
    workers: int = 0,
    track: Callable[[int], Track] = lambda number: iter,
    cache: EmbeddingCache | None = None,
) -> Iterator[MeasuredSet]:
    """Measure a model on sets, one after the other; a table is given each result before the next set begins.

    Args:
        embedder: model, as `ResultKind.load` of the sets' kinds returns it.
        sets: evaluation sets with their kinds.
        table: table that is given the results; what it holds is not measured, but read from it.
        again: measure what the table holds, too; the table keeps its rows.
        incomplete: use the table for incomplete results, too; otherwise they are measured again and not kept.
        workers: see `SetEmbedder`.
        track: function from the number of a set to what wraps its image batches; see `SetEmbedder`.
        cache: see `SetEmbedder`.

    Raises:
        DataError: If a set cannot be measured, or the table cannot be read or written.
    """
    fingerprint = embedder.fingerprint
    for number, (kind, data) in enumerate(sets):
        described = origin(kind, data, embedder.name, fingerprint, embedder.precision)
        known = None if table is None or again else table.find(described)
        if known is not None and (known["complete"] or incomplete):
            # The names of this command are shown, under which the user looks for the result.
            known |= {"model": embedder.name, "precision": embedder.precision}
            known |= {"dataset": data.name, "verdict": verdict(known, kind.description)}
            known |= {"prompts": data.prompts} if "prompts" in described["settings"] else {}
            yield MeasuredSet(known, None)
            continue
        try:
            found = kind.evaluate(embedder, data, workers=workers, track=track(number), cache=cache)
        except ValueError as error:
            raise error if isinstance(error, DataError) else DataError(f"{data.name}: {error}") from error
        found = with_origin(found, described)
        result = found.section.result
        if table is not None and (result["complete"] or incomplete):
            table.add(result)
        yield MeasuredSet(result, found)
