"""Commands that evaluate: plain functions, which `dualenc.cli.parser` parses from their signatures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dualenc.cli.common import UsageError, WorkError, command_line, make_folder, progress, writing

if TYPE_CHECKING:
    from dualenc.data import SetOptions
    from dualenc.evaluation import EvaluationKind


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
    allow_partial: bool = False,
) -> None:
    """Measure a model on evaluation sets of any kind, or by an evaluation kind of your own.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED.
        data: evaluation sets: folders, plain shards, tables, URLs, or names of `dualenc sets`.
        kind: name of an evaluation kind, such as text-text, or import path of your own subclass of
            dualenc.evaluation.EvaluationKind; absent, the kind of each set.
        split: absent, "test" or the only split there is.
        captions: captions of plain shards: txt, json.FIELD, or a member such as long.txt; auto, the field captions
            of .json, else .txt, else the field caption.
        classnames: file of class names, one on each line in the order of the classes; absent, those of the set.
        templates: file of templates, one on each line with {c} for the class name; or openai for CLIP's 80 of ImageNet,
            simple for 7 of them; absent, those of the set.
        images: folder that the image paths of caption tables are relative to; absent, found next to the table.
        image: member that holds the image in plain shards, such as input.jpg; absent, .jpg, .jpeg, .png or .webp.
        out: folder for evaluate.json and report.html.
        workers: number of worker processes that decode images.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc.data import SetOptions
    from dualenc.evaluation import find_kind

    kinds = None if kind is None else [find_kind(kind)]
    options = SetOptions(captions=captions, classnames=classnames, templates=templates, images=images, image=image)
    _evaluate("evaluate", kinds, model, data, split, options, out, workers, allow_partial)


