"""The doctor: exactly the faults that a test puts into shards are found, counted and named."""

import bz2
import gzip
import html
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    DATA,
    WORDS,
    caption,
    encode,
    needs_data,
    pixels,
    smooth,
    tiny_tokenizer,
    write_benchmark,
    write_shards,
    write_tar,
)
from PIL import Image
from scipy.stats import binomtest

from dualenc.cli import main
from dualenc.data.doctor import checks as doctor
from dualenc.data.doctor.checks import estimate, examine, printable

EVIL = ["<script>alert(1)<", "\x1b[31mred\x1b[2J", "../../etc/passwd", "[bold]x[", "caf\u202e\u00e9", "'\"&amp;"]


def finding(found: Any, what: str) -> Any:
    """Return the finding that starts with these words, or None."""
    matches = [item for item in found.findings if item.what.startswith(what)]
    assert len(matches) < 2, matches
    return matches[0] if matches else None


def named(item: Any) -> set[str]:
    """Return the keys at the beginning of a finding's examples."""
    return {re.match(r"'((?:[^'\\]|\\.)*)' in ", example)[1] for example in item.examples}  # type: ignore[index]


def picture(rng: np.random.Generator, height: int = 0, width: int = 0) -> bytes:
    height, width = height or int(rng.integers(40, 70)), width or int(rng.integers(40, 70))
    return encode(pixels(rng, height, width), str(rng.choice(["jpeg", "png", "webp"])))


def member(data: bytes) -> str:
    return "jpg" if data.startswith(b"\xff\xd8") else "png" if data.startswith(b"\x89") else "webp"


