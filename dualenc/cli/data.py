"""The commands on data and embeddings: plain functions, which `dualenc.cli.parser` parses from their signatures."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

from dualenc.cli.common import UsageError, WorkError, command_line, config_folder, make_folder


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
    try:
        made.save(out)
    except OSError as error:
        raise WorkError(f"{error.filename or out}: {error.strerror or error}") from error
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
    from functools import partial

    import torch
    from rich.progress import track

    from dualenc.data.text.files import KINDS

    if texts := [name for name in shards if name.lower().endswith(KINDS)]:
        if len(texts) < len(shards) or features:
            raise UsageError(f"{texts[0]} is a file of texts: embed those by themselves, without --features")
        _embed_texts(model, texts, out, column, tokens, batch_size)
        return
    if tokens:
        raise UsageError(f"--tokens is of texts: {shards[0]} is no file in {', '.join(KINDS)}")
    from dualenc import Preprocess, ShardIndex, load
    from dualenc.inference.embed_files import embed_shards
    from dualenc.inference.embedder import fingerprint, image_features

    embedder = None
    if not model.endswith((".yaml", ".yml")):
        embedder = load(model)
        tower, preprocess = embedder.dual_encoder.image, cast(Preprocess, embedder.preprocess)
    elif features:
        from dualenc.training.begin import image_tower

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
    bar = partial(track, description="images", transient=True, disable=not sys.stderr.isatty())
    try:
        made = embed_shards(
            ShardIndex.build(shards, workers=workers),
            out,
            about,
            preprocess,
            of_images,
            of_texts,
            workers=workers,
            batch_size=batch_size,
            track=bar,
        )
    except OSError as error:
        raise WorkError(f"{error.filename or out}: {error.strerror or error}") from error
    print("\n".join(made.lines()))


def _embed_texts(model: str, files: list[str], out: Path, column: str, tokens: bool, batch_size: int) -> None:
    from functools import partial

    from rich.progress import track

    from dualenc.inference.embed_texts import embed_lines, in_words
    from dualenc.inference.text_model import load_text

    bar = partial(track, description="texts", transient=True, disable=not sys.stderr.isatty())
    try:
        made = embed_lines(load_text(model), files, out, column, tokens=tokens, batch_size=batch_size, track=bar)
    except OSError as error:
        raise WorkError(f"{error.filename or out}: {error.strerror or error}") from error
    print("\n".join(in_words(made, out, tokens)))


def configs(name: str | None = None) -> None:
    """Lists the configurations that come with the package, or prints one.

    Args:
        name: which to print, with or without `.yaml`.
    """
    found = {path.stem: path for path in sorted(config_folder().glob("*.yaml"))}
    if name is None:
        for stem, path in found.items():
            first = path.read_text("utf-8").splitlines()[0].removeprefix("# ")
            print(f"{stem:20} {first}")
        print("\nTake one by `dualenc configs NAME > run.yaml`, change it, run it by `dualenc fit --config run.yaml`.")
    elif name.removesuffix(".yaml") in found:
        print(found[name.removesuffix(".yaml")].read_text("utf-8"), end="")
    else:
        raise UsageError(f"there is no configuration {name!r}, only {', '.join(found)}")


def make_shards(
    source: Path,
    out: Path,
    images: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    templates: list[str] | None = None,
    val: float = 0.0,
    samples: int = 1000,
    seed: int = 0,
    workers: int = 2,
) -> None:
    """Writes shards from a caption table, COCO captions, Flickr token files or class folders.

    Args:
        source: table (.csv, .tsv, .jsonl, .parquet), COCO's captions .json, token file of Flickr8k or Flickr30k, a
            folder with one of these, or a folder with a folder of images for each class.
        out: new folder for train-000000.tar ... and summary.json; the same command again continues a stopped one.
        images: folder that the image names start from; absent, looked for beside the table.
        image_column: of a table; absent, guessed.
        caption_column: of a table; absent, guessed.
        templates: captions of class folders, with {c} for the name, as a list '["a photo of a {c}.", ...]'.
        val: share of the samples to hold out, by image content, as an evaluation set in OUT/held_out.
        samples: in a shard.
        seed: of the order.
        workers: processes that read and decode.
    """
    from functools import partial

    from rich.progress import track

    from dualenc.data.prepare.make_shards import make_shards

    try:
        summary = make_shards(
            source,
            out,
            images=images,
            image_column=image_column,
            caption_column=caption_column,
            templates=templates,
            val=val,
            samples=samples,
            seed=seed,
            workers=workers,
            track=partial(track, description="pictures", transient=True, disable=not sys.stderr.isatty()),
        )
    except OSError as error:
        raise WorkError(f"{error.filename or out}: {error.strerror or error}") from error
    print("\n".join(summary.lines()))


def shrink(shards: list[str], out: Path, size: int = 256, quality: int = 90, workers: int = 2) -> None:
    """Rewrites shards with smaller images; everything else in them stays as it is.

    Args:
        shards: paths, globs, brace patterns or folders.
        out: folder for shards of the same names and shrink.json; the same command again continues a stopped one.
        size: the most pixels of an image's shorter side.
        quality: of JPEG and of lossy WebP, 1 to 100.
        workers: processes, each with a shard of its own.
    """
    from functools import partial

    from rich.progress import track

    from dualenc.data.prepare.shrink import shrink_shards

    bar = partial(track, description="shards", transient=True, disable=not sys.stderr.isatty())
    try:
        summary = shrink_shards(shards, out, size=size, quality=quality, workers=workers, track=bar)
    except OSError as error:
        raise WorkError(f"{error.filename or out}: {error.strerror or error}") from error
    print("\n".join(summary.lines()))


def doctor(
    shards: list[str],
    captions: str = "txt",
    sample: int = 1000,
    all: bool = False,
    against: tuple[str, ...] = (),
    tokenizer: Path | None = None,
    context_length: int | None = None,
    bad_samples: float = 0.001,
    json: bool = False,
    out: Path | None = None,
    workers: int = 2,
    seed: int = 0,
) -> None:
    """Looks for what would hurt a run on shards, before it; exit status 1 if one would not start or would stop.

    Args:
        shards: paths, globs, brace patterns or folders.
        captions: "txt", or "json.FIELD" for a field of the .json that may list several.
        sample: how many pairs to read and decode, drawn over all shards.
        all: look at all pairs, not only at some.
        against: evaluation sets, or shards, whose images must not be in these.
        tokenizer: tokenizer.json or vocab.txt to measure captions with; absent, they are measured in words.
        context_length: in tokens, for the captions that it would cut.
        bad_samples: share of the pairs that the run lets be bad, 10 at least.
        json: print JSON and no table.
        out: folder for doctor.json and report.html.
        workers: processes that read and decode.
        seed: of the draw.
    """
    from functools import partial
    from json import dumps

    from rich.console import Console
    from rich.progress import track

    from dualenc import Tokenizer
    from dualenc.data.doctor.checks import examine, printable
    from dualenc.report import print_examination, write_examination, write_json
    from dualenc.utils.urls import redact

    if sample < 1 or workers < 0 or seed < 0 or not 0 <= bad_samples <= 1:
        raise UsageError(
            f"--sample {sample} must be at least 1, --workers {workers} and --seed {seed} at least 0, "
            f"--bad_samples {bad_samples} between 0 and 1"
        )
    if context_length is not None and (tokenizer is None or context_length < 1):
        raise UsageError(f"--context_length {context_length} must be at least 1, and needs --tokenizer")
    vocabulary = None if tokenizer is None else Tokenizer.from_file(tokenizer, sys.maxsize)
    if out is not None:
        make_folder(out, "--out")
    quiet = not sys.stderr.isatty()
    bar = partial(track, description="samples", transient=True, disable=quiet, console=Console(stderr=True))
    found = examine(
        shards,
        captions,
        sample=None if all else sample,
        against=against,
        tokenizer=vocabulary,
        context_length=context_length,
        bad_samples=bad_samples,
        workers=workers,
        seed=seed,
        track=bar,
    )
    result = found.result()
    if json:
        print(dumps(result, indent=2))
    else:
        print_examination(result)
    if out is not None:
        write_json(out, "doctor", result)
        galleries = {
            title: [[(label, found.picture(item)) for label, item in group] for group in groups]
            for title, groups in found.galleries.items()
        }
        marks = {} if context_length is None else {"tokens of a caption": context_length}
        title, command = printable(redact(f"Before a run: {', '.join(shards)}")), printable(command_line())
        page = write_examination(out, title, result, found.distributions, galleries, {"command": command}, marks)
        print(f"report: {page}", file=sys.stderr if json else sys.stdout)
    errors = sum(finding.severity == "error" for finding in found.findings)
    if errors:
        raise WorkError(f"a run on these shards would not start, or would stop: {errors} error{'s' * (errors != 1)}")


def index(shards: list[str], hash: bool = False, workers: int = 2) -> None:
    """Scans shards once, and keeps what lies where beside them; shards elsewhere are read whole.

    Args:
        shards: paths, URLs, globs, brace patterns or folders.
        hash: keep hashes of each image and caption too, for which all of them are read.
        workers: processes that scan.
    """
    import time
    from functools import partial

    import numpy as np
    from rich.progress import track

    from dualenc import ShardIndex
    from dualenc.data.images import IMAGE_EXTENSIONS

    began = time.monotonic()
    found = ShardIndex.build(
        shards,
        anew=True,
        hashes=("piece", "image", "text") if hash else (),
        workers=workers,
        track=partial(track, description="shards", transient=True, disable=not sys.stderr.isatty()),
    )
    seconds = time.monotonic() - began
    print(
        f"{len(found):,} samples in {len(found.parts):,} shard{'s' * (len(found.parts) != 1)}, "
        f"{sum(part.facts['size'] for part in found.parts) / 1e6:,.1f} MB, in {seconds:.1f} s\n"
        f"{int(found.having(IMAGE_EXTENSIONS).sum()):,} with an image, {int(found.having(['txt']).sum()):,} with .txt, "
        f"{int(found.having(['json']).sum()):,} with .json\nfingerprint {found.fingerprint}"
    )
    if hash:
        for name in ("image", "text"):
            hashes = found.hashes(name)
            hashes = hashes[hashes != 0]  # of samples that have one
            print(f"{len(hashes) - len(np.unique(hashes)):,} samples have the same {name} as an earlier one")
    for path in found.files():
        print(f"kept in {path}")


def tokenizer(
    shards: list[str],
    out: Path,
    captions: str = "txt",
    kind: Literal["wordpiece", "bpe", "unigram"] = "wordpiece",
    vocab_size: int = 30_000,
) -> None:
    """Trains a vocabulary on the captions of shards, and says how long they are in its tokens.

    Args:
        shards: paths, globs, brace patterns or folders.
        out: file to write, a .json.
        captions: "txt", or "json.FIELD" for a field of the .json that may list several.
        kind: "wordpiece" as BERT has it, "bpe" on bytes as GPT-2 has it, or "unigram" as SentencePiece has it.
        vocab_size: the most entries.
    """
    import numpy as np

    from dualenc import DataError, ShardIndex, Tokenizer
    from dualenc.data.pairs import all_captions, only_pairs

    if out.suffix != ".json" or out.is_dir():
        raise UsageError(f"{out} must be a .json file")
    make_folder(out.parent, "folder")
    index, left_out = only_pairs(ShardIndex.build(shards), captions)
    unreadable: list[str] = []
    texts = list(all_captions(index, captions, unreadable))
    if not texts:
        raise DataError(f"no sample has a caption that can be read, such as {unreadable[0]}")
    made = Tokenizer.train(texts, vocab_size, sys.maxsize, kind)
    try:
        made.save(out)
    except Exception as error:  # the library raises plain Exception
        raise WorkError(f"{out} cannot be written ({error})") from error
    lengths = np.diff(made(texts).offsets.numpy())
    most, nearly, mean = lengths.max(), int(np.quantile(lengths, 0.99, method="higher")), lengths.mean()
    if left_out:
        print(f"{len(left_out):,} samples have no image or no caption and were left out")
    if unreadable:
        print(f"{len(unreadable):,} samples have no caption that can be read and were left out: {unreadable[0]}")
    print(
        f"{out}: {made.vocab_size:,} entries from {len(texts):,} captions, which take {mean:.1f} tokens in the mean, "
        f"99% of them at most {nearly}, the longest {most}\n"
        f"next: dualenc fit --config run.yaml --data.captions {captions} --data.tokenizer {out} "
        f"--model.text.vocab_size {made.vocab_size} --model.text.context_length {min(most, 512)}"
    )
