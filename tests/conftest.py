"""Every test draws fresh random inputs; a failing one shows its seed, DUALENC_TEST_SEED=... draws them again."""

import os
import random
import tempfile

import numpy as np
import pytest
import torch
from servers import web_server

import dualenc.data.storage as storage

torch.set_num_threads(2)
# Indexes of read-only folders go here, not to the user's own.
_CACHE = tempfile.TemporaryDirectory(prefix="dualenc-tests-")
os.environ["DUALENC_CACHE"] = _CACHE.name


@pytest.fixture(autouse=True)
def seed():
    number = int(os.environ.get("DUALENC_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 (libraries under test use the global generator)
    torch.manual_seed(number)
    print(f"DUALENC_TEST_SEED={number}")
    return number


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A cache of this test's own, and no waiting for stores that fail."""
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.0005)
    monkeypatch.setenv("DUALENC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def web(tmp_path):
    with web_server(tmp_path / "web") as server:
        yield server