def zeroshot(
    model: str,
    data: list[str],
    split: str | None = None,
    classnames: str | None = None,
    templates: str | None = None,
    image: str | None = None,
    out: Path | None = None,
    workers: int = 2,
    allow_partial: bool = False,
) -> None:
    """Measure zero-shot classification on evaluation sets.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED.
        data: folders or URLs in the layout of CLIP_benchmark, names of `dualenc sets`, plain shards with .cls, or
            folders with a folder of images for each class.
        split: absent, "test" or the only split there is.
        classnames: file of class names, one on each line in the order of the classes; absent, those of the set.
        templates: file of templates, one on each line with {c} for the class name; or openai for CLIP's 80 of ImageNet,
            simple for 7 of them; absent, those of the set.
        image: member that holds the image in plain shards, such as input.jpg; absent, .jpg, .jpeg, .png or .webp.
        out: folder for zeroshot.json and report.html.
        workers: number of worker processes that decode images.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc.data import SetOptions
    from dualenc.evaluation import kinds_of_command

    options = SetOptions(classnames=classnames, templates=templates, image=image)
    _evaluate("zeroshot", kinds_of_command("zeroshot"), model, data, split, options, out, workers, allow_partial)


def retrieval(
    model: str,
    data: list[str],
    split: str | None = None,
    captions: str = "auto",
    images: str | None = None,
    image: str | None = None,
    between: Literal["image-text", "text-text", "image-image"] = "image-text",
    out: Path | None = None,
    workers: int = 2,
    allow_partial: bool = False,
) -> None:
    """Measure retrieval on evaluation sets, between images and captions or within one of them.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED.
        data: folders or URLs in the layout of CLIP_benchmark, names of `dualenc sets`, plain shards with captions, or
            tables of images and captions.
        split: absent, "test" or the only split there is.
        captions: captions of plain shards: txt, json.FIELD, or a member such as long.txt; auto, the field captions
            of .json, else .txt, else the field caption.
        images: folder that the image paths of caption tables are relative to; absent, found next to the table.
        image: member that holds the image in plain shards, such as input.jpg; absent, .jpg, .jpeg, .png or .webp.
        between: text-text looks for the other captions of a caption's image; image-image, on sets for classification,
            for the other images of an image's class.
        out: folder for retrieval.json and report.html.
        workers: number of worker processes that decode images.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc.data import SetOptions
    from dualenc.evaluation import KINDS

    across = between == "image-text"
    kind, name = ("retrieval", "retrieval") if across else (between, f"retrieval-{between}")
    options = SetOptions(captions=captions, images=images, image=image)
    _evaluate(name, [KINDS[kind]], model, data, split, options, out, workers, allow_partial)


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
    allow_partial: bool = False,
) -> None:
    """Measure the choice between captions, and images, that differ in little: Winoground, SugarCrepe.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED.
        data: folders in the layout of Winoground (examples.jsonl, images/), or SugarCrepe's .json files.
        out: folder for choice.json and report.html.
        workers: number of worker processes that decode images.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc.data import SetOptions
    from dualenc.evaluation import kinds_of_command

    _evaluate("choice", kinds_of_command("choice"), model, data, None, SetOptions(), out, workers, allow_partial)


def probe(
    model: str,
    data: list[str],
    train: str = "train",
    split: str | None = None,
    classnames: str | None = None,
    image: str | None = None,
    out: Path | None = None,
    workers: int = 2,
    allow_partial: bool = False,
) -> None:
    """Measure logistic regression and nearest neighbors on frozen image embeddings.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED.
        data: folders or URLs in the layout of CLIP_benchmark, names of `dualenc sets`, or folders with plain shards or
            class folders for each split; with a split to learn from.
        train: split to learn from; the hyperparameters are chosen on "val" or "valid", or else on a fifth of it.
        split: absent, "test".
        classnames: file of class names, one on each line in the order of the classes; absent, those of the set.
        image: member that holds the image in plain shards, such as input.jpg; absent, .jpg, .jpeg, .png or .webp.
        out: folder for probe.json and report.html.
        workers: number of worker processes that decode images.
        allow_partial: exit with status 0 though something of a set is missing or cannot be read.
    """
    from dualenc.data import SetOptions
    from dualenc.evaluation.probe import FrozenProbes

    options = SetOptions(classnames=classnames, image=image)
    _evaluate("probe", [FrozenProbes(train)], model, data, split, options, out, workers, allow_partial)


def compare(first: Path, second: Path, kinds: tuple[str, ...] = (), out: Path | None = None) -> None:
    """Compare two results on the same items: paired differences with intervals.

    Args:
        first: folder that an evaluation wrote by --out.
        second: another one, of another model or other prompts.
        kinds: import paths of the evaluation kinds that are not part of dualenc.
        out: folder for compare.json and report.html.
    """
    from dualenc.evaluation import compare, find_kind
    from dualenc.report import print_comparison, write_comparison
    from dualenc.utils.files import write_json

    own = [find_kind(name) for name in kinds]
    if out is not None:
        make_folder(out, "--out")
    comparisons = compare(first, second, own)
    print_comparison(comparisons)
    if out is not None:
        about = {"results of A": first, "results of B": second}
        with writing(out):
            write_json(out / "compare.json", [comparison.result for comparison in comparisons])
            print(f"report: {write_comparison(out, 'Comparison', comparisons, about)}")


def _evaluate(
    command: str,
    kinds: "Sequence[EvaluationKind] | None",
    model: str,
    data: list[str],
    split: str | None,
    options: "SetOptions",
    out: Path | None,
    workers: int,
    allow_partial: bool,
) -> None:
    """Measure a model on sets, each by the first kind that can measure it; None takes the kind of each set.

    Raises:
        UsageError: If an option is wrong.
        WorkError: If the evaluation fails, or a set is incomplete.
    """
    from dualenc import DataError, load
    from dualenc.evaluation import EmbeddingCache, open_sets, write_results
    from dualenc.report import print_table, write_report
    from dualenc.utils.urls import redact

    sets = open_sets(data, kinds, split, options)
    if workers < 0:
        raise UsageError(f"--workers {workers} must not be negative")
    if out is not None:
        make_folder(out, "--out")
    embedder = load(model)
    cache = EmbeddingCache(embedder)
    found = []
    for kind, item in sets:
        try:
            found.append(kind.evaluate(embedder, item, workers=workers, track=progress(item.name), cache=cache))
        except ValueError as error:
            raise WorkError(error if isinstance(error, DataError) else f"{item.name}: {error}") from error
    results = [one.section.result for one in found]
    print_table(results)
    if cache.reused:
        counts = ", ".join(f"{cache.reused.count(label)} x {label}" for label in dict.fromkeys(cache.reused))
        print(f"reused from {cache.folder}: {counts}")
    if out is not None:
        titles = list(dict.fromkeys(kind.title for kind, _ in sets))
        with writing(out):
            write_results(out, command, found, [item for _, item in sets], embedder.fingerprint)
            about = {"data": " ".join(map(redact, data)), "command": command_line()}
            title = titles[0] if len(titles) == 1 else "Evaluation"
            page = write_report(out, title, [one.section for one in found], about)
        print(f"report: {page}")
    if not allow_partial and not all(result["complete"] for result in results):
        name, problem = next((result["dataset"], result["problems"][0]) for result in results if result["problems"])
        raise WorkError(
            f"{name} is not complete: {problem['what']}: {problem['count']}, such as {problem['names'][0]}; "
            "to accept this, give --allow-partial"
        )
