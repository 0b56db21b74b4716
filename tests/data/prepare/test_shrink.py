import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pytest
import torch
from helpers import DATA, encode, needs_data, pixels, smooth
from PIL import Image

from dualenc.cli import main
from dualenc.data import ImageError, Preprocess, ShardIndex, decode_image
from dualenc.data.prepare.shrink import shrink_image, shrink_shards
from dualenc.utils.errors import DataError

SIZE = 24
# EXIF orientation -> how an image is stored that a viewer rotates back.
TURNED = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    6: lambda x: np.rot90(x, 1), 8: lambda x: np.rot90(x, -1),
}  # fmt: skip
KINDS = (
    "jpeg", "turned jpeg", "gray jpeg", "cmyk jpeg", "png", "gray png", "16-bit png", "palette png",
    "clear palette png", "alpha png", "webp", "lossless webp", "alpha webp",
)  # fmt: skip
FORMATS = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def picture(rng, kind, height, width):
    """Return a file, and the RGB pixels (H, W, 3) that a viewer shows, up to the loss of its format."""
    seen = smooth(rng, height, width)
    if "gray" in kind or "16-bit" in kind:
        seen = np.repeat(seen[..., :1], 3, 2)
    *how, form = kind.split()
    options = {"quality": 98} if form != "png" else {}
    stored = Image.fromarray(seen)
    match " ".join(how):
        case "turned":
            tag = int(rng.choice(list(TURNED)))
            stored, options["exif"] = Image.fromarray(np.ascontiguousarray(TURNED[tag](seen))), Image.Exif()
            options["exif"][0x0112] = tag
        case "gray":
            stored = Image.fromarray(seen[..., 0])
        case "cmyk":
            ink = np.concatenate([255 - seen, np.zeros_like(seen[..., :1])], 2)
            stored = Image.fromarray(ink, "CMYK")
        case "16-bit":
            stored = Image.fromarray(seen[..., 0].astype(np.uint16) * 257)
        case "palette" | "clear palette":
            stored = stored.quantize(32)
            seen = np.asarray(stored.convert("RGB"))
            if "clear" in how:
                options["transparency"] = int(np.asarray(stored)[0, 0])
                seen = np.where((np.asarray(stored) == options["transparency"])[..., None], 255, seen)
        case "lossless":
            options = {"lossless": True}
        case "alpha":
            alpha = smooth(rng, height, width)[..., :1]
            stored = Image.fromarray(np.concatenate([seen, alpha], 2))
            share = alpha / 255
            seen = (seen * share + 255 * (1 - share)).round().astype(np.uint8)
    return encode(stored, form, **options), seen


