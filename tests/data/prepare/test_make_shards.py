import csv
import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from helpers import DATA, encode, needs_data, pixels, smooth, tiny_embedder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dualenc
import dualenc.data.prepare.pictures as pictures_module
from dualenc.data import BenchmarkSet, ShardIndex, decode_image
from dualenc.data.pairs import captions_of
from dualenc.data.prepare.make_shards import make_shards
from dualenc.utils.decoding import is_blank
from dualenc.utils.errors import DataError

KINDS = ("jpeg", "png", "webp")
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


def pictures(folder, rng, count, prefix="p"):
    """Write images into files whose names do not tell the format; return name -> (format, bytes)."""
    made = {}
    for i in range(count):
        kind = KINDS[int(rng.integers(3))]
        name = f"{prefix}{i}.v1.{rng.choice(['jpg', 'PNG', 'jpeg', 'x'])}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels(rng), kind))
        made[name] = (EXTENSIONS[kind], path.read_bytes())
    return made


def read(out):
    """Read the samples of the shards with webdataset, in order and without decoding."""
    paths = sorted(str(path) for path in Path(out).glob("*.tar"))
    return [dict(sample) for sample in webdataset.WebDataset(paths, shardshuffle=False)]


def texts(rng, count):
    parts = ["a cat", "zwei Hüte", "猫 と 犬", 'the "red" one', "it's, well", "🎩 hat", "x|y;z", "<b>&amp;"]
    return [f"{' '.join(rng.choice(parts, int(rng.integers(1, 4))))} {i}" for i in range(count)]


def table_of(path, rows):
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def expect(out, made, captions, fields=None):
    """Assert that the samples are exactly these: each image's bytes by format, its captions in order, its fields."""
    found = {}
    for sample in read(out):
        about = json.loads(sample["json"])
        kind, data = made[about["file"]]
        assert sample[kind] == data
        assert len(set(sample) & {"jpg", "jpeg", "png", "webp"}) == 1
        assert sample["txt"].decode() == about["captions"][0]
        assert about["file"] not in found
        found[about["file"]] = about["captions"]
        if fields is not None:
            assert {k: v for k, v in about.items() if k not in ("captions", "file")} == fields[about["file"]]
    assert found == captions


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_tables(tmp_path, seed, suffix):
    rng = np.random.default_rng(seed)
    made = pictures(tmp_path / "set", rng, 23, "sub/p")
    rows, captions, fields = [], {}, {}
    for i, name in enumerate(made):
        own = texts(rng, 1 + int(rng.integers(3)))
        captions[name] = own
        about = {"width": int(rng.integers(1, 999)), "score": i + 0.5, "license": f"cc-{i % 3}", "id": f"{i:05d}"}
        fields[name] = about
        rows += [{"no": len(rows) + n, "File_Name": name, **about, "Caption": text} for n, text in enumerate(own)]
    several = {name for name, own in captions.items() if len(own) > 1}
    for row in rows:
        if row["File_Name"] not in several:
            fields[row["File_Name"]] = {"no": row["no"], **fields[row["File_Name"]]}
    table = table_of(tmp_path / "set" / f"about{suffix}", rows)
    summary = make_shards(table, tmp_path / "out", samples=5, workers=0)
    expect(tmp_path / "out", made, captions, fields)
    assert (summary.samples, summary.captions, summary.shards) == (23, len(rows), 5)
    assert summary.left_out == {}
    assert summary.words == pytest.approx(np.mean([len(row["Caption"].split()) for row in rows]))
    assert summary.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    index = ShardIndex.build(tmp_path / "out")
    assert index.counts() == [5, 5, 5, 5, 3]
    assert [index.key(i) for i in range(23)] == [f"{i:09d}" for i in range(23)]
    for sample in index:
        assert captions_of(sample, "json.captions") == captions[sample.read_json()["file"]]
    assert len(index.select("width > 0 and score >= 0.5")) == 23


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_lists_of_captions(tmp_path, seed, suffix):
    rng = np.random.default_rng(seed)
    made = pictures(tmp_path, rng, 5)
    captions = {name: texts(rng, 1 + i) for i, name in enumerate(made)}
    table = table_of(tmp_path / f"t{suffix}", [{"image": n, "captions": c} for n, c in captions.items()])
    make_shards(table, tmp_path / "out", workers=0)
    expect(tmp_path / "out", made, captions)


