"""The commands that evaluate: plain functions, which `dualenc.cli.parser` parses from their signatures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from dualenc.cli.common import UsageError, WorkError, command_line, make_folder, progress, writing

_TITLES = {
    "zeroshot": "Zero-shot classification",
    "retrieval": "Retrieval",
    "choice": "Compositional choice",
    "probe": "Probes on frozen embeddings",
}
_COMMANDS = {"retrieval": "retrieval", "choice": "choice", "classification": "zeroshot", "multilabel": "zeroshot"}
_HELD = ("val", "valid", "validation")  # splits to choose by


def zeroshot(
    model: str,
    data: list[str],
    split: str | None = None,
    out: Path | None = None,
    workers: int = 2,
    allow_partial: bool = False,
) -> None:
    """Zero-shot classification on evaluation sets.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED.
        data: folders or URLs in the layout of CLIP_benchmark, or folders with a folder of images for each class.
        split: absent, "test" or the only split there is.
        out: folder for zeroshot.json and report.html.
        workers: processes that decode.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    _evaluate("zeroshot", ("classification", "multilabel"), model, data, split, out, workers, allow_partial)


def retrieval(
    model: str,
    data: list[str],
    split: str | None = None,
    between: Literal["image-text", "text-text", "image-image"] = "image-text",
    out: Path | None = None,
    workers: int = 2,
    allow_partial: bool = False,
) -> None:
    """Retrieval on evaluation sets, between images and captions or among things of one kind.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED.
        data: folders or URLs in the layout of CLIP_benchmark, or tables of images and captions.
        split: absent, "test" or the only split there is.
        between: text-text looks for the other captions of a caption's image, image-image, on sets for classification,
            for the other images of an image's class.
        out: folder for retrieval.json and report.html.
        workers: processes that decode.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc.evaluation import embed_set, score_within

    def within(embedder: Any, item: Any, **how: Any) -> Any:
        return score_within(item, embed_set(embedder, item, **how), embedder, between)

    kinds = ("classification",) if between == "image-image" else ("retrieval",)
    measure = None if between == "image-text" else within
    name = "retrieval" if between == "image-text" else f"retrieval-{between}"
    _evaluate(name, kinds, model, data, split, out, workers, allow_partial, measure)


def choice(
    model: str,
    data: list[str],
    out: Path | None = None,
    workers: int = 2,
    allow_partial: bool = False,
) -> None:
    """Compositional choice between captions, and images, that differ in little: Winoground, SugarCrepe.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED.
        data: folders in the layout of Winoground (examples.jsonl, images/), or SugarCrepe's .json files.
        out: folder for choice.json and report.html.
        workers: processes that decode.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    _evaluate("choice", ("choice",), model, data, None, out, workers, allow_partial)


def probe(
    model: str,
    data: list[str],
    train: str = "train",
    split: str | None = None,
    out: Path | None = None,
    workers: int = 2,
    allow_partial: bool = False,
) -> None:
    """Linear and nearest-neighbor classification on frozen image embeddings.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED.
        data: folders or URLs in the layout of CLIP_benchmark, with a split to learn from.
        train: the split to learn from; what is to be chosen is chosen on "val" or "valid", or else on a fifth of it.
        split: absent, "test".
        out: folder for probe.json and report.html.
        workers: processes that decode.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc import BenchmarkSet
    from dualenc.evaluation import probe

    learnt = {}
    for place in data:
        item, splits = BenchmarkSet.open(place, split), BenchmarkSet.splits(place)
        if item.kind != "classification":
            continue  # refused below
        if train == item.split:
            raise UsageError(f"{item.path}: --train {train} is the split that is measured; it has {', '.join(splits)}")
        held = next((name for name in _HELD if name in splits and name not in (train, item.split)), None)
        learnt[item.path] = [BenchmarkSet.open(place, train), held and BenchmarkSet.open(place, held)]

    def measure(embedder: Any, item: Any, **how: Any) -> Any:
        return probe(embedder, item, *learnt[item.path], **how)

    _evaluate("probe", ("classification",), model, data, split, out, workers, allow_partial, measure)


def compare(first: Path, second: Path, out: Path | None = None) -> None:
    """Compares two results on the same items: paired differences with intervals.

    Args:
        first: folder that --out of an evaluation named.
        second: another one, of another model or other prompts.
        out: folder for compare.json and report.html.
    """
    from dualenc.evaluation import compare
    from dualenc.report import print_comparison, write_comparison
    from dualenc.utils.files import write_json

    if out is not None:
        make_folder(out, "--out")
    comparisons = compare(first, second)
    results = [comparison.result for comparison in comparisons]
    print_comparison(results)
    if out is not None:
        about = {"results of A": first, "results of B": second}
        with writing(out):
            write_json(out / "compare.json", results)
            print(f"report: {write_comparison(out, 'Comparison', comparisons, about)}")


def _evaluate(
    command: str,
    kinds: Sequence[str],
    model: str,
    data: list[str],
    split: str | None,
    out: Path | None,
    workers: int,
    allow_partial: bool,
    measure: Callable[..., Any] | None = None,
) -> None:
    """Measures a model on sets of some kinds, by default by all that is usual for the kind."""
    from dualenc import DataError, load
    from dualenc.evaluation import EmbeddingCache, embed_set, score, write_results
    from dualenc.report import print_table, write_report
    from dualenc.utils.urls import redact

    sets = _open_sets(command, kinds, data, split)
    if workers < 0:
        raise UsageError(f"--workers {workers} must not be negative")
    if out is not None:
        make_folder(out, "--out")
    embedder = load(model)
    cache = EmbeddingCache(embedder)
    found = []
    for item in sets:
        how = {"workers": workers, "track": progress(item.name), "cache": cache}
        try:
            if measure is None:
                found.append(score(item, embed_set(embedder, item, **how), embedder))
            else:
                found.append(measure(embedder, item, **how))
        except ValueError as error:
            raise WorkError(error if isinstance(error, DataError) else f"{item.name}: {error}") from error
    results = [one.section.result for one in found]
    print_table(results)
    if cache.reused:
        again = ", ".join(f"{cache.reused.count(what)} x {what}" for what in dict.fromkeys(cache.reused))
        print(f"used again from {cache.folder}: {again}")
    if out is not None:
        with writing(out):
            write_results(out, command, found, sets, embedder.fingerprint)
            about = {"data": " ".join(map(redact, data)), "command": command_line()}
            page = write_report(out, _TITLES[command.partition("-")[0]], [one.section for one in found], about)
        print(f"report: {page}")
    if not allow_partial and not all(result["complete"] for result in results):
        name, problem = next((result["dataset"], result["problems"][0]) for result in results if result["problems"])
        raise WorkError(
            f"{name} is not complete: {problem['what']}: {problem['count']}, such as {problem['names'][0]}; "
            "with --allow-partial this is no failure"
        )


def _open_sets(command: str, kinds: Sequence[str], data: list[str], split: str | None) -> list[Any]:
    """Open evaluation sets, which must be of the right kind and have names of their own."""
    from dualenc import BenchmarkSet, DataError

    sets = [BenchmarkSet.open(place, split) for place in data]
    for item in sets:
        if item.kind not in kinds:
            other, here = _COMMANDS[item.kind], command.partition("-")[0]
            way_out = f"use `dualenc {other}`" if other != here else f"another kind is wanted: {', '.join(kinds)}"
            raise DataError(f"{item.path} is a {item.kind} set: {way_out}")
    names = [item.name for item in sets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"two sets are called {twice.pop()!r}: their figures would be mixed up")
    return sets
