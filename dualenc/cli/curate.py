"""The commands that choose data: plain functions, whose signatures `dualenc.cli.parser` turns into options."""

from pathlib import Path

from dualenc.cli.common import writing
from dualenc.utils.progress import progress


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
