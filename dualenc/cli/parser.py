"""The command line, and the only parser.

`fit`, `validate`, `test` and `predict` are LightningCLI's; every other command is a plain function, of
`dualenc.cli.data`, `dualenc.cli.evaluate` and `dualenc.cli.models` but for the demo, parsed by jsonargparse from its
signature. A user's mistake is one line on standard error, never a traceback: exit status 2 for wrong use, 1 for work
that failed, 75 for a run that a signal stopped and that can go on.
"""

import inspect
import re
import sys
import typing
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser

from dualenc.cli import data as commands
from dualenc.cli import evaluate as evaluating
from dualenc.cli import models as exchanging
from dualenc.cli.common import UsageError, WorkError, config_folder

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def demo(out: Path = Path("demo")) -> None:
    """Draws scenes, trains on them, measures: minutes on two CPU cores.

    Args:
        out: folder for shards, run and results; must not exist yet.
    """
    from dualenc.cli.demo import run
    from dualenc.cli.fit import trainer_command

    if out.exists():
        raise UsageError(f"{out} exists already: name another folder, or remove it")
    run(out, config_folder() / "smoke.yaml", trainer_command)


COMMANDS: dict[str, Callable[..., None]] = {
    function.__name__.strip("_").replace("_", "-"): function
    for function in (
        demo,
        commands.configs,
        commands.make_shards,
        commands.index,
        commands.doctor,
        commands.shrink,
        commands.tokenizer,
        evaluating.zeroshot,
        evaluating.retrieval,
        evaluating.choice,
        evaluating.probe,
        evaluating.compare,
        commands.embed,
        commands.interpolate,
        exchanging.import_,
        exchanging.export,
        exchanging.push,
    )
}


def _run(arguments: list[str]) -> None:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in TRAINER_COMMANDS:
        from dualenc.cli.fit import trainer_command

        trainer_command(arguments)
    elif command in COMMANDS:
        function = COMMANDS[command]
        # Options may be spelled with dashes, as most programs have them.
        rest = [re.sub(r"^--[a-z][a-z-]*", lambda name: f"--{name[0][2:].replace('-', '_')}", word) for word in rest]
        function(**vars(_function_parser(function).parse_args(rest)))
    elif command == "--version":
        print(f"dualenc {version('dualenc')}")
    elif command in ("--help", "-h"):
        print("usage: dualenc COMMAND ...\n\nWhat it can do; `dualenc COMMAND --help` says how:\n")
        print("  fit, validate, test, predict   train and measure by a configuration: --config FILE [--key value]")
        for name, function in COMMANDS.items():
            print(f"  {name:30} {(function.__doc__ or '').splitlines()[0]}")
    else:
        raise UsageError(f"there is no command {command!r}, only {', '.join((*TRAINER_COMMANDS, *COMMANDS))}")


def _function_parser(function: Callable[..., None]) -> ArgumentParser:
    """Required parameters and the first one are positional, a list takes one or more; the others are options.

    Of these, a tuple takes one or more too, and what is false by default is a switch.
    """
    text = docstring_parser.parse(function.__doc__ or "")
    name = function.__name__.strip("_").replace("_", "-")
    parser = _Parser(prog=f"dualenc {name}", description=text.short_description)
    help_of = {item.arg_name: item.description for item in text.params}
    mine = set()
    for i, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        required = parameter.default is inspect.Parameter.empty
        if required or i == 0:
            mine.add(name)
            many = typing.get_origin(parameter.annotation) is list
            kind = typing.get_args(parameter.annotation)[0] if many else parameter.annotation
            how: dict[str, Any] = {"nargs": "+"} if many else {} if required else {"nargs": "?"}
            how |= {} if required else {"default": parameter.default}
            parser.add_argument(name, type=kind, help=help_of[name], **how)
        elif parameter.default is False:
            mine.add(name)
            parser.add_argument(f"--{name}", action="store_true", help=help_of[name])
        elif typing.get_origin(parameter.annotation) is tuple:
            mine.add(name)
            kind = typing.get_args(parameter.annotation)[0]
            parser.add_argument(f"--{name}", type=kind, nargs="+", default=[], help=help_of[name])
    parser.add_function_arguments(function, skip=mine)
    return parser


class _Parser(ArgumentParser):
    """Errors are for `main` to print."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        raise UsageError(message)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; exits with its status."""
    from dualenc import DataError, ModelError

    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except (UsageError, DataError, ModelError) as error:
        _fail(error, 2)
    except WorkError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(error: object, status: int) -> NoReturn:
    """One line on standard error, and the exit status."""
    from dualenc.utils.errors import one_line

    text = one_line(error)
    # jsonargparse tells of each type that a value might have had, and repeats the value; what went wrong is the first.
    text = re.sub(r"Does not validate against any of the Union subtypes .*?Errors: - ", "", text)
    text = re.sub(r" - Expected a <class 'NoneType'> Given value type: .*", "", text)
    print(f"dualenc: error: {text}", file=sys.stderr)
    raise SystemExit(status)
