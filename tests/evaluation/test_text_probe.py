"""`dualenc probe` on tables of texts: regression and clusters, compared with scikit-learn on the same vectors."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import WORDS, tiny_embedder, tiny_tokenizer, write_benchmark
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import v_measure_score
from sklearn.metrics.cluster import contingency_matrix

from dualenc.cli import main
from dualenc.data.eval_sets.labeled_texts import open_labeled_texts
from dualenc.evaluation import TextProbe, compare
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.inference.text_tower import TextTower
from dualenc.models import TextConfig, TextModel

LABELS = ["<sport>", '"world', "0"]


def write_tables(folder: Path, rng: np.random.Generator) -> tuple[list[str], list[str], list[str], list[str]]:
    """Write tables whose labels depend on the words, and return texts and labels of both."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for split, count in (("train", 90), ("dev", 60)):
        drawn = np.r_[0, 1, 2, rng.integers(3, size=count - 3)]
        words = [(rng.choice(WORDS[4 * c : 4 * c + 6], 3).tolist(), rng.choice(WORDS, 2).tolist()) for c in drawn]
        lines = [f"{' '.join(a)}\t{' '.join(b)}\t{LABELS[c]}" for (a, b), c in zip(words, drawn)]
        (folder / f"{split}.tsv").write_text("\n".join(["title\tbody\tkind", *lines]) + "\n")
        found += [[" ".join([*a, *b]) for a, b in words], [LABELS[c] for c in drawn]]
    return found[0], found[1], found[2], found[3]


def save_model(path: Path) -> TextPredictor:
    tokenizer = tiny_tokenizer()
    TextPredictor(
        TextModel(TextConfig(tokenizer.vocab_size, 16, 1, 2, context_length=12, pool="mean"), {}), tokenizer
    ).save(path)
    return load_text(path, "cpu")


def test_the_command_equals_scikit_learn(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    train, targets, dev, wanted = write_tables(tmp_path / "news", np.random.default_rng(seed))
    it = save_model(tmp_path / "model")
    files = [str(tmp_path / "news" / f"{name}.tsv") for name in ("train", "dev")]
    words = [str(tmp_path / "model"), *files, "--text", "title", "body", "--label", "kind"]
    main(["probe", *words, "--out", str(tmp_path / "out"), "--csv", str(tmp_path / "table.csv")])
    (result,) = json.loads((tmp_path / "out" / "probe.json").read_text())
    x, y = it.embed(train).double().numpy(), it.embed(dev).double().numpy()
    peer = LogisticRegression(C=result["chosen"]["C"], tol=1e-9, max_iter=10_000).fit(x, targets)
    assert result["metrics"]["accuracy"] == pytest.approx(peer.score(y, wanted), abs=1.01 / 60)  # one near the border
    first = max(sorted(set(targets)), key=targets.count)
    baselines = {label: wanted.count(label) / 60 for label in targets if targets.count(label) == targets.count(first)}
    assert result["chance"]["accuracy"] in [pytest.approx(x) for x in baselines.values()]
    assert result["n"] == 60
    assert set(result["intervals"]) == set(result["metrics"]) == {"accuracy", "purity", "v_measure"}
    for name in ("purity", "v_measure"):
        assert 0 < result["chance"][name] < 0.7, name
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;sport&gt;" in page
    assert '<div class="map">' in page
    assert "60 texts, in the two directions" in page
    capsys.readouterr()
    main(["probe", *words, "--csv", str(tmp_path / "table.csv")])
    assert "0 results added, 1 found there" in capsys.readouterr().out
    (found,) = compare(tmp_path / "out", tmp_path / "out")
    assert found.result["differences"]["v_measure"][2] == 0


def test_clusters_agree_with_classes_as_scikit_learn_says(tmp_path: Path, seed: int) -> None:
    _, _, _, wanted = write_tables(tmp_path, np.random.default_rng(seed))
    data = open_labeled_texts(str(tmp_path / "train.tsv"), str(tmp_path / "dev.tsv"), ("body",), "kind")
    embedder = tiny_embedder(seed)
    found = TextProbe().evaluate(TextTower(embedder), data)
    clusters, metrics = found.items["cluster"].numpy(), found.section.result["metrics"]
    table = contingency_matrix(wanted, clusters)
    assert metrics["purity"] == pytest.approx(table.max(0).sum() / 60)
    assert metrics["v_measure"] == pytest.approx(v_measure_score(wanted, clusters))
    assert data.labels == ["0", '"world', "<sport>"]  # numbers first
    assert [data.labels[i] for i in found.items["target"].tolist()] == wanted


def test_separate_classes_are_found_and_random_labels_give_chance(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)

    class Clouds(TextTower):
        """Texts spell out their own vectors, around the center of their class."""

        name = fingerprint = "clouds"  # type: ignore[assignment]

        def embed(self, texts: Any, prompt: Any = None, dim: Any = None) -> torch.Tensor:
            return torch.tensor([[float(x) for x in text.split()] for text in texts])

    results = []
    for random in (False, True):
        for split, count in (("train", 150), ("dev", 300)):
            drawn = rng.integers(3, size=count)
            vectors = 10 * np.eye(3, 6)[drawn] + rng.normal(size=(count, 6))
            labels = rng.choice(3, count, p=[0.5, 0.25, 0.25]) if random else drawn
            lines = [f"{' '.join(map(str, row))}\t{label}" for row, label in zip(vectors, labels)]
            (tmp_path / f"{split}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
        data = open_labeled_texts(str(tmp_path / "train.tsv"), str(tmp_path / "dev.tsv"))
        results.append(TextProbe().evaluate(Clouds(tiny_embedder(seed)), data).section.result)
    assert all(value > 0.95 for value in results[0]["metrics"].values()), results[0]
    for name, value in results[1]["metrics"].items():
        assert abs(value - results[1]["chance"][name]) < 0.15, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.tsv", "IMAGES"], "train.tsv is a table of texts, but IMAGES is not"),
        (["train.tsv"], "texts need two tables, .* found 1"),
        (["train.tsv", "train.tsv"], "cannot be both learned from and measured on"),
        (["train.tsv", "gone.tsv", "--text", "body", "--label", "kind"], "gone.tsv"),
        (["train.tsv", "dev.tsv"], "train.tsv has no column 'text', only 'title', 'body', 'kind'"),
        (["train.tsv", "dev.tsv", "--text", "body", "--label", "kid"], "has no column 'kid'"),
        (["train.tsv", "dev.tsv", "--text", "body", "--label", "kind", "--shots", "2"], "--shots has no use for"),
        (["train.tsv", "dev.tsv", "--text", "body", "--label", "kind", "--draws", "2"], "--draws has no use for"),
        (["train.tsv", "broken.tsv", "--text", "body", "--label", "kind"], "broken.tsv line 3: its number of columns"),
        (["train.tsv", "new.tsv", "--text", "body", "--label", "kind"], "new.tsv line 2 has the label 'other', which"),
        (["IMAGES", "--label", "kind"], "--label is for tables of texts"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, seed: int, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tables(tmp_path, np.random.default_rng(seed))
    Path("broken.tsv").write_text("title\tbody\tkind\na\tb\t0\na\tb\n")
    Path("new.tsv").write_text("title\tbody\tkind\na\tb\tother\n")
    if "IMAGES" in words:
        write_benchmark(Path("IMAGES"), seed)
    save_model(tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["probe", "model", *words])
    found = capsys.readouterr().err
    assert found.count("\n") == 1
    assert re.search(message, found), found
