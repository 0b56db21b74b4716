"""`dualenc fit`, `validate`, `test` and `predict`: LightningCLI with the defaults of this package."""

import inspect
import logging
import os
import re
import warnings
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

from dualenc.cli.common import UsageError, WorkError
from dualenc.cli.settings import TRAINER_DEFAULTS, Settings, decode_config, parameters, read_config
from dualenc.data.images import Preprocess
from dualenc.formats.timm import load_image_weights
from dualenc.inference.embedder import load
from dualenc.models import ImageEncoder
from dualenc.training.checkpoint import list_checkpoints, newest_checkpoint, verify_checkpoint
from dualenc.training.contrastive import ContrastiveTask, is_model
from dualenc.training.csv_logger import MetricsFile
from dualenc.training.lightning_internals import BaseCLI, after_process_group, raise_timeout, rank_from_environment
from dualenc.training.progress import Progress
from dualenc.training.ranks import STOPPED, Stopped, collective_timeout, use_new_store_after_restart
from dualenc.training.run_directory import RunDirectory
from dualenc.training.run_lock import RunLock
from dualenc.training.task import RunError, rank_zero_print
from dualenc.utils.errors import DataError
from dualenc.utils.text import one_line, reason


class Parser(LightningArgumentParser):
    """Parser that raises its errors, so that `dualenc.cli.main` prints them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Raise a UsageError with the message."""
        raise UsageError(plain_message(message))

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """Parse a configuration file, after a check that it is a text.

        Raises:
            UsageError: If the file is not UTF-8, which is all that jsonargparse reads; the message names it.
        """
        with suppress(OSError):  # jsonargparse tells which file is missing.
            decode_config(Path(path))
        return super().parse_path(path, *args, **options)


