"""Files and numbers of earlier versions: this version must read, continue and reproduce them; see `golden.py`.

Arithmetic differs between processors in the last digits, so computed numbers are compared to a tolerance. All others
are compared exactly.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch

import dualenc
from dualenc import ShardIndex
from dualenc.cli import main

NUMBERS = json.loads((golden.FILES / "numbers.json").read_text())


def same(now: Any, then: Any, tolerance: float, where: str = "") -> None:
    """Compare nested JSON: floats to a tolerance, everything else exactly."""
    if isinstance(then, dict):
        assert now.keys() == then.keys(), where
        for name in then:
            same(now[name], then[name], tolerance, f"{where} / {name}")
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for i, (one, other) in enumerate(zip(now, then)):
            same(one, other, tolerance, f"{where}[{i}]")
    elif isinstance(then, float):
        assert now == pytest.approx(then, rel=tolerance, abs=tolerance, nan_ok=True), where
    else:
        assert now == then, where


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the files of earlier versions and make the copy the working directory."""
    folder = tmp_path / "files"
    shutil.copytree(golden.FILES, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DUALENC_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_order_of_samples() -> None:
    assert golden.plans() == NUMBERS["plans"]


def test_an_index(files: Path) -> None:
    """Check that the index file and a new scan give the same facts."""
    assert golden.of_index(files) == NUMBERS["index"]
    # The copy has other modification times.
    assert ShardIndex.build("shards").fingerprint == NUMBERS["index"]["fingerprint"]
    main(["index", "shards", "--hash", "--workers", "0"])
    assert golden.of_index(files) == NUMBERS["index"]


@pytest.mark.parametrize("name", list(NUMBERS["outputs"]))
def test_a_model(name: str) -> None:
    path = golden.FILES / name
    found = golden.of_model(path) if name.startswith("models/") else golden.of_text_model(path)
    same(found, NUMBERS["outputs"][name], 1e-5)


@pytest.mark.parametrize("name", [name for name in NUMBERS["outputs"] if "/" in name])
def test_a_model_is_written_again(name: str, tmp_path: Path) -> None:
    """Save a model of format 1 in the current format; tokenizer and preprocessing stay equal to the byte."""
    path = golden.FILES / name
    if name.startswith("models/"):
        before = dualenc.load(path, "cpu")
    else:
        path = path / "last" if name.startswith("runs/") else path
        before = dualenc.load_text(path, "cpu")
    before.save(tmp_path / "again")
    files = sorted(file.name for file in path.iterdir())
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == files
    for file in set(files) & {"tokenizer.json", "preprocess.json", "tokenizer_config.json"}:
        assert (tmp_path / "again" / file).read_bytes() == (path / file).read_bytes(), file
    after = (dualenc.load if name.startswith("models/") else dualenc.load_text)(tmp_path / "again", "cpu")
    assert after.fingerprint == before.fingerprint
    for file in {"config.json", "dualenc.json"} & set(files):
        fields = json.loads((path / file).read_text())
        if "format" in fields:
            assert (fields["format"], json.loads((tmp_path / "again" / file).read_text())["format"]) == (1, 2)


def test_augmentation() -> None:
    now, then = golden.augmentations(golden.FILES), NUMBERS["augmentations"]
    assert now.keys() == then.keys()
    for name in then:
        one, other = np.array(now[name], np.int16), np.array(then[name], np.int16)
        assert one.shape == other.shape
        assert abs(one - other).max() <= 2, name  # Processors round differently.


@pytest.mark.long
@pytest.mark.parametrize("kind", list(NUMBERS["runs"]))
def test_twenty_steps(kind: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train for 20 steps and compare the samples of each step and all logged metrics."""
    # That version began with the weights of timm and BERT; the run is a fork of this process.
    monkeypatch.setattr("dualenc.models.dual_encoder.draw_blocks", lambda tower: None)
    golden.fit(kind, Path("again"))
    now, then = golden.numbers_of_run(Path("again"), kind), NUMBERS["runs"][kind]
    assert now["rows"] == then["rows"]
    same(now["metrics"], then["metrics"], 2e-3)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["clip", "text", "electra"])
def test_a_killed_run_resumes(kind: str, files: Path) -> None:
    """Resume from a checkpoint of an earlier version and compare with the rest of the unbroken run."""
    step = int(golden.checkpoints(kind)[-1].stem.removeprefix("step-"))
    golden.fit(kind, Path("runs"), resume=True)
    now, then = golden.numbers_of_run(Path("runs"), kind), NUMBERS["runs"][kind]
    assert now["rows"] == then["rows"][step:]
    same(now["metrics"], then["metrics"], 2e-3)
    assert torch.load(f"runs/{kind}/checkpoints/step-00000020.ckpt", weights_only=True)["global_step"] == 20


def test_embeddings(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that embeddings of an earlier version are recognized as complete, and that new ones are the same."""
    golden.embed(Path("embeddings"))
    assert capsys.readouterr().out.count("all of them were there before") == 4
    then = list(golden.embeddings(files))
    shutil.rmtree("embeddings")
    golden.embed(Path("embeddings"))
    for (name, now_arrays, now_about), (_, then_arrays, then_about) in zip(golden.embeddings(files), then, strict=True):
        assert {key: now_about[key] for key in then_about} == then_about, name  # What is noted may grow.
        assert now_arrays.keys() == then_arrays.keys()
        for key, array in now_arrays.items():
            np.testing.assert_allclose(array, then_arrays[key], rtol=1e-5, atol=1e-6, err_msg=f"{name} {key}")


def test_results(files: Path) -> None:
    golden.evaluate(Path("again"))
    for path in Path("again").rglob("*.json"):
        then = json.loads((Path("results") / path.relative_to("again")).read_text())
        now = [{**one, "data": os.path.relpath(one["data"])} for one in json.loads(path.read_text())]
        now = [{key: one[key] for key in before} for one, before in zip(now, then, strict=True)]  # A result may grow.
        same(now, then, 1e-4, str(path))
    main(["compare", "results/zeroshot", "again/zeroshot"])
