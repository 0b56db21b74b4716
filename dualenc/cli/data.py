"""The commands on shards and captions: plain functions, which `dualenc.cli.parser` parses from their signatures."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dualenc.cli.common import UsageError, WorkError, command_line, config_folder, make_folder, progress, writing

if TYPE_CHECKING:
    from dualenc.data.doctor.checks import Examination


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
    from dualenc.data.prepare.make_shards import make_shards

    with writing(out):
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
            track=progress("pictures"),
        )
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
    from dualenc.data.prepare.shrink import shrink_shards

    with writing(out):
        summary = shrink_shards(shards, out, size=size, quality=quality, workers=workers, track=progress("shards"))
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
    from dualenc import Tokenizer
    from dualenc.data.doctor.checks import examine
    from dualenc.utils.text import plural

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
        track=progress("samples", stderr=True),
    )
    _show(found, shards, context_length, json, out)
    errors = sum(finding.severity == "error" for finding in found.findings)
    if errors:
        raise WorkError(f"a run on these shards would not start, or would stop: {plural(errors, 'error')}")


def _show(found: "Examination", shards: list[str], context_length: int | None, as_json: bool, out: Path | None) -> None:
    """Print what the doctor found, and write it to a folder."""
    from json import dumps

    from dualenc.report import print_examination, write_examination
    from dualenc.utils.files import write_json
    from dualenc.utils.text import printable
    from dualenc.utils.urls import redact

    result = found.result()
    if as_json:
        print(dumps(result, indent=2))
    else:
        print_examination(result)
    if out is None:
        return
    write_json(out / "doctor.json", result)
    galleries = {
        title: [[(label, found.picture(item)) for label, item in group] for group in groups]
        for title, groups in found.galleries.items()
    }
    marks = {} if context_length is None else {"tokens of a caption": context_length}
    title, command = printable(redact(f"Before a run: {', '.join(shards)}")), printable(command_line())
    page = write_examination(out, title, result, found.distributions, galleries, {"command": command}, marks)
    print(f"report: {page}", file=sys.stderr if as_json else sys.stdout)


def index(shards: list[str], hash: bool = False, workers: int = 2) -> None:
    """Scans shards once, and keeps what lies where beside them; shards elsewhere are read whole.

    Args:
        shards: paths, URLs, globs, brace patterns or folders.
        hash: keep hashes of each image and caption too, for which all of them are read.
        workers: processes that scan.
    """
    import time

    import numpy as np

    from dualenc import ShardIndex
    from dualenc.data.images import IMAGE_EXTENSIONS
    from dualenc.utils.text import plural

    began = time.monotonic()
    found = ShardIndex.build(
        shards,
        anew=True,
        hashes=("piece", "image", "text") if hash else (),
        workers=workers,
        track=progress("shards"),
    )
    seconds = time.monotonic() - began
    print(
        f"{len(found):,} samples in {plural(len(found.parts), 'shard')}, "
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
    kind: Literal["wordpiece", "bpe"] = "wordpiece",
    vocab_size: int = 30_000,
) -> None:
    """Trains a vocabulary on the captions of shards, and says how long they are in its tokens.

    Args:
        shards: paths, globs, brace patterns or folders.
        out: file to write, a .json.
        captions: "txt", or "json.FIELD" for a field of the .json that may list several.
        kind: "wordpiece" as in BERT, or "bpe" on bytes as in GPT-2.
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