class StartRecorder(Callback):
    """Callback that records whether a run has started: before that, an error is a user's mistake.

    Attributes:
        started: whether training, validation or testing has started.
    """

    def __init__(self) -> None:
        self.started = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Record that training has started."""
        self.started = True

    on_validation_start = on_test_start = on_train_start


class CLI(BaseCLI):
    """LightningCLI with a run directory, links between model and data, and `--ckpt_path auto`."""

    is_new_run = False  # whether --ckpt_path auto has found no checkpoint
    lock: RunLock | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        finally:
            if self.lock is not None:
                self.lock.release()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, without Lightning's warning that they differ from `sys.argv`."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section `run`, and link the settings that the data share with the task."""
        parser.add_lightning_class_args(RunDirectory, "run")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("data.init_args.tokenizer", "model.init_args.tokenizer")
        for source, target in (("preprocess", "preprocess"), ("text_config", "text")):
            # As dicts, from which jsonargparse makes the dataclasses itself.
            parser.link_arguments(f"model.{source}", f"data.init_args.{target}", asdict, apply_on="instantiate")
        parser.link_arguments("model.masked", "data.init_args.mask", apply_on="instantiate")
        parser.link_arguments("model.heads", "data.init_args.heads", heads_as_dicts, apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Instantiate the trainer, pass the configuration to the run directory, and log to `metrics.csv`."""
        config = self.config[str(self.subcommand)].clone()
        config.pop("config", None)  # the path of the file is not a setting of the run
        config["ckpt_path"], config["run"]["accept_changes"] = None, []  # nor is how it was resumed
        self.instance("run").config_yaml = self.dump(config)
        options = self.instance("trainer")
        callbacks = options["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]  # the trainer takes a single one too
        shown = options["enable_progress_bar"] is not False
        if shown and not any(isinstance(one, ProgressBar) for one in callbacks):
            trainer = super().instantiate_trainer(enable_progress_bar=False, **kwargs)
            trainer.callbacks.insert(0, Progress())  # type: ignore[attr-defined]
        else:  # none at all, or one of the user's own
            trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit":
            trainer.loggers = [MetricsFile(trainer.default_root_dir), *trainer.loggers]
        return trainer

    def before_fit(self) -> None:
        """Refuse a checkpoint of another run, and do not load pretrained weights if there is a checkpoint."""
        checkpoint, root = self.setting("ckpt_path"), Path(self.trainer.default_root_dir)
        taken = (root / "run.json").exists()
        if checkpoint and taken and root.resolve() not in Path(checkpoint).resolve().parents:
            raise UsageError(
                f"--ckpt_path {checkpoint} is not a checkpoint of the run in {root}: set --trainer.default_root_dir to "
                "the folder of its run, or to a new one"
            )
        run = self.instance("run")
        run.may_exist, run.lock = bool(checkpoint) or self.is_new_run, self.lock
        raise_timeout(self.trainer.strategy, collective_timeout(run.stall_seconds))
        after_process_group(self.trainer, partial(run.take_lock, self.trainer))
        if checkpoint and hasattr(self.model, "pretrained"):
            self.model.pretrained = False  # the checkpoint has all weights, and the pretrained file may be gone

    def before_validate(self) -> None:
        """Refuse to evaluate random weights."""
        if not self.setting("ckpt_path"):
            raise UsageError(f"{self.subcommand} needs --ckpt_path: without it the weights are random")

    before_test = before_validate

    def before_predict(self) -> None:
        """Refuse a task without predictions."""
        if not is_overridden("predict_step", self.model):
            raise UsageError(
                f"{type(self.model).__name__} has no predictions: to embed images, run `dualenc embed`, or use "
                "`dualenc.load(RUN).embed_images(...)` in Python"
            )
        self.before_validate()

    def after_validate(self) -> None:
        """Print the metrics."""
        if self.trainer.is_global_zero:
            for name, value in sorted(self.trainer.callback_metrics.items()):
                print(f"{name:45} {value:.4g}")

    after_test = after_validate

    def resolve_checkpoint(self) -> None:
        """Replace `auto`, `last` and folders by the newest undamaged checkpoint; compare a file with its checksum.

        `fit` locks the run directory before, so that no other run writes a checkpoint in the meantime.
        """
        config = self.config[self.config["subcommand"]]
        root = Path(config["trainer"]["default_root_dir"] or os.getcwd()).expanduser()  # as the trainer does
        if self.config["subcommand"] == "fit":
            self.lock = RunLock(root)
            if rank_from_environment() == 0:
                self.lock.acquire()
        given = config.get("ckpt_path")
        in_run = given in ("auto", "last")
        if not given:
            return
        path = root if in_run else Path(given)
        if path.is_dir() or in_run:
            folder = path / "checkpoints" if in_run or (path / "checkpoints").is_dir() else path
            found = newest_checkpoint(folder, rank_zero_print)
            if found is None and list_checkpoints(folder):
                raise UsageError(f"all checkpoints in {folder} are damaged: to start from the beginning, remove {path}")
            self.is_new_run = found is None and given == "auto"
            if found is None and not self.is_new_run:
                raise UsageError(f"{folder} holds no checkpoint: --ckpt_path auto starts a new run in this case")
            config["ckpt_path"] = found and str(found)
        elif path.is_file():
            verify_checkpoint(path)
        else:
            raise UsageError(f"--ckpt_path {given} does not exist: it must be a local file or folder, auto, or last")


def check_settings(command: str, words: list[str]) -> list[str]:
    """Check the settings of a command; see `Settings.check`."""
    passed = set(inspect.signature(getattr(Trainer, command)).parameters) - LightningCLI.subcommands()[command]
    sections = {
        **dict.fromkeys(passed - {"self"}, Any),
        "ckpt_path": str | None,
        "seed_everything": bool | int,
        "trainer": parameters(Trainer),
        "model": LightningModule,
        "data": LightningDataModule,
        "run": parameters(RunDirectory),
    }
    return Settings(sections).check(words)


def plain_message(message: str) -> str:
    """Return a message of jsonargparse without the names of its classes, and with the whole path of the key."""
    text = one_line(message)
    path = ".".join(re.findall(r'Parser key "([^"]+)": ', text))
    text = re.sub(r'Parser key "[^"]+": ', "", text)
    # jsonargparse lists an error for each type that a value may have, and repeats the value: keep the first error only.
    text = re.sub(r"Does not validate against any of the Union subtypes .*?Errors: - ", "", text)
    text = re.sub(r" - Expected an? <class 'NoneType'>", "", text)
    text = re.sub(r" (Given value type: .*|Got value: (Namespace|\{).*)", "", text)
    text = re.sub(r"Type \S.* expects a function or a callable class: ", "", text)
    text = text.replace("Expected a tuple", "Expected a list")  # as YAML calls it
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", lambda found: f"one of {found[1]}", text)
    return f"{path}: {text}" if path else text


def heads_as_dicts(configs: dict[str, Any]) -> dict[str, Any]:
    """Return the configurations of heads as dicts, from which jsonargparse makes the dataclasses itself."""
    return {name: asdict(config) for name, config in configs.items()}


def start_cli(kind: type[CLI], words: list[str], callbacks: list[Callback]) -> None:
    """Parse the words of a command line, and run its subcommand.

    Args:
        kind: class of the command line.
        words: the subcommand and its options, checked.
        callbacks: callbacks of the trainer, besides those of the configuration.
    """
    # Lightning enables URLs here. A configuration is code, so it must be a local file, and a shard's URL must not be
    # taken for a configuration.
    set_parsing_settings(config_read_mode_urls_enabled=False, config_read_mode_fsspec_enabled=False)
    # Lightning's greetings and tips hide the messages of a run; its warnings stay.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The number of training batches")  # about its own logging, which is not used
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # about its own use of torch
    kind(
        parser_class=Parser,
        trainer_defaults={**TRAINER_DEFAULTS, "callbacks": callbacks},
        seed_everything_default=0,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        load_from_checkpoint_support=False,
        args=words,
    )


def trainer_command(arguments: list[str]) -> None:
    """Run `fit`, `validate`, `test` or `predict`.

    Args:
        arguments: the subcommand and its options.
    """
    use_new_store_after_restart()
    recorder = StartRecorder()
    try:
        start_cli(CLI, [arguments[0], *check_settings(arguments[0], arguments[1:])], [recorder])
    except Stopped as stop:
        rank_zero_print(f"dualenc: {stop}")
        raise SystemExit(STOPPED) from None
    except OSError as error:
        if not recorder.started:
            raise WorkError(f"{error.filename or 'the run cannot begin'}: {reason(error)}") from error
        raise
    except RunError as error:
        raise WorkError(error) from error
    except (ValueError, MisconfigurationException) as error:
        if "gpu backend" in str(error):
            raise UsageError("trainer.accelerator gpu: this machine has no GPU that torch can use; try auto") from error
        if not recorder.started:
            raise UsageError(plain_message(str(error))) from error
        if isinstance(error, DataError):
            raise WorkError(error) from error
        raise


def image_tower(config: str | os.PathLike[str]) -> tuple[ImageEncoder, Preprocess]:
    """Return the image tower that `dualenc fit --config CONFIG` would start with, and its evaluation transform.

    Args:
        config: configuration of a `ContrastiveTask`.

    Raises:
        DataError: If the file is not such a configuration.
    """
    try:
        content = read_config(config).values
    except UsageError as error:
        raise DataError(error) from None
    if "model" not in content:
        raise DataError(f"{config} has no section model: it is not a configuration of dualenc fit")
    seed = content.get("seed_everything", 0)
    set_parsing_settings(config_read_mode_urls_enabled=False, config_read_mode_fsspec_enabled=False)  # as in `fit`
    parser = Parser()
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)  # type: ignore[type-abstract]
    try:
        section = parser.parse_object({"model": content["model"]})
        if isinstance(seed, int) and not isinstance(seed, bool):
            seed_everything(seed, workers=True, verbose=False)
        task = parser.instantiate_classes(section)["model"]
    except (ValueError, UsageError) as error:
        raise DataError(f"{config}: {plain_message(str(error))}") from None
    if not isinstance(task, ContrastiveTask):
        raise DataError(f"{config}: model is a {type(task).__name__}, which has no image tower")
    source = task.pretrained
    tower = task.model.image
    if isinstance(source, str) and is_model(source):
        tower.load_pretrained(load(source, "cpu").dual_encoder.image.vit.state_dict())
    elif source:
        load_image_weights(tower, source if isinstance(source, str) else None)
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise DataError(f"{config}: seed_everything {seed} gives another random tower each time: set it to a number")
    return tower.eval(), task.preprocess
