"""The command line, and the only parser.

LightningCLI parses `fit`, `validate`, `test` and `predict`. Every other command is a plain function in a module of this
package, and jsonargparse parses its signature. A user's mistake is one line on standard error, never a traceback. The
exit status is 2 for wrong use, 1 for failed work, 75 for a run that a signal stopped and that can be resumed, and 130
for a command that Ctrl-C ended.
"""

import argparse
import inspect
import re
import shutil
import sys
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, Union

from dualenc.cli import curate, data, demo, evaluate, models, search, serve
from dualenc.cli.annotations import choices, fits, members, metavar, must_be
from dualenc.cli.common import UsageError, WorkError
from dualenc.utils.errors import DataError, ModelError
from dualenc.utils.limits import file_limit, hits_file_limit
from dualenc.utils.text import did_you_mean, one_line, shorten

TRAINER_COMMANDS = {
    "fit": "Train a model as a configuration says, or continue a run.",
    "plan": "Print what a run needs, before it: memory of the GPU, workers, steps, time.",
    "validate": "Measure a checkpoint of a run on the held-out data of its configuration.",
    "test": "Measure a checkpoint of a run on the test data of its configuration.",
    "predict": "Write the predictions of a text model of a run.",
}
GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "Train": (data.configs, demo.demo),
    "Prepare data": (data.make_shards, data.doctor, data.index, data.shrink, data.tokenizer, models.mine),
    "Evaluate": (
        evaluate.zeroshot,
        evaluate.retrieval,
        evaluate.choice,
        evaluate.probe,
        evaluate.evaluate,
        evaluate.sets,
        evaluate.compare,
    ),
    "Curation": (curate.score, curate.filter, curate.reshard),
    "Search": (search.build_search, search.search, serve.serve),
    "Use and exchange models": (
        models.embed,
        models.interpolate,
        models.import_,
        models.export,
        models.push,
    ),
}
WIDTH = 100  # columns of a help text on wider terminals
UNBROKEN = "\N{NON-BREAKING HYPHEN}"


def command_name(function: Callable[..., None]) -> str:
    """Return the name of the command that a function is."""
    return function.__name__.strip("_").replace("_", "-")


COMMANDS = {command_name(function): function for group in GROUPS.values() for function in group}


def run(arguments: list[str]) -> None:
    """Run a command; if it fails, print one line and exit with its status."""
    try:
        _run(arguments)
    except (UsageError, DataError, ModelError) as error:
        _fail(error, 2)
    except WorkError as error:
        _fail(error, 1)
    except Exception as error:
        if not hits_file_limit(error):  # any library may meet the limit anywhere
            raise
        _fail(error, 1)


def _run(arguments: list[str]) -> None:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in TRAINER_COMMANDS:
        _run_trainer(command, rest)
    elif command in COMMANDS:
        function = COMMANDS[command]
        function(**_parse(function, rest))
    elif command == "--version":
        from importlib.metadata import version

        print(f"dualenc {version('dualenc')}")
    elif command in ("--help", "-h"):
        print(_overview())
    else:
        option = command.startswith("-")
        known = ("--help", "--version") if option else (*TRAINER_COMMANDS, *COMMANDS)
        raise UsageError(f"unknown {'option' if option else 'command'} {command!r}: {did_you_mean(command, known)}")


def _run_trainer(command: str, options: list[str]) -> None:
    """Run a command of the trainer, or print its help. A broken file is refused before torch loads."""
    if asked := [option for option in options if option in ("-h", "--help", "--help=all")]:
        from dualenc.cli.fit_help import trainer_help

        print(trainer_help(command, TRAINER_COMMANDS[command], _columns(), whole=asked[-1] == "--help=all"))
        return
    from dualenc.cli.settings import read_configs

    read_configs(options)
    if command == "plan":
        from dualenc.cli.plan import plan_command

        plan_command(options)
        return
    from dualenc.cli.fit import trainer_command

    trainer_command([command, *options])


def _columns() -> int:
    return min(WIDTH, shutil.get_terminal_size().columns)


def _overview() -> str:
    """Return the help of the program: the commands in groups."""
    lines = ["usage: dualenc COMMAND ..."]
    for title, functions in GROUPS.items():
        commands = {command_name(one): (one.__doc__ or "").splitlines()[0] for one in functions}
        lines += ["", title]
        for name, text in {**(TRAINER_COMMANDS if title == "Train" else {}), **commands}.items():
            lines.append(f"  {name:12} {shorten(text, _columns() - 15)}")
    return "\n".join([
        *lines,
        "",
        "`dualenc COMMAND --help` prints its options; in these, dashes equal underscores.",
    ])  # fmt: skip


class _Formatter(argparse.HelpFormatter):
    """Formatter that does not break names at their hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines = super()._split_lines(text.replace("-", UNBROKEN), width)
        return [line.replace(UNBROKEN, "-") for line in lines]


class _Several(argparse.Action):
    """Action of an option that takes several values, at once or by repeating it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if before is self.default else before), *values])


