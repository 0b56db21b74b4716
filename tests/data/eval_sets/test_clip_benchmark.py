import io

import numpy as np
import pytest
import torch
from helpers import SIZE, caption, encode, pixels, smooth, write_benchmark, write_tar

from dualenc.data import BenchmarkSet, Preprocess, decode_image
from dualenc.data.shards.shard import Shard, content_hash
from dualenc.utils.errors import DataError


@pytest.fixture
def folder(tmp_path, seed):
    return write_benchmark(tmp_path / "set of six", seed)


def whole(data, rows=None, **options):
    """Return all images of a set, and check that no image is bad."""
    batches = list(data.images(Preprocess(SIZE), rows, **options))
    assert not any(batch.bad for batch in batches)
    return np.concatenate([batch.images.numpy() for batch in batches]) if batches else np.zeros(0)


def test_classification(folder):
    data = BenchmarkSet.open(folder)
    assert (data.kind, data.split, data.name, len(data)) == ("classification", "test", "set of six", 7)
    assert (data.path, data.problems) == (str(folder), [])
    assert data.classnames == [f"class {i}" for i in range(6)]
    assert data.templates == ["a photo of a {c}.", "the {c}"]
    assert data.targets.dtype == torch.int64
    assert data.targets.tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert [data.key(i) for i in range(7)] == [f"s{i:05d}" for i in range(7)]
    assert data.captions[0] == data.texts == data.choices.keys == []
    batches = data.images(Preprocess(SIZE), batch_size=3)
    assert len(batches) == 3
    assert [(batch.rows, batch.bad) for batch in batches] == [([0, 1, 2], []), ([3, 4, 5], []), ([6], [])]
    expected = [Preprocess(SIZE)(decode_image(sample.read("jpg"))).numpy() for sample in data.index]
    found = whole(data, batch_size=3)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.stack(expected))


def test_workers_keep_the_order_of_images(folder):
    data = BenchmarkSet.open(folder)
    assert np.array_equal(whole(data, batch_size=2), whole(data, batch_size=2, workers=2))


def test_a_transform_may_give_floats(folder):
    (batch,) = BenchmarkSet.open(folder).images(lambda image: image[:, :4, :4].float() / 255)
    assert (batch.images.shape, batch.images.dtype) == ((7, 3, 4, 4), torch.float32)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_some_rows(folder, workers):
    data = BenchmarkSet.open(folder)
    every = whole(data)
    assert len(np.unique(every, axis=0)) == 7
    for rows in (range(2, 6), [5, 0, 5, 3], range(7), np.array([6])):
        batches = list(data.images(Preprocess(SIZE), rows, batch_size=3, workers=workers))
        assert [len(batch.rows) for batch in batches] == [min(3, len(rows) - i) for i in range(0, len(rows), 3)]
        assert [row for batch in batches for row in batch.rows] == list(rows)
        assert np.array_equal(whole(data, rows, batch_size=3, workers=workers), every[list(rows)])
    assert len(data.images(Preprocess(SIZE), [])) == 0
    assert not list(data.images(Preprocess(SIZE), []))


def test_only_the_requested_rows_are_decoded(folder):
    replace_sample(folder, png=b"broken", cls=b"0")  # row 3
    data = BenchmarkSet.open(folder)
    assert len(whole(data, [0, 1, 2])) == 3
    (batch,) = data.images(Preprocess(SIZE), [2, 3])
    assert (batch.rows, [row for row, _ in batch.bad]) == ([2], [3])


def test_thumbnail(folder):
    data = BenchmarkSet.open(folder)
    for i, sample in enumerate(data.index):
        found = decode_image(data.thumbnail(i)).numpy().astype(int)
        expected = decode_image(sample.read("jpg")).numpy()
        assert found.shape == expected.shape == (3, 20, 24)
        assert np.abs(found - expected).mean() < 4


def test_multilabel(tmp_path, seed):
    data = BenchmarkSet.open(write_benchmark(tmp_path / "m", seed, "multilabel"))
    assert data.kind == "multilabel"
    assert data.targets.shape == (7, 6)
    expected = [np.load(io.BytesIO(sample.read("npy"))) != 0 for sample in data.index]
    assert data.targets.tolist() == np.stack(expected).tolist()


