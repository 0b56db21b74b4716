"""The contrastive task in a trainer: resume, ranks, the log and the files of a run."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import SMALL, SMOKE, metrics, small_fit
from helpers import WORDS, write_benchmark, write_shards

import dualenc
from dualenc.cli import main


def test_files_of_a_run(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_fit(SMOKE, tmp_path, seed)
    names = {"loss", "lr", "logit_scale", "grad_norm", "grad_spikes", "skipped_steps", "samples_per_second"}
    names |= {"padding_avoided", "bad_samples"}
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    train = {row["metric"].removeprefix("train/") for row in rows if row["metric"].startswith("train/")}
    assert train == names
    assert [int(row["step"]) for row in rows if row["metric"] == "train/loss"] == list(range(1, 25))
    rates = metrics(run, "train/lr")
    assert rates[:3] == pytest.approx([0.0015, 0.003, 0.003])
    assert 0 < metrics(run, "train/padding_avoided")[0] < 1
    validated = {"val/loss", "val/image_retrieval_recall@1", "val/mean_recall@1", "val/median_rank"}
    assert validated <= {row["metric"] for row in rows}
    assert (run / "report.html").is_file()
    record = json.loads((run / "run.json").read_text())
    assert record["step"] == 24
    assert record["train_pairs"] + record["held_out_pairs"] == 48
    # The model directories reproduce the metrics of the run, computed by the same code.
    measured = metrics(run, "set/mrr")[-1]
    loaded = dualenc.evaluate(dualenc.load(run / "last", "cpu"), tmp_path / "set")
    assert loaded["metrics"]["mrr"] == pytest.approx(measured, 1e-6)
    # A second run in the folder is refused. Its configuration gives the same numbers in another folder.
    again = ["fit", "--config", str(run / "config.yaml")]
    with pytest.raises(SystemExit):
        main(again)
    assert "holds a run already: resume it with --ckpt_path auto" in capsys.readouterr().err
    main([*again, "--trainer.default_root_dir", str(tmp_path / "again")])
    assert metrics(tmp_path / "again", "train/loss") == metrics(run, "train/loss")


@pytest.mark.long
@pytest.mark.parametrize("numbers", [30, 400])  # fewer entries than the 300 of SMALL, and more
def test_the_tokenizer_sets_the_vocabulary(
    numbers: int, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *map(str, range(numbers))]
    (tmp_path / "vocab.txt").write_text("".join(f"{entry}\n" for entry in entries))
    given = ["--data.tokenizer", str(tmp_path / "vocab.txt"), "--trainer.max_steps", "1"]
    run = small_fit(SMOKE, tmp_path, seed, *given)
    size = dualenc.Tokenizer.from_file(tmp_path / "vocab.txt", 24).vocab_size
    assert size == len(entries)
    assert "model.text.vocab_size 300" in capsys.readouterr().err
    model = dualenc.load(run / "last", "cpu").dual_encoder
    assert model.config.text.vocab_size == len(model.text.embeddings.token_embeddings.weight) == size
    # A stopped run resumes, and a run that is repeated from its own file has the same vocabulary.
    more = ["--ckpt_path", "last", "--trainer.max_steps", "2", "--run.accept_changes", '["trainer.max_steps"]']
    main(["fit", "--config", str(run / "config.yaml"), *more])
    assert len(metrics(run, "train/loss")) == 2


@pytest.mark.long
def test_embeddings_without_a_token_are_said(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_fit(SMOKE, tmp_path, seed, "--trainer.max_steps", "1")
    size = dualenc.load(run / "last", "cpu").tokenizer.vocab_size
    assert size < 300
    assert f"{300 - size} of the 300 token embeddings are not used" in capsys.readouterr().err


@pytest.mark.slow
def test_resume_in_the_middle_of_an_epoch(tmp_path: Path, seed: int) -> None:
    """Stop at step 5 of 24 and resume: losses and weights are bit-equal to those of an uninterrupted run."""
    dropout = ["--model.text.dropout", "0.2", "--model.patch_dropout", "0.5"]
    whole = small_fit(SMOKE, tmp_path / "whole", seed, *dropout)

    write_shards(tmp_path / "shards", [20, 15, 13], seed)
    base = ["fit", "--config", str(whole / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "part")]
    stop = '[{"class_path": "helpers.StopAt", "init_args": {"step": 5}}]'
    with pytest.raises(SystemExit):
        main([*base, "--trainer.callbacks", stop])
    assert len(metrics(tmp_path / "part", "train/loss")) == 5
    main([*base, "--ckpt_path", "last"])
    assert metrics(tmp_path / "part", "train/loss") == metrics(whole, "train/loss")
    first, second = (dualenc.load(path / "last", "cpu").model.state_dict() for path in (whole, tmp_path / "part"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path, seed: int) -> None:
    """Compare two processes, with half of each batch, with one process: the losses are the same."""
    write_shards(tmp_path / "shards", [20, 15, 13], seed)
    sets = write_benchmark(tmp_path / "set", seed, "retrieval")
    evaluation = f'[{{"class_path": "dualenc.training.Evaluation", "init_args": {{"data": ["{sets}"]}}}}]'
    tokenizer = dualenc.Tokenizer.train([" ".join(WORDS), "0 1 2 3"], 300, 20)
    tokenizer.save(tmp_path / "tokenizer.json")
    runs = []
    for ranks in (1, 2):
        run = tmp_path / f"ranks{ranks}"
        subprocess.run(
            [
                sys.executable, "-m", "dualenc", "fit", "--config", str(SMOKE), *SMALL,
                "--data.train", str(tmp_path / "shards"), "--data.tokenizer", str(tmp_path / "tokenizer.json"),
                "--trainer.default_root_dir", str(run), "--trainer.callbacks", evaluation,
                "--trainer.devices", str(ranks), "--trainer.precision", "64-true", "--seed_everything", str(seed),
                *(["--trainer.strategy", "ddp"] if ranks > 1 else []),
            ],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        runs.append(run)
    for name in ("train/loss", "val/loss", "val/mrr", "set/mrr", "train/grad_norm"):
        one, two = (metrics(run, name) for run in runs)
        assert len(one) == len(two) > 0
        assert one == pytest.approx(two, rel=1e-6), name


def test_run_without_held_out_pairs_and_with_another_logger(tmp_path: Path, seed: int) -> None:
    """Evaluation sets are measured without held-out pairs, and a logger from YAML writes in addition to metrics.csv."""
    logger = f'{{"class_path": "TensorBoardLogger", "init_args": {{"save_dir": "{tmp_path / "board"}"}}}}'
    run = small_fit(SMOKE, tmp_path, seed, "--data.val", "null", "--run.monitor", "set/mrr", "--trainer.logger", logger)
    assert len(metrics(run, "set/mrr")) == 8
    assert (run / "best" / "model.safetensors").is_file()
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))


def test_parts_from_import_paths_and_a_selection(tmp_path: Path, seed: int) -> None:
    """Take loss, optimizer and augmentation from import paths, and select samples by a field of their .json."""
    config = tmp_path / "run.yaml"
    text = SMOKE.read_text()
    text = text.replace("class_path: torch.optim.AdamW", "class_path: torch.optim.SGD").replace(
        "init_args: {lr: 1.5e-3, betas: [0.9, 0.98], weight_decay: 0.1, fused: true}",
        "init_args: {lr: 2.0e-3, momentum: 0.9}",
    )
    text = text.replace("    embed_dim: 96\n", "    embed_dim: 96\n    loss: helpers.upside_down_loss\n")
    text += "    augment: {class_path: torchvision.transforms.v2.RandomResizedCrop, init_args: {scale: [0.5, 1.0]}}\n"
    config.write_text(text)
    run = small_fit(config, tmp_path, seed, "--data.select", "number < 40", "--data.val", "null",
                    "--run.monitor", "set/mrr")  # fmt: skip
    assert json.loads((run / "run.json").read_text())["train_pairs"] == 40
    assert all(loss < 0 for loss in metrics(run, "train/loss"))
