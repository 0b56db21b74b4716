import io

import numpy as np
import pytest
from helpers import SIZE, caption, encode, pixels, smooth, write_benchmark, write_tar

from dualenc.data import BenchmarkSet, DataError, Preprocess, decode_image


@pytest.fixture
def folder(tmp_path, seed):
    return write_benchmark(tmp_path / "set of six", seed)


def test_classification(folder):
    data = BenchmarkSet.open(folder)
    assert (data.kind, data.split, data.name, len(data)) == ("classification", "test", "set of six", 7)
    assert data.classnames == [f"class {i}" for i in range(6)]
    assert data.templates == ["a photo of a {c}.", "the {c}"]
    assert data.targets.tolist() == [0, 1, 2, 3, 4, 5, 0]
    batches = list(data.images(Preprocess(SIZE), batch_size=3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    expected = [Preprocess(SIZE)(decode_image(sample.read("jpg"))) for sample in data.index]
    found = [image for batch in batches for image in batch]
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(found, expected, strict=True))


def test_images_by_workers_in_order(folder):
    data = BenchmarkSet.open(folder)
    alone = [batch.numpy() for batch in data.images(Preprocess(SIZE), batch_size=2)]
    workers = [batch.numpy() for batch in data.images(Preprocess(SIZE), batch_size=2, workers=2)]
    assert all(np.array_equal(a, b) for a, b in zip(alone, workers, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_some_rows(folder, workers):
    data = BenchmarkSet.open(folder)
    whole = np.concatenate([batch.numpy() for batch in data.images(Preprocess(SIZE))])
    assert len(np.unique(whole, axis=0)) == 7
    for rows in (range(2, 6), [5, 0, 5, 3], range(7), [6]):
        batches = list(data.images(Preprocess(SIZE), rows, batch_size=3, workers=workers))
        assert [len(batch) for batch in batches] == [min(3, len(rows) - i) for i in range(0, len(rows), 3)]
        assert np.array_equal(np.concatenate([batch.numpy() for batch in batches]), whole[list(rows)])
    assert not list(data.images(Preprocess(SIZE), []))


def test_rows_that_are_not_asked_for_are_not_decoded(folder):
    replace_sample(folder, png=b"broken", cls=b"0")  # row 3
    data = BenchmarkSet.open(folder)
    assert len(next(iter(data.images(Preprocess(SIZE), [0, 1, 2])))) == 3
    with pytest.raises(DataError, match="cannot be decoded"):
        list(data.images(Preprocess(SIZE), [2, 3]))


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
    assert BenchmarkSet.open(folder).split == "train"
    write_benchmark(folder, seed, split="val", counts=(3,))
    with pytest.raises(DataError, match="has the splits train, val and no test: name one"):
        BenchmarkSet.open(folder)
    assert len(BenchmarkSet.open(folder, "val")) == 3
    with pytest.raises(DataError, match="no split 'test', only train, val"):
        BenchmarkSet.open(folder, "test")
    write_benchmark(folder, seed, split="test", counts=(4,))
    assert len(BenchmarkSet.open(str(folder))) == 4


def replace_sample(folder, **members):
    """Puts one sample with these members in place of shard 1."""
    sample = {"__key__": "x/odd one", "png": encode(np.zeros((8, 8, 3), np.uint8)), **members}
    write_tar(folder / "test" / "1.tar", [sample])
    forget(folder)


def forget(folder):
    """What was indexed before a test changes it."""
    (folder / "test" / "dualenc.index").unlink(missing_ok=True)


LAYOUT = {
    "nothing": (lambda f: [p.unlink() for p in f.glob("test/*")], r"CLIP_benchmark layout: no <split>/nshards\.txt"),
    "nshards": (lambda f: (f / "test/nshards.txt").unlink(), r"no <split>/nshards\.txt"),
    "empty number": (lambda f: (f / "test/nshards.txt").write_text(""), r"test/nshards\.txt: '' is no number"),
    "word": (lambda f: (f / "test/nshards.txt").write_text("two"), r"test/nshards\.txt: 'two' is no number"),
    "superscript": (lambda f: (f / "test/nshards.txt").write_text("²"), r"test/nshards\.txt: '²' is no number"),
    "zero": (lambda f: (f / "test/nshards.txt").write_text("0"), r"test/nshards\.txt: '0' is no number"),
    "negative": (lambda f: (f / "test/nshards.txt").write_text("-1"), r"test/nshards\.txt: '-1' is no number"),
    "bytes": (lambda f: (f / "test/nshards.txt").write_bytes(b"\xff"), r"test/nshards\.txt cannot be read"),
    "more shards": (lambda f: (f / "test/nshards.txt").write_text("3"), r"test/2\.tar is missing; .* promises 3"),
    "shard": (lambda f: (f / "test/0.tar").unlink(), r"test/0\.tar is missing; .* promises 2"),
    "broken shard": (lambda f: (f / "test/0.tar").write_bytes(b"x" * 900), r"test/0\.tar cannot be read"),
    "names": (lambda f: (f / "classnames.txt").unlink(), r"classnames\.txt is missing"),
    "no names": (lambda f: (f / "classnames.txt").write_text("\n \n"), r"classnames\.txt is empty"),
    "names' bytes": (lambda f: (f / "classnames.txt").write_bytes(b"\xff"), r"classnames\.txt cannot be read"),
    "a blank name": (lambda f: (f / "classnames.txt").write_text("a\n\nb\nc\nd\ne\nf"), r"classnames\.txt"),
    "templates": (lambda f: (f / "zeroshot_classification_templates.txt").unlink(), r"templates\.txt is missing"),
    "{c}": (
        lambda f: (f / "zeroshot_classification_templates.txt").write_text("a {c}\na photo\n"),
        r"zeroshot_classification_templates\.txt: 'a photo' has no \{c\}",
    ),
    "type": (lambda f: (f / "dataset_type.txt").write_text("video\n"), r"dataset_type\.txt: 'video' is none of"),
    "no type": (lambda f: (f / "dataset_type.txt").write_text(""), r"dataset_type\.txt: '' is none of"),
    "no samples": (lambda f: [write_tar(f / f"test/{i}.tar", []) for i in range(2)], r"test holds no samples"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUT)
def test_what_is_wrong_with_the_layout_is_named(folder, case):
    BenchmarkSet.open(folder)  # the control
    breaking, message = LAYOUT[case]
    breaking(folder)
    forget(folder)
    with pytest.raises(DataError, match=message):
        BenchmarkSet.open(folder)


def test_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("absent", "file"):
        with pytest.raises(DataError, match=f"{name} is no folder"):
            BenchmarkSet.open(tmp_path / name)


@pytest.mark.parametrize("label", [b"6", b"-1", b"", b"cat", b"1.0", b"\xff", "²".encode(), b"1" * 5000])
def test_a_class_out_of_range(folder, label):
    replace_sample(folder, cls=label)
    with pytest.raises(DataError, match=r"test/1\.tar sample 'x/odd one': class .* is none of 0 to 5"):
        BenchmarkSet.open(folder).targets  # noqa: B018


def test_a_missing_label_and_a_missing_caption(folder, tmp_path, seed):
    replace_sample(folder, txt=b"x")
    with pytest.raises(DataError, match=r"test/1\.tar sample 'x/odd one': no \.cls among its members"):
        BenchmarkSet.open(folder).targets  # noqa: B018
    folder = write_benchmark(tmp_path / "r", seed, "retrieval")
    for members, cause in (({}, r"no \.txt"), ({"txt": b" \n"}, "no caption"), ({"txt": b"\xff"}, "not UTF-8")):
        replace_sample(folder, **members)
        with pytest.raises(DataError, match=rf"test/1\.tar sample 'x/odd one': {cause}|\.txt is not UTF-8"):
            BenchmarkSet.open(folder).captions  # noqa: B018


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def huge_npy():
    """A header that promises 8 TB."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    return file.getvalue()


@pytest.mark.parametrize(
    "label",
    [
        pytest.param(npy(np.zeros(5)), id="short"),
        pytest.param(npy(np.zeros(7)), id="long"),
        pytest.param(b"", id="empty"),
        pytest.param(b"garbage", id="garbage"),
        pytest.param(npy(np.zeros(6))[:-3], id="cut"),
        pytest.param(npy(np.zeros(6))[:40], id="cut header"),
        pytest.param(b"PK\x03\x04garbage", id="zip"),
        pytest.param(npy(np.array([{}] * 6), allow_pickle=True), id="pickle"),
        pytest.param(npy(np.array(["a"] * 6)), id="strings"),
        pytest.param(huge_npy(), id="huge"),
    ],
)
def test_a_broken_multihot_label(tmp_path, seed, label):
    folder = write_benchmark(tmp_path / "m", seed, "multilabel")
    replace_sample(folder, npy=label)
    with pytest.raises(DataError, match=r"test/1\.tar sample 'x/odd one'"):
        BenchmarkSet.open(folder).targets  # noqa: B018


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture(folder, workers):
    replace_sample(folder, png=b"broken", cls=b"0")
    with pytest.raises(DataError, match=r"test/1\.tar sample 'x/odd one': \.png cannot be decoded"):
        list(BenchmarkSet.open(folder).images(Preprocess(SIZE), workers=workers))


def test_no_picture(folder):
    write_tar(folder / "test/1.tar", [{"__key__": "x", "cls": b"0"}])
    with pytest.raises(DataError, match=r"test/1\.tar sample 'x': no image among its members"):
        list(BenchmarkSet.open(folder).images(Preprocess(SIZE)))


def test_what_webdataset_writers_give_is_read(tmp_path, seed):
    """Names in upper case and .webp, as exports have them."""
    rng = np.random.default_rng(seed)
    folder = write_benchmark(tmp_path / "w", seed, "retrieval", counts=(2,))
    samples = [
        {"__key__": "a", "WEBP": encode(smooth(rng, 9, 9), "webp"), "txt": caption(rng).encode()},
        {"__key__": "b", "JPEG": encode(smooth(rng, 9, 9), "jpeg"), "txt": caption(rng).encode()},
    ]
    write_tar(folder / "test/0.tar", samples)
    (batch,) = BenchmarkSet.open(folder).images(Preprocess(SIZE))
    assert batch.shape == (2, 3, SIZE, SIZE)