def faulty(folder: Path, seed: int) -> tuple[list[str], dict[str, set[str]], int]:
    """Write shards with several samples of each fault, in random order.

    Returns:
        The paths, the keys by fault, and the number of samples.
    """
    rng = np.random.default_rng(seed)
    samples: list[dict[str, Any]] = []
    truth: dict[str, set[str]] = {}

    def add(fault: str | None, image: bytes | None = None, text: bytes | None = None, **options: Any) -> None:
        image = picture(rng) if image is None else image
        text = f"{caption(rng)} {len(samples)}".encode() if text is None else text
        sample = {"__key__": f"{rng.integers(1 << 40):x}-{len(samples)}", member(image): image, "txt": text}
        for extension in options.get("without", ()):
            sample = {name: data for name, data in sample.items() if name not in extension}
        samples.append(sample)
        if fault is not None:
            truth.setdefault(fault, set()).add(sample["__key__"])

    def several(most: int = 4) -> range:
        return range(int(rng.integers(1, most + 1)))

    for _ in range(int(rng.integers(30, 60))):
        add(None)
    whole = encode(smooth(rng, 60, 60), "jpeg")
    faults: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("no image", lambda: {"without": [("jpg", "png", "webp")]}),
        ("no caption", lambda: {"without": [("txt",)]}),
        (".jpg cannot be decoded", lambda: {"image": b"\xff\xd8\xff" + rng.bytes(200)}),
        (".jpg cannot be decoded", lambda: {"image": whole[: len(whole) // int(rng.integers(2, 9))]}),
        (".webp is an HTML page", lambda: {"image": b"\n<!doctype html>404"}),
        (".webp is an empty file", lambda: {"image": b""}),
        (".webp is a GIF", lambda: {"image": encode(pixels(rng), "gif")}),
        (".txt is not UTF-8", lambda: {"text": b"caf\xe9 " + rng.bytes(1)}),
        ("txt holds no caption", lambda: {"text": b" \n\t"}),
        ("image side below 32 pixels", lambda: {"image": picture(rng, int(rng.integers(7, 32)), 33)}),
        ("image longer than 5 times", lambda: {"image": picture(rng, 40, int(rng.integers(201, 400)))}),
        (
            "image of one color",
            lambda: {"image": encode(Image.new("RGB", (50, 40 + len(samples)), tuple(rng.bytes(3))))},
        ),
    ]
    for fault, make in faults:
        for _ in several():
            add(fault, **make())
    for image in [picture(rng) for _ in several()]:
        add(None, image)
        for _ in several():
            add("image identical to", image)
    for text in [f"the same {i}".encode() for i in several()]:
        add(None, text=text)
        for _ in several():
            add("caption identical to", text=text)
    rng.shuffle(samples)  # type: ignore[arg-type]
    cuts = np.sort(rng.choice(np.arange(1, len(samples)), 3, replace=False))
    parts = np.split(np.array(samples, dtype=object), cuts)
    return [write_tar(folder / f"{i}.tar", list(part)) for i, part in enumerate(parts)], truth, len(samples)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_counted_and_named(tmp_path: Path, seed: int, workers: int) -> None:
    shards, truth, samples = faulty(tmp_path, seed)
    found = examine(shards, sample=None, workers=workers)
    assert found.facts["samples"] == samples
    assert found.facts["pairs"] == samples - len(truth["no image"]) - len(truth["no caption"])
    bad = [fault for fault in truth if fault.startswith((".", "txt"))]
    expected = 0
    for fault, keys in truth.items():
        items = [item for item in found.findings if item.what.startswith(fault)]
        expected += len(items)
        assert sum(item.count for item in items) == len(keys), fault
        assert all(item.estimate is None for item in items)
        if not fault.endswith("identical to"):
            assert set().union(*map(named, items)) == keys, fault
    stop = finding(found, "bad in total")
    count = sum(len(truth[fault]) for fault in bad)
    assert (stop is not None) == (count > 10)
    if stop is not None:
        assert (stop.severity, stop.count) == ("error", count)
    assert len(found.findings) == expected + (stop is not None)
    assert found.facts["bytes"] == sum(os.path.getsize(shard) for shard in shards)


def test_nothing_is_found_in_good_shards(tmp_path: Path, seed: int) -> None:
    """The distributions and quantiles are those of the written data."""
    rng = np.random.default_rng(seed)
    sizes = [tuple(int(v) for v in rng.integers(40, 90, 2)) for _ in range(20)]
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(1, 30)))) + f" {i}" for i in range(20)]
    images = [encode(pixels(rng, *size)) for size in sizes]
    write_tar(tmp_path / "a.tar", [{"__key__": f"{i}", "png": images[i], "txt": texts[i].encode()} for i in range(20)])
    found = examine(tmp_path / "a.tar", sample=None, workers=0)
    assert found.findings == []
    values = {
        "height": [h for h, _ in sizes],
        "width": [w for _, w in sizes],
        "shorter side": [min(size) for size in sizes],
        "longer / shorter side": [max(size) / min(size) for size in sizes],
        "bytes of an image": list(map(len, images)),
        "words of a caption": [len(text.split()) for text in texts],
        "captions of a sample": [1] * 20,
        "samples of a shard": [20],
    }
    assert {name: sorted(got.tolist()) for name, got in found.distributions.items()} == {
        name: sorted(expected) for name, expected in values.items()
    }
    for name, quantiles in found.facts["quantiles"].items():
        assert (quantiles["least"], quantiles["most"]) == (min(values[name]), max(values[name]))
        assert quantiles["median"] == pytest.approx(np.median(values[name]))


