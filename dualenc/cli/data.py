"""The commands on shards and captions: plain functions, whose signatures `dualenc.cli.parser` turns into options."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dualenc.cli.common import UsageError, WorkError, command_line, config_folder, make_folder, writing
from dualenc.utils.progress import progress

if TYPE_CHECKING:
    from dualenc.data.doctor.checks import Examination


def configs(name: str | None = None) -> None:
    """List the configurations that come with the package, each with the formats of `dualenc export`, or print one.

    Args:
        name: configuration to print, with or without `.yaml`; by default all are listed.
    """
    from dualenc.utils.text import did_you_mean

    found = {path.stem: path for path in sorted(config_folder().glob("*.yaml"))}
    if name is None:
        for stem, path in found.items():
            # The first two lines of each file are comments for this list: they are read without torch.
            about, exports = (line.removeprefix("# ") for line in path.read_text("utf-8").splitlines()[:2])
            print(f"{stem:20} {about}\n{'':20} {exports}")
        print("\nCopy one with `dualenc configs NAME > run.yaml`, edit it, and run `dualenc fit --config run.yaml`.")
    elif name.removesuffix(".yaml") in found:
        print(found[name.removesuffix(".yaml")].read_text("utf-8"), end="")
    else:
        raise UsageError(f"unknown configuration {name!r}: {did_you_mean(name.removesuffix('.yaml'), found)}")


def make_shards(
    source: list[str],
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
    """Write shards from a caption table, COCO captions, Flickr token files, class folders or other shards.

    Args:
        source: table (.csv, .tsv, .jsonl, .parquet), COCO's captions .json, token file of Flickr8k or Flickr30k, a
            folder with one of these, or a folder with a folder of images for each class; or several .parquet files or
            shards, whose images and captions may be in different shards under the same keys.
        out: new folder for train-000000.tar ... and summary.json; repeat the command to continue an interrupted one.
        images: folder that the image paths are relative to; by default it is looked for next to the table.
        image_column: name of the column of image paths, or in .parquet of images, or in shards of the member of the
            image, such as "input.jpg"; it is guessed by default.
        caption_column: name of the column of captions, or in shards of the field of .json; it is guessed
            by default.
        templates: captions of class folders, with {c} for the class name, as a list '["a photo of a {c}.", ...]'.
        val: share of the samples to hold out, by image content, as an evaluation set in OUT/held_out.
        samples: samples per shard.
        seed: seed of the order of the samples.
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
            track=progress("images"),
        )
    print("\n".join(summary.lines()))


def shrink(
    shards: list[str], out: Path, size: int = 256, quality: int = 90, image: str | None = None, workers: int = 2
) -> None:
    """Rewrite shards with smaller images, and all other members unchanged.

    Args:
        shards: paths, globs, brace patterns or folders.
        out: folder for shards of the same names and shrink.json; repeat the command to continue an interrupted one.
        size: maximum length of an image's shorter side in pixels.
        quality: quality of JPEG and lossy WebP, 1 to 100.
        image: member that is the image, such as "input.jpg"; several names are separated by ";"; by default the
            .jpg, .jpeg, .png or .webp.
        workers: processes that rewrite a shard each.
    """
    from dualenc.data.prepare.shrink import shrink_shards

    with writing(out):
        summary = shrink_shards(
            shards, out, size=size, quality=quality, image=image, workers=workers, track=progress("shards")
        )
    print("\n".join(summary.lines()))