letters = st.characters(codec="utf-8", exclude_characters="\0\ufeff")
captions_of_any_kind = st.text(letters, min_size=1).filter(lambda text: not is_blank(text))


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(st.lists(captions_of_any_kind, min_size=1, max_size=5), st.sampled_from(",;"))
def test_quoted_captions(tmp_path_factory, captions, delimiter):
    """Captions may have everything that csv can write, also line ends and quotes."""
    folder = tmp_path_factory.mktemp("quoted")
    with open(folder / "t.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([("image", "caption"), *(("a.png", caption) for caption in captions)])
    (folder / "a.png").write_bytes(encode(np.zeros((2, 2, 3), np.uint8)))
    make_shards(folder / "t.csv", folder / "out", workers=0)
    (sample,) = read(folder / "out")
    assert json.loads(sample["json"])["captions"] == [" ".join(caption.split()) for caption in captions]


def coco(folder, rng, split="train2017", images="train2017"):
    made = pictures(folder / images, rng, 12)
    captions = {name: texts(rng, 1 + int(rng.integers(5))) for name in made}
    about = [{"id": 7 * i, "file_name": name, "height": 8, "coco_url": "http://x"} for i, name in enumerate(made)]
    notes = [(7 * i, text) for i, name in enumerate(made) for text in captions[name]]
    shuffled = [notes[i] for i in rng.permutation(len(notes))]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(shuffled)]
    for name, image in zip(made, about, strict=True):
        captions[name] = [text for number, text in shuffled if number == image["id"]]
    (folder / "annotations").mkdir(exist_ok=True)
    path = folder / "annotations" / f"captions_{split}.json"
    path.write_text(json.dumps({"info": {}, "images": about, "annotations": annotations}))
    return path, made, captions


@pytest.mark.parametrize("images", ["train2017", "images", "images/train2017", "annotations", "elsewhere"])
def test_coco(tmp_path, seed, images):
    path, made, captions = coco(tmp_path, np.random.default_rng(seed), images=images)
    if images == "elsewhere":
        with pytest.raises(DataError, match="with --images"):
            make_shards(path, tmp_path / "out", workers=0)
        make_shards(path, tmp_path / "out", images=tmp_path / images, workers=0)
    else:
        make_shards(path, tmp_path / "out", workers=0)
    fields = {name: {"id": 7 * i, "height": 8, "coco_url": "http://x"} for i, name in enumerate(made)}
    expect(tmp_path / "out", made, captions, fields)


def test_coco_without_its_parts(tmp_path, seed):
    path, _, _ = coco(tmp_path, np.random.default_rng(seed))
    content = json.loads(path.read_text())
    first = content["images"][0]
    content["annotations"] = [note for note in content["annotations"] if note["image_id"] != first["id"]]
    content["annotations"].append({"id": 99, "image_id": 12345, "caption": "nobody"})
    path.write_text(json.dumps(content))
    summary = make_shards(path, tmp_path / "out", workers=0)
    assert summary.left_out == {"row broken": ["annotation 99"], "caption empty": [f"image 0: {first['file_name']}"]}
    for wrong in ("{}", "7", '{"images": [], "annotations": 3}', '{"images": [[]], "annotations": []}'):
        path.write_text(wrong)
        with pytest.raises(DataError, match="nor COCO's captions JSON"):
            make_shards(path, tmp_path / "other", workers=0)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        make_shards(path, tmp_path / "other", workers=0)


@pytest.mark.parametrize("form", ["Flickr8k.token.txt", "results_20130124.token", "captions.txt", "results.csv"])
@pytest.mark.parametrize("by_folder", [True, False])
def test_flickr(tmp_path, seed, form, by_folder):
    rng = np.random.default_rng(seed)
    made = pictures(tmp_path / "Images", rng, 6)
    captions = {name: [f'{text} , said " he .' for text in texts(rng, 5)] for name in made}
    captions = {name: [text.replace("|", "-") for text in own] for name, own in captions.items()}
    rows = [(name, i, text) for name, own in captions.items() for i, text in enumerate(own)]
    with open(tmp_path / form, "w", encoding="utf-8", newline="") as file:
        if form == "captions.txt":
            csv.writer(file, lineterminator="\n").writerows([("image", "caption"), *((n, t) for n, _, t in rows)])
        elif form == "results.csv":
            file.write("image_name| comment_number| comment\n")
            file.writelines(f"{name}| {i}| {text}\n" for name, i, text in rows)
        else:
            file.writelines(f"{name}#{i}\t{text}\n" for name, i, text in rows)
    summary = make_shards(tmp_path if by_folder else tmp_path / form, tmp_path / "out", workers=0)
    expect(tmp_path / "out", made, captions, {name: {} for name in made})
    assert summary.left_out == {}


def test_the_broken_line_of_flickr30k(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode(np.zeros((8, 8, 3), np.uint8), "jpeg"))
    lines = ["image_name| comment_number| comment", "a.jpg| 0| A dog runs .", "a.jpg| 4   A dog", ""]
    (tmp_path / "results.csv").write_text("\n".join(lines))
    assert make_shards(tmp_path, tmp_path / "out", workers=0).left_out == {"row broken": ["line 3"]}


