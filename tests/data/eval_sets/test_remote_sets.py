"""Evaluation sets by URL: they equal those of the same local folder, whatever the server does."""

import random
import string

import numpy as np
import pytest
from helpers import SIZE, forget_copies, write_benchmark

import dualenc.data.shards.remote as storage
from dualenc.data import BenchmarkSet, Preprocess, ShardIndex
from dualenc.data.shards.remote import StorageError
from dualenc.utils.errors import DataError
from dualenc.utils.urls import join

pytestmark = [
    pytest.mark.usefixtures("here"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python >= 3.12
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),  # in botocore
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # connections that fsspec keeps open
]


def decoded(data):
    return np.concatenate([batch.images.numpy() for batch in data.images(Preprocess(SIZE), batch_size=3)])


def check_equal(found, expected):
    """Check that two sets differ only in their location."""
    assert (found.kind, found.split, found.classnames, found.templates) == (
        expected.kind, expected.split, expected.classnames, expected.templates
    )  # fmt: skip
    assert [found.key(i) for i in range(len(found))] == [expected.key(i) for i in range(len(expected))]
    assert found.targets.tolist() == expected.targets.tolist()
    assert found.captions[0] == expected.captions[0]
    assert found.captions[1].tolist() == expected.captions[1].tolist()
    assert np.array_equal(decoded(found), decoded(expected))
    assert found.fingerprint == expected.fingerprint
    assert found.problems == expected.problems == []


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("kind", ["classification", "multilabel", "retrieval"])
def test_a_url_equals_the_local_folder(web, seed, here, kind, indexed):
    folder = write_benchmark(web.folder / "some" / "set", seed, kind)
    local = BenchmarkSet.open(folder)
    index = folder / "test" / "dualenc.index"
    assert index.exists()  # made by opening the local folder
    if not indexed:
        index.unlink()
    for url in (f"{web.url}/some/set", f"{web.url}/some/set/"):
        found = BenchmarkSet.open(url)
        assert (found.name, found.path) == ("set", url)
        check_equal(found, local)
    shards = [f"some/set/test/{i}.tar" for i in range(2)]
    assert [web.gets(shard) for shard in shards] == [1, 1]  # one download for scanning and reading
    forget_copies(here)
    BenchmarkSet.open(f"{web.url}/some/set")
    assert [web.gets(shard) for shard in shards] == [2, 2]  # for the labels, with the known index


def test_indexed_shards_are_not_scanned_again(web, seed, here, monkeypatch):
    write_benchmark(web.folder / "set", seed)
    before = BenchmarkSet.open(f"{web.url}/set")
    assert before.item_ids.shape == (7,)
    scans = []
    monkeypatch.setattr("dualenc.data.shards.index.scan", lambda url, *_: scans.append(url))
    after = BenchmarkSet.open(f"{web.url}/set")
    assert after.fingerprint == before.fingerprint
    assert all("image" in part.arrays for part in after.index.parts)
    assert scans == []


@pytest.mark.long
def test_splits_of_a_remote_set(web, seed):
    folder = write_benchmark(web.folder / "set", seed, split="train", counts=(2,))
    url = f"{web.url}/set"
    assert BenchmarkSet.open(url).split == "train"  # the only one
    write_benchmark(folder, seed, split="val", counts=(3,))
    write_benchmark(folder, seed, split="own one", counts=(1,))
    assert BenchmarkSet.splits(url) == ["train", "val"]
    with pytest.raises(DataError, match=r"train, val .* test"):
        BenchmarkSet.open(url)
    with pytest.raises(DataError, match="no split 'test', only train, val"):
        BenchmarkSet.open(url, "test")
    assert [len(BenchmarkSet.open(url, split)) for split in ("train", "val", "own one")] == [2, 3, 1]
    write_benchmark(folder, seed, split="test", counts=(4,))
    web.log.clear()
    assert len(BenchmarkSet.open(url)) == 4
    assert not any("train" in name or "val" in name for _, name in web.log)


