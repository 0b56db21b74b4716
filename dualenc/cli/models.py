"""The commands that use, change and exchange models: plain functions, parsed by `dualenc.cli.parser`."""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dualenc.cli.common import UsageError, WorkError, parse_part, writing
from dualenc.utils.arguments import Precision
from dualenc.utils.progress import progress
from dualenc.utils.text import plural

if TYPE_CHECKING:
    from dualenc import Embedder
    from dualenc.interop.inputs import Inputs


def import_(
    spec: str,
    out: Path,
    text: str | None = None,
    embed_dim: int = 512,
    seed: int = 0,
    data: tuple[str, ...] = (),
    captions: str = "auto",
    image: str | None = None,
) -> None:
    """Read a model that another library wrote, check it with that library, and write a model directory.

    Args:
        spec: open_clip:ARCH/WEIGHTS (a tag or a file); a folder of open_clip or Hugging Face (CLIP, SigLIP,
            VisionTextDualEncoder); hf-hub:owner/name[@revision] with one; or timm:NAME[/FILE] with --text.
        out: model directory to write.
        text: text checkpoint to join with a tower of timm: a folder, or hf-hub:owner/name[@revision].
        embed_dim: dimensions of the space that joins both towers.
        seed: random seed of the projections that join them.
        data: shards, some of whose pairs are compared in addition to drawn inputs.
        captions: captions of these shards: "auto", "txt" or "json.FIELD".
        image: member of these shards that is the image, such as "input.jpg"; by default the .jpg, .jpeg, .png
            or .webp.
    """
    from dualenc.formats.model_folder import POSSIBLE_FILES
    from dualenc.interop.importing import import_model
    from dualenc.utils.files import check_replaceable

    check_replaceable(out, POSSIBLE_FILES)
    found = import_model(spec, text, embed_dim, seed, _inputs(data, captions, image))
    with writing(out):
        found.embedder.save(out)
    config = found.embedder.dual_encoder.config
    print(
        f"{out}: {config.image.name} at {config.image.img_size} pixels, a text encoder of {config.text.layers} layers "
        f"of width {config.text.width}, {config.embed_dim} dimensions"
    )
    print("\n".join(found.lines()))


def export(
    model: str,
    out: Path,
    format: str = "",
    data: tuple[str, ...] = (),
    captions: str = "auto",
    image: str | None = None,
) -> None:
    """Write a model in the format of another library, and check it with that library in a fresh process.

    Args:
        model: model directory, run directory, text model, or hf-hub:owner/name[@revision].
        out: folder to write.
        format: open_clip, transformers, sentence-transformers, onnx, or the import path of an ExportFormat of your own,
            such as my_package.my_module.MyFormat.
        data: shards, some of whose pairs are compared in addition to drawn inputs.
        captions: captions of these shards: "auto", "txt" or "json.FIELD".
        image: member of these shards that is the image, such as "input.jpg"; by default the .jpg, .jpeg, .png
            or .webp.
    """
    from dualenc.interop import exporting

    with writing(out):
        print("\n".join(exporting.export(model, out, format, _inputs(data, captions, image)).lines()))


def _inputs(data: tuple[str, ...], captions: str, image: str | None) -> "Callable[[Embedder], Inputs]":
    """Return a function that draws inputs for both libraries, and adds the first pairs of the shards."""
    from torchvision.transforms.v2.functional import to_pil_image

    from dualenc import ShardIndex
    from dualenc.data.pairs import captions_of, decode_sample, only_pairs
    from dualenc.interop.inputs import make_inputs

    if not data:
        return make_inputs
    index, _ = only_pairs(ShardIndex.build(list(data), image=image), captions)
    samples = [index[i] for i in range(min(8, len(index)))]
    images = [to_pil_image(decode_sample(sample)) for sample in samples]
    return partial(make_inputs, images=images, texts=[captions_of(sample, captions)[0] for sample in samples])


