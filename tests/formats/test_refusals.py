"""Refused architectures: the message names the field that another library's format does not have."""

import dataclasses
from typing import Any

import pytest
import torch

from dualenc.formats.huggingface import dual as hugging_face
from dualenc.formats.huggingface.architecture import no_place, unlike
from dualenc.formats.huggingface.families import FAMILIES
from dualenc.formats.open_clip import config as open_clip
from dualenc.formats.timm import shape_of, unfit
from dualenc.models import DualConfig, HeadConfig, ImageConfig, ImageEncoder, Projection, TextConfig
from dualenc.utils.errors import ModelError, first_failure

PLAIN = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
BERT = TextConfig(60, width=16, layers=2, heads=2, context_length=12, types=2, pool="cls")
TANH = Projection((24,), (True, False), "tanh")


def dual(image: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **options: Any) -> DualConfig:
    norm_eps = options.pop("norm_eps", None)
    tower = ImageConfig("vit_base_patch16_224", 16, {**PLAIN, **(image or {})}, norm_eps=norm_eps)
    return DualConfig(tower, dataclasses.replace(BERT, **(text or {})), options.pop("embed_dim", 8), **options)


def test_the_first_check_that_fails_is_the_reason() -> None:
    assert first_failure([(True, "a"), ([1], "b"), (0, "c"), (None, "d")]) == "c"
    assert first_failure([(True, "a")]) is None


@pytest.mark.parametrize(
    ("image", "field"),
    [
        ({"reg_tokens": 2}, "reg_tokens 2"),
        ({"qk_norm": True}, "qk_norm"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"global_pool": "map"}, "global_pool 'map'"),
        ({"global_pool": "avg", "class_token": False}, "class_token False"),
        ({"no_embed_class": True}, "no_embed_class"),
    ],
)
def test_an_image_tower_that_open_clip_does_not_have(image: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelError, match=f"no image tower.*{field}"):
        open_clip.write_config(dual(image), 3, "folder")


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ({"pool": "mean", "norm": "pre"}, ["pool 'mean'", "norm 'pre'"]),
        ({"pool": "last"}, ["causal False", "pool 'last'"]),
        ({"embed_width": 8}, ["embed_width 8"]),
        ({"pad_to": 8}, ["pad_to 8"]),
    ],
)
def test_a_text_tower_that_open_clip_does_not_have(text: dict[str, Any], fields: list[str]) -> None:
    with pytest.raises(ModelError, match="no text tower") as caught:
        open_clip.write_config(dual(text=text), 3, "folder")
    assert all(field in str(caught.value) for field in fields), caught.value


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (dual({"init_values": 0.1}, image_projection=TANH), "no image tower.*layer scale"),
        (dual({"global_pool": "avg"}, norm_eps=1e-5), "no image tower.*norm_eps 1e-05.*class_token|global_pool"),
        (dual(image_projection=Projection(bias=()), embed_dim=24), "no image tower.*bias"),
        (dual(text={"pool": "mean"}), "no text tower.*pool 'mean'"),
        (dual(text={"norm": "pre"}), "no text tower.*norm 'pre'"),
        (dual(text_projection=Projection(bias=(True,))), "no text tower.*bias"),
    ],
)
def test_a_tower_that_transformers_does_not_join(config: DualConfig, field: str) -> None:
    with pytest.raises(ModelError, match=field):
        hugging_face.choose_format(config)


def test_a_text_encoder_of_no_family() -> None:
    assert unlike(dataclasses.replace(BERT, causal=True), FAMILIES) == "causal True (bert)"


def test_a_head_without_a_place() -> None:
    heads = {"labels": ("a", "b"), "activation": "relu"}
    assert "activation 'relu'" in no_place(FAMILIES["bert"], BERT, "x", HeadConfig("classification", **heads))
    assert "kind 'rtd'" in no_place(FAMILIES["bert"], BERT, "x", HeadConfig("rtd"))


def test_a_plain_tower_fits() -> None:
    with torch.device("meta"):
        vit = ImageEncoder(dual().image).vit
    assert shape_of(vit) is not None
    assert unfit("open_clip", vit) is None
    assert "class_token" in str(unfit("siglip", vit))
