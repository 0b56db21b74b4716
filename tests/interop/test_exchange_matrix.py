"""Architectures by export format: each is written and its library agrees, or it is refused and nothing is left."""

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from exchanges import VOCAB, of_ours
from helpers import perturb, tiny_tokenizer

from dualenc import ModelError
from dualenc.formats.huggingface.dual import SMALL
from dualenc.inference.text_model import TextPredictor
from dualenc.interop.exporting import FORMATS, export
from dualenc.interop.inputs import make_inputs, outputs_of
from dualenc.interop.reading import open_dual
from dualenc.models import HeadConfig, Projection, TextConfig, TextModel
from dualenc.utils.files import read_json

pytestmark = [pytest.mark.usefixtures("in_process"), pytest.mark.slow]
POOLED = Projection((24,), (True, False), "tanh")
PRE = {"norm": "pre", "norm_eps": 1e-5}
CLIP_TEXT = {**PRE, "causal": True, "pool": "last", "activation": "quick_gelu"}
SIGLIP_TEXT = {**PRE, "pad_to": 12, "pool": "last", "activation": "gelu_tanh", "norm_eps": 1e-6}
CLIP_IMAGE = {"pre_norm": True, "act_layer": "quick_gelu", "norm_eps": 1e-5}
SIGLIP_IMAGE = {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"}
AS_SIGLIP = {
    "embed_dim": 24, "logit_bias": True, "image_projection": Projection(bias=()),
    "text_projection": Projection(bias=(True,)),
}  # fmt: skip
BERT = {"types": 2, "pool": "cls"}
# Result of each format: the model_type that it writes, or "!" and words of its refusal.
Row = tuple[dict[str, Any], dict[str, Any], str, str]
NO_IMAGE, NO_TEXT = "!no image tower", "!no text tower"
IMAGES: dict[str, Row] = {
    "class token": ({}, {}, "open_clip", "timm_wrapper"),
    "class token, BERT's pooler": ({}, {"image_projection": POOLED}, NO_IMAGE, "vit"),
    "class token, LayerNorm first": ({"pre_norm": True, "norm_eps": 1e-5}, {}, "open_clip", "clip_vision_model"),
    "class token, other epsilon": ({"norm_eps": 1e-5}, {}, "open_clip", NO_IMAGE),
    "class token, layer scale": ({"init_values": 0.1}, {}, "open_clip", "timm_wrapper"),
    "average, LayerNorm last": ({"global_pool": "avg"}, {}, "open_clip", "timm_wrapper"),
    "average, LayerNorm before": ({"global_pool": "avg", "fc_norm": False}, {}, "open_clip", "timm_wrapper"),
    "average, no class token": ({"global_pool": "avg", "class_token": False}, {}, NO_IMAGE, "timm_wrapper"),
    "registers": ({"reg_tokens": 2}, {}, NO_IMAGE, "timm_wrapper"),
    "attention pooling": (SIGLIP_IMAGE, {}, NO_IMAGE, "siglip_vision_model"),
    "attention pooling, class token": ({"global_pool": "map"}, {}, NO_IMAGE, "timm_wrapper"),
    "two maps": ({}, {"projection": "mlp"}, NO_IMAGE, NO_IMAGE),
    "no map": ({}, {"image_projection": Projection(bias=()), "embed_dim": 24}, NO_IMAGE, NO_IMAGE),
    "timm's by name": ({"name": "test_vit", "img_size": 160}, {}, "timm", "timm_wrapper"),
    "timm's by name, attention pooling": ({"name": "test_vit3", "img_size": 160}, {}, "timm", "timm_wrapper"),
}
TEXTS: dict[str, Row] = {
    "BERT": (BERT, {}, "bert", "bert"),
    "BERT, its pooler": (BERT, {"text_projection": Projection((16,), (True, False), "tanh")}, "bert", "bert"),
    "BERT, mean": ({**BERT, "pool": "mean"}, {}, "bert", NO_TEXT),
    "RoBERTa": ({"types": 1, "position_offset": 1, "pool": "cls", "norm_eps": 1e-5}, {}, "roberta", "roberta"),
    "ALBERT": ({**BERT, "embed_width": 8, "groups": 1, "activation": "gelu_tanh"}, {}, NO_TEXT, "albert"),
    "DistilBERT": ({"family": "distilbert", "pool": "cls"}, {}, "bert", "bert"),
    "ELECTRA, one width": ({**BERT, "family": "electra"}, {}, "bert", "bert"),
    "ELECTRA": ({**BERT, "embed_width": 8}, {}, NO_TEXT, NO_TEXT),
    "ModernBERT": (
        {
            **PRE, "embed_norm": True, "positions": "rotary", "gated": True, "bias": False, "theta": 160000.0,
            "local_theta": 10000.0, "window": 4, "global_every": 2, "pool": "cls",
        },
        {}, NO_TEXT, NO_TEXT,
    ),
    "CLIP": ({**CLIP_TEXT, "activation": "gelu"}, {}, "CLIP", "clip_text_model"),
    "SigLIP": (SIGLIP_TEXT, {}, "CLIP", NO_TEXT),
    "pre-norm, mean": ({**PRE, "pool": "mean"}, {}, NO_TEXT, NO_TEXT),
    "pre-norm, filled, first": ({**PRE, "pad_to": 12, "pool": "cls"}, {}, "CLIP", NO_TEXT),
    "post-norm, two maps": (BERT, {"projection": "mlp", "image_projection": Projection()}, NO_TEXT, NO_TEXT),
}  # fmt: skip
WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, str]] = {
    "CLIP": (CLIP_IMAGE, CLIP_TEXT, {}, "open_clip", "clip"),
    "CLIP, sigmoid": (CLIP_IMAGE, CLIP_TEXT, {"logit_bias": True}, "open_clip", "vision-text-dual-encoder"),
    "SigLIP": (SIGLIP_IMAGE, {**SIGLIP_TEXT, "width": 24}, AS_SIGLIP, NO_IMAGE, "siglip"),
    "one quick_gelu": (CLIP_IMAGE, {**CLIP_TEXT, "activation": "gelu"}, {}, "!quick_gelu", "clip"),
}
Form = Literal["open_clip", "transformers"]


