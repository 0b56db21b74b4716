"""New shards of chosen samples: the same bytes, in order or shuffled, however often the writing is killed."""

import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import forget_copies, write_shards, write_tar

import dualenc.curation.reshard as reshard_module
from dualenc.cli import main
from dualenc.curation.reshard import reshard
from dualenc.data import Cache, ShardIndex
from dualenc.data.shards.selection import Selection
from dualenc.utils.errors import DataError

FORMATS = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
Records = list[tuple[tarfile.TarInfo, bytes]]


def draw(folder: Path, rng: np.random.Generator, layout: tuple[int, ...] = (5, 1, 0, 8, 4), same: bool = False) -> None:
    """Write shards of all formats of tar: long names, other scripts, other owners, members that are not adjacent.

    Args:
        folder: folder to write.
        rng: generator.
        layout: number of samples in each shard.
        same: whether the shards use the same keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for i, count in enumerate(layout):
        form = FORMATS[i % 3]
        rows = []
        for j in range(count):
            long = f"{'d' * 90}/{'n' * 90}" if form == tarfile.USTAR_FORMAT else f"{'long' * 40}/{'é' * 90}"
            name = j if same else number
            key = [f"k{name}", f"{long}{name}", f"a b/{name}", f"./{name}" if form else f"猫{name}"][number % 4]
            rows += [
                (f"{key}.{end}", rng.bytes(int(rng.choice([0, 1, 511, 512, 513, 3000])))) for end in ("JPG", "txt")
            ]
            rows.append((f"{key}.json", json.dumps({"uid": f"{number:032x}", "n": number}).encode()))
            number += 1
        rows = [rows[k] for k in rng.permutation(len(rows))] if i % 2 else rows
        attributes = {"comment": "about all"} if form == tarfile.PAX_FORMAT else {}
        with tarfile.open(folder / f"part-{i}.tar", "w", format=form, pax_headers=attributes) as tar:
            for k, (name, data) in enumerate(rows):
                info = tarfile.TarInfo(name)
                info.size, info.mode, info.uid, info.uname = len(data), 0o640, 1000 + k, "somebody"
                info.mtime = 1_700_000_000 + k + (0.25 if form == tarfile.PAX_FORMAT else 0)  # type: ignore[assignment]
                tar.addfile(info, io.BytesIO(data))
                if k == 1:  # members without a sample
                    tar.addfile(tarfile.TarInfo(".hidden"))
                    folder_info = tarfile.TarInfo("folder")
                    folder_info.type = tarfile.DIRTYPE
                    tar.addfile(folder_info)


def records(path: Path) -> Records:
    """Read the members of a tar with the standard library."""
    with tarfile.open(path) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar if info.isfile()]  # type: ignore[union-attr]


def samples(paths: list[Path]) -> list[tuple[str, Records]]:
    """Return the samples of shards in the order of their first members, by webdataset's rule for keys."""
    found = []
    for path in paths:
        groups: dict[str, Records] = {}
        for info, data in records(path):
            head, slash, base = info.name.rpartition("/")
            key, dot, _ = base.partition(".")
            if key and dot:
                groups.setdefault(f"{head}{slash}{key}", []).append((info, data))
        found += list(groups.items())
    return found


def about(group: Records) -> list[tuple[Any, ...]]:
    return [(info.name, info.mode, info.uid, info.uname, info.mtime, data) for info, data in group]


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder; the index holds the times of the shards, and is compared by what it says."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "dualenc.index"}
    return {**found, "index": ShardIndex.load(folder / "dualenc.index").fingerprint.encode()}


