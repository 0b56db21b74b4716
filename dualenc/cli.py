"""The command line, and the only parser.

`fit`, `validate`, `test` and `predict` are LightningCLI's; every other command is a plain function, of
`dualenc.commands`, `dualenc.evaluating` and `dualenc.exchanging` but for the demo, parsed by jsonargparse from its
signature. A user's mistake is one line on standard error, never a traceback: exit status 2 for wrong use, 1 for work
that failed, 75 for a run that a signal stopped and that can go on.
"""

import inspect
import logging
import re
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser, set_parsing_settings

from dualenc import commands, evaluating, exchanging
from dualenc.commands import UsageError, WorkError, config_folder

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def demo(out: Path = Path("demo")) -> None:
    """Draws scenes, trains on them, measures: minutes on two CPU cores.

    Args:
        out: folder for shards, run and results; must not exist yet.
    """
    from dualenc.demo import run

    if out.exists():
        raise UsageError(f"{out} exists already: name another folder, or remove it")
    run(out, config_folder() / "smoke.yaml", _trainer_command)


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


def _trainer_command(arguments: list[str]) -> None:
    """LightningCLI with this package's defaults."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import RichProgressBar
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from dualenc import DataError
    from dualenc.training.checkpoint import checkpoints, newest, verify
    from dualenc.training.log import MetricsFile
    from dualenc.training.ranks import STOPPED, Stopped, meet_anew
    from dualenc.training.run import RunDirectory
    from dualenc.training.task import say

    # Lightning turns it on: what configuration runs should not come from elsewhere, and no shard be taken for one.
    set_parsing_settings(config_read_mode_urls_enabled=False, config_read_mode_fsspec_enabled=False)
    # Lightning's greetings and tips hide what matters; its warnings stay.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The number of training batches")  # of its logging; ours counts through epochs
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # its own business with torch
    meet_anew()
    begun = False

    class Begin(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            nonlocal begun
            begun = True

        on_validation_start = on_test_start = on_train_start

    class Parser(LightningArgumentParser):
        error = _Parser.error

    class CLI(LightningCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = parser.parse_args(args)

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(RunDirectory, "run")
            parser.link_arguments("seed_everything", "model.init_args.seed")
            parser.link_arguments("seed_everything", "data.init_args.seed")
            for source, target in (("preprocess", "preprocess"), ("text_config", "text")):
                # As dicts: jsonargparse makes the dataclass itself.
                parser.link_arguments(f"model.{source}", f"data.init_args.{target}", asdict, apply_on="instantiate")
            parser.link_arguments("model.masked", "data.init_args.mask", apply_on="instantiate")
            parser.link_arguments("model.heads", "data.init_args.heads", _as_dicts, apply_on="instantiate")

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            config = self.config[str(self.subcommand)].clone()
            config.pop("config", None)  # where it was read from is no part of it
            config["ckpt_path"], config["run"]["accept_changes"] = None, []  # nor is where it went on
            self._get(self.config_init, "run").config_yaml = self._parser(self.subcommand).dump(config, skip_none=False)
            trainer = super().instantiate_trainer(**kwargs)
            if self.subcommand == "fit":
                trainer.loggers = [MetricsFile(trainer.default_root_dir), *trainer.loggers]
            return trainer

        def before_fit(self) -> None:
            checkpoint = self._get(self.config, "ckpt_path")
            root = Path(self.trainer.default_root_dir)
            taken = (root / "run.json").exists()
            if checkpoint and taken and root.resolve() not in Path(checkpoint).resolve().parents:
                raise UsageError(f"--ckpt_path {checkpoint} is not of the run in {root}: name its folder, or a new one")
            self._get(self.config_init, "run").goes_on = bool(checkpoint) or self.begins_anew
            if checkpoint and hasattr(self.model, "pretrained"):
                self.model.pretrained = False  # the checkpoint has its own weights, and the file may be gone

        def before_validate(self) -> None:
            if not self._get(self.config, "ckpt_path"):
                raise UsageError(f"{self.subcommand} needs --ckpt_path: without it there are only random weights")

        before_test = before_validate

        def before_predict(self) -> None:
            if not is_overridden("predict_step", self.model):
                raise UsageError(
                    f"{type(self.model).__name__} predicts nothing; embed by `dualenc.load(RUN).embed_images(...)`"
                )
            self.before_validate()

        def after_validate(self) -> None:
            if not self.trainer.is_global_zero:
                return
            for name, value in sorted(self.trainer.callback_metrics.items()):
                print(f"{name:45} {value:.4g}")

        after_test = after_validate

        def _parse_ckpt_path(self) -> None:
            """Finds the checkpoint that is meant; what it holds must not override the command line."""
            config = self.config[self.config["subcommand"]]
            given = config.get("ckpt_path")
            own = given in ("auto", "last")
            self.begins_anew = False
            if not given:
                return
            path = Path(config["trainer"]["default_root_dir"] if own else given)
            if path.is_dir() or own:
                folder = path / "checkpoints" if own or (path / "checkpoints").is_dir() else path
                found = newest(folder, say)
                if found is None and checkpoints(folder):
                    raise UsageError(f"all checkpoints in {folder} are damaged: remove the folder {path} to begin anew")
                self.begins_anew = found is None and given == "auto"
                if found is None and not self.begins_anew:
                    raise UsageError(f"{folder} holds no checkpoint: --ckpt_path auto begins where there is none")
                config["ckpt_path"] = found and str(found)
            elif path.is_file():
                verify(path)
            else:
                raise UsageError(f"--ckpt_path {given} is no local file or folder, nor auto, nor last")

        def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
            """Checkpoints are data, never pickled code."""
            return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    try:
        CLI(
            parser_class=Parser,
            trainer_defaults={
                "default_root_dir": "runs/dualenc",
                "logger": False,
                "use_distributed_sampler": False,  # the plan gives each rank its part
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 10,
                "enable_model_summary": False,
                "enable_progress_bar": sys.stderr.isatty(),
                "callbacks": [Begin(), *([RichProgressBar()] if sys.stderr.isatty() else [])],
            },
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            load_from_checkpoint_support=False,
            args=arguments,
        )
    except Stopped as stop:
        say(f"dualenc: {stop}")
        raise SystemExit(STOPPED) from None
    except (ValueError, MisconfigurationException) as error:
        if not begun:
            raise UsageError(error) from error
        if isinstance(error, DataError):
            raise WorkError(error) from error
        raise


def _as_dicts(configs: dict[str, Any]) -> dict[str, Any]:
    """jsonargparse makes the dataclasses itself."""
    return {name: asdict(config) for name, config in configs.items()}


def _run(arguments: list[str]) -> None:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in TRAINER_COMMANDS:
        _trainer_command(arguments)
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
    from dualenc.data.errors import one_line

    text = one_line(error)
    # jsonargparse tells of each type that a value might have had, and repeats the value; what went wrong is the first.
    text = re.sub(r"Does not validate against any of the Union subtypes .*?Errors: - ", "", text)
    text = re.sub(r" - Expected a <class 'NoneType'> Given value type: .*", "", text)
    print(f"dualenc: error: {text}", file=sys.stderr)
    raise SystemExit(status)
