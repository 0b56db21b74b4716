"""Settings of a run: keys and values are checked with file, line and suggestion, and options keep siblings."""

import random
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from fits import EVERY, SMOKE, fails
from helpers import ROOT

from dualenc.cli import main
from dualenc.cli.fit import check_settings
from dualenc.cli.parser import COMMANDS
from dualenc.cli.settings import OF_CLASS
from dualenc.training import ContrastiveTask

SMALL = (ROOT / "configs" / "classify.yaml").read_text()


def keys(node: yaml.Node, path: str = "") -> list[tuple[str, yaml.Node]]:
    """Return the paths of the keys whose names are fixed, with their nodes."""
    found = []
    for key, child in node.value if isinstance(node, yaml.MappingNode) else ():
        free = path.endswith((".overrides.", ".heads.", ".init_args.train.", ".init_args.val.", ".init_args.test."))
        if not free:
            found.append((f"{path}{key.value}", key))
        found += keys(child, f"{path}{key.value}.")
    return found


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_each_configuration_passes_and_each_typo_is_named_with_its_line(
    path: Path, tmp_path: Path, seed: int, capsys
) -> None:
    check_settings("fit", ["--config", str(path)])
    rng, text = random.Random(seed), path.read_text()
    wrong = tmp_path / "wrong.yaml"
    named = [(name, key) for name, key in keys(yaml.compose(text)) if len(key.value) > 4 and key.value not in OF_CLASS]
    for name, key in rng.sample(named, min(3, len(named))):
        start, word = key.start_mark.index, key.value
        at = rng.randrange(1, len(word) - 1)
        typo = word[:at] + word[at + 1 :]  # a letter is missing
        wrong.write_text(text[:start] + typo + text[start + len(word) :])
        line = fails(capsys, ["fit", "--config", str(wrong)])
        assert f"wrong.yaml, line {key.start_mark.line + 1}: unknown key {name[: -len(word)]}{typo}: " in line
        assert "did you mean" in line
        assert word in line.partition("did you mean")[2]


