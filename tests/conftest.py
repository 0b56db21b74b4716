"""Every test draws fresh random inputs; a failing one shows its seed, DUALENC_TEST_SEED=... draws them again."""

import os
import random
import tempfile

import numpy as np
import pytest
import torch

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
