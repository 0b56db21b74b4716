"""Question answering from files to predictions: training, resuming, measuring, bad questions, the report."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import TINY_TEXT, fails, metrics
from safetensors.torch import load_file

import dualenc
from dualenc.cli import main
from dualenc.metrics.answers import answer_scores_or_none

PLAIN = ["cat", "dog", "sits", "runs", "on", "mat", "tree", "boat", "under", "over"]
COLORS = ["red", "blue", "green", "pink"]
HEAD = {"kind": "question_answering", "max_length": 24, "stride": 6, "no_answer": True}


def question(rng: np.random.Generator, number: int) -> dict[str, Any]:
    """Return a question for the color of a text, which one in four texts lacks."""
    words = [str(word) for word in rng.choice(PLAIN, int(rng.integers(5, 40)))]
    answers = []
    if number % 4:
        place, color = int(rng.integers(len(words))), str(rng.choice(COLORS))
        words.insert(place, color)
        answers = [{"text": color, "answer_start": len(" ".join([*words[:place], ""]))}]
    found = {"question": f"which color of {rng.choice(PLAIN)}?", "context": " ".join(words), "answers": answers}
    return {"id": f"q{number}", **found, "is_impossible": not answers}


def write_squad(path: Path, questions: list[dict[str, Any]]) -> None:
    paragraphs = [
        {"context": one["context"], "qas": [{k: v for k, v in one.items() if k != "context"}]} for one in questions
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "", "paragraphs": paragraphs}]}))


def write_questions(folder: Path, seed: int, count: int = 160) -> list[dict[str, Any]]:
    """Write `train.json` and `dev.jsonl`, and return the questions of the latter."""
    rng = np.random.default_rng(seed)
    train, dev = ([question(rng, number) for number in range(size)] for size in (count, 40))
    write_squad(folder / "train.json", train)
    (folder / "dev.jsonl").write_text("".join(json.dumps(one) + "\n" for one in dev))
    return dev


def settings_of(folder: Path, run: Path, seed: int, epochs: int, head: dict[str, Any] | None = None) -> list[str]:
    """Write a configuration, and return the arguments of `fit`."""
    settings = {
        "seed_everything": seed,
        "trainer": {
            "max_epochs": epochs, "default_root_dir": str(run), "log_every_n_steps": 1, "accelerator": "cpu",
        },
        "run": {"monitor": "val/answer/f1", "every_n_steps": 2},
        "model": {"class_path": "dualenc.training.TextTask", "init_args": {
            "heads": {"answer": head or HEAD}, "text": {**TINY_TEXT, "types": 2, "dropout": 0.1},
            "scheduler": {"class_path": "dualenc.training.WarmupCosine", "init_args": {"warmup": 2}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        }},
        "data": {"class_path": "dualenc.training.TextData", "init_args": {
            "train": {"answer": {"files": str(folder / "train.json")}},
            "val": {"answer": {"files": str(folder / "dev.jsonl")}}, "batch_size": 16, "workers": 0,
        }},
    }  # fmt: skip
    run.with_suffix(".yaml").write_text(json.dumps(settings))
    return ["fit", "--config", str(run.with_suffix(".yaml"))]


def test_from_files_to_predictions(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    dev = write_questions(tmp_path, seed)
    run = tmp_path / "run"
    main(settings_of(tmp_path, run, seed, 8))
    last = {name: metrics(run, f"val/answer/{name}")[-1] for name in ("f1", "exact_match", "has_answer_f1", "best_f1")}
    assert last["f1"] > 0.8
    assert last["has_answer_f1"] > 0.8
    assert last["best_f1"] >= last["f1"] - 1e-9
    assert metrics(run, "val/answer/baseline_f1")[-1] == pytest.approx(0.25)  # that of no answer
    losses = metrics(run, "val/answer/loss")
    assert losses[-1] < losses[0] / 2
    page = (run / "report.html").read_text()
    assert "f1 is above the baseline" in page

    # Predictions of a file without answers, which are measured again as SQuAD's script does it.
    asked = [{key: one[key] for key in ("id", "question", "context")} for one in dev]
    write_squad(tmp_path / "ask.json", asked)
    source = json.dumps({"answer": {"files": str(tmp_path / "ask.json")}})
    main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--data.predict", source])
    assert "40 predictions are in" in capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [one["id"] for one in dev]
    truths = [[answer["text"] for answer in one["answers"]] for one in dev]
    scores = [answer_scores_or_none(line["answer"], own) for line, own in zip(lines, truths, strict=True)]
    assert np.mean([one.f1 for one in scores]) == pytest.approx(last["f1"])
    assert np.mean([one.exact_match for one in scores]) == pytest.approx(last["exact_match"])
    predictor = dualenc.load_text(run / "last", "cpu")
    assert predictor.model.head_configs["answer"].stride == HEAD["stride"]
    answers = predictor.answer([one["question"] for one in dev], [one["context"] for one in dev], n=3)
    assert [found[0]["text"] for found in answers] == [line["answer"] for line in lines]


def test_resumed_run_is_bit_equal(tmp_path: Path, seed: int) -> None:
    write_questions(tmp_path, seed, 48)
    main(settings_of(tmp_path, tmp_path / "whole", seed, 2))
    part = settings_of(tmp_path, tmp_path / "part", seed, 2)
    stop = json.dumps([{"class_path": "helpers.StopAt", "init_args": {"step": 5}}])
    with pytest.raises(SystemExit):
        main([*part, "--trainer.callbacks", stop])
    main([*part, "--ckpt_path", "last"])
    for name in ("train/loss", "train/grad_norm", "val/answer/loss", "val/answer/f1"):
        assert metrics(tmp_path / "part", name) == metrics(tmp_path / "whole", name), name
    one, other = (load_file(tmp_path / run / "last" / "model.safetensors") for run in ("part", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    main(settings_of(tmp_path, tmp_path / "changed", seed + 1, 2))
    assert metrics(tmp_path / "changed", "train/loss") != metrics(tmp_path / "whole", "train/loss")  # control


def test_resume_refuses_other_windows(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_questions(tmp_path, seed, 40)
    main(settings_of(tmp_path, tmp_path / "run", seed, 1))
    again = settings_of(tmp_path, tmp_path / "run", seed, 2, {**HEAD, "stride": 5})
    assert "windows" in fails(capsys, [*again, "--ckpt_path", "last"])


def test_bad_questions_are_counted_and_named(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    dev = write_questions(tmp_path, seed, 40)
    moved = {**dev[1], "id": "moved", "answers": [{"text": dev[1]["answers"][0]["text"] + "x", "answer_start": 0}]}
    long = {**dev[2], "id": "long", "question": "cat " * 30, "context": "dog " * 40, "answers": []}
    lines = [*dev[:10], moved, long]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    run = tmp_path / "run"
    main(settings_of(tmp_path, run, seed, 1))
    bad = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert [(one["key"], one["cause"].split(" stride")[0]) for one in bad] == [
        ("line 11", "an answer is not in its context"),
        ("line 12", "its question leaves at most"),
    ]
    assert "'moved'" in bad[0]["detail"]
    assert "'long' takes" in bad[1]["detail"]
    page = html.unescape(re.sub("<[^>]*>", " ", (run / "report.html").read_text()))
    assert re.search(r"\b10 questions", page)

    # A head that expects answers refuses the others before it is trained.
    head = {**HEAD, "no_answer": False}
    line = fails(capsys, settings_of(tmp_path, tmp_path / "other", seed, 1, head))
    assert "train.json line 1 from byte" in line
    assert "question 'q0' does not have an answer: set model.heads.answer.no_answer to true" in line
    line = fails(capsys, settings_of(tmp_path, tmp_path / "third", seed, 1, {**HEAD, "max_length": 25}))
    assert "max_length 25" in line
    assert "context_length 24" in line
