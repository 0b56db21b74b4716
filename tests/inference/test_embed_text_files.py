"""Files with embeddings of texts and of their tokens."""

import json

import pytest
import torch
from helpers import WORDS, tiny_tokenizer
from safetensors.torch import load_file

from dualenc import TextConfig
from dualenc.cli import main
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.models import TextModel


@pytest.fixture
def model(tmp_path):
    tokenizer = tiny_tokenizer()
    text = TextConfig(tokenizer.vocab_size, width=16, layers=2, heads=2, context_length=12, pool="mean")
    made = TextModel(text)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    TextPredictor(made, tokenizer).save(tmp_path / "model")
    return tmp_path / "model"


def sentences(count):
    return [" ".join((WORDS * 3)[i % 16 : i % 16 + 1 + i % 9]) for i in range(count)]


def test_embeddings_of_texts_and_of_tokens(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr("dualenc.inference.embed_text_files.CHUNK", 7)
    texts = sentences(23)
    lines = [json.dumps({"said": text}) for text in texts]
    lines[5], lines[20] = "{", json.dumps({"said": None})
    texts[3], texts[11] = "", " \t"
    lines[3], lines[11] = (json.dumps({"said": texts[i]}) for i in (3, 11))
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n")
    predictor = load_text(model, "cpu")
    good = [i for i in range(23) if i not in (5, 20)]

    main(["embed", str(model), str(tmp_path / "some.jsonl"), str(tmp_path / "out"), "--column", "said"])
    said = capsys.readouterr().out
    assert "23 texts in 1 file, 16 dimensions" in said
    assert "2 texts could not be read" in said
    assert "line 6" in said
    found = load_file(tmp_path / "out" / "some.jsonl.safetensors")["embeddings"]
    assert found[[5, 20]].isnan().all()
    torch.testing.assert_close(found[good], predictor.embed([texts[i] for i in good]), rtol=1e-5, atol=1e-6)

    main(["embed", str(model), str(tmp_path / "some.jsonl"), str(tmp_path / "tokens"), "--column", "said", "--tokens"])
    found = load_file(tmp_path / "tokens" / "some.jsonl.safetensors")
    offsets = found["offsets"].tolist()
    assert len(offsets) == 24
    assert offsets[5] == offsets[6]
    for i in good:
        ids = predictor.tokenizer.encode([texts[i]])[0]
        assert found["ids"][offsets[i] : offsets[i + 1]].tolist() == ids
        hidden = predictor.model.eval().encoder(predictor.tokenizer([texts[i]]))
        torch.testing.assert_close(found["tokens"][offsets[i] : offsets[i + 1]], hidden, rtol=1e-4, atol=1e-5)

    before = (tmp_path / "out" / "some.jsonl.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    main(["embed", str(model), str(tmp_path / "some.jsonl"), str(tmp_path / "out"), "--column", "said"])
    said = capsys.readouterr().out
    assert "all of them were there before" in said
    assert "2 texts could not be read" in said
    assert (tmp_path / "out" / "some.jsonl.safetensors").stat().st_mtime_ns == before


def test_wrong_use(tmp_path, model, capsys):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("a cat\na dog\n")

    def error(*arguments):
        with pytest.raises(SystemExit):
            main(["embed", str(model), *map(str, arguments)])
        return capsys.readouterr().err

    first, second, out = tmp_path / "one" / "a.txt", tmp_path / "two" / "a.txt", tmp_path / "out"
    assert "two files have the name a.txt" in error(first, second, out)
    assert "embed text files alone" in error(first, tmp_path / "shards", out)
    assert "no column 'said'" in error(first, out, "--column", "said")
    assert "--tokens is for text files" in error(tmp_path / "shards", out, "--tokens")
    main(["embed", str(model), str(first), str(out)])
    assert "other options" in error(first, out, "--tokens")
    (out / "a.txt.safetensors").write_text("nothing")
    assert "damaged" in error(first, out)
    assert "missing.txt" in error(tmp_path / "missing.txt", out)
