"""Plain shards as evaluation sets: they equal a set in the layout of CLIP_benchmark of the same samples."""

import json
import shutil

import numpy as np
import pytest
from helpers import caption, encode, smooth, write_benchmark, write_tar

from dualenc.data import BenchmarkSet, SetOptions, ShardIndex
from dualenc.utils.errors import DataError


def strip(layout, folder, *names):
    """Copy the shards of a set, and some of its files, to a folder that is not in the layout of CLIP_benchmark."""
    folder.mkdir(parents=True)
    for path in (*(layout / "test").glob("*.tar"), *(layout / name for name in names)):
        shutil.copy(path, folder)
    return folder


def check_equal(found, expected):
    """Check that two sets hold the same samples, labels and texts."""
    assert (found.kind, found.classnames, found.templates) == (expected.kind, expected.classnames, expected.templates)
    assert found.fingerprint == expected.fingerprint
    assert found.problems == expected.problems == []


def test_the_ways_to_name_shards(tmp_path, seed, web, here):
    layout = write_benchmark(tmp_path / "layout", seed, "retrieval")
    folder = strip(layout, web.folder / "shards of mine")
    expected = BenchmarkSet.open(layout)
    for shards in (folder, folder / "*.tar", folder / "{0..1}.tar", f"{web.url}/shards of mine/{{0..1}}.tar"):
        data = BenchmarkSet.open(shards)
        check_equal(data, expected)
        assert (data.name, data.split) == ("shards of mine", "test")
    assert [data.key(i) for i in range(len(data))] == [sample.key for sample in ShardIndex.build(folder)]
    check_equal(BenchmarkSet.open(layout / "test"), expected)  # a split of the layout itself
    assert BenchmarkSet.open(layout / "test").name == "layout"
    one = BenchmarkSet.open(folder / "1.tar")
    assert (one.name, len(one)) == ("shards of mine", 4)
    shutil.copy(folder / "1.tar", tmp_path / "mine.tar")
    assert BenchmarkSet.open(tmp_path / "mine.tar").fingerprint == one.fingerprint
    assert BenchmarkSet.open(tmp_path / "mine.tar").name == "mine"


def test_classes_of_plain_shards(tmp_path, seed):
    layout = write_benchmark(tmp_path / "layout", seed)
    expected = BenchmarkSet.open(layout)
    folder = strip(layout, tmp_path / "plain")
    with pytest.raises(DataError, match=r"classes have no names: name a file with --classnames"):
        BenchmarkSet.open(folder)
    names, templates = layout / "classnames.txt", layout / "zeroshot_classification_templates.txt"
    data = BenchmarkSet.open(folder, options=SetOptions(classnames=str(names), templates=str(templates)))
    check_equal(data, expected)
    assert data.prompts == f"2 templates of {templates}"
    assert expected.prompts == "2 templates of the set"
    without = BenchmarkSet.open(folder, options=SetOptions(classnames=str(names)))
    assert (without.templates, without.prompts) == (["a photo of a {c}."], "a photo of a {c}.")
    check_equal(BenchmarkSet.open(strip(layout, tmp_path / "own", names.name, templates.name)), expected)
    few = tmp_path / "few.txt"
    few.write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"classes up to 5, but classnames .*few\.txt names only 0 to 2"):
        BenchmarkSet.open(folder, options=SetOptions(classnames=str(few)))
    with pytest.raises(DataError, match=r"few\.txt has 3 class names, but .*classnames\.txt has 6 classes"):
        BenchmarkSet.open(layout, options=SetOptions(classnames=str(few)))
    with pytest.raises(DataError, match=r"no captions among 7 .*, but they have .*--captions; `dualenc zeroshot`"):
        BenchmarkSet.open(folder, options=SetOptions(kind="retrieval"))


def test_splits_of_plain_shards(tmp_path, seed):
    for number, split in enumerate(("train", "val")):
        layout = write_benchmark(tmp_path / split, seed + number, counts=(3 + number,))
        shutil.copytree(layout / "test", tmp_path / "set" / split, ignore=shutil.ignore_patterns("nshards.txt"))
    shutil.copy(tmp_path / "val" / "classnames.txt", tmp_path / "set")
    assert BenchmarkSet.splits(tmp_path / "set") == ["train", "val"]
    for split, count in (("train", 3), ("val", 4)):
        data = BenchmarkSet.open(tmp_path / "set", split)
        assert (data.name, data.split, len(data), len(data.classnames)) == ("set", split, count, 6)
        assert data.fingerprint == BenchmarkSet.open(tmp_path / split).fingerprint


