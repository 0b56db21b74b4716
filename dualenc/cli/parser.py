"""The command line, and the only parser.

LightningCLI parses `fit`, `validate`, `test` and `predict`. Every other command is a plain function in a module of this
package, and jsonargparse parses its signature. A user's mistake is one line on standard error, never a traceback. The
exit status is 2 for wrong use, 1 for failed work, 75 for a run that a signal stopped and that can be resumed, and 130
for a command that Ctrl-C ended.
"""

import inspect
import re
import sys
import typing
from collections.abc import Callable
from typing import Any, NoReturn

from dualenc.cli import data, demo, evaluate, models
from dualenc.cli.common import UsageError, WorkError
from dualenc.utils.errors import DataError, ModelError
from dualenc.utils.limits import file_limit, hits_file_limit
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
        evaluate.sets,
        evaluate.compare,
        models.embed,
        models.interpolate,
        models.import_,
        models.export,
        models.push,
    )
}


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
        from dualenc.cli.fit import trainer_command

        trainer_command(arguments)
    elif command in COMMANDS:
        function = COMMANDS[command]
        # Options may be spelled with dashes, as in most programs.
        rest = [re.sub(r"^--[a-z][a-z-]*", lambda name: f"--{name[0][2:].replace('-', '_')}", word) for word in rest]
        function(**vars(_function_parser(function).parse_args(rest)))
    elif command == "--version":
        from importlib.metadata import version

        print(f"dualenc {version('dualenc')}")
    elif command in ("--help", "-h"):
        print("usage: dualenc COMMAND ...\n\nCommands (`dualenc COMMAND --help` prints the options of one):\n")
        print("  fit, validate, test, predict   Train or evaluate a model: --config FILE [--key value]")
        for name, function in COMMANDS.items():
            print(f"  {name:30} {(function.__doc__ or '').splitlines()[0]}")
    else:
        raise UsageError(f"unknown command {command!r}: choose one of {', '.join((*TRAINER_COMMANDS, *COMMANDS))}")


def _function_parser(function: Callable[..., None]) -> Any:
    """Return a parser for the parameters of a function.

    Required parameters and the first one are positional; one of type list takes one or more values. The others are
    options; one of type tuple takes one or more values, and one that is False by default is a flag.
    """
    import docstring_parser
    from jsonargparse import ArgumentParser

    class _Parser(ArgumentParser):
        """Parser that raises its errors, so that `main` prints them."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
            raise UsageError(message)

    text = docstring_parser.parse(function.__doc__ or "")
    name = function.__name__.strip("_").replace("_", "-")
    parser = _Parser(prog=f"dualenc {name}", description=text.short_description)
    help_of = {item.arg_name: item.description for item in text.params}
    added = set()
    for i, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        required = parameter.default is inspect.Parameter.empty
        if required or i == 0:
            added.add(name)
            is_list = typing.get_origin(parameter.annotation) is list
            kind = typing.get_args(parameter.annotation)[0] if is_list else parameter.annotation
            options: dict[str, Any] = {"nargs": "+"} if is_list else {} if required else {"nargs": "?"}
            options |= {} if required else {"default": parameter.default}
            parser.add_argument(name, type=kind, help=help_of[name], **options)
        elif parameter.default is False:
            added.add(name)
            parser.add_argument(f"--{name}", action="store_true", help=help_of[name])
        elif typing.get_origin(parameter.annotation) is tuple:
            added.add(name)
            kind = typing.get_args(parameter.annotation)[0]
            parser.add_argument(f"--{name}", type=kind, nargs="+", default=[], help=help_of[name])
    parser.add_function_arguments(function, skip=added)
    return parser


def _fail(error: object, status: int) -> NoReturn:
    """Print one line on standard error, and exit."""
    text = one_line(error)
    # jsonargparse lists an error for each type that a value may have, and repeats the value: keep the first error only.
    text = re.sub(r"Does not validate against any of the Union subtypes .*?Errors: - ", "", text)
    text = re.sub(r" - Expected a <class 'NoneType'> Given value type: .*", "", text)
    if hits_file_limit(text) and "ulimit" not in text:
        text = f"{text}; {file_limit()}"
    print(f"dualenc: error: {text}", file=sys.stderr)
    raise SystemExit(status)
