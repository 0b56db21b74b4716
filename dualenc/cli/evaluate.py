"""Commands that evaluate: plain functions, which `dualenc.cli.parser` parses from their signatures."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dualenc.cli.common import UsageError, WorkError, command_line, make_folder, writing
from dualenc.utils.arguments import Precision
from dualenc.utils.progress import progress
from dualenc.utils.text import plural, print_message, printable
from dualenc.utils.urls import redact

if TYPE_CHECKING:
    from dualenc.evaluation import Evaluated, ResultKind
    from dualenc.evaluation.measure import MeasuredSet


def evaluate(
    model: str,
    data: list[str],
    kind: str | None = None,
    split: str | None = None,
    captions: str = "auto",
    classnames: str | None = None,
    templates: str | None = None,
    images: str | None = None,
    image: str | None = None,
    out: Path | None = None,
    workers: int = 2,
    precision: Precision = "fp32",
    models: tuple[str, ...] = (),
    csv: Path | None = None,
    allow_partial: bool = False,
) -> None:
    """Measure a model on evaluation sets of any kind, or by an evaluation kind of your own.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED; for documents
            also a text model.
        data: evaluation sets: folders, plain shards, tables, URLs, names of `dualenc sets`; or folders of documents.
        kind: name of an evaluation kind, such as text-text, or import path of your own subclass of
            dualenc.evaluation.EvaluationKind; by default the kind of each set.
        split: split to measure on; by default "test", or the only split there is.
        captions: captions of plain shards: txt, json.FIELD, or a member such as long.txt; auto, the field captions
            of .json, else .txt, else the field caption.
        classnames: file of class names, one on each line in the order of the classes; by default those of the set.
        templates: file of templates, one on each line with {c} for the class name; or openai for CLIP's 80 of ImageNet,
            simple for 7 of them; by default those of the set.
        images: folder that the image paths of caption tables are relative to; by default found next to the table.
        image: member that holds the image in plain shards, such as input.jpg; by default .jpg, .jpeg, .png or .webp.
        out: folder for evaluate.json and report.html.
        workers: number of worker processes that decode images.
        precision: bf16 to compute the towers in it, which is faster; embeddings are fp32 in the end.
        models: further models, measured on the same sets.
        csv: table that is given each result once it is measured; what it has already is not measured again.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc.cli.evaluate_texts import open_documents
    from dualenc.data import SetOptions
    from dualenc.evaluation import find_kind, open_sets

    kinds = None if kind is None else [find_kind(kind)]
    options = SetOptions(captions=captions, classnames=classnames, templates=templates, images=images, image=image)
    sets: Any = open_documents(data, split, options.given() | ({} if kind is None else {"kind": kind}))
    sets = sets or open_sets(data, kinds, split, options)
    _evaluate("evaluate", sets, model, data, out, workers, precision, models, csv, allow_partial)


