"""Processes over the CUDA runtime without a device, and results that the workers of a test run share."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools import runtime

FITS = Path(__file__).parent / "runtime_fits.py"


def once(shared: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return the path of a file that the first of the workers makes."""
    path = shared / name
    path.parent.mkdir(exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(path)
    return path


def begin(program: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a Python program whose output goes to a file."""
    with open(log, "wb") as file:
        return subprocess.Popen([sys.executable, *program], env=environment, stdout=file, stderr=subprocess.STDOUT)


def finish(processes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    """Wait for the end of programs, all of which must succeed."""
    try:
        for process in processes:
            process.wait(900)
    finally:
        for process in processes:
            process.kill()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, log.read_text()[-3000:]


def run_fits(library: Path, out: Path, fits: dict[str, list[str]], **more: str) -> dict[str, list[dict[str, Any]]]:
    """Run `dualenc fit` with each of the arguments, and return what their steps asked, by name."""
    log = out.with_suffix(".log")
    program = [str(FITS), str(out), *(f"{name}={json.dumps(arguments)}" for name, arguments in fits.items())]
    finish([begin(program, {**runtime.environment(library), **more}, log)], [log])
    return json.loads(out.read_text())
