"""Prompts and dimensions of text embeddings, from Python and from the command line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import perturb, tiny_tokenizer
from safetensors.torch import load_file

from dualenc.cli import main
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.models.heads.vectors import DenseConfig, EmbeddingConfig
from dualenc.utils.errors import ModelError

TEXTS = ["a cat sits", "two red boats", "the dog"]
VECTORS = EmbeddingConfig(
    (DenseConfig(12, True, "tanh"), DenseConfig(9, False, None)),
    {"query": "the blue mat ", "passage": "a tree: "}, "query", 6,
)  # fmt: skip


def predictor(vectors: EmbeddingConfig | None, pool: Any = "mean") -> TextPredictor:
    tokenizer = tiny_tokenizer()
    text = TextConfig(tokenizer.vocab_size, 16, 2, 2, context_length=12, pool="cls")
    head = HeadConfig("embedding", problem="negatives", pool=pool, embedding=vectors)
    return TextPredictor(perturb(TextModel(text, {"e": head}), 0.3), tokenizer, "it")


def expected(it: TextPredictor, prompt: str, dim: int) -> torch.Tensor:
    """Compute the vectors in float64 from the hidden states of the tokens, one text at a time."""
    rows = []
    for _, hidden in it.embed_tokens([prompt + text for text in TEXTS]):
        x = hidden.double().mean(0)
        state = {name: weight.double() for name, weight in it.model.heads["e"].state_dict().items()}
        x = torch.tanh(state["0.weight"] @ x + state["0.bias"])
        rows.append((state["2.weight"] @ x)[:dim])
    return F.normalize(torch.stack(rows), dim=-1).float()


def test_prompts_dimensions_and_dense_layers(seed: int) -> None:
    it = predictor(VECTORS)
    for options, prompt, dim in (
        ({}, "the blue mat ", 6),
        ({"prompt": "passage"}, "a tree: ", 6),
        ({"prompt": "a dog "}, "a dog ", 6),
        ({"prompt": "", "dim": 9}, "", 9),
        ({"prompt": "passage", "dim": 1}, "a tree: ", 1),
    ):
        found = it.embed(TEXTS, batch_size=2, **options)
        torch.testing.assert_close(found, expected(it, prompt, dim), rtol=1e-4, atol=1e-5)
        # The control: another prompt gives other vectors.
        assert dim == 1 or not torch.allclose(found, expected(it, f"red {prompt}", dim), atol=1e-3)


def test_prompts_and_dimensions_that_the_model_lacks_are_refused(seed: int) -> None:
    it, plain = predictor(VECTORS), predictor(None)
    for name, message in (("quary", "did you mean query"), ("Passage", "did you mean passage"), ("x", "choose one of")):
        with pytest.raises(ValueError, match=message):
            it.embed(TEXTS, prompt=name)
    with pytest.raises(ValueError, match="prompt 'query' is not one of the prompts of it: it has none"):
        plain.embed(TEXTS, prompt="query")
    with pytest.raises(ValueError, match="prompt is 3"):
        it.embed(TEXTS, prompt=3)  # type: ignore[arg-type]
    for dim in (0, 10, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"dim is .*: it has 9 dimensions"):
            it.embed(TEXTS, dim=dim)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="default_prompt 'x' is not one of"):
        EmbeddingConfig(default_prompt="x")
    with pytest.raises(ValueError, match="embedding has no meaning for a head of kind mlm"):
        HeadConfig("mlm", embedding=VECTORS)


def test_settings_are_saved_and_checked(tmp_path: Path, seed: int) -> None:
    it = predictor(VECTORS)
    it.save(tmp_path / "ours")
    again = load_text(tmp_path / "ours", "cpu")
    assert again.model.head_configs == it.model.head_configs
    assert again.fingerprint == it.fingerprint
    assert torch.equal(again.embed(TEXTS), it.embed(TEXTS))
    assert "query (default), passage" in (tmp_path / "ours" / "README.md").read_text()
    about = json.loads((tmp_path / "ours" / "dualenc.json").read_text())
    vectors = about["heads"]["e"]["embedding"]
    for change, message in (
        ({"dense": [{**vectors["dense"][0], "width": "9"}]}, r"embedding: dense\.0: width must be int"),
        ({"dense": [{**vectors["dense"][0], "activation": "softplus"}]}, r"dense\.0: activation"),
        ({"prompts": {"query": 3}}, "prompts: query must be a string"),
        ({"default_prompt": "quary"}, "default_prompt 'quary'"),
        ({"dims": 3}, "unknown key 'dims'"),
    ):
        content = {**about, "heads": {"e": {**about["heads"]["e"], "embedding": {**vectors, **change}}}}
        (tmp_path / "ours" / "dualenc.json").write_text(json.dumps(content))
        with pytest.raises(ModelError, match=message):
            load_text(tmp_path / "ours", "cpu")
    # A head of the first release does not have the key.
    plain = predictor(None)
    plain.save(tmp_path / "plain")
    about = json.loads((tmp_path / "plain" / "dualenc.json").read_text())
    del about["heads"]["e"]["embedding"]
    (tmp_path / "plain" / "dualenc.json").write_text(json.dumps(about))
    assert torch.equal(load_text(tmp_path / "plain", "cpu").embed(TEXTS), plain.embed(TEXTS))


def test_options_of_the_command(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    predictor(VECTORS).save(tmp_path / "model")
    it = load_text(tmp_path / "model", "cpu")
    file, out = tmp_path / "some.txt", tmp_path / "out"
    file.write_text("\n".join(TEXTS) + "\n")

    def run(*more: str) -> torch.Tensor:
        main(["embed", str(tmp_path / "model"), str(file), str(out), *more])
        return load_file(out / "some.txt.safetensors")["embeddings"]

    def error(*more: str, to: Path = out) -> str:
        with pytest.raises(SystemExit):
            main(["embed", str(tmp_path / "model"), str(file), str(to), *more])
        return capsys.readouterr().err

    torch.testing.assert_close(run("--prompt", "a tree: ", "--dim", "4"), it.embed(TEXTS, prompt="passage", dim=4))
    assert "3 texts in 1 file, 4 dimensions" in capsys.readouterr().out
    run("--prompt", "passage", "--dim", "4")  # means the same, so the file is kept
    assert "all of them were there before" in capsys.readouterr().out
    assert "other options" in error("--dim", "4")
    assert "other options" in error("--prompt", "passage")
    assert "other options" in error("--prompt", "", "--dim", "4")
    (out / "some.txt.safetensors").unlink()
    torch.testing.assert_close(run("--prompt", ""), it.embed(TEXTS, prompt=""))
    assert "did you mean passage?" in error("--prompt", "pasage", to=tmp_path / "new")
    assert "must be 1 to 9" in error("--dim", "12", to=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert "--prompt is not for --tokens" in error("--prompt", "query", "--tokens", to=tmp_path / "new")
    with pytest.raises(SystemExit):
        main(["embed", str(tmp_path / "model"), str(tmp_path / "shards"), str(tmp_path / "new"), "--dim", "4"])
    assert "--dim is for text files only" in capsys.readouterr().err


def test_settings_do_not_change_training(seed: int) -> None:
    """The head's vectors, of which the loss is computed, have no prompt and all dimensions."""
    it = predictor(VECTORS)
    tokens = it.tokenizer(TEXTS)
    vectors = it.model(tokens, "e")
    assert vectors.shape == (3, 9)
    torch.testing.assert_close(vectors, expected(it, "", 9), rtol=1e-4, atol=1e-5)
    vectors[:, 0].sum().backward()
    assert all(bool(x.grad.abs().sum() > 0) for x in it.model.heads["e"].parameters() if x.grad is not None)
    other = TextModel(it.model.config, {"other": replace(it.model.head_configs["e"], problem="cosine")})
    assert other.load_pretrained(it.model).whole == ("other",)
    copied, source = (dict(model.heads.named_parameters()) for model in (other, it.model))
    assert all(torch.equal(x, source[name.replace("other", "e")]) for name, x in copied.items())
