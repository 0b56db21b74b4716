"""`dualenc fit`, `validate`, `test` and `predict`: LightningCLI with this package's defaults."""

import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings

from dualenc.cli.common import UsageError, WorkError


def trainer_command(arguments: list[str]) -> None:
    """LightningCLI with this package's defaults."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import RichProgressBar
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from dualenc import DataError
    from dualenc.training.checkpoint import checkpoints, newest, verify
    from dualenc.training.csv_logger import MetricsFile
    from dualenc.training.ranks import STOPPED, Stopped, meet_anew
    from dualenc.training.run_directory import RunDirectory
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
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
            raise UsageError(message)

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