MISTAKES = {
    "\tmax_epochs: 3": (1, "tab"),
    "trainer:\n  max_epochs: 3\n   precision: 32": (3, "indented"),
    "trainer:\n    max_epochs: 3\n  precision: 32": (3, "indented"),
    "trainer: {max_epochs: 3\nmodel: 3": (1, "bracket"),
    'trainer:\n  default_root_dir: "a\n': (2, "quote"),
    "trainer:\n  max_epochs 3\n  precision: 32": (3, "colon"),
    "trainer:\n  max_epochs: many": (2, "trainer.max_epochs must be an integer or null, found 'many'"),
    "trainer:\n  precision: bf15": (2, "did you mean bf16?"),
    "trainer:\n  max_epochs: 2.0": (2, "trainer.max_epochs must be an integer or null, found '2.0'"),
    "model: 3": (1, "model must name a class, such as class_path: dualenc.training.ContrastiveTask, found '3'"),
    "model:\n  class_path: dualenc.training.TextTask\n  init_args:": (3, "init_args must be keys with their values"),
    "seed_everything: x": (1, "seed_everything must be true or false or an integer"),
    "trainer:\n  callbacks:\n  - class_path: dualenc.training.Evaluatoin": (
        3,
        "did you mean dualenc.training.Evaluation?",
    ),
    "model:\n  class_path: dualenc.data.TextTask": (2, "did you mean dualenc.training.TextTask?"),
    "model:\n  class_path: TextTaks": (2, "did you mean TextTask?"),
    "model:\n  class_path: nowhere.at.All": (2, "No module named 'nowhere'"),
    "data:\n  init_args: {batch_size: 3}": (2, "data.class_path is missing"),
    "model:\n  class_path: dualenc.training.TextTask\n  init_args:\n    heads:\n      a: {kind: mlm, weight: heavy}": (
        5,
        "weight must be a number",
    ),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_a_file_is_named_with_its_line(text: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    number, what = MISTAKES[text]
    line = fails(capsys, ["fit", "--config", str(tmp_path / "wrong.yaml")])
    assert f"wrong.yaml, line {number}: " in line
    assert what in line
    assert "<class" not in line
    assert "typing." not in line


OPTIONS = {
    "--trainer.max_epoch 3": "did you mean max_epochs?",
    "--max-epochs 3": "did you mean trainer.max_epochs?",
    "--lr 3": "did you mean model.optimizer.lr?",
    "--confg x": "did you mean config?",
    "--model.optimizer.lrr 3": "did you mean lr?",
    "--model.loss dualenc.losses.clip_los": "did you mean dualenc.losses.clip_loss?",
    "--model.duplicates masked": "did you mean mask?",
    "--trainer.callbacks+ EMAA": "--trainer.callbacks 'EMAA' is unknown: did you mean EMA?",
    "--trainer.callbacks+ dualenc.training.EMAA": "did you mean dualenc.training.EMA?",
    "--data.batch_size 8.0": "--data.batch_size must be an integer, found '8.0'",
    "--model.optimizer.lr fast": "--model.optimizer.lr must be a number, found 'fast'",
    "--data.batch-size many": "--data.batch_size must be an integer, found 'many'",
    "--data.batch_size": "--data.batch_size needs a value",
    "--trainer.callbacks [{class_path: dualenc.training.Evaluation, init_args: {dta: x}}]": "did you mean data?",
    "--model.image.overrides 3": "--model.image.overrides must be a mapping",
    "stray": "unexpected argument 'stray': a setting is written --KEY VALUE",
    "run.yaml": "unexpected argument 'run.yaml': write --config run.yaml",
}


@pytest.mark.parametrize("words", OPTIONS)
def test_a_mistake_in_an_option_is_named(words: str, capsys) -> None:
    line = fails(capsys, ["fit", "--config", str(SMOKE), *words.split(" ", 1)])
    assert OPTIONS[words] in line
    assert "<class" not in line


def test_files_that_the_shell_put_for_a_pattern_are_explained(capsys) -> None:
    line = fails(capsys, ["fit", "--config", str(SMOKE), "--data.train", "a/0.tar", "a/1.tar"])
    assert "unexpected argument 'a/1.tar': --data.train takes one value: quote a pattern" in line
    line = fails(capsys, ["fit", "--config", "small"])
    assert "`dualenc configs small > small.yaml`" in line


def test_dashes_and_underscores_are_the_same_and_values_stay() -> None:
    config = ["--config", str(SMOKE)]
    for name in (
        "data.batch_size",
        "trainer.max_epochs",
        "model.embed_dim",
        "model.init_args.patch_dropout",
        "seed_everything",
    ):
        both = [check_settings("fit", [*config, f"--{spelled}", "-3"]) for spelled in (name, name.replace("_", "-"))]
        assert both[0] == both[1] == [f"--config={SMOKE}", f"--{name}=-3"]
    for value in ("--a-b_c", "a-b_c", "-x"):
        found = check_settings("fit", [*config, f"--trainer.default-root-dir={value}"])
        assert found[1:] == [f"--trainer.default_root_dir={value}"]


class Task(ContrastiveTask):
    """Task of a user, with keys that only its base class names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)


def test_keys_that_the_signature_of_a_class_leaves_open_may_have_dashes(monkeypatch) -> None:
    monkeypatch.setattr("dualenc.cli.settings.import_by_path", lambda path: Task)
    words = ["--model", "mine.Task", "--data", "mine.Data", "--model.embed-dim", "3"]
    assert check_settings("fit", words)[2] == "--model.embed_dim=3"


@pytest.mark.parametrize("words", ["--model.optimizer Adadelta", "--trainer.callbacks+ BaseFinetuning"])
def test_a_class_of_another_library_is_not_taken_for_a_typo_of_ours(words: str) -> None:
    name, value = words.split()
    assert check_settings("fit", ["--config", str(SMOKE), name, value])[1] == f"{name}={value}"


def test_options_of_commands_may_have_dashes_and_values_stay(monkeypatch, capsys) -> None:
    found: dict[str, Any] = {}

    def push(
        model: str,
        big_data: tuple[str, ...] = (),
        some_text: str = "",
        how_many: int = 1,
        is_it: bool = False,
        on: bool = True,
        of: Literal[1, 2] = 1,
    ) -> None:
        """Record.

        Args:
            model: a.
            big_data: b.
            some_text: c.
            how_many: d.
            is_it: e.
            on: f.
            of: g.
        """
        found.update(locals())

    monkeypatch.setitem(COMMANDS, "push", push)
    for dash in "-_":
        words = [
            f"--big{dash}data",
            "a-b",
            "c_d",
            f"--some{dash}text=--x-y_z",
            f"--how{dash}many",
            "-2",
            f"--is{dash}it",
            "--on=false",
            "--of",
            "2",
        ]
        main(["push", *words, "--", "-m-_"])
        assert found.pop("found") is found
        assert found == {
            "model": "-m-_",
            "big_data": ["a-b", "c_d"],
            "some_text": "--x-y_z",
            "how_many": -2,
            "is_it": True,
            "on": False,
            "of": 2,
        }
    assert "did you mean --how_many?" in fails(capsys, ["push", "m", "--how-mny", "2"])
    assert "--how_many must be an integer, found 'x'" in fails(capsys, ["push", "m", "--how-many", "x"])
    assert "--some_text needs a value" in fails(capsys, ["push", "m", "--some-text", "-x"])
    assert "needs MODEL" in fails(capsys, ["push"])
    assert "unexpected argument 'n'" in fails(capsys, ["push", "m", "n"])


@pytest.mark.long
def test_an_option_inside_a_dict_keeps_its_siblings(tmp_path: Path, seed: int, capsys) -> None:
    settings = yaml.safe_load(SMALL)
    heads, train = settings["model"]["init_args"]["heads"], settings["data"]["init_args"]["train"]
    (name,) = train
    for i, letter in enumerate("zaym"):  # not in alphabetical order: the order must stay
        other = f"{letter}-{random.Random(seed + i).randrange(1000)}"
        heads[other], train[other] = dict(heads[name]), {**train[name], "weight": i + 2}
    settings["data"]["init_args"]["val"] = 0.1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    arguments = [
        "fit", "--config", str(tmp_path / "run.yaml"), f"--data.train.{other}.files", "new.tsv",
        f"--data.train.{name}.weight=0.5", f"--model.heads.{other}.weight", "3", "--model.text.width", "96",
        "--model.optimizer.lr", "0.5", "--print_config",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(arguments)
    found = yaml.safe_load(capsys.readouterr().out)
    train[other]["files"], train[name]["weight"], heads[other]["weight"] = "new.tsv", 0.5, 3
    assert list(found["data"]["init_args"]["train"]) == list(train)
    assert found["data"]["init_args"]["train"] == train
    for head, config in heads.items():
        given = found["model"]["init_args"]["heads"][head]
        assert {key: given[key] for key in config} == config
    assert found["model"]["init_args"]["text"]["width"] == 96
    assert found["model"]["init_args"]["text"]["layers"] == settings["model"]["init_args"]["text"]["layers"]
    optimizer = settings["model"]["init_args"]["optimizer"]["init_args"] | {"lr": 0.5}
    given = found["model"]["init_args"]["optimizer"]["init_args"]
    assert {key: given[key] for key in optimizer} == optimizer
