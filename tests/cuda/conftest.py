"""The CUDA runtime without a device, built once for all workers of a test run."""

import os
from pathlib import Path

import pytest
from runtime_runs import once

from tools import runtime


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of all workers of this test run."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cuda"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def library(shared: Path) -> Path:
    """Return the path of the runtime; the tests that need it are skipped where it cannot be built."""
    if reason := runtime.reason_against():
        pytest.skip(reason)
    return once(shared, "runtime/runtime.so", lambda path: print(runtime.build(path.parent)))
