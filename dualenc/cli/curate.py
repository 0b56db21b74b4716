"""Commands that score samples, choose among them, and write new shards of the chosen ones."""

from functools import partial
from pathlib import Path
from typing import Any

from dualenc.cli.common import parse_part, writing
from dualenc.utils.arguments import Precision
from dualenc.utils.progress import progress


def score(
    shards: list[str],
    out: Path,
    model: tuple[str, ...] = (),
    captions: str = "auto",
    image: str | None = None,
    part: str | None = None,
    precision: Precision = "fp32",
    workers: int = 2,
    batch_size: int = 64,
) -> None:
    """Write a table for each shard: scores of image and captions, tokens, sizes, hashes, near-duplicates.

    Args:
        shards: paths, globs, brace patterns or folders of shards.
        out: folder for tables in Parquet and embeddings; the same command continues a stopped one, and one with further
            models computes only theirs.
        model: models that score, named after one another or by repeating the option: model directory, run directory, or
            hf-hub:owner/name[@revision]; the first one's embeddings find near-duplicates.
        captions: "auto" for json.captions, as `make-shards` writes them, or else txt; or "txt"; or "json.FIELD".
        image: member that is the image, such as "input.jpg"; by default the .jpg, .jpeg, .png or .webp.
        part: "I/N" to score a part of the shards only, such as 0/8 to 7/8 by eight processes; the call that completes
            the tables also finds the near-duplicates.
        precision: bf16 to compute the towers in it, which is faster.
        workers: processes that decode images.
        batch_size: images embedded at once.
    """
    from dualenc import ShardIndex, load
    from dualenc.curation.score import score_shards
    from dualenc.curation.tables import parquet

    chosen = parse_part(part)
    parquet()  # raises before the work if it is not installed
    with writing(out):
        index = ShardIndex.build(shards, image=image, workers=workers)
        options: dict[str, Any] = {"captions": captions, "part": chosen, "track": progress("images")}
        options |= {"workers": workers, "batch_size": batch_size}
        made = score_shards(index, out, model, partial(load, precision=precision), **options)
    print("\n".join(made.lines()))


def filter(
    table: Path,
    out: Path = Path("kept.select"),
    where: str | None = None,
    dedup: float | None = None,
    against: tuple[str, ...] = (),
    against_similarity: float = 0.95,
    precision: Precision = "fp32",
    workers: int = 2,
) -> None:
    """Choose samples by their scores, without near-duplicates and without pictures of evaluation sets.

    Args:
        table: folder that `dualenc score` wrote.
        out: selection to write: .select for bits of each shard, .txt for keys, .npy for uids; next to it a record with
            the suffix .json, and a folder with the suffix .report for report.html.
        where: conditions on the columns, such as "clip_score > q(0.7) and tokens in 3..64".
        dedup: similarity from which a sample is a duplicate of a better one, such as 0.95.
        against: evaluation sets whose pictures must not be among the samples.
        against_similarity: similarity from which a picture counts as one of an evaluation set.
        precision: precision with which the scores were made; for --against.
        workers: processes that decode the pictures of evaluation sets.
    """
    from dualenc import load
    from dualenc.curation.filter import filter_table
    from dualenc.curation.report import write_report
    from dualenc.curation.tables import read_scores

    bar = progress("images")
    with writing(out):
        result = filter_table(
            table, where, dedup, against, against_similarity, partial(load, precision=precision), workers=workers,
            track=lambda batches: bar(batches, total=len(batches)),
        )  # fmt: skip
        result.save(out)
        page = write_report(result, out.with_suffix(".report"), read_scores(table)["captions"])
    print("\n".join([*result.lines(out), f"report: {page}"]))


def reshard(
    shards: list[str], out: Path, select: str | None = None, shuffle: int | None = None, size: int = 1000
) -> None:
    """Write the selected samples of shards into new shards, byte for byte, in their order or shuffled.

    Args:
        shards: paths, URLs, globs, brace patterns or folders.
        out: folder for 000000.tar ..., their index and reshard.json; repeat the command to continue an interrupted one.
        select: samples to keep: a .select file of `filter`, a .npy of uids, a text file with one key a line, or an
            expression over the fields of .json; by default all of them.
        shuffle: seed of the order of the samples over all shards; by default they keep their order.
        size: samples in each new shard.
    """
    from dualenc.curation.reshard import reshard as write_shards

    with writing(out):
        summary = write_shards(shards, out, select, shuffle=shuffle, size=size, track=progress("shards"))
    print("\n".join(summary.lines()))
