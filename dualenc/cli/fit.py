"""`dualenc fit`, `validate`, `test` and `predict`: LightningCLI with the defaults of this package."""

import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden

from dualenc.cli.common import UsageError, WorkError
from dualenc.data.images import Preprocess
from dualenc.inference.embedder import load
from dualenc.models import ImageEncoder
from dualenc.training.checkpoint import checkpoints, newest, verify
from dualenc.training.contrastive import ContrastiveTask, is_model
from dualenc.training.csv_logger import MetricsFile
from dualenc.training.lightning_internals import OpenCLI
from dualenc.training.ranks import STOPPED, Stopped, meet_anew
from dualenc.training.run_directory import RunDirectory
from dualenc.training.task import say
from dualenc.utils.errors import DataError
from dualenc.utils.text import reason


class Parser(LightningArgumentParser):
    """Leaves errors to `dualenc.cli.main`, which prints them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Raise what is wrong."""
        raise UsageError(message)


class Begin(Callback):
    """Notes whether a run has begun: before that, an error is a user's mistake.

    Attributes:
        begun: whether it has.
    """

    def __init__(self) -> None:
        self.begun = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note that training begins."""
        self.begun = True

    on_validation_start = on_test_start = on_train_start


class CLI(OpenCLI):
    """LightningCLI with a run directory, links between model and data, and `--ckpt_path auto`."""

    begins_anew = False  # whether --ckpt_path auto found no checkpoint

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, without a warning that they are not those of the program."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section `run`; give the data what the task has decided."""
        parser.add_lightning_class_args(RunDirectory, "run")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        for source, target in (("preprocess", "preprocess"), ("text_config", "text")):
            # As dicts: jsonargparse makes the dataclass itself.
            parser.link_arguments(f"model.{source}", f"data.init_args.{target}", asdict, apply_on="instantiate")
        parser.link_arguments("model.masked", "data.init_args.mask", apply_on="instantiate")
        parser.link_arguments("model.heads", "data.init_args.heads", _as_dicts, apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the trainer; keep the configuration for the run directory, and log to `metrics.csv`."""
        config = self.config[str(self.subcommand)].clone()
        config.pop("config", None)  # where it was read from is no part of it
        config["ckpt_path"], config["run"]["accept_changes"] = None, []  # nor is where it went on
        self.made("run").config_yaml = self.dump(config)
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit":
            trainer.loggers = [MetricsFile(trainer.default_root_dir), *trainer.loggers]
        return trainer

    def before_fit(self) -> None:
        """Refuse a checkpoint of another run; leave pretrained weights alone where there is one."""
        checkpoint, root = self.given("ckpt_path"), Path(self.trainer.default_root_dir)
        taken = (root / "run.json").exists()
        if checkpoint and taken and root.resolve() not in Path(checkpoint).resolve().parents:
            raise UsageError(f"--ckpt_path {checkpoint} is not of the run in {root}: name its folder, or a new one")
        self.made("run").goes_on = bool(checkpoint) or self.begins_anew
        if checkpoint and hasattr(self.model, "pretrained"):
            self.model.pretrained = False  # the checkpoint has its own weights, and the file may be gone

    def before_validate(self) -> None:
        """Refuse to measure random weights."""
        if not self.given("ckpt_path"):
            raise UsageError(f"{self.subcommand} needs --ckpt_path: without it there are only random weights")

    before_test = before_validate

    def before_predict(self) -> None:
        """Refuse a task that predicts nothing."""
        if not is_overridden("predict_step", self.model):
            raise UsageError(
                f"{type(self.model).__name__} predicts nothing; embed by `dualenc.load(RUN).embed_images(...)`"
            )
        self.before_validate()

    def after_validate(self) -> None:
        """Print the metrics."""
        if self.trainer.is_global_zero:
            for name, value in sorted(self.trainer.callback_metrics.items()):
                print(f"{name:45} {value:.4g}")

    after_test = after_validate

    def find_checkpoint(self) -> None:
        """Replace `auto`, `last` and folders by the newest whole checkpoint; compare a file with its checksum."""
        config = self.config[self.config["subcommand"]]
        given = config.get("ckpt_path")
        own = given in ("auto", "last")
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


def _as_dicts(configs: dict[str, Any]) -> dict[str, Any]:
    """Return the configurations of heads as dicts, of which jsonargparse makes the dataclasses itself."""
    return {name: asdict(config) for name, config in configs.items()}


def trainer_command(arguments: list[str]) -> None:
    """Run `fit`, `validate`, `test` or `predict`.

    Args:
        arguments: the subcommand and its options.
    """
    # Lightning turns it on: what configuration runs should not come from elsewhere, and no shard be taken for one.
    set_parsing_settings(config_read_mode_urls_enabled=False, config_read_mode_fsspec_enabled=False)
    # Lightning's greetings and tips hide what matters; its warnings stay.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The number of training batches")  # of its logging; ours counts through epochs
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # its own business with torch
    meet_anew()
    begin, terminal = Begin(), sys.stderr.isatty()
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
                "enable_progress_bar": terminal,
                "callbacks": [begin, *([RichProgressBar()] if terminal else [])],
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
        if not begin.begun:
            raise UsageError(error) from error
        if isinstance(error, DataError):
            raise WorkError(error) from error
        raise


def image_tower(config: str | os.PathLike[str]) -> tuple[ImageEncoder, Preprocess]:
    """The image tower of the run that `dualenc fit --config CONFIG` would begin, with its weights, and its transform.

    Raises:
        DataError: the file is no such configuration.
    """
    try:
        given = yaml.safe_load(Path(config).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{config} cannot be read as YAML: {reason(error)}") from None
    if not isinstance(given, dict) or "model" not in given:
        raise DataError(f"{config} has no section model: it is no configuration of dualenc fit")
    seed = given.get("seed_everything", 0)
    set_parsing_settings(config_read_mode_urls_enabled=False, config_read_mode_fsspec_enabled=False)  # as in `fit`
    parser = Parser()
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)  # type: ignore[type-abstract]
    try:
        section = parser.parse_object({"model": given["model"]})
        if isinstance(seed, int) and not isinstance(seed, bool):
            seed_everything(seed, workers=True, verbose=False)
        task = parser.instantiate_classes(section)["model"]
    except (ValueError, UsageError) as error:
        raise DataError(f"{config}: {error}") from None
    if not isinstance(task, ContrastiveTask):
        raise DataError(f"{config}: model is a {type(task).__name__}, which has no image tower")
    source = task.pretrained
    tower = task.model.image
    if isinstance(source, str) and is_model(source):
        tower.load_pretrained(load(source, "cpu").dual_encoder.image.vit.state_dict())
    elif source:
        tower.load_pretrained(source if isinstance(source, str) else None)
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise DataError(f"{config}: seed_everything {seed} gives another random tower each time; set it to a number")
    return tower.eval(), task.preprocess
