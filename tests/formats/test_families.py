"""Every family against transformers, with every tensor random: imported, exported, and imported again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ElectraForPreTraining,
)

from dualenc.data import Tokenizer
from dualenc.formats.huggingface.text_checkpoint import open_text
from dualenc.inference.text_model import TextPredictor, load_text
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.tokens import Tokens
from dualenc.utils.errors import ModelError

VOCAB, LONGEST = 211, 40
WIDE = {"vocab_size": VOCAB, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 36}
BERT = {**WIDE, "num_hidden_layers": 3, "max_position_embeddings": LONGEST}
ROBERTA = {**BERT, "max_position_embeddings": LONGEST + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
ALBERT = {**BERT, "num_hidden_layers": 5, "num_hidden_groups": 2, "embedding_size": 20}
DISTILBERT = {"vocab_size": VOCAB, "dim": 24, "n_heads": 4, "n_layers": 3, "hidden_dim": 36}
DISTILBERT = {**DISTILBERT, "max_position_embeddings": LONGEST}
ELECTRA = {**BERT, "embedding_size": 14}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
MODERNBERT = {**WIDE, **IDS, "num_hidden_layers": 6, "max_position_embeddings": LONGEST, "local_attention": 8}
CLIP = {**BERT, "bos_token_id": 2, "eos_token_id": VOCAB - 1, "pad_token_id": 0}
SIGLIP = {**BERT, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 1}

# name -> model_type and config: the smallest models that have every part of their family
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", BERT),
    "bert, relu": ("bert", {**BERT, "hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "roberta": ("roberta", ROBERTA),
    "xlm-roberta": ("xlm-roberta", ROBERTA),
    "camembert": ("camembert", {**ROBERTA, "pad_token_id": 3, "max_position_embeddings": LONGEST + 4}),
    "albert": ("albert", ALBERT),
    "albert, pairs of blocks": ("albert", {**ALBERT, "inner_group_num": 2, "embedding_size": 24}),
    "distilbert": ("distilbert", DISTILBERT),
    "electra": ("electra", ELECTRA),
    "electra, one width": ("electra", {**ELECTRA, "embedding_size": 24}),
    "modernbert": ("modernbert", MODERNBERT),
    "modernbert, biases": (
        "modernbert",
        {**MODERNBERT, **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)},
    ),
    "modernbert, every second": (
        "modernbert",
        {**MODERNBERT, "layer_types": ["full_attention", "sliding_attention"] * 3, "local_attention": 5},
    ),
    "clip": ("clip_text_model", CLIP),
    "clip, old eos": ("clip_text_model", {**CLIP, "eos_token_id": 2}),
    "siglip": ("siglip_text_model", SIGLIP),
}
CLASSES = {
    "AutoModel": AutoModel,
    "AutoModelForMaskedLM": AutoModelForMaskedLM,
    "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
    "AutoModelForTokenClassification": AutoModelForTokenClassification,
    **{name: getattr(transformers, name) for name in ("AutoModelForMultipleChoice", "AutoModelForCausalLM")},
    "AutoModelForQuestionAnswering": AutoModelForQuestionAnswering,
}
MASKED = [name for name, (kind, config) in FAMILIES.items() if kind[:4] not in ("clip", "sigl")]


def build(kind: str, config: dict[str, Any], auto: Any = AutoModel, **more: Any) -> Any:
    """Build a model of transformers and perturb every tensor, so that none has its initial value."""
    loaded = transformers.CONFIG_MAPPING[kind](**config, **more)
    if kind == "siglip_text_model":
        model = transformers.SiglipTextModel(loaded)
    else:
        model = auto.from_config(loaded) if auto in CLASSES.values() else auto(loaded)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def tokenizer_of(text: TextConfig) -> Tokenizer:
    """Return a tiny tokenizer; with a position offset, the padding token has the id before it, as in RoBERTa."""
    tokenizer = tiny_tokenizer(text.context_length)
    if not text.position_offset:
        return tokenizer
    fields = json.loads(tokenizer.backend.to_str())
    ids = fields["model"]["vocab"]
    other = next(token for token, token_id in ids.items() if token_id == text.position_offset - 1)
    ids |= {"[PAD]": ids[other], other: ids["[PAD]"]}
    for token in fields["added_tokens"]:
        token["id"] = ids[token["content"]]
    return Tokenizer(Backend.from_str(json.dumps(fields)), text.context_length)


def add_tokenizer(folder: Path) -> None:
    tokenizer_of(open_text(folder).config).save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def ragged(config: TextConfig, seed: int) -> tuple[Tokens, Tensor, Tensor, Tensor]:
    """Draw texts of 1 to 40 tokens with segments.

    Returns:
        The texts packed; and ids, mask and segments padded as transformers expects them.
    """
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(1, LONGEST + 1, 5)] + [LONGEST, LONGEST // 2 + 1]
    lengths = [config.pad_to] * 4 if config.pad_to else lengths
    texts = [rng.integers(5, VOCAB - 2, n).tolist() for n in lengths]
    if config.causal:  # CLIP pools at the closing token, which has the highest id.
        texts = [[*text[:-1], VOCAB - 1] for text in texts]
    types = [sorted(rng.integers(0, config.types, len(text)).tolist()) for text in texts] if config.types else None
    tokens = Tokens.pack(texts, types)
    ids, mask, segments = tokens.padded()
    pad = config.position_offset - 1 if config.position_offset else 0
    return tokens, ids.masked_fill(~mask, pad), mask, torch.zeros_like(ids) if segments is None else segments


def theirs(model: Any, ids: Tensor, mask: Tensor, types: Tensor) -> Any:
    more = {"token_type_ids": types} if getattr(model.config, "type_vocab_size", 0) else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask.long(), **more)


def assert_close(ours: Tensor, peer: Tensor, far: bool = False) -> None:
    """Assert that two tensors are equal to 2e-5 of the largest value; or, as a control, that they are not."""
    error = ((ours - peer).abs().max() / peer.abs().max().clamp(min=1)).item()
    assert (error > 1e-3) if far else (error < 2e-5), error


def packed(model: TextModel, padded: Tensor, mask: Tensor, tokens: Tokens) -> Tensor:
    """Convert (B, T, ...) in the caller's order to (N, ...) in the packed order."""
    order = torch.argsort(tokens.rows)
    return padded[order][mask[order]]


