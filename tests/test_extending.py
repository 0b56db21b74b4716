"""Every example of docs/extending.md: its modules are imported by their paths and do what the page says."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import SMALL, SMOKE
from helpers import ROOT, tiny_embedder, tiny_tokenizer, write_benchmark, write_shards

import dualenc
from dualenc import TextConfig, TextPredictor
from dualenc.cli import main
from dualenc.formats.huggingface.families import FAMILIES
from dualenc.models import TextModel

PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
MODULES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's modules in a folder of their own, where Python and its new processes find them."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, text in MODULES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    yield
    for name in MODULES:
        sys.modules.pop(Path(name).stem, None)


def test_the_page_has_an_example_of_each_part() -> None:
    assert len(MODULES) == 6
    parts = re.findall(r"^## (?:A|An) (.*)$", PAGE, re.MULTILINE)
    assert parts == ["loss", "augmentation", "text family", "head", "evaluation kind", "export format"]


@pytest.mark.long
def test_a_loss_and_an_augmentation(tmp_path: Path, seed: int) -> None:
    from triplet import triplet_loss  # type: ignore[import-not-found]

    image, text = (F.normalize(torch.randn(6, 4), dim=-1) for _ in range(2))
    scores = (image @ text.T).tolist()
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        expected += max(0.0, 0.2 + max(scores[i][j] for j in others) - scores[i][i]) / 6
        expected += max(0.0, 0.2 + max(scores[j][i] for j in others) - scores[i][i]) / 6
    assert triplet_loss(image, text, torch.tensor(1.0)).item() == pytest.approx(expected, abs=1e-6)
    write_shards(tmp_path / "shards", [20, 15], seed)
    run = tmp_path / "run"
    main([
        "fit", "--config", str(SMOKE), *SMALL, "--data.train", str(tmp_path / "shards"), "--trainer.max_steps", "4",
        "--trainer.default_root_dir", str(run), "--seed_everything", str(seed), "--model.loss", "triplet.triplet_loss",
        "--data.augment", json.dumps({"class_path": "posterize.Posterized", "init_args": {"bits": 4}}),
    ])  # fmt: skip
    assert "posterize.Posterized" in (run / "config.yaml").read_text()
    assert "4,train/loss" in (run / "metrics.csv").read_text()


def test_a_text_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    text = TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=12, types=2)
    before = TextPredictor(TextModel(text).eval(), tokenizer)
    before.save(tmp_path / "model")
    (tmp_path / "model" / "dualenc.json").unlink()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["model_type"] = "medical-bert"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(dualenc.ModelError, match="medical-bert"):
        dualenc.load_text(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.delitem(FAMILIES, "medical-bert", raising=False)
        __import__("medical_bert")
        found = dualenc.load_text(tmp_path / "model", "cpu")
        FAMILIES.pop("medical-bert")
    assert torch.equal(found.embed(["a cat"]), before.embed(["a cat"]))


@pytest.mark.long
def test_a_head(tmp_path: Path, seed: int) -> None:
    words = ["poor", "fair", "good"]
    lines = [f"a {words[i % 3]} film {i}\t{words[i % 3]}" for i in range(60)]
    (tmp_path / "stars.tsv").write_text("\n".join(["text\tlabel", *lines]))
    heads = {"stars": {"kind": "ordinal.Ordinal", "labels": words}}
    settings = {
        "seed_everything": seed,
        "trainer": {"max_steps": 4, "default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "devices": 1},
        "run": {"monitor": "val/stars/accuracy"},
        "model": {"class_path": "dualenc.training.TextTask", "init_args": {
            "heads": heads, "text": {"vocab_size": 120, "width": 16, "layers": 1, "heads": 2, "context_length": 12},
        }},
        "data": {"class_path": "dualenc.training.TextData", "init_args": {
            "train": {"stars": {"files": str(tmp_path / "stars.tsv")}}, "val": 0.25, "batch_size": 8, "workers": 0,
        }},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    assert dualenc.load_text(tmp_path / "run", "cpu").classify(["a good film"])[0]["label"] in words


def test_an_evaluation_kind(tmp_path: Path, seed: int) -> None:
    embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "model")
    data = write_benchmark(tmp_path / "photos", seed, counts=(9, 5))
    for name in ("a", "b"):
        main([
            "evaluate", str(tmp_path / "model"), str(data), "--kind", "uniformity.Uniformity",
            "--out", str(tmp_path / name), "--workers", "0",
        ])  # fmt: skip
    (result,) = json.loads((tmp_path / "a" / "evaluate.json").read_text())
    found = dualenc.BenchmarkSet.open(data)
    image = embedder.embed_images([found.source.decode(i) for i in range(len(found))]).double()
    potential = (-2 * torch.cdist(image, image) ** 2).exp().mean().item()
    assert result["metrics"]["potential"] == pytest.approx(potential, abs=1e-6)
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--kinds", "uniformity.Uniformity"])


@pytest.mark.long
def test_an_export_format(tmp_path: Path, seed: int) -> None:
    embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "model")
    main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "projection.Temperature"])
    scale = np.load(tmp_path / "out" / "temperature.npy")
    assert scale == pytest.approx(embedder.model.logits()[0].item())
    assert json.loads((tmp_path / "out" / "export.json").read_text())["format"] == "temperature"
    assert "np.load('temperature.npy')" in (tmp_path / "out" / "README.md").read_text()