def push(
    model: Path,
    repo: str,
    revision: str | None = None,
    private: bool = False,
    results: tuple[Path, ...] = (),
    license: str | None = None,
    message: str | None = None,
    format: str | None = None,
) -> None:
    """Upload a model to the hub, with a card that has its metrics, its training data and programs that load it.

    Args:
        model: model directory, run directory (its best/, or else last/), text model, or a folder that `dualenc export`
            wrote.
        repo: owner/name; created if it does not exist.
        revision: a branch, created if it does not exist; main by default.
        private: create a private repository; refused if it exists and is public.
        results: .json files that `--out` of evaluations of this model wrote, for the card.
        license: the hub's name of the license, such as apache-2.0; by default the card says that none was given.
        message: message of the commit.
        format: for an export in a format of your own, the import path of its ExportFormat.
    """
    from dualenc.hub.push import HubError, push

    try:
        with writing(Path(tempfile.gettempdir())):
            pushed = push(model, repo, revision, private, results, license, message, format)
    except HubError as error:
        raise WorkError(error) from error
    print(f"{pushed.url}\n{pushed.spec}")


def interpolate(first: str, second: str, out: Path, alpha: float = 0.5) -> None:
    """Write the interpolation of two models of one architecture, such as those before and after fine-tuning.

    Args:
        first: model directory, run directory, or hf-hub:owner/name[@revision].
        second: model directory, run directory, or hf-hub:owner/name[@revision], of the same architecture.
        out: model directory to write.
        alpha: weight of the second model; 0 gives the first, 1 the second.
    """
    from dualenc.inference.embedder import load
    from dualenc.inference.interpolation import interpolate

    made = interpolate(load(first, "cpu"), load(second, "cpu"), alpha)
    with writing(out):
        made.save(out)
    print(f"{out}: alpha {alpha:g} between {first} (0) and {second} (1)")


def embed(
    model: str,
    shards: list[str],
    out: Path,
    features: bool = False,
    captions: str = "auto",
    image: str | None = None,
    column: str = "text",
    tokens: bool = False,
    prompt: str | None = None,
    dim: int | None = None,
    precision: Precision = "fp32",
    part: str | None = None,
    check: bool = False,
    workers: int = 2,
    batch_size: int = 64,
) -> None:
    """Write embeddings of the images and captions of shards, of images, or of texts; or image features to train from.

    Args:
        model: model directory, run directory, or hf-hub:owner/name[@revision]; with --features also the .yaml of a
            `dualenc fit`, for the image tower with which this run starts; for text files, a text model.
        shards: paths, globs, brace patterns or folders of shards; or of images, or a .txt with a path on each line;
            or text files, .txt, .tsv, .csv or .jsonl.
        out: folder for a .safetensors of each shard, part of the images or text file, and embed.json; the same command
            continues a stopped one.
        features: write the output of the image tower before the projection instead of embeddings; for `data.features`.
        captions: "auto" for json.captions, as `make-shards` writes them, or else txt; or "txt"; or "json.FIELD" for a
            field of the .json, which may list several and be nested as in json.meta.caption.
        image: member that is the image, such as "input.jpg"; several names are separated by ";"; by default the
            .jpg, .jpeg, .png or .webp.
        column: column of the texts in text files.
        tokens: write one embedding for each token of a text instead of one for the text.
        prompt: for text files: what to put before each text, the name of one of the model's prompts, or the text itself
            with a blank or a colon at its end; "" for nothing; by default the model's own.
        dim: for text files: dimensions to keep, the first ones; by default the model's own.
        precision: bf16 to compute the towers in it, which is faster; embeddings stay fp32. Not for --features.
        part: "I/N" to embed a part of the shards only, such as 0/8 to 7/8 by eight processes, at once or one after the
            other, on any machines that see OUT.
        check: say which shards have no embeddings in OUT yet, and load no model.
        workers: processes that decode images.
        batch_size: images or texts embedded at once.
    """
    from dualenc.inference.image_files import FileParts, find_images

    of_text: dict[str, Any] = {"tokens": tokens or None, "prompt": prompt, "dim": dim}
    paths = find_images(shards)
    kind = None if paths else _kind_of_texts(shards)
    _check_options(shards, paths, kind, features, image, of_text, "--part" if part else "--check" if check else None)
    if kind:
        of_text |= {"tokens": tokens, "batch_size": batch_size}
        return _embed_text_files(model, precision, shards, out, column, of_text)
    chosen = parse_part(part)
    if check:
        from dualenc import ShardIndex

        index = FileParts(paths) if paths else ShardIndex.build(shards, image=image, workers=workers)
        return _check_embedded(index, out)
    options: dict[str, Any] = {"part": chosen, "workers": workers, "batch_size": batch_size}
    if paths:
        return _embed_images(model, precision, paths, out, options)
    _embed_shards(model, precision, shards, out, features, captions, image, options)