def smaller(seen, size):
    """Resize with Pillow to the shorter side `size`; the longer side is rounded down."""
    height, width = seen.shape[:2]
    if min(height, width) <= size:
        return seen
    target = (size, height * size // width) if width <= height else (width * size // height, size)
    return np.asarray(Image.fromarray(seen).resize(target, Image.Resampling.BICUBIC))


def pixels_of(data):
    return decode_image(data).permute(1, 2, 0).numpy()


def sides(rng):
    """Return a random height and width: small, large or elongated."""
    return [int(side) for side in rng.integers(2, 4 * SIZE, 2)]


def write(path, members, form=tarfile.PAX_FORMAT):
    """Write a shard of (name, bytes) with tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid, info.uname = len(data), 1_700_000_000, 7, "somebody"
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path):
    """Read (name, bytes) of all members with tarfile."""
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isfile()]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def random_shards(folder, rng, layout=(4, 1, 6), kinds=KINDS):
    """Write shards of all kinds of images and names; return the visible pixels of each image by shard and name."""
    shown = {}
    for number, count in enumerate(layout):
        members = []
        for i in range(count):
            key = [f"{i:04d}", f"folder.x/Ünï{i}", f"{'long' * 30}/{'é' * 90}{i}", f"a b/{i}\udcff", f"猫{i}"][i % 5]
            data, seen = picture(rng, str(rng.choice(kinds)), *sides(rng))
            name = f"{key}.{rng.choice(['jpg', 'jpeg', 'png', 'webp'])}"
            shown[f"{number}.tar", name] = seen
            mask = encode(pixels(rng, 2 * SIZE, 2 * SIZE))
            others = [("txt", b"a hat"), ("json", b'{"a": 1}'), ("seg.png", mask), ("npy", rng.bytes(2000))]
            own = [(name, data), *((f"{key}.{kind}", other) for kind, other in others)]
            members += [own[k] for k in rng.permutation(len(own))]
        write(folder / f"{number}.tar", members, (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[number % 2])
    return shown


@pytest.mark.parametrize("kind", KINDS)
def test_the_visible_image_is_resized(seed, kind):
    rng = np.random.default_rng(seed)
    for _ in range(6):
        data, seen = picture(rng, kind, *(int(side) for side in rng.integers(SIZE + 1, 5 * SIZE, 2)))
        small = shrink_image(data, SIZE, 90)
        found, wanted = pixels_of(small).astype(float), smaller(seen, SIZE).astype(float)
        assert found.shape == wanted.shape
        assert min(found.shape[:2]) == SIZE
        error = np.abs(found - wanted)
        exact = kind.endswith("png") or kind == "lossless webp"
        assert error.mean() < (0.4 if exact else 13 if kind.endswith("webp") else 6)
        assert np.abs(found[::-1] - wanted).mean() > 1.5 * error.mean()  # the control: upside down
        assert Image.open(io.BytesIO(small)).format == FORMATS[kind.split()[-1]]
        if "gray" in kind:
            assert Image.open(io.BytesIO(small)).mode == "L"
        size = int(min(seen.shape[:2]))
        assert shrink_image(data, size, 90) is data


@pytest.mark.parametrize("kind", ["png", "palette png", "alpha png", "16-bit png", "lossless webp"])
def test_at_the_training_size_the_pixels_are_the_same(seed, kind):
    rng = np.random.default_rng(seed)
    for _ in range(6):
        data, _ = picture(rng, kind, *sides(rng))
        small = shrink_image(data, SIZE, 90)
        assert torch.equal(Preprocess(SIZE)(decode_image(small)), Preprocess(SIZE)(decode_image(data)))


def test_quality_and_color(seed):
    rng = np.random.default_rng(seed)
    red = np.zeros((96, 96, 3), np.uint8)
    red[:, ::2, 0] = 255  # color at half resolution would lose all of it, the resize nothing
    red = red.repeat(2, 0).repeat(2, 1)
    found = pixels_of(shrink_image(encode(red), 96, 90)).astype(float)
    as_jpeg = pixels_of(shrink_image(encode(red, "jpeg", quality=100, subsampling=0), 96, 95)).astype(float)
    assert np.abs(found - as_jpeg).mean() < 6
    photo = encode(smooth(rng, 80, 90), "jpeg")
    for form in ("jpeg", "webp"):
        photo = encode(pixels(rng, 80, 90), form)
        assert len(shrink_image(photo, 60, 30)) < 0.7 * len(shrink_image(photo, 60, 95))


def test_everything_else_stays(tmp_path, seed):
    rng = np.random.default_rng(seed)
    shown = random_shards(tmp_path / "in", rng)
    summary = shrink_shards(tmp_path / "in", tmp_path / "out", size=SIZE, workers=0)
    large = 0
    for path in sorted((tmp_path / "in").glob("*.tar")):
        before, after = read(path), read(tmp_path / "out" / path.name)
        assert [name for name, _ in after] == [name for name, _ in before]
        for (name, old), (_, new) in zip(before, after, strict=True):
            seen = shown.get((path.name, name))
            if seen is None or min(seen.shape[:2]) <= SIZE:
                assert new == old
            else:
                large += 1
                assert min(pixels_of(new).shape[:2]) == SIZE
                assert np.abs(pixels_of(new).astype(float) - smaller(seen, SIZE)).mean() < 13
        old, new = ShardIndex.build(path), ShardIndex.build(tmp_path / "out" / path.name)
        assert [(s.key, list(s.members)) for s in new] == [(s.key, list(s.members)) for s in old]
        with tarfile.open(tmp_path / "out" / path.name) as tar:
            assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in tar} == {(0, 0, 0, "", "", 0o644)}
    assert (summary.samples, summary.shrunk, summary.kept) == (11, large, 11 - large)
    assert summary.undecodable == []
    for folder, total in (("in", summary.bytes_before), ("out", summary.bytes_after)):
        assert total == sum(path.stat().st_size for path in (tmp_path / folder).glob("*.tar"))


def test_members_without_a_sample_and_unusual_members(tmp_path, seed):
    rng = np.random.default_rng(seed)
    large, mask = encode(pixels(rng, 60, 50), "jpeg"), encode(pixels(rng, 60, 50))
    before = [
        ("README", b"no extension"), ("x/.hidden.jpg", large), ("a.JPG", large), ("b.txt", b"no image"),
        ("a.png", mask), ("c.jpg", large), ("c.bin", bytes(17 << 20)),
    ]  # fmt: skip
    summary = shrink_shards(write(tmp_path / "in" / "a.tar", before), tmp_path / "out", size=SIZE, workers=0)
    after = dict(read(tmp_path / "out" / "a.tar"))
    assert list(after) == ["a.jpg", "a.png", "b.txt", "c.jpg", "c.bin"]
    assert after["a.png"] == mask  # training reads the .jpg of the two
    assert min(pixels_of(after["a.jpg"]).shape[:2]) == SIZE
    assert after["c.bin"] == bytes(17 << 20)  # larger than training reads
    assert (summary.samples, summary.shrunk, summary.kept) == (3, 2, 0)


def test_undecodable_images_are_kept_and_named(tmp_path, seed):
    rng = np.random.default_rng(seed)
    whole = encode(pixels(rng, 60, 50), "jpeg")
    bad = {"cut": whole[: len(whole) // 2], "text": b"no image", "empty": b"", "gif": encode(pixels(rng), "gif")}
    huge = bytearray(encode(pixels(rng, 60, 50)))
    huge[16:24] = (12_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    bad["huge"] = bytes(huge)
    path = write(tmp_path / "in" / "a.tar", [("good.jpg", whole), *((f"{key}.jpg", data) for key, data in bad.items())])
    summary = shrink_shards(path, tmp_path / "out", size=SIZE, workers=1)
    after = dict(read(tmp_path / "out" / "a.tar"))
    assert {key: after[f"{key}.jpg"] for key in bad} == bad
    assert len(after["good.jpg"]) < len(whole)
    causes = {}
    for key, data in bad.items():
        with pytest.raises(ImageError) as caught:
            decode_image(data)
        causes[key] = caught.value.cause
    assert causes["huge"] != causes["cut"]
    assert summary.undecodable == [("a.tar", key, cause) for key, cause in causes.items()]
    assert (summary.samples, summary.shrunk, summary.kept) == (6, 1, 0)
    (shard,) = json.loads((tmp_path / "out" / "shrink.json").read_text())["shards"]
    assert shard["undecodable"] == [list(item) for item in causes.items()]
    (line,) = [line for line in summary.lines() if "cannot be made smaller and are copied" in line]
    assert line.startswith("5 images")
    assert f"a.tar 'cut' {causes['cut']}, a.tar" in line
    assert "shrink.json" in line


def test_workers_change_nothing(tmp_path, seed):
    random_shards(tmp_path / "in", np.random.default_rng(seed), (2, 3, 1, 2, 2))
    made = [shrink_shards(tmp_path / "in", tmp_path / str(n), size=SIZE, workers=n).lines()[:-1] for n in range(3)]
    assert made[0] == made[1] == made[2]
    assert content(tmp_path / "0") == content(tmp_path / "1") == content(tmp_path / "2")
    shrink_shards(tmp_path / "in", tmp_path / "other", size=SIZE - 1)
    assert content(tmp_path / "other") != content(tmp_path / "0")  # the control


class Stop(Exception):
    pass


def stop_after(count):
    def track(items):
        for i, item in enumerate(items):
            if i == count:
                raise Stop
            yield item

    return track


@pytest.mark.parametrize("harm", ["none", "line cut", "shard gone", "shard cut", "journal gone", "leftovers"])
def test_resuming_from_whatever_a_stop_leaves(tmp_path, seed, harm):
    random_shards(tmp_path / "in", np.random.default_rng(seed), (2, 1, 2, 2, 1))
    whole = shrink_shards(tmp_path / "in", tmp_path / "whole", size=SIZE, workers=0)
    out, count = tmp_path / "out", random.Random(seed).randint(2, 4)
    with pytest.raises(Stop):
        shrink_shards(tmp_path / "in", out, size=SIZE, workers=0, track=stop_after(count))
    journal, done = out / "unfinished.jsonl", count
    if harm == "line cut":
        journal.write_bytes(journal.read_bytes()[:-20])
        done -= 1
    elif harm == "shard gone":
        (out / "1.tar").unlink()
        done -= 1
    elif harm == "shard cut":
        (out / "1.tar").write_bytes(b"")
        done -= 1
    elif harm == "journal gone":
        journal.unlink()
        done = 0
    elif harm == "leftovers":
        for name in ("4.tar.7.part", "shrink.json.part", "unfinished.jsonl.part"):
            (out / name).write_bytes(b"{")
    seen = []
    found = shrink_shards(
        tmp_path / "in", out, size=SIZE, workers=0, track=lambda items: (seen.append(item) or item for item in items)
    )
    assert content(out) == content(tmp_path / "whole")
    assert len(seen) == 5 - done  # finished work is not repeated
    assert found.lines()[:-1] == whole.lines()[:-1]


KILLED = """
import sys, time
from dualenc.data.prepare import shrink
def slowly(data, decode=shrink.decode_image):
    time.sleep(0.03)
    return decode(data)
shrink.decode_image = slowly
shrink.shrink_shards(sys.argv[1], sys.argv[2], size=24, workers=int(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed(tmp_path, seed, workers):
    random_shards(tmp_path / "in", np.random.default_rng(seed), (5,) * 12)
    shrink_shards(tmp_path / "in", tmp_path / "whole", size=SIZE)
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "in"), str(out), str(workers)]
    for shards in (1, 1 + random.Random(seed).randint(1, 6)):
        with subprocess.Popen(command) as run:
            end = time.monotonic() + 60
            while len(list(out.glob("*.tar"))) < shards and run.poll() is None and time.monotonic() < end:
                time.sleep(0.002)
            run.send_signal(signal.SIGKILL)
        assert run.returncode == -signal.SIGKILL
    assert (out / "unfinished.jsonl").exists()
    found = shrink_shards(tmp_path / "in", out, size=SIZE)  # immediately, even if workers still run
    assert not found.finished_before
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.long
def test_workers_end_with_a_killed_command(tmp_path, seed):
    """They end long before the end of their shard, because the disk may be needed for something else."""
    random_shards(tmp_path / "in", np.random.default_rng(seed), (200, 200), ("jpeg",))
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "in"), str(out), "2"]) as run:
        end = time.monotonic() + 60
        while len(list(out.glob(".*.tar-*.part"))) < 2 and run.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    end = time.monotonic() + 60
    while list(out.glob("*.part")) and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted(content(out)) == ["shrink.json", "unfinished.jsonl"]


