"""Head kinds of a user's own, named by import path in YAML; saved models never import them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fits import TINY_TEXT, metrics
from safetensors.torch import load_file

import dualenc
from dualenc.cli import main
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.models.heads import head_class, import_head
from dualenc.utils.errors import ModelError

MODULE = "ordinal_head_of_a_test"
KIND = f"{MODULE}.Ordinal"
SOURCE = '''
"""Labels with an order: logit k says that the label is above label k."""

import torch
import torch.nn.functional as F
from torch import nn

from dualenc.data.text.labels import OneLabelReader
from dualenc.models.heads import Head, Measured


class Ordinal(Head):
    """Ordered labels."""

    def label_reader(self):
        return OneLabelReader(self.config.labels)

    def build(self, text):
        return nn.Linear(text.width, len(self.config.labels) - 1)

    def loss(self, logits, labels, group=None):
        above = labels[:, None] > torch.arange(logits.shape[1], device=labels.device)
        return F.binary_cross_entropy_with_logits(logits.float(), above.float(), reduction="none").sum()

    def metrics(self, states, held_out):
        logits, labels = (torch.cat(column) for column in zip(*states))
        right = (logits > 0).sum(1) == labels
        chance = {"accuracy": float((labels == held_out.train_labels().median()).double().mean())}
        loss = float(self.loss(logits, labels)) / len(labels)
        return Measured({"accuracy": float(right.double().mean()), "loss": loss}, {}, chance, len(labels))

    def answers(self, examples):
        return [{"label": self.config.labels[int(row)], "rank": int(row)} for row in (examples.logits > 0).sum(1)]
'''
LABELS = ["poor", "fair", "good"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A user's module that has not been imported yet."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    yield MODULE
    sys.modules.pop(MODULE, None)


def write_run(folder: Path, seed: int) -> Path:
    """Write texts whose label is one of their words, and a configuration with a head of the new kind."""
    generator = torch.Generator().manual_seed(seed)
    lines = [
        f"a {LABELS[int(i)]} film {n}\t{LABELS[int(i)]}"
        for n, i in enumerate(torch.randint(3, (80,), generator=generator))
    ]
    (folder / "stars.tsv").write_text("\n".join(["text\tlabel", *lines]))
    settings = {
        "seed_everything": seed,
        "trainer": {
            "max_epochs": 8, "default_root_dir": str(folder / "run"), "log_every_n_steps": 1, "accelerator": "cpu",
        },
        "run": {"monitor": "val/stars/accuracy", "every_n_steps": 4},
        "model": {"class_path": "dualenc.training.TextTask", "init_args": {
            "heads": {"stars": {"kind": KIND, "labels": LABELS}}, "text": {**TINY_TEXT, "pool": "mean"},
            "scheduler": {"class_path": "dualenc.training.WarmupCosine", "init_args": {"warmup": 2}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        }},
        "data": {"class_path": "dualenc.training.TextData", "init_args": {
            "train": {"stars": {"files": str(folder / "stars.tsv")}}, "val": 0.25, "batch_size": 8, "workers": 0,
        }},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(settings))
    return folder / "run.yaml"


@pytest.mark.long
def test_kind_named_in_yaml(module: str, tmp_path: Path, seed: int) -> None:
    """A kind from outside the package is trained, measured, used to predict, saved and loaded."""
    main(["fit", "--config", str(write_run(tmp_path, seed))])
    run = tmp_path / "run"
    losses = metrics(run, "train/loss")
    half = len(losses) // 2
    assert sum(losses[-half:]) < sum(losses[:half])
    measured = {name: metrics(run, f"val/stars/{name}") for name in ("accuracy", "loss", "baseline_accuracy")}
    assert [len(values) for values in measured.values()] == [8, 8, 8]  # one a validation
    assert all(0 <= value <= 1 for value in measured["accuracy"] + measured["baseline_accuracy"])

    (tmp_path / "new.txt").write_text("a poor film\na good film\n")
    asked = json.dumps({"stars": {"files": str(tmp_path / "new.txt")}})
    main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--data.predict", asked])
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [(line["head"], line["line"]) for line in lines] == [("stars", "line 1"), ("stars", "line 2")]
    assert all(line["label"] == LABELS[line["rank"]] for line in lines)

    model = dualenc.load_text(run / "last", "cpu")
    assert model.classify(["a poor film", "a good film"]) == [
        {key: line[key] for key in ("label", "rank")} for line in lines
    ]
    model.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "dualenc.json").read_text())["heads"]["stars"]["kind"] == KIND
    one, other = (load_file(folder / "model.safetensors") for folder in (run / "last", tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert dualenc.load_text(tmp_path / "again", "cpu").fingerprint == model.fingerprint

    sys.modules.pop(MODULE)
    with pytest.raises(ModelError, match=rf"dualenc\.json: heads\.stars: .*import {MODULE} first"):
        dualenc.load_text(tmp_path / "again", "cpu")
    assert MODULE not in sys.modules


def test_configuration_does_not_import(module: str) -> None:
    head = HeadConfig(KIND, ("a", "b"))
    with pytest.raises(ValueError, match=f"import {MODULE} first"):
        TextModel(TextConfig(20, 8, 1, 1), {"stars": head})
    assert MODULE not in sys.modules
    import_head(KIND)
    assert TextModel(TextConfig(20, 8, 1, 1), {"stars": head}).heads["stars"].out_features == 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("likert", "one of mlm, rtd, classification, token_classification, embedding, question_answering, pooler"),
        ("os.system", "derives from dualenc.models.heads.Head"),
        ("torch.nn.Linear", "derives from dualenc.models.heads.Head"),
        ("dualenc.models.heads.base.Head", "derives from dualenc.models.heads.Head"),
        ("no_such_module.Head", "no_such_module cannot be imported"),
    ],
)
def test_path_to_something_else_is_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_head(kind)


def test_lookup_does_not_trigger_lazy_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attributes of a lazy module import others: a saved model must not cause that."""

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

    monkeypatch.setitem(sys.modules, "lazy_module_of_a_test", Lazy("lazy_module_of_a_test"))
    with pytest.raises(ValueError, match="must be a class that derives"):
        head_class("lazy_module_of_a_test.Head")


def test_error_of_an_unknown_kind_names_the_head(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, seed)
    with pytest.raises(SystemExit) as status:
        main(["fit", "--config", str(path)])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status.value.code == 2
    assert f"model.heads.stars: kind {KIND}: {MODULE} cannot be imported" in line


def test_a_module_that_fails_is_named_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "head_that_fails.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"head_that_fails cannot be imported \(ZeroDivisionError"):
        import_head("head_that_fails.Head")
