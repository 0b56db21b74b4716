import dataclasses
import json
import math
import pickle
import random

import numpy as np
import pytest
import torch
from helpers import encode, smooth, tiny_embedder, write_benchmark, write_choices, write_tar
from safetensors import SafetensorError
from safetensors.torch import load_file

import dualenc
from dualenc import BenchmarkSet, DataError
from dualenc.data import decode_image
from dualenc.evaluation import (
    KINDS,
    EmbeddingCache,
    SetEmbedder,
    SetEmbeddings,
    compare,
    embed_set,
    evaluate,
    open_sets,
    origin,
    score,
    with_origin,
    write_results,
)
from dualenc.evaluation.probe import FrozenProbes, ProbeSet
from dualenc.evaluation.results import read_results
from dualenc.metrics.probe import few_shot_probe
from dualenc.report import Section

SETS = ["classification", "multilabel", "retrieval"]


@pytest.fixture
def embedder(seed):
    return tiny_embedder(seed)


def spoil(folder, split="test", shard=1):
    """Make the first image of a shard undecodable."""
    path = folder / split / f"{shard}.tar"
    data = bytearray(path.read_bytes())
    place = data.index(b"\xff\xd8\xff")
    data[place : place + 200] = bytes(200)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", SETS)
def test_evaluate_returns_metrics_with_intervals(embedder, tmp_path, seed, kind):
    folder = write_benchmark(tmp_path / "the set", seed, kind, counts=(9, 5))
    result = evaluate(embedder, folder)
    assert json.loads(json.dumps(result)) == result
    assert (result["dataset"], result["kind"], result["n"], result["complete"]) == ("the set", kind, 14, True)
    assert result["model"] == embedder.name
    assert result["problems"] == []
    recalls = {f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)}
    ndcg = {f"{side}_retrieval_ndcg@10" for side in ("image", "text")}
    expected = {
        "classification": {"acc1", "acc5", "mean_per_class_recall", "ece"},
        "multilabel": {"mean_average_precision"},
        "retrieval": {
            *recalls, *ndcg, "text_retrieval_all@5", "text_retrieval_all@10", "mean_recall@1", "median_rank", "mrr",
        },
    }[kind]  # fmt: skip
    assert set(result["metrics"]) == expected
    assert set(result["chance"]) == set(result["intervals"]) == expected - {"ece"}
    assert all(math.isfinite(value) for value in result["metrics"].values())
    assert all(low <= result["metrics"][name] <= high for name, (low, high) in result["intervals"].items())
    assert evaluate(embedder, BenchmarkSet.open(folder)) == result
    assert dualenc.evaluate is evaluate