@pytest.mark.parametrize("finished", [True, False])
def test_other_options_and_inputs_are_refused(tmp_path, seed, finished):
    rng = np.random.default_rng(seed)
    random_shards(tmp_path / "in", rng, (1, 1, 2))
    out, shards = tmp_path / "out", [tmp_path / "in" / f"{i}.tar" for i in range(3)]
    if finished:
        shrink_shards(shards, out, size=SIZE, workers=0)
    else:
        with pytest.raises(Stop):
            shrink_shards(shards, out, size=SIZE, workers=0, track=stop_after(1))
    before = content(out)
    for options, message in (({"size": SIZE + 1}, "size 24, not 25"), ({"quality": 80}, "quality 90, not 80")):
        with pytest.raises(DataError, match=f"out was begun with {message}: give the same"):
            shrink_shards(shards, out, **{"size": SIZE, **options})
    random_shards(tmp_path / "more", rng, (1, 1, 1, 1))
    random_shards(tmp_path / "less", rng, (1, 1, 1))
    for given, message in (
        (shards[:2], r"other shards \(2\.tar is missing\)"),
        ([*shards, tmp_path / "more" / "3.tar"], r"other shards \(3\.tar is new\)"),
        ([*shards[:2], tmp_path / "less" / "2.tar"], r"other shards \(2\.tar has changed\)"),
        (
            [tmp_path / "more" / "3.tar"],
            r"other shards \(0\.tar is missing, 1\.tar is missing, 2\.tar is missing, \.\.\.\)",
        ),
    ):
        with pytest.raises(DataError, match=f"out was begun with {message}: give the same"):
            shrink_shards(given, out, size=SIZE)
    assert content(out) == before
    for path in shards:  # the same shards in another folder and another order
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    again = shrink_shards([tmp_path / "copy" / f"{i}.tar" for i in (2, 0, 1)], out, size=SIZE)
    assert again.finished_before == finished
    shrink_shards(shards, tmp_path / "whole", size=SIZE, workers=0)
    assert content(out) == content(tmp_path / "whole")


