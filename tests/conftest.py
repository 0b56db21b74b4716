"""Fixtures. Every test draws fresh random inputs and prints its seed; DUALENC_TEST_SEED=... draws them again."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for child processes too, because the tests run in parallel

import logging
import random
import tempfile

import numpy as np
import pytest
import torch
from servers import Bucket, s3_server, web_server

import dualenc.data.shards.remote as storage

torch.set_num_threads(1)
# The first backward pass of a process starts autograd's threads for the devices known then. torch.compile adds another
# device, and a process with threads for it can no longer fork, as `runs.Process` does. So the first pass is here.
torch.ones(1, requires_grad=True).sum().backward()
# Indexes of read-only folders are written here, not to the user's cache.
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
    """Give this test its own cache folder, and shorten the waits after errors of stores."""
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.0005)
    monkeypatch.setenv("DUALENC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def web(tmp_path):
    with web_server(tmp_path / "web") as server:
        yield server


@pytest.fixture(scope="module")
def s3():
    import boto3
    import s3fs

    with pytest.MonkeyPatch.context() as patch, s3_server() as (url, store):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        yield lambda: Bucket(client, f"bucket-{os.urandom(4).hex()}", store)
        client.close()
        s3fs.S3FileSystem.clear_instance_cache()
