"""Signals: all ranks save the same step and end with the same status; nothing is lost, whatever comes when."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from runs import SMOKE, begin, callbacks, data, end, everything, logged, run

from dualenc.training.checkpoint import checkpoints, path_of, verify
from dualenc.training.ranks import STOPPED


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    fit = [*data(folder, 11), *everything(folder)]
    assert run(fit, folder) == [0], (folder / "log-0").read_text()
    return folder, fit


def kills(unbroken, **how):
    return [*unbroken[1], *everything(unbroken[0], ("Kill", how))]


def test_the_status_is_as_documented():
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
def test_one_rank(unbroken, tmp_path, numbers, step, where):
    """Between epochs and within, in validation; one signal or several."""
    assert run(kills(unbroken, step=step, where=where, signals=numbers), tmp_path) == [STOPPED]
    newest = checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert newest == path_of(newest.parent, step)
    verify(newest)
    text = (tmp_path / "log-0").read_text()
    assert f"stopped by {signal.Signals(numbers[0]).name} after step {step}; saved: {newest}" in text
    assert "--ckpt_path auto" in text
    assert "Traceback" not in text
    assert run([*unbroken[1], "--ckpt_path", "auto"], tmp_path) == [0]
    assert logged(tmp_path) == logged(unbroken[0])
    assert end(tmp_path) == end(unbroken[0])


def test_signals_during_the_save(unbroken, tmp_path):
    """At each stage of it, and after it."""
    fit = [*unbroken[1], *everything(unbroken[0], ("SignalsInSaves", {"step": 5}))]
    assert run(fit, tmp_path) == [STOPPED]
    assert "Traceback" not in (tmp_path / "log-0").read_text()
    # It came while step 6 was saved: the next one is the last.
    assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step-00000007.ckpt"
    assert run([*unbroken[1], "--ckpt_path", "auto"], tmp_path) == [0]
    assert end(tmp_path) == end(unbroken[0])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_of_two_alone(unbroken, tmp_path, rank):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(unbroken[1], whole, 2) == [0, 0]
    began = time.monotonic()
    assert run(kills(unbroken, step=7, rank=rank, signals=[15]), part, 2) == [STOPPED, STOPPED]
    assert time.monotonic() - began < 60
    newest = checkpoints(part / "run" / "checkpoints")[0]
    assert newest.name in ("step-00000007.ckpt", "step-00000008.ckpt")
    who = "SIGTERM" if rank == 0 else "a signal to another rank"
    assert f"stopped by {who} after step" in (part / "log-0").read_text()
    assert run([*unbroken[1], "--ckpt_path", "auto"], part, 2) == [0, 0]
    assert logged(part) == logged(whole)
    assert end(part) == end(whole)


def test_all_ranks_at_once(unbroken, tmp_path):
    """As SLURM does, and a terminal."""
    processes = begin([*unbroken[1], "--trainer.max_epochs", "100", "--data.workers", "1"], tmp_path, 2)
    metrics = tmp_path / "run" / "metrics.csv"
    until = time.monotonic() + 60
    while not (metrics.exists() and "\n20,train/loss" in metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    for number in (signal.SIGINT, signal.SIGTERM):
        for process in processes:
            os.kill(process.pid, number)
    assert [process.wait(30) for process in processes] == [STOPPED, STOPPED]
    assert all("Traceback" not in process.text() for process in processes)


def test_before_training_begins(unbroken, tmp_path):
    """Ctrl-C ends the program; nothing was begun."""
    (process,) = begin([*unbroken[1], *callbacks(("KillAtSetup", {}))], tmp_path)
    assert process.wait() != 0
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
def test_ranks_that_the_command_launches_itself(tmp_path, unbroken):
    """`--trainer.devices 2` alone: the first process is told, and has the second one as its child."""
    fit = [*unbroken[1], "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1000"]
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
    verify(checkpoints(tmp_path / "run" / "checkpoints")[0])


@pytest.mark.slow
def test_torchrun_starts_again(tmp_path, unbroken):
    """A rank is killed; torchrun starts both anew, and the run ends as one that nothing happened to."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(unbroken[1], whole, 2) == [0, 0]
    kill = kills(unbroken, step=7, rank=1, once=str(tmp_path / "killed"))
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.default_root_dir", str(part / "run")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    command = [sys.executable, *torchrun, "-m", "dualenc", *kill, *ranks, "--ckpt_path", "auto"]
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
    assert SMOKE.exists()