def _kind_of_texts(shards: list[str]) -> str | None:
    """Return the first name of a text file, or None."""
    from dualenc.data.text.files import KINDS

    return next((name for name in shards if name.lower().endswith(KINDS)), None)


def _check_options(
    shards: list[str],
    paths: list[str] | None,
    text: str | None,
    features: bool,
    image: str | None,
    of_text: dict[str, Any],
    divided: str | None,
) -> None:
    """Refuse options that do not belong to what is embedded."""
    from dualenc.data.text.files import KINDS

    given = [f"--{name}" for name, value in of_text.items() if value is not None]
    if paths and (features or given or image is not None):
        raise UsageError(f"{shards[0]} names images: --features, --image and options of texts are not for them")
    if paths:
        return
    if text:
        if features or not all(name.lower().endswith(KINDS) for name in shards):
            raise UsageError(f"{text} is a text file: embed text files alone, without --features")
        if of_text["tokens"] and len(given) > 1:
            raise UsageError(f"{given[1]} is not for --tokens, which writes hidden states without a prompt")
        if divided:
            raise UsageError(f"{divided} is for shards and images: give each process text files of its own")
    elif given:
        raise UsageError(f"{given[0]} is for text files only: {shards[0]} must end with {', '.join(KINDS)}")


def _embed_shards(
    model: str,
    precision: Precision,
    shards: list[str],
    out: Path,
    features: bool,
    captions: str,
    image: str | None,
    options: dict[str, Any],
) -> None:
    """Write the embeddings of shards, or their image features."""
    from dualenc import ShardIndex
    from dualenc.inference.embed_files import write_embeddings

    about, preprocess, of_images, of_texts = _towers(model, precision, features, captions, options["batch_size"])
    with writing(out):
        index = ShardIndex.build(shards, image=image, workers=options["workers"])
        made = write_embeddings(index, out, about, preprocess, of_images, of_texts, track=progress("images"), **options)
    print("\n".join(made.lines()))


def _check_embedded(index: Any, out: Path) -> None:
    """Print which shards have no embeddings in a folder yet; exit with 1 if there are any."""
    from dualenc.inference.embed_files import missing_files

    missing, count = missing_files(out, index), len(index.parts)
    print("\n".join([f"{out}: embeddings of {count - len(missing):,} of {plural(count, 'shard')}", *missing]))
    if missing:
        print("the same command without --check, or with --part, writes the missing ones")
        sys.exit(1)


def _embed_images(model: str, precision: Precision, paths: list[str], out: Path, options: dict[str, Any]) -> None:
    """Write the embeddings of image files."""
    from dualenc.inference.embed_files import write_embeddings
    from dualenc.inference.image_files import FileParts

    about, preprocess, of_images, _ = _towers(model, precision, False, "", options["batch_size"])
    about |= {"what": "images", "captions": None}
    with writing(out):
        parts = FileParts(paths)
        made = write_embeddings(parts, out, about, preprocess, of_images, track=progress("images"), **options)
    print("\n".join(made.lines()))