def test_a_finished_run_is_reported(tmp_path, seed):
    random_shards(tmp_path / "in", np.random.default_rng(seed))
    out = tmp_path / "out"
    first = shrink_shards(tmp_path / "in", out, size=SIZE, workers=0)
    before = content(out)
    second = shrink_shards(tmp_path / "in", out, size=SIZE, workers=2, track=stop_after(0))
    assert second.lines()[1:] == first.lines()
    assert "was finished before" in second.lines()[0]
    assert content(out) == before
    (out / "1.tar").write_bytes(b"")
    assert not shrink_shards(tmp_path / "in", out, size=SIZE, workers=2).finished_before
    assert content(out) == before


def test_wrong_use(tmp_path, seed):
    rng = np.random.default_rng(seed)
    random_shards(tmp_path / "a", rng, (1,))
    random_shards(tmp_path / "b", rng, (1,))
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"a/0\.tar and .*b/0\.tar would both become .*out/0\.tar"):
        shrink_shards([tmp_path / "a", tmp_path / "b"], out)
    for options in ({"size": 0}, {"quality": 0}, {"quality": 101}, {"workers": -1}):
        with pytest.raises(DataError, match=f"{next(iter(options))} {next(iter(options.values()))} "):
            shrink_shards(tmp_path / "a", out, **options)
    write(tmp_path / "cut" / "1.tar", [("a.txt", bytes(9999))])
    (tmp_path / "cut" / "1.tar").write_bytes((tmp_path / "cut" / "1.tar").read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cut/1\.tar cannot be read: it is cut off"):
        shrink_shards([tmp_path / "a", tmp_path / "cut"], out)
    assert not out.exists()
    before = content(tmp_path / "b")
    with pytest.raises(DataError, match="b holds files that shrink did not write"):
        shrink_shards(tmp_path / "b", tmp_path / "b")
    with pytest.raises(DataError, match="b holds files that shrink did not write"):
        shrink_shards(tmp_path / "a", tmp_path / "b")
    assert {name: data for name, data in content(tmp_path / "b").items() if name in before} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file must be a folder"):
        shrink_shards(tmp_path / "a", tmp_path / "file")
    for text in ("{", "[]", "{}", '{"inputs": 7}'):
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / "shrink.json").write_text(text)
        with pytest.raises(DataError, match=r"odd/shrink\.json was not written by shrink"):
            shrink_shards(tmp_path / "a", tmp_path / "odd")
    shrink_shards(tmp_path / "a", out, size=SIZE)
    os.symlink(out, tmp_path / "link")
    for into in (out, tmp_path / "link"):
        with pytest.raises(DataError, match=r"is the folder of .*out/0\.tar, which would be overwritten"):
            shrink_shards(out, into, size=SIZE)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changes_during_the_run(tmp_path, seed, workers):
    random_shards(tmp_path / "in", np.random.default_rng(seed), (2, 2))

    def harm(items):
        (tmp_path / "in" / "1.tar").write_bytes(b"")
        yield from items

    with pytest.raises(DataError, match=r"1\.tar changed since it was indexed") as caught:
        shrink_shards(tmp_path / "in", tmp_path / "out", size=SIZE, workers=workers, track=harm)
    assert "Traceback" not in str(caught.value)
    assert sorted(content(tmp_path / "out")) == ["0.tar", "shrink.json", "unfinished.jsonl"]


