"""Evaluation during training: its schedule, its sets, and its independence of the batch size."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import SMALL, SMOKE, metrics, small_fit
from helpers import WORDS, write_benchmark, write_shards, write_tar

import dualenc
from dualenc.cli import main
from dualenc.data.images import decode_image
from dualenc.data.pairs import captions_of
from dualenc.losses import clip_loss, siglip_loss


def evaluation(data: Path | list[Path], **options: int) -> list[str]:
    folders = [str(folder) for folder in (data if isinstance(data, list) else [data])]
    arguments = {"data": folders, **options}
    callback = {"class_path": "dualenc.training.Evaluation", "init_args": arguments}
    return ["--trainer.callbacks", json.dumps([callback])]


def rows(run: Path) -> list[tuple[int, str, float]]:
    with open(run / "metrics.csv") as file:
        return [(int(row["step"]), row["metric"], float(row["value"])) for row in csv.DictReader(file)]


def validated(capsys: pytest.CaptureFixture[str], run: Path, *more: str) -> dict[str, float]:
    """Return the metrics that `dualenc validate` prints for a run's checkpoint."""
    capsys.readouterr()
    main(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", "last", *more])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {line[0]: float(line[1]) for line in lines if len(line) == 2 and "/" in line[0]}


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_validation_loss_equals_that_of_all_pairs_at_once(
    tmp_path: Path, seed: int, loss: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check it for several batch sizes against the loss of the held-out pairs' embeddings in one call."""
    other = ["--model.loss", "dualenc.losses.siglip_loss", "--model.logit_bias", "true", "--model.init_bias", "-3"]
    run = small_fit(SMOKE, tmp_path, seed, "--trainer.max_steps", "6", *(other if loss is siglip_loss else []))
    embedder = dualenc.load(run / "last", "cpu")
    index = dualenc.ShardIndex.build(str(tmp_path / "shards")).split(0.25)[1]
    assert 0 < len(index) < 48
    image = embedder.embed_images([decode_image(sample.read("png")) for sample in index]).double()
    text = embedder.embed_texts([captions_of(sample, "txt")[0] for sample in index]).double()
    scale, bias = (None if x is None else x.detach().double() for x in embedder.model.logits())
    expected = float(loss(image, text, scale, bias))  # type: ignore[operator]
    step, found = max((step, value) for step, name, value in rows(run) if name == "val/loss")
    assert step == 6
    assert found == pytest.approx(expected, rel=1e-5)
    parts = [loss(a, b, scale, bias) for a, b in zip(image.split(2), text.split(2), strict=True)]  # type: ignore[operator]
    assert abs(float(torch.stack(parts).mean()) - expected) > 1e-3  # control: in batches it differs
    for size in ("3", "48"):
        values = validated(capsys, run, "--data.batch_size", size)
        assert values["val/loss"] == pytest.approx(expected, rel=2e-3)  # printed with four digits
        assert values["val/mrr"] == pytest.approx(metrics(run, "val/mrr")[-1], rel=2e-3)
        assert values["set/mrr"] == pytest.approx(metrics(run, "set/mrr")[-1], rel=2e-3)


def test_sets_are_measured_on_schedule(tmp_path: Path, seed: int) -> None:
    """Check that each scheduled step is measured once; 48 pairs in batches of 16 are three steps per epoch."""
    schedules = [
        (1, 0, range(3, 25, 3)),
        (0, 5, [5, 10, 15, 20]),
        (2, 9, [6, 9, 12, 18, 24]),
        (4, 5, [5, 10, 12, 15, 20, 24]),
        (1, 3, range(3, 25, 3)),
        (0, 0, []),
    ]
    callbacks = []
    for i, (epochs, steps, _) in enumerate(schedules):
        sets = write_benchmark(tmp_path / f"photos{i}", seed, counts=(2,))
        (callback,) = json.loads(evaluation(sets, every_n_epochs=epochs, every_n_steps=steps)[1])
        callbacks.append(callback)
    write_shards(tmp_path / "held_out", [9], seed + 1)
    more = ["--data.val", str(tmp_path / "held_out"), "--trainer.callbacks", json.dumps(callbacks)]
    found = rows(small_fit(SMOKE, tmp_path, seed, *more))
    for i, (_, _, expected) in enumerate(schedules):
        assert [step for step, name, _ in found if name == f"photos{i}/acc1"] == list(expected), schedules[i]
    assert [step for step, name, _ in found if name == "val/loss"] == list(range(3, 25, 3))


def test_best_may_lie_inside_an_epoch(tmp_path: Path, seed: int) -> None:
    """Measure every step of a run that ends inside an epoch: `best/` is the model of the largest value."""
    sets = write_benchmark(tmp_path / "pairs", seed, "retrieval", counts=(20,))
    more = ["--data.batch_size", "3", "--data.val", "null", "--trainer.max_steps", "11", "--run.monitor", "pairs/mrr"]
    run = small_fit(SMOKE, tmp_path, seed, *more, *evaluation(sets, every_n_epochs=0, every_n_steps=1))
    values = metrics(run, "pairs/mrr")
    assert len(values) == 11
    best = dualenc.evaluate(dualenc.load(run / "best", "cpu"), sets)["metrics"]["mrr"]
    last = dualenc.evaluate(dualenc.load(run / "last", "cpu"), sets)["metrics"]["mrr"]
    assert best == pytest.approx(max(values), rel=1e-6)
    assert last == pytest.approx(values[-1], rel=1e-6)
    assert len(set(values)) > 1


def test_run_writes_report(tmp_path: Path, seed: int) -> None:
    sets = [
        write_benchmark(tmp_path / f"the {kind}", seed, kind) for kind in ("classification", "multilabel", "retrieval")
    ]
    run = small_fit(SMOKE, tmp_path, seed, "--trainer.max_steps", "4", *evaluation(sets))
    page = (run / "report.html").read_text()
    for name in ("the classification", "the multilabel", "the retrieval", "held-out pairs", str(tmp_path / "shards")):
        assert name in page
    assert "<svg" in page


def test_two_sets_with_the_same_name_are_refused(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [write_benchmark(tmp_path / folder / "photos", seed) for folder in "ab"]
    with pytest.raises(SystemExit):
        small_fit(SMOKE, tmp_path, seed, *evaluation(sets))
    assert "two evaluation sets are called 'photos'" in capsys.readouterr().err


# Two ranks

OF_ONE_RANK = {"train/samples_per_second", "train/padding_avoided"}


def command(folder: Path, run: Path, ranks: int, seed: int, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "dualenc", "fit", "--config", str(SMOKE), *SMALL,
        "--data.train", str(folder / "shards"), "--data.tokenizer", str(folder / "tokenizer.json"),
        "--trainer.default_root_dir", str(run), "--trainer.devices", str(ranks), "--seed_everything", str(seed),
        "--trainer.max_steps", "6", *(["--trainer.strategy", "ddp"] if ranks > 1 else []), *more,
    ]  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path, seed: int) -> Path:
    write_shards(tmp_path / "shards", [20, 15, 13], seed)
    dualenc.Tokenizer.train([" ".join(WORDS), "0 1 2 3"], 300, 20).save(tmp_path / "tokenizer.json")
    return tmp_path


@pytest.mark.slow
def test_two_ranks_measure_the_same_as_one(shards: Path, seed: int) -> None:
    """Check that each sample counts once, for sets whose sizes are odd or one."""
    sets = [
        write_benchmark(shards / "photos", seed, counts=(5, 6), classes=5),
        write_benchmark(shards / "pairs", seed, "retrieval", counts=(4, 5)),
        write_benchmark(shards / "labels", seed, "multilabel", counts=(7,), classes=3),
        write_benchmark(shards / "one", seed, "retrieval", counts=(1,)),
    ]
    runs = []
    for ranks in (1, 2):
        run = shards / f"ranks{ranks}"
        arguments = command(shards, run, ranks, seed, "--trainer.precision", "64-true", *evaluation(sets))
        subprocess.run(arguments, check=True, capture_output=True, timeout=300)
        runs.append(run)
    one, two = ({(step, name): value for step, name, value in rows(run) if name not in OF_ONE_RANK} for run in runs)
    assert one.keys() == two.keys()
    assert {name for _, name in one} >= {
        "val/loss",
        "photos/acc1",
        "pairs/mrr",
        "labels/mean_average_precision",
        "one/mrr",
    }
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    assert len(rows(runs[0])) == len(rows(runs[1])) == len({row[:2] for row in rows(runs[1])})  # no row occurs twice
    assert (runs[1] / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("bad", [[0], [4], range(5)], ids=["of the first rank", "of the second", "all"])
def test_bad_images_on_two_ranks(shards: Path, seed: int, bad: list[int]) -> None:
    """Check that a bad image is reported once, and that both ranks stop if no image is left."""
    sets = write_benchmark(shards / "photos", seed, counts=(5,))
    samples = [{"__key__": f"s{i}", "jpg": sample.read("jpg"), "cls": b"0"} for i, sample in
               enumerate(dualenc.BenchmarkSet.open(sets).index)]  # fmt: skip
    for i in bad:
        samples[i]["jpg"] = b"no picture"
    write_tar(sets / "test" / "0.tar", samples)
    (sets / "test" / "dualenc.index").unlink()
    arguments = command(shards, shards / "run", 2, seed, *evaluation(sets))
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=150)
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if "photos is not complete: " in line]
    errors = [line for line in done.stderr.splitlines() if "dualenc: error: " in line]
    if len(bad) < 5:
        assert done.returncode == 0, done.stderr
        assert len(said) == 1, done.stderr
        assert "cannot be decoded: 1" in said[0]
        assert f"s{bad[0]}" in said[0]
        assert rows(shards / "run")
    else:
        assert done.returncode == 1, done.stderr
        assert len(errors) == 1, done.stderr
        assert "photos: no image" in errors[0]
