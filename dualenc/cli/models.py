"""The commands that exchange models with others: plain functions, parsed by `dualenc.cli.parser`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dualenc.cli.common import UsageError, WorkError

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
    from dualenc.inference.embedder import FILES
    from dualenc.interop.importing import import_model
    from dualenc.utils.files import check_place

    check_place(out, {*FILES, "README.md"})
    found = import_model(spec, text, embed_dim, seed, _inputs(data, captions))
    try:
        found.embedder.save(out)
    except OSError as error:
        raise WorkError(f"{error.filename or out}: {error.strerror or error}") from error
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
    try:
        print("\n".join(exporting.export(model, out, format, _inputs(data, captions)).lines()))
    except OSError as error:
        raise WorkError(f"{error.filename or out}: {error.strerror or error}") from error


def _inputs(data: tuple[str, ...], captions: str) -> "Callable[[Embedder], Inputs]":
    """What both sides are given: drawn, and the first pairs of shards."""
    from functools import partial

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
    licence: str | None = None,
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
        licence: the hub's name of it, such as apache-2.0; absent, the card says that none was named.
        message: of the commit.
    """
    from dualenc.hub.push import HubError, push

    try:
        pushed = push(model, repo, revision, private, results, licence, message)
    except HubError as error:
        raise WorkError(error) from error
    print(f"{pushed.url}\n{pushed.spec}")