def test_an_open_quote_does_not_swallow_rows_silently(tmp_path):
    for name in "abcde":
        (tmp_path / f"{name}.png").write_bytes(encode(np.zeros((2, 2, 3), np.uint8)))
    rows = [
        "image,caption",
        "a.png,one",
        'b.png,"open',
        "c.png,lost",
        'd.png,"also "lost""',
        "e.png,two",
        'a.png,"end',
        "",
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    summary = make_shards(tmp_path / "t.csv", tmp_path / "out", workers=0)
    assert summary.left_out == {"row broken": ["lines 3 to 5", "line 7"]}
    assert {sample["txt"] for sample in read(tmp_path / "out")} == {b"one", b"two"}
    tabs = [row.replace(",", "\t") for row in rows]  # with tabs each line is a row, and quotes have no effect
    (tmp_path / "t.tsv").write_text("\n".join([*tabs[:-2], 'e.png\t"quoted ""so"""', ""]))
    make_shards(tmp_path / "t.tsv", tmp_path / "out2", workers=0)
    captions = {caption for sample in read(tmp_path / "out2") for caption in json.loads(sample["json"])["captions"]}
    assert captions == {"one", '"open', "lost", 'also "lost"', "two", 'quoted "so"'}


def class_folders(folder, rng, classes=4, each=9):
    made = {}
    for i in range(classes):
        name = f"kind_{i}-of"
        made |= {f"{name}/{file}": v for file, v in pictures(folder / name, rng, each).items()}
        (folder / name / "first.jpg").write_bytes(encode(pixels(rng), "jpeg"))  # the other files may have other names
        made[f"{name}/first.jpg"] = ("jpg", (folder / name / "first.jpg").read_bytes())
    (folder / ".hidden").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.txt").write_text("no class")
    return made


def test_class_folders(tmp_path, seed):
    made = class_folders(tmp_path / "set", np.random.default_rng(seed))
    templates = ["a {c}.", "{c}, {c}!", "no{c}"]
    make_shards(tmp_path / "set", tmp_path / "out", templates=templates, samples=10, workers=0)
    turns = Counter()
    for sample in read(tmp_path / "out"):
        about = json.loads(sample["json"])
        kind, data = made.pop(about["file"])
        assert sample[kind] == data
        name = about["file"].partition("/")[0].replace("_", " ").replace("-", " ")
        assert about["class"] == name
        assert sorted(about["captions"]) == sorted(t.replace("{c}", name) for t in templates)
        assert sample["txt"].decode() == about["captions"][0]
        turns[[t.replace("{c}", name) for t in templates].index(about["captions"][0])] += 1
    assert not made
    assert sorted(turns) == [0, 1, 2]
    assert max(turns.values()) - min(turns.values()) <= 1
    shards = [{s.read_json()["class"] for s in ShardIndex.build(p)} for p in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(shards) == 4
    assert all(len(classes) > 1 for classes in shards)  # the images of a folder are in several shards


def test_one_template_and_classes_of_the_same_name(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for folder in ("hot_dog", "hot-dog", "cat"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        for i in range(9):
            (tmp_path / "set" / folder / f"{i}.png").write_bytes(encode(pixels(rng)))
    make_shards(tmp_path / "set", tmp_path / "out", workers=0, val=0.5)
    assert {sample["txt"].decode() for sample in read(tmp_path / "out")} == {
        "a photo of a hot dog.",
        "a photo of a cat.",
    }
    assert BenchmarkSet.open(tmp_path / "out" / "held_out").classnames == ["cat", "hot dog"]


BAD = {
    "row broken": b'good.png,"open,1\n',
    "image not named": b",a caption,1\n",
    "image missing": b"absent.png,a caption,1\n",
    "not a regular file": b"folder,a caption,1\n",
    "a URL, not a file": b"http://example.org/good.png,a caption,1\n",
    "outside of the image folder": b"../outside.png,a caption,1\n",
    "neither JPEG, PNG nor WebP": b"text.png,a caption,1\n",
    "image broken": b"cut.jpg,a caption,1\n",
    "caption empty": b"lonely.png, ,1\n",
    "caption not UTF-8": b"lonely.png,\xe9t\xe9,1\n",
}


def with_bad_rows(folder, rng, causes, good=20):
    made = pictures(folder, rng, good)
    (folder / "folder").mkdir()
    (folder.parent / "outside.png").write_bytes(encode(pixels(rng)))
    (folder / "lonely.png").write_bytes(encode(pixels(rng)))
    (folder / "text.png").write_bytes(b"GIF89a and so on")
    (folder / "cut.jpg").write_bytes(encode(smooth(rng, 40, 40), "jpeg")[:-150])
    rows = [f"{name},caption of {name},{i}\n".encode() for i, name in enumerate(made)]
    last = [cause for cause in causes if cause == "row broken"]  # an open quote swallows the rows after it
    for cause in causes:
        if cause not in last:
            rows.insert(int(rng.integers(len(rows) + 1)), BAD[cause])
    (folder / "t.csv").write_bytes(b"".join([b"image,caption,number\n", *rows, *(BAD[cause] for cause in last)]))
    return made


@pytest.mark.parametrize("cause", BAD)
def test_each_kind_of_bad_row(tmp_path, seed, cause):
    made = with_bad_rows(tmp_path / "set", np.random.default_rng(seed), [cause])
    summary = make_shards(tmp_path / "set" / "t.csv", tmp_path / "out", workers=0)
    expect(tmp_path / "out", made, {name: [f"caption of {name}"] for name in made})
    (names,) = summary.left_out.values()
    assert list(summary.left_out) == [cause]
    assert len(names) == 1
    lines = (tmp_path / "set" / "t.csv").read_bytes().splitlines()
    place = next(i for i, line in enumerate(lines, 1) if line + b"\n" == BAD[cause])
    image = BAD[cause].split(b",")[0].decode()
    assert names[0] in (image, f"line {place}", f"line {place}: {image}")


def test_all_kinds_of_bad_rows_and_the_summary(tmp_path, seed):
    made = with_bad_rows(tmp_path / "set", np.random.default_rng(seed), list(BAD))
    summary = make_shards(tmp_path / "set" / "t.csv", tmp_path / "out", workers=2)
    assert set(summary.left_out) == set(BAD)
    assert summary.samples == len(made)
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written["left_out"] == summary.left_out
    assert written["samples"] == len(made)
    text = "\n".join(summary.lines())
    assert all(f"left out, {cause}: 1: " in text for cause in BAD)
    assert f"--data.train {tmp_path / 'out'}" in text
    assert not list((tmp_path / "out").glob("*.part"))
    assert not (tmp_path / "out" / "unfinished.jsonl").exists()


def test_three_examples_are_printed(tmp_path, seed):
    made = pictures(tmp_path, np.random.default_rng(seed), 12)
    rows = [{"image": name, "caption": "x"} for name in [*made, *(f"absent{i}" for i in range(7))]]
    summary = make_shards(table_of(tmp_path / "t.csv", rows), tmp_path / "out", workers=0)
    assert sorted(summary.left_out["image missing"]) == [f"absent{i}" for i in range(7)]
    (line,) = [line for line in summary.lines() if "image missing" in line]
    assert line.count("absent") == 3
    assert "missing: 7: " in line
    assert line.endswith(", ...")


def test_more_than_half_unusable(tmp_path, seed):
    made = list(pictures(tmp_path, np.random.default_rng(seed), 5))
    for bad, works in ((5, True), (6, False)):
        rows = [{"image": name, "caption": "x"} for name in [*made, *(f"absent{i}" for i in range(bad))]]
        table = table_of(tmp_path / f"{bad}.csv", rows)
        if works:
            assert make_shards(table, tmp_path / "out", workers=0).samples == 5
        else:
            with pytest.raises(
                DataError, match=r"more than half of 11 samples are unusable .*image missing 6.*--images"
            ):
                make_shards(table, tmp_path / "out2", workers=0)
    empty = table_of(tmp_path / "empty.csv", [{"image": name, "caption": ""} for name in made])
    with pytest.raises(DataError, match=r"no row has an image and a caption \(caption empty 5\)"):
        make_shards(empty, tmp_path / "out3", workers=0)


ESCAPES = [
    "../secret.png",
    "../set-more/secret.png",
    "sub/../../secret.png",
    "/etc/hostname",
    "{secret}",
    "./../secret.png",
    "a\0b.png",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_of_the_image_folder(tmp_path, seed, name):
    made = list(pictures(tmp_path / "set", np.random.default_rng(seed), 3))
    (tmp_path / "secret.png").write_bytes(encode(np.zeros((4, 4, 3), np.uint8)))
    (tmp_path / "set-more").mkdir()
    (tmp_path / "set-more" / "secret.png").write_bytes(encode(np.zeros((4, 4, 3), np.uint8)))
    name = name.replace("{secret}", str(tmp_path / "secret.png"))
    rows = [{"image": n, "caption": "x"} for n in [*made, name]]
    summary = make_shards(table_of(tmp_path / "set" / "t.jsonl", rows), tmp_path / "out", workers=0)
    assert summary.left_out == {"outside of the image folder": [name]}
    assert summary.samples == 3


def test_absolute_names_within_the_folder(tmp_path, seed):
    made = list(pictures(tmp_path / "set", np.random.default_rng(seed), 3))
    rows = [{"image": str(tmp_path / "set" / name), "caption": "x"} for name in made]
    rows += [{"image": f"sub/../{made[0]}", "caption": "x"}, {"image": made[0], "caption": "y"}]
    table = table_of(tmp_path / "set" / "t.jsonl", rows)
    summary = make_shards(table, tmp_path / "out", workers=0)
    assert (summary.samples, summary.captions, summary.duplicates) == (4, 5, 1)
    other = table_of(tmp_path / "t.jsonl", rows[:3])
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="--images"):
        make_shards(other, tmp_path / "out2", images=tmp_path / "other", workers=0)
    assert make_shards(other, tmp_path / "out2", workers=0).samples == 3


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


class Stop(Exception):
    pass


def stop_after(count):
    def track(items):
        for i, item in enumerate(items):
            if i == count:
                raise Stop
            yield item

    return track


@pytest.mark.parametrize("kind", ["table", "classes"])
def test_a_resumed_run_writes_the_same_bytes(tmp_path, seed, kind):
    rng, chance = np.random.default_rng(seed), random.Random(seed)
    if kind == "table":
        with_bad_rows(tmp_path / "set", rng, list(BAD), 40)
        source = tmp_path / "set" / "t.csv"
    else:
        class_folders(tmp_path / "set", rng, each=12)
        source = tmp_path / "set"
    options = {"samples": chance.randint(1, 6), "val": 0.2, "seed": chance.randint(0, 99)}
    make_shards(source, tmp_path / "whole", workers=2, **options)
    expected = content(tmp_path / "whole")
    for count in sorted(chance.sample(range(40), 5)):
        out = tmp_path / f"stopped{count}"
        with pytest.raises(Stop):
            make_shards(source, out, workers=0, track=stop_after(count), **options)
        assert not (out / "summary.json").exists()
        seen = []
        again = chance.randint(0, 5)
        with pytest.raises(Stop):
            make_shards(source, out, workers=0, track=stop_after(again), **options)
        made = len(list(out.glob("*.tar")))
        make_shards(
            source, out, workers=0, track=lambda items, seen=seen: (seen.append(i) or i for i in items), **options
        )
        assert content(out) == expected
        assert len(seen) <= 48 + 10 - made * options["samples"]  # finished work is not repeated
    changed = make_shards(source, tmp_path / "other", workers=0, **{**options, "seed": options["seed"] + 1})
    assert changed.samples > 0
    assert content(tmp_path / "other") != expected  # the control


KILLED = """
import sys, time
from dualenc.data.prepare.make_shards import make_shards
def slowly(items):
    for item in items:
        time.sleep(0.01)
        yield item
make_shards(sys.argv[1], sys.argv[2], samples=4, val=0.1, workers=int(sys.argv[3]), track=slowly)
"""


@pytest.mark.slow
def test_killed(tmp_path, seed):
    class_folders(tmp_path / "set", np.random.default_rng(seed), each=15)
    make_shards(tmp_path / "set", tmp_path / "whole", samples=4, val=0.1, workers=0)
    out, chance = tmp_path / "out", random.Random(seed)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "set"), str(out), str(chance.randint(0, 2))]
    for shards in (1, 1 + chance.randint(1, 8)):
        with subprocess.Popen(command) as run:
            end = time.monotonic() + 60
            while len(list(out.glob("*.tar"))) < shards and run.poll() is None and time.monotonic() < end:
                time.sleep(0.002)
            run.send_signal(signal.SIGKILL)
        assert run.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    make_shards(tmp_path / "set", out, samples=4, val=0.1, workers=0)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["line cut", "shard gone", "shard cut", "journal gone before a shard", "val half"])
def test_resuming_from_whatever_a_stop_leaves(tmp_path, seed, harm):
    class_folders(tmp_path / "set", np.random.default_rng(seed))
    make_shards(tmp_path / "set", tmp_path / "whole", samples=4, val=0.2, workers=0)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        make_shards(tmp_path / "set", out, samples=4, val=0.2, workers=0, track=stop_after(30))
    journal = out / "unfinished.jsonl"
    if harm == "line cut":
        journal.write_bytes(journal.read_bytes()[:-20])
    elif harm == "shard gone":
        (out / "train-000001.tar").unlink()
    elif harm == "shard cut":
        (out / "train-000001.tar").write_bytes(b"")
    elif harm == "val half":
        (out / "val.part" / "test").mkdir(parents=True)
        (out / "held_out" / "test").mkdir(parents=True)
        (out / "held_out" / "test" / "7.tar").write_bytes(b"old")
    else:
        journal.unlink()
        for shard in out.glob("*.tar"):
            shard.unlink()
        (out / ".unfinished.jsonl-x.part").write_bytes(b"{")
    make_shards(tmp_path / "set", out, samples=4, val=0.2, workers=0)
    assert content(out) == content(tmp_path / "whole")


def test_no_shard_of_other_options_is_kept(tmp_path, seed):
    """Without the first shard, other options are accepted; then the later shards must be removed."""
    class_folders(tmp_path / "set", np.random.default_rng(seed))
    with pytest.raises(Stop):
        make_shards(tmp_path / "set", tmp_path / "out", samples=4, workers=0, track=stop_after(30))
    (tmp_path / "out" / "train-000000.tar").unlink()
    make_shards(tmp_path / "set", tmp_path / "out", samples=30, workers=0)
    make_shards(tmp_path / "set", tmp_path / "whole", samples=30, workers=0)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
def test_other_options_are_refused(tmp_path, seed, finished):
    made = class_folders(tmp_path / "set", np.random.default_rng(seed))
    out, options = tmp_path / "out", {"samples": 4, "val": 0.1, "seed": 3, "workers": 0}
    if finished:
        first = make_shards(tmp_path / "set", out, **options)
    else:
        with pytest.raises(Stop):
            make_shards(tmp_path / "set", out, track=stop_after(20), **options)
    before = content(out)
    for name, value, message in (
        ("samples", 5, "samples 4, not 5"),
        ("val", 0.2, r"val 0\.1, not 0\.2"),
        ("seed", 4, "seed 3, not 4"),
        ("templates", ["{c}"], r"templates None, not \['\{c\}'\]"),
    ):
        with pytest.raises(DataError, match=f"was begun with {message}: give the same"):
            make_shards(tmp_path / "set", out, **{**options, name: value})
    class_folders(tmp_path / "copy", np.random.default_rng(seed))
    with pytest.raises(DataError, match="begun with source"):
        make_shards(tmp_path / "copy", out, **options)
    (tmp_path / "set" / next(iter(made))).unlink()
    with pytest.raises(DataError, match="begun with other rows or files of"):
        make_shards(tmp_path / "set", out, **options)
    assert content(out) == before
    if finished:
        assert first.finished_before is False


def test_a_finished_run_is_reported(tmp_path, seed):
    class_folders(tmp_path / "set", np.random.default_rng(seed))
    out = tmp_path / "out"
    first = make_shards(tmp_path / "set", out, samples=9, val=0.1, workers=0)
    before = content(out)
    second = make_shards(tmp_path / "set", out, samples=9, val=0.1, workers=2, track=stop_after(0))
    assert second.lines()[1:] == first.lines()
    assert "was finished before" in second.lines()[0]
    assert content(out) == before
    (out / "train-000001.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-000001\.tar is missing or was changed"):
        make_shards(tmp_path / "set", out, samples=9, val=0.1, workers=0)


def test_folders_of_others_are_left_alone(tmp_path, seed):
    class_folders(tmp_path / "set", np.random.default_rng(seed))
    for name, message in (
        ("train-000000.tar", "make-shards did not write"),
        ("summary.json", "not written by make-shards"),
    ):
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out" / name).write_text("{}")
        with pytest.raises(DataError, match=message):
            make_shards(tmp_path / "set", tmp_path / name / "out", workers=0)
        assert (tmp_path / name / "out" / name).read_text() == "{}"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="must be a folder"):
        make_shards(tmp_path / "set", tmp_path / "file", workers=0)


