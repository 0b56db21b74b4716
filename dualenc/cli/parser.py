"""The command line, and the only parser.

`fit`, `validate`, `test` and `predict` are LightningCLI's; every other command is a plain function of a module beside
this one, parsed by jsonargparse from its signature. A user's mistake is one line on standard error, never a traceback:
exit status 2 for wrong use, 1 for work that failed, 75 for a run that a signal stopped and that can go on.
"""

import inspect
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dualenc.cli import data, demo, evaluate, models
from dualenc.cli.common import UsageError, WorkError
from dualenc.utils.errors import DataError, ModelError
from dualenc.utils.text import one_line

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

COMMANDS: dict[str, Callable[..., None]] = {
    function.__name__.strip("_").replace("_", "-"): function
    for function in (
        demo.demo,
        data.configs,
        data.make_shards,
        data.index,
        data.doctor,
        data.shrink,
        data.tokenizer,
        evaluate.evaluate,
        evaluate.zeroshot,
        evaluate.retrieval,
        evaluate.choice,
        evaluate.probe,
        evaluate.compare,
        models.embed,
        models.interpolate,
        models.import_,
        models.export,
        models.push,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit with its status where it fails."""
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except (UsageError, DataError, ModelError) as error:
        _fail(error, 2)
    except WorkError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


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
        from importlib.metadata import version

        print(f"dualenc {version('dualenc')}")
    elif command in ("--help", "-h"):
        print("usage: dualenc COMMAND ...\n\nWhat it can do; `dualenc COMMAND --help` says how:\n")
        print("  fit, validate, test, predict   train and measure by a configuration: --config FILE [--key value]")
        for name, function in COMMANDS.items():
            print(f"  {name:30} {(function.__doc__ or '').splitlines()[0]}")
    else:
        raise UsageError(f"there is no command {command!r}, only {', '.join((*TRAINER_COMMANDS, *COMMANDS))}")


def _function_parser(function: Callable[..., None]) -> Any:
    """Return a parser in which required parameters and the first one are positional, and a list takes one or more.

    The others are options; of these, a tuple takes one or more too, and what is false by default is a switch.
    """
    import docstring_parser
    from jsonargparse import ArgumentParser

    class _Parser(ArgumentParser):
        """Leaves errors to `main`, which prints them."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
            raise UsageError(message)

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


def _fail(error: object, status: int) -> NoReturn:
    """Print one line on standard error, and exit."""
    text = one_line(error)
    # jsonargparse tells of each type that a value might have had, and repeats the value; what went wrong is the first.
    text = re.sub(r"Does not validate against any of the Union subtypes .*?Errors: - ", "", text)
    text = re.sub(r" - Expected a <class 'NoneType'> Given value type: .*", "", text)
    print(f"dualenc: error: {text}", file=sys.stderr)
    raise SystemExit(status)