def test_many_pixels(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    sides = [(50, 50), (50, 51), (60, 60)]
    samples = [{"__key__": f"{h}x{w}", "png": encode(pixels(rng, h, w)), "txt": f"{w}".encode()} for h, w in sides]
    shard = write_tar(tmp_path / "a.tar", samples)
    assert examine(shard, workers=0).findings == []
    monkeypatch.setattr(doctor, "MANY_PIXELS", 2500)
    monkeypatch.setattr(doctor, "WASTED_SIDE", 49)
    found = examine(shard, workers=0)
    assert named(finding(found, "image more than 2,500 pixels")) == {"50x51", "60x60"}
    assert finding(found, "image with both sides above 49").count == 3


def test_every_bad_shard_is_named(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    good = [Path(path) for path in write_shards(tmp_path / "good", [3, 2, 4], seed)]
    whole = good[0].read_bytes()
    bad = {
        "cut": (whole[: int(rng.integers(600, len(whole) - 10_240 - 1024))], "cut off"),
        "gzip": (gzip.compress(whole), "compressed (gzip)"),
        "bzip2": (bz2.compress(whole), "compressed (bzip2)"),
        "zero": (b"", "empty"),
        "noise": (b"no tar" + rng.bytes(5000), "not a tar"),
        "html": (b"<html>404", "an HTML page"),
    }
    for name, (data, _) in bad.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
    write_tar(tmp_path / "empty.tar", [])
    paths = [
        *good,
        *(tmp_path / f"{name}.tar" for name in [*bad, "empty", "gone"]),
        good[1],
        tmp_path / "no-{0..1}.tar",
    ]
    rng.shuffle(paths)  # type: ignore[arg-type]
    found = examine([str(path) for path in paths], workers=0)
    item = finding(found, "cannot be read")
    assert (item.severity, item.count, item.of) == ("error", len(bad), len(good) + len(bad) + 1)
    for name, (_, cause) in bad.items():
        (line,) = [example for example in item.examples if f"{name}.tar" in example]
        assert cause in line
    missing = finding(found, "missing")
    assert (missing.severity, missing.count) == ("error", 3)
    assert all(any(name in text for text in missing.examples) for name in ("gone.tar", "no-0.tar", "no-1.tar"))
    assert finding(found, "named twice").examples == [str(good[1])]
    assert finding(found, "no samples").examples == [str(tmp_path / "empty.tar")]
    assert found.facts["samples"] == 9  # The readable shards are examined.


def test_all_shards_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        (tmp_path / f"{i}.tar").write_bytes(b"")
    found = examine(tmp_path, workers=0)
    assert [(item.what, item.count, item.of) for item in found.findings] == [("cannot be read", 3, 3)]
    with pytest.raises(SystemExit) as caught:
        main(["doctor", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    for i in range(3):
        assert f"{i}.tar cannot be read: it is empty" in printed
        assert f"{i}.tar cannot be read: it is empty" in page


def test_no_pairs(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [{"__key__": f"{i}", "png": picture(rng)} for i in range(4)]
    texts = [{"__key__": f"{i}", "txt": b"a"} for i in range(4, 7)]
    found = examine(write_tar(tmp_path / "a.tar", [*images, *texts]), workers=0)
    assert [(item.severity, item.what, item.count, item.of) for item in found.findings] == [
        ("error", "no pair of image and caption", 7, 7),
        ("warning", "no image", 3, 7),
        ("warning", "no caption", 4, 7),
    ]
    assert found.facts["looked at"] == 0


@pytest.mark.parametrize("bad", [0, 10, 11])
def test_budget_of_bad_pairs(tmp_path: Path, seed: int, bad: int) -> None:
    """Ten bad pairs are always allowed, or the given share if that is more; each pair counts once."""
    rng = np.random.default_rng(seed)
    ok = picture(rng)
    samples = [
        {"__key__": f"{i}", "jpg": b"" if i < bad else ok, "txt": b"" if i < bad else f"{i}".encode()}
        for i in range(40)
    ]
    rng.shuffle(samples)  # type: ignore[arg-type]
    shard = write_tar(tmp_path / "a.tar", samples)
    assert any(item.severity == "error" for item in examine(shard, workers=0).findings) == (bad > 10)
    found = examine(shard, workers=0, bad_samples=max(bad, 1) / 40)
    assert not any(item.severity == "error" for item in found.findings)


@pytest.mark.parametrize("run", [99, 100])
def test_many_consecutive_bad_pairs(tmp_path: Path, seed: int, run: int) -> None:
    """A training run stops at a hundred consecutive bad pairs, whatever its budget."""
    ok = picture(np.random.default_rng(seed))
    bad = [*range(7, 7 + run), 5, 8 + run, 300]
    samples = [{"__key__": f"{i}", "jpg": b"" if i in bad else ok, "txt": f"{i}".encode()} for i in range(310)]
    samples[50].pop("txt")  # Not a pair, so it does not interrupt the consecutive ones.
    samples[7 + run]["jpg"], samples[6]["jpg"] = (b"", ok) if run == 100 else (ok, ok)
    found = examine(write_tar(tmp_path / "a.tar", samples), sample=None, workers=0, bad_samples=1.0)
    item = finding(found, "bad and consecutive")
    assert (item is not None) == (run == 100)
    if item is not None:
        assert (item.severity, item.count) == ("error", 101)
        assert named(item) == {"7", "108"}


@pytest.mark.parametrize(("count", "sampled", "total"), [(0, 1000, 10**6), (3, 1000, 10**7), (77, 100, 10**5)])
def test_the_interval_of_an_estimate_is_wilsons(count: int, sampled: int, total: int) -> None:
    estimated, low, high = estimate(count, sampled, total)
    reference = binomtest(count, sampled).proportion_ci(0.95, "wilson")
    assert estimated == round(count / sampled * total)
    assert low == max(count, math.floor(reference.low * total)) or abs(low - reference.low * total) < 1.001
    assert abs(high - reference.high * total) < 1.001
    assert estimate(count, sampled, sampled) == (count, count, count)  # All pairs were examined.


@pytest.mark.long
def test_estimates_from_a_sample_of_pairs(tmp_path: Path, seed: int) -> None:
    """Nearly all intervals contain the truth; a draw includes all shards and repeats with its seed."""
    rng = np.random.default_rng(seed)
    tiny, ok = encode(pixels(rng, 8, 8)), encode(pixels(rng, 40, 40))
    small = rng.random(400) < rng.uniform(0.1, 0.4)
    samples = [{"__key__": f"{i}", "png": tiny if small[i] else ok, "txt": f"{i}".encode()} for i in range(400)]
    shards = [write_tar(tmp_path / f"{i}.tar", samples[40 * i : 40 * i + 40]) for i in range(10)]
    hits, drawn = 0, []
    for number in range(25):
        found = examine(shards, sample=100, seed=number, workers=0)
        item = finding(found, "image side below 32")
        assert (item.of, item.unit) == (100, "pairs looked at")
        estimated, low, high = item.estimate
        assert estimated == 4 * item.count
        hits += low <= small.sum() <= high
        drawn.append(item.count)
        assert "counted among 100 pairs of 400 only" in finding(found, "image identical to").what
        assert found.facts["looked at"] == 100
    assert hits >= 22
    assert len(set(drawn)) > 1
    keys = named(finding(examine(shards, sample=100, seed=3, workers=0), "image side below 32"))
    assert keys == named(finding(examine(shards, sample=100, seed=3, workers=2), "image side below 32"))
    assert len({int(key) // 40 for key in keys}) > 2
    assert finding(examine(shards, sample=400, workers=0), "image side below 32").count == small.sum()


def test_a_sample_without_bad_pairs_has_an_upper_bound(tmp_path: Path, seed: int) -> None:
    write_shards(tmp_path, [200], seed)
    item = finding(examine(tmp_path, sample=20, workers=0), "no bad pair among those looked at")
    assert (item.severity, item.count, item.estimate[0]) == ("info", 0, 0)
    assert item.estimate[2] > 5
    assert finding(examine(tmp_path, sample=200, workers=0), "no bad pair") is None


@pytest.mark.parametrize("kind", ["classification", "multilabel", "retrieval", "shards"])
def test_leakage(tmp_path: Path, seed: int, kind: str) -> None:
    """Images of equal bytes are found in every kind of evaluation set; the same image in other bytes is not."""
    rng = np.random.default_rng(seed)
    if kind == "shards":
        other = Path(write_shards(tmp_path / "other", [12], seed)[0])
    else:
        other = write_benchmark(tmp_path / "set", seed, kind, counts=(5, 7))
    index = doctor._open_against(other, "txt", None)[1]
    theirs = {sample.key: sample.read(str(sample.image)) for sample in index}
    taken = rng.choice(sorted(theirs), 4, replace=False).tolist()
    samples = [{"__key__": f"k{i}", "png": picture(rng), "txt": f"{i}".encode()} for i in range(10)]
    for i, key in enumerate(taken):
        samples[2 * i]["png"] = theirs[key]
    samples[9]["png"] = encode(Image.fromarray(np.asarray(Image.open(_file(theirs[taken[0]])))), "bmp")
    lines = [line for sample in index if "txt" in sample for line in sample.read("txt").decode().split("\n")]
    if lines:
        samples[1]["txt"] = lines[0].encode()
    found = examine(write_tar(tmp_path / "a.tar", samples), sample=None, against=[other], workers=0)
    item = finding(found, "image that is also in")
    assert (item.severity, item.count, item.of) == ("warning", 4, 10)
    pairs = {tuple(re.findall(r"'([^']*)' in ", example)) for example in item.examples}
    assert pairs == {(f"k{2 * i}", key) for i, key in enumerate(taken)}
    assert found.facts["against"] == [
        {
            "name": "set" if kind != "shards" else str(other),
            "images": 12,
            "of these among those looked at": 4,
            "different captions": len(set(lines)) if kind in ("retrieval", "shards") else 0,
            "of these captions in both": 1 if lines else 0,
        }
    ]
    (title,) = [title for title in found.galleries if title.startswith("Also in")]
    assert all(len(group) == 2 and found.picture(group[1][1]) for group in found.galleries[title])
    clean = examine(write_shards(tmp_path / "clean", [5], seed + 1), against=[other], workers=0)
    assert finding(clean, "image that is also in") is None


def test_problems_of_the_evaluation_set_are_findings(tmp_path: Path, seed: int) -> None:
    other = write_benchmark(tmp_path / "set", seed, counts=(5, 7))
    shards = write_shards(tmp_path / "mine", [5], seed + 1)
    assert not [item for item in examine(shards, against=[other], workers=0).findings if "in set" in item.what]
    (other / "test/nshards.txt").write_text("4")
    (other / "classnames.txt").write_text("a\nb\nc\nd\ne\n")
    found = examine(shards, against=[other], workers=0)
    item = finding(found, "shard missing, in set")
    assert (item.severity, item.count) == ("warning", 2)
    assert [example.startswith(f"{other}/test/{i}.tar") for i, example in enumerate(item.examples, 2)] == [True, True]
    assert finding(found, "class out of range, in set").count == 2
    assert found.facts["against"][0]["images"] == 10


def _file(data: bytes) -> Any:
    import io

    return io.BytesIO(data)


def test_duplicates_against_brute_force(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [picture(rng) for _ in range(12)]
    texts = [[f"text {v}" for v in rng.integers(0, 30, int(rng.integers(1, 4)))] for _ in range(40)]
    chosen = rng.integers(0, 12, 40)
    samples = [
        {"__key__": f"{i}", "png": images[chosen[i]], "json": json.dumps({"said": texts[i]}).encode()}
        for i in range(40)
    ]
    found = examine(write_tar(tmp_path / "a.tar", samples), "json.said", sample=None, workers=2)
    assert finding(found, "image identical to").count == 40 - len(set(chosen.tolist()))
    counts = Counter(text for captions in texts for text in set(captions))
    item = finding(found, "caption identical to")
    assert (item.count, item.of) == (counts.total() - len(counts), counts.total())
    assert found.facts["captions"] == sum(map(len, texts))
    frequent = {entry["caption"]: entry["samples"] for entry in found.facts["most frequent captions"]}
    assert frequent.items() <= {repr(text): count for text, count in counts.items()}.items()
    assert sorted(frequent.values()) == sorted(n for n in sorted(counts.values())[-20:] if n > 1)


def test_captions_in_tokens(tmp_path: Path, seed: int) -> None:
    """Truncated captions are counted by their tokens; words outside of the vocabulary are found."""
    rng = np.random.default_rng(seed)
    tokenizer = tiny_tokenizer(10**6)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(1, 30)))) for _ in range(30)]
    samples = [{"__key__": f"{i}", "png": picture(rng), "txt": text.encode()} for i, text in enumerate(texts)]
    shard = write_tar(tmp_path / "a.tar", samples)
    lengths = [len(tokenizer.backend.encode(text).ids) for text in texts]
    limit = int(np.median(lengths))
    found = examine(shard, tokenizer=tokenizer, context_length=limit, workers=0)
    assert sorted(found.distributions["tokens of a caption"].tolist()) == sorted(lengths)
    item = finding(found, f"longer than {limit}")
    assert (item.severity, item.count, item.of) == ("warning", sum(n > limit for n in lengths), 30)
    assert named(item) >= {f"{i}" for i, n in enumerate(lengths) if n == max(lengths)} if item.count < 20 else True
    assert finding(found, "unknown") is None
    assert finding(examine(shard, tokenizer=tokenizer, context_length=max(lengths), workers=0), "longer") is None
    samples[7]["txt"] = "\u4f60\u597d \u4e16\u754c \u732b \u72d7 \u7ea2 \u84dd".encode()
    item = finding(examine(write_tar(tmp_path / "b.tar", samples), tokenizer=tokenizer, workers=2), "unknown words")
    assert (item.severity, item.count, named(item)) == ("warning", 1, {"7"})


def test_captions_that_cannot_be_tokenized(tmp_path: Path, seed: int) -> None:
    """One caption has half of a surrogate pair, which JSON can hold; another has no tokens."""
    rng = np.random.default_rng(seed)
    tokenizer = tiny_tokenizer(100)
    tokenizer.backend.post_processor = None
    samples = [
        {"__key__": f"{i}", "png": picture(rng), "json": f'{{"said": "{text}"}}'.encode()}
        for i, text in enumerate(["a cat", "a \\ud83d cat", "\\ufffd"])
    ]
    found = examine(write_tar(tmp_path / "a.tar", samples), "json.said", tokenizer=tokenizer, workers=0)
    assert named(finding(found, "json.said holds a caption not UTF-8")) == {"1"}
    assert named(finding(found, "caption without any token")) == {"2"}
    assert [item.count for item in found.findings] == [1, 1]


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    try:
        main(["doctor", *arguments, "--workers", "0"])
        code: Any = 0
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert code == status, err
    assert "Traceback" not in out + err
    return out, err


@pytest.mark.long
def test_table_json_and_page_agree(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    shards, truth, _ = faulty(tmp_path / "shards", seed)
    over = sum(len(truth[fault]) for fault in truth if fault.startswith((".", "txt"))) > 10
    out = tmp_path / "out"
    printed, errors = run(capsys, *shards, "--all", "--out", str(out), status=int(over))
    assert (errors.count("dualenc: error: ") == 1) == over
    result = json.loads(run(capsys, *shards, "--all", "--json", "--out", str(out), status=int(over))[0])
    assert json.loads((out / "doctor.json").read_text("utf-8")) == result
    page = re.sub(r"<[^>]*>", "", html.unescape((out / "report.html").read_text("utf-8")))
    for item in result["findings"]:
        counted = f"{item['count']:,} of {item['of']:,} {item['unit']}"
        assert f"{item['what']}: {counted}" in printed
        assert counted in page
        assert item["what"] in page
        assert item["share"] == pytest.approx(item["count"] / item["of"])
        for example in item["examples"][:3]:
            assert example in printed
            assert example in page
    for value in (result["facts"]["samples"], result["facts"]["pairs"]):
        assert f"{value:,}" in printed


def test_status(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning does not change the exit status; a truncated shard does, and the others are still examined."""
    rng = np.random.default_rng(seed)
    samples = [{"__key__": f"{i}", "png": picture(rng, 20, 20), "txt": b"a"} for i in range(5)]
    good = write_tar(tmp_path / "good.tar", samples)
    assert "warning" in run(capsys, good)[0]
    (tmp_path / "bad.tar").write_bytes(Path(good).read_bytes()[:1000])
    printed, errors = run(capsys, str(tmp_path), status=1)
    assert "bad.tar" in printed
    assert re.search("2 shards, 1 .* 5 samples", printed)
    assert len(errors.strip().splitlines()) == 1


def test_wrong_use(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = write_shards(tmp_path / "shards", [3], seed)
    for arguments, what in (
        ([], "SHARDS"),
        ([str(tmp_path / "none.tar")], "none.tar"),
        ([str(tmp_path / "none-{0..3}.tar")], "none-0.tar"),
        ([shard, "--captions", "text"], "json.FIELD"),
        ([shard, "--sample", "0"], "--sample"),
        ([shard, "--sample", "many"], "sample"),
        ([shard, "--context_length", "77"], "--tokenizer"),
        ([shard, "--tokenizer", str(tmp_path / "no.json")], "no.json"),
        ([shard, "--against", str(tmp_path / "nowhere")], "nowhere"),
        ([shard, "--out", shard], "--out"),
        ([shard, "--seed", "-1"], "--seed"),
    ):
        out, errors = run(capsys, *arguments, status=2)
        assert errors.startswith("dualenc: error: ")
        assert len(errors.strip().splitlines()) == 1
        assert what in errors, errors
        assert out == ""
    printed = run(capsys, shard, "--captions", "json.nothing", status=1)[0]
    assert "'nothing': 3 of 3" in printed


def test_evil_names_are_harmless(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Terminal escapes, markup and paths in keys, captions and file names are displayed as text."""
    rng = np.random.default_rng(seed)
    image, text = picture(rng, 20, 20), f"<img src=x onerror=alert(1)> {EVIL[1]}".encode()
    data = [b"<html>\x1b[31m", image, image]
    samples = [{"__key__": f"{name}{i}", "jpg": data[i], "txt": text} for name in EVIL for i in range(3)]
    samples += [{"__key__": f"{name}3", f"txt\x1b[31m{i}": b"alone"} for i, name in enumerate(EVIL)]
    shards = [write_tar(tmp_path / "a.tar", samples)]
    (tmp_path / "\x1b[31m<script>.tar").write_bytes(b"")
    shards += [str(tmp_path / "\x1b[31m<script>.tar")]
    out = tmp_path / "out"
    for more in ((), ("--json",)):
        printed, errors = run(capsys, *shards, "--out", str(out), "--against", shards[0], *more, status=1)
        assert printable((printed + errors).replace("\n", "")) == (printed + errors).replace("\n", "")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["doctor.json", "report.html"]
    page = (out / "report.html").read_text("utf-8")
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;alert(1)" in page or "&lt;script&gt;" in page
    assert page.count("<img") > 4


@pytest.mark.long
@needs_data
def test_real_data(capsys: pytest.CaptureFixture[str]) -> None:
    """Flickr8k has two identical images, and none of its validation images."""
    val = str(DATA / "retrieval_flickr8k_val")
    flickr = ["--captions", "json.captions", "--all", "--json", "--against", val]
    result = json.loads(run(capsys, str(DATA / "flickr8k"), *flickr)[0])
    facts = result["facts"]
    assert (facts["samples"], facts["looked at"], facts["captions"], facts["images"]) == (
        6000,
        6000,
        30_000,
        {"jpg": 6000},
    )
    assert facts["against"][0] | {"different captions": 0, "of these captions in both": 0} == {
        "name": "retrieval_flickr8k_val", "images": 1000, "of these among those looked at": 0,
        "different captions": 0, "of these captions in both": 0,
    }  # fmt: skip
    assert {item["what"].split()[0]: item["count"] for item in result["findings"]} == {"image": 1, "caption": 154}
    emoji = json.loads(run(capsys, str(DATA / "emoji"), "--json", "--against", str(DATA / "emoji"))[0])
    assert emoji["facts"]["against"][0]["images"] == 2317
    assert next(item["count"] for item in emoji["findings"] if "also in" in item["what"]) == 1000