@pytest.mark.parametrize("name", FAMILIES)
def test_encoder_equals_transformers(name: str, tmp_path: Path, seed: int) -> None:
    kind, config = FAMILIES[name]
    peer = build(kind, config)
    peer.save_pretrained(tmp_path / "peer")
    add_tokenizer(tmp_path / "peer")
    checkpoint = open_text(tmp_path / "peer")
    assert checkpoint.config.family == kind
    model = checkpoint.model()
    tokens, ids, mask, types = ragged(model.config, seed)
    expected = theirs(peer, ids, mask, types)
    with torch.no_grad():
        hidden = model.encoder(tokens)
        assert_close(hidden, packed(model, expected.last_hidden_state, mask, tokens))
        side = model.encoder.forward_padded(ids, mask, types if model.config.types else None)
        assert_close(side[mask], expected.last_hidden_state[mask])
        if "pooler" in model.heads:
            assert_close(model.head("pooler", hidden, tokens), expected.pooler_output)
        if model.config.causal:
            assert_close(model.encoder.pool(hidden, tokens), expected.pooler_output)
        if model.config.pad_to:
            pooled = peer.head(model.encoder.pool(hidden, tokens)) if hasattr(peer, "head") else hidden
            assert_close(pooled, expected.pooler_output)

    predictor = TextPredictor(model, checkpoint.tokenizer())
    predictor.save(tmp_path / "ours")
    again = type(peer).from_pretrained(tmp_path / "ours").eval()
    assert type(peer.config) is type(again.config)
    equal(again, peer, apart=("head.",) if kind.startswith("siglip") else ("?",))
    assert_close(theirs(again, ids, mask, types).last_hidden_state[mask], expected.last_hidden_state[mask])
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("peer", "ours"))
    after = {key.removeprefix("text_model."): x for key, x in after.items()}
    lost = {key for key in before if key.startswith("head.")} if kind.startswith("siglip") else set()
    assert all(torch.equal(after[key], x) for key, x in before.items() if key not in lost)
    assert before.keys() == after.keys()
    same(load_text(tmp_path / "ours", "cpu").model, model)
    (tmp_path / "ours" / "dualenc.json").unlink()  # Now it is a checkpoint like any other.
    same(load_text(tmp_path / "ours", "cpu").model, model)