def test_retrieval(tmp_path, seed):
    data = BenchmarkSet.open(write_benchmark(tmp_path / "r", seed, "retrieval"))
    assert (data.kind, data.classnames, data.templates) == ("retrieval", [], [])
    captions, owner = data.captions
    expected = [(line, i) for i, s in enumerate(data.index) for line in s.read("txt").decode().splitlines()]
    assert list(zip(captions, owner.tolist(), strict=True)) == expected


def test_captions_may_have_blank_lines_and_windows_line_ends(tmp_path, seed):
    folder = write_benchmark(tmp_path / "r", seed, "retrieval", counts=(1,))
    sample = {"__key__": "a", "png": encode(pixels(np.random.default_rng(seed))), "txt": b"\r\none \r\n\r\n two\n\n"}
    write_tar(folder / "test" / "0.tar", [sample])
    captions, owner = BenchmarkSet.open(folder).captions
    assert captions == ["one", "two"]
    assert owner.tolist() == [0, 0]


def test_splits(tmp_path, seed):
    folder = write_benchmark(tmp_path / "s", seed, split="train", counts=(2,))
    assert BenchmarkSet.splits(folder) == ["train"]
    assert BenchmarkSet.open(folder).split == "train"
    write_benchmark(folder, seed, split="val", counts=(3,))
    with pytest.raises(DataError, match=r"train, val .* test"):
        BenchmarkSet.open(folder)
    assert len(BenchmarkSet.open(folder, "val")) == 3
    with pytest.raises(DataError, match="no split 'test', only train, val"):
        BenchmarkSet.open(folder, "test")
    write_benchmark(folder, seed, split="test", counts=(4,))
    assert len(BenchmarkSet.open(str(folder))) == 4
    assert BenchmarkSet.splits(str(folder)) == ["test", "train", "val"]


def replace_sample(folder, **members):
    """Replace shard 1 by one with a single sample of these members."""
    sample = {"__key__": "x/odd one", "png": encode(np.zeros((8, 8, 3), np.uint8)), **members}
    write_tar(folder / "test" / "1.tar", [sample])
    remove_index(folder)


def remove_index(folder):
    """Remove the index that was made before a test changes the shards."""
    (folder / "test" / "dualenc.index").unlink(missing_ok=True)


