import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import write_shards, write_tar, write_texts

from dualenc.data import ShardIndex
from dualenc.data.prepare.shrink import shrink_shards
from dualenc.data.shards.patterns import SHARDS, TEXTS, expand_shards, find_files
from dualenc.data.text.files import TextIndex, expand_files
from dualenc.utils.errors import DataError


def touch(folder, *names):
    """Make empty files in a folder, and return their paths."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [str(folder / name) for name in names]


def every_way(folder):
    """Return the ways to name all files of a folder; the last one is what a shell makes of `folder/*`."""
    names = [str(path) for path in sorted(folder.iterdir()) if path.is_file()]
    return [folder, f"{folder}/", f"{folder}/*", f"{folder}/**", f"{folder}/*.tar", names]


def test_files_that_dualenc_writes_next_to_shards_are_no_shards(tmp_path, seed):
    """The second command on a folder finds the same shards as the first one, however they are named."""
    write_shards(tmp_path / "given", [3, 4], seed)
    shrink_shards(tmp_path / "given", tmp_path / "made", workers=0)
    for folder in (tmp_path / "given", tmp_path / "made"):
        first = ShardIndex.build(f"{folder}/*").fingerprint
        assert (folder / "dualenc.index").exists()
        shards = sorted(map(str, folder.glob("*.tar")))
        assert len(shards) == 2
        assert [expand_shards(way) for way in every_way(folder)] == [shards] * 6
        assert {ShardIndex.build(way, rescan=True).fingerprint for way in every_way(folder)} == {first}
    touch(tmp_path / "made", "unfinished.jsonl", ".part-000.tar-x.part", "part-000.tar.part", ".hidden.tar")
    assert expand_shards(f"{tmp_path}/made/*") == shards


def test_the_output_folder_of_img2dataset(tmp_path, caplog):
    names = [f"{i:05d}{ending}" for i in range(3) for ending in (".tar", ".parquet", "_stats.json")]
    touch(tmp_path, *names)
    tars = [str(tmp_path / name) for name in names if name.endswith(".tar")]
    for way in [*every_way(tmp_path), f"{tmp_path}/{{00000..00002}}.tar"]:
        assert expand_shards(way) == tars
    assert not caplog.records
    (tmp_path / "00001.tar").unlink()  # a gap, as a killed download leaves it
    assert expand_shards(f"{tmp_path}/*") == [tars[0], tars[2]]
    with pytest.raises(DataError, match=r"00001\.tar' match no file"):
        expand_shards(f"{tmp_path}/{{00000..00002}}.tar")


def test_nested_folders_are_named_or_read(tmp_path, caplog):
    c, a, b = touch(tmp_path, "c.tar", "p0/a.tar", "p0/q/b.tar")
    touch(tmp_path, "pictures/1.jpg")  # no shards in it, so that there is nothing to say
    for way in (tmp_path, f"{tmp_path}/*"):
        caplog.clear()
        assert expand_shards(way) == [c]
    for way in (f"{tmp_path}/**", f"{tmp_path}/**/*.tar", f"{tmp_path}/**/*"):
        assert expand_shards(way) == [c, a, b]
    assert expand_shards(f"{tmp_path}/*/") == expand_shards(f"{tmp_path}/*/*.tar") == [a]
    Path(c).unlink()
    with pytest.raises(DataError, match=r"match no file: .*/p0\).*/\*\*' names the files in folders"):
        expand_shards(tmp_path)


def test_what_is_passed_over_is_said_in_one_line(tmp_path, caplog):
    touch(tmp_path, "a.tar", "b.tar.gz", "c.tgz", "d.bin", "e.json", "p0/f.tar", "p1/q/g.tar")
    found = [expand_shards(way) for way in (tmp_path, f"{tmp_path}/*")]
    assert found == [[str(tmp_path / "a.tar")]] * 2
    (record,) = caplog.records  # once for each process
    line = record.getMessage()
    assert "\n" not in line
    for part in ("3 files", "b.tar.gz", "c.tgz", "d.bin", "unpack", "2 folders", "p0", "p1", f"'{tmp_path}/**'"):
        assert part in line
    assert "e.json" not in line
    for pattern in (f"{tmp_path}/*.tar.gz", f"{tmp_path}/*.bin"):
        with pytest.raises(DataError, match="match no file: passed over 1 file"):
            expand_shards(pattern)


def test_a_held_out_set_is_neither_read_nor_offered(tmp_path, caplog):
    touch(tmp_path, "train-000000.tar", "summary.json", "held_out/test/0.tar", "held_out/test/nshards.txt")
    for way in (tmp_path, f"{tmp_path}/*"):
        assert expand_shards(way) == [str(tmp_path / "train-000000.tar")]
    assert not caplog.records


def test_only_the_first_process_of_a_machine_says_it(tmp_path, caplog, monkeypatch):
    touch(tmp_path, "a.tar", "b.zip")
    monkeypatch.setenv("LOCAL_RANK", "1")
    expand_shards(tmp_path)
    assert not caplog.records


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    a, b = touch(tmp_path, "data/a.tar", "data/b.tar")
    text, *_ = touch(tmp_path, "texts/a.txt")
    for way in ("~/data", "~/data/*", "~/data/{a,b}.tar", ["~/data/a.tar", "~/data/b.tar"], Path("~/data")):
        assert expand_shards(way) == [a, b]
    assert expand_files("~/texts/*") == expand_files("~/texts/a.txt") == [text]


def test_brackets_in_local_names(tmp_path):
    a, b, c = touch(tmp_path, "d[1]/a.tar", "d[1]/b[0].tar", "d1/c.tar")
    assert expand_shards(tmp_path / "d[1]") == expand_shards(f"{tmp_path}/d[[]1]/*") == [a, b]
    assert expand_shards(b) == [b]
    assert expand_shards(f"{tmp_path}/d[1]/*.tar") == [c]  # a pattern that matches is a pattern
    shutil.rmtree(tmp_path / "d1")
    assert expand_shards(f"{tmp_path}/d[1]/*.tar") == [a, b]


def test_links_to_folders_do_not_double_shards(tmp_path):
    (a,) = touch(tmp_path, "p0/a.tar")
    (tmp_path / "latest").symlink_to(tmp_path / "p0")
    (found,) = expand_shards(f"{tmp_path}/**")
    assert os.path.realpath(found) == a


def test_a_named_file_needs_no_ending(tmp_path, seed):
    write_shards(tmp_path, [3], seed)
    (tmp_path / "part-000.tar").rename(tmp_path / "shard")
    assert len(ShardIndex.build(tmp_path / "shard")) == 3
    write_tar(tmp_path / "b.tar", [{"__key__": "z", "txt": b"z"}])
    assert len(ShardIndex.build([tmp_path / "shard", tmp_path / "b.tar", tmp_path / "dualenc.index"])) == 4
    with pytest.raises(DataError, match=r"dualenc\.index' match no file: passed over 1 file not named \.tar"):
        ShardIndex.build(tmp_path / "dualenc.index")


def test_text_files(tmp_path, seed, caplog):
    write_texts(tmp_path, seed, 9)
    (tmp_path / "README.md").write_text("read me")
    found = [str(tmp_path / name) for name in ("labels.tsv", "pairs.jsonl", "plain.txt")]
    for way in every_way(tmp_path)[:4]:
        assert expand_files(way) == found
    assert expand_files([*found, str(tmp_path / "README.md")]) == found  # from a shell
    assert not caplog.records
    touch(tmp_path, "more.txt.gz", "deeper/more.txt")
    assert len(TextIndex.build(f"{tmp_path}/*.txt")) == 9
    assert not caplog.records
    assert expand_files(f"{tmp_path}/*") == found
    assert all(part in caplog.text for part in ("more.txt.gz", "1 folder", "deeper"))
    assert expand_files(f"{tmp_path}/**") == sorted([*found, str(tmp_path / "deeper" / "more.txt")])


FOLDERS = ("", "p0/", "p0/q/", "p1/", "p[1]/", "p 2/")
NAMES = ("a.tar", "b.tar", "b[0].tar", "C.TAR", "x.tar.gz", "dualenc.index", "a.json", "n.txt", "odd", "t.tsv")
GLOBS = ("", "/", "/*", "/*.tar", "/**", "/**/*.tar", "/*/*.tar", "/*/", "/[ab].tar", "/?.tar", "/p[[]1]/*", "/p[1]",
         "/p0/**/b*", "/{a,b}.tar", "/p[1]/b[0].tar", "/p 2", "/no*")  # fmt: skip


@pytest.mark.long
def test_local_disks_and_stores_agree(tmp_path, s3, seed):
    """A random tree on a local disk and the same tree in a bucket: equal files for each pattern and kind."""
    rng = np.random.default_rng(seed)
    bucket = s3()
    kept = [f"{folder}{name}" for folder in FOLDERS for name in NAMES if rng.random() < 0.5]
    kept = sorted({*kept, "a.tar", "b.tar", "p[1]/a.tar"})  # full URLs are returned without a look into the store
    for name in kept:
        (path,) = touch(tmp_path / "t", name)
        bucket.put([path], f"t/{os.path.dirname(name)}{'/' if '/' in name else ''}")
    agreed = 0
    for pattern in GLOBS:
        for kind in (SHARDS, TEXTS):
            results = []
            for base in (f"{tmp_path}/t", f"{bucket.url}/t"):
                paths, missing = find_files(base + pattern, kind)
                results.append(([path.removeprefix(base) for path in paths], len(missing)))
            if kind is SHARDS or any(character in pattern for character in "*?") or pattern in ("", "/"):
                assert results[0] == results[1], (pattern, kind.noun)
                agreed += bool(results[0][0])
    assert agreed > 5
    whole = sorted(f"/{name}" for name in kept if name.lower().endswith(".tar"))
    base = f"{bucket.url}/t"
    assert sorted(path.removeprefix(base) for path in find_files(f"{base}/**", SHARDS)[0]) == whole


def test_shards_with_brackets_in_their_keys_are_read(tmp_path, s3, seed, here):
    write_shards(tmp_path / "made", [2, 3], seed)
    bucket = s3()
    bucket.put(sorted((tmp_path / "made").glob("*.tar")), "set [v1]/part[0]/")
    url = f"{bucket.url}/set [v1]/part[0]"
    for way in (url, f"{url}/*.tar", [f"{url}/part-000.tar", f"{url}/part-001.tar"]):
        assert [sample.key for sample in ShardIndex.build(way, rescan=True)] == [f"{i:06d}" for i in range(5)]
    assert ShardIndex.build(url)[4].read("txt") == ShardIndex.build(tmp_path / "made")[4].read("txt")


def test_compressed_shards_in_a_store_are_refused_before_they_are_fetched(web):
    for name in ("a.tar.gz", "a.tgz"):
        with pytest.raises(DataError, match="unpack"):
            expand_shards(f"{web.url}/{name}")
    assert not web.log