def test_captions_of_plain_shards(tmp_path, seed):
    """Captions are found as for training; a text file has one on each line; both labels may be in one shard."""
    rng = np.random.default_rng(seed)
    lists = [[f"{caption(rng)} {i} {j}" for j in range(1 + i % 3)] for i in range(5)]
    samples = [
        {
            "__key__": str(i),
            "jpg": encode(smooth(rng, 20, 24), "jpeg"),
            "alt.png": encode(smooth(rng, 20, 24)),
            "json": json.dumps({"captions": texts, "meta": {"one": texts[0]}, "txt": "two\nlines"}).encode(),
            "txt": f"{texts[0]}\n\n{texts[-1]}\n".encode(),
            "cls": str(i % 2).encode(),
        }
        for i, texts in enumerate(lists)
    ]
    write_tar(tmp_path / "plain" / "train-0.tar", samples)

    def captions(**options):
        data = BenchmarkSet.open(tmp_path / "plain", options=SetOptions(**options))
        texts, owner = data.captions
        return [[text for text, i in zip(texts, owner.tolist(), strict=True) if i == row] for row in range(len(data))]

    assert captions() == lists
    assert captions(captions="txt") == [[texts[0], texts[-1]] for texts in lists]
    assert captions(captions="json.meta.one") == [texts[:1] for texts in lists]
    assert captions(captions="json.txt") == [["two\nlines"]] * len(lists)
    (tmp_path / "plain" / "classnames.txt").write_text("even\nodd\n")
    either = BenchmarkSet.open(tmp_path / "plain")
    assert (either.kind, either.targets.tolist()) == ("classification", [0, 1, 0, 1, 0])
    assert captions(kind="retrieval") == lists
    other = BenchmarkSet.open(tmp_path / "plain", options=SetOptions(image="alt.png"))
    assert not set(other.item_ids) & set(either.item_ids)
    assert other.source.decode(3).shape == (3, 20, 24)
    with pytest.raises(DataError, match=r"no images among 5 samples; expected \.bmp"):
        BenchmarkSet.open(tmp_path / "plain", options=SetOptions(image="bmp"))
    with pytest.raises(DataError, match=r"expected \.long\.txt, but they have .*: name their place with --captions"):
        captions(captions="long.txt", kind="retrieval")


def test_problems_of_plain_shards(tmp_path, seed):
    rng = np.random.default_rng(seed)
    good = {"jpg": encode(smooth(rng, 20, 24), "jpeg")}
    samples = [
        {"__key__": "a", **good, "cls": b"1", "txt": b"one"},
        {"__key__": "b", **good, "cls": b"-1", "txt": b" "},
        {"__key__": "c", **good},
        {"__key__": "d", "cls": b"0", "txt": b"two"},
    ]
    write_tar(tmp_path / "plain" / "0.tar", samples)
    (tmp_path / "plain" / "classnames.txt").write_text("a\nb\n")
    data = BenchmarkSet.open(tmp_path / "plain")
    assert data.targets.tolist() == [1]
    image = "no image among its members"
    assert [problem.what for problem in data.problems] == ["class out of range", "no .cls among its members", image]
    data = BenchmarkSet.open(tmp_path / "plain", options=SetOptions(kind="retrieval"))
    assert data.captions[0] == ["one"]
    assert [problem.what for problem in data.problems] == [
        "txt holds no caption, or only empty ones", "no .txt among its members", image,
    ]  # fmt: skip


# Class names and templates


def test_the_prompts_of_the_user(tmp_path, seed):
    """Files have lines or CLIP_benchmark's JSON; the sets of CLIP are those of the open_clip library."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    layout = write_benchmark(tmp_path / "wds_vtab-cifar10", seed)
    both = {"cifar10": ["{c} {c}", "the {c}"], "cars": ["a {c}"]}
    files = {"one.txt": "my {c}\n", "list.json": json.dumps(both["cifar10"]), "all.json": json.dumps(both)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def read(templates):
        data = BenchmarkSet.open(layout, options=SetOptions(templates=templates))
        assert data.fingerprint == BenchmarkSet.open(layout).fingerprint
        return data.templates, data.prompts

    for name, functions in (("openai", OPENAI_IMAGENET_TEMPLATES), ("simple", SIMPLE_IMAGENET_TEMPLATES)):
        templates, prompts = read(name)
        assert [template.replace("{c}", "sea cow") for template in templates] == [f("sea cow") for f in functions]
        assert prompts == f"{len(functions)} templates of {name}"
    assert read(str(tmp_path / "one.txt")) == (["my {c}"], "my {c}")
    for name in ("list.json", "all.json"):
        assert read(str(tmp_path / name)) == (both["cifar10"], f"2 templates of {tmp_path / name}")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "a {c}\na photo of a {}.\n", r"t\.txt: entry 2, 'a photo of a \{\}\.', has no \{c\}"),
        ("t.txt", "", r"t\.txt is empty"),
        ("t.json", "{", r"t\.json cannot be read as JSON"),
        ("t.json", '["a {c}", 3]', r"t\.json must hold a list of texts"),
        ("t.json", '{"of_cars": {"beetle": ["x"]}}', r"t\.json must hold a list of texts"),
        ("t.json", '{"pets": [], "my_sets": []}', r"no entry 'my_set', .*did you mean my_sets\?"),
        (None, "", r"absent\.txt does not exist, and is neither 'openai' nor 'simple'"),
    ],
)
def test_wrong_files_of_templates(tmp_path, seed, name, text, message):
    layout = write_benchmark(tmp_path / "my_set", seed)
    path = tmp_path / (name or "absent.txt")
    if name:
        path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        BenchmarkSet.open(layout, options=SetOptions(templates=str(path)))
    assert "\n" not in str(error.value)