def zeroshot(
    model: str,
    data: list[str],
    split: str | None = None,
    classnames: str | None = None,
    templates: str | None = None,
    image: str | None = None,
    out: Path | None = None,
    workers: int = 2,
    precision: Precision = "fp32",
    models: tuple[str, ...] = (),
    csv: Path | None = None,
    allow_partial: bool = False,
) -> None:
    """Measure zero-shot classification on evaluation sets.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED.
        data: folders or URLs in the layout of CLIP_benchmark, names of `dualenc sets`, plain shards with .cls, or
            folders with a folder of images for each class.
        split: split to measure on; by default "test", or the only split there is.
        classnames: file of class names, one on each line in the order of the classes; by default those of the set.
        templates: file of templates, one on each line with {c} for the class name; or openai for CLIP's 80 of ImageNet,
            simple for 7 of them; by default those of the set.
        image: member that holds the image in plain shards, such as input.jpg; by default .jpg, .jpeg, .png or .webp.
        out: folder for zeroshot.json and report.html.
        workers: number of worker processes that decode images.
        precision: bf16 to compute the towers in it, which is faster; embeddings are fp32 in the end.
        models: further models, measured on the same sets.
        csv: table that is given each result once it is measured; what it has already is not measured again.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc.data import SetOptions
    from dualenc.evaluation import kinds_of_command, open_sets

    options = SetOptions(classnames=classnames, templates=templates, image=image)
    sets = open_sets(data, kinds_of_command("zeroshot"), split, options)
    _evaluate("zeroshot", sets, model, data, out, workers, precision, models, csv, allow_partial)


def retrieval(
    model: str,
    data: list[str],
    split: str | None = None,
    captions: str = "auto",
    images: str | None = None,
    image: str | None = None,
    between: Literal["image-text", "text-text", "image-image"] = "image-text",
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    dim: int | None = None,
    ignore_identical_ids: bool = False,
    max_passage: int | None = None,
    stride: int = 0,
    rerank: str | None = None,
    rerank_top: int = 100,
    out: Path | None = None,
    workers: int = 2,
    precision: Precision = "fp32",
    models: tuple[str, ...] = (),
    csv: Path | None = None,
    allow_partial: bool = False,
) -> None:
    """Measure retrieval on evaluation sets, between images and captions or within one of them, or of documents.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED; for documents
            also a text model.
        data: folders or URLs in the layout of CLIP_benchmark, names of `dualenc sets`, plain shards with captions,
            tables of images and captions; or folders of documents with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv.
        split: split to measure on; by default "test", or the only split there is.
        captions: captions of plain shards: txt, json.FIELD, or a member such as long.txt; auto, the field captions
            of .json, else .txt, else the field caption.
        images: folder that the image paths of caption tables are relative to; by default found next to the table.
        image: member that holds the image in plain shards, such as input.jpg; by default .jpg, .jpeg, .png or .webp.
        between: text-text looks for the other captions of a caption's image; image-image, on sets for classification,
            for the other images of an image's class.
        query_prompt: for documents: text before each query, or a name of the model's prompts; by default its own.
        document_prompt: for documents: the same for each of them.
        dim: for documents: number of dimensions to keep, the first ones.
        ignore_identical_ids: for documents: leave out the one that has the query's id.
        max_passage: for documents: cut longer ones into passages of this many tokens, of which the best one counts.
        stride: tokens that a passage has in common with the one before.
        rerank: for documents: text model with a classification head for pairs, which sorts the first ones again.
        rerank_top: number of documents that it sorts.
        out: folder for retrieval.json and report.html.
        workers: number of worker processes that decode images.
        precision: bf16 to compute the towers in it, which is faster; embeddings are fp32 in the end.
        models: further models, measured on the same sets.
        csv: table that is given each result once it is measured; what it has already is not measured again.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc.cli.evaluate_texts import open_documents, retrieval_sets
    from dualenc.data import SetOptions
    from dualenc.evaluation import DocumentOptions

    options = SetOptions(captions=captions, images=images, image=image)
    documents = DocumentOptions(
        query_prompt, document_prompt, dim, ignore_identical_ids, max_passage, stride, rerank, rerank_top
    )
    no_use = options.given() | ({} if between == "image-text" else {"between": between})
    sets: Any = open_documents(data, split, no_use, documents) or retrieval_sets(data, split, between, options)
    name = "retrieval" if between == "image-text" else f"retrieval-{between}"
    _evaluate(name, sets, model, data, out, workers, precision, models, csv, allow_partial)


def sets() -> None:
    """List the evaluation sets that are known by name, with their sizes and pages."""
    from dualenc.data.eval_sets.known_sets import KNOWN_SETS, LICENSE

    for name, known in KNOWN_SETS.items():
        size = "" if known.megabytes is None else known.size_of("test")
        print(f"{name:20} {known.kind:15} {size:>7}  {known.page}")
    print(
        f"\nSizes are those of the split test; the others are said before the download. License: {LICENSE}.\n"
        "Measure one by its name: `dualenc evaluate MODEL cifar10`."
    )


