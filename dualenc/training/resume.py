"""Resuming with other settings: which settings differ from the checkpoint's, and their use from the next step on."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer

from dualenc.training.checkpoint import CheckpointError
from dualenc.training.lightning_internals import steps_at_end
from dualenc.training.optim import WarmupCosine
from dualenc.training.task import Task, rank_zero_print

# The checkpoint has the weights, so it does not matter where the first ones came from.
_MODEL_IGNORED = ("pretrained", "text_from", "grad_checkpointing", "compile", "max_skipped", "seed", "scored_tokens")
# Data are compared by content, in the state of the loader. The others do not change what is trained.
_DATA_BY_CONTENT = ("train", "val", "test", "predict", "tokenizer", "select", "features")
_DATA_IGNORED = ("workers", "timeout", "bad_samples", "cache_gb", "seed")
_TRAINER_COMPARED = (
    "max_epochs", "max_steps", "limit_train_batches", "overfit_batches", "gradient_clip_val",
    "gradient_clip_algorithm",
)  # fmt: skip
_ONLY_AT_START = ("model.init_scale", "model.init_bias")
_HEAD_MEANING = re.compile(r"model\.heads(\..+\.(kind|problem|labels))?")
_TUNINGS = ("model.image_tuning", "model.text_tuning", "model.tuning")
_LENGTH = ("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches", "trainer.overfit_batches",
           "data.batch_size", "data.train", "data.mix")  # fmt: skip
_SCHEDULED = ("model.optimizer", "model.scheduler", *_TUNINGS, *_LENGTH)
# Names in the state of the loader that differ from those of the command line.
_LOADER_NAMES = {
    "fingerprint": "data.train",
    "sources": "data.train",
    "columns": "data.train",
    "labels": "model.heads",
    "seed": "seed_everything",
}

Changes = dict[str, tuple[Any, Any]]  # values of the checkpoint and of this run, by the key on the command line


def compared_settings(config: Mapping[str, Any], trainer: Any) -> dict[str, Any]:
    """Return the settings of a run that a resumed run must share, as nested dicts with the keys of the command line.

    Args:
        config: configuration of `dualenc fit`.
        trainer: trainer, whose data have been set up.
    """
    model, data = (_flattened(config.get(name) or {}) for name in ("model", "data"))
    own = config.get("trainer") or {}
    callbacks = own.get("callbacks") or []
    averages = [
        callback.get("init_args") or {}
        for callback in (callbacks if isinstance(callbacks, list) else [callbacks])
        if isinstance(callback, Mapping) and str(callback.get("class_path")).endswith(".EMA")
    ]
    return {
        "dualenc": version("dualenc"),
        "seed_everything": config.get("seed_everything"),
        "model": {key: value for key, value in model.items() if key not in _MODEL_IGNORED},
        "data": {
            **{key: value for key, value in data.items() if key not in (*_DATA_BY_CONTENT, *_DATA_IGNORED)},
            "val": _held_out(data.get("val"), trainer),
        },
        "trainer": {
            **{key: own.get(key) for key in _TRAINER_COMPARED},
            "precision": str(trainer.precision),  # of which a configuration has several spellings
            "callbacks": averages,
        },
    }


def _held_out(sources: Any, trainer: Any) -> str | None:
    """Return the content of the held-out data, with the columns that text tasks name; None for no data."""
    index = getattr(getattr(trainer, "datamodule", None), "val_index", None)
    if not index:
        return None
    heads = sources.items() if isinstance(sources, Mapping) else ()
    columns = {head: {key: x for key, x in source.items() if key != "files"} for head, source in heads}
    return f"{index.fingerprint} {columns}" if columns else index.fingerprint


def _flattened(value: Any) -> Any:
    """Return a configuration in which arguments of a class are next to its path, as in the keys of the command line."""
    if isinstance(value, list | tuple):
        return [_flattened(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    arguments = value.get("init_args") or {} if "class_path" in value else {}
    rest = {key: part for key, part in value.items() if not ("class_path" in value and key == "init_args")}
    return {key: _flattened(part) for key, part in {**rest, **arguments}.items()}


def find_changes(then: Mapping[str, Any], now: Mapping[str, Any], loader: Mapping[str, tuple[Any, Any]]) -> Changes:
    """Return the settings in which a run differs from the run of its checkpoint.

    Args:
        then: `compared_settings` of the checkpoint's run; empty if the checkpoint has none, as older ones.
        now: `compared_settings` of this run.
        loader: differences of the data loader by its own names, see `Loader.changes`.
    """
    same_version = then.get("dualenc") == now.get("dualenc")
    changes: Changes = {}
    if then and now:
        pairs = ({key: part for key, part in settings.items() if key != "dualenc"} for settings in (then, now))
        changes.update(_differences(*pairs, prefix="", union=same_version))
    for name, values in loader.items():
        changes.setdefault(_LOADER_NAMES.get(name, f"data.{name}"), values)
    return changes


def _differences(
    then: Mapping[str, Any], now: Mapping[str, Any], prefix: str, union: bool
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the differing settings; with `union` false, only those that both have: versions differ in their options."""
    for key in dict.fromkeys([*then, *now]):
        if not union and not (key in then and key in now):
            continue
        before, after = then.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            same_class = before.get("class_path") == after.get("class_path")
            if same_class:
                yield from _differences(before, after, f"{prefix}{key}.", union)
                continue
            before, after = before.get("class_path", before), after.get("class_path", after)
        if before != after:
            yield f"{prefix}{key}", (before, after)


