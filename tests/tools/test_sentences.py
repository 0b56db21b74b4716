"""Tests of tools/sentences.py on embeddings with a known result, and on files."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics.cluster import contingency_matrix

import dualenc
from tools.sentences import main, purity, read, sentences


def clouds(rng, count, labels, spread):
    """Draw texts that spell out their own vectors, which lie around the center of their class, and their labels."""
    centers = 10 * np.eye(len(labels), 6)
    drawn = rng.integers(len(labels), size=count)
    vectors = centers[drawn] + spread * rng.normal(size=(count, 6))
    return [" ".join(map(str, row)) for row in vectors], [labels[i] for i in drawn]


def embed(texts, batch_size=256):
    return torch.tensor([[float(x) for x in text.split()] for text in texts])


def test_separate_classes_are_found(seed):
    rng, labels = np.random.default_rng(seed), ["sports", "world", "money"]
    section = sentences(embed, clouds(rng, 150, labels, 1), clouds(rng, 90, labels, 1), "news", "model")
    assert section.result["metrics"] == {"linear_acc1": 1, "cluster_purity": 1}
    assert 1 / 3 <= section.result["chance"]["cluster_purity"] < 0.7
    assert section.points is not None
    assert section.points.xy.shape == (90, 2)
    names = [section.points.names[i] for i in section.points.label]
    assert len({tuple(np.round(section.points.xy[[n == name for n in names]].mean(0))) for name in labels}) == 3


def test_random_labels_give_chance(seed):
    """Check that labels independent of the vectors give metrics near the reported chance."""
    rng, labels = np.random.default_rng(seed), ["a", "b", "c", "d"]
    (train, _), (dev, _) = clouds(rng, 200, labels, 1), clouds(rng, 400, labels, 1)
    drawn = [rng.choice(labels, n, p=[0.4, 0.2, 0.2, 0.2]).tolist() for n in (200, 400)]
    result = sentences(embed, (train, drawn[0]), (dev, drawn[1]), "news", "model").result
    assert result["chance"]["linear_acc1"] == drawn[1].count("a") / 400
    for name, value in result["metrics"].items():
        assert 0.2 < value < result["chance"][name] + 0.1, name
    with pytest.raises(SystemExit, match="no training text has the label 'e'"):
        sentences(embed, (train, drawn[0]), (dev, ["e"] * 400), "news", "model")


def test_purity():
    clusters, targets = torch.randint(4, (2, 50)).numpy()
    assert purity(clusters, targets) == pytest.approx(contingency_matrix(targets, clusters).max(0).sum() / 50)


def test_main_writes_the_page_from_files(tmp_path, monkeypatch, seed, capsys):
    rng = np.random.default_rng(seed)
    for split, count in (("train", 60), ("dev", 30)):
        texts, labels = clouds(rng, count, ["<sport>", '"world'], 1)
        halves = [" ".join(text.split()[:3]) + "\t" + " ".join(text.split()[3:]) for text in texts]
        lines = ["start\tend\tlabel", *(f"{half}\t{label}" for half, label in zip(halves, labels))]
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    files = [str(tmp_path / f"{split}.tsv") for split in ("train", "dev")]
    fake = type("Predictor", (), {"embed": staticmethod(embed)})
    monkeypatch.setattr(dualenc, "load_text", lambda spec: fake, raising=False)
    main(["somewhere", *files, "--text", "start", "end", "--out", str(tmp_path / "out")])
    (result,) = json.loads((tmp_path / "out" / "sentences.json").read_text())
    assert result["metrics"] == {"linear_acc1": 1, "cluster_purity": 1}
    assert result["n"] == 30
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;sport&gt;" in page
    assert '<div class="map">' in page
    assert "linear_acc1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"train.tsv has no column 'text'"):
        read(tmp_path / "train.tsv", ["text"], "label")
    (tmp_path / "dev.tsv").write_text("text\tlabel\na\tb\nonly\n")
    with pytest.raises(SystemExit, match=r"dev.tsv line 3: its number of columns"):
        read(tmp_path / "dev.tsv", ["text"], "label")