def choice(
    model: str,
    data: list[str],
    out: Path | None = None,
    workers: int = 2,
    precision: Precision = "fp32",
    models: tuple[str, ...] = (),
    csv: Path | None = None,
    allow_partial: bool = False,
) -> None:
    """Measure the choice between captions, and images, that differ in little: Winoground, SugarCrepe.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED.
        data: folders in the layout of Winoground (examples.jsonl, images/), or SugarCrepe's .json files.
        out: folder for choice.json and report.html.
        workers: number of worker processes that decode images.
        precision: bf16 to compute the towers in it, which is faster; embeddings are fp32 in the end.
        models: further models, measured on the same sets.
        csv: table that is given each result once it is measured; what it has already is not measured again.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc.evaluation import kinds_of_command, open_sets

    sets = open_sets(data, kinds_of_command("choice"))
    _evaluate("choice", sets, model, data, out, workers, precision, models, csv, allow_partial)


def probe(
    model: str,
    data: list[str],
    train: str = "train",
    split: str | None = None,
    classnames: str | None = None,
    image: str | None = None,
    text: tuple[str, ...] = (),
    label: str | None = None,
    out: Path | None = None,
    workers: int = 2,
    precision: Precision = "fp32",
    models: tuple[str, ...] = (),
    csv: Path | None = None,
    shots: tuple[int, ...] = (),
    draws: int = 5,
    allow_partial: bool = False,
) -> None:
    """Measure logistic regression and nearest neighbors on frozen image embeddings; on texts, also clusters.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED; for texts also
            a text model.
        data: folders or URLs in the layout of CLIP_benchmark, names of `dualenc sets`, or folders with plain shards or
            class folders for each split. Of a set with a single split a fifth is measured, and the rest is learned
            from. Or two tables of texts (.tsv, .csv, .jsonl), one to learn from and one to measure on.
        train: split to learn from; the hyperparameters are chosen on "val" or "valid", or else on a fifth of it.
        split: split to measure on; "test" by default.
        classnames: file of class names, one on each line in the order of the classes; by default those of the set.
        image: member that holds the image in plain shards, such as input.jpg; by default .jpg, .jpeg, .png or .webp.
        text: for tables: columns of the text, joined by a blank; by default text.
        label: for tables: column of the label; by default label.
        out: folder for probe.json and report.html.
        workers: number of worker processes that decode images.
        precision: bf16 to compute the towers in it, which is faster; embeddings are fp32 in the end.
        models: further models, measured on the same sets.
        csv: table that is given each result once it is measured; what it has already is not measured again.
        shots: numbers of images of each class, such as 1 2 4 8 16, for a linear probe of each.
        draws: number of draws of these images; the metrics are means over the draws.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc.cli.evaluate_texts import open_tables
    from dualenc.data import SetOptions
    from dualenc.evaluation import open_sets
    from dualenc.evaluation.probe import FrozenProbes

    options, kind = SetOptions(classnames=classnames, image=image), FrozenProbes(train, shots, draws)
    no_use = {"train": train if train != "train" else None, "split": split, "shots": shots, **options.given()}
    no_use["draws"] = None if draws == 5 else draws
    sets: Any = open_tables(data, text, label, no_use) or open_sets(data, [kind], split, options)
    _evaluate("probe", sets, model, data, out, workers, precision, models, csv, allow_partial)


def compare(first: Path, second: Path, kinds: tuple[str, ...] = (), out: Path | None = None) -> None:
    """Compare two results on the same items: paired differences with intervals.

    Args:
        first: folder that an evaluation wrote by --out.
        second: folder that an evaluation of another model, or with other prompts, wrote by --out.
        kinds: import paths of the evaluation kinds that are not part of dualenc.
        out: folder for compare.json and report.html.
    """
    from dualenc.evaluation import check_out, compare, find_kind
    from dualenc.report import print_comparison, write_comparison
    from dualenc.utils.files import write_json

    own = [find_kind(name) for name in kinds]
    comparisons = compare(first, second, own)
    if out is not None:
        fields = ("dataset", "kind", "first", "second")
        check_out(out, "compare", [comparison.result for comparison in comparisons], fields)
        make_folder(out, "--out")
    print_comparison(comparisons)
    if out is not None:
        about = {"results of A": first, "results of B": second}
        with writing(out):
            write_json(out / "compare.json", [comparison.result for comparison in comparisons])
            print(f"report: {write_comparison(out, 'Comparison', comparisons, about)}")