def check_changes(changes: Changes, accepted: Sequence[str], settings: Mapping[str, Any], misfit: str) -> None:
    """Refuse changes that are not accepted or that cannot be used.

    Args:
        changes: differences from the checkpoint's run.
        accepted: keys, or beginnings of keys such as `model.optimizer`, that may differ.
        settings: `compared_settings` of this run, for the names.
        misfit: why the weights of the checkpoint do not fit the model; empty if they do.

    Raises:
        CheckpointError: If a change is refused; the message names it with both values.
    """
    for name in accepted if settings else ():
        if not _is_setting(name, settings) and not any(_covers(name, key) for key in changes):
            raise CheckpointError(
                f"run.accept_changes names {name}, which is not a setting that is compared with the checkpoint's run: "
                "name it as on the command line, such as data.batch_size"
            )
    meanings = [name for name in changes if _HEAD_MEANING.fullmatch(name)]
    never = [name for name in changes if name in (*_ONLY_AT_START, *meanings) or misfit]
    refused = never or [name for name in changes if not any(_covers(one, name) for one in accepted)]
    if not refused:
        if misfit:
            raise CheckpointError(f"the weights of the checkpoint do not fit the model: {misfit}")
        return
    before, now = changes[refused[0]]
    more = f" (and other values of {', '.join(refused[1:])})" if len(refused) > 1 else ""
    what = f"the checkpoint's run had {refused[0]} {_short(before)}, this one has {_short(now)}{more}"
    if misfit:
        raise CheckpointError(f"{what}: the weights do not fit ({misfit}); set it back, or start a new run")
    if refused[0] in meanings:
        raise CheckpointError(f"{what}: the weights of a head belong to its labels; set them back, or start a new run")
    if never:
        raise CheckpointError(f"{what}: it is used only where a run begins; set it back, or start a new run")
    raise CheckpointError(
        f"{what}; if that is intended, --run.accept_changes '[{', '.join(refused)}]' uses the new value from the next "
        "step on"
    )


def _is_setting(name: str, settings: Mapping[str, Any]) -> bool:
    if name in (*_LOADER_NAMES.values(), *(f"data.{key}" for key in _DATA_BY_CONTENT)):
        return True
    value: Any = settings
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def _covers(accepted: str, name: str) -> bool:
    return name == accepted or name.startswith(f"{accepted}.")


def _short(value: Any, longest: int = 80) -> str:
    text = str(value.get("class_path", value) if isinstance(value, Mapping) else value)
    return text if len(text) <= longest else f"{text[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"


class OldOptimizer(NamedTuple):
    """Optimizer state of a checkpoint that the new optimizer cannot load unchanged."""

    state: Mapping[str, Any]
    kind: str  # name of the optimizer's class; empty if it is unknown
    names: Sequence[str]  # of the parameters, in the order of the state


def take_optimizer(checkpoint: dict[str, Any], changes: Changes, trainer: Trainer) -> OldOptimizer | None:
    """Remove the optimizer's state from a checkpoint if accepted changes concern its class or its parameters.

    Args:
        checkpoint: content of the checkpoint, changed in place.
        changes: accepted changes.
        trainer: the trainer.

    Raises:
        CheckpointError: If the strategy has loaded the state already.
    """
    if not any(_covers(one, name) for name in changes for one in ("model.optimizer", *_TUNINGS)):
        return None
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise CheckpointError(
            "ModelParallelStrategy cannot resume with another optimizer or other trained layers: start a new run from "
            "the last model with model.pretrained"
        )
    (state,), checkpoint["optimizer_states"] = checkpoint["optimizer_states"], []
    about = checkpoint.get("optimizer", {})
    return OldOptimizer(state, about.get("class", ""), about.get("parameters", []))


def describe_optimizer(module: LightningModule, optimizer: Optimizer) -> dict[str, Any]:
    """Return the class of an optimizer, and the names of its parameters in the order of its state."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return {"class": type(optimizer).__name__, "parameters": parameters}


def check_scheduler(changes: Changes, schedulers: Iterable[Any]) -> None:
    """Refuse changes of the learning rate under a schedule that is not a function of the step.

    Raises:
        CheckpointError: If there are such changes; names the first.
    """
    others = [one for one in schedulers if not isinstance(one, WarmupCosine)]
    found = [name for name in changes if any(_covers(one, name) for one in _SCHEDULED)]
    if found and others:
        raise CheckpointError(
            f"{found[0]} cannot change under {type(others[0]).__name__}, which keeps the old learning rates: set it "
            "back, start a new run, or train with dualenc.training.WarmupCosine"
        )


def apply_changes(trainer: Trainer, task: Task, changes: Changes, old: OldOptimizer | None) -> None:
    """Use the settings of this run from the next step on, where Lightning has restored those of the checkpoint.

    Under another schedule than `WarmupCosine`, which may change options of the optimizer itself, nothing is done; see
    `check_scheduler`.

    Args:
        trainer: trainer, whose optimizer and schedule Lightning has restored.
        task: task.
        changes: accepted changes.
        old: return of `take_optimizer`.
    """
    (optimizer,) = trainer.optimizers
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler in schedulers:
        if not isinstance(scheduler, WarmupCosine):
            return
        if any(name in _LENGTH for name in changes):
            scheduler.set_total_steps(steps_at_end(trainer))
    for group, options in zip(optimizer.param_groups, task.optimizer_options, strict=True):
        group.update({name: value for name, value in options.items() if name not in ("lr", "initial_lr")})
    if old is not None:
        about = describe_optimizer(task, optimizer)
        number_of = {name: number for number, name in enumerate(about["parameters"])}
        states = old.state["state"] if about["class"] == old.kind else {}
        found = [(name, states[number]) for number, name in enumerate(old.names) if number in states]
        kept = {number_of[name]: state for name, state in found if name in number_of}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": kept})
        if missing := len(number_of) - len(kept):
            rank_zero_print(f"the optimizer starts without a state for {missing} of {len(number_of)} parameters")