@pytest.mark.parametrize("kind", SETS)
def test_shares_of_ranks_equal_the_whole(embedder, tmp_path, seed, kind):
    """Check that shares keep the order and are as equal as possible; with more ranks than images, some are empty."""
    data = BenchmarkSet.open(write_benchmark(tmp_path / "s", seed, kind, counts=(2, 2), classes=3))
    whole = embed_set(embedder, data)
    texts = len(data.captions[0]) if kind == "retrieval" else 3
    assert (whole.image.shape, whole.text.shape) == ((4, 8), (texts, 8))
    assert (whole.rows.tolist(), whole.bad) == ([0, 1, 2, 3], [])
    images = embedder.embed_images([decode_image(sample.read("jpg")) for sample in data.index])
    assert (whole.image - images).abs().max() < 1e-6
    if kind == "retrieval":
        text = embedder.embed_texts(data.captions[0])
    else:
        text = dualenc.zero_shot_classifier(embedder, data.classnames, data.templates)
    assert (whole.text - text).abs().max() < 1e-6
    assert (whole.image[0] - whole.image[1]).abs().max() > 1e-3  # control: rows differ
    assert (whole.text[0] - whole.text[1]).abs().max() > 1e-3
    for world in range(1, 6):
        parts = [embed_set(embedder, data, rank=rank, world=world) for rank in range(world)]
        for part in parts:
            assert part.image.dtype == part.text.dtype == torch.float32
            assert part.image.shape[1] == part.text.shape[1] == 8
        for mine, every in ((0, whole.image), (1, whole.text)):
            sizes = [len(part[mine]) for part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert (torch.cat([part[mine] for part in parts]) - every).abs().max() < 1e-6
        assert torch.cat([part.rows for part in parts]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", KINDS)
def test_joined_shares_of_ranks_give_the_same_result(embedder, tmp_path, seed, name):
    """Check every kind, with shares that travel between processes."""
    kind = KINDS[name]
    if kind.sets == ("choice",):
        write_choices(tmp_path / "s", seed)
    else:
        for split in ("train", "test"):
            write_benchmark(tmp_path / "s", seed + len(split), kind.sets[0], counts=(20,), split=split, classes=3)
    (_, data), *_ = open_sets([str(tmp_path / "s")], [kind])
    expected = kind.evaluate(embedder, data)
    for world in (1, 2, 5):
        shares = [kind.embed(data, SetEmbedder(embedder, rank=rank, world=world)) for rank in range(world)]
        whole = SetEmbeddings.join([pickle.loads(pickle.dumps(share)) for share in shares])
        found = kind.evaluated(data, whole, embedder)
        assert found.section.result["metrics"] == pytest.approx(expected.section.result["metrics"], abs=1e-6)
        assert found.section.result["n"] == expected.section.result["n"]
        assert found.items.keys() == expected.items.keys()


@pytest.mark.parametrize("kind", SETS)
def test_evaluate_equals_embed_set_and_score(embedder, tmp_path, seed, kind):
    data = BenchmarkSet.open(write_benchmark(tmp_path / "s", seed, kind, counts=(9, 5)))
    embedded = embed_set(embedder, data)
    section, items = score(data, embedded, embedder)
    assert section.result == evaluate(embedder, data)
    image, text = embedded[:2]
    findings = section.findings
    if kind == "classification":
        right = (findings.predicted == findings.truth).mean()
        assert right == pytest.approx(section.result["metrics"]["acc1"])
        assert findings.truth.tolist() == data.targets.tolist()
        assert findings.predicted.tolist() == (image @ text.T).argmax(1).tolist()
        confidence = (embedder.model.logits()[0] * image @ text.T).softmax(1).max(1).values
        assert findings.confidence == pytest.approx(confidence.detach().numpy(), abs=1e-5)
        shown = {name: (share, n) for name, share, n in section.result["per_class"]}
        for c, name in enumerate(data.classnames):
            own = findings.truth == c
            assert shown[name] == (pytest.approx((findings.predicted == c)[own].mean()), own.sum())
    elif kind == "multilabel":
        assert findings.counts.tolist() == data.targets.sum(0).tolist()
        assert findings.precision.mean() == pytest.approx(section.result["metrics"]["mean_average_precision"])
    else:
        assert list(findings.captions) == data.captions[0]
        right = {asked: [a.rank for a in answers if a.rank == 0] for asked, answers in findings.answers.items()}
        recall = section.result["metrics"]["image_retrieval_recall@1"]
        assert bool(right["text"]) == (recall > 0)
    if kind != "multilabel":
        picture = findings.example if kind == "classification" else findings.picture
        assert picture(3) == data.thumbnail(3)
    assert KINDS[kind].metrics_of_items(items).values() == pytest.approx(section.result["metrics"], abs=1e-12)


def test_progress_is_tracked_by_batches(embedder, tmp_path, seed):
    data = BenchmarkSet.open(write_benchmark(tmp_path / "s", seed, counts=(70,)))
    seen = []

    def track(batches):
        assert len(batches) == 2
        for batch in batches:
            seen.append(len(batch.rows))
            yield batch

    found = KINDS[data.kind].evaluate(embedder, data, track=track)
    assert found.section.result["n"] == sum(seen) == 70
    assert seen == [64, 6]


def test_a_result_is_a_dictionary_printed_as_a_table(embedder, tmp_path, seed):
    folder = write_benchmark(tmp_path / "s", seed, counts=(9, 5))
    result = evaluate(embedder, folder)
    lines = str(result).splitlines()
    assert lines[0] == f"s: classification of 14 by {embedder.name}"
    assert [line.split()[0] for line in lines[1:]] == list(result["metrics"])
    low, high = result["intervals"]["acc1"]
    assert f"{low:.3f} to {high:.3f}" in lines[1]
    assert json.loads(json.dumps(result)) == result
    assert "14 images" in repr(BenchmarkSet.open(folder))
    (folder / "test" / "0.tar").unlink()
    assert "incomplete" in str(evaluate(embedder, folder)).splitlines()[0]


def test_wrong_arguments_are_refused_in_one_line(embedder, tmp_path, seed):
    folder = write_benchmark(tmp_path / "s", seed, counts=(9,))
    with pytest.raises(ValueError, match="the model is 'runs/small': pass an Embedder"):
        evaluate("runs/small", folder)
    for data in (None, 3, ["a"]):
        with pytest.raises(DataError, match="an evaluation set cannot be"):
            evaluate(embedder, data)


def test_accuracy_equals_plain_computation(embedder, tmp_path, seed):
    data = BenchmarkSet.open(write_benchmark(tmp_path / "c", seed, counts=(20,)))
    images = embedder.embed_images([decode_image(sample.read("jpg")) for sample in data.index]).double()
    rows = []
    for name in data.classnames:
        mean = embedder.embed_texts([t.replace("{c}", name) for t in data.templates]).double().mean(0)
        rows.append(mean / mean.norm())
    right = ((images @ torch.stack(rows).T).argmax(1) == data.targets).double().mean().item()
    assert evaluate(embedder, data)["metrics"]["acc1"] == pytest.approx(right)


# Incomplete sets


@pytest.mark.parametrize("kind", SETS)
def test_undecodable_image_is_counted_and_left_out(embedder, tmp_path, seed, kind):
    folder = write_benchmark(tmp_path / "c", seed, kind, counts=(3, 9))
    whole = BenchmarkSet.open(folder)
    found = embed_set(embedder, whole)
    spoil(folder)
    result = evaluate(embedder, folder)
    assert (result["n"], result["complete"]) == (11, False)
    (problem,) = result["problems"]
    assert (problem["what"], problem["count"]) == ("image that cannot be decoded", 1)
    assert "s00003" in problem["names"][0]
    # The metrics equal those of a set without the sample.
    rows = torch.tensor([i for i in range(12) if i != 3])
    without = score(whole, SetEmbeddings(found.image[rows], found.text, rows, []), embedder).section.result
    assert result["metrics"] == pytest.approx(without["metrics"], abs=1e-6)
    assert (
        result["metrics"] != evaluate(embedder, write_benchmark(tmp_path / "d", seed, kind, counts=(3, 9)))["metrics"]
    )


def test_problems_of_set_are_in_result(embedder, tmp_path, seed):
    folder = write_benchmark(tmp_path / "c", seed, counts=(9, 5, 4))
    (folder / "test" / "1.tar").unlink()
    names = (folder / "classnames.txt").read_text().splitlines()
    (folder / "classnames.txt").write_text("\n".join([*names[:-1], names[0]]))
    result = evaluate(embedder, folder)
    assert (result["n"], result["complete"]) == (13, False)
    assert [problem["count"] for problem in result["problems"]] == [1, 1]
    assert any("1.tar" in problem["names"][0] for problem in result["problems"])
    assert any("class 0" in problem["names"][0] for problem in result["problems"])


def test_set_without_decodable_image_is_refused(embedder, tmp_path, seed):
    folder = write_benchmark(tmp_path / "c", seed, counts=(1,))
    spoil(folder, shard=0)
    with pytest.raises(ValueError, match=r"c: no image can be decoded, such as .*s00000"):
        evaluate(embedder, folder)


# The cache


def test_cache_key_is_everything_that_embeddings_depend_on(embedder, tmp_path, seed):
    folder = write_benchmark(tmp_path / "c", seed, counts=(5, 4))
    data = BenchmarkSet.open(folder)
    plain = embed_set(embedder, data)

    def again(embedder, data):
        cache = EmbeddingCache(embedder, tmp_path / "cache")
        found = embed_set(embedder, data, cache=cache)
        return cache.reused, found

    for reused in ([], ["classifier", "images"]):
        was, found = again(embedder, data)
        assert was == reused
        assert all(torch.equal(x, y) for x, y in zip(found[:3], plain[:3]))
        assert found.rows.tolist() == list(range(9))
    # The same images are found under another name, but not if one image differs.
    other = write_benchmark(tmp_path / "elsewhere", seed, counts=(5, 4))
    assert again(embedder, BenchmarkSet.open(other))[0] == ["classifier", "images"]
    spoil(other)
    for _ in range(2):  # A failure is tried again, since it may have been a passing one of the disk.
        reused, found = again(embedder, BenchmarkSet.open(other))
        assert reused == ["classifier"]
        assert [row for row, _ in found.bad] == [5]
        assert "elsewhere" in found.bad[0][1]
    (folder / "zeroshot_classification_templates.txt").write_text("{c}, a thing\n")
    assert again(embedder, BenchmarkSet.open(folder))[0] == ["images"]
    with torch.no_grad():
        next(embedder.model.text.parameters()).view(-1)[7] += 1e-3
    assert again(embedder, data)[0] == []
    changed = dataclasses.replace(embedder.preprocess, mean=(0.4, 0.5, 0.5))
    assert again(dualenc.Embedder(embedder.model, embedder.tokenizer, changed), data)[0] == []


def test_damaged_cache_file_is_replaced(embedder, tmp_path, seed):
    data = BenchmarkSet.open(write_benchmark(tmp_path / "c", seed))
    plain = embed_set(embedder, data, cache=EmbeddingCache(embedder, tmp_path / "cache"))
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[: random.randrange(100)])
    for reused in ([], ["classifier", "images"]):
        cache = EmbeddingCache(embedder, tmp_path / "cache")
        assert torch.equal(embed_set(embedder, data, cache=cache).image, plain.image)
        assert cache.reused == reused


def full(*_):
    raise SafetensorError("No space left on device")


def test_cache_keeps_to_its_limit(embedder, tmp_path, monkeypatch):
    cache = EmbeddingCache(embedder, tmp_path / "cache", limit=3000)
    for i in range(6):
        cache.get("x", i, lambda: {"x": torch.zeros(200)})
        cache.get("x", 0, lambda: {"x": torch.zeros(200)})
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 3000
    assert cache.reused == ["x"] * 6  # an entry in use stays
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("dualenc.evaluation.embed.save_file", full)
    assert cache.get("y", 0, lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]
    assert not list((tmp_path / "cache").glob("*.part"))
    blocked = EmbeddingCache(embedder, tmp_path / "file" / "below")
    assert blocked.get("x", 0, lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]


# Retrieval within a modality, choices, probes


def test_retrieval_within_captions_and_within_images(embedder, tmp_path, seed):
    data = BenchmarkSet.open(write_benchmark(tmp_path / "r", seed, "retrieval", counts=(20,)))
    embedded = embed_set(embedder, data)
    result = KINDS["text-text"].evaluate(embedder, data).section.result
    scores = (embedded.text.double() @ embedded.text.double().T).fill_diagonal_(-torch.inf)
    owner = data.captions[1]
    same = (owner[:, None] == owner).fill_diagonal_(False)
    asks = same.any(1)
    right = same.gather(1, scores.argmax(1, keepdim=True))[asks].double().mean().item()
    name = "text_text_retrieval_recall@1"
    assert result["metrics"][name] == pytest.approx(right, abs=1 / asks.sum().item())  # equal captions tie
    low, high = result["intervals"][name]
    assert low <= result["metrics"][name] <= high
    assert (result["kind"], result["n"]) == ("text-text", len(owner))
    data = BenchmarkSet.open(write_benchmark(tmp_path / "c", seed, counts=(20,)))
    embedded = embed_set(embedder, data)
    section, items = KINDS["image-image"].evaluate(embedder, data)
    scores = (embedded.image.double() @ embedded.image.double().T).fill_diagonal_(-torch.inf)
    right = (data.targets[scores.argmax(1)] == data.targets).double().mean().item()
    assert section.result["metrics"]["image_image_retrieval_recall@1"] == pytest.approx(right)
    assert KINDS["image-image"].metrics_of_items(items).values() == pytest.approx(section.result["metrics"])


def test_choices_equal_plain_computation(embedder, tmp_path, seed):
    lines = write_choices(tmp_path / "w", seed)
    data = BenchmarkSet.open(tmp_path / "w")
    section, items = score(data, embed_set(embedder, data), embedder)
    right = []
    for line in lines:
        image = embedder.embed_images([tmp_path / "w" / "images" / f"{line[f'image_{j}']}.png" for j in range(2)])
        text = embedder.embed_texts([line[f"caption_{j}"] for j in range(2)])
        s = image.double() @ text.double().T
        by_image, by_text = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0], s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
        right.append([float(by_image), float(by_text), float(by_image and by_text)])
    expected = dict(zip(("text_score", "image_score", "group_score"), np.mean(right, 0)))
    assert section.result["metrics"] == pytest.approx(expected)
    assert (section.result["n"], section.result["kind"], section.result["complete"]) == (12, "choice", True)
    assert KINDS["choice"].metrics_of_items(items).values() == pytest.approx(expected)
    (tmp_path / "w" / "images" / "ex_3_img_1.png").write_bytes(b"no picture")
    data = BenchmarkSet.open(tmp_path / "w")
    section, items = score(data, embed_set(embedder, data), embedder)
    assert section.result["n"] == len(items["ids"]) == 11
    assert section.result["metrics"] == pytest.approx(
        dict(zip(expected, np.delete(np.array(right), 3, 0).mean(0).tolist()))
    )