def test_urls_without_a_set(web):
    web.folder.mkdir(exist_ok=True)
    (web.folder / "page" / "test").mkdir(parents=True)
    (web.folder / "page" / "test" / "nshards.txt").write_text("<!doctype html>" + "x" * 10_000)
    for url in (f"{web.url}/set", web.url):
        with pytest.raises(DataError, match=r"not in the CLIP_benchmark layout: no <split>/nshards\.txt there"):
            BenchmarkSet.open(url)
    with pytest.raises(DataError, match=r"classnames\.txt is missing"):
        BenchmarkSet.open(f"{web.url}/page")
    (web.folder / "page" / "dataset_type.txt").write_text("retrieval")
    with pytest.raises(DataError, match=r"/page/test/nshards\.txt: '<!doctype html>x{25}' is not a number of shards"):
        BenchmarkSet.open(f"{web.url}/page")
    with pytest.raises(DataError, match=r"ftp://.* s3://"):
        BenchmarkSet.open("ftp://host/set")
    with pytest.raises(StorageError, match=r"nshards\.txt: .* 6 tries"):
        BenchmarkSet.open("http://127.0.0.1:9/set")


@pytest.mark.parametrize("how", ["absent", "cut", "fails"])
def test_a_shard_that_cannot_be_downloaded(web, seed, how):
    folder = write_benchmark(web.folder / "set", seed)
    shard = folder / "test" / "1.tar"
    if how == "absent":
        shard.unlink()
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:-2000])
    else:
        web.fail("set/test/1.tar", 503, always=True)
    data = BenchmarkSet.open(f"{web.url}/set")
    ((problem, (name,)),) = [(problem.what, problem.names) for problem in data.problems]
    assert problem == "shard cannot be read"
    assert f"{web.url}/set/test/1.tar" in name
    assert {"absent": "no such file", "cut": "cut off", "fails": "503"}[how] in name
    assert data.targets.tolist() == [0, 1, 2]
    assert len(decoded(data)) == len(data.item_ids) == 3


def test_a_shard_that_is_deleted_after_it_was_indexed(web, seed, here):
    """The set publishes its index, so a deleted shard is found only when its labels are read."""
    folder = write_benchmark(web.folder / "set", seed, "retrieval", counts=(2, 3, 2))
    whole = BenchmarkSet.open(folder)
    (folder / "test" / "1.tar").unlink()
    data = BenchmarkSet.open(f"{web.url}/set")
    assert [problem.what for problem in data.problems] == ["shard cannot be read"]
    assert len(data.problems[0].names) == 1  # one name for all samples
    assert [data.key(i) for i in range(len(data))] == [whole.key(i) for i in (0, 1, 5, 6)]
    texts, owner = whole.captions
    kept = [(text, [0, 1, 5, 6].index(i)) for text, i in zip(texts, owner.tolist()) if i in (0, 1, 5, 6)]
    assert list(zip(data.captions[0], data.captions[1].tolist(), strict=True)) == kept
    assert len(decoded(data)) == 4


def test_unexpected_numbers_of_samples_of_a_remote_set(web, seed):
    folder = write_benchmark(web.folder / "set", seed)
    (folder / "test" / "sizes.json").write_text('{"0.tar": 3, "1.tar": 5}')
    (problem,) = BenchmarkSet.open(f"{web.url}/set").problems
    assert problem.what == "unexpected number of samples"
    assert problem.names == [f"{web.url}/set/test/1.tar: 4, expected 5 (sizes.json)"]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("some/set", "some/set/test/0.tar"),
        ("https://host/set", "https://host/set/test/0.tar"),
        ("https://host/set/", "https://host/set/test/0.tar"),
        ("https://me:a?b@host/set?signature=a/b&n=1#top", "https://me:a?b@host/set/test/0.tar?signature=a/b&n=1#top"),
        ("s3://bucket/what?/set", "s3://bucket/what?/set/test/0.tar"),
    ],
)
def test_the_url_of_a_file_in_a_remote_folder(folder, expected):
    assert join(folder, "test/0.tar") == expected