def _evaluate(
    command: str,
    sets: "Sequence[tuple[ResultKind, Any]]",
    model: str,
    data: list[str],
    out: Path | None,
    workers: int,
    precision: Precision,
    models: tuple[str, ...],
    csv: Path | None,
    allow_partial: bool,
) -> None:
    """Measure models on opened sets, each by its kind; `data` are the words by which the user named the sets.

    Raises:
        UsageError: If an option is wrong.
        WorkError: If the evaluation fails, or a set is incomplete.
    """
    from dualenc.evaluation import ResultTable, check_out, place
    from dualenc.report import print_table

    if workers < 0:
        raise UsageError(f"--workers {workers} must not be negative")
    names = list(dict.fromkeys([model, *models]))
    for name in names:  # a name that is wrong must not end the command after hours with the models before it
        sets[0][0].check(name)
    if out is not None:
        check_out(out, command, [place(*one, name, precision) for name in names for one in sets])
        make_folder(out, "--out")
    if csv is not None:
        make_folder(csv.parent, "--csv")
    table = None if csv is None else ResultTable(csv)
    # A report shows more than the table keeps, so that all of it is measured again.
    settings = {"table": table, "again": out is not None, "incomplete": allow_partial, "workers": workers}
    measured: list[MeasuredSet] = []
    try:
        for number in range(len(names)):
            for one in _measure(names, number, sets, precision, **settings):
                measured.append(one)  # noqa: PERF402 - what is measured before an error is kept
    finally:
        if measured:  # Results on one set stand next to each other.
            print_table([one.result for place in range(len(sets)) for one in measured[place :: len(sets)]])
    if table is not None:
        known = sum(one.found is None for one in measured)
        print(f"{csv}: {plural(table.added, 'result')} added, {known} found there and not measured again")
    if out is not None:
        titles = list(dict.fromkeys(kind.title for kind, _ in sets))
        title = titles[0] if len(titles) == 1 else "Evaluation"
        _write(out, command, title, [one.found for one in measured if one.found is not None], data)
    _check_complete([one.result for one in measured], allow_partial)


def _measure(
    names: Sequence[str], number: int, sets: "Sequence[tuple[ResultKind, Any]]", precision: Precision, **options: Any
) -> "Iterator[MeasuredSet]":
    """Measure a model, one of several, on sets; see `dualenc.evaluation.measure.measure`."""
    from dualenc import DataError
    from dualenc.evaluation import EmbeddingCache
    from dualenc.evaluation.measure import measure

    total = len(names) * len(sets)
    embedder = sets[0][0].load(names[number], precision)
    cache = EmbeddingCache(embedder)

    def track(place: int) -> Any:
        what = sets[place][1].name
        if total > 1:
            what = f"{number * len(sets) + place + 1} of {total}: {f'{names[number]} on ' if names[1:] else ''}{what}"
        if total > 1 and not sys.stderr.isatty():
            print_message(printable(redact(what)))
        return progress(what)

    try:
        yield from measure(embedder, sets, track=track, cache=cache, **options)
    except DataError as error:
        raise WorkError(error) from error
    if cache.reused:
        counts = Counter(cache.reused)
        what = ", ".join(f"{label} of {plural(count, 'set')}" for label, count in counts.items())
        print(f"embeddings reused from {cache.folder}: {what}")


def _write(out: Path, command: str, title: str, found: "Sequence[Evaluated]", data: list[str]) -> None:
    """Write the files of `--out`."""
    from dualenc.evaluation import write_results
    from dualenc.report import write_report

    sections = [one.section for one in found]
    names = list(dict.fromkeys(section.result["model"] for section in sections))
    if len(names) > 1:  # the page names sections by their set
        titles = [f"{section.result['dataset']} ({section.result['model']})" for section in sections]
        sections = [replace(x, result={**x.result, "dataset": name}) for x, name in zip(sections, titles)]
    about = {"model": ", ".join(names), "data": " ".join(map(redact, data)), "command": command_line()}
    with writing(out):
        write_results(out, command, found)
        page = write_report(out, title, sections, about)
    print(f"report: {page}")


def _check_complete(results: Sequence[Any], allow_partial: bool) -> None:
    if not allow_partial and not all(result["complete"] for result in results):
        name, problem = next((result["dataset"], result["problems"][0]) for result in results if result["problems"])
        raise WorkError(
            f"{name} is not complete: {problem['what']}: {problem['count']}, such as {problem['names'][0]}; "
            "to accept this, give --allow-partial"
        )
