"""Everything of Lightning that is private and that a run needs nevertheless: nowhere else is it touched.

Each function says why. `tests/training/test_lightning_internals.py` has a test of each, which fails when Lightning
changes what it relies on.
"""

import threading
from typing import Any

from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy

# Loops


def restore_loader_states(trainer: Trainer) -> None:
    """Give the data loaders the state that a checkpoint has of them, at the start of training.

    Lightning forgets it where `configure_optimizers` has made the loader before the checkpoint was read, and where it
    is the state of an epoch's end.
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
    """Return whether a validation or the end of the epoch comes after the batch that has just ended."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return loop._should_check_val_fx(fetcher) or loop._is_training_done


def epoch_is_done(trainer: Trainer) -> bool:
    """Return whether all batches of the epoch are done."""
    return trainer.fit_loop.epoch_loop._is_training_done


# Checkpoints


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Return the content of a checkpoint without writing it; on all ranks together.

    Where a run ends by its steps inside an epoch, Lightning counts that epoch as done; here it is not, so that a run
    which continues for more steps continues inside of it.
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
    """Change a checkpoint to that between the epoch that was begun and the next one.

    Args:
        checkpoint: the content.
        state: of the loader; its epoch and batch are set.
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


def handle_no_signals(trainer: Trainer) -> None:
    """Keep Lightning from handling signals: its handlers send something to the other ranks wherever these are."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def ask_no_rank_to_stop(trainer: Trainer) -> None:
    """Keep Lightning from asking the first rank at each step whether to stop, and from waiting for the answer."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def kill_no_rank(trainer: Trainer) -> None:
    """Keep Lightning from killing the run where a rank ends with a status, even one that it should end with."""
    launched = getattr(trainer.strategy.launcher, "procs", [])
    for thread in threading.enumerate():
        if launched and isinstance(thread, subprocess_script._ChildProcessObserver):
            thread._child_processes = []


def find_unused_parameters(strategy: DDPStrategy) -> None:
    """Let DDP look for parameters without a gradient, unless the configuration says otherwise.

    Without it gradients are summed up in another order after the first step, and a run that is continued has another
    first step.
    """
    strategy._ddp_kwargs.setdefault("find_unused_parameters", True)


# Command line


class OpenCLI(LightningCLI):
    """LightningCLI with public names for what we need of it, and checkpoints that are data and never pickled code."""

    def find_checkpoint(self) -> None:
        """Replace `ckpt_path` in the configuration by the file that is meant; for those who derive from this."""

    def given(self, name: str) -> Any:
        """Return a setting of the subcommand."""
        return self._get(self.config, name)

    def made(self, name: str) -> Any:
        """Return an object that was made from the settings of the subcommand."""
        return self._get(self.config_init, name)

    def dump(self, config: Any) -> str:
        """Return settings of the subcommand as YAML."""
        return self._parser(self.subcommand).dump(config, skip_none=False)

    def _parse_ckpt_path(self) -> None:
        """Lightning takes hyperparameters out of the checkpoint here, which would override the command line."""
        self.find_checkpoint()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}
