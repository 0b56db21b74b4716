"""Examples run: those in the docstrings of the public names, of which each has one, and the pages' Python programs."""

import doctest
import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, WORDS, encode, tiny_tokenizer, write_tar
from PIL import Image

import dualenc


@pytest.mark.parametrize("name", [name for name in dualenc.__all__ if not name.startswith("_")])
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    thing = getattr(dualenc, name)
    found = doctest.DocTestFinder(recurse=False).find(thing, name, inspect.getmodule(thing))
    assert any(test.examples for test in found), f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in found:
        runner.run(test)
    assert runner.failures == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.long
def test_the_training_loop_without_lightning(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    section = page.partition("\n## Without Lightning\n")[2].partition("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len([line for line in program.splitlines() if line.strip()]) <= 22
    colors = np.random.default_rng(seed).integers(0, 4, (160, 3))  # the caption names the level of each channel
    words = [WORDS[i : i + 4] for i in (0, 4, 8)]
    captions = [" ".join(words[i][level] for i, level in enumerate(color)) for color in colors]
    samples = [
        {
            "__key__": f"{i:03d}",
            "txt": caption.encode(),
            "png": encode(Image.new("RGB", (40, 30), tuple(80 * level for level in color))),
        }
        for i, (color, caption) in enumerate(zip(colors.tolist(), captions, strict=True))
    ]
    write_tar(tmp_path / "shards" / "0.tar", samples)
    tiny_tokenizer().save(tmp_path / "shards" / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/training.md", "exec"), {})
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    embedder = dualenc.load(tmp_path / "model", "cpu")
    names = sorted(set(captions))
    found = embedder.classify(dualenc.ShardIndex.build("shards"), names, ["{c}"]).argmax(1)
    assert sum(names[i] == caption for i, caption in zip(found.tolist(), captions, strict=True)) > 16  # 3 by chance