def test_the_command(tmp_path, seed, capsys):
    random_shards(tmp_path / "in", np.random.default_rng(seed))
    out = tmp_path / "out"
    main(["shrink", str(tmp_path / "in" / "0.tar"), str(tmp_path / "in" / "{1..2}.tar"), str(out), "--size", str(SIZE)])
    printed, bar = capsys.readouterr()
    assert printed.startswith("11 samples in 3 shards: ")
    assert printed.endswith(f"next: dualenc fit --config run.yaml --data.train {out}\n")
    assert bar == ""
    (tmp_path / "file").write_text("")
    for arguments, status, message in (
        ([str(tmp_path / "in"), str(out), "--size", "9"], 2, f"{out} was begun with size 24, not 9"),
        ([str(tmp_path / "in"), str(tmp_path / "file" / "out")], 1, "Not a directory"),
        ([str(tmp_path / "none"), str(tmp_path / "new")], 2, "match no file"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["shrink", *arguments])
        assert caught.value.code == status
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


@needs_data
def test_real_photos(tmp_path, seed):
    """A model at 224 pixels sees almost the same photos, at about a third of the bytes."""
    paths = [DATA / "photos_full" / name for name in ("coco-000001.tar", "imagenet_sample-000003.tar")]
    summary = shrink_shards(paths, tmp_path / "out")
    assert summary.samples == 45
    assert summary.undecodable == []
    assert summary.bytes_after < 0.4 * summary.bytes_before
    errors = []
    for old, new in zip(ShardIndex.build(paths), ShardIndex.build(tmp_path / "out"), strict=True):
        assert old.key == new.key
        for extension in old.members:
            if extension != old.image:
                assert old.read(extension) == new.read(extension)
        images = [decode_image(sample.read(sample.image)) for sample in (old, new)]
        assert min(images[1].shape[-2:]) <= 256
        small = [Preprocess(224)(image).float() for image in images]
        errors.append(float((small[0] - small[1]).abs().mean()))
    assert np.mean(errors) < 5
    assert np.median(errors) < 4