def same(one: TextModel, other: TextModel) -> None:
    """Assert that two models are equal to the bit, including the architecture."""
    assert (one.config, one.head_configs) == (other.config, other.head_configs)
    for (name, x), (key, y) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == key
        assert torch.equal(x, y), name


def equal(one: Any, other: Any, apart: tuple[str, ...] = ("?",)) -> None:
    """Assert that two models of transformers have the same class and the same tensors, to the bit.

    Args:
        one: a model.
        other: a model.
        apart: prefixes of tensors that no output depends on, which are not compared.
    """
    assert type(one) is type(other)
    mine, its = one.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(x, its[name]) for name, x in mine.items() if not name.startswith(apart))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", [name for name in MASKED if "relu" not in name])
def test_masked_language_heads_equal_transformers(name: str, tied: bool, tmp_path: Path, seed: int) -> None:
    kind, config = FAMILIES[name]
    peer = build(kind, config, AutoModelForMaskedLM, tie_word_embeddings=tied)
    peer.save_pretrained(tmp_path / "peer")
    add_tokenizer(tmp_path / "peer")
    model = open_text(tmp_path / "peer").model()
    assert model.head_configs == {"mlm": HeadConfig("mlm", tied=tied)}
    tokens, ids, mask, types = ragged(model.config, seed)
    logits = theirs(peer, ids, mask, types).logits
    with torch.no_grad():
        assert_close(model(tokens, "mlm"), packed(model, logits, mask, tokens))
    TextPredictor(model, tokenizer_of(model.config)).save(tmp_path / "ours")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(peer)
    unused = () if tied else ("cls.predictions.bias", "predictions.bias", "lm_head.bias")  # The decoder has one.
    equal(again, peer, unused or ("?",))
    assert_close(theirs(again, ids, mask, types).logits, logits)
    same(load_text(tmp_path / "ours", "cpu").model, model)
    (tmp_path / "ours" / "dualenc.json").unlink()
    same(load_text(tmp_path / "ours", "cpu").model, model)


PROBLEMS = {
    "single_label": ("single_label_classification", ["bad", "so so", "good"]),
    "multi_label": ("multi_label_classification", ["a", "b"]),
    "regression": ("regression", ["stars"]),
}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *((name, "single_label") for name in [*MASKED, "modernbert, mean"]),
        ("bert", "multi_label"),
        ("bert", "regression"),
    ],
)
def test_classification_heads_equal_transformers(name: str, problem: str, tmp_path: Path, seed: int) -> None:
    kind, config = FAMILIES[name.removesuffix(", mean")]
    problem_type, labels = PROBLEMS[problem]
    more = {"problem_type": problem_type, "id2label": dict(enumerate(labels)), "num_labels": len(labels)}
    if name.endswith("mean"):
        more |= {"classifier_pooling": "mean", "classifier_activation": "silu"}
    peer = build(kind, config, AutoModelForSequenceClassification, **more)
    peer.save_pretrained(tmp_path / "peer")
    add_tokenizer(tmp_path / "peer")
    model = open_text(tmp_path / "peer").model()
    head = model.head_configs["classification"]
    assert (list(model.head_configs), head.labels, head.problem) == (["classification"], tuple(labels), problem)
    tokens, ids, mask, types = ragged(model.config, seed)
    logits = theirs(peer, ids, mask, types).logits
    with torch.no_grad():
        assert_close(model(tokens, "classification"), logits)
    TextPredictor(model, tokenizer_of(model.config)).save(tmp_path / "ours")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    equal(again, peer)
    assert_close(theirs(again, ids, mask, types).logits, logits)
    assert again.config.id2label == dict(enumerate(labels))
    assert again.config.problem_type == problem_type
    same(load_text(tmp_path / "ours", "cpu").model, model)
    (tmp_path / "ours" / "dualenc.json").unlink()
    same(load_text(tmp_path / "ours", "cpu").model, model)


