"""Ctrl-C ends a command with status 130 and one line, whatever it is doing."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fits import SMOKE

from dualenc.cli import INTERRUPTED, main

INTERRUPTED_LINE = "dualenc: error: interrupted\n"
READY = "import sys, time, weakref\nprint('ready', flush=True)\n"
# What modules do with an interrupt while they are imported.
IMPORTS = {
    "raises": "time.sleep(60)",
    "swallows": "try:\n    time.sleep(60)\nexcept BaseException:\n    pass\nraise SystemExit(7)",
    "translates": "try:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError('libnothing.so') from None",
    "ignores": "class A: pass\na = A()\nr = weakref.ref(a, lambda _: time.sleep(60))\ndel a\nraise SystemExit(7)",
}


def start(program: list[str], folder: Path, **options) -> subprocess.Popen:
    """Start Python, in which `folder` comes before all other modules, and wait until it says that it is ready."""
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, *program],
        env={**os.environ, "PYTHONPATH": paths}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("command", [["zeroshot", "model", "data"], ["fit", "--config", str(SMOKE)]], ids=" ".join)
@pytest.mark.parametrize("body", list(IMPORTS))
def test_interrupt_during_an_import(tmp_path, command, body):
    (tmp_path / "torch.py").write_text(READY + IMPORTS[body])
    process = start(["-m", "dualenc", *command], tmp_path)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors) == (INTERRUPTED, INTERRUPTED_LINE)


WORK = """
import time
import dualenc.cli.parser as parser
from dualenc.cli import main
def configs(name: str = ""):
    '''Wait.

    Args:
        name: nothing.
    '''
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
parser.COMMANDS["configs"] = configs
main()
"""


def test_interrupt_of_the_work_lets_it_clean_up(tmp_path):
    process = start(["-c", WORK, "configs"], tmp_path)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (INTERRUPTED, "cleaned up\n", INTERRUPTED_LINE)


def test_interrupt_while_python_ends(tmp_path):
    program = "import sys, time\nfrom dualenc.cli import main\nsys.argv[1:] = ['--version']\nmain()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}print('ready', flush=True)\ntime.sleep(60)"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith("dualenc ")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == -signal.SIGINT  # which shells report as 130


def test_ignored_interrupt_stays_ignored(tmp_path):
    """Start a program as `nohup` and the background jobs of a shell do, with SIGINT ignored."""
    (tmp_path / "torch.py").write_text(f"{READY}sys.stdin.readline()\nraise SystemExit(7)")
    process = start(
        ["-m", "dualenc", "zeroshot", "model", "data"],
        tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGINT)
    process.communicate("go\n", timeout=60)
    assert process.returncode == 7


def test_handler_is_restored_and_not_needed_in_threads(capsys):
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=main, args=[["--version"]])
    thread.start()
    thread.join()
    main(["--version"])
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out.count("dualenc ") == 2