def goes_out(it: Any, form: Form, expected: str, tmp_path: Path) -> dict[str, Any]:
    """Export a model as the table expects, and return the config that was written."""
    inputs = make_inputs(it)
    ours = outputs_of(it, inputs)
    for name in ("pixels", "ids"):
        apart = np.linalg.norm(ours[name][:, None] - ours[name][None], axis=-1)
        assert apart[~np.eye(len(apart), dtype=bool)].min() > 1e-3, name  # a hundred times the tolerance
    it.save(tmp_path / "ours")
    if expected.startswith("!"):
        with pytest.raises(ModelError, match=expected[1:]) as caught:
            export(str(tmp_path / "ours"), tmp_path / "out", form)
        assert "with --format " in str(caught.value)
        assert not (tmp_path / "out").exists()
        return {}
    made = export(str(tmp_path / "ours"), tmp_path / "out", form)
    assert max(one.largest for one in made.verified) < 1e-5
    print(f"MATRIX {form} {expected} {max(one.largest for one in made.verified):.1e}")
    again = open_dual(str(tmp_path / "out")).embedder()
    torch.testing.assert_close(again.embed_texts(inputs.texts), it.embed_texts(inputs.texts), atol=1e-5, rtol=0)
    torch.testing.assert_close(again.embed_images(inputs.pixels), it.embed_images(inputs.pixels), atol=1e-5, rtol=0)
    if form == "open_clip":
        return read_json(tmp_path / "out" / "open_clip_config.json")["model_cfg"]
    return read_json(tmp_path / "out" / "config.json")


@pytest.mark.parametrize("form", ["open_clip", "transformers"])
@pytest.mark.parametrize("name", IMAGES)
def test_image_towers(name: str, form: Form, tmp_path: Path, seed: int) -> None:
    image, dual, *kinds = IMAGES[name]
    expected = kinds[form == "transformers"]
    written = goes_out(of_ours(image, BERT, dual), form, expected, tmp_path)
    if written and form == "open_clip":
        assert ("timm_model_name" in written["vision_cfg"]) == (expected == "timm")
    elif written:
        assert written["vision_config"]["model_type"] == expected


@pytest.mark.parametrize("form", ["open_clip", "transformers"])
@pytest.mark.parametrize("name", TEXTS)
def test_text_towers(name: str, form: Form, tmp_path: Path, seed: int) -> None:
    text, dual, *kinds = TEXTS[name]
    expected = kinds[form == "transformers"]
    written = goes_out(of_ours({"norm_eps": 1e-5, "pre_norm": True}, text, dual), form, expected, tmp_path)
    if written and form == "open_clip":
        own = written["text_cfg"].get("hf_model_name")
        assert (own is None) == (expected == "CLIP")
        assert own is None or own == str((tmp_path / "out").resolve())
    elif written:
        assert written["text_config"]["model_type"] == expected


@pytest.mark.parametrize("form", ["open_clip", "transformers"])
@pytest.mark.parametrize("name", WHOLE)
def test_architectures_of_published_models(name: str, form: Form, tmp_path: Path, seed: int) -> None:
    image, text, dual, *kinds = WHOLE[name]
    expected = kinds[form == "transformers"]
    written = goes_out(of_ours(image, text, dual), form, expected, tmp_path)
    if written and form == "transformers":
        assert written["model_type"] == expected