def test_out_within_the_source(tmp_path, seed):
    class_folders(tmp_path / "set", np.random.default_rng(seed))
    first = make_shards(tmp_path / "set", tmp_path / "set" / "out", val=0.2, workers=0)
    assert make_shards(tmp_path / "set", tmp_path / "set" / "out", val=0.2, workers=0).samples == first.samples


def test_held_out_retrieval_set(tmp_path, seed):
    rng = np.random.default_rng(seed)
    made = pictures(tmp_path, rng, 60)
    twins = {f"twin{i}.png": made[name] for i, name in enumerate(list(made)[:20])}
    for name, (_, data) in twins.items():
        (tmp_path / name).write_bytes(data)
    made |= twins
    captions = {name: texts(rng, 1 + int(rng.integers(3))) for name in made}
    rows = [{"image": name, "caption": captions[name]} for name in made]
    out = tmp_path / "out"
    summary = make_shards(table_of(tmp_path / "t.jsonl", rows), out, val=0.3, samples=7, workers=0)
    assert summary.duplicates == 20
    assert summary.held_out + summary.samples == 80
    assert 3 < summary.held_out < 60
    data = BenchmarkSet.open(out / "held_out")
    assert (data.kind, len(data)) == ("retrieval", summary.held_out)
    kept = {sample[kind] for sample in read(out) for kind in ("jpg", "png", "webp") if kind in sample}
    assert not kept & {sample.read(sample.image) for sample in data.index}
    lines, owner = data.captions
    for i, sample in enumerate(data.index):
        file = sample.read_json()["file"]
        assert sample.read(sample.image) == made[file][1]
        assert [line for line, of in zip(lines, owner.tolist(), strict=True) if of == i] == captions[file]
    result = dualenc.evaluate(tiny_embedder(seed), out / "held_out")
    assert result["n"] >= summary.held_out
    assert f"dualenc retrieval RUN {out / 'held_out'}" in summary.lines()[-1]


