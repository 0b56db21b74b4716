"""Evaluation sets of loose files: class folders, caption tables, and sets of choices."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from helpers import SIZE, WORDS, caption, encode, pixels, smooth, write_tar

from dualenc.data import BenchmarkSet, Preprocess, SetOptions, decode_image
from dualenc.data.shards.shard import content_hash
from dualenc.utils.errors import DataError


def write_image(path, rng, kind="png"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pixels(rng), kind))
    return path


def problems_of(data):
    return {problem.what: problem.names for problem in data.problems}


def images_of(data):
    """Return all images of a set, and check that no image is bad."""
    batches = list(data.images(Preprocess(SIZE), batch_size=3))
    assert [row for batch in batches for row in batch.rows] == list(range(len(data)))
    return torch.cat([batch.images for batch in batches])


def decode(paths):
    return torch.stack([Preprocess(SIZE)(decode_image(path.read_bytes())) for path in paths])


# Class folders


@pytest.fixture
def folders(tmp_path, seed):
    """Write class folders with unsorted names and different numbers of images."""
    rng = np.random.default_rng(seed)
    root = tmp_path / "my photos"
    for folder, count in (("zebra", 2), ("hot_dog", 3), ("Aero-plane", 1), ("cat", 4)):
        for i in range(count):
            write_image(
                root / folder / f"{9 - i}.{('png', 'JPEG', 'webp')[i % 3]}", rng, ("png", "jpeg", "webp")[i % 3]
            )
    (root / "README.md").write_text("x")
    (root / ".cache").mkdir()
    write_image(root / ".cache" / "a.png", rng)
    write_image(root / "cat" / ".hidden.png", rng)
    return root


def test_class_folders(folders):
    data = BenchmarkSet.open(folders)
    assert (data.kind, data.name, data.split, data.problems) == ("classification", "my photos", "test", [])
    assert data.classnames == ["Aero plane", "cat", "hot dog", "zebra"]
    assert data.templates == ["a photo of a {c}."]
    assert data.targets.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 3, 3]
    paths = [folders / data.key(i) for i in range(10)]
    assert [path.parent.name for path in paths] == ["Aero-plane", *["cat"] * 4, *["hot_dog"] * 3, *["zebra"] * 2]
    assert paths == sorted(paths)
    assert torch.equal(images_of(data), decode(paths))
    assert data.item_ids.tolist() == [content_hash(path.read_bytes()) for path in paths]
    assert decode_image(data.thumbnail(4)).shape == decode_image(paths[4].read_bytes()).shape
    assert BenchmarkSet.splits(folders) == ["test"]
    with pytest.raises(DataError, match="no split 'train', only test"):
        BenchmarkSet.open(folders, "train")
    with pytest.raises(DataError, match="loose files"):
        data.index  # noqa: B018


def test_class_folders_with_classnames_and_templates(folders):
    (folders / "classnames.txt").write_text("plane\nkitten\nfrankfurter\nzebra\n")
    (folders / "zeroshot_classification_templates.txt").write_text("{c}\nno place\nthe {c}\n")
    data = BenchmarkSet.open(folders)
    assert data.classnames == ["plane", "kitten", "frankfurter", "zebra"]
    assert data.templates == ["{c}", "the {c}"]
    assert list(problems_of(data)) == ["template without {c}"]
    assert data.fingerprint == BenchmarkSet.open(folders).fingerprint
    (folders / "classnames.txt").write_text("plane\nkitten\nfrankfurter\n")
    with pytest.raises(DataError, match=r"classnames\.txt has 3 lines for 4 class folders"):
        BenchmarkSet.open(folders)


def test_problems_of_class_folders(folders, seed):
    (folders / "dingo").mkdir()
    (folders / "cat" / "notes.txt").write_text("x")
    (folders / "cat" / "more").mkdir()
    (folders / "hot-dog").mkdir()
    write_image(folders / "hot-dog" / "a.png", np.random.default_rng(seed))
    (folders / "zebra" / "broken.jpg").write_bytes(b"x")
    (folders / "zebra" / "a pipe.jpg").mkdir()
    data = BenchmarkSet.open(folders)
    assert data.classnames == ["Aero plane", "cat", "dingo", "hot dog", "hot dog", "zebra"]
    assert problems_of(data) == {
        "duplicate class name": ["'hot dog' (classes 3, 4)"],
        "class folder without images": [f"{folders}/dingo"],
        "not a .jpg, .jpeg, .png, .webp in a class folder": [
            f"{folders}/cat/{name}" for name in ("more", "notes.txt")
        ] + [f"{folders}/zebra/a pipe.jpg"],
    }  # fmt: skip
    assert data.targets.tolist() == [0, 1, 1, 1, 1, 3, 4, 4, 4, 5, 5, 5]
    batches = list(data.images(Preprocess(SIZE), batch_size=7, workers=1))
    bad = [item for batch in batches for item in batch.bad]
    assert bad == [(11, f"{folders}/zebra/broken.jpg: cannot be decoded as JPEG, PNG or WebP")]
    (folders / "Aero-plane" / "9.png").unlink()  # after the set was opened
    ((row, what),) = next(iter(data.images(Preprocess(SIZE), [0, 1]))).bad
    assert (row, what) == (0, f"{folders}/Aero-plane/9.png: cannot be read (No such file or directory)")


def test_class_folders_by_split(tmp_path, seed):
    """A class has the same number in all splits, even if a split lacks some classes."""
    rng = np.random.default_rng(seed)
    for split, classes in (("train", "bcd"), ("val", "abd"), ("elsewhere", "ab")):
        for name in classes:
            write_image(tmp_path / "set" / split / name / "1.png", rng)
    root = tmp_path / "set"
    assert BenchmarkSet.splits(root) == ["train", "val"]
    with pytest.raises(DataError, match=r"train, val .* test"):
        BenchmarkSet.open(root)
    (root / "classnames.txt").write_text("ape\nbee\ncow\ndog\n")
    for split, targets, absent in (("train", [1, 2, 3], "a"), ("val", [0, 1, 3], "c")):
        data = BenchmarkSet.open(root, split)
        assert (data.name, data.split, data.classnames) == ("set", split, ["ape", "bee", "cow", "dog"])
        assert data.targets.tolist() == targets
        assert problems_of(data) == {"class folder without images": [f"{root}/{split}/{absent}"]}
        assert torch.equal(images_of(data), decode([root / split / "abcd"[i] / "1.png" for i in targets]))
    write_image(root / "test" / "a" / "1.png", rng)
    assert len(BenchmarkSet.open(root)) == 1


def test_a_single_folder_of_images_is_refused(tmp_path, seed):
    write_image(tmp_path / "set" / "val2017" / "1.png", np.random.default_rng(seed))
    with pytest.raises(DataError, match=r"one folder with images, val2017: it needs a folder for each class$"):
        BenchmarkSet.open(tmp_path / "set")
    (tmp_path / "set" / "swap_obj.json").write_text("{}")
    with pytest.raises(DataError, match=r"name the table: swap_obj\.json"):
        BenchmarkSet.open(tmp_path / "set")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_folder_without_read_permission(folders):
    (folders / "cat").chmod(0)
    with pytest.raises(DataError, match=r"cat cannot be read \(Permission denied\)"):
        BenchmarkSet.open(folders)
    (folders / "cat").chmod(0o755)


def test_class_folders_equal_shards_of_the_same_images(folders, tmp_path):
    loose = BenchmarkSet.open(folders)
    layout = tmp_path / "layout"
    samples = [
        {"__key__": str(i), "png": (folders / loose.key(i)).read_bytes(), "cls": b"%d" % loose.targets[i]}
        for i in range(len(loose))
    ]
    write_tar(layout / "test" / "0.tar", samples)
    (layout / "test" / "nshards.txt").write_text("1")
    (layout / "classnames.txt").write_text("a\nb\nc\nd")
    (layout / "zeroshot_classification_templates.txt").write_text("{c}")
    data = BenchmarkSet.open(layout)
    assert data.fingerprint == loose.fingerprint
    assert torch.equal(images_of(data), images_of(loose))


# Caption tables


def write_table(root, rng, kind, count=5):
    """Write a table of one or two captions for each image; return its path, the captions and the image paths."""
    captions = [[f"{caption(rng)} {i}" for _ in range(1 + i % 2)] for i in range(count)]
    names = [f"p{i}.jpg" for i in range(count)]
    paths = [write_image(root / "images" / name, rng, "jpeg") for name in names]
    rows = [(name, text) for name, texts in zip(names, captions) for text in texts]
    if kind == "csv":
        table = root / "captions of mine.csv"
        with open(table, "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])
    elif kind == "tsv":
        table = root / "t.tsv"
        table.write_text("filepath\ttitle\n" + "".join(f"{name}\t{text}\n" for name, text in rows))
    elif kind == "jsonl":
        table = root / "t.jsonl"
        table.write_text("".join(json.dumps({"image": n, "captions": c}) + "\n" for n, c in zip(names, captions)))
    elif kind == "token":
        table = root / "Flickr.token.txt"
        table.write_text("".join(f"{name}#{i}\t{text}\n" for i, (name, text) in enumerate(rows)))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = root / "t.parquet"
        parquet.write_table(pyarrow.table({"image": [n for n, _ in rows], "text": [t for _, t in rows]}), table)
    else:
        table = root / "captions_val2017.json"
        notes = [{"id": i, "image_id": int(name[1:-4]), "caption": text} for i, (name, text) in enumerate(rows)]
        images = [{"id": int(name[1:-4]), "file_name": name} for name in names]
        table.write_text(json.dumps({"info": {"year": 2017}, "images": images, "annotations": notes}))
    return table, captions, paths


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "token", "parquet", "coco"])
def test_caption_tables(tmp_path, seed, kind):
    table, captions, paths = write_table(tmp_path / "set", np.random.default_rng(seed), kind)
    data = BenchmarkSet.open(table)
    assert (data.kind, data.name, data.split, data.problems) == ("retrieval", table.stem, "test", [])
    assert (data.classnames, data.templates) == ([], [])
    texts, owner = data.captions
    assert texts == [text for those in captions for text in those]
    assert owner.tolist() == [i for i, those in enumerate(captions) for _ in those]
    assert [data.key(i) for i in range(len(data))] == [path.name for path in paths]
    assert torch.equal(images_of(data), decode(paths))
    if kind == "token":  # A table of this name is found in its folder.
        assert BenchmarkSet.open(table.parent).name == "set"
        assert BenchmarkSet.open(table.parent).fingerprint == data.fingerprint


@pytest.mark.parametrize("kind", ["coco", "parquet"])
def test_images_of_a_table_in_another_place(tmp_path, seed, kind):
    table, captions, _ = write_table(tmp_path / "set", np.random.default_rng(seed), kind)
    expected = BenchmarkSet.open(table).fingerprint
    folder = (tmp_path / "set" / "images").rename(tmp_path / "val2017 of mine")
    with pytest.raises(DataError, match=r"images such as .* name the folder .* with --images$"):
        BenchmarkSet.open(table)
    places = {"coco": [table], "parquet": [table, table.parent, table.parent / "*.parquet"]}[kind]
    for place in places:
        data = BenchmarkSet.open(place, options=SetOptions(images=str(folder)))
        assert data.fingerprint == expected
        assert data.captions[0] == [text for those in captions for text in those]


def test_problems_of_a_caption_table(tmp_path, seed):
    table, captions, paths = write_table(tmp_path / "set", np.random.default_rng(seed), "csv")
    paths[1].unlink()
    paths[3].write_bytes(b"no picture")
    with open(table, "a") as file:
        file.write("p0.jpg,\np2.jpg,a,b\n../../p.jpg,away\n")
    data = BenchmarkSet.open(table)
    assert [data.key(i) for i in range(len(data))] == ["p0.jpg", "p2.jpg", "p3.jpg", "p4.jpg"]
    lines = 1 + sum(map(len, captions))
    assert problems_of(data) == {
        "caption empty": [f"line {lines + 1}: p0.jpg"],
        "row broken": [f"line {lines + 2}"],
        "image missing": ["p1.jpg"],
        "image outside of its folder": ["../../p.jpg"],
    }
    texts, owner = data.captions
    kept = [(text, row) for row, i in enumerate((0, 2, 3, 4)) for text in captions[i]]
    assert list(zip(texts, owner.tolist())) == kept
    (batch,) = data.images(Preprocess(SIZE))
    assert (batch.rows, [row for row, _ in batch.bad]) == ([0, 1, 3], [2])


def test_tables_that_are_not_understood(tmp_path, seed):
    table, _, paths = write_table(tmp_path / "set", np.random.default_rng(seed), "csv")
    for path in paths:
        path.unlink()
    with pytest.raises(DataError, match=r"captions of mine\.csv: .*'p0\.jpg' are not in"):
        BenchmarkSet.open(table)
    table.write_text("picture of it,words\na.jpg,b\n")
    with pytest.raises(DataError, match=r"captions of mine\.csv .* column with a usual name for images"):
        BenchmarkSet.open(table)
    broken = tmp_path / "set" / "t.json"
    for text, message in (("{", "read as JSON"), ("{}", "neither a list of objects nor COCO's"), ("3", "COCO's")):
        broken.write_text(text)
        with pytest.raises(DataError, match=rf"t\.json .*{message}"):
            BenchmarkSet.open(broken)


# Choices


def write_winoground(root, rng, count=4, ending=".png", named_whole=False):
    lines = []
    for i in range(count):
        words = [str(word) for word in rng.choice(WORDS, 4)] + [str(i)]
        names = [f"ex_{i}_img_{j}" for j in (0, 1)]
        for name in names:
            write_image(root / "images" / f"{name}{ending}", rng, ending[1:])
        names = [f"{name}{ending}" for name in names] if named_whole else names
        lines.append({
            "id": 100 + i, "image_0": names[0], "image_1": names[1], "caption_0": " ".join(words),
            "caption_1": " ".join(words[::-1]), "tag": "Object",
        })  # fmt: skip
    (root / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


@pytest.mark.parametrize(("ending", "named_whole"), [(".png", False), (".jpg", False), (".png", True)])
def test_winoground(tmp_path, seed, ending, named_whole):
    root = tmp_path / "winoground"
    lines = write_winoground(root, np.random.default_rng(seed), ending=ending, named_whole=named_whole)
    data = BenchmarkSet.open(root)
    assert (data.kind, data.name, data.split, len(data), data.problems) == ("choice", "winoground", "test", 8, [])
    images, texts, keys = data.choices
    assert (images.shape, texts.shape, images.dtype, texts.dtype) == ((4, 2), (4, 2), torch.int64, torch.int64)
    assert keys == ["100", "101", "102", "103"]
    decoded = images_of(data)
    for line, pair, words in zip(lines, images, texts, strict=True):
        stem = [root / "images" / f"{line[f'image_{j}'].removesuffix(ending)}{ending}" for j in (0, 1)]
        assert torch.equal(decoded[pair], decode(stem))
        assert [data.texts[i] for i in words] == [line["caption_0"], line["caption_1"]]
    assert BenchmarkSet.open(root / "examples.jsonl").fingerprint == data.fingerprint


def write_sugar_crepe(root, rng, folder="val2017", count=6):
    """Write two entries for each image, with keys that are not consecutive, as in the original set."""
    entries = {}
    for i in range(count):
        name = f"{i // 2:012d}.jpg"
        if i % 2 == 0:
            write_image(root / folder / name, rng, "jpeg")
        texts = {"caption": f"{caption(rng)} {i} ", "negative_caption": f"{caption(rng)} not {i}"}
        entries[str(3 * i)] = {"filename": name, **texts}
    (root / "swap_obj.json").write_text(json.dumps(entries))
    return entries


@pytest.mark.parametrize("folder", ["val2017", "images", ".", "../val2017"])
def test_sugar_crepe(tmp_path, seed, folder):
    root = tmp_path / "data"
    root.mkdir()
    entries = write_sugar_crepe(root, np.random.default_rng(seed), folder)
    data = BenchmarkSet.open(root / "swap_obj.json")
    assert (data.kind, data.name, data.problems) == ("choice", "swap_obj", [])
    assert len(data) == 3  # Each image is listed once.
    images, texts, keys = data.choices
    assert keys == list(entries)
    assert images.tolist() == [[i // 2, -1] for i in range(6)]
    assert [data.key(i) for i in range(3)] == [f"{i:012d}.jpg" for i in range(3)]
    assert torch.equal(images_of(data), decode([root / folder / data.key(i) for i in range(3)]))
    for entry, (right, wrong) in zip(entries.values(), texts.tolist(), strict=True):
        assert (data.texts[right], data.texts[wrong]) == (entry["caption"].strip(), entry["negative_caption"])


def test_problems_of_choices(tmp_path, seed):
    rng = np.random.default_rng(seed)
    entries = write_sugar_crepe(tmp_path, rng, count=12)
    (tmp_path / "val2017" / "000000000001.jpg").unlink()  # of entries 6 and 9
    (tmp_path / "val2017" / "000000000004.jpg").write_bytes(b"x")
    entries["0"]["caption"] = " "
    entries["3"]["negative_caption"] = 7
    entries["12"]["caption"] = "half \ud800"
    entries["15"]["filename"] = "../../../etc/hostname"
    entries["30"] = ["what"]
    del entries["33"]["negative_caption"]
    table = tmp_path / "swap_obj.json"
    table.write_text(json.dumps(entries))
    data = BenchmarkSet.open(table)
    assert problems_of(data) == {
        "caption empty": [f"{table} '0'"],
        "caption not text": [f"{table} '3'"],
        "image missing": [f"{table} '{i}': '{entries[i]['filename']}'" for i in ("6", "9", "15")],
        "caption not UTF-8": [f"{table} '12'"],
        "row broken": [f"{table} '30'", f"{table} '33'"],
    }
    assert data.choices.keys == ["18", "21", "24", "27"]
    assert data.choices.images.tolist() == [[0, -1], [0, -1], [1, -1], [1, -1]]
    assert len(data.texts) == 8
    (batch,) = data.images(Preprocess(SIZE))
    bad = f"{tmp_path}/val2017/000000000004.jpg: cannot be decoded as JPEG, PNG or WebP"
    assert (batch.rows, batch.bad) == ([0], [(1, bad)])
    for path in (tmp_path / "val2017").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"swap_obj\.json holds no samples that can be used \(.*image missing"):
        BenchmarkSet.open(table)


def test_a_broken_line_of_winoground(tmp_path, seed):
    write_winoground(tmp_path, np.random.default_rng(seed))
    table = tmp_path / "examples.jsonl"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(["{broken", lines[0], '{"id": 5}', *lines[1:]]))
    data = BenchmarkSet.open(tmp_path)
    assert problems_of(data) == {"row broken": [f"{table} 'line 1'", f"{table} 'line 3'"]}
    assert data.choices.keys == ["100", "101", "102", "103"]


def test_fingerprint_of_choices(tmp_path, seed):
    def opened(name, change=lambda lines: None):
        root = tmp_path / name
        lines = write_winoground(root, np.random.default_rng(seed))
        change(lines)
        (root / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return BenchmarkSet.open(root).fingerprint

    def other_text(lines):
        lines[1]["caption_1"] += "s"

    def swapped(lines):
        lines[2]["caption_0"], lines[2]["caption_1"] = lines[2]["caption_1"], lines[2]["caption_0"]

    def other_id(lines):
        lines[0]["id"] = 7

    def shared(lines):
        lines[1]["caption_0"], lines[1]["caption_1"] = lines[0]["caption_0"], lines[0]["caption_1"]

    def shared_and_swapped(lines):
        lines[1]["caption_0"], lines[1]["caption_1"] = lines[0]["caption_1"], lines[0]["caption_0"]

    fingerprint = opened("a")
    assert opened("b") == opened("c", other_id) == fingerprint
    others = [opened(str(i), change) for i, change in enumerate((other_text, swapped, shared, shared_and_swapped))]
    assert len({fingerprint, *others}) == 5


def test_files_that_are_too_large_are_not_read(tmp_path, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    write_winoground(tmp_path, rng)
    data = BenchmarkSet.open(tmp_path)
    (tmp_path / "images" / "ex_0_img_0.png").write_bytes(encode(smooth(rng, 64, 64)) + bytes(10_000))
    monkeypatch.setattr("dualenc.data.eval_sets.base.MAX_IMAGE", 9_000)
    (batch,) = data.images(Preprocess(SIZE))
    assert batch.bad == [(0, f"{tmp_path}/images/ex_0_img_0.png: is too large (more than 9,000 bytes)")]
