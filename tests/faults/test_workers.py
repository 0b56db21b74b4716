"""Workers that hang, die or are signaled: one line that names where, and nothing stays behind."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import Shake, tiny_tokenizer, write_shards

import dualenc.data.pairs as pairs_module
from dualenc.data import Loader, PairDataset, ShardIndex
from dualenc.utils.errors import DataError

TOKENIZER = tiny_tokenizer()
FORK = multiprocessing.get_context("fork")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
SOON = 60  # seconds in which anything ends on a busy machine; what hangs, hangs for ever
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than this machine has cores
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python >= 3.12
]


@pytest.fixture
def index(tmp_path, seed):
    return ShardIndex.build(write_shards(tmp_path, [20, 13, 15], seed))


@pytest.fixture
def hang(monkeypatch):
    """Makes decoding hang at a sample, in all workers started later."""
    real = pairs_module.decode_image

    def at(sample):
        data = sample.read("png")
        monkeypatch.setattr(pairs_module, "decode_image", lambda image: stop() if image == data else real(image))

    return at


def stop():
    while True:
        time.sleep(3600)


def loader(index, seed=0, batch=4, transform=None, **options):
    dataset = PairDataset(index, "txt", TOKENIZER, transform or Shake(), seed)
    return Loader(dataset, batch, seed=seed, window=2, **options)


def prints(batch):
    """What each pair of a batch holds."""
    ids = batch.tokens.padded()[0]
    return [
        (image.numpy().tobytes(), text.tolist(), int(row))
        for image, text, row in zip(batch.images, ids, batch.rows, strict=True)
    ]


def workers():
    return [process.pid for process in multiprocessing.active_children()]


def gone(pid):
    """No such process, or one that has ended and of which nobody takes note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def all_gone(pids, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until and not all(map(gone, pids)):
        time.sleep(0.05)
    return all(map(gone, pids))


def order(index, seed):
    """The rows of an epoch, as they are read."""
    return [row for batch in loader(index, seed) for row in batch.rows.tolist()]


def test_a_sample_that_hangs_is_named(index, seed, hang):
    each = loader(index, seed, workers=2, timeout=2.0)
    expected = [prints(batch) for batch in loader(index, seed)]
    place = seed % len(index)
    sample = index[order(index, seed)[place]]
    hang(sample)
    started = time.monotonic()
    found = []
    said = rf"^no batch for 2 s: worker [01] has been at {sample} for [1-9]\d* s; raise data\.timeout if"
    with pytest.raises(DataError, match=said):
        found.extend(prints(batch) for batch in each)
    assert time.monotonic() - started < SOON
    assert not workers()
    assert found == expected[: place // 4]


def test_all_that_hang_are_named(index, seed, monkeypatch):
    monkeypatch.setattr(pairs_module, "decode_image", lambda image: stop())
    with pytest.raises(DataError, match="5 s: worker") as error:
        list(loader(index, seed, workers=4, timeout=1.5))
    assert str(error.value).count(" has been at ") == 3
    assert " and 1 more workers at others; " in str(error.value)
    assert not workers()


def test_slow_storage_is_no_hanging_sample(index, seed, monkeypatch):
    real = pairs_module.decode_image

    def slow(data):
        time.sleep(0.2)
        return real(data)

    monkeypatch.setattr(pairs_module, "decode_image", slow)
    with pytest.raises(DataError, match=r"^no batch for 2 s, and no worker hangs: the storage \((.*)\) is ") as error:
        list(loader(index, seed, 24, workers=1, timeout=2))
    assert any(shard in str(error.value) for shard in index.shards)
    assert "data.timeout" in str(error.value)
    assert not workers()


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGKILL, "out-of-memory killer is likely; lower data.workers or data.batch_size"),
        (signal.SIGBUS, "/dev/shm is likely full; lower data.workers or data.batch_size, or give"),
        (signal.SIGSEGV, ": "),  # with a sample, or between two
    ],
)
def test_a_worker_killed_is_reported_where_a_batch_is_waited_for(index, seed, number, says):
    each = loader(index, seed, 2, workers=2)
    batches = iter(each)
    found = [prints(next(batches))]
    victim = workers()[seed % 2]
    os.kill(victim, number)
    assert all_gone([victim], SOON)
    time.sleep(0.1)  # a step of training: torch's own error would come here
    with pytest.raises(DataError, match=rf"^data worker [01] \(pid {victim}\) was killed by {number.name}") as error:
        found.extend(map(prints, batches))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert found == [prints(batch) for batch in loader(index, seed, 2)][: len(found)]
    assert not workers()


def test_a_worker_killed_at_a_sample_names_it(index, seed, monkeypatch):
    sample = index[seed % len(index)]
    data, real = sample.read("png"), pairs_module.decode_image

    def fatal(image):  # as a picture that takes all memory
        return os.kill(os.getpid(), signal.SIGKILL) if image == data else real(image)

    monkeypatch.setattr(pairs_module, "decode_image", fatal)
    with pytest.raises(DataError, match=f"was killed by SIGKILL at {sample}: the kernel's out-of-memory killer"):
        list(loader(index, seed, workers=2))
    assert not workers()