@pytest.mark.parametrize("shuffle", [None, 0, 7])
def test_chosen_samples_are_copied_with_their_headers(tmp_path: Path, seed: int, shuffle: int | None) -> None:
    rng = np.random.default_rng(seed)
    draw(tmp_path / "in", rng)
    index, before = ShardIndex.build(str(tmp_path / "in")), samples(tars(tmp_path / "in"))
    assert [key for key, _ in before] == [sample.key for sample in index]
    for share in (0.4, 1.0):
        rows = np.flatnonzero(rng.random(len(index)) < share)
        rows = rows if len(rows) else np.array([3])
        size, out = int(rng.integers(1, 9)), tmp_path / f"out-{share}"
        done = reshard(str(tmp_path / "in"), out, Selection.of_index(index.take(rows)), shuffle=shuffle, size=size)
        after = samples(tars(out))
        wanted = [(key, about(group)) for key, group in (before[i] for i in rows)]
        found = [(key, about(group)) for key, group in after]
        if shuffle is None:
            assert found == wanted
        else:
            assert sorted(found) == sorted(wanted)
        counts = [len(samples([path])) for path in tars(out)]
        assert counts[:-1] == [size] * (len(counts) - 1)
        assert (done.samples, done.shards, done.renamed) == (len(rows), len(counts), False)
        for path in tars(out):  # a tar of whole records, as other programs expect
            assert path.stat().st_size % 10240 == 0
    if shuffle is None:
        return
    again = reshard(str(tmp_path / "in"), tmp_path / "again", "n >= 0", shuffle=shuffle, size=size)
    assert contents(tmp_path / "again")["000000.tar"] == contents(out)["000000.tar"]
    assert again.shuffled
    reshard(str(tmp_path / "in"), tmp_path / "other", "n >= 0", shuffle=shuffle + 1, size=size)
    assert [key for key, _ in samples(tars(tmp_path / "other"))] != [key for key, _ in after]


def test_headers_are_the_same_bytes(tmp_path: Path, seed: int) -> None:
    """Of one shard with all its samples in order, without the global header and foreign members, nothing differs."""
    rng = np.random.default_rng(seed)
    for form in FORMATS:
        source = tmp_path / f"{form}" / "a.tar"
        source.parent.mkdir()
        with tarfile.open(source, "w", format=form) as tar:
            for i in range(5):
                info = tarfile.TarInfo(f"{'d' * 80}/{'n' * 70}{i}.txt" if i % 2 else f"{i}.txt")
                info.size = int(rng.integers(2000))
                info.mtime = 0.5 if form == tarfile.PAX_FORMAT else 5  # type: ignore[assignment]
                tar.addfile(info, io.BytesIO(rng.bytes(info.size)))
        index = ShardIndex.build(str(source))
        reshard(str(source), tmp_path / f"out-{form}", [sample.key for sample in index])
        assert (tmp_path / f"out-{form}" / "000000.tar").read_bytes() == source.read_bytes()