LAYOUT = {
    "nothing": (lambda f: [p.unlink() for p in f.glob("test/*")], r"CLIP_benchmark layout: no <split>/nshards\.txt"),
    "empty number": (lambda f: (f / "test/nshards.txt").write_text(""), r"test/nshards\.txt: '' is not a number"),
    "word": (lambda f: (f / "test/nshards.txt").write_text("two"), r"test/nshards\.txt: 'two' is not a number"),
    "superscript": (lambda f: (f / "test/nshards.txt").write_text("²"), r"test/nshards\.txt: '²' is not a number"),
    "zero": (lambda f: (f / "test/nshards.txt").write_text("0"), r"test/nshards\.txt: '0' is not a number"),
    "negative": (lambda f: (f / "test/nshards.txt").write_text("-1"), r"test/nshards\.txt: '-1' is not a number"),
    "bytes": (lambda f: (f / "test/nshards.txt").write_bytes(b"\xff"), r"test/nshards\.txt is not UTF-8"),
    "names": (lambda f: (f / "classnames.txt").unlink(), r"classnames\.txt is missing"),
    "no names": (lambda f: (f / "classnames.txt").write_text("\n \n"), r"classnames\.txt is empty"),
    "names' bytes": (lambda f: (f / "classnames.txt").write_bytes(b"\xff"), r"classnames\.txt is not UTF-8"),
    "a blank name": (lambda f: (f / "classnames.txt").write_text("a\n\nb\nc\nd\ne\nf"), r"classnames\.txt"),
    "templates": (lambda f: (f / "zeroshot_classification_templates.txt").unlink(), r"templates\.txt is missing"),
    "{c}": (
        lambda f: (f / "zeroshot_classification_templates.txt").write_text("a photo\n{d}\n"),
        r"zeroshot_classification_templates\.txt: 'a photo' has no \{c\}",
    ),
    "type": (lambda f: (f / "dataset_type.txt").write_text("video\n"), r"dataset_type\.txt: 'video' is not one of"),
    "long type": (lambda f: (f / "dataset_type.txt").write_text("x" * 999), r"dataset_type\.txt: 'x{40}' is not one"),
    "no type": (lambda f: (f / "dataset_type.txt").write_text(""), r"dataset_type\.txt: '' is not one of"),
    "no samples": (lambda f: [write_tar(f / f"test/{i}.tar", []) for i in range(2)], r"holds no samples that"),
    "no shards": (lambda f: [(f / f"test/{i}.tar").unlink() for i in range(2)], r"no samples .*\(shard missing 2\)"),
    "a blank template": (
        lambda f: (f / "zeroshot_classification_templates.txt").write_text("{c}\n\n{c}"),
        r"templates\.txt: line 2 is blank",
    ),
    "no label in range": (
        lambda f: [write_tar(f / f"test/{i}.tar", [{"__key__": "a", "png": b"", "cls": b"9"}]) for i in range(2)],
        r"no samples that can be used \(class out of range 2\), such as .*test/0\.tar sample 'a': .*9 is not one of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUT)
def test_the_error_of_a_wrong_layout_names_the_file(folder, case):
    BenchmarkSet.open(folder)  # control
    breaking, message = LAYOUT[case]
    breaking(folder)
    remove_index(folder)
    with pytest.raises(DataError, match=message):
        BenchmarkSet.open(folder)


def test_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="absent does not exist"):
        BenchmarkSet.open(tmp_path / "absent")
    with pytest.raises(DataError, match=r"file must be a folder, or a table \.csv"):
        BenchmarkSet.open(tmp_path / "file")
    with pytest.raises(DataError, match=r"is not in the CLIP_benchmark layout: no <split>/nshards\.txt in it"):
        BenchmarkSet.open(tmp_path)


# Problems are named, and the rest of the set is measured


def problems_of(data):
    """Return the problems as a dictionary."""
    found = {problem.what: problem.names for problem in data.problems}
    assert len(found) == len(data.problems)
    assert all(found.values())
    return found


def problem(data):
    """Return what the only problem is, and its only name."""
    ((what, (name,)),) = problems_of(data).items()
    return what, name


def check_rest(data, kept=(0, 1, 2)):
    """Check that a set has exactly the samples of these numbers."""
    keys = [f"s{row:05d}" for row in kept]
    assert len(data) == len(keys)
    assert [data.key(i) for i in range(len(data))] == keys
    if data.kind == "classification":
        assert data.targets.tolist() == [row % 6 for row in kept]
    assert len(whole(data)) == len(data.item_ids) == len(keys)


def test_missing_shards(folder):
    (folder / "test/nshards.txt").write_text("4")
    data = BenchmarkSet.open(folder)
    assert problems_of(data) == {
        "shard missing": [f"{folder}/test/{i}.tar; nshards.txt declares 4 shards" for i in (2, 3)]
    }
    check_rest(data, range(7))
    (folder / "test/0.tar").unlink()
    data = BenchmarkSet.open(folder)
    assert len(problems_of(data)["shard missing"]) == 3
    check_rest(data, range(3, 7))


@pytest.mark.parametrize("how", ["cut", "garbage", "empty"])
def test_shards_that_cannot_be_read(folder, how, seed):
    data = (folder / "test/1.tar").read_bytes()
    cut = int(np.random.default_rng(seed).integers(600, len(data) - 2000))
    (folder / "test/1.tar").write_bytes({"cut": data[:cut], "garbage": b"x" * 900, "empty": b""}[how])
    for _ in range(2):
        found = BenchmarkSet.open(folder)
        what, name = problem(found)
        assert what == "shard cannot be read"
        assert name.startswith(f"shard {folder}/test/1.tar cannot be read: ")
        check_rest(found)


@pytest.mark.parametrize("how", ["cut", "other bytes"])
def test_a_damaged_index_is_rebuilt(folder, how):
    before = BenchmarkSet.open(folder).fingerprint
    path = folder / "test/dualenc.index"
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[100:]
    else:
        data[40] ^= 255
    path.write_bytes(data)
    for _ in range(2):
        data = BenchmarkSet.open(folder)
        check_rest(data, range(7))
        assert data.fingerprint == before
        assert data.problems == []


def test_shards_that_changed_after_they_were_indexed(folder, seed):
    before = BenchmarkSet.open(folder)
    rng = np.random.default_rng(seed)
    samples = [{"__key__": f"new {i}", "png": encode(pixels(rng)), "cls": b"5"} for i in range(2)]
    write_tar(folder / "test/1.tar", samples)
    data = BenchmarkSet.open(folder)
    assert (data.problems, data.targets.tolist()) == ([], [0, 1, 2, 5, 5])
    assert data.fingerprint != before.fingerprint
    assert len(whole(data)) == 5


def test_a_shard_that_is_deleted_after_opening(folder):
    data = BenchmarkSet.open(folder)
    (folder / "test/1.tar").unlink()
    assert len(whole(data, range(3))) == 3
    with pytest.raises(DataError, match=r"test/1\.tar is gone"):
        list(data.images(Preprocess(SIZE)))


def test_a_shard_that_fails_while_its_labels_are_read(folder, monkeypatch):
    """All of its samples are left out, also those whose label was already read."""
    read, reads = Shard.read, []

    def failing(shard, offset, size):
        reads.append(shard.url)
        if shard.url.endswith("0.tar") and len(reads) > 2:
            raise DataError(f"shard {shard} cannot be read: Input/output error; 3 tries")
        return read(shard, offset, size)

    monkeypatch.setattr(Shard, "read", failing)
    data = BenchmarkSet.open(folder)
    monkeypatch.undo()
    name = f"shard {folder}/test/0.tar cannot be read: Input/output error; 3 tries"
    assert problem(data) == ("shard cannot be read", name)
    check_rest(data, range(3, 7))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("sizes.json", '{"0.tar": 3, "1.tar": 4, "2.tar": 9}', []),
        ("sizes.json", '{"0.tar": 3, "1.tar": 6}', ["test/1.tar: 4, expected 6 (sizes.json)"]),
        ("sizes.json", '{"0.tar": 2}', ["test/0.tar: 3, expected 2 (sizes.json)"]),
        ("__len__", "7\n", []),
        ("__len__", "1007", ["test: 7, expected 1,007 (__len__)"]),
        ("sizes.json", "[3, 4]", None),
        ("sizes.json", "{", None),
        ("sizes.json", '{"0.tar": Infinity}', None),
        ("__len__", "seven", None),
    ],
)
def test_unexpected_numbers_of_samples(folder, name, text, expected):
    (folder / "test" / name).write_text(text)
    data = BenchmarkSet.open(folder)
    if expected is None:
        assert problems_of(data) == {"invalid number of samples": [f"{folder}/test/{name}"]}
    else:
        assert problems_of(data).get("unexpected number of samples", []) == [f"{folder}/{item}" for item in expected]
    check_rest(data, range(7))