TAGS = {
    "iob2": ["B-PER", "O", "I-PER", "B-LOC", "I-LOC"],
    "iob1": ["O", "B-LOC", "I-LOC", "I-PER"],  # Two people are never neighbors there.
    "bioes": ["O", "B-PER", "I-PER", "E-PER", "S-PER"],
}


@pytest.mark.parametrize("name", [name for name in MASKED if name != "modernbert, every second"])
def test_taggers(name: str, tmp_path: Path, seed: int) -> None:
    kind, config = FAMILIES[name]
    scheme = sorted(TAGS)[seed % 3]
    more = {"id2label": dict(enumerate(TAGS[scheme])), "num_labels": len(TAGS[scheme])}
    peer = build(kind, config, AutoModelForTokenClassification, **more)
    peer.save_pretrained(tmp_path / "peer")
    add_tokenizer(tmp_path / "peer")
    model = open_text(tmp_path / "peer").model()
    assert list(model.head_configs) == ["token_classification"]
    head = model.head_configs["token_classification"]
    assert (head.labels, head.scheme) == (tuple(TAGS[scheme]), scheme)
    tokens, ids, mask, types = ragged(model.config, seed)
    logits = theirs(peer, ids, mask, types).logits
    chosen = torch.randperm(len(tokens.ids))[:9]
    with torch.no_grad():
        assert_close(model(tokens, "token_classification"), packed(model, logits, mask, tokens))
        assert_close(model(tokens, "token_classification", chosen), packed(model, logits, mask, tokens)[chosen])
        assert_close(model(tokens, "token_classification"), packed(model, logits.roll(1, -1), mask, tokens), far=True)
    TextPredictor(model, tokenizer_of(model.config)).save(tmp_path / "ours")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "ours").eval()
    equal(again, peer)
    assert_close(theirs(again, ids, mask, types).logits[mask], logits[mask])
    assert again.config.id2label == dict(enumerate(TAGS[scheme]))
    assert again.config.architectures == peer.config.architectures
    same(load_text(tmp_path / "ours", "cpu").model, model)
    (tmp_path / "ours" / "dualenc.json").unlink()
    same(load_text(tmp_path / "ours", "cpu").model, model)