class _Parser(argparse.ArgumentParser):
    """Parser that raises its errors, so that `run` prints them."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required: "):
            message = f"{self.prog} needs {message.partition(': ')[2].replace(', ', ' and ')}: see {self.prog} --help"
        raise UsageError(message)


def _parse(function: Callable[..., None], words: list[str]) -> dict[str, Any]:
    """Return the arguments of a function from the words of the command line.

    Raises:
        UsageError: If an option is unknown, a value has another type, or one is missing or too many.
    """
    parser, options = _function_parser(function)
    end = words.index("--") if "--" in words else len(words)
    spelled = [_spell(word, options) for word in words[:end]]
    try:
        found, left = parser.parse_known_args([*spelled, *words[end:]])
    except argparse.ArgumentError as error:  # the number of values; their types raise UsageError
        name = error.argument_name
        raise UsageError(f"{name} needs a value; if it begins with a dash, write {name}=VALUE") from None
    if left:
        raise UsageError(f"unexpected argument {left[0]!r}: see {parser.prog} --help")
    return vars(found)


def _spell(word: str, options: list[str]) -> str:
    """Return a word of the command line, with underscores if it is an option; values stay.

    Raises:
        UsageError: If it is an unknown option.
    """
    name, equals, value = word.partition("=")
    if not re.fullmatch(r"--[A-Za-z][\w-]*", name):
        return word
    if (spelled := f"--{name[2:].replace('-', '_')}") not in options:
        raise UsageError(f"unknown option {name}: {did_you_mean(name, options)}")
    return f"{spelled}{equals}{value}"


def _function_parser(function: Callable[..., None]) -> tuple[_Parser, list[str]]:
    """Return a parser for the parameters of a function, and the names of its options.

    Required parameters and the first one are positional; one of type list takes one or more values. The others are
    options; one of type tuple takes one or more values, and one that is False by default is a flag.
    """
    import docstring_parser

    text = docstring_parser.parse(function.__doc__ or "")
    help_of = {item.arg_name: " ".join((item.description or "").split()) for item in text.params}
    parameters = inspect.signature(function).parameters
    places = [
        name for i, name in enumerate(parameters) if i == 0 or parameters[name].default is inspect.Parameter.empty
    ]
    prog = f"dualenc {command_name(function)}"
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *(_usage(parameters[name]) for name in places), "[options]"]),
        description="\n\n".join(filter(None, (text.short_description, text.long_description))),
        formatter_class=partial(_Formatter, width=_columns(), max_help_position=30),
        add_help=False,
        exit_on_error=False,
    )
    needed, optional = parser.add_argument_group("arguments"), parser.add_argument_group("options")
    for name, parameter in parameters.items():
        kind, default = parameter.annotation, parameter.default
        several = typing.get_origin(kind) if typing.get_origin(kind) in (list, tuple) else None
        kind = typing.get_args(kind)[0] if several else kind
        said = f" Default: {default}." if isinstance(default, (str, int, float, Path)) and str(default) else ""
        about: dict[str, Any] = {"help": (help_of[name] + ("" if default is False else said)).replace("%", "%%")}
        about |= {"nargs": "+"} if several else {}
        if name in places:
            about |= {} if default is inspect.Parameter.empty else {"nargs": "?", "default": default}
            needed.add_argument(name, metavar=name.upper(), type=partial(_convert, name.upper(), kind), **about)
        elif default is False:
            optional.add_argument(f"--{name}", action="store_true", **about)
        else:
            word = metavar(inspect.formatannotation(kind))
            about |= {"metavar": word, "type": partial(_convert, f"--{name}", kind), "default": default}
            about |= {"action": _Several} if several else {}
            short = [f"-{name}"] if len(name) == 1 else []
            optional.add_argument(f"--{name}", *short, **about)
    optional.add_argument("-h", "--help", action="help", help="print this text")
    return parser, [*(f"--{name}" for name in parameters if name not in places), "--help"]


def _usage(parameter: inspect.Parameter) -> str:
    """Return a positional argument in a line of usage."""
    name = parameter.name.upper()
    name = f"{name}..." if typing.get_origin(parameter.annotation) is list else name
    return name if parameter.default is inspect.Parameter.empty else f"[{name}]"


def _convert(name: str, annotation: Any, text: str) -> Any:
    """Return the value of an argument.

    Raises:
        UsageError: If the text is not such a value.
    """
    kinds = [one for one in members(annotation) if one is not NoneType]
    value: Any = text
    if any(typing.get_origin(one) is list for one in kinds):
        import yaml

        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = {}  # which does not fit
        if not isinstance(value, list):
            raise UsageError(f'{name} must be a list such as \'["a", "b"]\', found {text!r}')
        return value
    if not fits(text, Union[tuple(kinds)]):  # noqa: UP007
        raise UsageError(must_be(name, Union[tuple(kinds)], text))  # noqa: UP007
    if typing.get_origin(kinds[0]) is Literal:
        return next(choice for choice in choices(annotation) if str(choice) == text)
    return text.lower() in ("true", "yes") if kinds[0] is bool else kinds[0](text)


def _fail(error: object, status: int) -> NoReturn:
    """Print one line on standard error, and exit."""
    text = one_line(error)
    if hits_file_limit(text) and "ulimit" not in text:
        text = f"{text}; {file_limit()}"
    print(f"dualenc: error: {text}", file=sys.stderr)
    raise SystemExit(status)
