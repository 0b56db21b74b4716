"""Typical mistakes of a first hour: each is answered by one line, the right exit status, and the way out.

Ctrl-C is in `test_interrupt.py`, two runs in one folder in `tests/faults/test_run_lock.py`, full disks in
`tests/faults/test_full_disk.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fits import fails, fit
from helpers import encode, pixels, tiny_embedder, write_benchmark, write_shards

from dualenc.cli import main


@pytest.fixture
def hour(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make what a new user has: photos with captions, shards, class folders, a model, in a folder with an odd name."""
    folder = tmp_path / "Käthes Photos"
    folder.mkdir()
    monkeypatch.chdir(folder)
    rng = np.random.default_rng(seed)
    write_shards(Path("shards"), [8, 8], seed)
    for name in ("photos/cat", "photos/dog"):
        Path(name).mkdir(parents=True)
        for i in range(3):
            Path(name, f"{i}.png").write_bytes(encode(pixels(rng)))
    rows = [f"{name}/{i}.png,a {name}" for name in ("cat", "dog") for i in range(3)]
    Path("photos/table.csv").write_text("\n".join(["file,words", *rows]))
    tiny_embedder(seed).save("runs/small/best")
    write_benchmark(Path("pairs"), seed, "retrieval")
    return folder


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("retreival runs/small pairs", ["retreival", "retrieval"]),
        ("configs smal", ["smal", "small"]),
        ("doctor shads", ["shads"]),
        ("doctor shards --captoins txt", ["--captoins", "--captions"]),
        ("doctor shards --sample many", ["--sample", "many"]),
        ("doctor photos/table.csv", ["table.csv", "make-shards"]),
        ("make-shards photos/table.csv out", ["'file'", "'words'", "--caption_column"]),
        ("make-shards photos/table.csv out --caption_column word", ["'word'", "'words'"]),
        ("zeroshot runs/smal photos", ["runs/smal", "runs/small"]),
        ("zeroshot runs/small photos --templates photo.txt", ["photo.txt"]),
        ("zeroshot runs/small photos --workers two", ["--workers", "two"]),
        ("zeroshot runs/small pairs", ["pairs", "retrieval"]),
        ("evaluate runs/small pairs --kind retreival", ["retreival", "retrieval"]),
        ("export runs/small out --format onx", ["onx", "onnx"]),
        ("embed runs/small shards photos", ["photos"]),
        ("compare runs shards", ["runs"]),
    ],
)
def test_a_wrong_command_line(hour: Path, capsys: pytest.CaptureFixture[str], line: str, said: list[str]) -> None:
    error = fails(capsys, line.split())
    assert [word for word in said if word not in error] == [], error


@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--data.batchsize 8", ["batchsize", "batch_size"]),
        ("--trainer.max_epoch 2", ["max_epoch", "max_epochs"]),
        ("--data.batch_size many", ["batch_size", "many"]),
        ("--data.train photos", ["photos", "make-shards"]),
        ("--model.class_path dualenc.training.ContrastivTask", ["ContrastivTask", "ContrastiveTask"]),
        ("--run.monitor val/mr", ["val/mr", "val/mrr"]),
        ("--ckpt_path checkpoint", ["checkpoint"]),
        ("--data.image jpg2", ["jpg2"]),
    ],
)
def test_a_wrong_option_of_fit(hour: Path, capsys: pytest.CaptureFixture[str], line: str, said: list[str]) -> None:
    error = fails(capsys, fit(hour, *line.split()))
    assert [word for word in said if word not in error] == [], error


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("data:\n", " data:\n", ["run.yaml", "line"]),  # indentation
        ("  max_epochs:", "\tmax_epochs:", ["run.yaml", "line"]),  # a tab
        ("optimizer:", "optimiser:", ["run.yaml", "optimiser", "optimizer"]),
        ("    embed_dim: 96", "    embed_dim: wide", ["run.yaml", "embed_dim", "wide"]),
    ],
)
def test_a_wrong_line_of_yaml(
    hour: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, said: list[str]
) -> None:
    main(["configs", "smoke"])
    text = capsys.readouterr().out
    assert before in text
    Path("run.yaml").write_text(text.replace(before, after, 1))
    error = fails(capsys, ["fit", "--config", "run.yaml", "--data.train", "shards"])
    assert [word for word in said if word not in error] == [], error


def test_results_of_another_command_are_kept(hour: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["retrieval", "runs/small", "pairs", "--out", "results"])
    before = Path("results/retrieval.json").read_bytes()
    assert "results" in fails(capsys, ["zeroshot", "runs/small", "photos", "--out", "results"])
    assert Path("results/retrieval.json").read_bytes() == before
    main(["retrieval", "runs/small", "pairs", "--out", "results"])  # the same again


def test_one_image_measures_nothing_and_says_so(hour: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/one.csv").write_text("image,caption\ncat/0.png,a cat\n")
    main(["retrieval", "runs/small", "photos/one.csv", "--out", "results"])
    (result,) = json.loads(Path("results/retrieval.json").read_text())
    assert result["notes"]
    assert result["notes"][0] in " ".join(capsys.readouterr().out.split())


@pytest.mark.long
def test_standard_output_may_be_full_or_closed(hour: Path) -> None:
    command = [sys.executable, "-m", "dualenc", "configs"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "dualenc: error: standard output: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does once it has its lines
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