@pytest.mark.parametrize("name", [name for name in MASKED if "relu" not in name])
def test_question_answering_heads_equal_transformers(name: str, tmp_path: Path, seed: int) -> None:
    kind, config = FAMILIES[name]
    more = {"classifier_activation": "silu"} if kind == "modernbert" else {}
    peer = build(kind, config, AutoModelForQuestionAnswering, **more)
    peer.save_pretrained(tmp_path / "peer")
    add_tokenizer(tmp_path / "peer")
    model = open_text(tmp_path / "peer").model()
    head = model.head_configs["answers"]
    assert (list(model.head_configs), head.kind) == (["answers"], "question_answering")
    assert (head.max_length, head.stride) == (LONGEST, LONGEST // 2)  # The usual 384 tokens do not fit.
    tokens, ids, mask, types = ragged(model.config, seed)
    found = theirs(peer, ids, mask, types)
    logits = torch.stack([found.start_logits, found.end_logits], -1)
    with torch.no_grad():
        assert_close(model(tokens, "answers"), packed(model, logits, mask, tokens))
        assert_close(model(tokens, "answers").flip(-1), packed(model, logits, mask, tokens), far=True)
    TextPredictor(model, tokenizer_of(model.config)).save(tmp_path / "ours")
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "ours").eval()
    equal(again, peer)
    assert_close(theirs(again, ids, mask, types).end_logits, found.end_logits)
    same(load_text(tmp_path / "ours", "cpu").model, model)
    (tmp_path / "ours" / "dualenc.json").unlink()
    same(load_text(tmp_path / "ours", "cpu").model, model)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_heads_of_both_kinds_of_classification(name: str, tmp_path: Path, seed: int) -> None:
    """Check that a config names the labels of one head, and that the other head keeps its own names."""
    text = open_text_of(name, tmp_path)
    layers = {"activation": "gelu", "norm": True} if name == "modernbert" else {}
    topic = HeadConfig("classification", ("a", "b"), pool="cls", **layers)
    heads = {"topic": topic, "names": HeadConfig("token_classification", ("PER",), **layers)}
    model = perturbed(TextModel(text, heads))
    TextPredictor(model, tokenizer_of(text)).save(tmp_path / "both")
    same(load_text(tmp_path / "both", "cpu").model, model)
    config = json.loads((tmp_path / "both" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert config["id2label"] == {"0": "a", "1": "b"}


def open_text_of(name: str, folder: Path) -> TextConfig:
    build(*FAMILIES[name]).save_pretrained(folder / "peer")
    return open_text(folder / "peer").config


LEFT_OUT = {
    "AutoModelForMultipleChoice": ("bert", "roberta", "distilbert", "albert", "electra"),
    "AutoModelForCausalLM": ("roberta", "electra"),
    "AutoModelForTokenClassification": ("bert", "modernbert"),  # with labels that are not tags
}


@pytest.mark.parametrize(("auto", "name"), [(auto, name) for auto, names in LEFT_OUT.items() for name in names])
def test_a_head_that_is_left_out_is_said(
    auto: str, name: str, tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Check that the encoder loads, and that the tensors of the head are not taken for those of another head."""
    peer = build(*FAMILIES[name], getattr(transformers, auto))
    peer.save_pretrained(tmp_path / "peer")
    with caplog.at_level("WARNING"):
        model = open_text(tmp_path / "peer").model()
    what = "head token_classification" if "Token" in auto else f"head of {type(peer).__name__}"
    assert what in caplog.text
    assert "left out" in caplog.text
    assert set(model.head_configs) <= {"pooler"}
    tokens, ids, mask, types = ragged(model.config, seed)
    expected = theirs(peer.base_model, ids, mask, types).last_hidden_state
    with torch.no_grad():
        assert_close(model.encoder(tokens), packed(model, expected, mask, tokens))


@pytest.mark.parametrize("name", ["electra", "electra, one width"])
def test_electra_discriminators(name: str, tmp_path: Path, seed: int) -> None:
    peer = build(*FAMILIES[name], ElectraForPreTraining)
    peer.save_pretrained(tmp_path / "peer")
    model = open_text(tmp_path / "peer").model()
    tokens, ids, mask, types = ragged(model.config, seed)
    logits = theirs(peer, ids, mask, types).logits
    with torch.no_grad():
        assert_close(model(tokens, "rtd"), packed(model, logits, mask, tokens))
    TextPredictor(model, tokenizer_of(model.config)).save(tmp_path / "ours")
    again = ElectraForPreTraining.from_pretrained(tmp_path / "ours").eval()
    equal(again, peer)
    assert_close(theirs(again, ids, mask, types).logits, logits)
    same(load_text(tmp_path / "ours", "cpu").model, model)


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_both_heads_of_pretraining(kind: str, tmp_path: Path, seed: int) -> None:
    auto = {"bert": transformers.BertForPreTraining, "albert": transformers.AlbertForPreTraining}[kind]
    peer = build(*FAMILIES[kind], auto)
    peer.save_pretrained(tmp_path / "peer")
    model = open_text(tmp_path / "peer").model()
    assert sorted(model.head_configs) == ["mlm", "nsp"]
    tokens, ids, mask, types = ragged(model.config, seed)
    expected = theirs(peer, ids, mask, types)
    with torch.no_grad():
        assert_close(model(tokens, "mlm"), packed(model, expected.prediction_logits, mask, tokens))
        assert_close(model(tokens, "nsp"), expected["seq_relationship_logits" if kind == "bert" else "sop_logits"])
    TextPredictor(model, tokenizer_of(model.config)).save(tmp_path / "ours")
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("peer", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], x) for key, x in before.items())
    again = auto.from_pretrained(tmp_path / "ours").eval()
    equal(again, peer)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [auto.__name__]


def edit_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("wrong", [2, 6, 10])
def test_another_window_width_changes_the_output(wrong: int, tmp_path: Path, seed: int) -> None:
    """Check, as a control of the comparison above, that a window other than 8 is noticed."""
    peer = build(*FAMILIES["modernbert"])
    peer.save_pretrained(tmp_path)
    edit_config(tmp_path / "config.json", lambda config: config.update(local_attention=wrong))
    model = open_text(tmp_path).model()
    tokens, ids, mask, types = ragged(model.config, seed)
    with torch.no_grad():
        expected = packed(model, theirs(peer, ids, mask, types).last_hidden_state, mask, tokens)
        assert_close(model.encoder(tokens), expected, far=True)


def test_another_position_offset_changes_the_output(tmp_path: Path, seed: int) -> None:
    peer = build(*FAMILIES["roberta"])
    peer.save_pretrained(tmp_path)
    edit_config(tmp_path / "config.json", lambda config: config.update(pad_token_id=0))
    model = open_text(tmp_path).model()
    tokens, ids, mask, types = ragged(model.config, seed)
    mask[:] = mask
    with torch.no_grad():
        expected = packed(model, theirs(peer, ids.masked_fill(~mask, 1), mask, types).last_hidden_state, mask, tokens)
        assert_close(model.encoder(tokens), expected, far=True)


def test_modernbert_config_of_transformers_4(tmp_path: Path, seed: int) -> None:
    """Read a config with a number in place of today's list of layers, and two rotary bases by name."""
    peer = build(*FAMILIES["modernbert"])
    peer.save_pretrained(tmp_path)

    def old(config: dict[str, Any]) -> None:
        ropes = config.pop("rope_parameters")
        del config["layer_types"]
        config["global_attn_every_n_layers"] = 3
        config["global_rope_theta"] = ropes["full_attention"]["rope_theta"]
        config["local_rope_theta"] = ropes["sliding_attention"]["rope_theta"]

    before = open_text(tmp_path).config
    edit_config(tmp_path / "config.json", old)
    after = open_text(tmp_path).config
    assert before == after
    assert (after.theta, after.local_theta, after.window, after.global_every) == (160000.0, 10000.0, 8, 3)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_text_towers_of_dual_encoders(kind: str, tmp_path: Path, seed: int) -> None:
    text = {"clip": CLIP, "siglip": SIGLIP}[kind]
    image = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    image |= {"image_size": 8, "patch_size": 4}
    more = {"projection_dim": 8} if kind == "clip" else {}
    peer = build(kind, {"text_config": text, "vision_config": image, **more})
    peer.save_pretrained(tmp_path)
    model = open_text(tmp_path).model()
    tokens, ids, mask, types = ragged(model.config, seed)
    expected = theirs(peer.text_model, ids, mask, types)
    with torch.no_grad():
        assert_close(model.encoder(tokens), packed(model, expected.last_hidden_state, mask, tokens))


def perturbed(model: TextModel) -> TextModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


HEADS = {
    "pooler": HeadConfig("pooler", pool="cls"),
    "mlm": HeadConfig("mlm"),
    "topic": HeadConfig("classification", ("a", "b", "c"), pool="cls"),
    "stars": HeadConfig("classification", ("stars",), "regression", pool="mean"),
    "likeness": HeadConfig("embedding", problem="negatives", pool="mean", scale=20.0),
    "other": HeadConfig("mlm", tied=False),
}


@pytest.mark.parametrize("family", [None, "bert"])
def test_several_heads_are_saved_and_loaded_exactly(family: str | None, tmp_path: Path, seed: int) -> None:
    """Check that transformers finds the first head of each kind, and that the others keep their own names."""
    tokenizer = tiny_tokenizer()
    config = TextConfig(
        tokenizer.vocab_size, 16, 2, 2, 20, context_length=16, types=2, pool="mean", dropout=0.3, family=family
    )
    model = perturbed(TextModel(config, HEADS))
    predictor = TextPredictor(model, tokenizer, "many")
    predictor.save(tmp_path / "many")
    predictor.save(tmp_path / "many")  # Saving again replaces the folder.
    assert not [path for path in tmp_path.iterdir() if path.name != "many"]
    same(load_text(tmp_path / "many", "cpu").model, model)
    texts = ["a cat sits", "two dogs", "a"]
    ids, mask, _ = tokenizer(texts).padded()
    with torch.no_grad():
        tokens = tokenizer(texts)
        hidden = model.encoder(tokens)
        mlm = AutoModelForMaskedLM.from_pretrained(tmp_path / "many").eval()(ids, mask.long()).logits
        topic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "many").eval()(ids, mask.long()).logits
        assert_close(model.head("mlm", hidden, tokens), packed(model, mlm, mask, tokens))
        assert_close(model.head("topic", hidden, tokens), topic)
    saved = load_file(tmp_path / "many" / "model.safetensors")
    own_names = {name.split(".")[1] for name in saved if name.startswith("heads.")}
    assert own_names == {"stars", "other", "pooler"}


def test_roberta_format_needs_padding_with_id_1(tmp_path: Path, seed: int) -> None:
    """Check that no config.json is written if id 1 is a token that occurs in texts.

    transformers counts RoBERTa's positions over tokens other than id 1, so such a token would move the positions.
    """
    size = tiny_tokenizer().vocab_size
    text = TextConfig(size, width=16, layers=2, heads=2, context_length=16, types=1, position_offset=2)
    model = perturbed(TextModel(text))
    TextPredictor(model, tokenizer_of(text)).save(tmp_path / "padding")
    assert (tmp_path / "padding" / "config.json").exists()
    TextPredictor(model, tiny_tokenizer()).save(tmp_path / "unknown")
    assert not (tmp_path / "unknown" / "config.json").exists()
    same(load_text(tmp_path / "unknown", "cpu").model, model)


ARCHITECTURES = {
    "bert": {"types": 2},
    "distilbert": {},
    "roberta": {"types": 1, "position_offset": 2, "norm_eps": 1e-5},
    "albert": {"types": 2, "groups": 1, "embed_width": 8},
    "electra": {"types": 2, "embed_width": 8},
    "modernbert": {
        "norm": "pre", "positions": "rotary", "gated": True, "bias": False, "embed_norm": True, "window": 4,
        "global_every": 2, "local_theta": 100.0,
    },
    "clip_text_model": {"norm": "pre", "causal": True, "pool": "last"},
    "siglip_text_model": {"norm": "pre", "pad_to": 16, "pool": "last", "activation": "gelu_tanh"},
    None: {"norm": "pre"},
}  # fmt: skip


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_encoder_trained_from_scratch_finds_its_family(family: str | None, tmp_path: Path, seed: int) -> None:
    size = tiny_tokenizer().vocab_size
    text = TextConfig(size, width=16, layers=3, heads=2, context_length=16, **ARCHITECTURES[family])
    tokenizer = tokenizer_of(text)
    model = perturbed(TextModel(text, {"topic": HeadConfig("classification", ("a", "b"), pool="cls")}))
    TextPredictor(model, tokenizer).save(tmp_path / "model")
    same(load_text(tmp_path / "model", "cpu").model, model)
    config = tmp_path / "model" / "config.json"
    assert config.exists() == (family is not None)
    if family is None:
        assert "only dualenc" in (tmp_path / "model" / "README.md").read_text()
    else:
        assert json.loads(config.read_text())["model_type"] == family
        tokens = tokenizer(["a cat sits on the mat", "two dogs"])
        if text.pad_to:
            tokens = Tokens.pack([ids + [0] * (16 - len(ids)) for ids in tokenizer.encode(["a cat", "two dogs"])])
        ids, mask, _ = tokens.padded()
        auto = transformers.SiglipTextModel if family == "siglip_text_model" else AutoModel
        expected = theirs(auto.from_pretrained(tmp_path / "model").eval(), ids, mask, torch.zeros_like(ids))
        with torch.no_grad():
            assert_close(model.encoder(tokens), packed(model, expected.last_hidden_state, mask, tokens))


def test_discriminator_trained_from_scratch_is_saved_as_electra(tmp_path: Path, seed: int) -> None:
    """Check that a BERT architecture with an rtd head is saved as ELECTRA, the family with a slot for that head."""
    tokenizer = tiny_tokenizer()
    text = TextConfig(tokenizer.vocab_size, width=16, layers=2, heads=2, context_length=16, types=2)
    model = perturbed(TextModel(text, {"rtd": HeadConfig("rtd")}))
    TextPredictor(model, tokenizer).save(tmp_path / "model")
    peer = ElectraForPreTraining.from_pretrained(tmp_path / "model").eval()
    tokens = tokenizer(["a cat sits on the mat", "two dogs"])
    ids, mask, _ = tokens.padded()
    with torch.no_grad():
        assert_close(model(tokens, "rtd"), packed(model, theirs(peer, ids, mask, 0 * ids).logits, mask, tokens))


REFUSED = [
    ("bert", {"is_decoder": True}, "is_decoder true"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("bert", {"hidden_act": "mish"}, "hidden_act"),
    ("bert", {"hidden_size": "wide"}, "hidden_size must be a number"),
    ("bert", {"num_attention_heads": 5}, "not divisible"),
    ("bert", {"model_type": "gpt2"}, "model_type 'gpt2'"),
    ("bert", {"model_type": "t5"}, "model_type 't5'"),
    ("bert", {"num_hidden_layers": 4}, r"encoder.layer.3.attention.self.query.weight is missing; .* and 6 more"),
    ("bert", {"num_hidden_layers": 2}, r"encoder.layer.2.\S+ is unknown"),
    ("bert", {"vocab_size": 99}, r"word_embeddings.weight has shape \(211, 24\), expected \(99, 24\)"),
    ("modernbert", {"layer_types": ["sliding_attention"] * 6}, "layer_types"),
    ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type 'yarn'"),
    ("modernbert", {"mlp_bias": True}, "mlp_bias True"),
    ("modernbert", {"decoder_bias": False}, "decoder_bias false"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_unsupported_configs_are_refused_by_name(
    name: str, change: dict[str, Any], message: str, tmp_path: Path, seed: int
) -> None:
    build(*FAMILIES[name]).save_pretrained(tmp_path)
    edit_config(tmp_path / "config.json", lambda config: config.update(change))
    with pytest.raises(ModelError, match=message) as caught:
        open_text(tmp_path).model()
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_head_with_another_activation_is_refused(tmp_path: Path, seed: int) -> None:
    """Refuse a RoBERTa with ReLU, because its masked-language-model head always has GELU."""
    build("roberta", {**ROBERTA, "hidden_act": "relu"}, AutoModelForMaskedLM).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="relu"):
        open_text(tmp_path)


def test_unknown_and_missing_tensors(tmp_path: Path, seed: int) -> None:
    build(*FAMILIES["bert"]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    stale = {"embeddings.position_ids": torch.arange(LONGEST)[None]}
    save_file({**state, **stale}, path)
    open_text(tmp_path).model()
    save_file({**state, "adapter.weight": torch.ones(2)}, path)
    with pytest.raises(ModelError, match=r"adapter\.weight is unknown"):
        open_text(tmp_path).model()
    del state["embeddings.word_embeddings.weight"]
    save_file(state, path)
    with pytest.raises(ModelError, match=r"no tensors embeddings\.word_embeddings\.weight"):
        open_text(tmp_path)