def test_errors_in_workers_pass_as_they_are(index, seed):
    with pytest.raises(RuntimeError, match=r"(?s)in DataLoader worker process [01].*RuntimeError: of the transform"):
        list(loader(index, seed, workers=2, transform=failing))
    assert not workers()


def failing(image):
    raise RuntimeError("of the transform")


@pytest.mark.parametrize("starting", [False, True])
def test_signals_for_the_trainer_do_not_reach_workers(index, seed, monkeypatch, starting):
    expected = [prints(batch) for each in [loader(index, seed)] for _ in range(2) for batch in each]
    real = torch.utils.data._utils.worker._worker_loop

    def signaled(*arguments):
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        real(*arguments)

    if starting:
        monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_loop", signaled)
    each = loader(index, seed, workers=2)
    found, first = [], []
    for _ in range(2):
        for batch in each:
            found.append(prints(batch))
            first = first or workers()
            for pid in first if not starting else []:
                for number in SIGNALS:
                    os.kill(pid, number)
    assert found == expected
    assert sorted(workers()) == sorted(first)
    before = time.monotonic()
    each.close()
    assert not workers()
    assert time.monotonic() - before < 3
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    os.kill(os.getpid(), signal.SIGUSR1)  # the trainer hears them
    signal.signal(signal.SIGUSR1, previous)
    assert received


@pytest.mark.parametrize("way", ["closed", "left", "collected"])
def test_nothing_waits_for_workers_that_hang(index, seed, monkeypatch, way):
    each = loader(index, seed, workers=4)
    batches = iter(each)
    hanging, seen, real = multiprocessing.Value("i"), [], pairs_module.decode_image

    def decode(image):
        seen.append(1)  # each worker has a list of its own
        if len(seen) <= 4:
            return real(image)
        with hanging.get_lock():
            hanging.value += 1
        stop()

    monkeypatch.setattr(pairs_module, "decode_image", decode)
    next(batches)
    pids = workers()
    assert len(pids) == 4
    until = time.monotonic() + SOON
    while hanging.value < 4 and time.monotonic() < until:
        time.sleep(0.05)
    assert hanging.value == 4
    started = time.monotonic()
    if way == "closed":
        each.close()
    elif way == "left":
        batches.close()
    else:
        del each, batches
        gc.collect()
    assert time.monotonic() - started < 15
    assert all(map(gone, pids))
    assert not workers()


@pytest.mark.parametrize("ring", [False, True])
def test_a_loader_that_nobody_closes_ends_its_workers(index, seed, ring):
    each = loader(index, seed, workers=4)
    list(each)
    pids = workers()
    assert len(pids) == 4
    if ring:  # left to the garbage collector, which ends their queues before them
        each.ring = each
    started = time.monotonic()
    del each
    gc.collect()
    assert time.monotonic() - started < 15
    assert all(map(gone, pids))
    assert not workers()


def epochs(index, connection):
    """A run that somebody kills."""
    batches = iter(loader(index, workers=2))
    next(batches)
    connection.send(workers())
    stop()


def test_workers_end_when_the_main_process_is_killed(index):
    mine, other = FORK.Pipe()
    run = FORK.Process(target=epochs, args=(index, other))
    run.start()
    pids = mine.recv()
    assert len(pids) == 2
    assert not any(map(gone, pids))
    run.kill()
    assert all_gone([run.pid], SOON)  # to join it is to wait for its workers, which have its sentinel
    assert all_gone(pids, 15)
    run.join()
    assert run.exitcode == -signal.SIGKILL


PROGRAM = """
import multiprocessing, sys, tempfile, time
folder = tempfile.TemporaryDirectory()  # with it weakref's own end comes after that of multiprocessing
from test_workers import ShardIndex, loader, pairs_module, stop
hangs, left = sys.argv[2:]
real, seen = pairs_module.decode_image, []
def decode(image):
    seen.append(1)
    return stop() if hangs == "hangs" and len(seen) > 8 else real(image)
pairs_module.decode_image = decode
each = loader(ShardIndex.build(sys.argv[1]), workers=2)
batches = iter(each)
next(batches)
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
if left == "raises":
    raise SystemExit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("left", ["ends", "raises"])
@pytest.mark.parametrize("hangs", ["hangs", "healthy"])
def test_python_ends_whatever_its_workers_do(tmp_path, index, hangs, left):
    paths = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), hangs, left],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=SOON,
    )  # fmt: skip
    assert run.returncode == (3 if left == "raises" else 0), run.stderr
    assert "Error" not in run.stderr
    pids = list(map(int, run.stdout.split()))
    assert len(pids) == 2
    assert all_gone(pids, 5)
