import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from helpers import encode, forget_copies, pixels, write_shards, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

import dualenc.data.shards.index as shards_module
import dualenc.data.shards.shard as index_module
from dualenc.data import ShardIndex
from dualenc.data.shards.patterns import expand_shards
from dualenc.data.shards.shard import MAGIC, scan
from dualenc.data.shards.tar import Member
from dualenc.data.text.files import TextIndex
from dualenc.utils.errors import DataError


def contents(index):
    return [(sample.key, {extension: sample.read(extension) for extension in sample.members}) for sample in index]


def by_webdataset(paths):
    """Read the samples of the same shards with webdataset, without decoding."""
    with ExitStack() as stack:  # webdataset does not close the files that it opens
        shards = [{"url": str(path), "stream": stack.enter_context(open(path, "rb"))} for path in paths]
        return [
            (sample["__key__"], {name: value for name, value in sample.items() if not name.startswith("__")})
            for sample in group_by_keys(tar_file_expander(iter(shards)))
        ]


def raw_tar(path, members, **options):
    """Write a tar of (name, bytes) in this order with the standard library."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def tricky(rng):
    return [
        {"__key__": "plain", "jpg": rng.bytes(700), "txt": b""},
        {"__key__": "folder/of things/x", "seg.png": rng.bytes(3), "png": rng.bytes(512), "json": b"{}"},
        {"__key__": "other/plain", "JPG": rng.bytes(10), "a.b.txt": b"t"},
        {"__key__": "ключ-猫-é", "txt": "猫".encode()},
        {"__key__": "d.o.t/s", "txt": b"x"},
        {"__key__": "./dot/slash", "txt": b"y"},
        {"__key__": "trailing ", "txt": b"z"},
    ]


@pytest.mark.parametrize("form", ["webdataset", tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_webdataset_reads(tmp_path, seed, form):
    rng = np.random.default_rng(seed)
    long = f"{'long/' * 40}{'n' * 90}"
    samples = tricky(rng)
    if form != tarfile.USTAR_FORMAT:  # its names are limited to 255 bytes
        samples.insert(2, {"__key__": long, "jpg": rng.bytes(40), "a.b.jpg": b"1"})

    def write(name, samples):
        if form == "webdataset":
            return write_tar(tmp_path / name, samples)
        members = [(f"{s['__key__']}.{e}", data) for s in samples for e, data in s.items() if e != "__key__"]
        return raw_tar(tmp_path / name, members, format=form)

    paths = [write("a.tar", samples), write("b.tar", []), write("c.tar", samples[::-1])]
    index = ShardIndex.build(paths)
    assert contents(index) == by_webdataset(paths)
    assert index.counts() == [len(samples), 0, len(samples)]
    assert [sample.shard for sample in index] == [paths[0]] * len(samples) + [paths[2]] * len(samples)


names = st.sampled_from(["a", "b", "a.x", "f/a", "f/a.x", "g.h/a", "ab", "A"])
extensions = st.sampled_from(["jpg", "txt", "JPG", "tar.gz", "x.y.z", "json", ""])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(names, extensions, st.binary(max_size=20)), max_size=12))
def test_reads_any_order_of_members_as_webdataset_does(tmp_path_factory, members):
    path = tmp_path_factory.mktemp("any") / "s.tar"
    raw_tar(path, [(f"{name}.{extension}", data) for name, extension, data in members])
    names = [f"{name}.{extension}" for name, extension, _ in members]
    together = sorted(range(len(members)), key=lambda i: (first_of(names, i), i))
    raw_tar(path.with_name("t.tar"), [(names[i], members[i][2]) for i in together])
    try:
        expected = by_webdataset([path.with_name("t.tar")])
    except ValueError:  # of a duplicate file name
        with pytest.raises(DataError, match="two members"):
            ShardIndex.build(path)
        return
    assert contents(ShardIndex.build(path)) == expected


def first_of(names, i):
    """Return the number of the first member of a member's sample."""

    def key(name):
        folder, _, base = name.rpartition("/")
        return folder, base.partition(".")[0]

    return next(j for j, name in enumerate(names) if key(name) == key(names[i]))


