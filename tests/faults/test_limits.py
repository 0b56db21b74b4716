"""Shared memory that is small or full, and a low limit on open files: one line names the limit on every path."""

import errno
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from helpers import Shake, encode, smooth, tiny_embedder, tiny_tokenizer, write_benchmark, write_shards

import dualenc.data.workers as workers_module
from dualenc import BenchmarkSet
from dualenc.cli import main
from dualenc.cli.parser import COMMANDS
from dualenc.data import Loader, PairDataset, ShardIndex
from dualenc.data.prepare.pictures import PictureFiles
from dualenc.data.workers import item_loader, prefetch_that_fits, tensor_bytes
from dualenc.inference.embed_files import write_embeddings
from dualenc.utils.errors import DataError
from dualenc.utils.limits import hits_file_limit
from dualenc.utils.text import one_line

TOKENIZER = tiny_tokenizer()
FORK = multiprocessing.get_context("fork")
IMAGE = 3 * 8 * 8  # bytes of what `Shake` returns
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than this machine has cores
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python >= 3.12
]


@pytest.fixture
def index(tmp_path, seed):
    return ShardIndex.build(write_shards(tmp_path / "shards", [20, 13], seed))


@pytest.fixture
def free(monkeypatch):
    """Return a function that sets the free bytes of shared memory, as far as they can be seen."""

    def free(number):
        status = types.SimpleNamespace(f_bavail=number, f_frsize=1)
        monkeypatch.setattr(workers_module, "os", types.SimpleNamespace(**{**vars(os), "statvfs": lambda path: status}))

    return free


def loader(index, seed=0, batch=4, transform=None, **options):
    dataset = PairDataset(index, "txt", TOKENIZER, transform or Shake(), seed)
    return Loader(dataset, batch, seed=seed, window=2, **options)


def paths(index, folder, seed):
    """Return functions that read the same pictures on each path that passes tensors of workers."""
    embedder = tiny_embedder(seed)
    sets = write_benchmark(folder / "set", seed)
    about = {"what": "features", "made_by": "test", "precision": "fp32", "model": "test", "captions": None, "dims": 2}

    def embed():
        write_embeddings(
            index, folder / "out", about, embedder.preprocess, lambda images: torch.zeros(len(images), 2), workers=2
        )

    return {
        "fit": lambda: list(loader(index, seed, workers=2)),
        "validate": lambda: list(loader(index, seed, workers=2, shuffle=False)),
        "embed": embed,
        "evaluate": lambda: list(BenchmarkSet.open(sets).images(embedder.preprocess, batch_size=4, workers=2)),
    }


def failures(found):
    """Return the error of each path, as the command line prints it; empty where there is none."""
    lines = {}
    for name, call in found.items():
        try:
            call()
            lines[name] = ""
        except DataError as error:
            lines[name] = one_line(error)
    return lines


# Shared memory


def test_prefetch_is_the_largest_that_fits(free, seed):
    for _ in range(200):
        size, workers, prefetch, held, ranks, room = (int(torch.randint(1, high, ())) for high in (9, 5, 6, 4, 3, 200))
        free(room)
        fitting = [n for n in range(1, prefetch + 1) if (n * workers + held) * ranks * size <= room]
        if fitting:
            assert prefetch_that_fits(size, workers, prefetch, held, ranks) == max(fitting)
        else:
            with pytest.raises(DataError, match="/dev/shm"):
                prefetch_that_fits(size, workers, prefetch, held, ranks)
    free(0)
    assert prefetch_that_fits(10**9, 0, 4, 2) == 4  # without workers nothing is shared
    assert prefetch_that_fits(0, 8, 4, 2) == 4