def doctor(
    shards: list[str],
    captions: str = "auto",
    image: str | None = None,
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
    """Check shards before a run; exit status 1 if a run on them would fail.

    Args:
        shards: paths, globs, brace patterns or folders.
        captions: "auto" for json.captions, as `make-shards` writes them, or else txt; or "txt"; or "json.FIELD" for a
            field of the .json, which may list several and be nested as in json.meta.caption.
        image: member that is the image, such as "input.jpg"; several names are separated by ";"; by default the
            .jpg, .jpeg, .png or .webp.
        sample: number of pairs to read and decode, drawn from all shards.
        all: check all pairs instead of a sample.
        against: evaluation sets or shards whose images must not be in these shards.
        tokenizer: tokenizer.json or vocab.txt to measure captions in tokens; by default words are counted.
        context_length: context length in tokens, to count the captions that it would truncate.
        bad_samples: share of the pairs that may be bad in the run, at least 10 pairs.
        json: print JSON instead of a table.
        out: folder for doctor.json and report.html.
        workers: processes that read and decode.
        seed: seed of the sample.
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
        image=image,
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
    """Print the findings of `doctor`, and write them to a folder."""
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


def index(shards: list[str], hash: bool = False, image: str | None = None, workers: int = 2) -> None:
    """Scan shards and write an index next to them; remote shards are read whole.

    Args:
        shards: paths, URLs, globs, brace patterns or folders.
        hash: also store hashes of each image and caption, which takes reading all of them.
        image: member that is the image, such as "input.jpg"; several names are separated by ";"; by default the
            .jpg, .jpeg, .png or .webp.
        workers: processes that scan.
    """
    import time

    import numpy as np

    from dualenc import ShardIndex
    from dualenc.utils.text import plural

    began = time.monotonic()
    found = ShardIndex.build(
        shards,
        image=image,
        rescan=True,
        hashes=("piece", "image", "text") if hash else (),
        workers=workers,
        track=progress("shards"),
    )
    seconds = time.monotonic() - began
    print(
        f"{len(found):,} samples in {plural(len(found.parts), 'shard')}, "
        f"{sum(part.facts['size'] for part in found.parts) / 1e6:,.1f} MB, in {seconds:.1f} s\n"
        f"{int(found.having(found.images).sum()):,} with an image, {int(found.having(['txt']).sum()):,} with .txt, "
        f"{int(found.having(['json']).sum()):,} with .json\nfingerprint {found.fingerprint}"
    )
    if hash:
        for name in ("image", "text"):
            hashes = found.hashes(name)
            hashes = hashes[hashes != 0]  # 0 stands for samples without an image or caption
            print(f"{len(hashes) - len(np.unique(hashes)):,} samples have the same {name} as an earlier one")
    for path in found.files():
        print(f"index file: {path}")


def tokenizer(
    shards: list[str],
    out: Path,
    captions: str = "auto",
    image: str | None = None,
    kind: Literal["wordpiece", "bpe"] = "wordpiece",
    vocab_size: int = 30_000,
) -> None:
    """Train a tokenizer on the captions of shards, and print the lengths of the captions in tokens.

    Of more than a million captions, a million are drawn evenly from all shards.

    Args:
        shards: paths, globs, brace patterns or folders.
        out: .json file to write.
        captions: "auto" for json.captions, as `make-shards` writes them, or else txt; or "txt"; or "json.FIELD" for a
            field of the .json, which may list several and be nested as in json.meta.caption.
        image: member that is the image, such as "input.jpg"; several names are separated by ";"; by default the
            .jpg, .jpeg, .png or .webp.
        kind: "wordpiece" as in BERT, or "bpe" on bytes as in GPT-2.
        vocab_size: maximum number of entries.
    """
    import numpy as np

    from dualenc import DataError, ShardIndex, Tokenizer
    from dualenc.data.pairs import all_captions, only_pairs
    from dualenc.data.shards.sample import image_argument
    from dualenc.data.text.training_texts import MAX_TEXTS, draw_texts, spread_samples
    from dualenc.utils.text import plural

    if out.suffix != ".json" or out.is_dir():
        raise UsageError(f"{out} must be a .json file")
    make_folder(out.parent, "folder")
    index, left_out = only_pairs(ShardIndex.build(shards, image=image), captions)
    unreadable: list[str] = []
    texts = draw_texts(all_captions(spread_samples(index, MAX_TEXTS, 0), captions, unreadable), MAX_TEXTS, 0)
    if not texts:
        raise DataError(f"no caption can be read; the first one that fails: {unreadable[0]}")
    trained = Tokenizer.train(texts, vocab_size, sys.maxsize, kind)
    try:
        trained.save(out)
    except Exception as error:  # the library raises plain Exception
        raise WorkError(f"{out} cannot be written ({error})") from error
    lengths = np.diff(trained(texts).offsets.numpy())
    longest, percentile, mean = lengths.max(), int(np.quantile(lengths, 0.99, method="higher")), lengths.mean()
    fewer = f", as many as the captions give of {vocab_size:,}," if trained.vocab_size < vocab_size else ""
    drawn = f", drawn from {plural(len(index), 'sample')}" if len(texts) == MAX_TEXTS else ""
    chosen = "" if captions == "auto" else f" --data.captions {shlex.quote(captions)}"
    if left_out:
        print(f"{len(left_out):,} samples have no image or no caption and were left out")
    if unreadable:
        print(f"{len(unreadable):,} samples have no readable caption and were left out, such as {unreadable[0]}")
    print(
        f"{out}: {trained.vocab_size:,} entries{fewer} from {len(texts):,} captions{drawn}, with {mean:.1f} tokens on "
        f"average, at most {percentile} in 99% of them, and {longest} in the longest\n"
        f"next: dualenc fit --config run.yaml{chosen}{image_argument(index.images)} "
        f"--data.tokenizer {shlex.quote(str(out))} --model.text.context_length {min(longest, 512)}"
    )