def secret():
    return "".join(random.SystemRandom().choices(string.ascii_letters, k=16))


def test_secrets_are_used_but_not_displayed(web, seed):
    password, signature = secret(), secret()
    web.credentials = f"user:{password}"
    folder = write_benchmark(web.folder / "set", seed)
    (folder / "test" / "nshards.txt").write_text("3")
    (folder / "test" / "__len__").write_text("99")
    (folder / "classnames.txt").write_text("a\nb\nc\nd\n")  # 4, 5 are out of range
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\nno\n")
    base = web.url.replace("://", f"://user:{password}@")
    data = BenchmarkSet.open(f"{base}/set?signature={signature}")
    assert data.targets.tolist() == [0, 1, 2, 3, 0]
    assert (data.name, data.path) == ("set", f"{web.url}/set")
    assert len(data.problems) == 4
    list(data.images(Preprocess(SIZE)))
    shown = repr(data.problems) + repr(data.key(0))
    (folder / "zeroshot_classification_templates.txt").write_text("no")
    for url in (f"{base}/set?signature={signature}", f"{base}/other?signature={signature}", f"{web.url}/set"):
        with pytest.raises(DataError) as error:
            BenchmarkSet.open(url)
        shown += str(error.value)
    assert password not in shown
    assert signature not in shown


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("https://huggingface.co/datasets/clip-benchmark/wds_cars/tree/main", "resolve/main/"),
        ("https://huggingface.co/datasets/clip-benchmark/wds_cars/tree/v1.0/", "resolve/v1.0/"),
        ("https://huggingface.co/datasets/clip-benchmark/wds_cars", "resolve/main/"),
        ("https://huggingface.co/datasets/clip-benchmark/wds_cars/resolve/main", "resolve/main/"),
        ("https://huggingface.co/datasets/clip-benchmark/wds_cars/tree/main/in/here", "resolve/main/in/here/"),
    ],
)
def test_pages_of_the_hub(web, seed, monkeypatch, url, path):
    """The URL of a page is converted to the URL of its files."""
    folder = f"datasets/clip-benchmark/wds_cars/{path}"
    local = BenchmarkSet.open(write_benchmark(web.folder / folder, seed))
    (web.folder / folder / "test" / "dualenc.index").unlink()
    web_filesystem = storage._filesystem

    class LocalHub:
        """File system of the hub, served by this machine."""

        def __init__(self, url):
            assert url.startswith(f"https://huggingface.co/{folder}")
            self.inner = web_filesystem(url)

        def get_file(self, url, path):
            return self.inner.get_file(url.replace("https://huggingface.co", web.url), path)

        def info(self, url):
            return self.inner.info(url.replace("https://huggingface.co", web.url))

    monkeypatch.setattr(storage, "_filesystem", LocalHub)
    found = BenchmarkSet.open(url)
    assert (found.name, found.path) == ("wds_cars", url)
    check_equal(found, local)


@pytest.mark.long
def test_s3(s3, web, seed, here):
    folder = write_benchmark(web.folder / "set", seed)
    local = BenchmarkSet.open(folder)
    bucket = s3()
    bucket.put([path for path in folder.iterdir() if path.is_file()], "deep/set/")
    bucket.put([path for path in (folder / "test").iterdir() if path.suffix != ".index"], "deep/set/test/")
    found = BenchmarkSet.open(f"{bucket.url}/deep/set")
    assert (found.name, BenchmarkSet.splits(f"{bucket.url}/deep/set")) == ("set", ["test"])
    check_equal(found, local)
    assert isinstance(found.index, ShardIndex)


def test_names_on_the_hub(web, seed, monkeypatch):
    from dualenc.data.eval_sets.shard_sets import set_name

    for url, name in (
        ("hf://datasets/owner/name", "name"),
        ("hf://datasets/owner/name@v1/some/folder", "name"),
        ("https://huggingface.co/datasets/owner/name.v2/tree/main/test", "name.v2"),
        ("s3://bucket/some/set/", "set"),
        ("gs://bucket", "bucket"),
    ):
        assert set_name(url) == name
