"""Sets that are known by name, with a stand-in for the hub."""

import re
import shutil

import pytest
from helpers import write_benchmark

from dualenc.data import BenchmarkSet
from dualenc.data.eval_sets.known_sets import KNOWN_SETS
from dualenc.utils.errors import DataError, warn_once

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(autouse=True)
def hub(web, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    monkeypatch.chdir(tmp_path)
    warn_once.cache_clear()
    return web


@pytest.mark.parametrize("called", ["cifar10", "wds/vtab/cifar10", "wds_vtab-cifar10"])
def test_a_known_set_is_that_of_the_hub(hub, seed, caplog, called):
    folder = write_benchmark(hub.folder / "datasets/clip-benchmark/wds_vtab-cifar10/resolve/main", seed, counts=(9, 2))
    local = BenchmarkSet.open(folder)
    size = sum(path.stat().st_size for path in folder.glob("test/*.tar")) / 1e6
    data = BenchmarkSet.open(called)
    assert (data.name, data.kind, data.fingerprint) == ("cifar10", "classification", local.fingerprint)
    assert BenchmarkSet.open(data.path).fingerprint == local.fingerprint  # as a saved result names it
    (line,) = {record.message for record in caplog.records}
    assert f"{hub.url}/datasets/clip-benchmark/wds_vtab-cifar10, split test: {size:.0f} MB" in line
    assert "license" in line


def test_the_size_of_the_table_needs_no_server(hub):
    assert KNOWN_SETS["flickr30k"].size_of("test") == "146 MB"
    assert KNOWN_SETS["food101"].size_of("test") == "1.4 GB"
    assert hub.log == []
    assert KNOWN_SETS["flickr30k"].size_of("train") == "unknown"  # This hub lacks it.


def test_a_local_folder_wins(hub, seed, caplog, tmp_path):
    expected = BenchmarkSet.open(write_benchmark(tmp_path / "cifar10", seed))
    assert BenchmarkSet.open("cifar10").fingerprint == expected.fingerprint
    assert hub.log == []
    assert re.search("cifar10: taken as the local .*, not as the known set", caplog.text)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("cifar-10", "cifar10"), ("imagenet1K", "imagenet1k"), ("coco", "mscoco_captions"),
     ("flikr30k", "flickr30k"), ("my_phots", "my_photos"),
     ("in/my_phots", "in/my_photos")],
)  # fmt: skip
def test_similar_names(hub, tmp_path, wrong, right):
    (tmp_path / "my_photos").mkdir()
    shutil.copytree(tmp_path / "my_photos", tmp_path / "in" / "my_photos")
    with pytest.raises(DataError, match=rf"{wrong} does not exist: did you mean {right}( or .*)?\?"):
        BenchmarkSet.open(wrong)
    with pytest.raises(DataError, match=r"did you mean \w+ or \w+ or \w+\?"):  # a letter of nearly all names
        BenchmarkSet.open("a")
    with pytest.raises(DataError, match="qqqq does not exist"):
        BenchmarkSet.open("qqqq")
