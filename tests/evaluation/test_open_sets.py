"""Sets as users name them: shards that a shell expanded, options that a set takes, and what the results say."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import caption, encode, pixels, smooth, tiny_embedder, write_benchmark, write_tar

from dualenc.cli import main
from dualenc.data import BenchmarkSet, SetOptions
from dualenc.evaluation import KINDS, open_sets, origin, place, with_origin, write_results
from dualenc.evaluation.base import reopen
from dualenc.evaluation.probe import FrozenProbes
from dualenc.evaluation.results import read_results
from dualenc.utils.errors import DataError

pytestmark = pytest.mark.usefixtures("here")


def measure(sets, embedder):
    return [kind.evaluate(embedder, data) for kind, data in sets]


def plain(layout, folder):
    """Copy the shards of a set to a folder that lacks everything else of the layout of CLIP_benchmark."""
    folder.mkdir()
    return [shutil.copy(path, folder) for path in sorted((layout / "test").glob("*.tar"))]


@pytest.mark.parametrize("kind", ["classification", "retrieval"])
def test_plain_shards_give_the_result_of_the_layout(tmp_path, seed, kind):
    """A shell gives the shards one by one; the result of a set with options says how to open it again."""
    layout = write_benchmark(tmp_path / "layout", seed, kind, counts=(5, 4, 6))
    shards = plain(layout, tmp_path / "plain")
    files = {"classnames": "classnames.txt", "templates": "zeroshot_classification_templates.txt"}
    given = {name: str(layout / file) for name, file in files.items()} if kind == "classification" else {}
    embedder = tiny_embedder(seed)
    (expected,) = measure(open_sets([str(layout)]), embedder)
    (found,) = sets = open_sets(shards, [KINDS[kind]], options=SetOptions(**given))
    assert (found.data.name, found.data.path) == ("plain", f"{tmp_path}/plain/*.tar")
    (outcome,) = measure(sets, embedder)
    same = ("metrics", "intervals", "chance", "n", "problems")
    assert {name: outcome.section.result[name] for name in same} == {
        name: expected.section.result[name] for name in same
    }
    write_results(tmp_path / "out", "x", [with_origin(outcome, origin(*found, "tiny", embedder.fingerprint))])
    (saved,) = read_results(tmp_path / "out").values()
    again = reopen(saved)
    assert again is not None
    assert again[0].fingerprint == found.data.fingerprint
    odd = plain(layout, tmp_path / "plain [1] *")
    for name, paths in (("plain", shards[::2]), ("plain [1] *", odd), ("plain [1] *", odd[::2])):
        (part,) = open_sets(paths, [KINDS[kind]], options=SetOptions(**given))
        assert part.data.name == name
        assert [str(path) for path in part.data.index.shards] == paths


def test_options_that_no_set_takes(tmp_path, seed, monkeypatch):
    layouts = [str(write_benchmark(tmp_path / kind, seed, kind)) for kind in ("classification", "retrieval")]
    both = open_sets(layouts, options=SetOptions(templates="simple"))
    assert [len(data.templates) for _, data in both] == [7, 0]
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.txt"
    mine.write_text("a {c}\n")
    for given in ("mine.txt", Path("mine.txt"), str(mine)):  # a result says the file for any folder
        ((kind, data),) = open_sets(layouts[:1], options=SetOptions(templates=given))
        assert place(kind, data, "model")["options"]["templates"] == str(mine)
        assert KINDS["image-image"].settings(data) == {} != kind.settings(data)
    assert place(*both[0], "model")["options"]["templates"] == "simple"
    with pytest.raises(DataError, match="option classnames of a set cannot be of the type list"):
        SetOptions(classnames=["a"])
    for name, value, use in (
        ("templates", "simple", "sets with classes"), ("captions", "txt", "plain shards"), ("images", "x", "tables"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=f"option {name} '{value}' has no use here: it is for {use}"):
            open_sets(layouts[1:], options=SetOptions(**{name: value}))


def test_notes_about_sets_that_tell_nothing_apart(tmp_path, seed, capsys):
    """Metrics of one image or one class are perfect for any model, which the result and the terminal say."""
    rng = np.random.default_rng(seed)
    one = {
        "__key__": "a",
        "jpg": encode(smooth(rng, 20, 24), "jpeg"),
        "txt": f"{caption(rng)}\n{caption(rng)}".encode(),
    }
    write_tar(tmp_path / "picture" / "0.tar", [one])
    write_benchmark(tmp_path / "class", seed, classes=1)
    write_benchmark(tmp_path / "many", seed)
    embedder = tiny_embedder(seed)
    named = [str(tmp_path / name) for name in ("picture", "class", "many")]
    picture, single, many = (outcome.section.result for outcome in measure(open_sets(named), embedder))
    assert picture["metrics"]["mean_recall@1"] == single["metrics"]["acc1"] == 1
    assert "one image only" in picture["notes"][0]
    assert "one class only" in single["notes"][0]
    assert "notes" not in many
    embedder.save(tmp_path / "model")
    main(["evaluate", str(tmp_path / "model"), *named, "--templates", "simple", "--workers", "0"])
    printed = capsys.readouterr().out
    for line in (
        "picture: there is one image only",
        "class: there is one class only",
        "many: prompts: 7 templates of s",
    ):
        assert line in printed
    main(["sets"])
    assert "datasets/clip-benchmark/wds_flickr30k" in capsys.readouterr().out


def test_a_table_next_to_class_folders_does_not_change_what_a_probe_learns_from(tmp_path, seed):
    rng = np.random.default_rng(seed)
    for split, count in (("train", 4), ("test", 6)):
        for name in ("cat", "dog"):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(encode(pixels(rng)))
    found = []
    for _ in range(2):
        ((_, data),) = open_sets([str(tmp_path / "set")], [FrozenProbes()])
        found.append((len(data), len(data.train), data.shared))
        (tmp_path / "set" / "captions.csv").write_text("image,caption\ntest/cat/0.png,a cat\n")
    assert found == [(12, 8, False)] * 2


def test_a_split_folder_may_be_the_current_one(tmp_path, seed, monkeypatch):
    layout = write_benchmark(tmp_path / "layout", seed)
    monkeypatch.chdir(layout / "test")
    assert BenchmarkSet.open(".").fingerprint == BenchmarkSet.open(layout).fingerprint
