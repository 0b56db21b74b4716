"""Remote shards give the batches of local ones, despite faults of the network and the disk, and other processes."""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import string
import sys
import time
import traceback
import types
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers import Shake, forget_copies, tiny_tokenizer, write_shards

import dualenc.data.shards.remote as storage
import dualenc.data.shards.shard as index_module
from dualenc.cli import main
from dualenc.data import Cache, Loader, PairDataset, ShardIndex
from dualenc.data.loading.epoch_plan import EpochPlan
from dualenc.data.loading.prefetch import Prefetch
from dualenc.data.shards.index import expand_shards
from dualenc.data.shards.remote import RemoteFile, StorageError
from dualenc.utils.errors import DataError
from dualenc.utils.urls import folder_of, redact, shown

TOKENIZER = tiny_tokenizer()
FORK = multiprocessing.get_context("fork")  # as workers of a loader start
pytestmark = [
    pytest.mark.usefixtures("here"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python >= 3.12
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),  # of botocore
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # of connections that fsspec keeps open
]


def prints(batch):
    ids, mask, _ = batch.tokens.padded()
    return [
        (hashlib.sha256(image.numpy().tobytes()).hexdigest(), tuple(text[real].tolist()), int(row))
        for image, text, real, row in zip(batch.images, ids, mask, batch.rows, strict=True)
    ]


def epoch(index, *, world=1, workers=0, seed=0, window=2, batch=4):
    """Return the global batches of one epoch, joined from the parts of all ranks."""
    parts = [
        [
            prints(batch)
            for batch in Loader(
                PairDataset(index, "txt", TOKENIZER, Shake(), seed), batch,
                seed=seed, window=window, world=world, rank=rank, workers=workers,
            )
        ]
        for rank in range(world)
    ]  # fmt: skip
    return [[pair for part in step for pair in part] for step in zip(*parts, strict=True)]


def copies(cache):
    """Return the names of the complete files in the cache; the others have a dot."""
    return {path.name for path in (cache / "shards").glob("*") if "." not in path.name}


