"""Workers that hang, die or get signals: one line names the sample, and no process is left behind."""

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
import dualenc.data.workers as workers_module
from dualenc.data import Loader, PairDataset, ShardIndex
from dualenc.utils.errors import DataError

TOKENIZER = tiny_tokenizer()
FORK = multiprocessing.get_context("fork")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
TIMEOUT = 60  # seconds in which anything ends on a busy machine, unless it hangs
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than this machine has cores
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python >= 3.12
]


@pytest.fixture(autouse=True)
def many_cores(monkeypatch):
    """Let the tests start as many workers as they ask for, whatever the machine has."""
    monkeypatch.setattr(workers_module, "usable_cores", lambda: 64)


@pytest.fixture
def index(tmp_path, seed):
    return ShardIndex.build(write_shards(tmp_path, [20, 13, 15], seed))


@pytest.fixture
def hang(monkeypatch):
    """Return a function that makes decoding hang at a sample, in all workers that start later."""
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


def pairs_of(batch):
    """Return the content of each pair of a batch: image bytes, token ids, row."""
    ids = batch.tokens.padded()[0]
    return [
        (image.numpy().tobytes(), text.tolist(), int(row))
        for image, text, row in zip(batch.images, ids, batch.rows, strict=True)
    ]


def worker_pids():
    return [process.pid for process in multiprocessing.active_children()]


def has_ended(pid):
    """Return whether a process does not exist or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def all_end(pids, seconds):
    """Wait up to `seconds` for processes to end; return whether they have."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not all(map(has_ended, pids)):
        time.sleep(0.05)
    return all(map(has_ended, pids))


def order(index, seed):
    """Return the rows of an epoch in the order of the plan."""
    return [row for batch in loader(index, seed) for row in batch.rows.tolist()]


def test_hanging_sample_is_named(index, seed, hang):
    data_loader = loader(index, seed, workers=2, timeout=2.0)
    expected = [pairs_of(batch) for batch in loader(index, seed)]
    position = seed % len(index)
    sample = index[order(index, seed)[position]]
    hang(sample)
    started = time.monotonic()
    found = []
    message = rf"^no batch for 2 s: worker [01] has been at {sample} for [1-9]\d* s; raise data\.timeout if"
    with pytest.raises(DataError, match=message):
        found.extend(pairs_of(batch) for batch in data_loader)
    assert time.monotonic() - started < TIMEOUT
    assert not worker_pids()
    assert found == expected[: position // 4]


def test_all_hanging_samples_are_named(index, seed, monkeypatch):
    monkeypatch.setattr(pairs_module, "decode_image", lambda image: stop())
    with pytest.raises(DataError, match="5 s: worker") as error:
        list(loader(index, seed, workers=4, timeout=1.5))
    assert str(error.value).count(" has been at ") == 3
    assert " and 1 more workers at others; " in str(error.value)
    assert not worker_pids()


def test_slow_storage_is_told_from_a_hanging_sample(index, seed, monkeypatch):
    real = pairs_module.decode_image

    def slow(data):
        time.sleep(0.2)
        return real(data)

    monkeypatch.setattr(pairs_module, "decode_image", slow)
    with pytest.raises(DataError, match=r"^no batch for 2 s, and no worker hangs: the storage \((.*)\) is ") as error:
        list(loader(index, seed, 24, workers=1, timeout=2))
    assert any(shard in str(error.value) for shard in index.shards)
    assert "data.timeout" in str(error.value)
    assert not worker_pids()


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (signal.SIGKILL, "out-of-memory killer is likely; use fewer workers or smaller batches"),
        (signal.SIGBUS, "/dev/shm is likely full; use fewer workers or smaller batches, or give"),
        (signal.SIGSEGV, ": "),  # the message may name a sample
    ],
)
def test_killed_worker_is_named_when_its_batch_is_awaited(index, seed, number, advice):
    data_loader = loader(index, seed, 2, workers=2)
    batches = iter(data_loader)
    found = [pairs_of(next(batches))]
    victim = worker_pids()[seed % 2]
    os.kill(victim, number)
    assert all_end([victim], TIMEOUT)
    time.sleep(0.1)  # a training step, in which torch's own error would be raised
    with pytest.raises(DataError, match=rf"^data worker [01] \(pid {victim}\) was killed by {number.name}") as error:
        found.extend(map(pairs_of, batches))
    assert advice in str(error.value)
    assert "\n" not in str(error.value)
    assert found == [pairs_of(batch) for batch in loader(index, seed, 2)][: len(found)]
    assert not worker_pids()


def test_sample_of_a_killed_worker_is_named(index, seed, monkeypatch):
    sample = index[seed % len(index)]
    data, real = sample.read("png"), pairs_module.decode_image

    def fatal(image):  # simulates an image that exhausts the memory
        return os.kill(os.getpid(), signal.SIGKILL) if image == data else real(image)

    monkeypatch.setattr(pairs_module, "decode_image", fatal)
    with pytest.raises(DataError, match=f"was killed by SIGKILL at {sample}: the kernel's out-of-memory killer"):
        list(loader(index, seed, workers=2))
    assert not worker_pids()


