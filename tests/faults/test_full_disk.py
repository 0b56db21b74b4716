"""A disk without room: every file that a run writes is told, training continues, and the end is that of a whole run."""

import errno
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from fits import fails
from runs import callbacks, data, end, everything, logged, run

from dualenc.data.loading.bad_samples import BadRecord, BadSampleLog
from dualenc.training.checkpoint import checkpoint_path, list_checkpoints
from dualenc.utils.files import LineLog
from dualenc.utils.text import print_message
from tools.soak import models_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    fit = data(folder, 11)
    assert run([*fit, *everything(folder)], folder) == [0]
    return folder, fit


def limited(folder, until=-1):
    return everything(folder, ("FullDisk", {"until": until}))


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_disk_that_is_full_for_a_while(whole, tmp_path, monkeypatch, world):
    """In steps 6 to 15 the log cannot grow, and no checkpoint can be written, all of which are due.

    Nothing is monitored: the best model of a run whose disk is full may be one that cannot be written.
    """
    monkeypatch.setattr("runs.LIMIT", 1000)
    monkeypatch.setattr("runs.LIMIT_AT", 5)
    folder, fit = whole
    options = ["--run.failed_saves", "100", "--run.monitor", "null"]
    assert run([*fit, *limited(folder, until=15), *options], tmp_path, world) == [0] * world
    text = (tmp_path / "log-0").read_text()
    assert "metrics.csv cannot be written, its lines are kept in memory" in text
    assert "the checkpoint of step 6 cannot be saved" in text
    assert "Traceback" not in text
    reference = tmp_path / "whole"
    assert run([*fit, *everything(folder), *options], reference, world) == [0] * world
    assert logged(tmp_path) == logged(reference)
    assert end(tmp_path) == end(reference)


def test_checkpoint_is_not_newer_than_the_log(whole, tmp_path, monkeypatch):
    """Step 6 is logged while the disk is full, the checkpoint of step 10 takes its lines along, a kill follows."""
    monkeypatch.setattr("runs.LIMIT", 100)
    monkeypatch.setattr("runs.LIMIT_AT", 5)
    fit = [*whole[1], "--trainer.log_every_n_steps", "6", "--trainer.limit_val_batches", "0", "--run.failed_saves", "9"]
    fit += ["--trainer.limit_train_batches", "9", "--run.monitor", "null"]
    assert run(fit, tmp_path / "whole") == [0]
    trouble = callbacks(("FullDisk", {"until": 9}), ("Kill", {"step": 11}))
    assert run([*fit, *trouble], tmp_path) == [-9]
    assert run([*fit, "--ckpt_path", "auto"], tmp_path) == [0]
    assert logged(tmp_path) == logged(tmp_path / "whole")


@pytest.mark.parametrize("room", [4_000, 20_000, 60_000, 120_000])
def test_disk_that_stays_full(whole, tmp_path, monkeypatch, room):
    """With room for some files only, each writer fails in turn; with room again, the run reaches the same end."""
    monkeypatch.setattr("runs.LIMIT", room)
    monkeypatch.setattr("runs.LIMIT_AT", 5)
    folder, fit = whole
    options = ["--run.failed_saves", "100"]
    (status,) = run([*fit, *limited(folder), *options], tmp_path)
    text = (tmp_path / "log-0").read_text()
    assert "Traceback" not in text
    assert status == (0 if (tmp_path / "run" / "last").exists() else 1), text
    if status and len(text) < room - 500:  # the log is a file, too
        assert text.splitlines()[-1].startswith("dualenc: error: ")
        assert "last cannot be written" in text
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir() if path.name.startswith(".")] == []
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []
    assert run([*fit, *everything(folder), "--ckpt_path", "auto"], tmp_path) == [0]
    assert logged(tmp_path) == logged(folder)
    assert end(tmp_path) == end(folder)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_last_that_could_not_be_written_is_written_by_the_same_command(whole, tmp_path, world):
    """The checkpoint of the end fits, `last/` does not, since something else has its name."""
    folder, fit = whole
    (tmp_path / "run" / "last").mkdir(parents=True)
    (tmp_path / "run" / "last" / "notes.txt").write_text("mine")
    assert run([*fit, *everything(folder)], tmp_path, world) == [1] * world
    assert "last cannot be written" in (tmp_path / "log-0").read_text()
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0].name == checkpoint_path(tmp_path, 27).name
    # It still cannot be written, so the command still fails.
    assert run([*fit, *everything(folder), "--ckpt_path", "auto"], tmp_path, world) == [1] * world
    shutil.rmtree(tmp_path / "run" / "last")
    assert run([*fit, *everything(folder), "--ckpt_path", "auto"], tmp_path, world) == [0] * world
    assert "was done already" in (tmp_path / "log-0").read_text()
    if world == 1:
        assert models_of(tmp_path / "run") == models_of(folder / "run")
        assert end(tmp_path) == end(folder)


