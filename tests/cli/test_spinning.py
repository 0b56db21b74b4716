"""OpenMP's spin count: set before torch is loaded, for child processes too, and never against the user's choice."""

import os
import subprocess
import sys

import pytest

from dualenc.cli import OPENMP_WAITING, SPIN_COUNT

SHOW = "import os, subprocess, sys\nfrom dualenc.cli import main\n"
CHILD = "subprocess.run([sys.executable, '-c', 'import os; print(os.environ.get(\"GOMP_SPINCOUNT\"))'])\n"


def spin_count(code: str, **variables: str) -> str:
    """Return the spin count that a child of a new Python process finds after `code`."""
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP_WAITING}
    done = subprocess.run(
        [sys.executable, "-c", SHOW + code + CHILD],
        env={**environment, **variables}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


def test_the_command_line_sets_a_spin_count() -> None:
    assert spin_count("main(['--version'])\n") == SPIN_COUNT
    assert spin_count("") == "None"  # the control: only the command sets it


@pytest.mark.parametrize("name", OPENMP_WAITING)
def test_the_choice_of_the_user_stays(name: str) -> None:
    expected = {"GOMP_SPINCOUNT": "77"}.get(name, "None")
    assert spin_count("main(['--version'])\n", **{name: "77"}) == expected


def test_nothing_is_set_where_torch_is_loaded() -> None:
    assert spin_count("import torch\nmain(['--version'])\n") == "None"


def test_openmp_reads_the_count() -> None:
    """GNU's OpenMP prints what it has read when torch loads it."""
    code = "main(['--version'])\nimport torch\n"
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP_WAITING}
    done = subprocess.run(
        [sys.executable, "-c", SHOW + code],
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch has another OpenMP than GNU's")
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in done.stderr