def test_held_out_classification_set(tmp_path, seed):
    made = class_folders(tmp_path / "set", np.random.default_rng(seed), classes=5)
    out = tmp_path / "out"
    summary = make_shards(tmp_path / "set", out, templates=["a {c}", "{c}!"], val=0.4, workers=0)
    data = BenchmarkSet.open(out / "held_out")
    assert (data.kind, data.classnames) == ("classification", [f"kind {i} of" for i in range(5)])
    assert data.templates == ["a {c}", "{c}!"]
    assert len(data) == summary.held_out > 0
    for sample, label in zip(data.index, data.targets.tolist(), strict=True):
        file = sample.read_json()["file"]
        assert file.startswith(f"kind_{label}-of/")
        assert sample.read(sample.image) == made[file][1]
    assert dualenc.evaluate(tiny_embedder(seed), out / "held_out")["n"] == summary.held_out
    assert f"dualenc zeroshot RUN {out / 'held_out'}" in summary.lines()[-1]
    # Training splits the rest by another hash; with the same one, a share as large would hold out nothing.
    train, val = ShardIndex.build(out).split(0.4)
    assert len(train) + len(val) == summary.samples


def test_columns(tmp_path, seed):
    made = list(pictures(tmp_path, np.random.default_rng(seed), 3))
    rows = [{"pic": name, "words": f"w {name}", "other": "o"} for name in made]
    table = table_of(tmp_path / "t.csv", rows)
    with pytest.raises(DataError, match=r"usual name for images, only 'pic', 'words', 'other': .*--image_column"):
        make_shards(table, tmp_path / "out", workers=0)
    with pytest.raises(DataError, match=r"usual name for captions, .*--caption_column"):
        make_shards(table, tmp_path / "out", image_column="pic", workers=0)
    with pytest.raises(DataError, match=r"column 'Pic', only 'pic'"):
        make_shards(table, tmp_path / "out", image_column="Pic", workers=0)
    assert not (tmp_path / "out").exists()
    make_shards(table, tmp_path / "out", image_column="pic", caption_column="words", workers=0)
    assert {s["txt"].decode() for s in read(tmp_path / "out")} == {f"w {name}" for name in made}