def held(path):
    """Return the size of a copy in bytes; another process may have just removed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def remains(cache):
    return [path.name for path in (cache / "shards").glob("*.part")]


def remote(web, layout, seed, cache=None, **options):
    """Write shards to a web server; return their index by URL and the index of the local files."""
    paths = write_shards(web.folder, layout, seed)
    (web.folder / "dualenc.index").unlink(missing_ok=True)
    url = f"{web.url}/part-{{000..{len(layout) - 1:03d}}}.tar"
    found = ShardIndex.build(url, rescan=True, cache=cache or Cache(**options))
    return found, paths


# Batches


@pytest.mark.long
@pytest.mark.parametrize("store", ["http", "s3"])
def test_remote_shards_give_the_batches_of_local_ones(tmp_path, web, s3, seed, here, capsys, store):
    names = [Path(path).name for path in write_shards(web.folder, [9, 7, 8, 6], seed)]
    local = ShardIndex.build(sorted(web.folder.glob("*.tar")))
    shutil.move(web.folder / "dualenc.index", tmp_path)
    if store == "http":
        url, gets = f"{web.url}/part-{{000..003}}.tar", web.gets
    else:
        bucket = s3()
        bucket.put(web.folder.glob("*.tar"), "some/folder/")
        url, gets = f"{bucket.url}/some/folder", lambda name: bucket.gets(f"some/folder/{name}")
    main(["index", url, "--workers", "0"])
    assert f"fingerprint {local.fingerprint}" in capsys.readouterr().out
    assert [gets(name) for name in names] == [1] * 4
    assert contents(ShardIndex.build(url)) == contents(local)
    whole = epoch(local, seed=seed)
    assert len({pair for batch in whole for pair in batch}) == 28
    for world in (1, 2):
        for workers in (0, 2) if world == 1 else (2,):
            forget_copies(here)
            before = [gets(name) for name in names]
            assert epoch(ShardIndex.build(url), world=world, workers=workers, seed=seed) == whole
            again = [gets(name) - count for name, count in zip(names, before, strict=True)]
            assert again == [1] * 4  # fetched once, for all ranks and workers
    assert epoch(ShardIndex.build(url), seed=seed + 1) != whole  # the control


def contents(index):
    return [(sample.key, {extension: sample.read(extension) for extension in sample.members}) for sample in index]


def test_patterns(web, s3, seed, tmp_path):
    paths = write_shards(tmp_path / "made", [2, 2, 2], seed)
    bucket = s3()
    bucket.put(paths, "v@1/train/")
    bucket.put(paths[:1], "v@1/train/deeper/")
    bucket.put([tmp_path / "made" / "part-000.tar"], "v@1/other-")
    base = f"{bucket.url}/v@1/train"
    every = [f"{base}/part-00{i}.tar" for i in range(3)]
    assert expand_shards(base) == expand_shards(f"{base}/") == expand_shards(f"{base}/*.tar") == every
    assert expand_shards(f"{base}/part-00[12].tar") == expand_shards(f"{base}/part-00{{1,2}}.tar") == every[1:]
    assert expand_shards(f"{base}/part-00?.tar") == every
    assert expand_shards([every[2], f"{base}/*0.tar"]) == [every[2], every[0]]
    assert expand_shards(f"{web.url}/a-{{00..01}}.tar") == [f"{web.url}/a-00.tar", f"{web.url}/a-01.tar"]
    with pytest.raises(DataError, match=r"none-\*\.tar' match no file"):
        expand_shards(f"{base}/none-*.tar")
    for spec in (f"{web.url}/folder/", f"{web.url}/*.tar", f"{web.url}/[ab].tar"):
        with pytest.raises(DataError, match=r"web servers do not list files: .*\{000000\.\.000099\}"):
            expand_shards(spec)


def test_urls_that_differ_only_in_their_query_are_one_file(web):
    """An index finds files by name, so that the second would silently be read as the first."""
    with pytest.raises(DataError, match="named twice"):
        expand_shards([f"{web.url}/x.tar?part=1", f"{web.url}/x.tar?part=2"])


# Indexes


@pytest.mark.parametrize("made", ["from files", "from URLs"])
def test_an_index_published_with_the_shards(web, s3, seed, here, made):
    """A user without an index finds it. If it was made from local files, it has only the digest of the tar headers."""
    found, paths = remote(web, [4, 5], seed)
    expected = contents(found)
    if made == "from files":
        ShardIndex.build(paths)
    else:
        (kept,) = (here / "index").glob("*.index")
        shutil.copy(kept, web.folder / "dualenc.index")
    bucket = s3()
    bucket.put([*paths, web.folder / "dualenc.index"])
    for url in (f"{web.url}/part-{{000,001}}.tar", f"{bucket.url}/*.tar"):
        shutil.rmtree(here)
        index_module._OPEN_FILES.clear()
        web.log.clear()
        index = ShardIndex.build(url)
        assert set(web.gets()) <= {"dualenc.index"}
        assert contents(index) == expected
        web.log.clear()
        ShardIndex.build(url)  # stored from now on
        assert not web.log


@pytest.mark.parametrize("made", ["from files", "from URLs"])
def test_an_index_published_with_other_shards_is_detected(web, seed, here, made):
    _, paths = remote(web, [4], seed)
    if made == "from files":
        ShardIndex.build(paths)
    else:
        (kept,) = (here / "index").glob("*.index")
        shutil.copy(kept, web.folder / "dualenc.index")
    shutil.rmtree(here)
    size = os.path.getsize(paths[0])
    write_shards(web.folder, [4], seed + 1)
    assert os.path.getsize(paths[0]) == size or made == "from URLs"
    with pytest.raises(StorageError, match=r"part-000\.tar changed since it was indexed; .*dualenc index http"):
        contents(ShardIndex.build(f"{web.url}/part-000.tar"))


def test_a_damaged_published_index_is_named(web, seed, here):
    remote(web, [4], seed)
    shutil.rmtree(here)
    (web.folder / "dualenc.index").write_bytes(b"dualenc index 1\n" + random.randbytes(100))
    with pytest.raises(DataError, match=rf"{web.url}/dualenc\.index is damaged, or"):
        ShardIndex.build(f"{web.url}/part-000.tar")


@pytest.mark.parametrize("fault", ["short", "short unsized", 503, "reset"])
def test_an_incomplete_index_is_requested_again(web, seed, here, fault):
    found, paths = remote(web, [4], seed)
    expected = contents(found)
    ShardIndex.build(paths)
    shutil.rmtree(here)
    web.fail("dualenc.index", fault)
    assert contents(ShardIndex.build(f"{web.url}/part-000.tar")) == expected


@pytest.mark.parametrize("status", [401, 403, 404])
def test_without_an_index_the_error_says_how_to_make_one(web, seed, s3, status):
    paths = write_shards(web.folder, [2], seed)
    web.fail("dualenc.index", status, always=True)
    bucket = s3()
    bucket.put(paths)
    for url in (f"{web.url}/part-000.tar", f"{bucket.url}/part-000.tar"):
        with pytest.raises(DataError, match=r"part-000\.tar has no index: run `dualenc index`"):
            ShardIndex.build(url)
    assert web.gets("part-000.tar") == 0
    assert web.gets("dualenc.index") == 1  # not retried


def test_an_index_that_cannot_be_read_is_not_a_missing_one(web, seed):
    write_shards(web.folder, [2], seed)
    web.fail("dualenc.index", 503, always=True)
    with pytest.raises(StorageError, match=r"dualenc\.index: gave up after 6 tries: the server answers 503"):
        ShardIndex.build(f"{web.url}/part-000.tar")


def test_indexing_fetches_each_shard_once(web, seed, here):
    """This includes hashes, and the split of a run after it."""
    write_shards(web.folder, [6, 6], seed)
    url = f"{web.url}/part-{{000,001}}.tar"
    main(["index", url, "--hash", "--workers", "0"])
    forget_copies(here)
    index = ShardIndex.build(url, hashes=("piece",))
    index.split(0.4)
    assert web.gets() == {"part-000.tar": 1, "part-001.tar": 1}


def test_scanning_with_workers(web, seed):
    paths = write_shards(web.folder, [3] * 5, seed)
    local = ShardIndex.build(paths)
    found = ShardIndex.build(f"{web.url}/part-{{000..004}}.tar", rescan=True, workers=2)
    assert contents(found) == contents(local)
    assert max(web.gets().values()) == 1


def test_a_shard_that_is_not_a_tar_is_named(web, tmp_path):
    (web.folder / "page.tar").write_text("<html>Log in</html>")
    for name, why in (("page.tar", "it is an HTML page"), ("gone.tar", "there is no such file")):
        with pytest.raises(DataError, match=rf"{web.url}/{name}.*{why}"):
            ShardIndex.build(f"{web.url}/{name}", rescan=True)


# Faults of transfers


@pytest.mark.parametrize("fault", [503, 429, 500, 408, "reset", "short", "short unsized", "flip"])
def test_temporary_errors_are_retried(web, seed, here, fault):
    found, _ = remote(web, [4, 4], seed)
    expected = contents(found)
    forget_copies(here)
    web.log.clear()
    web.fail("part-001.tar", fault, fault)
    assert contents(found) == expected
    assert web.gets("part-000.tar") == 1
    assert 2 <= web.gets("part-001.tar") <= 5  # aiohttp itself retries once after a reset connection
    assert not remains(here)


@pytest.mark.parametrize("fault", [503, "reset", "short", "short unsized"])
def test_temporary_errors_are_retried_while_indexing(web, seed, fault):
    paths = write_shards(web.folder, [4], seed)
    web.fail("part-000.tar", fault)
    found = ShardIndex.build(f"{web.url}/part-000.tar", rescan=True)
    assert contents(found) == contents(ShardIndex.build(paths))


@pytest.mark.parametrize("fault", [503, 500, "short"])
def test_temporary_errors_are_retried_on_s3(web, s3, seed, here, fault):
    bucket = s3()
    bucket.put(write_shards(web.folder, [3], seed))
    found = ShardIndex.build(f"{bucket.url}/part-000.tar", rescan=True)
    expected = contents(found)
    forget_copies(here)
    bucket.fail("part-000.tar", fault, fault)
    assert contents(found) == expected
    assert bucket.gets("part-000.tar") >= 3


@pytest.mark.parametrize(
    ("status", "why"), [(403, "denies access"), (401, "denies access"), (404, "no such file"), (400, "400")]
)
def test_permanent_errors_are_not_retried(web, seed, here, status, why):
    found, _ = remote(web, [2], seed)
    forget_copies(here)
    web.log.clear()
    web.fail("part-000.tar", status, always=True)
    with pytest.raises(StorageError, match=rf"^{web.url}/part-000\.tar: .*{why}"):
        found[0].read("txt")
    assert web.gets("part-000.tar") == 1
    assert not remains(here)


@pytest.mark.parametrize("status", [403, 404])
def test_permanent_errors_are_not_retried_on_s3(web, s3, seed, here, status):
    bucket = s3()
    bucket.put(write_shards(web.folder, [2], seed))
    found = ShardIndex.build(f"{bucket.url}/part-000.tar", rescan=True)
    forget_copies(here)
    before = bucket.gets("part-000.tar")
    bucket.fail("part-000.tar", *[status] * 20)
    with pytest.raises(StorageError, match=rf"^{bucket.url}/part-000\.tar: "):
        found[0].read("txt")
    assert bucket.gets("part-000.tar") == before + 1


def test_missing_credentials_are_named(s3, monkeypatch):
    import s3fs

    bucket = s3()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    for url in (f"{bucket.url}/x.tar", f"{bucket.url}/*.tar"):
        with pytest.raises(StorageError, match=r"no credentials found: set AWS_PROFILE"):
            storage.glob_remote(url) if "*" in url else Cache().add(url)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("fault", "why"),
    [(503, "the server answers 503"), ("reset", "(reset by peer|disconnected)"), ("short", "not completed")],
)
def test_the_last_retry_raises_the_cause(web, seed, here, monkeypatch, fault, why):
    waits = []
    found, _ = remote(web, [2], seed)
    forget_copies(here)
    web.fail("part-000.tar", fault, always=True)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(storage, "time", types.SimpleNamespace(sleep=waits.append, time=time.time))
    with pytest.raises(StorageError, match=rf"part-000\.tar: gave up after 6 tries: .*{why}"):
        found[0].read("txt")
    assert len(waits) == 5
    assert all(0.5 * 2**i <= wait <= 2**i for i, wait in enumerate(waits))  # exponential, with random jitter
    assert not copies(here)
    assert not remains(here)


def test_no_server(here, seed):
    with pytest.raises(StorageError, match=r"^http://127\.0\.0\.1:9/x\.tar: gave up after 6 tries: .*[Cc]onnect"):
        Cache().add("http://127.0.0.1:9/x.tar")


@pytest.mark.parametrize("how", ["other bytes", "longer", "a web page"])
def test_a_shard_that_was_replaced_is_refused(web, seed, here, how):
    found, paths = remote(web, [3], seed)
    data = Path(paths[0]).read_bytes()
    remote_file = data.index(b"PNG") + 60
    new = {
        "other bytes": data[:remote_file] + bytes([data[remote_file] ^ 1]) + data[remote_file + 1 :],
        "longer": data + bytes(10240),
        "a web page": b"<html>",
    }[how]
    Path(paths[0]).write_bytes(new)
    assert contents(found)  # the copy is the indexed file
    forget_copies(here)
    web.log.clear()
    changed = r"part-000\.tar changed since it was indexed; .*dualenc index"
    with pytest.raises(StorageError, match=r"part-000\.tar is an HTML page" if how == "a web page" else changed):
        found[0].read("txt")
    assert web.gets("part-000.tar") == 1  # another ETag: the transfer was not damaged
    assert not copies(here)
    assert not remains(here)
    if how != "a web page":
        main(["index", f"{web.url}/part-000.tar", "--workers", "0"])
        assert contents(ShardIndex.build(f"{web.url}/part-000.tar"))


def test_a_truncated_copy_is_fetched_again(web, seed, here):
    found, _ = remote(web, [3], seed)
    expected = contents(found)
    (name,) = copies(here)
    (here / "shards" / name).write_bytes(b"cut")
    index_module._OPEN_FILES.clear()
    assert contents(found) == expected


# The cache


def test_names_in_the_cache_have_no_secrets_and_do_not_depend_on_signatures(web, seed, here):
    write_shards(web.folder, [2], seed)
    found = ShardIndex.build(f"{web.url}/part-000.tar?signature=one", rescan=True)
    (name,) = copies(here)
    assert len(name) == 32
    assert set(name) <= set("0123456789abcdef")
    again = ShardIndex.build(f"{web.url}/part-000.tar?signature=two")
    assert contents(again) == contents(found)
    assert web.gets("part-000.tar") == 1


@pytest.mark.long
def test_the_cache_removes_the_least_recently_used_copies(web, seed, here):
    found, paths = remote(web, [3] * 6, seed)
    forget_copies(here)
    sizes = [os.path.getsize(path) for path in paths]
    cache = Cache(sum(sizes[:3]) + sizes[0] // 2)
    remote_files = [part.remote_file for part in found.parts]
    order = []
    rng = np.random.default_rng(seed)
    for k, i in enumerate(rng.integers(0, 6, 40).tolist()):
        path = cache.path(remote_files[i])
        os.utime(path, (k, k))
        assert hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() == remote_files[i].digest
        order = [j for j in order if j != i] + [i]
        kept = order[-3:]
        assert copies(here) == {remote_files[j].name for j in kept}, k
        assert sum((here / "shards" / name).stat().st_size for name in copies(here)) <= cache.limit
        order = kept


def test_reading_marks_a_copy_as_used(web, seed, here):
    found, paths = remote(web, [3] * 3, seed)
    forget_copies(here)
    size = os.path.getsize(paths[0])
    cache = Cache(2 * size + size // 2)
    for part in found.parts:
        part.cache = cache
    for i in (0, 1):
        found.parts[i].read(0, 1)
        os.utime(here / "shards" / found.parts[i].remote_file.name, (i, i))
    index_module._OPEN_FILES.clear()
    found.parts[0].read(0, 1)
    found.parts[2].read(0, 1)
    assert copies(here) == {found.parts[i].remote_file.name for i in (0, 2)}


def test_kept_copies_are_not_removed(web, seed, here):
    found, paths = remote(web, [3] * 4, seed)
    forget_copies(here)
    size = os.path.getsize(paths[0])
    cache = Cache(2 * size + size // 2)
    remote_files = [part.remote_file for part in found.parts]
    for i in (0, 1):
        cache.path(remote_files[i])
        os.utime(here / "shards" / remote_files[i].name, (i, i))
    cache.path(remote_files[2], keep={remote_files[0].name})
    assert copies(here) == {remote_files[0].name, remote_files[2].name}
    cache.path(
        remote_files[3], keep={remote_files[0].name, remote_files[2].name}
    )  # there is no room for it, so the limit is exceeded by one file
    assert copies(here) == {remote_files[0].name, remote_files[2].name, remote_files[3].name}


@pytest.mark.long
def test_concurrent_transfers_share_the_limit(web, seed, here):
    """Each transfer makes room for its own file and counts those that the others are writing."""
    found, paths = remote(web, [3] * 8, seed)
    forget_copies(here)
    size = os.path.getsize(paths[0])
    cache = Cache(3 * size + size // 2)
    for part in found.parts[5:]:
        cache.path(part.remote_file)
    for path in paths:
        web.fail(Path(path).name, "slow")
    children = [FORK.Process(daemon=True, target=cache.path, args=(part.remote_file,)) for part in found.parts[:3]]
    for child in children:
        child.start()
    deadline = time.monotonic() + 20
    while any(child.is_alive() for child in children):
        assert time.monotonic() < deadline
        whole = sum(held(here / "shards" / name) for name in copies(here))
        parts = [int(name.split(".")[-2]) for name in remains(here)]
        assert whole + sum(parts) <= cache.limit + size
        time.sleep(0.01)
    assert all(child.exitcode == 0 for child in children)
    assert copies(here) == {part.remote_file.name for part in found.parts[:3]}
    assert not remains(here)


def test_files_of_killed_processes_are_removed(web, seed, here):
    found, _ = remote(web, [2], seed)
    forget_copies(here)
    (here / "shards").mkdir(parents=True)
    (here / "shards" / "tmpabc.123456789.part").write_bytes(b"half")
    found[0].read("txt")
    assert not remains(here)


def test_a_full_disk_is_named_and_no_incomplete_file_remains(web, seed, here, monkeypatch):
    found, _ = remote(web, [3], seed)
    forget_copies(here)

    def full(url, path):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        store = types.SimpleNamespace(get_file=full, info=lambda url: {})
        patch.setattr(storage, "_filesystem", lambda url: store)
        for use in (lambda: found[0].read("txt"), lambda: Cache().add(f"{web.url}/part-000.tar")):
            with pytest.raises(StorageError, match=rf"part-000\.tar cannot be stored in {here}/shards: .*cache_gb"):
                use()
            assert not copies(here)
            assert not remains(here)
    assert found[0].read("txt")


def limited(cache, remote_file, queue):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try:
        cache.path(remote_file)
    except StorageError as error:
        queue.put(str(error))


def test_a_file_size_limit_of_the_system(web, seed, here):
    found, _ = remote(web, [3], seed)
    forget_copies(here)
    queue = FORK.SimpleQueue()
    child = FORK.Process(daemon=True, target=limited, args=(Cache(), found.parts[0].remote_file, queue))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert "cannot be stored in" in queue.get()
    assert not copies(here)
    assert not remains(here)


def test_a_cache_that_cannot_be_written_is_named(web, seed, tmp_path, monkeypatch):
    found, _ = remote(web, [2], seed)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/cache.* cannot be written: Not a directory; .*DUALENC_CACHE"):
        Cache(folder=tmp_path / "file" / "cache").path(found.parts[0].remote_file)


# Several processes


def fetch(cache, remote_file, queue):
    queue.put(hashlib.blake2b(cache.path(remote_file).read_bytes(), digest_size=16).hexdigest())


def test_processes_fetch_a_shared_shard_once(web, seed, here):
    found, _ = remote(web, [3], seed)
    forget_copies(here)
    web.log.clear()
    web.fail("part-000.tar", "slow")
    remote_file, queue = found.parts[0].remote_file, FORK.Queue()
    children = [FORK.Process(daemon=True, target=fetch, args=(Cache(), remote_file, queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert [queue.get(timeout=20) for _ in children] == [remote_file.digest] * 3
    for child in children:
        child.join(20)
    assert web.gets("part-000.tar") == 1
    assert not remains(here)


def test_a_kill_during_a_transfer(web, seed, here):
    found, _ = remote(web, [3], seed)
    forget_copies(here)
    web.fail("part-000.tar", "slow")
    remote_file = found.parts[0].remote_file
    child = FORK.Process(daemon=True, target=Cache().path, args=(remote_file,))
    child.start()
    deadline = time.monotonic() + 20
    while not any((here / "shards" / name).stat().st_size for name in (remains(here) if here.exists() else [])):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join(20)
    assert remains(here)
    assert not copies(here)
    before = time.monotonic()
    assert hashlib.blake2b(Cache().path(remote_file).read_bytes(), digest_size=16).hexdigest() == remote_file.digest
    assert time.monotonic() - before < 5
    assert not remains(here)


def hold(seconds):
    time.sleep(seconds)


def test_a_process_forked_during_a_transfer_does_not_keep_the_lock(web, seed, here):
    """It inherits the open lock file. If only closing released the lock, other readers would wait for its end."""
    found, _ = remote(web, [3], seed)
    forget_copies(here)
    cache, child = Cache(), FORK.Process(daemon=True, target=hold, args=(20,))
    with cache._lock(found.parts[0].remote_file.name):
        child.start()
    try:
        waiting = FORK.Process(daemon=True, target=cache.path, args=(found.parts[0].remote_file,))
        waiting.start()
        waiting.join(10)
        assert waiting.exitcode == 0
    finally:
        child.kill()
        child.join(10)


def test_a_copy_that_another_process_removes_is_fetched_again(web, seed, here, monkeypatch):
    """The copy is removed after it was found and before it is opened, since another process needed the room."""
    found, _ = remote(web, [3], seed)
    expected = contents(found)
    real, times = index_module.open_cached, []

    def late(path, inode):
        if not times:
            times.append(1)
            os.unlink(path)
        return real(path, inode)

    index_module._OPEN_FILES.clear()
    monkeypatch.setattr(index_module, "open_cached", late)
    assert contents(found) == expected
    assert times


# Prefetching


def test_shards_are_prefetched_in_the_order_of_the_plan(web, seed, here, monkeypatch):
    monkeypatch.setattr("dualenc.data.loading.prefetch.THREADS", 1)
    found, _ = remote(web, [4] * 8, seed)
    forget_copies(here)
    plan = EpochPlan(found.counts(), seed, 0, 4, 2)
    wanted = [[found.parts[i].facts["name"] for i in plan.shards_of(w)] for w in range(plan.windows)]

    def asked():
        return [name for method, name in web.log if method == "GET"]

    web.log.clear()
    with Prefetch(plan, found, 0) as prefetch:
        for k in range(len(plan)):
            prefetch.advance_to(k)
            window = plan.window_of(k)
            expected = [name for part in wanted[: window + 2] for name in part]  # this window and the next
            deadline = time.monotonic() + 10
            while len(copies(here)) < len(expected):
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(0.01)
            assert asked() == expected
        assert sorted(asked()) == sorted(set(asked()))
    forget_copies(here)
    web.log.clear()
    with Prefetch(plan, found, 4):  # in the middle of an epoch
        deadline = time.monotonic() + 10
        while len(asked()) < 4 and time.monotonic() < deadline:
            time.sleep(0.002)
    window = plan.window_of(4)
    assert asked()[:4] == wanted[window] + wanted[window + 1]


def test_prefetching_stops_with_its_context(web, seed, here, monkeypatch):
    import threading

    monkeypatch.setattr("dualenc.data.loading.prefetch.THREADS", 1)
    found, paths = remote(web, [3] * 6, seed)
    forget_copies(here)
    for path in paths:
        web.fail(Path(path).name, "slow")
    web.log.clear()
    with Prefetch(EpochPlan(found.counts(), seed, 0, 2, 6), found, 0):
        while not web.gets():
            time.sleep(0.005)
    time.sleep(0.05)
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join(10)
            assert not thread.is_alive()
    assert sum(web.gets().values()) <= 2  # only the transfers that had begun


@pytest.mark.long
def test_shards_of_past_windows_make_room(web, seed, here):
    """A cache of a little over two windows is enough for an epoch; a reader that keeps pace fetches a shard once."""
    found, paths = remote(web, [4] * 10, seed)
    sizes = sorted(map(os.path.getsize, paths))
    expected = epoch(found, seed=seed)
    cache = Cache(sum(sizes[-4:]) + sizes[0] // 2)
    for part in found.parts:
        part.cache = cache
    plan = EpochPlan(found.counts(), seed, 0, 4, 2)
    forget_copies(here)
    web.log.clear()
    with Prefetch(plan, found, 0) as ahead:
        for batch in range(len(plan)):
            ahead.advance_to(batch)
            window = plan.window_of(batch)
            wanted = {found.parts[i].remote_file.name for near in (window, window + 1) for i in plan.shards_of(near)}
            deadline = time.monotonic() + 60
            while not wanted <= copies(here) and time.monotonic() < deadline:
                time.sleep(0.002)
            assert wanted <= copies(here)
            for row in plan[batch]:
                found[int(row)].read("txt")
            assert sum(held(path) for path in (here / "shards").iterdir()) <= cache.limit
    assert list(web.gets().values()) == [1] * 10
    for workers in (0, 2):  # workers read ahead, so that some shards may be fetched twice
        forget_copies(here)
        assert epoch(found, seed=seed, workers=workers) == expected


def test_a_window_larger_than_the_cache_is_refused(web, seed):
    found, paths = remote(web, [4] * 4, seed)
    size = os.path.getsize(paths[0])
    for part in found.parts:
        part.cache = Cache(size + size // 2)
    with pytest.raises(DataError, match=r"data\.cache_gb .*the 2 shards of one window take .*lower data\.window"):
        epoch(found, window=2)
    assert epoch(found, window=1)


def test_local_shards_are_not_prefetched(tmp_path, seed):
    import threading

    index = ShardIndex.build(write_shards(tmp_path / "shards", [4, 4], seed))
    with Prefetch(EpochPlan(index.counts(), seed, 0, 2, 2), index, 0):
        assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_reader_raises_the_error_of_a_failed_prefetch(web, seed, here):
    found, _ = remote(web, [4, 4], seed)
    forget_copies(here)
    web.fail("part-001.tar", 404, always=True)
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"part-001\.tar: there is no such file"):
            epoch(found, workers=workers)


# Other stores


class Stand(MemoryFileSystem):
    """A store with another name, in memory."""

    store: dict = {}
    pseudo_dirs = [""]
    asked: list = []

    def get_file(self, rpath, lpath, **options):
        self.asked.append(rpath)
        return super().get_file(rpath, lpath, **options)


@pytest.mark.parametrize(("scheme", "name"), [("gs", "gcs"), ("gcs", "gcs"), ("hf", "hf")])
def test_stores_that_tests_cannot_reach(tmp_path, seed, monkeypatch, here, scheme, name):
    kind = type("Stand", (Stand,), {"store": {}, "pseudo_dirs": [""], "asked": [], "protocol": name})
    real = fsspec.filesystem
    monkeypatch.setattr(fsspec, "filesystem", lambda wanted, **options: kind() if wanted == name else real(wanted))
    paths = write_shards(tmp_path / "made", [3, 4], seed)
    folder = "datasets/owner/name@v1/data" if scheme == "hf" else "bucket/data"
    for path in paths:
        kind().pipe_file(f"{folder}/{Path(path).name}", Path(path).read_bytes())
    url = f"{scheme}://{folder}"
    found = ShardIndex.build(f"{url}/*.tar", rescan=True)
    assert found.shards == [f"{url}/part-000.tar", f"{url}/part-001.tar"]
    assert contents(found) == contents(ShardIndex.build(paths))
    assert kind.asked == [f"{folder}/part-000.tar", f"{folder}/part-001.tar"]
    forget_copies(here)
    assert epoch(ShardIndex.build(url), seed=seed) == epoch(ShardIndex.build(paths), seed=seed)


@pytest.mark.parametrize(("scheme", "module", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs")])
def test_a_missing_library_is_named_with_its_extra(monkeypatch, scheme, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    for url in (f"{scheme}://bucket/x.tar", f"{scheme}://bucket/*.tar"):
        with pytest.raises(DataError, match=rf"{scheme}:// needs an extra: pip install 'dualenc\[{extra}\]'"):
            ShardIndex.build(url, rescan=True)


# Secrets


def secret():
    return "".join(random.choice(string.ascii_letters + string.digits) for _ in range(24))


def test_secrets_are_removed_from_urls_and_texts(seed):
    user, password, query = secret(), secret(), secret()
    base = f"{user}:{password}@host.example:8080"
    for path in ("/a/x.tar", "/{00..12}.tar", "/a,{b,c}.tar", "/a b.tar", "/v@2/x.tar", "/[ab]*.tar"):
        for odd in ("", "'", ",", "]", ")", "&more=", "%2F", "/", "}", '"', "#", "@"):
            url = f"https://{base}{path}?signature={query[:9]}{odd}{query[9:]}"
            assert shown(url) == f"https://host.example:8080{path}"
            hidden = (user, password, query[:9], query[9:])
            assert not any(part in folder_of(url).replace(f"{user}:{password}@", "") for part in hidden)
            texts = [url, f"'{url}' and more", f"x ({url}).", f"- {url}\n- a", json.dumps({"train": [url, url]})]
            for text in texts:
                assert not any(part in redact(text) for part in hidden), text
                assert "host.example" in redact(text)
    for url in ("hf://datasets/o/n@main/x.tar", "s3://b/v@1/x.tar", "s3://b/part-?.tar", "http://h:80/a@b/c.tar"):
        assert shown(url) == redact(url) == url
    assert redact(f"s3://{user}:{password}@bucket/x?versionId={query}") == "s3://bucket/x"
    for odd in "/?#'":
        assert shown(f"https://u:{password}{odd}{query}@host/x.tar") == "https://host/x.tar"
        assert redact(f"see https://u:{password}{odd}{query}@host/x.tar.") == "see https://host/x.tar."
    plain = 'nothing to hide: a@b.c, 3 > 2? yes; C:/x, [1, 2], "q" key?'
    assert redact(plain) == plain


def children():
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.append((path.parent / "cmdline").read_bytes())
        except OSError:
            continue
    return found


@pytest.mark.long
def test_secrets_are_neither_stored_nor_printed(web, seed, here, tmp_path, caplog, capfd):
    """This covers the files and output of a run, and every error."""
    password, signature = secret(), secret()
    web.credentials = f"user:{password}"
    write_shards(web.folder, [20, 20], seed)
    url = web.url.replace("://", f"://user:{password}@")
    spec = f"{url}/part-{{000,001}}.tar?signature={signature}&n=1/2"
    caplog.set_level(logging.DEBUG, "dualenc")

    def clean(text):
        assert password not in text
        assert signature not in text
        return text

    from fits import CONFIGS, SMALL

    config = tmp_path / "run.yaml"
    smoke = next(path for path in CONFIGS if path.stem == "smoke").read_text()
    config.write_text(smoke.replace("train: demo/scenes", f"train: {json.dumps(spec)}"))
    assert signature in config.read_text()
    run = tmp_path / "run"
    start = ["fit", "--config", str(config), *SMALL, "--trainer.max_steps", "2"]
    start += ["--trainer.default_root_dir", str(run)]
    with pytest.raises(SystemExit):
        main(start)
    line = clean(capfd.readouterr().err)
    assert "part-000.tar" in line
    assert "`dualenc index`" in line
    main(["index", spec, "--workers", "0"])
    main(start)
    assert (run / "report.html").is_file()
    spoken = capfd.readouterr()
    clean(spoken.out + spoken.err + caplog.text)
    kept = [path for folder in (run, here) for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "run.json", "report.html", "metrics.csv"} <= {path.name for path in kept}
    assert any(path.suffix == ".ckpt" for path in kept)
    assert any(path.suffix == ".index" for path in kept)
    for path in kept:
        clean(str(path))
        clean(path.read_bytes().decode("latin-1"))
    assert "part-{000,001}.tar" in (run / "config.yaml").read_text()

    # Errors with their printed causes, also from worker processes.
    found = ShardIndex.build(spec)
    for fault in (404, 503, "reset", "short", "flip", "denied"):
        forget_copies(here)
        web.fail("part-000.tar", fault, always=True)
        if fault == "denied":
            web.always.clear()
            web.credentials = "user:other"
        for workers in (0, 1) if fault in (404, 503) else (0,):
            with pytest.raises(DataError) as error:
                epoch(found, workers=workers)
            clean("".join(traceback.format_exception(error.value)))
    for wrong in (f"http://user:{password}@127.0.0.1:9/x.tar?s={signature}", f"http://us er:{password}@h:a/x.tar",
                  f"ftp://user:{password}@h/x.tar", f"http://u:{password}@127.0.0.1:9/*.tar?{signature}"):  # fmt: skip
        with pytest.raises(SystemExit):
            main(["index", wrong])
        clean(capfd.readouterr().err)
    with pytest.raises(SystemExit):
        main([*start, "--data.train", f'{{"wrong": "{spec}"}}'])
    clean(capfd.readouterr().err)
    clean(caplog.text)


def test_secrets_stay_off_the_command_lines_of_workers(web, seed, here):
    signature = secret()
    write_shards(web.folder, [8], seed)
    index = ShardIndex.build(f"{web.url}/part-000.tar?signature={signature}", rescan=True)
    dataset = PairDataset(index, "txt", TOKENIZER, Shake(), seed)
    for _ in Loader(dataset, 4, workers=2):
        lines = children()
        assert lines
        assert not any(signature.encode() in line for line in lines)


def test_a_password_is_used(web, seed):
    web.credentials = "user:right"
    write_shards(web.folder, [2], seed)
    base = web.url.removeprefix("http://")
    assert len(ShardIndex.build(f"http://user:right@{base}/part-000.tar", rescan=True)) == 2
    with pytest.raises(DataError, match=rf"^{web.url}/part-000\.tar: the server denies access \(401\)"):
        ShardIndex.build(f"http://user:wrong@{base}/part-000.tar", rescan=True)


def test_copies_are_identified_by_their_content(web, seed, here):
    """Copies of old shards are not used for new shards with the same names, even if the index was made from files."""
    for k in range(2):
        paths = write_shards(web.folder, [3], seed + k)
        (web.folder / "dualenc.index").unlink(missing_ok=True)
        local = ShardIndex.build(paths)
        shutil.rmtree(here / "index", ignore_errors=True)
        assert contents(ShardIndex.build(f"{web.url}/part-000.tar")) == contents(local)
    assert len(copies(here)) == 2
    base = RemoteFile("s3://a/x", 1, "e", "d", "h")
    assert base.name == base._replace(etag="f").name  # a digest is stronger than the tag of a store
    for other in (base._replace(url="s3://b/x"), base._replace(digest="f"), base._replace(digest="")):
        assert other.name != base.name
    assert base._replace(digest="").name != base._replace(digest="", headers="i").name
