"""Benchmark of indexing a shard, against reading it with Python's tarfile and with webdataset."""

import io
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from dualenc.data import ShardIndex
from tools.bench.runner import Side, compare


def index(samples: int = 10_000, image: int = 30_000, rounds: int = 5, out: Path = Path("runs/bench")) -> None:
    """Measure the samples indexed per second, from a tar on disk to an index file; the peers only read the tar.

    Args:
        samples: samples in the shard, each with an image, a caption and a JSON.
        image: bytes of each image.
        rounds: timed rounds of each side.
        out: folder for index.json and index.md.
    """
    with TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.tar"
        data = os.urandom(image)
        with tarfile.open(shard, "w") as tar:
            for number in range(samples):
                for name, content in (("jpg", data), ("txt", b"a photo of a cat"), ("json", b'{"width": 640}')):
                    info = tarfile.TarInfo(f"{number:09d}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        makers = {"tarfile": _tarfile, "webdataset": _webdataset, "dualenc": _ours}
        sides = [Side(name, partial(make, str(shard), samples)) for name, make in makers.items()]
        result = compare("index", "samples", sides, "tarfile", rounds)
    result.settings = {"samples": samples, "image_bytes": image}
    result.notes = [
        f"One shard of {samples:,} samples of three members; images of {image:,} bytes; in the page cache.",
        "dualenc: reads, groups and checks the headers, and writes and syncs `dualenc.index`. tarfile: reads the "
        "headers. webdataset: reads and groups all members with their contents, which it cannot skip.",
    ]
    result.write(out)


def _ours(shard: str, samples: int) -> Callable[[], float]:
    def run() -> float:
        assert len(ShardIndex.build(shard, rescan=True)) == samples
        return samples

    return run


def _tarfile(shard: str, samples: int) -> Callable[[], float]:
    def run() -> float:
        with tarfile.open(shard, "r:") as tar:
            assert sum(1 for _ in tar) == 3 * samples
        return samples

    return run


def _webdataset(shard: str, samples: int) -> Callable[[], float]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def run() -> float:
        with open(shard, "rb") as stream:
            assert sum(1 for _ in group_by_keys(tar_file_expander(iter([{"url": shard, "stream": stream}])))) == samples
        return samples

    return run
