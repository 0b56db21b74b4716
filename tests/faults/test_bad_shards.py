"""Broken shards, failing stores and sizes that do not fit: one line, an exit status, no traceback, no hang."""

import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fits import fails, fit
from helpers import Shake, forget_copies, tiny_tokenizer, write_shards, write_tar
from test_bad_samples import SHORT, good, peak, prints

import dualenc.data.shards.remote as storage
from dualenc.cli import main
from dualenc.data import Loader, PairDataset, ShardIndex

TOKENIZER = tiny_tokenizer()
FORK = multiprocessing.get_context("fork")
pytestmark = [
    pytest.mark.usefixtures("here"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


def indexed(web, layout, seed):
    write_shards(web.folder, layout, seed)
    url = f"{web.url}/part-{{000..{len(layout) - 1:03d}}}.tar"
    main(["index", url, "--workers", "0"])
    return url


def remote_fit(folder, url, *more):
    """Return the arguments of a run on remote shards, with a tokenizer, so that training is the first to read them."""
    path = folder / "tokenizer.json"
    TOKENIZER.save(path)
    return fit(folder, *SHORT, "--data.train", url, "--data.tokenizer", str(path), *more)


def no_run(folder):
    """Assert that no step was trained and nothing was written."""
    return not (folder / "run" / "run.json").exists()


def test_two_samples_of_one_key(tmp_path, seed, capsys):
    rng = np.random.default_rng(seed)
    samples = good(rng, 20)
    samples[9]["__key__"] = samples[4]["__key__"]
    write_tar(tmp_path / "shards" / "0.tar", samples)
    line = fails(capsys, fit(tmp_path, *SHORT))
    assert f"0.tar sample '{samples[4]['__key__']}'" in line
    assert "two members .jpg" in line
    assert no_run(tmp_path)


def test_members_of_a_sample_that_are_not_adjacent(tmp_path, seed):
    """All images, then all texts, make the same samples."""
    import io
    import tarfile

    rng = np.random.default_rng(seed)
    samples = good(rng, 12)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for extension in ("jpg", "txt"):
            for sample in samples:
                info = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                info.size = len(sample[extension])
                tar.addfile(info, io.BytesIO(sample[extension]))
    write_tar(tmp_path / "b.tar", samples)
    both = []
    for name in ("a.tar", "b.tar"):
        dataset = PairDataset(ShardIndex.build(str(tmp_path / name)), "txt", TOKENIZER, Shake(), seed)
        both.append([prints(batch) for batch in Loader(dataset, 4, seed=seed)])
    assert both[0] == both[1]
    assert len({row for batch in both[0] for *_, row in batch}) == 12


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_a_truncated_shard(tmp_path, seed, capsys, share):
    paths = write_shards(tmp_path / "shards", [12, 12], seed)
    length = -(-len(Path(paths[1]).read_bytes().rstrip(b"\0")) // 512) * 512  # without its end mark
    os.truncate(paths[1], int(length * share))
    line = fails(capsys, fit(tmp_path, *SHORT))
    assert paths[1] in line
    assert "cut off" in line
    assert no_run(tmp_path)


def test_an_empty_shard(tmp_path, seed, capsys):
    paths = write_shards(tmp_path / "shards", [12, 12], seed)
    Path(paths[0]).write_bytes(b"")
    line = fails(capsys, fit(tmp_path, *SHORT))
    assert paths[0] in line
    assert "empty" in line
    assert no_run(tmp_path)


def test_a_missing_shard(tmp_path, seed, capsys):
    paths = write_shards(tmp_path / "shards", [12, 12], seed)
    os.unlink(paths[1])
    spec = str(tmp_path / "shards" / "part-{000,001}.tar")
    assert f"{paths[1]}' match no file" in fails(capsys, fit(tmp_path, *SHORT, "--data.train", spec))
    assert no_run(tmp_path)


def test_a_shard_that_is_removed_during_a_run(tmp_path, seed, capsys, monkeypatch):
    paths = write_shards(tmp_path / "shards", [12, 12], seed)
    real = Loader.__iter__

    def gone(self):
        Path(paths[1]).unlink(missing_ok=True)
        return real(self)

    monkeypatch.setattr(Loader, "__iter__", gone)
    line = fails(capsys, fit(tmp_path, *SHORT, "--data.workers", "1"), status=1)
    assert line == f"dualenc: error: shard {paths[1]} is gone since it was indexed"


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_shard_that_changed_after_indexing(tmp_path, seed, capsys, monkeypatch, when):
    paths = write_shards(tmp_path / "shards", [12, 12], seed)
    main(["index", str(tmp_path / "shards"), "--workers", "0"])
    real = Loader.__iter__

    def change(self=None):
        write_shards(tmp_path / "shards", [12, 13], seed + 1)
        return self and real(self)

    if when == "before":
        change()
    else:
        monkeypatch.setattr(Loader, "__iter__", change)
    line = fails(capsys, fit(tmp_path, *SHORT), status=2 if when == "before" else 1)
    assert "changed" in line
    assert "dualenc index " in line
    assert any(path in line for path in paths)
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()


def test_a_batch_larger_than_the_data(tmp_path, seed, capsys):
    write_shards(tmp_path / "shards", [12, 12], seed)
    line = fails(capsys, fit(tmp_path, *SHORT, "--data.batch_size", "25"))
    assert "batch size 25" in line
    assert "24 samples" in line


@pytest.mark.parametrize("layout", [[24], [1, 99]])
def test_few_or_uneven_shards_for_many_ranks_and_workers(tmp_path, seed, layout):
    """One shard for two ranks of two workers, or 1 and 99 samples: equal steps on both ranks, each sample once."""
    index = ShardIndex.build(write_shards(tmp_path, layout, seed))
    dataset = PairDataset(index, "txt", TOKENIZER, Shake(), seed)
    ranks = [list(Loader(dataset, 4, seed=seed, rank=rank, world=2, workers=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == sum(layout) // 4
    rows = Counter(row for batches in ranks for batch in batches for row in batch.rows.tolist())
    assert rows == Counter(range(sum(layout)))


# Stores


@pytest.mark.parametrize("fault", [503, "reset", "short"])
def test_a_run_survives_a_temporary_error_of_a_store(web, tmp_path, seed, here, fault):
    url = indexed(web, [12, 12], seed)
    forget_copies(here)
    web.fail("part-001.tar", fault, fault)
    before = web.gets("part-001.tar")
    main(remote_fit(tmp_path, url, "--data.workers", "1"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 4
    assert web.gets("part-001.tar") >= before + 3


@pytest.mark.parametrize(
    ("fault", "why"), [(404, "there is no such file"), (403, "denies access"), (503, "gave up after 6 tries")]
)
def test_a_run_ends_after_a_permanent_error_of_a_store(web, tmp_path, seed, here, capsys, fault, why):
    url = indexed(web, [12, 12], seed)
    forget_copies(here)
    web.fail("part-001.tar", fault, always=True)
    for workers in ("0", "2"):
        run = str(tmp_path / f"run{workers}")
        arguments = remote_fit(tmp_path, url, "--data.workers", workers)
        line = fails(capsys, [*arguments, "--trainer.default_root_dir", run], status=1)
        assert line.startswith(f"dualenc: error: {web.url}/part-001.tar: ")
        assert why in line
        assert not Path(run, "bad_samples.jsonl").exists()


def test_a_replaced_remote_shard(web, tmp_path, seed, here, capsys):
    url = indexed(web, [24], seed)
    forget_copies(here)
    write_shards(web.folder, [24], seed + 1)
    line = fails(capsys, remote_fit(tmp_path, url), status=1)
    shard = f"{web.url}/part-000.tar"
    assert line.startswith(f"dualenc: error: {shard} changed since it was indexed; ")
    assert line.endswith(f"dualenc index {shard}")


def test_remote_shards_without_an_index(web, tmp_path, seed, capsys):
    write_shards(web.folder, [24], seed)
    line = fails(capsys, fit(tmp_path, *SHORT, "--data.train", f"{web.url}/part-000.tar"))
    assert f"{web.url}/part-000.tar" in line
    assert "`dualenc index`" in line
    assert no_run(tmp_path)


def test_a_window_larger_than_the_cache(web, tmp_path, seed, capsys):
    url = indexed(web, [12, 12], seed)
    line = fails(capsys, remote_fit(tmp_path, url, "--data.cache_gb", "0.00001"), status=1)
    assert "data.cache_gb 1e-05" in line
    assert "2 shards" in line
    assert "lower data.window" in line


def test_a_full_disk(web, tmp_path, seed, here, capsys, monkeypatch):
    url = indexed(web, [24], seed)
    forget_copies(here)

    def full(url, path):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    store = types.SimpleNamespace(get_file=full, info=lambda url: {})
    monkeypatch.setattr(storage, "_filesystem", lambda url: store)
    for workers in ("0", "1"):
        arguments = remote_fit(tmp_path, url, "--data.workers", workers)
        line = fails(capsys, [*arguments, "--trainer.default_root_dir", str(tmp_path / workers)], status=1)
        assert f"{web.url}/part-000.tar" in line
        assert str(here / "shards") in line
        assert "disk is full" in line
        assert "data.cache_gb" in line
    assert {path.suffix for path in (here / "shards").iterdir()} <= {".lock"}


def digest_of_epoch(index, seed, queue):
    torch.set_num_threads(1)  # OpenMP's threads are not forked, and the child would wait for them
    digest = hashlib.sha256()
    for batch in Loader(PairDataset(index, "txt", TOKENIZER, Shake(), seed), 4, seed=seed):
        digest.update(repr(prints(batch)).encode())
    queue.put(digest.hexdigest())


def test_two_runs_share_the_copies_of_shards(web, tmp_path, seed, here):
    """They run at the same time with one cache: each shard is fetched once, and both read the same."""
    url = indexed(web, [8, 8, 8], seed)
    local = ShardIndex.build(sorted(map(str, web.folder.glob("*.tar"))))
    forget_copies(here)
    web.log.clear()
    for i in range(3):
        web.fail(f"part-00{i}.tar", "slow")
    queue = FORK.Queue()
    index = ShardIndex.build(url)
    runs = [FORK.Process(daemon=True, target=digest_of_epoch, args=(index, seed, queue)) for _ in range(2)]
    for run in runs:
        run.start()
    found = [queue.get(timeout=30) for _ in runs]
    for run in runs:
        run.join(30)
    digest_of_epoch(local, seed, queue)
    assert found == [queue.get(timeout=30)] * 2
    assert web.gets() == {f"part-00{i}.tar": 1 for i in range(3)}


# Untrusted input


def test_commands_are_never_run(tmp_path, capsys):
    owned = tmp_path / "owned"
    for spec in (f"pipe:touch {owned}", f"pipe:touch {owned}; cat {{0..3}}.tar"):
        line = fails(capsys, fit(tmp_path, *SHORT, "--data.train", spec))
        assert "commands are never run" in line
        assert "pipe:" in line
    assert not owned.exists()
    assert no_run(tmp_path)


def test_a_gzip_bomb_as_a_shard(tmp_path, capsys, web):
    """4 GB of zeros in 4 MB are refused by the first bytes."""
    (tmp_path / "shards").mkdir()
    block = gzip.compress(bytes(1 << 26), 6)
    for folder in (tmp_path / "shards", web.folder):
        (folder / "bomb.tar").write_bytes(block * 64)  # joined gzip files are one
    peak()
    before = peak()
    for arguments in (fit(tmp_path, *SHORT), ["index", f"{web.url}/bomb.tar", "--workers", "0"]):
        line = fails(capsys, arguments)
        assert "bomb.tar" in line
        assert "gzip" in line
    assert peak() - before < 1 << 28
    assert no_run(tmp_path)


@pytest.mark.long
def test_a_run_on_a_glob_that_also_matches_its_index_is_resumed(tmp_path, seed, capsys):
    """`fit` writes `dualenc.index` next to the shards; the next call with `shards/*` finds the same shards."""
    write_shards(tmp_path / "shards", [12, 12], seed)
    command = fit(tmp_path, *SHORT, "--data.train", f"{tmp_path}/shards/*")
    main(command)
    assert (tmp_path / "shards" / "dualenc.index").exists()
    main(["index", f"{tmp_path}/shards/*", "--workers", "0"])
    main(["index", *map(str, sorted((tmp_path / "shards").iterdir())), "--workers", "0"])  # as a shell expands it
    main(["doctor", f"{tmp_path}/shards/*", "--workers", "0"])
    capsys.readouterr()
    main([*command, "--ckpt_path", "auto"])
    assert "was done already, after 4 steps" in capsys.readouterr().err
