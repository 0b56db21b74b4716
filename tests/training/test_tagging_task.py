"""Runs that learn named entities: a toy task, resuming to the bit, predictions, report, errors."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from fits import TINY_TEXT, fails, metrics
from helpers import WORDS
from safetensors.torch import load_file

import dualenc
from dualenc.cli import main

LABELS = ["PER", "LOC"]


def sentence(longest: int = 12, kinds: str = "wwwpl") -> tuple[list[str], list[str]]:
    """Draw words with tags in IOB1: "mr smith" is a person, and "Rome" a place, wherever they stand."""
    words, tags = [], []
    for _ in range(random.randint(1, longest)):
        kind = random.choice(kinds)
        before = tags[-1:] if kind != "w" else []
        more = {"w": [random.choice(WORDS)], "p": ["mr", "smith"], "l": ["Rome"]}.get(kind, [kind])
        label = {"p": "PER", "l": "LOC"}.get(kind)
        words += more
        first = f"B-{label}" if before in ([f"I-{label}"], [f"B-{label}"]) else f"I-{label}"
        tags += [first, *[f"I-{label}"] * (len(more) - 1)] if label else ["O"] * len(more)
    return words, tags


def write(path: Path, sentences: list[tuple[list[str], list[str]]]) -> Path:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"tokens": words, "tags": tags}) for words, tags in sentences]
        path.write_text("\n".join(lines))
    else:
        rows = ["\n".join(f"{word} x {tag}" for word, tag in zip(words, tags)) for words, tags in sentences]
        path.write_text("-DOCSTART- x O\n\n" + "\n\n".join(rows) + "\n")
    return path


def write_run(folder: Path, seed: int, **head: object) -> Path:
    """Write data, of which some sentences are longer than the encoder's context, and a configuration."""
    files = {
        "train": [sentence(40 if n % 9 == 0 else 12) for n in range(120)],
        "dev": [sentence(60 if n % 5 == 0 else 12) for n in range(30)],
    }
    paths = {name: str(write(folder / f"{name}.conll", own)) for name, own in files.items()}
    settings = {
        "seed_everything": seed,
        "trainer": {"max_epochs": 3, "default_root_dir": str(folder / "run"), "log_every_n_steps": 1,
                    "accelerator": "cpu"},
        "run": {"monitor": "val/names/f1"},
        "model": {"class_path": "dualenc.training.TextTask", "init_args": {
            "heads": {"names": {"kind": "token_classification", "labels": LABELS, **head}},
            "text": {**TINY_TEXT, "vocab_size": 300},
            "scheduler": {"class_path": "dualenc.training.WarmupCosine", "init_args": {"warmup": 5}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        }},
        "data": {"class_path": "dualenc.training.TextData", "init_args": {
            "train": {"names": {"files": paths["train"]}}, "val": {"names": {"files": paths["dev"]}},
            "batch_size": 16, "workers": 0,
        }},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(settings))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the toy task."""
    folder = tmp_path_factory.mktemp("trained")
    random.seed(0)
    main(["fit", "--config", str(write_run(folder, 3))])
    return folder


def test_toy_task_is_learned(trained: Path) -> None:
    run = trained / "run"
    last = {name: metrics(run, f"val/names/{name}")[-1] for name in ("f1", "f1_strict", "f1_macro", "accuracy")}
    assert last == {"f1": 1.0, "f1_strict": 1.0, "f1_macro": 1.0, "accuracy": 1.0}
    assert 0 < metrics(run, "val/names/baseline_accuracy")[-1] < 1
    model = dualenc.load_text(run / "best", "cpu")
    text = "red mr smith Rome  Rome mr smith " + "a cat " * 30 + "sits in Rome"
    found = model.tag(text)[0]
    assert [one["text"] for one in found] == ["mr smith", "Rome", "Rome", "mr smith", "Rome"]
    assert all(text[one["start"] : one["end"]] == one["text"] and 0 < one["score"] <= 1 for one in found)
    assert model.model.head_configs["names"].labels == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@pytest.mark.parametrize("ending", ["conll", "jsonl", "txt"])
def test_predictions(trained: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a file's entities are those of its texts, also where its words are given and do not have tags."""
    random.seed(1)
    run, sentences = trained / "run", [sentence(30)[0] for _ in range(9)]
    texts = [" ".join(words) for words in sentences]
    path = trained / f"new.{ending}"
    path.write_text({
        "conll": "\n\n".join("\n".join(words) for words in sentences),
        "jsonl": "\n".join(json.dumps({"tokens": words}) for words in sentences),
        "txt": "\n".join(texts),
    }[ending])  # fmt: skip
    asked = json.dumps({"names": {"files": str(path)}})
    main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--data.predict", asked])
    assert "9 predictions are in" in capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == texts
    expected = dualenc.load_text(run / "last", "cpu").tag(texts, batch_size=2)
    for line, entities in zip(lines, expected, strict=True):
        for one, other in zip(line["entities"], entities, strict=True):
            assert one == {**other, "score": pytest.approx(other["score"], abs=1e-5)}


def test_report_shows_types_and_mistakes(tmp_path: Path, seed: int) -> None:
    """Check the page of a run that has hardly begun, as a control of the one above: its counts are the file's."""
    config = write_run(tmp_path, seed)
    rows = [sentence(8, "wwwpl\u200b") for _ in range(30)]
    rows += [(["Rome", "\u200b"], ["I-LOC", "I-LOC"])] * 2
    write(tmp_path / "dev.conll", rows)
    main(["fit", "--config", str(config), "--trainer.max_epochs", "1", "--model.optimizer.lr", "1e-9"])
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    section = page[page.index('<h2 id="set-1">names') :]
    table = dict(re.findall(r"<tr><th>(\w+)</th>(.*?)</tr>", section))
    entities = sum(int(re.findall(r"<td>([\d,]+)</td>", table[label])[-2]) for label in LABELS)
    starts = [
        tag != "O" and (i == 0 or tag[0] == "B" or tags[i - 1][2:] != tag[2:])
        for _, tags in rows
        for i, tag in enumerate(tags)
    ]
    assert entities == sum(starts)
    missing = sum(words.count("\u200b") for words, _ in rows)
    assert f"{missing} words without tokens counted as O" in section
    assert "always O" in section
    assert "Most frequent mistakes" in section
    assert metrics(tmp_path / "run", "val/names/f1")[-1] < 1


def test_resumed_run_is_bit_equal(tmp_path: Path, seed: int) -> None:
    config = write_run(tmp_path, seed)
    short = ["--config", str(config), "--trainer.max_epochs", "2"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    main(["fit", *short, "--trainer.default_root_dir", str(whole)])
    stop = json.dumps([{"class_path": "helpers.StopAt", "init_args": {"step": 5}}])
    with pytest.raises(SystemExit):
        main(["fit", *short, "--trainer.default_root_dir", str(part), "--trainer.callbacks", stop])
    main(["fit", *short, "--trainer.default_root_dir", str(part), "--ckpt_path", "last"])
    for name in ("train/loss", "val/names/loss", "val/names/f1", "train/grad_norm"):
        assert metrics(part, name) == metrics(whole, name)
    one, other = (load_file(run / "last" / "model.safetensors") for run in (part, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
    other_seed = ["--seed_everything", str(seed + 1), "--trainer.default_root_dir", str(tmp_path / "changed")]
    main(["fit", *short, *other_seed])
    assert metrics(tmp_path / "changed", "train/loss") != metrics(whole, "train/loss")  # control


def test_errors_of_a_user(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_run(tmp_path, seed))
    lines = (tmp_path / "train.conll").read_text().splitlines()
    lines[2] = "Kim x B-ORG"
    (tmp_path / "train.conll").write_text("\n".join(lines))
    error = fails(capsys, ["fit", "--config", config])
    assert re.search(
        r"train\.conll line 3: tag 'B-ORG' is not a tag of head 'names' .*model\.heads\.names\.labels", error
    )
    head = ["fit", "--config", config, "--model.heads"]
    error = fails(capsys, [*head, '{"names": {"kind": "token_classification", "labels": ["PER"], "scheme": "bilou"}}'])
    assert "scheme" in error
    error = fails(capsys, [*head, '{"names": {"kind": "token_classification", "labels": []}}'])
    assert "needs labels" in error
    error = fails(
        capsys, ["fit", "--config", config, "--data.train", '{"names": {"files": "x.conll", "label": "tag"}}']
    )
    assert "data.train.names.label: the columns that token_classification heads read have fixed names" in error
