"""The private parts of Lightning that a run needs: these tests fail when Lightning changes them."""

import os
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch.utils.data import DataLoader

import dualenc.training.lightning_internals as internals

BATCHES = 4


class Loader:
    """Loader of four batches with a number each, which keeps its position and can restore it."""

    def __init__(self) -> None:
        self.batch, self.epoch = 0, 0
        self.seen: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        for number in range(self.batch, BATCHES):
            self.seen.append((self.epoch, number))
            self.batch = number + 1
            if self.batch == BATCHES:
                self.epoch, self.batch = self.epoch + 1, 0
            yield torch.tensor([[float(number)]])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


class Model(LightningModule):
    """Linear layer, trained on numbers."""

    def __init__(self, restore: bool = False) -> None:
        super().__init__()
        self.layer, self.loader, self.restore = torch.nn.Linear(1, 1), Loader(), restore

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        int(
            self.trainer.estimated_stepping_batches
        )  # creates the loader before the checkpoint is read, as schedules do
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_train_start(self) -> None:
        if self.restore:
            internals.restore_loader_states(self.trainer)

    def train_dataloader(self) -> Any:
        return self.loader

    def val_dataloader(self) -> Any:
        return DataLoader(torch.zeros(1, 1))  # type: ignore[arg-type]


