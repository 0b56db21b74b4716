"""Bad samples are named, counted and replaced, and the run continues."""

import csv
import errno
import io
import json
import os
import pickle
import re
import struct
import time
import zlib
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from fits import fails, fit
from helpers import Shake, caption, encode, pixels, smooth, tiny_tokenizer, write_tar

import dualenc.data.pairs as pairs_module
import dualenc.data.shards.shard as index_module
from dualenc.cli import main
from dualenc.data import BadSampleLog, Loader, PairDataset, Preprocess, ShardIndex
from dualenc.data.loading.bad_samples import BadRecord
from dualenc.utils.errors import DataError

TOKENIZER = tiny_tokenizer()
SHORT = ["--data.val", "null", "--trainer.max_steps", "4"]
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def good(rng, count, start=0):
    return [
        {"__key__": f"{i:05d}", "jpg": encode(smooth(rng, 20, 24), "jpeg"), "txt": f"{caption(rng)} {i}".encode()}
        for i in range(start, start + count)
    ]


def png(chunks):
    """Build a PNG of chunks (type, data) with their right checksums."""
    parts = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)  # fmt: skip  # noqa: E501
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width, height):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def bomb(size):
    """Return deflated zeros of this size in bytes."""
    deflate = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join([*(deflate.compress(block) for _ in range(size >> 20)), deflate.flush()])


ROWS = zlib.compress(bytes(8 * 25))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/owned) (w) file\n%%EOF\n"


