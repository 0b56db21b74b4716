"""Lists of samples in their three forms: what they select, what they refuse, and that all forms agree."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_tar
from safetensors.numpy import load_file, save_file

from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.selection import Selection
from dualenc.utils.errors import DataError, warn_once

FORMS = (".txt", ".select", ".npy")


def draw(folder: Path, seed: int, layout: tuple[int, ...] = (9, 1, 0, 23, 16)) -> tuple[ShardIndex, list[str]]:
    """Write shards whose samples have distinct keys and uids, some close to others; return their index and the uids."""
    rng = np.random.default_rng(seed)
    uids, number = [], 0
    for i, count in enumerate(layout):
        samples = []
        for _ in range(count):
            # Halves of a few values alone: uids that share a half, and zeros at both ends, must be told apart.
            halves = rng.choice([0, 1, 255, 256, 2**63, 2**64 - 1], 2).tolist()
            uid = f"{int(halves[0]) % 2**64:016x}{(int(halves[1]) + number * 2**32) % 2**64:016x}"
            while uid in uids:
                uid = rng.bytes(16).hex()
            uids.append(uid)
            fields = {"uid": uid.upper() if number % 5 == 0 else uid, "width": number}
            samples.append({"__key__": f"d/{number}k", "json": json.dumps(fields).encode(), "txt": b"x"})
            number += 1
        write_tar(folder / f"s{i}.tar", samples)
    return ShardIndex.build(str(folder)), uids


def keys_of(index: ShardIndex) -> list[str]:
    return [sample.key for sample in index]


def datacomp(uids: list[str]) -> np.ndarray:
    """Return an array of uids as DataComp's own tools write it."""
    found = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8"))
    found.sort()
    return found


@pytest.fixture
def warned(caplog: Any) -> Callable[[], str]:
    """Return the warnings so far as one text; each test sees its own, though each line is logged once a process."""
    warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "dualenc")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_selection_selects_the_same_samples(tmp_path: Path, seed: int, form: str) -> None:
    rng = np.random.default_rng(seed)
    index, uids = draw(tmp_path / "shards", seed)
    for share in (0.0, 0.1, 0.5, 1.0):
        rows = np.flatnonzero(rng.random(len(index)) < share)
        selection = Selection.of_index(index.take(rows))
        assert selection.rows(index).tolist() == rows.tolist()
        selection.save(tmp_path / f"chosen{form}", index)
        again = Selection.read(tmp_path / f"chosen{form}")
        assert again.rows(index).tolist() == rows.tolist()
        # In a part of the samples, the numbers are those of the part.
        part = np.flatnonzero(rng.random(len(index)) < 0.5)
        assert again.rows(index.take(part)).tolist() == np.flatnonzero(np.isin(part, rows)).tolist()
        if len(rows):
            assert keys_of(index.select(str(tmp_path / f"chosen{form}"))) == [index.key(int(i)) for i in rows]
            assert keys_of(index.select(again)) == [index.key(int(i)) for i in rows]
        # Written of a part, a selection has the samples of the part alone.
        inside = rows[np.isin(rows, part)]
        selection.save(tmp_path / f"part{form}", index.take(part))
        assert Selection.read(tmp_path / f"part{form}").rows(index).tolist() == inside.tolist()
        if form == ".npy":
            assert np.load(tmp_path / "chosen.npy").tobytes() == datacomp([uids[i] for i in rows]).tobytes()
        if form == ".txt":
            assert (tmp_path / "chosen.txt").read_text() == "".join(f"{index.key(int(i))}\n" for i in rows)


def test_each_form_becomes_each_other(tmp_path: Path, seed: int) -> None:
    index, _ = draw(tmp_path / "shards", seed)
    rows = np.flatnonzero(np.random.default_rng(seed).random(len(index)) < 0.5)
    Selection.of_index(index.take(rows)).save(tmp_path / "a.select", index)
    for form in FORMS:
        Selection.read(tmp_path / "a.select").save(tmp_path / f"b{form}", index)
        Selection.read(tmp_path / f"b{form}").save(tmp_path / "c.select", index)
        assert (tmp_path / "c.select").read_bytes() == (tmp_path / "a.select").read_bytes()
    with pytest.raises(DataError, match=r"\.txt, \.select, \.npy"):
        Selection.read(tmp_path / "a.select").save(tmp_path / "b.csv", index)


