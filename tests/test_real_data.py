"""Data sets of shared/data, if the checkout has them."""

import json

import numpy as np
import pytest
import torch
from helpers import DATA, needs_data, tiny_embedder

import dualenc
from dualenc.data import BenchmarkSet, Preprocess, ShardIndex, decode_image
from dualenc.data.pairs import captions_of, only_pairs

pytestmark = needs_data

SETS = {  # folder -> kind, samples by split, number of classes
    "zeroshot_cifar10": ("classification", {"test": 2000, "train": 1500}, 10),
    "zeroshot_clothing": ("classification", {"test": 372}, 10),
    "zeroshot_flowers5": ("classification", {"test": 500, "train": 750}, 5),
    "zeroshot_tinyimagenet_a": ("classification", {"test": 1200}, 100),
    "retrieval_emoji_twemoji": ("retrieval", {"test": 493}, 0),
    "retrieval_flickr8k_test_a": ("retrieval", {"test": 500}, 0),
    "retrieval_flickr8k_val": ("retrieval", {"test": 1000}, 0),
}
TRAIN = {"emoji": 2317, "flickr8k": 6000, "photos_full": 240}


@pytest.mark.parametrize("name", SETS)
def test_evaluation_sets(name, seed):
    kind, splits, classes = SETS[name]
    for split, count in splits.items():
        data = BenchmarkSet.open(DATA / name, split)
        assert (data.kind, len(data), len(data.classnames)) == (kind, count, classes)
        assert data.problems == []
        assert len(data.item_ids) == count
        if kind == "retrieval":
            captions, owner = data.captions
            per_image = 1 if "emoji" in name else 5
            assert len(captions) == per_image * count
            assert torch.equal(owner.bincount(), torch.full((count,), per_image))
        else:
            assert sorted(set(data.targets.tolist())) == list(range(classes))
        rows = np.sort(np.random.default_rng(seed).choice(count, 3, replace=False))
        for sample in data.index.take(rows):
            image = Preprocess(32)(decode_image(sample.read(sample.image)))
            assert image.shape == (3, 32, 32)
            assert image.float().std() > 1
    assert BenchmarkSet.open(DATA / name).split == "test"
    assert BenchmarkSet.splits(DATA / name) == sorted(splits)


@pytest.mark.parametrize("name", ["zeroshot_flowers5", "retrieval_flickr8k_val"])
def test_evaluation_sets_as_loose_files_and_by_url(name, tmp_path, web, here):
    """Check that the same images and captions have the same fingerprint in shards, in loose files and at a URL."""
    data = BenchmarkSet.open(DATA / name)
    loose, lines = tmp_path / "loose", []
    for i, sample in enumerate(data.index):
        if data.kind == "retrieval":
            file = loose / "images" / f"{i:04d}.{sample.image}"
            lines += [json.dumps({"image": file.name, "captions": captions_of_row(data, i)}) + "\n"]
        else:
            file = loose / f"{int(data.targets[i]):02d}" / f"{i:04d}.{sample.image}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(sample.read(sample.image))
    if lines:
        (loose / "captions.jsonl").write_text("".join(lines))
    found = BenchmarkSet.open(loose)
    order = sorted(range(len(data)), key=lambda i: 0 if lines else int(data.targets[i]))  # Classes are folders.
    assert np.array_equal(found.item_ids, data.item_ids[order])
    assert torch.equal(found.targets, data.targets[order] if len(data.targets) else data.targets)
    if lines:
        assert found.fingerprint == data.fingerprint
    web.folder.mkdir(exist_ok=True)
    (web.folder / name).symlink_to(DATA / name)
    remote = BenchmarkSet.open(f"{web.url}/{name}")
    assert (remote.fingerprint, remote.problems) == (data.fingerprint, [])


def captions_of_row(data, i):
    texts, owner = data.captions
    return [text for text, row in zip(texts, owner.tolist()) if row == i]


def test_every_image_of_a_real_set_can_be_decoded():
    data = BenchmarkSet.open(DATA / "zeroshot_clothing")
    batches = list(data.images(Preprocess(32), workers=2))
    assert [row for batch in batches for row in batch.rows] == list(range(372))
    assert not any(batch.bad for batch in batches)


@pytest.mark.parametrize("name", TRAIN)
def test_training_sets(name, seed):
    index = ShardIndex.build(DATA / name)
    assert len(index) == TRAIN[name]
    pairs, without = only_pairs(index, "txt")
    assert len(pairs) == len(index)
    assert without == []
    rows = np.sort(np.random.default_rng(seed).choice(len(index), 5, replace=False))
    for sample in index.take(rows):
        assert captions_of(sample, "txt")
        assert decode_image(sample.read(sample.image)).float().std() > 1
        assert isinstance(sample.read_json(), dict)
    if name == "flickr8k":
        fields = index[0].read_json()
        (field,) = [key for key, value in fields.items() if isinstance(value, list)]
        assert len(captions_of(index[0], f"json.{field}")) == 5


def test_transparent_emojis_are_put_on_white():
    index = ShardIndex.build(DATA / "emoji" / "train-000000.tar")
    corners = [decode_image(index[i].read("png"))[:, 0, 0].tolist() for i in range(0, len(index), 25)]
    assert corners.count([255, 255, 255]) > len(corners) * 0.8


def test_split_keeps_equal_emojis_together():
    train, val = ShardIndex.build(DATA / "emoji").split(0.1)
    assert len(train) + len(val) == 2317
    assert 0.07 < len(val) / 2317 < 0.13
    assert not {s.read("png") for s in train} & {s.read("png") for s in val}


def test_tiny_model_is_evaluated_on_a_real_set(seed):
    result = dualenc.evaluate(tiny_embedder(seed), DATA / "zeroshot_clothing")
    assert result["n"] == 372
    assert result["metrics"]["acc1"] < result["metrics"]["acc5"]