def test_refusal_names_sizes_and_ways_out(free):
    free(5_000_000)
    with pytest.raises(DataError) as error:
        prefetch_that_fits(38_500_000, 8, 4, 2, ranks=2)
    for part in ("5.0 MB", "38.5 MB", "770.0 MB", "16 data workers", "--shm-size=2g", "workers 0"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("fits", [1, 2, 4])
def test_loader_prefetches_less_and_reads_the_same(index, seed, free, capfd, micro, fits):
    size, micro_batches = (4, 1) if micro is None else (3, 2)
    expected = list(loader(index, seed, micro_batch_size=micro))
    free((2 * fits + 2 * micro_batches) * size * IMAGE)
    found = list(loader(index, seed, micro_batch_size=micro, workers=2))
    lines = [line for line in capfd.readouterr().err.splitlines() if "/dev/shm" in line]
    assert len(lines) == (fits < 4)
    assert all(f"prefetch {fits} of 4 batches" in line for line in lines)
    flat = [[part.images for part in (batch if micro else [batch])] for batch in found]
    plain = [[part.images for part in (batch if micro else [batch])] for batch in expected]
    assert all(torch.equal(a, b) for one, other in zip(flat, plain, strict=True) for a, b in zip(one, other))


def test_loader_is_refused_before_it_reads(index, free, monkeypatch):
    ranks = {"rank": 0, "world": 4, "workers": 2}
    free((2 + 2) * IMAGE - 1)
    for place, there in (({}, 4), ({"LOCAL_WORLD_SIZE": "2"}, 2), ({"SLURM_NNODES": "4"}, 1)):
        with monkeypatch.context() as patch:
            for name, value in place.items():
                patch.setenv(name, value)
            with pytest.raises(DataError, match=rf"{2 * there} data workers"):
                loader(index, **ranks)
    loader(index, rank=0, world=4, workers=0)


def test_size_of_a_transform(seed):
    def broken(image):
        raise KeyError("black images")

    before = torch.default_generator.get_state()
    assert tensor_bytes(Shake(5)) == 3 * 5 * 5
    assert tensor_bytes(lambda image: torch.zeros(7, dtype=torch.float64)) == 56
    assert tensor_bytes(broken) == 0
    assert torch.equal(torch.default_generator.get_state(), before)


@pytest.mark.parametrize("path", ["fit", "validate", "embed", "evaluate"])
def test_memory_that_others_fill_is_named(index, tmp_path, seed, monkeypatch, path):
    def full(batch):
        raise RuntimeError(f"unable to allocate shared memory(shm) for file </torch_1>: {os.strerror(28)} (28)")

    monkeypatch.setattr(workers_module, "BatchPickler", types.SimpleNamespace(dumps=full))
    line = failures({path: paths(index, tmp_path, seed)[path]})[path]
    assert line.startswith("/dev/shm is full")
    assert "--shm-size" in line


def test_full_disk_is_not_called_full_memory(index, seed, monkeypatch):
    def full(batch):
        raise OSError(28, os.strerror(28), "/tmp/pymp-1")

    monkeypatch.setattr(workers_module, "BatchPickler", types.SimpleNamespace(dumps=full))
    with pytest.raises(OSError, match="/tmp/pymp-1"):
        list(loader(index, seed, workers=1))


class Unpicklable(torch.utils.data.Dataset):
    def __getitem__(self, number):
        return lambda: number


def test_batch_that_cannot_be_passed_is_an_error():
    with pytest.raises(Exception, match=r"(?i)pickle"):
        list(item_loader(Unpicklable(), [1, 2, 3], 1))


PROGRAM = """
import json, sys
from pathlib import Path
import test_limits as t
import dualenc.data.workers as w
w.SMALL = -1  # the images of this test are so small that they would be copied
index = t.ShardIndex.build(str(Path(sys.argv[1]) / "shards"))
checked = t.failures(t.paths(index, Path(sys.argv[1]) / "1", 0))
w._free_shared_memory = lambda: float("inf")  # the memory is filled after the check
filled = t.failures(t.paths(index, Path(sys.argv[1]) / "2", 0))
filler = open("/dev/shm/filler", "wb", buffering=0)
try:
    while True:
        filler.write(bytes(4096))
except OSError:
    pass
print(json.dumps([checked, filled, t.failures(t.paths(index, Path(sys.argv[1]) / "3", 0))]))
"""


def in_small_memory(size: str, *command: str) -> subprocess.CompletedProcess:
    """Run a command that sees a new /dev/shm of a size."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.long
def test_really_small_and_full_memory(index, tmp_path):
    try:
        if in_small_memory("1m", "true").returncode:
            pytest.skip("file systems cannot be mounted here")
    except FileNotFoundError:
        pytest.skip("unshare is missing")
    # Semaphores fit until the memory is filled, and so do some of the tensors, which take a page each.
    run = in_small_memory("64k", sys.executable, "-c", PROGRAM, str(tmp_path))
    assert run.returncode == 0, run.stderr
    checked, unchecked, filled = json.loads(run.stdout.splitlines()[-1])
    for lines in (checked, unchecked, filled):
        assert all(line.startswith("/dev/shm ") for line in lines.values() if line), lines
        assert lines["fit"], lines  # its batches have many tensors, and all are kept
        assert lines["validate"], lines
    assert all(filled.values()), filled


# Open files


@pytest.mark.parametrize("spare", [0, 6, 14, 22])
@pytest.mark.parametrize("path", ["fit", "evaluate"])
def test_low_limit_of_open_files_is_named(index, tmp_path, seed, spare, path):
    """Check that a loader works or names the limit, wherever it meets it."""
    mine, other = FORK.Pipe()

    def read():
        call = paths(index, tmp_path / "files", seed)[path]
        limit = len(os.listdir("/proc/self/fd")) - 1 + spare
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        other.send(failures({path: call})[path])

    run = FORK.Process(target=read)
    run.start()
    assert mine.poll(60)
    line = mine.recv()
    run.join()
    # Where the set is opened, the line names the cause, to which every command adds the limit; see the next test.
    assert "ulimit -n" in line or hits_file_limit(line) or (spare > 6 and not line)


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, os.strerror(24), "shard.tar"),
        ImportError(f"libtorch.so: cannot open shared object file: {os.strerror(24)}"),
        RuntimeError("received 0 items of ancdata"),
        DataError(f"shard a.tar cannot be read: {os.strerror(24)}"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_low_limit_is_named_by_every_command(monkeypatch, capsys, error):
    def configs(name: str = "") -> None:
        """Fail.

        Args:
            name: nothing.
        """
        raise error

    monkeypatch.setitem(COMMANDS, "configs", configs)
    with pytest.raises(SystemExit) as stop:
        main(["configs"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == (2 if isinstance(error, DataError) else 1)
    assert "ulimit -n" in line
    assert str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) in line.replace(",", "")


def test_other_errors_are_not_taken_for_the_limit(monkeypatch):
    def configs(name: str = "") -> None:
        """Fail.

        Args:
            name: nothing.
        """
        raise KeyError("something else")

    monkeypatch.setitem(COMMANDS, "configs", configs)
    with pytest.raises(KeyError, match="something else"):
        main(["configs"])


def test_an_open_file_too_many_is_not_a_bad_sample(tmp_path, seed):
    """The picture is good, and another time it is read."""
    rng = np.random.default_rng(seed)
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.png").write_bytes(encode(smooth(rng, 8, 9)))
    data = BenchmarkSet.open(str(tmp_path / "set"))
    pictures = PictureFiles(str(tmp_path / "set"))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert data.source.decode(0).shape == (3, 8, 9)  # imports what it needs
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard[1]))  # those of standard input, output and error
    try:
        for read in (lambda: data.source.decode(0), lambda: pictures.read("a/1.png", 0)):
            with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, hard)
    assert pictures.read("a/1.png", 0)