def test_the_digest_is_that_of_the_choice(tmp_path: Path, seed: int) -> None:
    index, uids = draw(tmp_path / "shards", seed)
    masks = {part.facts["name"]: (part.facts["digest"], np.arange(len(part)) % 2 == 0) for part in index.parts}
    first = Selection.of_masks(masks)
    assert Selection.of_masks(dict(reversed(masks.items()))).digest == first.digest
    first.save(tmp_path / "a.select", index)
    assert Selection.read(tmp_path / "a.select").digest == first.digest
    for name in ("s0.tar", "s1.tar"):
        digest, mask = masks[name]
        flipped = Selection.of_masks({**masks, name: (digest, ~mask)})
        assert len({flipped.digest, first.digest, Selection.of_masks({**masks, name: ("0", mask)}).digest}) == 3
    (tmp_path / "a.txt").write_text("d/1k\nd/2k\n")
    (tmp_path / "b.txt").write_text("d/2k\r\n\r\n d/1k\nd/1k")
    (tmp_path / "c.txt").write_text("d/2k\nd/3k\n")
    a, b, c = (Selection.read(tmp_path / f"{name}.txt").digest for name in "abc")
    assert a == b != c
    np.save(tmp_path / "a.npy", datacomp(uids[:4]))
    np.save(tmp_path / "b.npy", datacomp(uids[:4])[::-1].astype(">u8,>u8"))
    assert Selection.read(tmp_path / "a.npy").digest == Selection.read(tmp_path / "b.npy").digest


# Bits


def test_a_list_over_part_of_the_shards(tmp_path: Path, seed: int, warned: Callable[[], str]) -> None:
    """Shards without an entry give nothing, which is said; entries of shards that are not there do no harm."""
    index, _ = draw(tmp_path / "shards", seed)
    scored = ShardIndex.build([str(tmp_path / "shards" / f"s{i}.tar") for i in (0, 3)])
    Selection.of_index(scored).save(tmp_path / "a.select", scored)
    found = index.select(str(tmp_path / "a.select"))
    assert keys_of(found) == keys_of(scored)
    assert "does not name 3 shards of 5" in warned()
    assert "s1.tar" in warned()
    one = ShardIndex.build(str(tmp_path / "shards" / "s3.tar"))
    assert keys_of(one.select(str(tmp_path / "a.select"))) == keys_of(one)
    other = ShardIndex.build(str(tmp_path / "shards" / "s4.tar"))
    with pytest.raises(DataError, match=r"a\.select is of other shards, such as s0\.tar, not of .*s4\.tar"):
        other.select(str(tmp_path / "a.select"))


def test_a_shard_with_other_headers_is_refused_by_name(tmp_path: Path, seed: int) -> None:
    index, _ = draw(tmp_path / "shards", seed)
    Selection.of_index(index).save(tmp_path / "a.select", index)
    write_tar(tmp_path / "shards" / "s3.tar", [{"__key__": "other", "json": b"{}"}])
    changed = ShardIndex.build(str(tmp_path / "shards"), rescan=True)
    with pytest.raises(DataError, match=r"another s3\.tar than .*shards/s3\.tar, whose tar headers differ"):
        changed.select(str(tmp_path / "a.select"))


def test_shards_of_one_name_in_two_folders(tmp_path: Path, seed: int) -> None:
    """They are told apart by their headers; only where these are equal, too, a selection of them is refused."""
    rng = np.random.default_rng(seed)
    draw(tmp_path / "a", seed, (5, 6))
    draw(tmp_path / "b", seed, (7,))
    shutil.copy(tmp_path / "a" / "s1.tar", tmp_path / "b")
    with pytest.raises(DataError, match=r"s1\.tar and have the same headers"):
        Selection.of_index(ShardIndex.build([str(tmp_path / "a"), str(tmp_path / "b")]))
    both = ShardIndex.build([str(tmp_path / name / "s0.tar") for name in "ab"])
    rows = np.flatnonzero(rng.random(12) < 0.5)
    Selection.of_index(both.take(rows)).save(tmp_path / "a.select", both)
    assert Selection.read(tmp_path / "a.select").rows(both).tolist() == rows.tolist()
    # A list of one of them says nothing about the other one.
    one = ShardIndex.build(str(tmp_path / "b" / "s0.tar"))
    Selection.of_index(one).save(tmp_path / "b.select", one)
    assert Selection.read(tmp_path / "b.select").rows(both).tolist() == list(range(5, 12))