def test_a_shuffle_is_over_the_whole_selection(tmp_path: Path, seed: int) -> None:
    """Samples of every old shard reach new shards far away, unlike with a buffer."""
    write_shards(tmp_path / "in", [100] * 4, seed)
    reshard(str(tmp_path / "in"), tmp_path / "out", "number >= 0", shuffle=seed, size=100)
    order = [int(key) for key, _ in samples(tars(tmp_path / "out"))]
    assert sorted(order) == list(range(400))
    for start in range(0, 400, 100):  # 25 of each quarter are expected; 5 or fewer has a probability below 1e-6
        assert min(Counter(number // 100 for number in order[start : start + 100]).values()) > 5


def test_keys_that_shards_share_get_the_name_of_their_shard(tmp_path: Path, seed: int, capsys: Any) -> None:
    rng = np.random.default_rng(seed)
    draw(tmp_path / "in", rng, (3, 0, 3, 3), same=True)
    for name in ("part-2.tar", "part-3.tar"):
        shutil.copy(tmp_path / "in" / "part-0.tar", tmp_path / "in" / name)
    before = [(path.stem, key, group) for path in tars(tmp_path / "in") for key, group in samples([path])]
    main(["reshard", str(tmp_path / "in"), str(tmp_path / "out"), "--select", "n >= 0", "--size", "4"])
    assert "share a key" in capsys.readouterr().out
    after = samples(tars(tmp_path / "out"))
    assert [key for key, _ in after] == [f"{stem}/{key}" for stem, key, _ in before]
    for (stem, _, old), (_, new) in zip(before, after, strict=True):
        wanted = [(f"{stem}/{name[:-3]}{name[-3:].lower()}", *rest) for name, *rest in about(old)]
        wanted = [(*row[:4], int(row[4]), row[5]) for row in wanted]
        assert about(new) == wanted
    # Where the shards have one name, too, their number is put in front.
    for name in "ab":
        shutil.copytree(tmp_path / "in", tmp_path / name, ignore=shutil.ignore_patterns("*.index", "part-[123].tar"))
    sources = [str(tmp_path / name / "part-0.tar") for name in "ab"]
    assert reshard(sources, tmp_path / "both", "n >= 0").renamed
    assert {key.partition("/")[0] for key, _ in samples(tars(tmp_path / "both"))} == {"0-part-0", "1-part-0"}


# Stops


def run_killed(work: Callable[[], Any], at: int) -> tuple[bool, int]:
    """Run work in a child that kills itself before the event `at`; return whether it finished, and its events.

    The events are what CPython audits: opened, renamed and removed files, made folders; and each write of this module.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def event(name: str, arguments: Any = ()) -> None:
            nonlocal count
            if name in ("open", "os.rename", "os.remove", "os.mkdir", "os.utime", "os.chmod", "write"):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            append, header = reshard_module.append_lines, reshard_module._Writer._header
            reshard_module.append_lines = lambda *args, **more: (event("write"), append(*args, **more), event("write"))
            reshard_module._Writer._header = lambda *args: (event("write"), header(*args))[1]  # type: ignore[assignment]
            sys.addaudithook(event)
            work()
            os.write(writer, str(count).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        told = file.read()
    os.waitpid(child, 0)
    return bool(told), int(told or 0)


@pytest.mark.parametrize("shuffle", [None, 3])
def test_killed_at_any_moment(tmp_path: Path, seed: int, shuffle: int | None) -> None:
    rng, choose = np.random.default_rng(seed), random.Random(seed)
    draw(tmp_path / "in", rng, (6, 3, 7))
    ShardIndex.build(str(tmp_path / "in"))

    def work(out: Path) -> Any:
        return lambda: reshard(str(tmp_path / "in"), out, "n != 4", shuffle=shuffle, size=4)

    work(tmp_path / "warm")()  # what is imported at the first use is no event of a run
    finished, events = run_killed(work(tmp_path / "whole"), -1)
    assert finished
    assert events > 60
    assert contents(tmp_path / "warm") == contents(tmp_path / "whole")
    kills = 0
    for round_ in range(3):
        out = tmp_path / f"out-{round_}"
        while not run_killed(work(out), choose.randrange(1, events + 1))[0]:
            kills += 1
        assert contents(out) == contents(tmp_path / "whole")
    for at in choose.sample(range(1, events + 1), 20):  # one kill, then one run to the end
        out = tmp_path / f"once-{at}"
        kills += not run_killed(work(out), at)[0]
        work(out)()
        assert contents(out) == contents(tmp_path / "whole"), at
    assert kills >= 15


def test_a_lost_shard_is_written_again(tmp_path: Path, seed: int) -> None:
    draw(tmp_path / "in", np.random.default_rng(seed))
    options: dict[str, Any] = {"select": "n >= 0", "size": 4}
    reshard(str(tmp_path / "in"), tmp_path / "out", **options)
    before = contents(tmp_path / "out")
    assert reshard(str(tmp_path / "in"), tmp_path / "out", **options).finished_before
    (tmp_path / "out" / "000001.tar").unlink()
    (tmp_path / "out" / "000002.tar").write_bytes(b"")
    assert not reshard(str(tmp_path / "in"), tmp_path / "out", **options).finished_before
    assert contents(tmp_path / "out") == before


def test_what_is_not_what_was_written_is_found(tmp_path: Path, seed: int, monkeypatch: Any, capsys: Any) -> None:
    """A disk that loses a bit, in the data or in a name: the command fails, and leaves no such shard."""
    draw(tmp_path / "in", np.random.default_rng(seed))
    scan = reshard_module.scan
    for place in ("data", "name"):

        def spoiled(path: str, *args: Any, place: str = place) -> Any:
            data = bytearray(Path(path).read_bytes())
            with tarfile.open(path) as tar:
                info = next(info for info in tar if info.size)
            if place == "data":
                data[info.offset_data] ^= 1
            else:
                header = info.offset_data - 512
                data[header] ^= 1
                data[header + 148 : header + 156] = b"%06o\0 " % (
                    sum(data[header : header + 512]) - sum(data[header + 148 : header + 156]) + 256
                )
            Path(path).write_bytes(data)
            return scan(path, *args)

        monkeypatch.setattr(reshard_module, "scan", spoiled)
        with pytest.raises(SystemExit) as stop:
            main(["reshard", str(tmp_path / "in"), str(tmp_path / place), "--select", "n >= 0"])
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert "000000.tar: it does not hold what was written" in error
        assert not tars(tmp_path / place)


# Sources


def test_remote_shards(tmp_path: Path, web: Any, seed: int, here: Path) -> None:
    rng = np.random.default_rng(seed)
    draw(web.folder, rng)
    index = ShardIndex.build(str(web.folder))
    rows = np.flatnonzero(rng.random(len(index)) < 0.6)
    Selection.of_index(index.take(rows)).save(tmp_path / "a.select", index)
    url = f"{web.url}/part-{{0..4}}.tar"
    reshard(str(web.folder), tmp_path / "local", str(tmp_path / "a.select"), shuffle=1, size=5)
    forget_copies(here)
    reshard(url, tmp_path / "out", str(tmp_path / "a.select"), shuffle=1, size=5)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_shuffle_that_the_cache_cannot_hold_is_refused(tmp_path: Path, web: Any, seed: int, monkeypatch: Any) -> None:
    draw(web.folder, np.random.default_rng(seed))
    ShardIndex.build(str(web.folder))
    monkeypatch.setattr(reshard_module, "Cache", lambda: Cache(limit=1))
    with pytest.raises(DataError, match="do not fit the cache"):
        reshard(f"{web.url}/part-{{0..4}}.tar", tmp_path / "out", "n >= 0", shuffle=1)


# Mistakes


def test_mistakes(tmp_path: Path, seed: int, capsys: Any) -> None:
    rng = np.random.default_rng(seed)
    draw(tmp_path / "in", rng)
    draw(tmp_path / "other", np.random.default_rng(seed + 1))
    index = ShardIndex.build(str(tmp_path / "in"))
    Selection.of_index(index.take(np.arange(5))).save(tmp_path / "a.select", index)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "keys.txt").write_text("k0\nk00\n")

    def fails(shards: str, out: str, *options: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["reshard", str(tmp_path / shards), str(tmp_path / out), *options])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.count("\n") == 1
        return error

    assert "selects 0 of 18" in fails("in", "out", "--select", "n > 100")
    assert "'k00'" in fails("in", "out", "--select", str(tmp_path / "keys.txt"))
    assert "another part-0.tar" in fails("other", "out", "--select", str(tmp_path / "a.select"))
    assert "did not write" in fails("in", "full", "--select", "n >= 0")
    assert "size 0" in fails("in", "out", "--select", "n >= 0", "--size", "0")
    assert "shuffle -1" in fails("in", "out", "--select", "n >= 0", "--shuffle", "-1")
    assert not (tmp_path / "out").exists()
    main(["reshard", str(tmp_path / "in"), str(tmp_path / "out"), "--select", str(tmp_path / "a.select")])
    said = capsys.readouterr().out
    assert f"next: dualenc fit --config run.yaml --data.train {tmp_path / 'out'}" in said
    assert "5 of 18 samples" in said
    for options in (["n < 3"], ["n < 5", "--size", "2"], ["n < 5", "--shuffle", "0"]):
        assert "was begun with" in fails("in", "out", "--select", *options)
    assert "is the folder of shards" in fails("out", "out", "--select", "n < 5")
    assert "was begun with another selection" in fails("in", "out")
    assert "was begun with" in fails("in/part-0.tar", "out", "--select", "n < 5")
    main(["reshard", str(tmp_path / "in"), str(tmp_path / "out"), "--select", "n < 5"])  # the same samples
    assert "was finished before" in capsys.readouterr().out
    (tmp_path / "out" / "reshard.json").write_text("[]")
    assert "was not written by reshard" in fails("in", "out", "--select", "n < 5")


def test_a_shard_that_changes_meanwhile_is_refused(tmp_path: Path, seed: int) -> None:
    draw(tmp_path / "in", np.random.default_rng(seed))
    write_tar(tmp_path / "new.tar", [{"__key__": "x", "txt": b"x"}])

    def track(items: Any) -> Any:
        for number, item in enumerate(items):
            if number == 1:
                shutil.copy(tmp_path / "new.tar", tmp_path / "in" / "part-4.tar")
            yield item

    with pytest.raises(DataError, match=r"part-4\.tar changed since it was indexed"):
        reshard(str(tmp_path / "in"), tmp_path / "out", "n >= 0", size=5, track=track)