def _towers(
    model: str, precision: Precision, features: bool, captions: str, batch_size: int
) -> tuple[dict[str, Any], Any, Any, Any]:
    """Return arguments of `write_embeddings`: facts about the model, its preprocessing, and functions that embed."""
    import torch

    from dualenc import Preprocess, load
    from dualenc.inference.embedder import fingerprint, image_features

    if features and precision != "fp32":
        raise UsageError("--features are computed in fp32, from which training must not differ: leave out --precision")
    embedder = None
    if not model.endswith((".yaml", ".yml")):
        embedder = load(model, precision=precision)
        tower, preprocess = embedder.dual_encoder.image, cast(Preprocess, embedder.preprocess)
    elif features:
        from dualenc.cli.fit import image_tower

        tower, preprocess = image_tower(model)
        tower.to("cuda" if torch.cuda.is_available() else "cpu")
    else:
        raise UsageError(f"{model} is a configuration, whose towers are not trained: use it with --features only")
    about: dict[str, Any] = {"model": model, "what": "features" if features else "embeddings", "precision": precision}
    if embedder is None or features:
        of_images, of_texts = partial(image_features, tower, preprocess), None
        about |= {"made_by": fingerprint(tower, preprocess), "captions": None, "dims": tower.width}
    else:
        of_images, of_texts = partial(embedder.embed_images, batch_size=batch_size), embedder.embed_texts
        about |= {"made_by": embedder.fingerprint, "captions": captions, "dims": embedder.model.embed_dim}
    about |= {"image": asdict(tower.config), "preprocess": asdict(preprocess)}
    return about, preprocess, of_images, of_texts


def _embed_text_files(
    model: str, precision: Precision, files: list[str], out: Path, column: str, options: dict[str, Any]
) -> None:
    """Write the embeddings of text files."""
    from dualenc import load_text
    from dualenc.inference.embed_text_files import embed_text_files

    predictor = load_text(model, precision=precision)
    with writing(out):
        made = embed_text_files(predictor, files, out, column, track=progress("texts"), **options)
    print("\n".join(made.lines()))


def mine(
    model: str,
    pairs: list[str],
    out: Path,
    text: str = "text",
    pair: str = "pair",
    corpus: tuple[str, ...] = (),
    document: str | None = None,
    negatives: int = 4,
    skip: int = 0,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    batch_size: int = 64,
) -> None:
    """Write pairs of texts with hard negatives, the documents nearest to each first text, to train an embedding with.

    Args:
        model: text model, run directory, or hf-hub:owner/name[@revision].
        pairs: .tsv, .csv or .jsonl files of the pairs.
        out: .jsonl to write: the lines of the pairs with a list of texts, negatives.
        text: column of the first text, the query.
        pair: column of the second text, the document that answers it.
        corpus: files of documents to choose from; by default the second texts of the pairs.
        document: column of the documents in these files; by default text.
        negatives: number of documents for each pair.
        skip: number of the nearest documents to leave out, since they may answer the query too.
        query_prompt: text before each query, such as "query: ", or the name of one of the model's prompts; "" for none;
            by default the prompt "query" of the model, or else its default.
        document_prompt: the same for each document; by default the prompt "document", "passage" or "corpus" of the
            model, or else its default.
        batch_size: texts embedded at once.
    """
    from dualenc import load_text
    from dualenc.inference.mine import mine_negatives

    if document is not None and not corpus:
        raise UsageError(f"--document {document} has no use without --corpus")
    options: dict[str, Any] = {"text": text, "pair": pair, "document": document or "text", "batch_size": batch_size}
    options |= {"query_prompt": query_prompt, "document_prompt": document_prompt}
    try:
        with writing(out):
            mined = mine_negatives(
                load_text(model), pairs, out, corpus, negatives=negatives, skip=skip, track=progress("texts"), **options
            )
    except ValueError as error:
        raise UsageError(error) from error
    print("\n".join(mined.lines()))
