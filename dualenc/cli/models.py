"""The commands that use, change and exchange models: plain functions, parsed by `dualenc.cli.parser`."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from dualenc.cli.common import UsageError, WorkError, progress, writing

if TYPE_CHECKING:
    from dualenc import Embedder
    from dualenc.interop.verify import Inputs


def import_(
    spec: str,
    out: Path,
    text: str | None = None,
    embed_dim: int = 512,
    seed: int = 0,
    data: tuple[str, ...] = (),
    captions: str = "txt",
) -> None:
    """Reads a model that another library wrote, checks it with that library, and writes a model directory.

    Args:
        spec: open_clip:ARCH/WEIGHTS (a tag or a file); a folder of open_clip's or Hugging Face's (CLIP, SigLIP,
            VisionTextDualEncoder); hf-hub:owner/name[@revision] with one; or timm:NAME[/FILE] with --text.
        out: model directory to write.
        text: text checkpoint to join with a tower of timm's: a folder, or hf-hub:owner/name[@revision].
        embed_dim: dimensions of the space in which they are joined.
        seed: of the projections that join them.
        data: shards, of which some pairs are compared beside what is drawn.
        captions: of these, "txt" or "json.FIELD".
    """
    from dualenc.formats.model_folder import OWN_FILES
    from dualenc.interop.importing import import_model
    from dualenc.utils.files import check_replaceable

    check_replaceable(out, {*OWN_FILES, "README.md"})
    found = import_model(spec, text, embed_dim, seed, _inputs(data, captions))
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
    format: Literal["open_clip", "transformers", "sentence-transformers", "onnx"] | None = None,
    data: tuple[str, ...] = (),
    captions: str = "txt",
) -> None:
    """Writes a model in the format of another library, and checks it with that library in a fresh process.

    Args:
        model: model directory, run directory, text model, or hf-hub:owner/name[@revision].
        out: folder to write.
        format: open_clip, transformers, sentence-transformers or onnx.
        data: shards, of which some pairs are compared beside what is drawn.
        captions: of these, "txt" or "json.FIELD".
    """
    from dualenc.interop import exporting

    if format is None:
        raise UsageError("--format must be open_clip, transformers, sentence-transformers or onnx")
    with writing(out):
        print("\n".join(exporting.export(model, out, format, _inputs(data, captions)).lines()))


def _inputs(data: tuple[str, ...], captions: str) -> "Callable[[Embedder], Inputs]":
    """What both sides are given: drawn, and the first pairs of shards."""
    from torchvision.transforms.v2.functional import to_pil_image

    from dualenc import ShardIndex
    from dualenc.data.pairs import captions_of, decode_sample, only_pairs
    from dualenc.interop.verify import make_inputs

    if not data:
        return make_inputs
    index, _ = only_pairs(ShardIndex.build(list(data)), captions)
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
) -> None:
    """Uploads a model to the hub, with a card that says what it is, how good, and how to load it.

    Args:
        model: model directory, run directory (its best/, or else last/), text model, or a folder that `dualenc export`
            wrote.
        repo: owner/name; made where there is none.
        revision: a branch, made where there is none; absent, main.
        private: make the repository a private one; refused where it is there and public.
        results: .json files that `--out` of evaluations of this model wrote, for the card.
        license: the hub's name of it, such as apache-2.0; absent, the card says that none was named.
        message: of the commit.
    """
    from dualenc.hub.push import HubError, push

    try:
        with writing(Path(tempfile.gettempdir())):
            pushed = push(model, repo, revision, private, results, license, message)
    except HubError as error:
        raise WorkError(error) from error
    print(f"{pushed.url}\n{pushed.spec}")


def interpolate(first: str, second: str, out: Path, alpha: float = 0.5) -> None:
    """Writes a model between two of one architecture, such as one before and after fine-tuning.

    Args:
        first: model directory, run directory, or hf-hub:owner/name[@revision].
        second: likewise.
        out: model directory to write.
        alpha: share of the second's weights; 0 for those of the first alone, 1 for those of the second.
    """
    from dualenc.inference.embedder import interpolate, load

    made = interpolate(load(first, "cpu"), load(second, "cpu"), alpha)
    with writing(out):
        made.save(out)
    print(f"{out}: alpha {alpha:g} between {first} (0) and {second} (1)")


def embed(
    model: str,
    shards: list[str],
    out: Path,
    features: bool = False,
    captions: str = "txt",
    column: str = "text",
    tokens: bool = False,
    workers: int = 2,
    batch_size: int = 64,
) -> None:
    """Writes the embeddings of all images and captions of shards, or image features to train from; or of texts.

    Args:
        model: model directory, run directory, or hf-hub:owner/name[@revision]; with --features also the .yaml of a
            `dualenc fit`, for the image tower that this run begins with; for files of texts, a text model.
        shards: paths, globs, brace patterns or folders; or files of texts, .txt, .tsv, .csv or .jsonl.
        out: folder for a .safetensors of each shard or file, and embed.json of shards; the same command again continues
            a stopped one.
        features: what the image tower gives before the projection, in place of embeddings; for `data.features`.
        captions: "txt", or "json.FIELD" for a field of the .json that may list several.
        column: of the texts in their files.
        tokens: of texts, the vector of each token in place of one for all.
        workers: processes that decode images.
        batch_size: images or texts embedded at once.
    """
    from dualenc.data.text.files import KINDS

    if texts := [name for name in shards if name.lower().endswith(KINDS)]:
        if len(texts) < len(shards) or features:
            raise UsageError(f"{texts[0]} is a file of texts: embed those by themselves, without --features")
        _embed_texts(model, texts, out, column, tokens, batch_size)
        return
    if tokens:
        raise UsageError(f"--tokens is of texts: {shards[0]} is no file in {', '.join(KINDS)}")
    from dualenc import ShardIndex
    from dualenc.inference.embed_files import embed_shards

    about, preprocess, of_images, of_texts = _towers(model, features, captions, batch_size)
    with writing(out):
        index, bar = ShardIndex.build(shards, workers=workers), progress("images")
        options: dict[str, Any] = {"workers": workers, "batch_size": batch_size, "track": bar}
        made = embed_shards(index, out, about, preprocess, of_images, of_texts, **options)
    print("\n".join(made.lines()))


def _towers(model: str, features: bool, captions: str, batch_size: int) -> tuple[dict[str, Any], Any, Any, Any]:
    """Return what `embed_shards` is given of a model: about it, preprocessing, functions of images and of texts."""
    import torch

    from dualenc import Preprocess, load
    from dualenc.inference.embedder import fingerprint, image_features

    embedder = None
    if not model.endswith((".yaml", ".yml")):
        embedder = load(model)
        tower, preprocess = embedder.dual_encoder.image, cast(Preprocess, embedder.preprocess)
    elif features:
        from dualenc.cli.fit import image_tower

        tower, preprocess = image_tower(model)
        tower.to("cuda" if torch.cuda.is_available() else "cpu")
    else:
        raise UsageError(f"{model} is a configuration, whose towers are not trained: it is for --features alone")
    about: dict[str, Any] = {"model": model, "what": "features" if features else "embeddings"}
    if embedder is None or features:
        of_images, of_texts = partial(image_features, tower, preprocess), None
        about |= {"made_by": fingerprint(tower, preprocess), "captions": None, "dims": tower.width}
    else:
        of_images, of_texts = partial(embedder.embed_images, batch_size=batch_size), embedder.embed_texts
        about |= {"made_by": embedder.fingerprint, "captions": captions, "dims": embedder.model.embed_dim}
    about |= {"image": asdict(tower.config), "preprocess": asdict(preprocess)}
    return about, preprocess, of_images, of_texts


def _embed_texts(model: str, files: list[str], out: Path, column: str, tokens: bool, batch_size: int) -> None:
    from dualenc import load_text
    from dualenc.inference.embed_files import embed_texts

    with writing(out):
        options: dict[str, Any] = {"tokens": tokens, "batch_size": batch_size, "track": progress("texts")}
        made = embed_texts(load_text(model), files, out, column, **options)
    print("\n".join(made.lines()))
