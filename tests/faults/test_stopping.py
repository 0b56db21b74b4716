"""Stop signals: all ranks save the same step and exit with the same status, whenever the signals come."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import fits
import pytest
import torch
from helpers import write_shards
from runs import begin, callbacks, data, end, everything, logged, run
from torch.distributed.constants import default_pg_timeout

from dualenc.cli import main
from dualenc.training.checkpoint import checkpoint_path, list_checkpoints, verify_checkpoint
from dualenc.training.ranks import STOPPED, Watchdog


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit = [*data(folder, 11), *everything(folder)]
    assert run(fit, folder) == [0], (folder / "log-0").read_text()
    return folder, fit


def with_kill(uninterrupted, **how):
    """Return the options of the run with a callback that kills it or sends it signals."""
    return [*uninterrupted[1], *everything(uninterrupted[0], ("Kill", how))]


def test_exit_status_of_a_stopped_run():
    assert STOPPED == os.EX_TEMPFAIL == 75


@pytest.mark.parametrize(
    ("numbers", "step", "where"),
    [
        ([15], 7, "step"),
        ([2], 9, "step"),
        ([10], 13, "validation"),
        ([15, 2, 10, 15], 7, "step"),
        pytest.param([15], 13, "validation", marks=pytest.mark.slow),
        pytest.param([10], 9, "step", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_signals_stop_a_run_that_resumes_bit_equal(uninterrupted, tmp_path, numbers, step, where):
    """Send one signal or several at the end of an epoch, inside one, and in validation."""
    assert run(with_kill(uninterrupted, step=step, where=where, signals=numbers), tmp_path) == [STOPPED]
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert newest == checkpoint_path(newest.parent, step)
    verify_checkpoint(newest)
    text = (tmp_path / "log-0").read_text()
    assert f"stopped by {signal.Signals(numbers[0]).name} after step {step}; saved: {newest}" in text
    assert "--ckpt_path auto" in text
    assert "Traceback" not in text
    assert run([*uninterrupted[1], "--ckpt_path", "auto"], tmp_path) == [0]
    assert logged(tmp_path) == logged(uninterrupted[0])
    assert end(tmp_path) == end(uninterrupted[0])


def test_signals_while_a_checkpoint_is_saved(uninterrupted, tmp_path):
    """Send signals when the checkpoint is written, synced and renamed."""
    fit = [*uninterrupted[1], *everything(uninterrupted[0], ("SignalsInSaves", {"step": 5}))]
    assert run(fit, tmp_path) == [STOPPED]
    assert "Traceback" not in (tmp_path / "log-0").read_text()
    # The signals came while step 6 was saved, so the run stops after the next step.
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step-00000007.ckpt"
    assert run([*uninterrupted[1], "--ckpt_path", "auto"], tmp_path) == [0]
    assert end(tmp_path) == end(uninterrupted[0])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_rank_stops_both(uninterrupted, tmp_path, rank):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(uninterrupted[1], whole, 2) == [0, 0]
    began = time.monotonic()
    assert run(with_kill(uninterrupted, step=7, rank=rank, signals=[15]), part, 2) == [STOPPED, STOPPED]
    assert time.monotonic() - began < 60
    newest = list_checkpoints(part / "run" / "checkpoints")[0]
    assert newest.name in ("step-00000007.ckpt", "step-00000008.ckpt")
    who = "SIGTERM" if rank == 0 else "a signal to another rank"
    assert f"stopped by {who} after step" in (part / "log-0").read_text()
    assert run([*uninterrupted[1], "--ckpt_path", "auto"], part, 2) == [0, 0]
    assert logged(part) == logged(whole)
    assert end(part) == end(whole)


def test_signals_to_all_ranks_at_once(uninterrupted, tmp_path):
    """Signal all ranks, as SLURM and a terminal do."""
    processes = begin([*uninterrupted[1], "--trainer.max_epochs", "100", "--data.workers", "1"], tmp_path, 2)
    metrics = tmp_path / "run" / "metrics.csv"
    until = time.monotonic() + 60
    while not (metrics.exists() and "\n20,train/loss" in metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    for number in (signal.SIGINT, signal.SIGTERM):
        for process in processes:
            os.kill(process.pid, number)
    assert [process.wait(30) for process in processes] == [STOPPED, STOPPED]
    assert all("Traceback" not in process.text() for process in processes)


def test_signal_before_training_starts(uninterrupted, tmp_path):
    """Ctrl-C ends the program, which has written nothing, with the status of an interrupted command."""
    (process,) = begin([*uninterrupted[1], *callbacks(("KillAtSetup", {}))], tmp_path)
    assert process.wait() == 130
    assert process.text().endswith("dualenc: error: interrupted\n")
    assert "Traceback" not in process.text()
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
def test_signal_to_ranks_that_lightning_launches(tmp_path, uninterrupted):
    """With `--trainer.devices 2` only the first process gets the signal; it is the parent of the second."""
    fit = [*uninterrupted[1], "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1000"]
    command = [sys.executable, "-m", "dualenc", *fit, "--trainer.default_root_dir", str(tmp_path / "run")]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=os.path.dirname(__file__) + "/..")
    metrics = tmp_path / "run" / "metrics.csv"
    until = time.monotonic() + 120
    while not (metrics.exists() and "\n20,train/loss" in metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == STOPPED, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert "stopped by SIGTERM after step" in text
    assert "Traceback" not in text
    verify_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[0])


@pytest.mark.slow
def test_torchrun_restarts_a_killed_run(tmp_path, uninterrupted):
    """Kill a rank: torchrun restarts both, and the run ends bit-equal to an uninterrupted one."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(uninterrupted[1], whole, 2) == [0, 0]
    fit = with_kill(uninterrupted, step=7, rank=1, once=str(tmp_path / "killed"))
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.default_root_dir", str(part / "run")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    command = [sys.executable, *torchrun, "-m", "dualenc", *fit, *ranks, "--ckpt_path", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=os.path.dirname(__file__) + "/.."
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "killed").exists()
    record = json.loads((part / "run" / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 6]
    assert logged(part) == logged(whole)
    assert end(part) == end(whole)


class Reached(Exception):
    """Stops a run where its process group would begin."""


@pytest.mark.parametrize("strategy", ["ddp", "lightning.pytorch.strategies.ModelParallelStrategy"])
@pytest.mark.parametrize("stall_seconds", [5.0, 900.0])
def test_collectives_wait_longer_than_the_watchdog(tmp_path, monkeypatch, strategy, stall_seconds):
    """The watchdog names the rank that stalls, so it must be the first to end a run, in evaluation and saving too."""
    found = []

    def begin_group(*args, timeout, **options):
        found.append(timeout)
        raise Reached

    monkeypatch.setattr(torch.distributed, "init_process_group", begin_group)
    write_shards(tmp_path / "shards", [20], 3)
    spread = strategy if strategy == "ddp" else json.dumps({"class_path": strategy})
    with pytest.raises(Reached):
        main(fits.fit(tmp_path, "--trainer.strategy", spread, "--run.stall_seconds", str(stall_seconds)))
    (timeout,) = found
    assert timeout >= max(default_pg_timeout, timedelta(seconds=Watchdog.SLOW_PHASES * stall_seconds + 30))