class Recorder(Callback):
    """Callback that records the state of the loops after each batch, and dumps a checkpoint after one of them."""

    def __init__(self, at: int = 0) -> None:
        self.follows: list[bool] = []
        self.done: list[bool] = []
        self.at, self.content = at, {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.follows.append(internals.validation_follows(trainer))
        self.done.append(internals.epoch_is_done(trainer))
        if trainer.global_step == self.at:
            self.content = internals.dump_checkpoint(trainer)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip


@pytest.mark.parametrize("at", [2, 4])
def test_state_of_the_loader_is_restored(tmp_path: Path, at: int) -> None:
    """Resume inside an epoch and at its end; without `restore_loader_states` Lightning loses the state."""
    seen = {}
    recorder = Recorder(at)
    trainer(tmp_path, recorder, max_epochs=2).fit(Model())
    assert internals.loader_state(recorder.content) == {"epoch": at // BATCHES, "batch": at % BATCHES}
    torch.save(recorder.content, tmp_path / "at.ckpt")
    for restore in (True, False):
        model = Model(restore)
        trainer(tmp_path, max_epochs=2).fit(model, ckpt_path=tmp_path / "at.ckpt", weights_only=True)
        seen[restore] = model.loader.seen
    rest = [(epoch, batch) for epoch in range(2) for batch in range(BATCHES)][at:]
    assert seen[True] == rest
    assert (
        seen[False] != rest
    )  # if this fails, Lightning restores the state, and `restore_loader_states` can be removed


def test_validation_follows_and_epoch_is_done(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer(tmp_path, recorder, max_epochs=1, val_check_interval=2).fit(Model())
    assert recorder.follows == [False, True, False, True]
    assert recorder.done == [False, False, False, True]
    recorder = Recorder()
    trainer(tmp_path, recorder, max_epochs=2, check_val_every_n_epoch=2).fit(Model())
    assert (
        recorder.follows == [False, False, False, True] * 2
    )  # true at the end of each epoch, with or without validation


def test_max_steps_ends_a_run_inside_its_epoch(tmp_path: Path) -> None:
    class End(Callback):
        content: dict[str, Any]

        def on_train_end(self, trainer: Trainer, *args: Any) -> None:
            self.content = internals.dump_checkpoint(trainer)

    end = End()
    trainer(tmp_path, end, max_steps=2, max_epochs=-1).fit(Model())
    epochs = end.content["loops"]["fit_loop"]["epoch_progress"]["total"]
    assert (epochs["ready"], epochs["completed"], epochs["processed"]) == (1, 0, 0)
    torch.save(end.content, tmp_path / "end.ckpt")
    model = Model(restore=True)
    trainer(tmp_path, max_epochs=1).fit(model, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert model.loader.seen == [(0, 2), (0, 3)]
    trainer(tmp_path, end, max_epochs=1).fit(Model())
    assert end.content["loops"]["fit_loop"]["epoch_progress"]["total"]["completed"] == 1


def test_checkpoint_continues_at_the_next_epoch(tmp_path: Path) -> None:
    recorder = Recorder(2)
    trainer(tmp_path, recorder, max_epochs=1).fit(Model())
    internals.continue_at_next_epoch(recorder.content, {"epoch": 7, "batch": 7})
    torch.save(recorder.content, tmp_path / "at.ckpt")
    model = Model(restore=True)
    made = trainer(tmp_path, max_epochs=3)
    made.fit(model, ckpt_path=tmp_path / "at.ckpt", weights_only=True)
    assert model.loader.seen == [(epoch, batch) for epoch in (1, 2) for batch in range(BATCHES)]
    assert made.global_step == 2 + 2 * BATCHES


def test_validates_by_time(tmp_path: Path) -> None:
    assert internals.validates_by_time(
        trainer(tmp_path, val_check_interval="00:00:10:00", check_val_every_n_epoch=None)
    )
    assert not internals.validates_by_time(trainer(tmp_path, val_check_interval=2))


def test_disable_signal_handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning calls the method that is replaced; the control would have installed handlers."""
    called: list[str] = []
    monkeypatch.setattr(_SignalConnector, "register_signal_handlers", lambda self: called.append("Lightning"))
    made = trainer(tmp_path, max_steps=1)
    internals.disable_signal_handlers(made)
    made.fit(Model())
    assert called == []
    trainer(tmp_path, max_steps=1).fit(Model())
    assert called == ["Lightning"]


def test_disable_sigterm_broadcast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", lambda self: called.append("Lightning"))
    monkeypatch.setattr(DDPStrategy, "world_size", 2, raising=False)

    class Disable(Callback):
        def on_train_start(self, trainer: Trainer, *args: Any) -> None:
            internals.disable_sigterm_broadcast(trainer)
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()  # as Lightning does with several ranks

    trainer(tmp_path, Disable(), max_steps=1).fit(Model())
    assert called == []


def test_disable_child_observer(tmp_path: Path) -> None:
    """The observer of the ranks that rank 0 has launched has no processes left to kill."""

    class Child:
        def poll(self) -> None:
            return None

    ended = threading.Event()
    observer = _ChildProcessObserver(main_pid=1, child_processes=[Child()], sleep_period=1)  # type: ignore[list-item]
    observer.run = ended.wait  # type: ignore[method-assign]
    observer.start()
    try:
        made = trainer(tmp_path)
        made.strategy._launcher = type("Launcher", (), {"procs": [1]})()
        internals.disable_child_observer(made)
        assert observer._child_processes == []
    finally:
        ended.set()
        observer.join()


def test_find_unused_parameters() -> None:
    strategy = DDPStrategy()
    internals.find_unused_parameters(strategy)
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}
    strategy = DDPStrategy(find_unused_parameters=False)
    internals.find_unused_parameters(strategy)
    assert strategy._ddp_kwargs == {"find_unused_parameters": False}


@pytest.mark.parametrize("kind", [DDPStrategy, ModelParallelStrategy])
def test_raise_timeout(kind: Any) -> None:
    """A longer timeout of the user's stays. `test_collectives_wait_longer_than_the_watchdog` has its effect."""
    hour, day = timedelta(hours=1), timedelta(days=1)
    for given, expected in (({}, hour), ({"timeout": None}, hour), ({"timeout": day}, day)):
        strategy = kind(**given)
        internals.raise_timeout(strategy, hour)
        assert strategy._timeout == expected
    internals.raise_timeout(SingleDeviceStrategy(torch.device("cpu")), hour)  # This one has no process group.


def test_base_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is resolved before objects are instantiated; settings and objects are found by name."""
    steps: list[str] = []

    class CLI(internals.BaseCLI):
        def resolve_checkpoint(self) -> None:
            steps.append("resolve")
            self.config["fit"]["ckpt_path"] = "resolved"

        def instantiate_classes(self) -> None:
            steps.append("instantiate")
            super().instantiate_classes()

        def before_fit(self) -> None:
            assert self.setting("ckpt_path") == "resolved"
            assert self.instance("model").layer is not None
            assert "max_steps: 3" in self.dump(self.config["fit"])

        def _run_subcommand(self, subcommand: str) -> None:
            self.before_fit()
            settings = self._prepare_subcommand_kwargs(subcommand)
            assert (settings["ckpt_path"], settings["weights_only"]) == ("resolved", True)
            steps.append("run")

    arguments = ["fit", "--trainer.max_steps", "3", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", ["dualenc"])
    arguments += ["--trainer.default_root_dir", str(tmp_path)]
    CLI(Model, args=arguments, save_config_callback=None, seed_everything_default=0)
    assert steps == ["resolve", "instantiate", "run"]
    assert callable(LightningCLI._parse_ckpt_path)


RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "NODE_RANK")


@pytest.mark.parametrize("name", RANKS)
def test_rank_from_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable in RANKS:
        monkeypatch.delenv(variable, raising=False)
    assert internals.rank_from_environment() == 0
    monkeypatch.setenv(name, "3")
    assert internals.rank_from_environment() == 3


def test_function_is_called_after_the_process_group_and_before_the_data(tmp_path: Path) -> None:
    """In a forked process, since a process group leaves variables and threads behind."""
    order = []

    class Data(Model):
        def prepare_data(self) -> None:
            order.append("data")

        def train_dataloader(self) -> Loader:
            return self.loader

    pid = os.fork()
    if not pid:
        try:
            made = trainer(tmp_path, max_epochs=1, strategy=DDPStrategy(process_group_backend="gloo"))
            internals.after_process_group(made, lambda: order.append(str(torch.distributed.is_initialized())))
            made.fit(Data())
        finally:
            os._exit(7 if order == ["True", "data"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize("saved", ["step", "validation", "epoch", "end"])
@pytest.mark.parametrize("epochs", [3, 5])
def test_steps_at_end_of_a_resumed_run(tmp_path: Path, saved: str, epochs: int) -> None:
    """Checkpoints of every place of a run of 2 epochs give the steps that a longer run really takes."""

    class Save(Callback):
        def on_train_batch_end(self, made: Trainer, *args: Any) -> None:
            if saved == "step" and made.global_step == BATCHES + 1:
                made.save_checkpoint(tmp_path / "at.ckpt")

        def on_validation_end(self, made: Trainer, *args: Any) -> None:
            if saved == "validation" and made.global_step == BATCHES + 2:
                made.save_checkpoint(tmp_path / "at.ckpt")

        def on_train_epoch_end(self, made: Trainer, *args: Any) -> None:
            if saved == "epoch" and made.current_epoch == 0:
                made.save_checkpoint(tmp_path / "at.ckpt")

        def on_train_end(self, made: Trainer, *args: Any) -> None:
            if saved == "end":
                made.save_checkpoint(tmp_path / "at.ckpt")

    class Count(Callback):
        found = 0

        def on_train_start(self, made: Trainer, *args: Any) -> None:
            self.found = internals.steps_at_end(made)

    class Data(Model):
        def train_dataloader(self) -> Loader:
            return self.loader

        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader([torch.zeros(1)])

    count = Count()
    made = trainer(tmp_path, Save(), count, max_epochs=2, val_check_interval=2)
    made.fit(Data())
    assert count.found == made.global_step == 2 * BATCHES
    made = trainer(tmp_path, count, max_epochs=epochs, val_check_interval=2)
    made.fit(Data(restore=True), ckpt_path=tmp_path / "at.ckpt", weights_only=True)
    assert count.found == made.global_step == epochs * BATCHES
