"""Training in micro-batches equals training with the whole batch."""

from pathlib import Path

import pytest
from fits import SMALL, SMOKE, metrics, small_fit
from helpers import DATA, needs_data, write_shards

from dualenc.cli import main


def fit(folder: Path, *more: str) -> list[float]:
    root = ["--data.val", "null", "--trainer.default_root_dir", str(folder)]
    main(["fit", "--config", str(SMOKE), *SMALL, *root, *more])
    return metrics(folder, "train/loss")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["clip_loss", "siglip_loss"])
def test_micro_batches_equal_the_whole_batch(tmp_path: Path, seed: int, loss: str) -> None:
    """Compare 24 steps, with a smaller last micro-batch and without dropout, which micro-batches draw otherwise."""
    write_shards(tmp_path / "shards", [40, 30, 27], seed)
    options = ["--data.train", str(tmp_path / "shards"), "--seed_everything", str(seed), "--data.batch_size", "32"]
    options += ["--model.loss", f"dualenc.losses.{loss}", "--model.logit_bias", str(loss == "siglip_loss").lower()]
    options += ["--trainer.precision", "64-true"]  # In fp32, Adam makes rounding grow from step to step.
    whole = fit(tmp_path / "whole", *options)
    micro_batched = fit(tmp_path / "micro_batched", *options, "--data.micro_batch_size", "7")
    assert len(whole) == 24
    assert micro_batched == pytest.approx(whole, abs=1e-9)
    other = fit(tmp_path / "other", *options, "--data.batch_size", "16")
    assert other != pytest.approx(whole, abs=1e-2)  # control: another batch size has another loss


@pytest.mark.slow
@needs_data
def test_micro_batches_equal_the_whole_batch_on_flickr8k(tmp_path: Path, seed: int) -> None:
    """Train on batches of 1,024 photos and captions in micro-batches of 64."""
    options = ["--data.train", str(DATA / "flickr8k"), "--data.captions", "json.captions", "--data.batch_size", "1024"]
    options += ["--trainer.max_steps", "20", "--seed_everything", str(seed), "--trainer.precision", "64-true"]
    whole = fit(tmp_path / "whole", *options)
    micro_batched = fit(tmp_path / "micro_batched", *options, "--data.micro_batch_size", "64")
    assert len(whole) == 20
    assert micro_batched == pytest.approx(whole, abs=1e-9)


def test_duplicates_need_a_loss_that_takes_ids(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A custom loss need not take ids, unless `duplicates` asks for them."""
    mine = ["--model.loss", "helpers.upside_down_loss"]
    small_fit(SMOKE, tmp_path / "ignored", seed, *mine)
    with pytest.raises(SystemExit) as stop:
        small_fit(SMOKE, tmp_path / "masked", seed, *mine, "--model.duplicates", "mask")
    assert stop.value.code == 2
    assert "model.duplicates mask" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-1"])
def test_micro_batch_size_below_1_is_refused(
    tmp_path: Path, seed: int, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        small_fit(SMOKE, tmp_path, seed, "--data.micro_batch_size", size)
    assert stop.value.code == 2
    assert f"micro_batch_size {size}" in capsys.readouterr().err