def test_wrong_use(tmp_path, seed):
    class_folders(tmp_path / "set", np.random.default_rng(seed))
    table = table_of(tmp_path / "t.csv", [{"image": "a.png", "caption": "x"}])
    out = tmp_path / "out"
    for source, options, message in (
        (tmp_path / "set", {"templates": ["a photo"]}, r"'a photo' must have \{c\}"),
        (tmp_path / "set", {"image_column": "x"}, "options for tables only"),
        (tmp_path / "set", {"images": tmp_path}, "options for tables only"),
        (tmp_path / "set", {"samples": 0}, "samples 0 must be at least 1"),
        (tmp_path / "set", {"val": 1.0}, r"val 1\.0 .*below 1"),
        (table, {"templates": ["{c}"]}, "templates are for folders of classes"),
        (table, {"images": tmp_path / "absent"}, "absent must be a folder"),
        (table, {}, r"'a.png' are not in .* with --images"),
        (tmp_path / "absent", {}, "absent does not exist"),
        (tmp_path, {}, r"no class folders with images .*\(found t.csv, set\)"),
        (tmp_path / "set" / "kind_0-of" / "first.jpg", {}, "must be a folder, or a table .csv"),
    ):
        with pytest.raises(DataError, match=message):
            make_shards(source, out, workers=0, **options)
    assert not out.exists()
    (tmp_path / "captions.csv").write_text("image,caption\n")
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(DataError, match=r"holds captions\.csv and metadata\.jsonl: name one"):
        make_shards(tmp_path, out, workers=0)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        make_shards(tmp_path / "t.parquet", tmp_path / "out")


