"""Samples with several images: the option `image` names the one that training and every command read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fits import fails, fit
from helpers import SIZE, caption, encode, pixels, smooth, tiny_embedder, write_tar
from safetensors.numpy import load_file

from dualenc.cli import main
from dualenc.data import ShardIndex
from dualenc.data.image_features import Features
from dualenc.data.pairs import decode_sample
from dualenc.data.shards.sample import image_members
from dualenc.data.shards.shard import IMAGE_EXTENSIONS
from dualenc.utils.errors import DataError

IMAGE = ["--image", "input.png"]


@pytest.fixture
def folders(tmp_path: Path, seed: int) -> tuple[str, str]:
    """Write the same pairs twice: as usual, and as `input.png` next to a `target.png` and a `png` of other content."""
    rng = np.random.default_rng(seed)
    for name in ("plain", "several"):
        (tmp_path / name).mkdir()
    for number in range(2):
        plain, several = [], []
        for i in range(20):
            key, right, wrong = f"{number}{i:03d}", encode(smooth(rng, 40, 48)), encode(pixels(rng, 24, 24))
            texts = {"txt": f"{caption(rng)} {i}".encode(), "json": json.dumps({"width": i}).encode()}
            plain.append({"__key__": key, "png": right, **texts})
            several.append({"__key__": key, "input.png": right, "target.png": wrong, "png": wrong, **texts})
        write_tar(tmp_path / "plain" / f"{number}.tar", plain)
        write_tar(tmp_path / "several" / f"{number}.tar", several)
    return str(tmp_path / "plain"), str(tmp_path / "several")


def test_the_named_image_is_read_hashed_and_split_by(folders: tuple[str, str]) -> None:
    plain = ShardIndex.build(folders[0], hashes=("piece", "image"))
    usual = ShardIndex.build(folders[1], hashes=("piece", "image"))
    named = ShardIndex.build(folders[1], image="input.png", hashes=("piece", "image"))
    for _ in range(2):  # the second time from the index file, which holds the hashes of both
        assert [sample.image for sample in named] == ["input.png"] * 40
        assert all(torch.equal(decode_sample(a), decode_sample(b)) for a, b in zip(plain, named))
        assert not torch.equal(decode_sample(usual[0]), decode_sample(named[0]))  # control
        for name in ("piece", "image"):
            assert (plain.hashes(name) == named.hashes(name)).all()
            assert (usual.hashes(name) != named.hashes(name)).all()
        keys = [[sample.key for sample in part] for part in plain.split(0.3)]
        assert [[sample.key for sample in part] for part in named.split(0.3)] == keys
        assert [[sample.key for sample in part] for part in usual.split(0.3)] != keys
        for part in (named.select("width > 3"), named.split(0.3)[1], ShardIndex.join([named, named]), named.take([1])):
            assert {sample.image for sample in part} == {"input.png"}
        usual = ShardIndex.build(folders[1], hashes=("piece", "image"))
        named = ShardIndex.build(folders[1], image="input.png", hashes=("piece", "image"))
    assert usual.fingerprint != named.fingerprint
    assert usual.fingerprint == ShardIndex.build(folders[1], image=";".join(IMAGE_EXTENSIONS)).fingerprint


def test_the_first_member_that_a_sample_has_is_its_image(tmp_path: Path) -> None:
    samples = [
        {"__key__": "a", "b.jpg": b"1", "a.jpg": b"2"},
        {"__key__": "b", "b.jpg": b"3"},
        {"__key__": "c", "jpg": b""},
    ]
    index = ShardIndex.build(write_tar(tmp_path / "a.tar", samples), image="A.jpg; .b.jpg")
    assert [sample.image for sample in index] == ["a.jpg", "b.jpg", None]
    assert image_members(None) == IMAGE_EXTENSIONS


@pytest.mark.parametrize("image", ["", "a.jpg;", "*.jpg", "x/a.jpg", "input.{jpg,png}"])
def test_paths_and_patterns_are_refused(folders: tuple[str, str], image: str) -> None:
    with pytest.raises(DataError, match="must be the names of members"):
        ShardIndex.build(folders[1], image=image)


@pytest.mark.long
def test_a_run_on_the_named_image_equals_one_on_plain_shards(folders: tuple[str, str], tmp_path: Path) -> None:
    weights = []
    for number, options in enumerate((folders[:1], (folders[1], "--data.image", "input.png"), folders[1:])):
        more = ["--data.train", *options, "--trainer.max_steps", "3", "--data.val", "0.3"]
        main(fit(tmp_path / str(number), *more, "--seed_everything", "1"))
        weights.append(load_file(tmp_path / str(number) / "run" / "last" / "model.safetensors"))
    plain, named, usual = weights
    assert all((plain[name] == named[name]).all() for name in plain)
    assert not all((plain[name] == usual[name]).all() for name in plain)  # control


def test_embeddings_and_features_are_of_the_named_image(
    folders: tuple[str, str], tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_embedder(seed).save(tmp_path / "model")
    for kind in ([], ["--features"]):
        for number, options in enumerate((folders[:1], [folders[1], *IMAGE])):
            shards, *more = options
            main(
                [
                    "embed",
                    str(tmp_path / "model"),
                    shards,
                    str(tmp_path / f"{number}{len(kind)}"),
                    "--workers",
                    "0",
                    *kind,
                    *more,
                ]
            )
        plain, named = (load_file(tmp_path / f"{number}{len(kind)}" / "0.safetensors") for number in (0, 1))
        assert plain.keys() == named.keys()
        assert all((plain[name] == named[name]).all() for name in plain)
    ShardIndex.build(folders[1], hashes=("piece",))  # hashes of the usual images, which the features are not of
    index = ShardIndex.build(folders[1], image="input.png", hashes=("piece",))
    features = Features(tmp_path / "11", "input.png")
    rows = [features.read(*index.find(i), index[i])[0].numpy() for i in range(20)]
    assert (np.stack(rows) == named["features"]).all()
    begun = ["embed", str(tmp_path / "model"), folders[1], str(tmp_path / "10"), "--workers", "0"]
    assert "--image input.png" in fails(capsys, begun)
    run = fit(tmp_path, "--data.train", folders[1], "--data.features", str(tmp_path / "11"), "--data.augment", "null")
    assert "set it to input.png" in fails(capsys, run)


def test_other_commands_read_the_named_image(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    main(["doctor", folders[1], *IMAGE, "--workers", "0", "--json", "--against", folders[0]])
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["images"] == {"input.png": 40}
    assert found["facts"]["quantiles"]["width"]["median"] == 48
    assert found["facts"]["against"][0]["of these among those looked at"] == 40
    main(["index", folders[1], *IMAGE, "--workers", "0"])
    assert "40 with an image" in capsys.readouterr().out
    main(["tokenizer", folders[1], str(tmp_path / "t.json"), "--vocab_size", "90", *IMAGE])
    assert "--data.image input.png" in capsys.readouterr().out
    main(["shrink", folders[1], str(tmp_path / "small"), "--size", str(SIZE), "--workers", "0", *IMAGE])
    assert "--data.image input.png" in capsys.readouterr().out
    main(["shrink", folders[0], str(tmp_path / "small_plain"), "--size", str(SIZE), "--workers", "0"])
    small, plain = ShardIndex.build(tmp_path / "small", image="input.png"), ShardIndex.build(tmp_path / "small_plain")
    assert [sample.read("input.png") for sample in small] == [sample.read("png") for sample in plain]
    before = ShardIndex.build(folders[1])
    for name in ("png", "target.png", "txt"):
        assert [sample.read(name) for sample in small] == [sample.read(name) for sample in before]
    assert "--image input.png" in fails(capsys, ["shrink", folders[1], str(tmp_path / "small"), "--size", str(SIZE)])
    line = fails(capsys, ["shrink", folders[0], str(tmp_path / "none"), "--image", "input.jpg", "--workers", "0"])
    assert "no images among 40 samples" in line
    assert not (tmp_path / "none").exists()


def test_make_shards_takes_the_named_image(folders: tuple[str, str], tmp_path: Path) -> None:
    main(["make-shards", folders[1], str(tmp_path / "made"), "--image_column", "input.png", "--workers", "0"])
    made, plain = (ShardIndex.build(folder, hashes=("image",)) for folder in (str(tmp_path / "made"), folders[0]))
    assert sorted(made.hashes("image")) == sorted(plain.hashes("image"))


def test_without_the_option_the_members_that_are_there_are_named(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(seed)
    samples = [{"__key__": f"{i}", "input.jpg": encode(pixels(rng), "jpg"), "caption.txt": b"a"} for i in range(3)]
    path = write_tar(tmp_path / "shards" / "0.tar", samples)
    line = fails(capsys, fit(tmp_path))
    assert "they have .caption.txt, .input.jpg" in line
    assert "data.image" in line
    line = fails(capsys, fit(tmp_path, "--data.image", "input.jpg"))
    assert "they have .caption.txt, .input.jpg" in line
    assert "data.captions" in line
    main(["doctor", path, "--image", "input.jpg", "--captions", "caption.txt", "--workers", "0"])