def test_members_that_are_not_adjacent_are_one_sample(tmp_path):
    path = raw_tar(tmp_path / "s.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"3"), ("a.txt", b"4")])
    assert contents(ShardIndex.build(path)) == [("a", {"jpg": b"1", "txt": b"4"}), ("b", {"jpg": b"2", "txt": b"3"})]


def test_folders_links_and_files_without_extension_belong_to_no_sample(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("README", "f/README", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"ok"))
    assert contents(ShardIndex.build(tmp_path / "s.tar")) == [("a", {"txt": b"ok"})]
    assert by_webdataset([tmp_path / "s.tar"]) == [("a", {"txt": b"ok"})]


def test_every_type_of_regular_file(tmp_path):
    """The types "0", v7 and contiguous file. A folder of v7 is an empty regular file whose name ends with a slash."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in (("a.txt", tarfile.REGTYPE), ("b.txt", tarfile.AREGTYPE), ("c.txt", tarfile.CONTTYPE)):
            info = tarfile.TarInfo(name)
            info.size, info.type = 2, kind
            tar.addfile(info, io.BytesIO(b"ok"))
    block = bytearray(tarfile.TarInfo("f.x/").tobuf(tarfile.GNU_FORMAT))
    block[156:157], block[148:156] = b"\0", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    data = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(bytes(block) + data)
    expected = [(key, {"txt": b"ok"}) for key in "abc"]
    assert contents(ShardIndex.build(tmp_path / "s.tar")) == expected
    assert by_webdataset([tmp_path / "s.tar"]) == expected


def test_keys_are_never_paths(tmp_path):
    path = raw_tar(tmp_path / "s.tar", [("b\udcff.txt", b"1"), ("../../etc/passwd.txt", b"2"), ("/abs/x.txt", b"3")])
    index = ShardIndex.build(path)
    assert contents(index)[1:] == [("../../etc/passwd", {"txt": b"2"}), ("/abs/x", {"txt": b"3"})]
    assert index[0].read("txt") == b"1"
    assert "\udcff" in index[0].key
    assert contents(ShardIndex.load(tmp_path / "dualenc.index")) == contents(index)


def test_an_empty_index(tmp_path):
    index = ShardIndex.build(write_tar(tmp_path / "a.tar", []))
    assert len(index) == 0
    assert list(index) == []
    assert index.counts() == [0]
    with pytest.raises(IndexError):
        index[0]


def test_indexing_out_of_range(tmp_path, seed):
    index = ShardIndex.build(write_shards(tmp_path, [3, 2], seed))
    keys = [sample.key for sample in index]
    assert keys == [f"{i:06d}" for i in range(5)]
    for i in (-1, 5, 100):
        with pytest.raises(IndexError):
            index[i]


@pytest.mark.long
def test_many_extensions(tmp_path, monkeypatch):
    """Names such as img.001.jpg give every member another extension; the index stores up to 2^16 of them."""
    monkeypatch.setattr(
        index_module, "members", lambda _: [Member(b"img.%d.jpg" % i, i % 512, 1, b"", 0) for i in range(n)]
    )
    n = 60_000
    index = ShardIndex.build(raw_tar(tmp_path / "s.tar", []))
    assert len(index) == 1
    assert len(index[0].members) == n
    assert index[0].members["40000.jpg"] == (40_000 % 512, 1)
    n = 70_000  # the next numbers
    with pytest.raises(DataError, match=r"t\.tar has 70,000 extensions"):
        ShardIndex.build(raw_tar(tmp_path / "t.tar", []))


def test_the_fingerprint_depends_on_names_headers_and_selection(tmp_path, seed):
    rng = np.random.default_rng(seed)

    def fingerprint(folder, samples, name="s.tar"):
        return ShardIndex.build(write_tar(tmp_path / folder / name, samples, mtime=0)).fingerprint

    base = [{"__key__": "a", "txt": rng.bytes(5)}, {"__key__": "b", "txt": rng.bytes(600)}]
    same = fingerprint("1", base)
    assert fingerprint("2", base) == same  # another folder
    assert fingerprint("3", base, "t.tar") != same
    assert fingerprint("4", base[::-1]) != same
    assert fingerprint("5", base[:1]) != same
    assert fingerprint("6", [{**base[0], "__key__": "c"}, base[1]]) != same
    assert fingerprint("7", [{**base[0], "txt": b"123456"}, base[1]]) != same
    assert fingerprint("8", [{"__key__": "a", "cls": base[0]["txt"]}, base[1]]) != same


# Selecting


@pytest.fixture
def table(tmp_path):
    rows = [
        {"width": 100, "license": "cc0", "tags": ["cat", "dog"], "ok": True},
        {"width": 200, "license": "cc-by", "tags": []},
        {"width": 300, "license": "none", "tags": ["cat"], "ok": False, "height": -5},
        {"license": "cc0", "height": 1.5},
        {"width": "wide"},
        {"width": None, "license": 7},
        ["no", "object"],
    ]
    samples = [{"__key__": f"k{i}", "json": json.dumps(row).encode(), "txt": b"x"} for i, row in enumerate(rows)]
    samples.append({"__key__": "k7", "txt": b"no json"})
    return ShardIndex.build(write_tar(tmp_path / "t.tar", samples))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("width == 200", [1]),
        ("width != 200", [0, 2, 4, 5]),
        ("width < 200", [0]),
        ("width <= 200", [0, 1]),
        ("width > 100", [1, 2]),
        ("100 < width < 300", [1]),
        ("width >= 200 and license in ['cc0', 'cc-by']", [1]),
        ("license in ('cc0', 'none')", [0, 2, 3]),
        ("license not in ['cc0']", [1, 2, 5]),
        ("'cat' in tags", [0, 2]),
        ("not ok", [2]),
        ("ok", [0]),
        ("height == -5", [2]),
        ("height > -6", [2, 3]),
        ("width == 100 or width == 300", [0, 2]),
        ("not (width == 100 or width == 300)", [1, 4, 5]),
        ("'wide' == width", [4]),
        ("width == None", [5]),
    ],
)
def test_expressions(table, expression, expected):
    assert [sample.key for sample in table.select(expression)] == [f"k{i}" for i in expected]


def test_a_sample_without_a_field_is_not_selected(table):
    """Samples 0, 1 and 2 have `width`, and 2 and 3 have `height`: only sample 2 has both fields, in whatever order."""
    for expression in ("width > 0 or height > 0", "height > 0 or width > 0", "width > 0 or not height > 0"):
        assert [sample.key for sample in table.select(expression)] == ["k2"]


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('touch hacked')",
        "__import__('os')",
        "width.__class__",
        "width and width.__class__",
        "width > 10**6 and open('x')",
        "nothing == 1 or exec('1')",
        "[x for x in width]",
        "(lambda: 1)()",
        "width if width else 1",
        "width[0] == 1",
        "2 ** 9999999 > width",
        "f'{width}'",
        "(y := 3)",
        "width is None",
        "{'a': 1}",
        "*width",
        "width; license",
        "width ==",
        "",
    ],
)
def test_only_comparisons_are_accepted(table, tmp_path, monkeypatch, expression):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"neither a file of keys nor an expression|no field 'width.__class__'"):
        table.select(expression)
    assert not (tmp_path / "hacked").exists()


def test_selecting_nothing_is_an_error(table):
    with pytest.raises(DataError, match="'width > 10000' selects 0 of 8"):
        table.select("width > 10000")
    with pytest.raises(DataError, match="selects 0 of"):
        table.select([])


def test_a_sample_whose_json_is_broken_is_not_selected(tmp_path):
    samples = [{"__key__": "a", "json": b'{"x": 1}'}, {"__key__": "b", "json": b"{"}, {"__key__": "c", "json": b"7"}]
    index = ShardIndex.build(write_tar(tmp_path / "s.tar", samples))
    assert [sample.key for sample in index.select("x == 1")] == ["a"]


def test_select_by_keys_and_by_file(table, tmp_path):
    assert contents(table.select(["k3", "k0"])) == [contents(table)[0], contents(table)[3]]
    (tmp_path / "keys.txt").write_text("k7\n\n k2 \n")
    assert [sample.key for sample in table.select(str(tmp_path / "keys.txt"))] == ["k2", "k7"]
    with pytest.raises(DataError, match="2 keys are in no shard, such as 'k8'"):
        table.select(["k1", "k9", "k8"])
    (tmp_path / "keys.txt").write_text("k8\n")
    with pytest.raises(DataError, match=r"keys\.txt: 1 keys are in no shard"):
        table.select(str(tmp_path / "keys.txt"))


def test_a_selection_reads_the_same_bytes(tmp_path, seed):
    rng = np.random.default_rng(seed)
    index = ShardIndex.build(write_shards(tmp_path, [4, 0, 6, 3], seed))
    rows = np.flatnonzero(rng.random(13) < 0.5)
    part = index.take(rows)
    assert contents(part) == [contents(index)[i] for i in rows]
    assert part.counts() == np.bincount(np.repeat(np.arange(4), index.counts())[rows], minlength=4).tolist()
    assert part.having(["png", "webp"]).all()
    again = np.flatnonzero(rng.random(len(part)) < 0.5)
    assert contents(part.take(again)) == [contents(part)[i] for i in again]
    assert len(index.take(np.array([], dtype=np.int64))) == 0


# Splitting


def test_split_has_the_right_size_is_stable_and_keeps_equal_images_together(tmp_path, seed):
    rng = np.random.default_rng(seed)
    pictures = [rng.bytes(40) for _ in range(1500)]
    samples = [{"__key__": f"a{i}", "jpg": picture} for i, picture in enumerate(pictures)]
    samples += [{"__key__": f"b{i}", "png": pictures[int(rng.integers(1500))], "txt": b"x"} for i in range(500)]
    paths = [write_tar(tmp_path / f"{i}.tar", samples[i::4]) for i in range(4)]
    train, val = ShardIndex.build(paths).split(0.2)
    assert len(train) + len(val) == 2000
    assert abs(len(val) / 2000 - 0.2) < 0.06  # 5.5 standard deviations, including the equal pairs
    held = {sample.key for sample in val}
    sides = [
        {next(iter(data[e] for e in ("jpg", "png") if e in data)) for _, data in contents(p)} for p in (train, val)
    ]
    assert not sides[0] & sides[1]
    fewer = ShardIndex.build(paths[:2])
    assert {sample.key for sample in fewer.split(0.2)[1]} == held & {sample.key for sample in fewer}
    moved = ShardIndex.build([write_tar(tmp_path / "new" / "z.tar", samples[::-1])])
    assert {
        sample.key for sample in moved.split(0.2)[1]
    } == held  # neither the path nor the order of the shards matters
    assert {sample.key for sample in ShardIndex.build(paths).split(0.1)[1]} <= held


def test_split_of_large_images_with_equal_ends(tmp_path, seed):
    """Only a part of a large file is hashed, which is not the header, because many files have the same one."""
    rng = np.random.default_rng(seed)
    ends = rng.bytes(20_000)
    samples = [{"__key__": f"{i}", "jpg": ends + rng.bytes(100) + ends} for i in range(60)]
    train, val = ShardIndex.build(write_tar(tmp_path / "a.tar", samples)).split(0.5)
    assert min(len(train), len(val)) > 5


def test_split_that_leaves_a_side_empty_is_refused(tmp_path, seed):
    index = ShardIndex.build(write_shards(tmp_path, [4], seed))
    for share in (0.0, 1.0):
        with pytest.raises(DataError, match="one side empty"):
            index.split(share)


# Expansion of patterns


def test_expand_shards(tmp_path, monkeypatch):
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b.tar", "odd[1].tar", "n{1}.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    full = lambda *names: [str(tmp_path / name) for name in names]  # noqa: E731
    assert expand_shards(tmp_path) == sorted(
        full("a-000.tar", "a-001.tar", "a-002.tar", "b.tar", "odd[1].tar", "n{1}.tar")
    )
    assert expand_shards(f"{tmp_path}/a-*.tar") == full("a-000.tar", "a-001.tar", "a-002.tar")
    assert expand_shards(f"{tmp_path}/a-{{000..002}}.tar") == full("a-000.tar", "a-001.tar", "a-002.tar")
    assert expand_shards(f"{tmp_path}/{{b,a-00[01]}}.tar") == full("b.tar", "a-000.tar", "a-001.tar")
    assert expand_shards([tmp_path / "b.tar", f"{tmp_path}/a-000.tar"]) == full("b.tar", "a-000.tar")  # as listed
    assert expand_shards(tmp_path / "odd[1].tar") == full("odd[1].tar")  # an existing file is not a pattern
    assert expand_shards(tmp_path / "n{1}.tar") == full("n{1}.tar")
    monkeypatch.chdir(tmp_path)
    assert expand_shards("b.tar") == ["b.tar"]


def test_shards_that_match_nothing_are_named(tmp_path):
    (tmp_path / "a-0.tar").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for pattern, named in (
        (f"{tmp_path}/no*.tar", "no*.tar"),
        (f"{tmp_path}/a-{{0..2}}.tar", "a-1.tar"),
        (f"{tmp_path}/empty", "empty"),
        ([f"{tmp_path}/a-0.tar", f"{tmp_path}/gone.tar"], "gone.tar"),
    ):
        with pytest.raises(DataError, match="match no file") as error:
            expand_shards(pattern)
        assert named in str(error.value)
    with pytest.raises(DataError, match="list of shards is empty"):
        expand_shards([])
    for again in (f"{tmp_path}/a-*.tar", f"{tmp_path}/../{tmp_path.name}/a-0.tar", tmp_path):
        with pytest.raises(DataError, match=r"named twice: .*a-0\.tar"):
            expand_shards([f"{tmp_path}/a-0.tar", again])


@pytest.mark.parametrize("spec", ["pipe:touch hacked", "ftp://x.org/a.tar", "file:///a.tar", "memory://a.tar"])
def test_only_paths_and_known_stores(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    for shards in (spec, [spec]):
        with pytest.raises(DataError, match=r"must be local paths|commands are never run") as error:
            ShardIndex.build(shards)
        assert spec in str(error.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("spec", ["a-{0..2.tar", "a-0}.tar"])
def test_unbalanced_braces_are_named(spec):
    with pytest.raises(DataError) as error:
        expand_shards(spec)
    assert spec in str(error.value)


# Broken shards


@pytest.fixture
def five(tmp_path, seed):
    """Write a shard of five members of 3584 bytes: 512 of header, 3000 of data and 72 of padding."""
    data = np.random.default_rng(seed).bytes
    return Path(
        raw_tar(tmp_path / "five.tar", [(f"k{i}.jpg", data(3000)) for i in range(5)], format=tarfile.GNU_FORMAT)
    )


@pytest.mark.parametrize("length", [513, 2 * 3584 + 513, 2 * 3584 + 512 + 2999, 4 * 3584 + 512])
def test_a_shard_cut_inside_a_member(five, length):
    os.truncate(five, length)
    with pytest.raises(DataError, match=r"five\.tar cannot be read: it is cut off"):
        ShardIndex.build(five)


@pytest.mark.parametrize("length", [3584, 2 * 3584 + 1, 2 * 3584 + 511, 4 * 3584, 5 * 3584])
def test_a_shard_cut_inside_a_header_or_between_members(five, length):
    """tarfile treats both as the end, and would silently drop the samples after it."""
    os.truncate(five, length)
    with pytest.raises(DataError, match=r"five\.tar"):
        ShardIndex.build(five)


def test_a_shard_with_a_broken_header(five, seed):
    whole = bytearray(five.read_bytes())
    whole[2 * 3584 : 2 * 3584 + 512] = np.random.default_rng(seed).bytes(512)
    five.write_bytes(whole)
    with pytest.raises(DataError, match=r"five\.tar"):
        ShardIndex.build(five)


def test_any_amount_of_padding_may_follow_the_end(five):
    whole = five.read_bytes()
    for length in (5 * 3584 + 512, 5 * 3584 + 1024, len(whole)):
        five.write_bytes(whole[:length])
        assert len(ShardIndex.build(five, rescan=True)) == 5
    five.write_bytes(whole + bytes(100_000))
    assert len(ShardIndex.build(five, rescan=True)) == 5
    five.write_bytes(whole + whole)  # joined as by `cat`; readers of tars stop at the first end mark
    with pytest.raises(DataError, match=r"five\.tar cannot be read: there is data after its end mark"):
        ShardIndex.build(five, rescan=True)


def test_a_sparse_member_is_not_read_as_plain_bytes(tmp_path):
    """The data of a sparse member is not the content of the file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 1024
        tar.addfile(info, io.BytesIO(b"x" * 1024))
    data = bytearray(buffer.getvalue())
    data[156:157] = tarfile.GNUTYPE_SPARSE
    data[386:398], data[398:410] = b"00000002000\0", b"00000002000\0"  # 1024 bytes of data, for offset 1024
    data[483:495] = b"00000004000\0"  # the size of the file is 2048
    data[257:265] = b"ustar  \0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "s.tar").write_bytes(data)
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert next(iter(tar)).issparse()
    try:
        found = ShardIndex.build(tmp_path / "s.tar")[0].read("jpg")
    except DataError:
        return
    assert found == by_webdataset([tmp_path / "s.tar"])[0][1]["jpg"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_are_refused(tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", mode) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match=r"a\.tar cannot be read: it is compressed"):
        ShardIndex.build(tmp_path / "a.tar")


@pytest.mark.parametrize("data", [b"", b"garbage", b"x" * 5000, encode(np.zeros((4, 4, 3), np.uint8))])
def test_files_that_are_not_a_tar_are_refused(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar cannot be read"):
        ShardIndex.build(tmp_path / "a.tar")


def test_duplicate_members_are_refused(tmp_path):
    path = raw_tar(tmp_path / "s.tar", [("a.jpg", b"1"), ("a.txt", b"2"), ("a.jpg", b"3")])
    with pytest.raises(DataError, match=r"s\.tar sample 'a': two members \.jpg"):
        ShardIndex.build(path)


def test_a_shard_that_changed_after_indexing(tmp_path, seed):
    paths = write_shards(tmp_path, [5, 5], seed)
    index = ShardIndex.build(paths)
    assert index[4].read("png")
    os.truncate(paths[0], 1500)
    for read in (lambda: index[4].read("png"), lambda: ShardIndex.build(paths)):
        with pytest.raises(DataError, match=r"part-000\.tar changed since it was indexed; .*dualenc index"):
            read()
    assert index[5].read("png")
    write_shards(tmp_path, [5, 6], seed + 1)
    assert len(ShardIndex.build(paths, rescan=True)) == 11
    assert len(ShardIndex.build(paths)) == 11


def test_a_shard_of_the_same_size_with_other_samples(tmp_path, seed):
    path = Path(write_tar(tmp_path / "s.tar", [{"__key__": "a", "txt": b"1"}, {"__key__": "b", "txt": b"2"}]))
    ShardIndex.build(path)
    size = path.stat().st_size
    write_tar(path, [{"__key__": "a", "txt": b"1"}, {"__key__": "c", "txt": b"2"}])
    assert path.stat().st_size == size
    with pytest.raises(DataError, match=r"s\.tar changed since it was indexed"):
        ShardIndex.build(path)


def test_a_copied_folder_has_the_same_index(tmp_path, seed):
    """Copies have other modification times, but the same headers."""
    paths = write_shards(tmp_path / "a", [5, 2], seed)
    index = ShardIndex.build(paths)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    copied = ShardIndex.build(tmp_path / "b")
    assert contents(copied) == contents(index)
    assert copied.fingerprint == index.fingerprint
    os.utime(paths[0])  # touched
    assert contents(ShardIndex.build(paths)) == contents(index)


def test_a_shard_that_is_gone(tmp_path, seed):
    index = ShardIndex.build(write_shards(tmp_path, [2], seed))
    os.remove(index.shards[0])
    with pytest.raises(DataError, match=r"part-000\.tar is gone since it was indexed"):
        index[0].read("png")


def test_more_shards_than_open_files(tmp_path, seed):
    index = ShardIndex.build(write_shards(tmp_path, [1] * 80, seed))
    before = contents(index)
    assert len(os.listdir("/proc/self/fd")) < 150
    assert contents(index.take(np.arange(80))) == before


# The index file


def test_an_index_is_built_once(tmp_path, seed, monkeypatch):
    paths = write_shards(tmp_path, [3, 0, 5], seed)
    index = ShardIndex.build(paths, hashes=["image", "text"])
    again = ShardIndex.load(tmp_path / "dualenc.index")
    assert contents(again) == contents(index)
    assert again.shards == index.shards
    assert again.fingerprint == index.fingerprint
    for name, extension in (("image", "png"), ("text", "txt")):
        expected = [
            int.from_bytes(hashlib.blake2b(s.read(extension), digest_size=8, person=bytes(8)).digest(), "little")
            for s in index
        ]
        assert again.hashes(name).tolist() == expected
    monkeypatch.setattr(shards_module, "scan", None)  # no tar is read again
    assert contents(ShardIndex.build(paths[1:])) == contents(index)[3:]
    assert contents(pickle.loads(pickle.dumps(ShardIndex.build(paths)))) == contents(index)


@pytest.mark.long
def test_a_pickled_shard_is_found_in_a_replaced_index_file(tmp_path, seed):
    """A spawned worker unpickles its shards while another run adds shards to the index file."""
    paths = write_shards(tmp_path, [3, 2, 4], seed)
    ShardIndex.build(paths[1:])
    index = ShardIndex.build(paths[1:])
    given = pickle.dumps(index)
    assert len(given) < 5000  # offsets, not the arrays
    ShardIndex.build(paths)
    code = (
        "import pickle, sys; index = pickle.load(sys.stdin.buffer);"
        "pickle.dump([(s.key, s.read('png')) for s in index], sys.stdout.buffer)"
    )
    found = subprocess.run([sys.executable, "-c", code], input=given, stdout=subprocess.PIPE, check=True).stdout
    assert pickle.loads(found) == [(s.key, s.read("png")) for s in index]


def test_new_shards_are_added_to_an_index(tmp_path, seed, monkeypatch):
    paths = write_shards(tmp_path, [3, 2, 4], seed)
    ShardIndex.build(paths[:2])
    scanned = []
    monkeypatch.setattr(shards_module, "scan", lambda *args: scanned.append(args[0]) or index_module.scan(*args))
    index = ShardIndex.build(paths)
    assert scanned == paths[2:]
    assert contents(index) == contents(ShardIndex.build(paths, rescan=True))
    assert len(scanned) == 4


def test_workers_scan_the_same_index(tmp_path, seed):
    paths = write_shards(tmp_path, [3, 2, 4, 0, 7, 1], seed)
    index = ShardIndex.build(paths, workers=2, hashes=["piece"])
    stamp = (tmp_path / "dualenc.index").stat()
    again = ShardIndex.build(paths, workers=2, hashes=["piece"])
    assert (tmp_path / "dualenc.index").stat() == stamp  # nothing was missing, so nothing was written
    assert contents(index) == contents(again) == contents(ShardIndex.build(paths, rescan=True))


def test_the_index_of_a_read_only_folder_is_in_the_cache(tmp_path, seed, monkeypatch):
    monkeypatch.setenv("DUALENC_CACHE", str(tmp_path / "cache"))
    paths = write_shards(tmp_path / "data", [3, 2], seed)
    (tmp_path / "data").chmod(0o555)
    try:
        index = ShardIndex.build(paths)
        assert not (tmp_path / "data" / "dualenc.index").exists()
        (kept,) = index.files()
        assert kept.parent == tmp_path / "cache" / "index"
        monkeypatch.setattr(shards_module, "scan", None)
        assert contents(ShardIndex.build(paths)) == contents(index)
    finally:
        (tmp_path / "data").chmod(0o755)


def test_hashes_that_a_read_only_index_lacks(tmp_path, seed, monkeypatch):
    """They are written to the user's cache, and found there."""
    monkeypatch.setenv("DUALENC_CACHE", str(tmp_path / "cache"))
    paths = write_shards(tmp_path / "data", [3, 2], seed)
    ShardIndex.build(paths[:1])
    (tmp_path / "data").chmod(0o555)
    try:
        index = ShardIndex.build(paths, hashes=["piece"])
        monkeypatch.setattr(shards_module, "scan", None)
        monkeypatch.setattr(index_module.Shard, "with_hashes", None)
        again = ShardIndex.build(paths, hashes=["piece"])
        assert contents(again) == contents(index)
        assert again.hashes("piece").tolist() == index.hashes("piece").tolist()
    finally:
        (tmp_path / "data").chmod(0o755)


def test_a_touched_shard_is_scanned_once(tmp_path, seed, monkeypatch):
    paths = write_shards(tmp_path, [3, 2], seed)
    ShardIndex.build(paths)
    os.utime(paths[0], (1, 1))
    scanned = []
    monkeypatch.setattr(index_module, "scan", lambda *args: scanned.append(args[0]) or scan(*args))
    for _ in range(3):
        ShardIndex.build(paths)
    assert scanned == paths[:1]


def test_rescan_drops_other_shards(tmp_path, seed):
    paths = write_shards(tmp_path, [3, 2], seed)
    ShardIndex.build(paths)
    (tmp_path / "dualenc.index").write_bytes(b"broken")
    os.remove(paths[1])
    assert len(ShardIndex.build(paths[:1], rescan=True)) == 3
    assert len(ShardIndex.load(tmp_path / "dualenc.index")) == 3
    write_shards(tmp_path, [3, 2], seed)
    ShardIndex.build(paths, rescan=True)
    os.remove(paths[0])
    ShardIndex.build(paths[1:], rescan=True)
    assert ShardIndex.load(tmp_path / "dualenc.index").shards == paths[1:]


def test_shards_that_were_scanned_before_an_error_are_saved(tmp_path, seed, monkeypatch):
    paths = write_shards(tmp_path, [3, 2, 4], seed)
    Path(paths[2]).write_bytes(b"no tar")
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"part-002\.tar cannot be read"):
            ShardIndex.build(paths, workers=workers)
        assert len(ShardIndex.load(tmp_path / "dualenc.index")) == 5
    unreadable = []
    assert len(ShardIndex.build(paths, unreadable=unreadable)) == 5
    assert ["part-002.tar" in str(error) for error in unreadable] == [True]


def test_threads_may_share_open_files(tmp_path, seed):
    """With more shards than open files, one thread must not close the file that another reads."""
    index = ShardIndex.build(write_shards(tmp_path, [1] * 90, seed))
    expected = [sample.read("txt") for sample in index]

    def read(i):
        order = np.random.default_rng(seed + i).integers(0, 90, 400).tolist()
        return all(index[row].read("txt") == expected[row] for row in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


@pytest.mark.parametrize("data", [b"", b"garbage", b"PK\x03\x04garbage", pickle.dumps({"a": 1}), MAGIC + bytes(100)])
def test_garbage_is_not_an_index(tmp_path, data, seed):
    path = write_shards(tmp_path, [3], seed)
    (tmp_path / "dualenc.index").write_bytes(data)
    for read in (lambda: ShardIndex.load(tmp_path / "dualenc.index"), lambda: ShardIndex.build(path)):
        with pytest.raises(DataError, match=r"dualenc\.index is damaged, or .* of this version: remove it"):
            read()


def test_every_cut_or_flipped_byte_is_detected_or_harmless(tmp_path, seed):
    """The JSON has a checksum, and so have the arrays, whose values must not lead out of the shard or the keys."""
    rng = np.random.default_rng(seed)
    index = ShardIndex.build(write_shards(tmp_path, [4, 3], seed))
    data = (tmp_path / "dualenc.index").read_bytes()
    found = 0
    for _ in range(300):
        broken = bytearray(data)
        if rng.random() < 0.2:
            del broken[int(rng.integers(len(data))) :]
        else:
            broken[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path = tmp_path / f"x{found}" / "dualenc.index"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(broken)
        try:
            contents_of = [(s.key, sorted(s.members.items())) for s in ShardIndex.load(path)]
            assert len(contents_of) == len(index)
        except DataError as error:
            found += 1
            assert "remove it and run `dualenc index`" in str(error)  # noqa: PT017
    assert found > 50


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_shard_is_executed(tmp_path, seed):
    rng = np.random.default_rng(seed)
    bomb = pickle.dumps(Bomb(str(tmp_path / "hacked")))
    objects = np.empty(1, dtype=object)
    objects[0] = Bomb(str(tmp_path / "hacked"))
    np.save(tmp_path / "bomb.npy", objects, allow_pickle=True)
    extensions = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "ten", "mp")
    sample = {
        "__key__": "a",
        "png": encode(pixels(rng)),
        "txt": b"x",
        "json": b'{"a": 1}',
        **dict.fromkeys(extensions, bomb),
    }
    sample["npy"] = (tmp_path / "bomb.npy").read_bytes()
    index = ShardIndex.build(write_tar(tmp_path / "s.tar", [sample, {**sample, "__key__": "b"}]))
    for found in itertools.chain(index, index.select("a == 1")):
        assert found.read("pyd") == bomb
        found.read_json()
    with pytest.raises(DataError):
        ShardIndex.load(tmp_path / "bomb.npy")
    assert not (tmp_path / "hacked").exists()
    pickle.loads(bomb)  # the control: unpickling does execute it
    assert (tmp_path / "hacked").exists()


def test_reading_a_missing_member(tmp_path, seed):
    index = ShardIndex.build(write_shards(tmp_path, [1], seed))
    with pytest.raises(DataError, match=r"part-000\.tar sample '000000': no \.cls among its members \(json, png"):
        index[0].read("cls")


def test_having(tmp_path):
    samples = [{"__key__": "a", "jpg": b"1"}, {"__key__": "b", "txt": b"1"}, {"__key__": "c", "png": b"", "txt": b""}]
    index = ShardIndex.build(write_tar(tmp_path / "s.tar", samples))
    assert index.having(["jpg", "png"]).tolist() == [True, False, True]
    assert index.having(["webp"]).tolist() == [False, False, False]
    assert isinstance(index[0].members, dict | types.MappingProxyType)


STAND_INS = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "Git LFS pointer.*git lfs pull",
    ),
    "annex": (b"../../.git/annex/objects/aa/bb/SHA256E-s12--cd.tar/SHA256E-s12--cd.tar\n", "git-annex pointer"),
    "html": (b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n", "HTML page"),
    "page": (b'\xef\xbb\xbf\n<?xml version="1.0"?>\n<!-- x -->\n<HTML lang="en">' + b" " * 3000, "HTML page"),
    "store": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "error message of a store"),
}


@pytest.mark.parametrize("kind", STAND_INS)
def test_what_lies_in_place_of_a_file_is_named(tmp_path, kind, web, here):
    """The same words for a shard, a remote shard, an index file, a text file and an image."""
    data, message = STAND_INS[kind]
    for name in ("a.tar", "t/a.txt", "t/a.jsonl", "t/a.csv", "i/dualenc.index"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (web.folder / "a.tar").write_bytes(data)
    write_tar(tmp_path / "i" / "b.tar", [{"__key__": "x", "txt": b"x"}])
    for build, name in (
        (lambda: ShardIndex.build(tmp_path / "a.tar"), "a.tar"),
        (lambda: ShardIndex.build(f"{web.url}/a.tar", rescan=True), f"{web.url}/a.tar"),
        (lambda: ShardIndex.build(tmp_path / "i"), "dualenc.index"),
        *((lambda name=name: TextIndex.build(tmp_path / "t" / name), name) for name in ("a.txt", "a.jsonl", "a.csv")),
    ):
        with pytest.raises(DataError, match=message) as error:
            build()
        assert name in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_shards_and_texts_that_resemble_a_pointer_are_read(tmp_path):
    write_tar(tmp_path / "a.tar", [{"__key__": "<html>", "txt": b"x"}, {"__key__": "<Error>", "txt": b"x"}])
    assert len(ShardIndex.build(tmp_path / "a.tar")) == 2
    (tmp_path / "a.txt").write_text("a version https://git-lfs\n<b>not a page</b>\nabout <html>\n")
    assert len(TextIndex.build(tmp_path / "a.txt")) == 3


def test_a_page_in_place_of_a_published_index_is_a_missing_index(web, seed, here):
    """Some web servers answer with a page and status 200 where a file is missing."""
    write_shards(web.folder, [3], seed)
    (web.folder / "dualenc.index").write_bytes(STAND_INS["html"][0])
    with pytest.raises(DataError, match="has no index: run `dualenc index`"):
        ShardIndex.build(f"{web.url}/part-000.tar")
    ShardIndex.build(f"{web.url}/part-000.tar", rescan=True)
    assert len(ShardIndex.build(f"{web.url}/part-000.tar")) == 3


def test_a_page_in_place_of_an_indexed_shard_is_named(web, seed, here):
    write_shards(web.folder, [3], seed)
    index = ShardIndex.build(f"{web.url}/part-000.tar", rescan=True)
    forget_copies(here)
    (web.folder / "part-000.tar").write_bytes(STAND_INS["html"][0])
    with pytest.raises(DataError, match=r"part-000\.tar is an HTML page"):
        index[0].read("txt")