def test_garbage_tables(tmp_path):
    pytest.importorskip("pyarrow")
    for name in ("t.parquet", "t.csv", "t.tsv", "t.jsonl", "t.txt", "t.json"):
        for data in (b"", b"\xff\xfe\0\0garbage\n\0", b"garbage\n" * 3):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(DataError, match=name):
                make_shards(tmp_path / name, tmp_path / "out", workers=0)


def test_lone_surrogates_and_odd_values(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(np.zeros((2, 2, 3), np.uint8)))
    rows = [
        {"image": "a.png", "caption": "fine", "nan": float("nan"), "list": [1], "odd": "\ud800", "yes": True},
        {"image": "a.png", "caption": "\ud800"},
        {"image": "a.png", "caption": 7},
        {"image": "a.png", "caption": None},
        {"image": "a.png", "caption": []},
        {"image": 7, "caption": "x"},
        {"image": "\ud800.png", "caption": "x"},
    ]
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in [*rows, 7]) + "{\n")
    rows = table.read_text()
    table.write_text(rows + rows.splitlines()[0].replace("a.png", "./a.png") + "\n")
    with pytest.raises(DataError, match="more than half"):
        make_shards(table, tmp_path / "out", workers=0)
    for name in "bcde":
        (tmp_path / f"{name}.png").write_bytes(encode(np.zeros((2, 2, 3), np.uint8)))
        rows += json.dumps({"image": f"{name}.png", "caption": name}) + "\n"
    table.write_text(rows)
    summary = make_shards(table, tmp_path / "out", workers=0)
    assert {cause: len(names) for cause, names in summary.left_out.items()} == {
        "caption not UTF-8": 1, "caption not text": 1, "caption empty": 2, "image not named": 1, "row broken": 2,
        "image missing": 1,
    }  # fmt: skip
    assert summary.samples == 5
    assert summary.duplicates == 4
    assert "\n".join(summary.lines()).encode()


