"""Two runs in one folder: the second one is refused while the first one lives, however the first one ends."""

import errno
import json
import multiprocessing
import os
import re
import signal
import time

import pytest
from fits import fails
from runs import Process, begin, callbacks, data, end, logged, run

import dualenc.training.run_lock as run_lock
from dualenc.training.run_lock import RunLock


def waiting(folder, fit, *more, world=1):
    """Start a run that waits after step 3, and return its processes."""
    wait = callbacks(("Wait", {"step": 3, "reached": str(folder / "reached"), "go_on": str(folder / "go_on")}))
    processes = begin([*fit, *wait, "--ckpt_path", "auto", *more], folder, world)
    while not (folder / "reached").exists():
        assert os.waitid(os.P_PID, processes[0].pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, processes[0].text()
        time.sleep(0.01)
    return processes


@pytest.mark.parametrize("workers", ["0", "1"])
def test_second_start_is_refused_until_the_first_is_killed(tmp_path, seed, workers):
    fit = data(tmp_path, seed)
    (first,) = waiting(tmp_path, fit, "--data.workers", workers)
    before = logged(tmp_path)
    root = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.devices", "1"]
    for which in (["--ckpt_path", "auto"], ["--ckpt_path", "last"], []):
        second = Process([*fit, *root, *which], tmp_path / "second")
        assert second.wait() == 2, second.text()
    assert re.search(rf"run is in use by process {first.pid} on host \S+ since \d{{4}}-\d\d-\d\dT", second.text())
    assert "Traceback" not in second.text()
    assert logged(tmp_path) == before
    # The lock ends with the process, although its workers may live a little longer.
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert run([*fit, "--data.workers", workers, "--ckpt_path", "auto"], tmp_path) == [0], (
        tmp_path / "log-0"
    ).read_text()
    whole = tmp_path / "whole"
    assert run(fit, whole) == [0]
    assert logged(tmp_path) == logged(whole)
    assert end(tmp_path) == end(whole)
    assert not (tmp_path / "run" / ".lock").exists()


def test_second_start_with_two_ranks_is_refused_on_both(tmp_path, seed):
    fit = data(tmp_path, seed)
    (first,) = waiting(tmp_path, fit)
    other = tmp_path / "other"
    other.mkdir()
    (other / "run").symlink_to(tmp_path / "run")
    for process in begin([*fit, "--ckpt_path", "auto"], other, 2):
        assert process.wait() == 2, process.text()
        assert f"is in use by process {first.pid}" in process.text()
        assert "Traceback" not in process.text()
    (tmp_path / "go_on").touch()
    assert first.wait() == 0


def test_run_that_fails_at_the_start_leaves_no_folder(tmp_path, seed, capsys):
    fit = data(tmp_path, seed)
    root = ["--trainer.default_root_dir", str(tmp_path / "new")]
    assert "match no file" in fails(capsys, [*fit, *root, "--data.train", str(tmp_path / "missing-*.tar")])
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_made_is_refused_before_the_data_are_read(tmp_path, seed, capsys):
    fit = data(tmp_path, seed)
    (tmp_path / "file").write_text("")
    missing = ["--data.train", str(tmp_path / "missing-*.tar")]
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        line = fails(capsys, [*fit, *missing, "--trainer.default_root_dir", str(path)])
        assert f"trainer.default_root_dir {path} cannot be written" in line


def test_lock_is_given_again_after_release_and_tells_who_holds_it(tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    about = json.loads((tmp_path / "run" / ".lock").read_text())
    assert about["process"] == os.getpid()
    pid = os.fork()
    if not pid:
        other = RunLock(tmp_path / "run")
        other.acquire()
        os._exit(7 if f"in use by process {os.getppid()} " in other.refusal else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    lock.release()
    assert not (tmp_path / "run").exists()
    pid = os.fork()
    if not pid:
        other = RunLock(tmp_path / "run")
        other.acquire()
        os._exit(7 if not other.refusal else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_processes_of_the_run_share_its_lock(tmp_path, how):
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    context = multiprocessing.get_context(how)
    child = context.Process(target=use_and_release, args=(lock,))
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert (tmp_path / "run" / ".lock").exists()  # the child has not ended it


def use_and_release(lock):
    lock.acquire()
    refusal = lock.refusal
    lock.release()
    os._exit(1 if refusal else 7)


def test_folder_of_the_user_stays(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert tmp_path.exists()
    assert not list(tmp_path.iterdir())


def test_lock_that_fails_otherwise_is_not_told_as_in_use(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(run_lock.fcntl, "flock", broken)
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    assert "cannot be locked" in lock.refusal
    assert os.strerror(errno.EIO) in lock.refusal


def test_home_folder_is_expanded(tmp_path, seed, capsys, monkeypatch):
    """The lock is where the run is, also in a configuration file, in which no shell expands `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fit = data(tmp_path, seed)
    pid = os.fork()
    if not pid:
        lock = RunLock(tmp_path / "runs")
        lock.acquire()
        (tmp_path / "locked").touch()
        time.sleep(600)
    try:
        while not (tmp_path / "locked").exists():
            time.sleep(0.01)
        line = fails(capsys, [*fit, "--trainer.default_root_dir", "~/runs"])
        assert f"is in use by process {pid}" in line
        assert not (tmp_path / "~").exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_file_system_without_locks_is_told_once(tmp_path, monkeypatch, capsys, number):
    def no_locks(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock.fcntl, "flock", no_locks)
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    lock.acquire()
    assert not lock.refusal
    assert capsys.readouterr().err.count("without locks") == 1


def test_lock_survives_the_end_of_another_run_that_removes_its_file(tmp_path, monkeypatch):
    """The file that was opened is removed before it is locked: the lock is taken on the new file."""
    root = tmp_path / "run"
    real = run_lock.fcntl.flock
    removed = []

    def remove_first(file, how):
        if not removed:
            removed.append((root / ".lock").unlink())
        return real(file, how)

    monkeypatch.setattr(run_lock.fcntl, "flock", remove_first)
    lock = RunLock(root)
    lock.acquire()
    assert (root / ".lock").exists()
    pid = os.fork()
    if not pid:
        other = RunLock(root)
        other.acquire()
        os._exit(7 if other.refusal else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