@pytest.mark.parametrize("form", ["onnx", "sentence-transformers"])
def test_the_other_formats(form: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "onnx":
        monkeypatch.undo()  # its reference needs a process without torch
    of_ours({}, BERT, {}).save(tmp_path / "ours")
    made = export(str(tmp_path / "ours"), tmp_path / "out", form)
    assert made.verified[0].largest < made.verified[0].tolerance
    of_ours({}, SIGLIP_TEXT, {}).save(tmp_path / "filled")
    if form == "sentence-transformers":
        with pytest.raises(ModelError, match="padding"):
            export(str(tmp_path / "filled"), tmp_path / "no", form)
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("image", "text", "refused", "formats"),
    [
        ({"global_pool": "avg", "class_token": False}, BERT, "open_clip", 3),
        ({}, {**PRE, "pool": "mean"}, "transformers", 1),
        ({"class_token": False, "global_pool": "avg"}, SIGLIP_TEXT, "sentence-transformers", 1),
    ],
)
def test_a_refusal_names_the_formats_that_work(
    image: Any, text: Any, refused: str, formats: int, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the reference of onnx needs a process without torch
    of_ours(image, text, {}).save(tmp_path / "ours")
    with pytest.raises(ModelError) as caught:
        export(str(tmp_path / "ours"), tmp_path / "out", refused)
    assert not list(tmp_path.glob("out*"))
    named = set(re.findall(r"--format ([\w-]+)", str(caught.value)))
    assert len(named) == formats
    for name in FORMATS:
        if name in named:
            assert export(str(tmp_path / "ours"), tmp_path / name, name).verified
        else:
            with pytest.raises(ModelError):
                export(str(tmp_path / "ours"), tmp_path / name, name)


def test_a_folder_whose_name_json_escapes(tmp_path: Path, seed: int) -> None:
    of_ours({}, BERT, {}).save(tmp_path / "ours")
    out = tmp_path / 'naïve "folder"'
    export(str(tmp_path / "ours"), out, "open_clip")
    open_dual(str(out)).embedder()


def test_an_identity_pooler_changes_nothing(seed: int) -> None:
    # tanh x = x - x^3 / 3 + ...: features up to 8, times 2^-16, have a relative error of (8 * 2^-16)^2 / 3 = 5e-9.
    x = torch.randn(4096, 64).clamp(-8, 8)
    exact = (SMALL * x.double()).tanh() / SMALL
    assert ((exact - x.double()).abs() / x.abs().double()).max() < 5.1e-9
    for kind, allowed in ((torch.float32, 2e-7), (torch.bfloat16, 1e-2)):
        passed = (SMALL * x.to(kind)).tanh() / SMALL
        assert ((passed.double() - x.to(kind).double()).abs() / x.abs().double()).max() < allowed, kind
    half = (SMALL * x.half()).tanh() / SMALL  # the control: below 6e-5 its numbers have fewer digits
    assert ((half.double() - x.half().double()).abs() / x.abs().double()).max() > 1e-2


@pytest.mark.parametrize("kind", ["mlm", "classification", "token_classification", "question_answering"])
@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "distilbert", "electra", "modernbert"])
def test_text_models_with_heads(kind: str, family: str, tmp_path: Path, seed: int) -> None:
    texts = {"bert": "BERT", "roberta": "RoBERTa", "albert": "ALBERT", "distilbert": "DistilBERT"}
    config = TEXTS[{**texts, "electra": "ELECTRA", "modernbert": "ModernBERT"}[family]][0]
    usual = {"vocab_size": VOCAB, "width": 16, "layers": 2, "heads": 2, "context_length": 12, "family": family}
    text = TextConfig(**{**usual, **config})
    activation: Any = {"distilbert": "relu", "electra": "gelu", "modernbert": "gelu"}.get(family, "tanh")
    head = HeadConfig("mlm")
    if kind == "classification":
        head = HeadConfig(kind, ("a", "b", "c"), "single_label", "cls", activation, family == "modernbert")
    if kind == "token_classification":
        head = HeadConfig(kind, ("PER", "LOC"), activation=activation, norm=family == "modernbert")
    elif kind == "question_answering":
        head = HeadConfig(kind, activation=activation, norm=family == "modernbert", max_length=12, stride=2)
    model = TextPredictor(perturb(TextModel(text, {kind: head}), 0.2), tiny_tokenizer(), "it")
    model.save(tmp_path / "ours")
    made = export(str(tmp_path / "ours"), tmp_path / "out", "transformers")
    assert made.verified[0].largest < 1e-5
    # The head is compared if transformers has a class for its slot.
    assert {"hidden", "logits"} == made.verified[0].differences.keys()


def test_a_text_model_alone_is_refused_by_open_clip(tmp_path: Path, seed: int) -> None:
    text = TextConfig(VOCAB, 16, 2, 2, context_length=12, **PRE, pool="mean")
    TextPredictor(perturb(TextModel(text, {})), tiny_tokenizer(), "it").save(tmp_path / "ours")
    for form, words in (("open_clip", "is a text model"), ("transformers", "no text encoder like this")):
        with pytest.raises(ModelError, match=words):
            export(str(tmp_path / "ours"), tmp_path / "out", form)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()


def test_positions_counted_by_another_padding_token_are_refused(tmp_path: Path, seed: int) -> None:
    roberta = TEXTS["RoBERTa"][0]
    of_ours({}, {**roberta, "position_offset": 2}, {}).save(
        tmp_path / "ours"
    )  # Token 1, before the first position, is not padding.
    with pytest.raises(ModelError, match="counts positions by another padding token"):
        export(str(tmp_path / "ours"), tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()