def rewrite(path: Path, about: Any = None, **arrays: np.ndarray) -> None:
    """Change the metadata and the tensors of a `.select` file."""
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    found = json.loads(metadata["dualenc"])
    save_file({**load_file(path), **arrays}, path, {"dualenc": json.dumps(about(found) if about else found)})


def test_damaged_files_are_refused(tmp_path: Path, seed: int) -> None:
    index, _ = draw(tmp_path / "shards", seed)
    path = tmp_path / "a.select"
    rows = np.flatnonzero(np.arange(len(index)) % 3 == 0)
    Selection.of_index(index.take(rows)).save(path, index)
    whole, bits = path.read_bytes(), load_file(path)["bits"]
    flipped, padded = bits.copy(), bits.copy()
    flipped[0] ^= 128
    padded[1] |= 1  # of the nine samples of the first shard, the second byte holds one
    padded[0] ^= 128

    def entry(**changes: Any) -> Callable[[Any], Any]:
        return lambda about: {**about, "shards": [{**about["shards"][0], **changes}, *about["shards"][1:]]}

    broken: list[tuple[str, Callable[[], Any]]] = [
        ("damaged", lambda: path.write_bytes(whole[: len(whole) // 2])),
        ("damaged", lambda: path.write_bytes(whole[:-1])),
        ("damaged", lambda: path.write_bytes(b"")),
        ("damaged", lambda: path.write_bytes(b"x" * 100)),
        ("Git LFS", lambda: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")),
        ("damaged", lambda: rewrite(path, bits=flipped)),
        ("damaged", lambda: rewrite(path, bits=padded)),
        ("damaged", lambda: rewrite(path, bits=bits[:-1])),
        ("damaged", lambda: rewrite(path, bits=np.append(bits, np.uint8(0)))),
        ("damaged", lambda: rewrite(path, bits=bits.astype(np.int64))),
        ("damaged", lambda: rewrite(path, lambda about: {"format": 1})),
        ("damaged", lambda: rewrite(path, lambda about: [])),
        ("damaged", lambda: rewrite(path, entry(samples=10))),
        ("damaged", lambda: rewrite(path, entry(samples=-1))),
        ("damaged", lambda: rewrite(path, entry(samples=2**62))),
        ("damaged", lambda: rewrite(path, entry(samples="9"))),
        ("damaged", lambda: rewrite(path, entry(selected=4))),
        ("format 2, .*upgrade dualenc", lambda: rewrite(path, lambda about: {**about, "format": 2})),
    ]
    for said, damage in broken:
        path.write_bytes(whole)
        damage()
        with pytest.raises(DataError, match=said) as error:
            index.select(str(path))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    rewrite(path)
    assert index.select(str(path)).rows is not None  # the control
    if os.getuid():
        path.chmod(0)
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            index.select(str(path))


# Keys


def test_a_typo_among_the_keys_is_refused(tmp_path: Path, seed: int) -> None:
    index, _ = draw(tmp_path / "shards", seed)
    (tmp_path / "keys.txt").write_text("d/3k\nd/03k\nd/7k\nd/1kk\n")
    with pytest.raises(DataError, match=r"keys\.txt: 2 keys are in no shard, such as 'd/03k'"):
        index.select(str(tmp_path / "keys.txt"))
    # A key of the shards that an earlier selection left out is no typo.
    (tmp_path / "keys.txt").write_text("d/3k\nd/7k\n")
    assert keys_of(index.select("width > 5").select(str(tmp_path / "keys.txt"))) == ["d/7k"]


def test_keys_that_cannot_name_the_choice_are_not_written(tmp_path: Path) -> None:
    """A key of two shards, keys that a list of lines cannot hold: the list would select other samples, or none."""
    write_tar(tmp_path / "a" / "0.tar", [{"__key__": "same", "txt": b"1"}, {"__key__": "one", "txt": b"2"}])
    write_tar(tmp_path / "a" / "1.tar", [{"__key__": "same", "txt": b"3"}, {"__key__": " edge", "txt": b"4"}])
    index = ShardIndex.build(str(tmp_path / "a"))
    for rows, said in (([0], "also select 'same' of .*1.tar"), ([3], "'edge'")):
        with pytest.raises(DataError, match=said) as error:
            Selection.of_index(index.take(np.array(rows))).save(tmp_path / "keys.txt", index)
        assert "write a .select" in str(error.value)
        assert not list(tmp_path.glob("*keys.txt*"))
    for rows in ([0, 2], [1], []):
        Selection.of_index(index.take(np.array(rows, np.int64))).save(tmp_path / "keys.txt", index)
        assert Selection.read(tmp_path / "keys.txt").rows(index).tolist() == rows


# Uids


def test_uids_of_other_samples_are_counted(tmp_path: Path, seed: int, warned: Callable[[], str]) -> None:
    """DataComp's lists are over a pool of which a download lacks a part; a list of other data is refused."""
    index, uids = draw(tmp_path / "shards", seed)
    elsewhere = [hashlib.sha256(bytes([i])).hexdigest()[:32] for i in range(3)]
    np.save(tmp_path / "a.npy", datacomp([*uids[4:8], *elsewhere, uids[5]]))
    assert Selection.read(tmp_path / "a.npy").rows(index).tolist() == [4, 5, 6, 7]
    assert "3 of 7 uids are in none of these shards" in warned()
    assert "repeats 1 of its uids" in warned()
    np.save(tmp_path / "b.npy", datacomp(elsewhere))
    with pytest.raises(DataError, match=r"b\.npy selects 0 of 49 samples"):
        index.select(str(tmp_path / "b.npy"))


def test_samples_without_a_usable_uid(tmp_path: Path, warned: Callable[[], str]) -> None:
    good = "00000000000000000000000000000007"
    contents: list[bytes | None] = [
        b'{"uid": "%s"}' % good.encode(), b'{"uid": 7}', b'{"uid": "0x7"}', b'{"uid": "7_"}', b"{", b"[7]", None,
        b'{"uid": "1%s"}' % good.encode(), b'{"uid": ""}', b'{"other": "7"}', b'{"uid": "7"}',
    ]  # fmt: skip
    samples = [{"__key__": f"k{i}", "txt": b"x", **({} if x is None else {"json": x})} for i, x in enumerate(contents)]
    index = ShardIndex.build(write_tar(tmp_path / "a.tar", samples))
    np.save(tmp_path / "a.npy", datacomp([good]))
    # The digits may lack zeros at the beginning, as DataComp's own resharder reads them.
    assert keys_of(index.select(str(tmp_path / "a.npy"))) == ["k0", "k10"]
    assert "9 samples without a usable uid, such as 'k1', whose .json has the uid '7'" in warned()
    without = ShardIndex.build(write_tar(tmp_path / "b.tar", samples[1:7]))
    with pytest.raises(DataError, match=r"6 samples without a usable uid, such as 'k1'.*no sample is selected"):
        without.select(str(tmp_path / "a.npy"))
    with pytest.raises(DataError, match=r"uid of each sample: 'k9', whose \.json has other; write a \.select"):
        Selection.of_index(index.take(np.array([9]))).save(tmp_path / "b.npy", index)
    with pytest.raises(DataError, match="also select 'k10'"):
        Selection.of_index(index.take(np.array([0]))).save(tmp_path / "b.npy", index)
    assert not list(tmp_path.glob("*b.npy*"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.array(["00000000000000000000000000000007"]), "it is <U32"),
        (np.zeros((3, 2), np.uint64), "it is uint64"),
        (np.zeros(3, "i8,u8"), "it is"),
        (np.zeros(3, "u8,u8,u8"), "it is"),
        (np.zeros((2, 2), "u8,u8"), "it is"),
        (np.array([{"a": 1}]), "cannot be read as"),
        (b"", "cannot be read as"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': [(\n", "cannot be read as"),
        (b"<html>", "an HTML page"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    with pytest.raises(DataError, match=said) as error:
        Selection.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_array_that_claims_more_than_it_has_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(10**5, "u8,u8"))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"100000", b"9" * 6, 1))
    with pytest.raises(DataError, match=r"cannot be read as \.npy"):
        Selection.read(tmp_path / "a.npy")
