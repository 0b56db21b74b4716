"""`dualenc embed`: the embeddings of the Embedder in one file for each shard, written atomically."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import fails
from helpers import encode, pixels, smooth, tiny_embedder, write_shards, write_tar
from safetensors import safe_open

import dualenc.inference.embed_files as embed_module
from dualenc import ShardIndex, load
from dualenc.cli import main
from dualenc.data import decode_image
from dualenc.data.pairs import decode_sample


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a file with the safetensors library."""
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["dualenc"])  # noqa: SIM118


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def model(tmp_path: Path, seed: int) -> str:
    tiny_embedder(seed).save(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def shards(tmp_path: Path, seed: int) -> str:
    write_shards(tmp_path / "shards", [11, 1, 7], seed, captions=3)
    return str(tmp_path / "shards")


@pytest.mark.parametrize("workers", [0, 2])
def test_embeddings_are_those_of_the_embedder(
    model: str, shards: str, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([
        "embed", model, shards, str(out), "--captions", "json.captions", "--batch_size", "4",
        "--workers", str(workers),
    ])  # fmt: skip
    embedder, index = load(model), ShardIndex.build(shards, hashes=("piece",))
    start = 0
    for part in index.parts:
        samples = [index[i] for i in range(start, start + len(part))]
        start += len(part)
        found, metadata = read(out / f"{part.facts['name'].removesuffix('.tar')}.safetensors")
        assert set(found) == {"image", "text", "text_rows", "piece"}
        assert {array.dtype.name for array in found.values()} == {"float32", "int64"}
        assert metadata["keys"] == [sample.key for sample in samples]
        assert metadata["bad"] == []
        assert metadata["digest"] == part.facts["digest"]
        pictures = [decode_sample(sample) for sample in samples]
        np.testing.assert_allclose(found["image"], embedder.embed_images(pictures).numpy(), atol=1e-6)
        texts = [sample.read_json()["captions"] for sample in samples]
        flat = [text for several in texts for text in several]
        np.testing.assert_allclose(found["text"], embedder.embed_texts(flat).numpy(), atol=1e-6)
        assert found["text_rows"].tolist() == [i for i, several in enumerate(texts) for _ in several]
        assert (found["piece"].view(np.uint64) == part.arrays["piece"]).all()
    about = json.loads((out / "embed.json").read_text())
    assert (about["samples"], about["texts"], about["bad"], about["dims"]) == (19, 57, 0, 8)
    assert "19 samples and 57 captions in 3 files" in capsys.readouterr().out
    assert not (out / "bad.jsonl").exists()


def test_features_come_before_the_projection(model: str, shards: str, tmp_path: Path) -> None:
    main(["embed", model, shards, str(tmp_path / "out"), "--features", "--workers", "0"])
    embedder, index = load(model), ShardIndex.build(shards)
    found = [read(tmp_path / "out" / f"part-00{i}.safetensors")[0] for i in range(3)]
    assert set(found[0]) == {"features", "piece"}
    with torch.no_grad():
        one_by_one = [
            embedder.model.image(embedder.preprocess.normalize(embedder.preprocess(decode_sample(sample))[None]))[0]
            for sample in index
        ]
    features = np.concatenate([file["features"] for file in found])
    np.testing.assert_allclose(features, torch.stack(one_by_one).numpy(), atol=1e-6)
    assert features.std(0).min() > 1e-4  # no two pictures alike


def test_a_stopped_command_resumes(
    model: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    main(["embed", model, shards, str(whole), "--workers", "0"])
    writes = []
    real = embed_module.save_file

    def stop(arrays: Any, path: Path, metadata: Any) -> None:
        writes.append(path)
        real(arrays, path, metadata)
        if len(writes) == 2:  # in the middle of a file
            path.write_bytes(path.read_bytes()[:200])
            raise KeyboardInterrupt

    monkeypatch.setattr(embed_module, "save_file", stop)
    with pytest.raises(SystemExit) as caught:
        main(["embed", model, shards, str(stopped), "--workers", "0"])
    assert caught.value.code == 130
    assert {path.name for path in stopped.iterdir()} == {"embed.json", "part-000.safetensors"}
    before = (stopped / "part-000.safetensors").stat().st_mtime_ns
    (stopped / "part-001.safetensors.99.part").write_bytes(b"of one that was killed")
    monkeypatch.setattr(embed_module, "save_file", real)
    capsys.readouterr()
    main(["embed", model, shards, str(stopped), "--workers", "0"])
    assert re.search("1 of them .*\n8 samples", capsys.readouterr().out)
    assert (stopped / "part-000.safetensors").stat().st_mtime_ns == before
    assert everything(stopped) == everything(whole)
    main(["embed", model, shards, str(stopped), "--workers", "2", "--batch_size", "64"])
    assert "all of them were there before" in capsys.readouterr().out
    assert everything(stopped) == everything(whole)


@pytest.mark.parametrize("features", [False, True])
def test_bad_samples_are_named_and_stop_nothing(
    model: str, tmp_path: Path, features: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng()
    good = encode(smooth(rng, 20, 30), "jpeg")
    samples = [
        {"__key__": "good", "jpg": good, "txt": b"a cat"},
        {"__key__": "none", "txt": b"no picture"},
        {"__key__": "broken", "jpg": good[: len(good) // 3], "txt": b"a dog"},
        {"__key__": "silent", "jpg": encode(pixels(rng), "png")},
        {"__key__": "latin", "png": encode(pixels(rng), "png"), "txt": "à".encode("latin-1")},
        {"__key__": "last", "png": encode(pixels(rng), "png"), "txt": b"boats"},
    ]
    write_tar(tmp_path / "shards" / "a.tar", samples)
    out = tmp_path / "out"
    main(["embed", model, str(tmp_path / "shards"), str(out), *(["--features"] if features else [])])
    found, metadata = read(out / "a.safetensors")
    rows = found["features" if features else "image"]
    assert np.isnan(rows).all(1).tolist() == [False, True, True, False, False, False]
    assert not np.isnan(rows[[0, 3, 4, 5]]).any()
    named = [1, 2] if features else [1, 2, 3, 4]  # features do not need a caption
    assert [row for row, *_ in metadata["bad"]] == named
    lines = [json.loads(line) for line in (out / "bad.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [samples[i]["__key__"] for i in named]
    assert all(line.keys() == {"shard", "key", "cause", "detail"} and line["cause"] for line in lines)
    assert lines[0]["cause"] == "no image among its members"
    printed = capsys.readouterr().out
    content = "image" if features else "image or caption"
    assert f"{len(named)} samples lack a usable {content}" in printed
    assert str(out / "bad.jsonl") in printed
    embedder = load(model)
    if not features:
        # The captions of pictures that cannot be used are embedded all the same.
        assert found["text_rows"].tolist() == [0, 1, 2, 5]
        texts = embedder.embed_texts(["a cat", "no picture", "a dog", "boats"])
        np.testing.assert_allclose(found["text"], texts.numpy(), atol=1e-6)
        np.testing.assert_allclose(rows[0], embedder.embed_images([decode_image(good)])[0].numpy(), atol=1e-6)


def test_a_non_finite_embedding_is_a_bad_sample(tmp_path: Path, seed: int) -> None:
    embedder = tiny_embedder(seed)
    with torch.no_grad():
        embedder.model.image_projection.weight[0] = torch.inf
    embedder.save(tmp_path / "model")
    write_shards(tmp_path / "shards", [3], seed)
    main(["embed", str(tmp_path / "model"), str(tmp_path / "shards"), str(tmp_path / "out"), "--workers", "0"])
    assert len((tmp_path / "out" / "bad.jsonl").read_text().splitlines()) == 3


def test_mistakes_are_one_line(
    model: str, shards: str, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = str(tmp_path / "out"), ["embed", model, shards, str(tmp_path / "out")]
    main([*again, "--workers", "0"])
    kept = everything(tmp_path / "out")
    assert "no --features" in fails(capsys, [*again, "--features"])
    assert "captions 'auto', not 'json.captions'" in fails(capsys, [*again, "--captions", "json.captions"])
    tiny_embedder(seed + 1).save(tmp_path / "other")
    assert f"another model ({model}" in fails(capsys, ["embed", str(tmp_path / "other"), shards, out])
    assert "part-002.tar is missing" in fails(
        capsys, ["embed", model, f"{shards}/part-000.tar", f"{shards}/part-001.tar", out]
    )
    write_shards(tmp_path / "more", [4], seed)
    both = fails(capsys, ["embed", model, shards, str(tmp_path / "more"), out])
    assert f"{shards}/part-000.tar and {tmp_path / 'more' / 'part-000.tar'}" in both
    assert "no --features" in fails(capsys, [*again, "--features"])
    assert "captions 'text' must be" in fails(capsys, [*again, "--captions", "text"])
    assert "batch_size 0" in fails(capsys, [*again, "--batch_size", "0"])
    assert "workers -1" in fails(capsys, [*again, "--workers", "-1"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    assert "holds files that embed did not write" in fails(capsys, ["embed", model, shards, str(tmp_path / "full")])
    assert "with --features only" in fails(capsys, ["embed", "run.yaml", shards, str(tmp_path / "new")])
    assert "run.yaml" in fails(capsys, ["embed", "run.yaml", shards, str(tmp_path / "new"), "--features"])
    assert everything(tmp_path / "out") == kept

    file = tmp_path / "out" / "part-000.safetensors"
    file.write_bytes(kept[file.name][:-4])
    assert f"{file} is damaged" in fails(capsys, again)
    file.unlink()
    main([*again, "--workers", "0"])
    assert everything(tmp_path / "out") == kept

    write_shards(tmp_path / "shards", [11, 1, 8], seed)
    for path in tmp_path.glob("shards/*.tar"):
        os.utime(path, (1, 1))
    (tmp_path / "shards" / "dualenc.index").unlink()
    changed = fails(capsys, again)
    assert "part-000.tar has changed" in changed


def test_images_of_a_folder_are_embedded(
    model: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder, a glob, a list and the paths give the same files; a stopped command continues; bad images are named."""
    monkeypatch.setattr("dualenc.inference.image_files.PART", 4)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(seed)
    names = [f"photos/{'trip é/' if i % 3 == 0 else ''}{i}.{'png' if i % 2 else 'JPG'}" for i in range(10)]
    (tmp_path / "photos" / "trip é").mkdir(parents=True)
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(encode(smooth(rng, 20, 24), "png" if i % 2 else "jpeg"))
    (tmp_path / names[4]).write_bytes(b"no picture")
    (tmp_path / "photos" / "notes.txt").write_text("a text")
    (tmp_path / "photos" / ".hidden.png").write_bytes(b"")
    options = ["--workers", "0", "--batch_size", "3"]
    main(["embed", model, "photos", "out", *options])
    printed = capsys.readouterr().out
    assert "10 images in 3 files" in printed
    assert names[4] in printed
    found = [read(tmp_path / "out" / f"images-0000{i}.safetensors") for i in range(3)]
    keys = [key for _, metadata in found for key in metadata["keys"]]
    assert sorted(keys) == sorted(names)
    assert {name for arrays, _ in found for name in arrays} == {"image", "piece"}
    vectors = dict(zip(keys, np.concatenate([arrays["image"] for arrays, _ in found])))
    assert np.isnan(vectors.pop(names[4])).all()
    expected = load(model).embed_images(list(vectors)).numpy()
    np.testing.assert_allclose(np.stack(list(vectors.values())), expected, atol=1e-6)
    assert [json.loads(line)["key"] for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()] == [names[4]]
    whole = everything(tmp_path / "out")
    (tmp_path / "out" / "images-00001.safetensors").unlink()
    main(["embed", model, "./photos", "out", *options])
    assert everything(tmp_path / "out") == whole
    (tmp_path / "list.txt").write_text("".join(f"{key}\n" for key in keys))
    for out, sources in (("a", ["list.txt"]), ("b", keys), ("c", ["photos/**"])):
        main(["embed", model, *sources, out, *options])
        assert everything(tmp_path / out).keys() == whole.keys()
        assert (tmp_path / out / "images-00000.safetensors").read_bytes() == whole["images-00000.safetensors"]


def test_images_that_cannot_be_embedded_are_one_line(
    model: str, shards: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        (tmp_path / "photos" / f"{name}.png").write_bytes(encode(pixels(np.random.default_rng(seed))))
    main(["embed", model, "photos", "out", "--workers", "0"])
    (tmp_path / "gone.txt").write_text("x/1.jpg\nx/2.jpg\n")
    for arguments, said in (
        ([model, "photos", "elsewhere", "--features"], "--features"),
        ([model, "photos", shards, "elsewhere"], "two folders"),
        ([model, "photos", "photos/a.png", "elsewhere"], "named twice"),
        ([model, "photos/c.png", "elsewhere"], "photos/c.png"),
        ([model, "gone.txt", "elsewhere"], "x/1.jpg"),
        ([model, shards, "out"], "image files"),
    ):
        assert said in fails(capsys, ["embed", *arguments, "--workers", "0"])
    (tmp_path / "photos" / "a.png").write_bytes(encode(pixels(np.random.default_rng(seed + 1), 9)))
    assert "other images" in fails(capsys, ["embed", model, "photos", "out", "--workers", "0"])