def test_choices_without_complete_instance_are_refused(embedder, tmp_path, seed):
    write_choices(tmp_path / "w", seed, 3)
    for i in range(3):
        (tmp_path / "w" / "images" / f"ex_{i}_img_1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"w: no instance .* such as"):
        evaluate(embedder, tmp_path / "w")


def test_probe_reports_both_classifiers(embedder, tmp_path, seed):
    for split, count in (("train", 40), ("test", 30)):
        write_benchmark(tmp_path / "c", seed + len(split), split=split, counts=(count,), classes=3)
    data, train = (BenchmarkSet.open(tmp_path / "c", split) for split in ("test", "train"))
    section, items = KINDS["probe"].evaluate(embedder, ProbeSet.of(data, train))
    result = section.result
    assert (result["kind"], result["n"], result["learned_from"]) == ("probe", 30, {"train": 40})
    names = {f"{kind}_{name}" for kind in ("linear", "knn") for name in ("acc1", "mean_per_class_recall", "ece")}
    assert set(result["metrics"]) == names
    assert set(result["intervals"]) == {name for name in names if "ece" not in name}
    assert set(result["chosen"]) >= {"linear_C", "knn_k"}
    assert json.loads(json.dumps(result)) == result
    assert KINDS["probe"].metrics_of_items(items).values() == pytest.approx(result["metrics"])
    spoil(tmp_path / "c", "train", 0)
    spoiled = ProbeSet.of(data, BenchmarkSet.open(tmp_path / "c", "train"))
    worse = KINDS["probe"].evaluate(embedder, spoiled).section.result
    assert (worse["learned_from"], worse["complete"]) == ({"train": 39}, False)
    assert worse["problems"][0]["what"] == "image that cannot be decoded (train)"


def test_probe_holds_out_a_fifth_of_a_single_split(embedder, tmp_path, seed):
    """The shares are disjoint, hold every class, keep equal images together, and do not depend on names or order."""
    rng = np.random.default_rng(seed)
    pictures = {name: [encode(smooth(rng, 20, 24)) for _ in range(20)] for name in ("a", "b", "c")}
    for name, images in pictures.items():
        for folder, order in (("one", range(20)), ("two", reversed(range(20)))):
            (tmp_path / folder / name).mkdir(parents=True)
            for place, i in enumerate(order):
                for copy in range(1 + (i < 8)):  # eight images of each class are there twice
                    (tmp_path / folder / name / f"{place}-{copy}.png").write_bytes(images[i])
    data, other = (open_sets([str(tmp_path / name)], [KINDS["probe"]])[0].data for name in ("one", "two"))
    assert isinstance(data, ProbeSet)
    assert isinstance(other, ProbeSet)
    measured, rest = set(data.item_ids), set(data.train.item_ids)
    assert len(data) + len(data.train) == 3 * 28
    assert not measured & rest
    assert len(measured) == 12
    assert data.targets.unique().tolist() == [0, 1, 2]
    assert measured == set(other.item_ids)
    result = KINDS["probe"].evaluate(embedder, data).section.result
    assert result["learned_from"] == {"the rest of test": len(data.train)}
    assert "a fifth of each class of test" in result["notes"][0]
    assert result["n"] == len(data)
    (tmp_path / "few" / "a").mkdir(parents=True)
    (tmp_path / "few" / "b").mkdir()
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (tmp_path / "few" / name).write_bytes(pictures["a"][0])
    with pytest.raises(DataError, match="no class with two different images"):
        open_sets([str(tmp_path / "few")], [KINDS["probe"]])


def test_probe_of_a_few_images(embedder, tmp_path, seed):
    for split, count in (("train", 24), ("test", 30)):
        write_benchmark(tmp_path / "c", seed + len(split), split=split, counts=(count,), classes=3)
    kind = FrozenProbes(shots=(9, 2), draws=4)
    data = open_sets([str(tmp_path / "c")], [kind])[0].data
    section, items = kind.evaluate(embedder, data)
    result = section.result
    few = few_shot_probe(
        *(x for split in ("train", "test") for x in labeled(embedder, tmp_path / "c", split)), shots=(2, 9), draws=4
    )
    for k, found in few.items():
        name = f"linear_acc1_{k}shot"
        assert result["metrics"][name] == pytest.approx(found.right.double().mean().item())
        assert result["intervals"][name] == pytest.approx(found.interval)
        assert result["chance"][name] == pytest.approx(1 / 3)
    assert kind.metrics_of_items(items).values() == pytest.approx(result["metrics"])
    assert sum("fewer images in class 0, class 1, class 2" in note for note in result["notes"]) == 1
    assert kind.settings(data) != FrozenProbes(shots=(2,), draws=4).settings(data) != FrozenProbes().settings(data)
    with pytest.raises(DataError, match="shots"):
        FrozenProbes(shots=(0,))


def labeled(embedder, folder, split):
    """Return the embeddings and the classes of a split."""
    data = BenchmarkSet.open(folder, split)
    return embed_set(embedder, data).image, data.targets


# Comparisons


def described(found, data, embedder):
    """Add to an outcome what was measured."""
    kind = KINDS[found.section.result["kind"]]
    return with_origin(found, origin(kind, data, found.section.result["model"], embedder.fingerprint))


def results(embedder, folder, sets):
    found = [score(data, embed_set(embedder, data), embedder) for data in sets]
    write_results(folder, "zeroshot", [described(*pair, embedder) for pair in zip(found, sets)])
    return found


@pytest.mark.parametrize("kind", SETS)
def test_comparison_has_paired_differences(embedder, tmp_path, seed, kind):
    data = BenchmarkSet.open(write_benchmark(tmp_path / "s", seed, kind, counts=(20, 9)))
    other = tiny_embedder(seed + 1)
    first, second = results(embedder, tmp_path / "a", [data]), results(other, tmp_path / "b", [data])
    (comparison,) = compare(tmp_path / "a", tmp_path / "b")
    result = comparison.result
    assert json.loads(json.dumps(result)) == result
    assert (result["dataset"], result["n"], result["first"]) == ("s", 29, embedder.name)
    before, after = (one[0].section.result["metrics"] for one in (first, second))
    for name, (a, b, difference, low, high) in result["differences"].items():
        assert (a, b) == (pytest.approx(before[name]), pytest.approx(after[name]))
        assert difference == pytest.approx(b - a)
        assert low <= difference <= high
    assert result["differences"].keys() == before.keys() - {"ece"}
    if kind != "multilabel":
        assert comparison.findings.picture(5) == data.thumbnail(5)
    (same,) = compare(tmp_path / "a" / "zeroshot.json", tmp_path / "a")
    assert all(change[2:] == [0, 0, 0] for change in same.result["differences"].values())
    (back,) = compare(tmp_path / "b", tmp_path / "a")
    for name, change in back.result["differences"].items():
        assert change[2:] == pytest.approx([-result["differences"][name][i] for i in (2, 4, 3)])


def test_different_items_are_not_compared(embedder, tmp_path, seed):
    folder = write_benchmark(tmp_path / "s", seed, counts=(9, 5))
    results(embedder, tmp_path / "a", [BenchmarkSet.open(folder)])
    spoil(folder)
    results(embedder, tmp_path / "b", [BenchmarkSet.open(folder)])
    with pytest.raises(DataError, match=r"s: .* were not measured on the same items: 14 and 13 images"):
        compare(tmp_path / "a", tmp_path / "b")
    results(
        embedder, tmp_path / "c", [BenchmarkSet.open(write_benchmark(tmp_path / "x" / "s", seed + 1, counts=(9, 5)))]
    )
    with pytest.raises(DataError, match="14 of 14 images differ"):
        compare(tmp_path / "a", tmp_path / "c")
    other = write_benchmark(tmp_path / "y" / "s", seed, counts=(9, 5))
    rng = np.random.default_rng(seed)
    samples = [{"__key__": "0", "jpg": encode(smooth(rng, 20, 24), "jpeg"), "cls": b"3"}]
    write_tar(other / "test" / "1.tar", samples)
    results(embedder, tmp_path / "d", [BenchmarkSet.open(other)])
    with pytest.raises(DataError, match="14 and 10 images"):
        compare(tmp_path / "a", tmp_path / "d")
    results(embedder, tmp_path / "e", [BenchmarkSet.open(write_benchmark(tmp_path / "other", seed))])
    with pytest.raises(DataError, match=r"have no set in common: s \(classification\); and other \(classification\)"):
        compare(tmp_path / "a", tmp_path / "e")


def test_different_groups_and_classes_are_not_compared(embedder, tmp_path, seed):
    """Check that the same images and captions in other groups are refused."""

    def among(folder, between, kind, change):
        data = BenchmarkSet.open(write_benchmark(tmp_path / folder / "s", seed, kind, counts=(20,)))
        data = dataclasses.replace(data, **change(data))
        found = [KINDS[between].evaluate(embedder, data)]
        write_results(tmp_path / folder, "x", [described(found[0], data, embedder)])

    for between, kind, change in (
        ("image-image", "classification", lambda data: {"targets": data.targets.roll(1)}),
        ("text-text", "retrieval", lambda data: {"captions": (data.captions[0], data.captions[1].flip(0))}),
        ("text-text", "retrieval", lambda data: {"captions": (["a cat", *data.captions[0][1:]], data.captions[1])}),
    ):
        among("a", between, kind, lambda data: {})
        among("b", between, kind, lambda data: {})
        compare(tmp_path / "a", tmp_path / "b")  # control
        among("b", between, kind, change)
        with pytest.raises(DataError, match=r"were not measured on the same items"):
            compare(tmp_path / "a", tmp_path / "b")
    data = BenchmarkSet.open(write_benchmark(tmp_path / "s", seed, counts=(9,), classes=6))
    results(embedder, tmp_path / "c", [data])
    results(embedder, tmp_path / "d", [dataclasses.replace(data, classnames=[*data.classnames, "cat"])])
    with pytest.raises(DataError, match="the same items: 6 and 7 classes"):
        compare(tmp_path / "c", tmp_path / "d")


def test_folder_with_two_models_is_not_compared(embedder, tmp_path, seed):
    sets = [BenchmarkSet.open(write_benchmark(tmp_path / kind, seed, kind)) for kind in SETS[:2]]
    other = dualenc.Embedder(embedder.model, embedder.tokenizer, embedder.preprocess, "another")
    for data, one in zip(sets, (embedder, other)):
        found = [score(data, embed_set(one, data), one)]
        write_results(tmp_path / "a", data.kind, [described(found[0], data, one)])
    with pytest.raises(DataError, match=r"holds results of several models: another, .*; name one of its \.json files"):
        compare(tmp_path / "a", tmp_path / "a")
    compare(tmp_path / "a" / "multilabel.json", tmp_path / "a")


def test_comparison_omits_images_of_missing_set(embedder, tmp_path, seed):
    folder = write_benchmark(tmp_path / "s", seed, "retrieval", counts=(9, 5))
    results(embedder, tmp_path / "a", [BenchmarkSet.open(folder)])
    assert compare(tmp_path / "a", tmp_path / "a")[0].findings is not None
    folder.rename(tmp_path / "moved")
    (comparison,) = compare(tmp_path / "a", tmp_path / "a")
    assert comparison.findings is None
    assert comparison.result["differences"]


def test_unreadable_results_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not hold results: name a folder"):
        compare(tmp_path, tmp_path)
    (tmp_path / "zeroshot.json").write_text("[]")
    with pytest.raises(DataError, match=r"zeroshot\.json and zeroshot\.items\.safetensors cannot be read"):
        read_results(tmp_path / "zeroshot.json")


def test_saved_items_give_the_metrics_again(embedder, tmp_path, seed):
    sets = [BenchmarkSet.open(write_benchmark(tmp_path / kind, seed, kind)) for kind in SETS]
    found = results(embedder, tmp_path / "a", sets)
    kept = load_file(tmp_path / "a" / "zeroshot.items.safetensors")
    assert kept.keys() == {f"{i}/{name}" for i, one in enumerate(found) for name in one.items}
    for (kind, name), (figures, items) in read_results(tmp_path / "a").items():
        assert kind == name
        assert KINDS[kind].metrics_of_items(items).values() == pytest.approx(figures["metrics"], abs=1e-12)


def test_map_shows_principal_components(embedder, tmp_path, seed):
    """Compare with scikit-learn's PCA, whose axes may point the other way."""
    from sklearn.decomposition import PCA

    data = BenchmarkSet.open(write_benchmark(tmp_path / "s", seed, counts=(40,)))
    embedded = embed_set(embedder, data)
    section: Section = score(data, embedded, embedder).section
    pca = PCA(2).fit(embedded.image.double().numpy())
    assert section.points.explained == pytest.approx(pca.explained_variance_ratio_)
    expected = pca.transform(embedded.image.double().numpy())
    assert np.abs(section.points.xy) == pytest.approx(np.abs(expected), abs=1e-6)
    assert section.points.label.tolist() == data.targets.tolist()