@pytest.mark.parametrize("label", [b"6", b"-1", b"", b"cat", b"1.0", b"\xff", "²".encode(), b"1" * 5000])
def test_a_class_out_of_range(folder, label):
    replace_sample(folder, cls=label)
    data = BenchmarkSet.open(folder)
    what, name = problem(data)
    other = ".cls is not UTF-8" if label == b"\xff" else ".cls is not a class number"
    assert what == ("class out of range" if label in (b"6", b"-1") else other)
    assert name.startswith(f"{folder}/test/1.tar sample 'x/odd one': {what} (")
    assert len(name) < len(str(folder)) + 150
    assert ("not one of 0 to 5" in name) == (label in (b"6", b"-1"))
    check_rest(data)


def test_a_missing_label_and_a_missing_caption(folder, tmp_path, seed):
    replace_sample(folder, txt=b"x")
    data = BenchmarkSet.open(folder)
    assert problem(data) == (
        "no .cls among its members",
        f"{folder}/test/1.tar sample 'x/odd one': no .cls among its members (png, txt)",
    )
    check_rest(data)
    folder = write_benchmark(tmp_path / "r", seed, "retrieval")
    before = BenchmarkSet.open(folder).captions[0]
    for members, cause in (
        ({}, "no .txt among its members"),
        ({"txt": b" \n"}, "txt holds no caption, or only empty ones"),
        ({"txt": b"a\n\xff"}, ".txt is not UTF-8"),
    ):
        replace_sample(folder, **members)
        data = BenchmarkSet.open(folder)
        what, name = problem(data)
        assert what == cause
        assert name.startswith(f"{folder}/test/1.tar sample 'x/odd one': {cause}")
        check_rest(data)
        captions, owner = data.captions
        assert (captions, owner.max()) == (before[: len(captions)], 2)


