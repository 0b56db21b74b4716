"""Help texts: short, plain, complete, and true to the signatures."""

import inspect
import re
from contextlib import suppress

import pytest
from lightning.pytorch import Trainer

from dualenc import training
from dualenc.cli import main
from dualenc.cli.fit import CLI
from dualenc.cli.fit_help import DATA, LINKED, TASKS, TRAINER, find_definition, trainer_keys
from dualenc.cli.parser import COMMANDS, TRAINER_COMMANDS, _parse

UGLY = re.compile(r"<class|typing\.|Optional|Union\[|Literal|\bNone\b|likewise")


def printed(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with suppress(SystemExit):
        main(arguments)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= min(columns, 100)
    return out


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_overview_lists_each_command_once_on_one_screen(columns, capsys, monkeypatch) -> None:
    lines = printed(["--help"], capsys, monkeypatch, columns).splitlines()
    assert len(lines) <= 48
    listed = [line.split()[0] for line in lines if re.match(r"  \S", line)]
    assert sorted(listed) == sorted([*TRAINER_COMMANDS, *COMMANDS])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [60, 120])
def test_the_help_of_a_command_has_all_its_options_and_plain_words(command, columns, capsys, monkeypatch) -> None:
    text = printed([command, "--help"], capsys, monkeypatch, columns)
    assert not UGLY.search(text)
    for i, (name, parameter) in enumerate(inspect.signature(COMMANDS[command]).parameters.items()):
        place = i == 0 or parameter.default is inspect.Parameter.empty
        found = re.search(rf"^  {name.upper() if place else f'--{name}'}\b(.*)$", text, re.MULTILINE)
        assert found, name
        if parameter.default not in (None, "", ()) and not place:
            flag = parameter.default is False
            assert flag or f"Default: {parameter.default}." in " ".join(text.split())
            assert flag != bool(re.match(r" [A-Z{]", found[1]))


def keys_of(name: str) -> set[str]:
    section = "model" if name in TASKS else "data" if name in DATA else "run"
    return set(inspect.signature(getattr(training, name)).parameters) - set(LINKED.get(section, ()))


@pytest.mark.parametrize("command", TRAINER_COMMANDS)
@pytest.mark.parametrize("columns", [80, 100])
def test_the_help_of_a_run_shows_all_keys_of_ours_and_only_keys_that_exist(
    command, columns, capsys, monkeypatch
) -> None:
    text = printed([command, "--help"], capsys, monkeypatch, columns)
    assert len(text.splitlines()) <= 60
    assert not UGLY.search(text)
    assert ("--ckpt_path auto" in text) != (command == "plan")  # which reads no checkpoint
    assert f"dualenc {command} --help=all" in text
    for section, names in (("model", TASKS), ("data", DATA), ("run", ("RunDirectory",))):
        block = text[text.index(f"\n{section}: ") :].partition("\n\n")[0]
        rows = set(re.findall(rf"^  --{section}\.(\w+)", block, re.MULTILINE))
        also = re.search(r"^  also ((?:\w+,?\s+)*\w+)$(?=\n  of|\Z)", block, re.MULTILINE)
        assert also
        assert rows | set(re.split(r",\s+", also[1])) == keys_of(names[0])
        for name in names[1:]:
            listed = re.search(rf"^  of dualenc\.training\.{name}: ((?:\w+,\s+)*\w+)$", block, re.MULTILINE)
            assert listed
            assert set(re.split(r",\s+", listed[1])) == keys_of(name)
    assert set(re.findall(r"--trainer\.(\w+)", text)) == set(TRAINER)
    assert set(TRAINER) <= set(inspect.signature(Trainer).parameters)


def test_the_whole_help_explains_every_key(capsys, monkeypatch) -> None:
    text = printed(["fit", "--help=all"], capsys, monkeypatch, 100)
    trainer = {f"trainer.{name}" for name in inspect.signature(Trainer).parameters}
    model = {f"model.{key}" for name in TASKS for key in keys_of(name)}
    data = {f"data.{key}" for name in DATA for key in keys_of(name)}
    run = {f"run.{key}" for key in keys_of("RunDirectory")}
    named = re.findall(r"^  --((?:trainer|model|data|run)\.\w+)", text, re.MULTILINE)
    assert set(named) == trainer | model | data | run
    assert not re.search(r"<class|typing\.", text)
    described = re.findall(r"^  --\S.*\n {8}\S", text, re.MULTILINE)
    assert len(described) == len(re.findall(r"^  --", text, re.MULTILINE))


def test_keys_that_the_command_line_sets_itself_are_left_out() -> None:
    found: dict[str, set[str]] = {}

    class Recorder:
        def add_lightning_class_args(self, *arguments: object) -> None:
            pass

        def link_arguments(self, source: str, target: str, *more: object, **options: object) -> None:
            section, _, key = target.partition(".init_args.")
            found.setdefault(section, set()).add(key)

    CLI.add_arguments_to_parser(None, Recorder())  # type: ignore[arg-type]
    assert found == {section: set(keys) for section, keys in LINKED.items()}


def test_choices_and_defaults_are_those_of_the_source(capsys, monkeypatch) -> None:
    text = printed(["fit", "--help=all"], capsys, monkeypatch, 100)
    assert "--model.duplicates {ignore,mask,positive}" in text  # a name for a Literal of another module
    assert "--model.logit_bias {true,false}\n        learn a bias; `siglip_loss` needs it. Default: false." in text
    for name, parameter in inspect.signature(Trainer).parameters.items():
        (key,) = [key for key in trainer_keys() if key.name == name]
        assert key.default == repr(parameter.default).replace('"', "'")
    assert find_definition("dualenc.training", "no such name")[1] is None


def test_values_of_a_repeated_option_come_together() -> None:
    def command(place: str, sizes: tuple[int, ...] = (7,), names: tuple[str, ...] = ()) -> None:
        """Run.

        Args:
            place: a place.
            sizes: sizes.
            names: names.
        """

    words = ["here", "--names", "a", "--sizes", "1", "2", "--names", "b", "c", "--sizes", "3"]
    assert _parse(command, words) == {"place": "here", "sizes": [1, 2, 3], "names": ["a", "b", "c"]}
    assert _parse(command, ["here"]) == {"place": "here", "sizes": (7,), "names": ()}
