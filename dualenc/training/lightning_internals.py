"""The private parts of Lightning that a run needs. No other file touches them.

Each function says why it is needed. `tests/training/test_lightning_internals.py` has a test for each that fails when
Lightning changes what the function relies on.
"""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from lightning.fabric.strategies.launchers import subprocess_script
from lightning.fabric.utilities import rank_zero
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, Strategy

# Loops


def restore_loader_states(trainer: Trainer) -> None:
    """Restore the state of the data loaders from the checkpoint, at the start of training.

    Lightning loses it if `configure_optimizers` has created the loader before the checkpoint was read, and if the state
    is that of an epoch's end.
    """
    loop = trainer.fit_loop
    if states := loop._combined_loader_states_to_load:
        assert loop._combined_loader is not None
        loop._combined_loader._load_state_dicts(states)
        loop._combined_loader_states_to_load = []


def validates_by_time(trainer: Trainer) -> bool:
    """Return whether `trainer.val_check_interval` is a time."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def validation_follows(trainer: Trainer) -> bool:
    """Return whether validation or the end of the epoch comes after the batch that has just ended."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return loop._should_check_val_fx(fetcher) or loop._is_training_done


def epoch_is_done(trainer: Trainer) -> bool:
    """Return whether all batches of the epoch are done."""
    return trainer.fit_loop.epoch_loop._is_training_done


# Checkpoints


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Return the content of a checkpoint without writing it. All ranks must call it.

    When `max_steps` ends a run inside an epoch, Lightning counts that epoch as completed. Here it is not, so that a run
    that resumes with more steps resumes inside the epoch.
    """
    content = trainer._checkpoint_connector.dump_checkpoint()
    if trainer.fit_loop.done and not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
        for part in content["loops"]["fit_loop"]["epoch_progress"].values():
            part["processed"] = part["completed"] = part["ready"] - 1
    return content


def loader_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the training loader in a checkpoint."""
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return state


def continue_at_next_epoch(checkpoint: dict[str, Any], state: dict[str, Any]) -> None:
    """Adjust a checkpoint so that training resumes at the beginning of the next epoch.

    Args:
        checkpoint: content of the checkpoint, changed in place.
        state: state of the training loader; its epoch and batch are replaced.
    """
    fit = checkpoint["loops"]["fit_loop"]
    for part in ("total", "current"):
        epochs, batches = fit["epoch_progress"][part], fit["epoch_loop.batch_progress"][part]
        epochs.update(dict.fromkeys(epochs, epochs["ready"]))
        batches.update(dict.fromkeys(batches, batches["ready"] if part == "total" else 0))
    fit["epoch_loop.batch_progress"]["is_last_batch"] = False
    epoch = fit["epoch_progress"]["total"]["completed"]
    fit["state_dict"]["combined_loader"] = [{**state, "epoch": epoch, "batch": 0}]


# Ranks and signals


def disable_signal_handlers(trainer: Trainer) -> None:
    """Keep Lightning from handling signals: its handlers call collectives at whatever point the other ranks are."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def disable_sigterm_broadcast(trainer: Trainer) -> None:
    """Keep Lightning from broadcasting at each step whether rank 0 has received SIGTERM, for which all ranks wait."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def disable_child_observer(trainer: Trainer) -> None:
    """Keep Lightning from killing all ranks when one exits with a non-zero status: a stopped run has such a status."""
    launched = getattr(trainer.strategy.launcher, "procs", [])
    for thread in threading.enumerate():
        if launched and isinstance(thread, subprocess_script._ChildProcessObserver):
            thread._child_processes = []


def find_unused_parameters(strategy: DDPStrategy) -> None:
    """Let DDP find parameters without a gradient, unless the configuration says otherwise.

    Without it DDP sums gradients in another order from its second step on, and the first step of a resumed run is
    another step than in an uninterrupted run.
    """
    strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


def raise_timeout(strategy: Strategy, timeout: timedelta) -> None:
    """Let collectives wait for at least as long as `timeout`, from before the process group exists.

    Strategies on one device have no timeout, and stay as they are.
    """
    if hasattr(strategy, "_timeout"):
        strategy._timeout = max(strategy._timeout or timeout, timeout)  # type: ignore[attr-defined]


def rank_from_environment() -> int:
    """Return the rank of this process before a trainer exists; 0 for the only process, or one that starts others."""
    found = rank_zero._get_rank()
    if found is None:  # Lightning knows the others only when a trainer exists
        names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "NODE_RANK")
        found = next((os.environ[name] for name in names if name in os.environ), 0)
    return int(found)


def after_process_group(trainer: Trainer, function: Callable[[], None]) -> None:
    """Call a function when the ranks can talk to each other, before any data are prepared."""
    # Not a closure, because the trainer may be sent to a process that is spawned.
    trainer.strategy.setup_environment = partial(  # type: ignore[method-assign]
        _call_both, trainer.strategy.setup_environment, function
    )


def _call_both(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()


def steps_at_end(trainer: Trainer) -> int:
    """Return the number of steps that a run will have at its end, from the start of training on.

    After a resume these are the steps that are done, and those that are left of this epoch and the next ones.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    counts = vars(progress.current)  # a checkpoint after a step counts the step as processed and not yet as completed
    done = 0 if progress.is_last_batch else max(counts["processed"], counts["completed"])
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        left = (trainer.max_epochs - trainer.current_epoch) * int(trainer.num_training_batches) - done
        ends.append(trainer.global_step + left)
    return max(1, min(ends))


# Command line


class BaseCLI(LightningCLI):
    """LightningCLI with public names for the private methods that a command line needs, and with `weights_only`."""

    def resolve_checkpoint(self) -> None:
        """Replace `ckpt_path` in the configuration by the path of a checkpoint file; subclasses override this."""

    def setting(self, name: str) -> Any:
        """Return a setting of the subcommand."""
        return self._get(self.config, name)

    def instance(self, name: str) -> Any:
        """Return the object that was instantiated from a setting of the subcommand."""
        return self._get(self.config_init, name)

    def dump(self, config: Any) -> str:
        """Return settings of the subcommand as YAML."""
        return self._parser(self.subcommand).dump(config, skip_none=False)

    def _parse_ckpt_path(self) -> None:
        """Call `resolve_checkpoint`. Lightning reads hyperparameters here, which would override the command line."""
        self.resolve_checkpoint()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}