def test_workers_and_transparent_or_rotated_images_change_nothing(tmp_path, seed):
    rng = np.random.default_rng(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(30):
        picture = Image.fromarray(pixels(rng, 6, 9, 4))
        data = encode(picture) if i % 2 else encode(picture.convert("RGB"), "jpeg", exif=exif)
        (tmp_path / f"{i}.png").write_bytes(data)
    table = table_of(tmp_path / "t.csv", [{"image": f"{i}.png", "caption": i} for i in range(30)])
    for workers in (0, 1, 2):
        make_shards(table, tmp_path / str(workers), samples=7, workers=workers)
    assert content(tmp_path / "0") == content(tmp_path / "1") == content(tmp_path / "2")
    for sample in read(tmp_path / "0"):
        file = tmp_path / json.loads(sample["json"])["file"]
        assert (sample.get("png") or sample["jpg"]) == file.read_bytes()


def test_permissions(tmp_path, seed, monkeypatch):
    made = list(pictures(tmp_path, np.random.default_rng(seed), 3))
    (tmp_path / made[0]).chmod(0)
    if os.geteuid() == 0:  # root can read everything, so that the refusal is simulated

        def refusing(path, *how):
            if os.path.exists(path) and not os.stat(path).st_mode & 0o400:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return open(path, *how)

        monkeypatch.setattr(pictures_module, "open", refusing, raising=False)
    table = table_of(tmp_path / "t.csv", [{"image": name, "caption": "x"} for name in made])
    assert make_shards(table, tmp_path / "out", workers=0).left_out == {
        "image cannot be read (Permission denied)": [made[0]]
    }


@needs_data
def test_real_emoji_through_a_table(tmp_path, seed):
    """Unpacked and packed again, the images and names are the same."""
    index = ShardIndex.build(DATA / "emoji")
    rows = np.sort(np.random.default_rng(seed).choice(len(index), 60, replace=False))
    before = {}
    for sample in index.take(rows):
        (tmp_path / f"{sample.key}.png").write_bytes(sample.read("png"))
        before[f"{sample.key}.png"] = (sample.read("png"), sample.read("txt").decode().strip())
    table = table_of(tmp_path / "metadata.csv", [{"file_name": n, "text": t} for n, (_, t) in before.items()])
    summary = make_shards(tmp_path, tmp_path / "out", samples=25, workers=2)
    assert table.exists()
    assert (summary.samples, summary.shards, summary.left_out) == (60, 3, {})
    after = {json.loads(s["json"])["file"]: (s["png"], s["txt"].decode()) for s in read(tmp_path / "out")}
    assert after == {name: (data, " ".join(text.split())) for name, (data, text) in before.items()}


@needs_data
def test_real_photos_of_classes(tmp_path, seed):
    data = BenchmarkSet.open(DATA / "zeroshot_clothing")
    rows = np.sort(np.random.default_rng(seed).choice(len(data), 60, replace=False))
    for i, sample in zip(rows, data.index.take(rows), strict=True):
        folder = tmp_path / "set" / data.classnames[data.targets[i]].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{sample.key}.jpg").write_bytes(sample.read(sample.image))
    summary = make_shards(tmp_path / "set", tmp_path / "out", samples=20, val=0.3)
    assert summary.samples + summary.held_out == 60
    assert dualenc.evaluate(tiny_embedder(seed), tmp_path / "out" / "held_out")["n"] == summary.held_out
    for sample in ShardIndex.build(tmp_path / "out"):
        assert Image.open(io.BytesIO(sample.read("jpg"))).size[::-1] == decode_image(sample.read("jpg")).shape[-2:]