def spoiled(kind, rng):
    """Return members that replace those of a good sample, and their cause."""
    jpeg = encode(smooth(rng, 64, 64), "jpeg", quality=95)
    cannot, large = ".??? cannot be decoded*", ".png has more than 134,217,728 pixels"
    return {
        "corrupt JPEG": ({"jpg": jpeg[:20] + rng.bytes(len(jpeg) - 20)}, cannot),
        "no picture": ({"jpg": rng.bytes(999)}, cannot),
        "empty picture": ({"jpg": b""}, cannot),
        "truncated JPEG": ({"jpg": jpeg[: len(jpeg) // 2]}, cannot),
        "truncated in its header": ({"jpg": jpeg[:100]}, cannot),
        "EPS named .jpg": ({"jpg": EPS}, cannot),
        "TIFF named .jpg": ({"jpg": encode(pixels(rng), "tiff")}, cannot),
        "bomb by header": ({"png": png([header(100_000, 100_000), (b"IDAT", ROWS), (b"IEND", b"")])}, large),
        "bomb in a row": ({"png": png([header(2**31 - 1, 1), (b"IDAT", ROWS), (b"IEND", b"")])}, large),
        "bomb of pixels": ({"png": png([header(11_000, 11_000), (b"IDAT", ROWS), (b"IEND", b"")])}, cannot),
        "bad UTF-8": ({"txt": b"a \xff\xfe cat"}, ".txt is not UTF-8"),
        "empty caption": ({"txt": b" \n "}, "txt holds no caption, or only empty ones"),
    }[kind]


KINDS = [
    "corrupt JPEG", "no picture", "empty picture", "truncated JPEG", "truncated in its header", "EPS named .jpg",
    "TIFF named .jpg", "bomb by header", "bomb in a row", "bomb of pixels", "bad UTF-8",
    "empty caption",
]  # fmt: skip


def spoil(sample, kind, rng):
    members, cause = spoiled(kind, rng)
    if "png" in members:
        sample.pop("jpg")
    sample.update(members)
    return cause


def loader(index, batch=4, *, seed=0, train=True, captions="txt", **options):
    dataset = PairDataset(index, captions, TOKENIZER, Shake() if train else Preprocess(8), seed if train else None)
    return Loader(dataset, batch, seed=seed, window=2, shuffle=train, **options)


def prints(batch):
    ids, mask, _ = batch.tokens.padded()
    return [
        (image.numpy().tobytes(), tuple(text[real].tolist()), int(row))
        for image, text, real, row in zip(batch.images, ids, mask, batch.rows, strict=True)
    ]


def peak():
    """Return the peak memory of this process since the last call, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_sample_is_replaced_and_the_others_are_read(tmp_path, seed, kind):
    rng = np.random.default_rng(seed)
    samples = good(rng, 12)
    place = int(rng.integers(12))
    cause = spoil(samples[place], kind, rng)
    path = write_tar(tmp_path / "a.tar", samples)
    index = ShardIndex.build(path)
    bad_sample_log = BadSampleLog(12, tmp_path / "bad_samples.jsonl")
    peak()
    before, began = peak(), time.monotonic()
    batches = [prints(batch) for batch in loader(index, seed=seed, bad_sample_log=bad_sample_log)]
    assert time.monotonic() - began < 5
    assert peak() - before < 1 << 29
    rows = Counter(row for batch in batches for *_, row in batch)
    neighbor = (place + 1) % 12
    assert rows == Counter({row: 1 + (row == neighbor) for row in range(12) if row != place})
    (line,) = (json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines())
    assert (line["shard"], line["key"]) == (path, samples[place]["__key__"])
    assert fnmatchcase(line["cause"], cause)
    assert set(line) == {"shard", "key", "cause", "detail"}


def test_a_bomb_after_the_last_row_is_never_inflated(tmp_path, seed):
    """An image of 8 x 8 whose compressed rows continue for a gigabyte: as a viewer does, read only 8 x 8."""
    rng = np.random.default_rng(seed)
    samples = good(rng, 4)
    samples[1].pop("jpg")
    samples[1]["png"] = png([header(8, 8), (b"IDAT", bomb(1 << 28)), (b"IEND", b"")])
    index = ShardIndex.build(write_tar(tmp_path / "a.tar", samples))
    peak()
    before = peak()
    assert sum(len(prints(batch)) for batch in loader(index, seed=seed)) == 4
    assert peak() - before < 1 << 27


def bad_in_sequence(place, places):
    """Return how many bad samples are read at ``place`` until a good one of the 64 replaces it."""
    return next(n for n in range(64) if (place + n) % 64 not in places)


@pytest.mark.slow
def test_all_kinds_in_a_run(tmp_path, seed, capsys):
    """The run succeeds; each bad sample is named once and counted in the steps that read it."""
    rng = np.random.default_rng(seed)
    samples = good(rng, 64)
    kinds = [kind for kind in KINDS if kind not in ("no picture", "empty picture", "bomb of pixels")]
    places = rng.choice(64, len(kinds), replace=False).tolist()
    causes = {samples[place]["__key__"]: spoil(samples[place], kind, rng) for place, kind in zip(places, kinds)}
    for i in range(2):
        write_tar(tmp_path / "shards" / f"{i}.tar", samples[32 * i : 32 * i + 32])
    main(fit(tmp_path, "--data.val", "null", "--trainer.max_steps", "8", "--data.workers", "2"))  # two epochs
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == set(causes)
    assert all(fnmatchcase(line["cause"], causes[line["key"]]) for line in lines)
    assert len(lines) == len(kinds) <= 10  # the number that any budget allows
    with open(tmp_path / "run" / "metrics.csv") as file:
        counts = [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == "train/bad_samples"]
    assert len(counts) == 8
    assert sum(counts[:4]) == sum(bad_in_sequence(place, places) for place in places)
    assert sum(counts[:4]) == sum(counts[4:])
    err = capsys.readouterr().err
    assert f"{len(kinds)} bad samples" in err
    assert str(tmp_path / "run" / "bad_samples.jsonl") in err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["bad_samples"] == len(kinds)


def test_without_text_or_picture(tmp_path, seed, capsys):
    rng = np.random.default_rng(seed)
    samples = good(rng, 20)
    del samples[3]["txt"], samples[11]["jpg"]
    write_tar(tmp_path / "shards" / "0.tar", samples)
    main(fit(tmp_path, *SHORT))
    err = capsys.readouterr().err
    assert re.search("2 samples .* '00003', '00011'", err)
    assert "18 pairs to train on" in err
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()


def test_captions_in_json_that_are_not_text(tmp_path, seed):
    rng = np.random.default_rng(seed)
    samples = good(rng, 8)
    values = [
        '"a cat"',
        '["a cat", "a dog"]',
        '"\\ud800 half of a letter"',
        "[]",
        "7",
        '["a", null]',
        '"\\u0000"',
        '""',
    ]
    for sample, value in zip(samples, values, strict=True):
        sample["json"] = f'{{"caption": {value}}}'.encode()
    index = ShardIndex.build(write_tar(tmp_path / "a.tar", samples))
    taken = loader(index, 8, seed=seed, captions="json.caption")
    rows = {row for batch in taken for *_, row in prints(batch)}
    assert rows == {0, 1, 5}
    assert {item.key for item in taken.bad_sample_log._known.values()} >= {f"{i:05d}" for i in (2, 3, 4, 6, 7)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_of_bad_samples_ends_the_run_in_seconds(tmp_path, seed, capsys, workers):
    rng = np.random.default_rng(seed)
    samples = good(rng, 200)
    for sample in samples:
        sample["jpg"] = b"no picture"
    write_tar(tmp_path / "shards" / "0.tar", samples)
    began = time.monotonic()
    line = fails(capsys, fit(tmp_path, *SHORT, "--data.workers", str(workers)), status=1)
    assert time.monotonic() - began < 20
    assert "100 consecutive samples" in line
    assert ".jpg cannot be decoded" in line
    assert "0.tar sample '0" in line


def test_more_bad_samples_than_the_budget(tmp_path, seed, capsys):
    """The run ends with the most frequent causes, each with an example; with a larger budget it succeeds."""
    rng = np.random.default_rng(seed)
    samples = good(rng, 64)
    places = rng.choice(64, 15, replace=False).tolist()
    for place in places[:8]:
        samples[place]["jpg"] = b"no picture"
    for place in places[8:13]:
        samples[place]["txt"] = b"\xff"
    for place in places[13:]:
        samples[place]["txt"] = b""
    write_tar(tmp_path / "shards" / "0.tar", samples)
    line = fails(capsys, fit(tmp_path, *SHORT), status=1)
    assert "data.bad_samples" in line
    assert " 10 " in line
    assert ".jpg cannot be decoded" in line
    assert str(tmp_path / "run" / "bad_samples.jsonl") in line
    main(fit(tmp_path, *SHORT, "--data.bad_samples", "0.3", "--trainer.default_root_dir", str(tmp_path / "second")))
    named = {json.loads(line)["key"] for line in (tmp_path / "second" / "bad_samples.jsonl").read_text().splitlines()}
    assert named == {f"{place:05d}" for place in places}


def test_causes_are_named_in_order_of_frequency(tmp_path):
    bad_sample_log = BadSampleLog(20_000, tmp_path / "q.jsonl")  # a budget of 20
    rows = [("c", 1), ("b", 7), ("a", 9), ("d", 4)]
    bad = [
        BadRecord(0, f"{cause}.tar", f"{cause}{i}", f"cause {cause}", "") for cause, count in rows for i in range(count)
    ]
    bad_sample_log.add(bad[:20])
    with pytest.raises(DataError) as error:
        bad_sample_log.add(bad[20:])
    assert str(error.value) == (
        "21 bad samples, more than the 20 that data.bad_samples allows: cause a (9, such as a.tar sample 'a0'); "
        f"cause b (7, such as b.tar sample 'b0'); cause d (4, such as d.tar sample 'd0'); all are named in "
        f"{tmp_path / 'q.jsonl'}"
    )


def test_a_sample_that_is_read_often_counts_once(tmp_path):
    bad_sample_log = BadSampleLog(100, tmp_path / "q.jsonl")
    for _ in range(50):
        bad_sample_log.add(
            [BadRecord(1, "a.tar", "k", "cause", "detail"), BadRecord(1, "a.tar", "k", "cause", "detail")]
        )
    assert len(bad_sample_log) == 1
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 1


def test_ranks_share_one_file_and_one_budget(tmp_path):
    ranks = [BadSampleLog(100, tmp_path / "q.jsonl") for _ in range(2)]
    for i in range(5):
        for rank in ranks:
            rank.add([BadRecord(i, "a.tar", f"both{i}", "cause", "")])
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 5
    for i in range(5):
        ranks[i % 2].add([BadRecord(i, "b.tar", f"one{i}", "other", "")])
    with pytest.raises(DataError, match=r"^11 bad samples, more than the 10 .*cause \(5, .*other \(5, "):
        ranks[1].add([BadRecord(0, "c.tar", "k", "last", "")])
    with pytest.raises(DataError, match=r"^12 bad samples"):
        ranks[0].add([BadRecord(0, "c.tar", "l", "last", "")])


def test_a_resumed_run_continues_the_count(tmp_path):
    BadSampleLog(100, tmp_path / "q.jsonl").add([BadRecord(i, "a.tar", f"{i}", "cause", "") for i in range(10)])
    with pytest.raises(DataError, match=r"^11 bad samples"):
        BadSampleLog(100, tmp_path / "q.jsonl").add([BadRecord(0, "a.tar", "another", "cause", "")])


@pytest.mark.parametrize("cut", [b'{"shard": "a.tar", "ke', b'{"shard": "a.tar", "key": "k", "cause": "c", "detail": ""}', b"\xff", b"7"])  # fmt: skip  # noqa: E501
def test_an_incomplete_line_of_a_killed_run_does_no_harm(tmp_path, cut):
    path = tmp_path / "q.jsonl"
    BadSampleLog(100, path).add([BadRecord(0, "a.tar", "first", "cause", "")])
    with open(path, "ab") as file:
        file.write(cut)
    second = BadSampleLog(100, path)
    second.add([BadRecord(0, "a.tar", "second", "cause", "")])
    third = BadSampleLog(100, path)
    third.add([BadRecord(0, "a.tar", "third", "cause", "")])
    second.add([BadRecord(0, "a.tar", "second", "cause", ""), BadRecord(0, "a.tar", "third", "cause", "")])
    whole = int(cut.endswith(b"}"))
    assert len(second) == len(third) == 3 + whole
    keys = []
    for line in path.read_bytes().splitlines():
        try:
            keys.append(json.loads(line)["key"])
        except (ValueError, TypeError):
            assert line == cut
    assert [key for key in keys if key != "k"] == ["first", "second", "third"]


def test_the_replacement_does_not_depend_on_ranks_workers_or_stops(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for i in range(2):
        samples = good(rng, 12, 12 * i)
        for place in rng.choice(12, 3, replace=False).tolist():
            spoil(samples[place], KINDS[int(rng.integers(4))], rng)
        write_tar(tmp_path / f"{i}.tar", samples)
    index = ShardIndex.build(str(tmp_path))
    alone = [prints(batch) for batch in loader(index, seed=seed)]
    assert sum(len({row for *_, row in batch}) for batch in alone) <= 24
    for workers in (0, 2):
        parts = [list(loader(index, seed=seed, rank=rank, world=2, workers=workers)) for rank in range(2)]
        assert [prints(a) + prints(b) for a, b in zip(*parts, strict=True)] == alone
    first = loader(index, seed=seed, workers=1)
    passing = iter(first)
    seen = [prints(next(passing)) for _ in range(3)]
    second = loader(index, seed=seed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    passing.close()
    assert seen + [prints(batch) for batch in second] == alone


def test_bad_held_out_samples_are_left_out(tmp_path, seed):
    rng = np.random.default_rng(seed)
    samples = good(rng, 9)
    places = rng.choice(9, 3, replace=False).tolist()
    for place in places:
        spoil(samples[place], "corrupt JPEG", rng)
    index = ShardIndex.build(write_tar(tmp_path / "a.tar", samples))
    for workers in (0, 1):
        rows = [row for batch in loader(index, train=False, workers=workers) for *_, row in prints(batch)]
        assert rows == [-1 if i in places else i for i in range(9)]


def test_validation_metrics_leave_bad_samples_out(tmp_path, seed):
    """The metrics are the same with bad held-out pairs and without these pairs."""
    rng = np.random.default_rng(seed)
    write_tar(tmp_path / "shards" / "0.tar", good(rng, 16))
    held = good(rng, 12, 100)
    bad = [dict(sample) for sample in held[:3]]
    for sample in bad:
        sample["__key__"] = f"bad{sample['__key__']}"
        spoil(sample, "corrupt JPEG", rng)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    measured = []
    mixed = [bad[0], *held[:5], bad[1], *held[5:], bad[2]]
    for name, samples in (("with", mixed), ("without", held)):
        path = write_tar(tmp_path / name / "0.tar", samples)
        main(
            fit(
                tmp_path, "--data.val", path, "--trainer.max_steps", "1", "--trainer.precision", "64-true",
                "--data.tokenizer", str(tmp_path / "tokenizer.json"),
                "--trainer.default_root_dir", str(tmp_path / f"run-{name}"), "--trainer.check_val_every_n_epoch", "1",
            )
        )  # fmt: skip
        with open(tmp_path / f"run-{name}" / "metrics.csv") as file:
            measured.append({r["metric"]: float(r["value"]) for r in csv.DictReader(file) if "val/" in r["metric"]})
    assert measured[0].keys() >= {"val/loss", "val/mrr", "val/median_rank"}
    assert measured[0] == pytest.approx(measured[1], rel=1e-9)
    lines = (tmp_path / "run-with" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [sample["__key__"] for sample in bad]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_members_that_are_code_are_never_run(tmp_path, seed):
    """webdataset's own decoder would unpickle them."""
    rng = np.random.default_rng(seed)
    samples = good(rng, 16)
    owned = tmp_path / "owned"
    trap = pickle.dumps(Trap(str(owned)))
    archive = io.BytesIO()
    torch.save(Trap(str(owned)), archive)
    array = io.BytesIO()
    np.save(array, np.array([Trap(str(owned))], dtype=object), allow_pickle=True)
    for sample in samples:
        sample |= {"pyd": trap, "pickle": trap, "pkl": trap, "pth": archive.getvalue(), "npy": array.getvalue()}
    write_tar(tmp_path / "shards" / "0.tar", samples)
    main(["index", str(tmp_path / "shards"), "--hash", "--workers", "0"])
    main(fit(tmp_path, *SHORT))
    assert not owned.exists()
    pickle.loads(trap)  # the control
    assert owned.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_keys_that_are_paths_or_control_sequences(tmp_path, seed, capfd, monkeypatch, workers):
    """A key is never used as a path, and no control character of it is printed or written."""
    rng = np.random.default_rng(seed)
    samples = good(rng, 20)
    keys = ["../../../tmp/climb", "/etc/absolute", "a/../../b", "\x1b[2J\x1b[31mred", "line\nbreak", "\u202ereversed"]
    for sample, key in zip(samples, keys, strict=False):
        sample["__key__"] = key
        sample["jpg"] = b"bad"
    samples[10]["__key__"], samples[11]["__key__"] = "\x1b[1mfine", "../fine"
    write_tar(tmp_path / "shards" / "0.tar", samples)
    before = set(tmp_path.parent.rglob("*"))
    main(fit(tmp_path, *SHORT, "--data.workers", str(workers)))
    new = {path for path in set(tmp_path.parent.rglob("*")) - before if tmp_path / "run" not in path.parents}
    assert {path.name for path in new} <= {"run", "dualenc.index"}
    text = (tmp_path / "run" / "bad_samples.jsonl").read_bytes()
    assert b"\x1b" not in text
    assert {json.loads(line)["key"] for line in text.splitlines()} >= set(keys[:2])
    for sample in samples[:12]:
        sample["jpg"] = b"bad"
    write_tar(tmp_path / "shards" / "0.tar", samples)
    main(["index", str(tmp_path / "shards"), "--workers", "0"])
    with pytest.raises(SystemExit):
        main(fit(tmp_path, *SHORT, "--trainer.default_root_dir", str(tmp_path / "more")))
    printed = capfd.readouterr()
    assert "more than the 10" in printed.err
    assert "\x1b" not in printed.err + printed.out
    assert "\u202e" not in printed.err + printed.out


def test_a_disk_error_is_not_a_bad_sample(tmp_path, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    index = ShardIndex.build(write_tar(tmp_path / "a.tar", good(rng, 8)))
    expected = [prints(batch) for batch in loader(index, seed=seed)]
    waits, left = [], [1]
    real = os.pread

    def pread(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(index_module.time, "sleep", waits.append)
    monkeypatch.setattr(os, "pread", pread)
    bad_sample_log = BadSampleLog(8, tmp_path / "q.jsonl")
    assert [prints(batch) for batch in loader(index, seed=seed, bad_sample_log=bad_sample_log)] == expected
    assert len(waits) == 1
    left[0] = 1 << 30
    with pytest.raises(DataError, match=rf"^shard {tmp_path}/a\.tar cannot be read: Input/output error; 3 tries"):
        list(loader(index, seed=seed, bad_sample_log=bad_sample_log))
    assert len(waits) == 3
    assert len(bad_sample_log) == 0
    assert not (tmp_path / "q.jsonl").exists()


def test_a_disk_error_ends_a_run(tmp_path, seed, capsys, monkeypatch):
    rng = np.random.default_rng(seed)
    write_tar(tmp_path / "shards" / "0.tar", good(rng, 32))
    real = PairDataset.__getitem__

    def failing(self, request):
        def pread(*arguments):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", pread)
            patch.setattr(index_module.time, "sleep", lambda seconds: None)
            return real(self, request)

    monkeypatch.setattr(pairs_module.PairDataset, "__getitem__", failing)
    for workers in ("0", "1"):
        line = fails(capsys, fit(tmp_path, *SHORT, "--data.workers", workers,
                                 "--trainer.default_root_dir", str(tmp_path / workers)), status=1)  # fmt: skip
        assert line.startswith(f"dualenc: error: shard {tmp_path}/shards/0.tar cannot be read: Input/output error")
        assert not (tmp_path / workers / "bad_samples.jsonl").exists()