def test_workers_are_lowered_to_the_cores(index, seed, monkeypatch, capfd):
    """The batches do not depend on it, and one line says so, for all loaders together."""
    monkeypatch.setattr(workers_module, "usable_cores", lambda: 2)
    workers_module._tell_lowered.cache_clear()
    few, none = loader(index, seed, workers=7), loader(index, seed)
    found = []
    for batch in few:
        assert len(worker_pids()) == 2
        found += pairs_of(batch)
    few.close()
    assert found == [pair for batch in none for pair in pairs_of(batch)]
    assert loader(index, seed, workers=7).workers == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("workers:")] == [
        "workers: 2 instead of 7, since this process may use 2 cores"
    ]
    waiting = workers_module.item_loader(list(range(9)), range(9), 5, waiting=True)
    assert waiting.num_workers == 5


def test_other_errors_in_workers_are_raised_unchanged(index, seed):
    with pytest.raises(RuntimeError, match=r"(?s)in DataLoader worker process [01].*RuntimeError: from the transform"):
        list(loader(index, seed, workers=2, transform=failing))
    assert not worker_pids()


def failing(image):
    raise RuntimeError("from the transform")


@pytest.mark.parametrize("starting", [False, True])
def test_workers_ignore_signals_for_the_trainer(index, seed, monkeypatch, starting):
    expected = [pairs_of(batch) for data in [loader(index, seed)] for _ in range(2) for batch in data]
    real = torch.utils.data._utils.worker._worker_loop

    def signaled(*arguments):
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        real(*arguments)

    if starting:
        monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_loop", signaled)
    data_loader = loader(index, seed, workers=2)
    found, first = [], []
    for _ in range(2):
        for batch in data_loader:
            found.append(pairs_of(batch))
            first = first or worker_pids()
            for pid in first if not starting else []:
                for number in SIGNALS:
                    os.kill(pid, number)
    assert found == expected
    assert sorted(worker_pids()) == sorted(first)
    before = time.monotonic()
    data_loader.close()
    assert not worker_pids()
    assert time.monotonic() - before < 3
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    os.kill(os.getpid(), signal.SIGUSR1)  # control: the trainer's process gets them
    signal.signal(signal.SIGUSR1, previous)
    assert received


@pytest.mark.parametrize("how", ["closed", "loop left", "collected"])
def test_hanging_workers_are_killed_without_waiting(index, seed, monkeypatch, how):
    data_loader = loader(index, seed, workers=4)
    batches = iter(data_loader)
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
    pids = worker_pids()
    assert len(pids) == 4
    until = time.monotonic() + TIMEOUT
    while hanging.value < 4 and time.monotonic() < until:
        time.sleep(0.05)
    assert hanging.value == 4
    started = time.monotonic()
    if how == "closed":
        data_loader.close()
    elif how == "loop left":
        batches.close()
    else:
        del data_loader, batches
        gc.collect()
    assert time.monotonic() - started < 15
    assert all(map(has_ended, pids))
    assert not worker_pids()


@pytest.mark.parametrize("cycle", [False, True])
def test_unclosed_loader_ends_its_workers(index, seed, cycle):
    data_loader = loader(index, seed, workers=4)
    list(data_loader)
    pids = worker_pids()
    assert len(pids) == 4
    if cycle:  # left to the garbage collector, which ends the queues before the workers
        data_loader.cycle = data_loader
    started = time.monotonic()
    del data_loader
    gc.collect()
    assert time.monotonic() - started < 15
    assert all(map(has_ended, pids))
    assert not worker_pids()


def hang_in_an_epoch(index, connection):
    """Start a loader, send the ids of its workers, and wait to be killed."""
    batches = iter(loader(index, workers=2))
    next(batches)
    connection.send(worker_pids())
    stop()


def test_workers_end_when_the_main_process_is_killed(index):
    mine, other = FORK.Pipe()
    run = FORK.Process(target=hang_in_an_epoch, args=(index, other))
    run.start()
    pids = mine.recv()
    assert len(pids) == 2
    assert not any(map(has_ended, pids))
    run.kill()
    assert all_end([run.pid], TIMEOUT)  # `join` would wait for the workers too, which have inherited its sentinel
    assert all_end(pids, 15)
    run.join()
    assert run.exitcode == -signal.SIGKILL


PROGRAM = """
import multiprocessing, sys, tempfile, time
folder = tempfile.TemporaryDirectory()  # has a finalizer, so weakref's exit handler runs after multiprocessing's
from test_workers import ShardIndex, loader, pairs_module, stop
hangs, ending = sys.argv[2:]
real, seen = pairs_module.decode_image, []
def decode(image):
    seen.append(1)
    return stop() if hangs == "hangs" and len(seen) > 8 else real(image)
pairs_module.decode_image = decode
data_loader = loader(ShardIndex.build(sys.argv[1]), workers=2)
batches = iter(data_loader)
next(batches)
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
if ending == "raises":
    raise SystemExit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["returns", "raises"])
@pytest.mark.parametrize("hangs", ["hangs", "healthy"])
def test_python_exits_whatever_its_workers_do(tmp_path, index, hangs, ending):
    paths = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), hangs, ending],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert run.returncode == (3 if ending == "raises" else 0), run.stderr
    assert "Error" not in run.stderr
    pids = list(map(int, run.stdout.split()))
    assert len(pids) == 2
    assert all_end(pids, 5)