def test_resume_on_a_full_disk_does_not_hang_or_lose_the_run(whole, tmp_path, monkeypatch):
    """Resume while next to nothing can be written, from the first step on."""
    folder, fit = whole
    killed = everything(folder, ("Kill", {"step": 7}))
    assert run([*fit, *killed], tmp_path) == [-9]
    monkeypatch.setattr("runs.LIMIT", 1000)
    monkeypatch.setattr("runs.LIMIT_AT", 6)
    options = ["--run.failed_saves", "2", "--ckpt_path", "auto"]
    assert run([*fit, *limited(folder), *options], tmp_path) == [1]
    assert "Traceback" not in (tmp_path / "log-0").read_text()
    assert run([*fit, *everything(folder), "--ckpt_path", "auto"], tmp_path) == [0]
    assert logged(tmp_path) == logged(folder)
    assert end(tmp_path) == end(folder)


def can_mount():
    return (
        bool(shutil.which("unshare")) and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    )


@pytest.mark.skipif(not can_mount(), reason="this user may not mount a file system")
def test_small_file_system_that_is_really_full(whole, tmp_path):
    """Run on a tmpfs that has room for few checkpoints and models, and for no report beside them."""
    folder, fit = whole
    disk = tmp_path / "disk"
    disk.mkdir()
    program = "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); from dualenc.cli import main; main(sys.argv[1:])"
    root = ["--trainer.default_root_dir", str(disk / "run"), "--run.failed_saves", "100"]
    command = [sys.executable, "-c", program, ":".join(sys.path[1:]), *fit, *everything(folder), *root]
    mount = f'mount -t tmpfs -o size=$1 tmpfs {disk} && shift && exec "$@"'
    log = tmp_path / "log"
    with open(log, "w") as file:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount, "sh", "250k", *command], stdout=file, stderr=file, timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    text = log.read_text()
    assert "No space left on device" in text
    assert "Traceback" not in text
    assert "the checkpoint of step" in text
    assert "report.html cannot be written" in text
    assert "27 steps done" in text.splitlines()[-1]
    assert "report.html" not in text.splitlines()[-1]
    assert done.returncode == 0


def test_other_logger_that_cannot_write_is_named_once(whole, tmp_path):
    folder, fit = whole
    logger = ["--trainer.logger", "runs.FailingLogger"]
    assert run([*fit, *everything(folder), *logger], tmp_path) == [0], (tmp_path / "log-0").read_text()
    assert (tmp_path / "log-0").read_text().count("FailingLogger cannot log step") == 1
    assert logged(tmp_path) == logged(folder)


def test_tokenizer_that_cannot_be_written_is_one_line(whole, tmp_path, capsys, monkeypatch):
    _, fit = whole
    at = fit.index("--data.tokenizer")
    root = ["--trainer.default_root_dir", str(tmp_path / "run")]

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "tokenizer.json"))

    monkeypatch.setattr(Path, "write_text", full)
    line = fails(capsys, [*fit[:at], *fit[at + 2 :], *root], status=1)
    assert "tokenizer.json: No space left on device" in line


def test_lines_that_stay_unwritten_are_counted(tmp_path, capsys):
    """A folder in place of the file: no line is lost without a message."""
    path = tmp_path / "log.jsonl"
    path.mkdir()
    log = LineLog(path)
    log.append(["a", "b"])
    log.append(["c"])
    assert capsys.readouterr().err.count("are kept in memory") == 1
    log.close()
    assert "lacks the last 3 lines" in capsys.readouterr().err
    log.close()
    assert capsys.readouterr().err == ""


def test_messages_to_a_full_disk_end_nothing(tmp_path, monkeypatch):
    """Standard error is a file, too."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        print_message("a line")
        log = LineLog(tmp_path / "missing" / "folder" / "log")
        (tmp_path / "missing").write_text("")
        log.append(["a"])
        log.close()
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_bad_samples_are_written_when_there_is_room_again(tmp_path, seed, capsys):
    rng = random.Random(seed)
    path = tmp_path / "bad_samples.jsonl"
    path.mkdir()
    log = BadSampleLog(10_000, path, 1.0)
    records = [BadRecord(i, "a.tar", str(i), "cause", "") for i in range(rng.randint(2, 9))]
    path.rmdir()
    path.symlink_to(tmp_path / "missing" / "file")  # cannot be created
    (tmp_path / "missing").write_text("")
    log.add(records[:-1])
    path.unlink()
    log.add(records[-1:])
    assert len(path.read_text().splitlines()) == len(records) == len(log)
    assert "cannot be written" in capsys.readouterr().err
