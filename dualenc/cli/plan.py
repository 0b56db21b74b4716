"""`dualenc plan`: what a run needs, said before it begins, from the configuration that `fit` would take."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy

from dualenc.cli.common import UsageError
from dualenc.cli.fit import CLI, check_settings, plain_message, start_cli
from dualenc.cli.fit_help import PLAN_OPTIONS
from dualenc.training import EMA
from dualenc.training.plan import Plan, PlanOptions
from dualenc.utils.text import did_you_mean, print_message


class PlanCLI(CLI):
    """The command line of `fit`, which builds the task without weights, and prints a plan in place of training."""

    given: dict[str, float]  # values of the options that only `plan` has

    def resolve_checkpoint(self) -> None:
        """Ignore `ckpt_path`: a plan neither reads a checkpoint nor locks the run directory."""

    def before_instantiate_classes(self) -> None:
        """Build the task on device "meta", where weights take neither memory nor time."""
        self.parser.add_instantiator(_on_meta, LightningModule, prepend=True)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Return this object in place of a trainer, which this machine may not have the devices for."""
        return self

    def before_fit(self) -> None:
        """Check nothing: no run begins."""

    def fit(self, model: Any, datamodule: Any, **kwargs: Any) -> None:
        """Print the plan."""
        trainer = self.instance("trainer")
        callbacks = trainer["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        options = PlanOptions(
            precision=str(trainer["precision"] or "32-true"),
            devices=_device_count(trainer["devices"]),
            nodes=trainer["num_nodes"],
            sharded=isinstance(trainer["strategy"], ModelParallelStrategy),
            bucket_views=_has_bucket_views(self.setting("trainer")["strategy"]),
            averaged=any(isinstance(one, EMA) for one in callbacks),
            max_epochs=trainer["max_epochs"],
            max_steps=trainer["max_steps"],
            device_memory=self.given.get("device_memory"),
            tokens=int(self.given["tokens"]) if "tokens" in self.given else None,
            samples_per_second=self.given.get("samples_per_second"),
        )
        for title, lines in Plan(model, datamodule, options).sections():
            print(title)
            for name, value, note in lines:
                print(f"  {name:20} {value:>12}  {note}".rstrip())


def plan_command(words: Sequence[str]) -> None:
    """Print the plan of a run.

    Args:
        words: the options: those of `fit`, and `PLAN_OPTIONS`.
    """
    PlanCLI.given, rest = take_options(words)
    try:
        start_cli(PlanCLI, ["fit", *check_settings("fit", rest)], [])
    except ValueError as error:
        raise UsageError(plain_message(str(error))) from error


def take_options(words: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Divide the words of a command line into the options of `plan` alone, with their values, and the other words.

    Raises:
        UsageError: If a value is not a positive number.
    """
    names = [label.split()[0].removeprefix("--") for label in PLAN_OPTIONS]
    given: dict[str, float] = {}
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name not in names:
            if word.startswith("--") and "." not in name and did_you_mean(name, names, ""):
                raise UsageError(f"unknown option {word}: {did_you_mean(name, names)}")
            rest.append(word)
            continue
        value = value if equals else left.pop(0) if left else ""
        given[name] = _positive(f"--{name}", value, whole=name == "tokens")
    return given, rest


def _positive(name: str, text: str, whole: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (whole and value != int(value)):
        raise UsageError(f"{name} must be a positive {'whole ' if whole else ''}number, found {text!r}")
    return value


def _on_meta(kind: type, *args: Any, **kwargs: Any) -> Any:
    """Build an object whose parameters have shapes only."""
    with torch.device("meta"):
        return kind(*args, **kwargs)


def _device_count(devices: Any) -> int:
    """Return the number of devices of a machine that `trainer.devices` names; 1 if that is left to the machine."""
    if isinstance(devices, list):
        return len(devices)
    found = str(devices)
    if "," in found:
        return len([part for part in found.split(",") if part.strip()])
    if found.isdigit() and int(found) > 0:
        return int(found)
    print_message(f"trainer.devices {devices}: planned for one GPU; give --trainer.devices N for another number")
    return 1


def _has_bucket_views(strategy: Any) -> bool:
    """Return whether the settings of a strategy let DDP keep the gradients in its buckets."""
    if not hasattr(strategy, "get"):
        return False
    return any(bool((strategy.get(part) or {}).get("gradient_as_bucket_view")) for part in ("init_args", "dict_kwargs"))