def test_samples_with_the_same_problem_are_listed_together(folder):
    picture = encode(np.zeros((8, 8, 3), np.uint8))
    labels = [b"6", b"2", b"x", b"77", b"-3"]
    write_tar(
        folder / "test/1.tar", [{"__key__": f"k{i}", "png": picture, "cls": label} for i, label in enumerate(labels)]
    )
    data = BenchmarkSet.open(folder)
    found = problems_of(data)
    assert {what: len(names) for what, names in found.items()} == {
        "class out of range": 3,
        ".cls is not a class number": 1,
    }
    assert ["'k0'" in name for name in found["class out of range"]] == [True, False, False]
    assert (len(data), data.targets.tolist(), data.key(3)) == (4, [0, 1, 2, 2], "k1")


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def huge_npy():
    """Build a file whose header declares 8 TB."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    return file.getvalue()


@pytest.mark.parametrize(
    ("label", "cause"),
    [
        pytest.param(npy(np.zeros(5)), "wrong number of labels", id="short"),
        pytest.param(npy(np.zeros(7)), "wrong number of labels", id="long"),
        pytest.param(b"", ".npy cannot be read", id="empty"),
        pytest.param(b"garbage", ".npy cannot be read", id="garbage"),
        pytest.param(npy(np.zeros(6))[:-3], ".npy cannot be read", id="cut"),
        pytest.param(npy(np.zeros(6))[:40], ".npy cannot be read", id="cut header"),
        pytest.param(b"PK\x03\x04garbage", ".npy cannot be read", id="zip"),
        pytest.param(npy(np.array([{}] * 6), allow_pickle=True), ".npy cannot be read", id="pickle"),
        pytest.param(npy(np.array(["a"] * 6)), ".npy does not hold finite numbers", id="strings"),
        pytest.param(npy(np.array([0, 1, np.nan, 0, 0, 0])), ".npy does not hold finite numbers", id="nan"),
        pytest.param(huge_npy(), ".npy cannot be read", id="huge"),
    ],
)
def test_a_broken_multihot_label(tmp_path, seed, label, cause):
    folder = write_benchmark(tmp_path / "m", seed, "multilabel")
    before = BenchmarkSet.open(folder).targets
    replace_sample(folder, npy=label)
    data = BenchmarkSet.open(folder)
    what, name = problem(data)
    assert what == cause
    assert name.startswith(f"{folder}/test/1.tar sample 'x/odd one': {cause} (")
    assert torch.equal(data.targets, before[:3])
    check_rest(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image(folder, workers):
    replace_sample(folder, png=b"broken", cls=b"0")
    data = BenchmarkSet.open(folder)
    assert (len(data), data.problems) == (4, [])  # The problem is found in decoding.
    bad = (3, f"{folder}/test/1.tar sample 'x/odd one': .png cannot be decoded as JPEG, PNG or WebP")
    (batch,) = data.images(Preprocess(SIZE), workers=workers)
    assert (batch.rows, batch.bad, batch.images.shape) == ([0, 1, 2], [bad], (3, 3, SIZE, SIZE))
    assert list(data.images(Preprocess(SIZE), [3, 3], workers=workers)) == [([], None, [bad, bad])]


def test_a_sample_without_an_image(folder):
    write_tar(folder / "test/1.tar", [{"__key__": "x", "cls": b"0"}])
    data = BenchmarkSet.open(folder)
    assert problem(data) == (
        "no image among its members",
        f"{folder}/test/1.tar sample 'x': no image among its members (cls)",
    )
    check_rest(data)


def test_templates_without_a_place_for_the_name(folder):
    path = folder / "zeroshot_classification_templates.txt"
    path.write_text("a {c}\na photo\n{c}!\na {c}\n")
    data = BenchmarkSet.open(folder)
    assert data.templates == ["a {c}", "{c}!", "a {c}"]
    assert problems_of(data) == {"template without {c}": [f"{path} line 2: 'a photo'"]}


def test_duplicate_class_names(folder):
    (folder / "classnames.txt").write_text("\ufeffcrane\ncat\ncrane\nbat\nbat\ncrane\n", "utf-8")
    data = BenchmarkSet.open(folder)
    assert data.classnames == ["crane", "cat", "crane", "bat", "bat", "crane"]
    assert problems_of(data) == {"duplicate class name": ["'crane' (classes 0, 2, 5)", "'bat' (classes 3, 4)"]}
    check_rest(data, range(7))


# Hashes of the content


@pytest.mark.parametrize("kind", ["classification", "multilabel", "retrieval"])
def test_item_ids(tmp_path, seed, kind):
    folder = write_benchmark(tmp_path / "a", seed, kind)
    data = BenchmarkSet.open(folder)
    expected = [content_hash(sample.read("jpg")) for sample in data.index]
    assert data.item_ids.dtype == np.uint64
    assert data.item_ids.tolist() == expected
    again = BenchmarkSet.open(folder)
    assert all("image" in part.arrays for part in again.index.parts)  # stored in the index
    assert again.item_ids.tolist() == expected


def rewrite(folder, shards, change=lambda samples: None, split="test", key="other"):
    """Write the samples of a set to other shards, under other keys and names, and return the new fingerprint."""
    data = BenchmarkSet.open(folder)
    samples = [{name: sample.read(name) for name in sample.members} for sample in data.index]
    change(samples)
    out = folder.with_name(f"{folder.name} again")
    (out / split).mkdir(parents=True, exist_ok=True)
    for name in ("dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt"):
        if (folder / name).exists():
            (out / name).write_text((folder / name).read_text().replace("class", "kind").replace("photo", "picture"))
    parts = np.array_split(np.arange(len(samples)), shards)
    (out / split / "nshards.txt").write_text(str(shards))
    for i, part in enumerate(parts):
        write_tar(out / split / f"{i}.tar", [{"__key__": f"{key} {row}", **samples[row]} for row in part])
    return BenchmarkSet.open(out, split).fingerprint


@pytest.mark.parametrize("kind", ["classification", "multilabel", "retrieval"])
def test_fingerprint(tmp_path, seed, kind):
    rng = np.random.default_rng(seed)
    folder = write_benchmark(tmp_path / "a", seed, kind)
    fingerprint = BenchmarkSet.open(folder).fingerprint
    assert fingerprint == BenchmarkSet.open(folder).fingerprint
    assert len(fingerprint) == 32
    int(fingerprint, 16)
    for shards in (1, 2, 5):
        assert rewrite(folder, shards, split="val", key=str(shards)) == fingerprint
    row, label = int(rng.integers(7)), {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}[kind]

    def other_image(samples):
        samples[row]["jpg"] += b"\0"

    def other_label(samples):
        if kind == "multilabel":
            hot = np.load(io.BytesIO(samples[row][label]))
            hot[rng.integers(6)] ^= 1
            samples[row][label] = npy(hot)
        else:
            samples[row][label] = samples[row][label] + b"s" if kind == "retrieval" else b"%d" % ((row + 1) % 6)

    def swapped(samples):
        samples[0], samples[1] = samples[1], samples[0]

    others = [rewrite(folder, 2, change) for change in (other_image, other_label, swapped)]
    others.append(rewrite(folder, 2, lambda samples: samples.pop()))
    assert len({fingerprint, *others}) == 5


def test_fingerprint_depends_on_the_owner_of_a_caption(tmp_path, seed):
    """The same images and captions have another fingerprint if a caption belongs to another image."""
    rng = np.random.default_rng(seed)
    images, found = [encode(pixels(rng)) for _ in range(2)], set()
    for name, texts in (("a", [b"x\ny", b"z"]), ("b", [b"x", b"y\nz"])):
        folder = write_benchmark(tmp_path / name, seed, "retrieval", counts=(1,))
        samples = [{"__key__": str(i), "png": p, "txt": t} for i, (p, t) in enumerate(zip(images, texts))]
        write_tar(folder / "test/0.tar", samples)
        found.add(BenchmarkSet.open(folder).fingerprint)
    assert len(found) == 2


def test_extensions_in_upper_case(tmp_path, seed):
    """Exports have extensions in upper case, and .webp."""
    rng = np.random.default_rng(seed)
    folder = write_benchmark(tmp_path / "w", seed, "retrieval", counts=(2,))
    (folder / "dataset_type.txt").write_text("Retrieval")
    samples = [
        {"__key__": "a", "WEBP": encode(smooth(rng, 9, 9), "webp"), "txt": caption(rng).encode()},
        {"__key__": "b", "JPEG": encode(smooth(rng, 9, 9), "jpeg"), "txt": caption(rng).encode()},
    ]
    write_tar(folder / "test/0.tar", samples)
    assert whole(BenchmarkSet.open(folder)).shape == (2, 3, SIZE, SIZE)
