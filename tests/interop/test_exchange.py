"""Dual encoders in from open_clip and Hugging Face, and out again: each side computes the same."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from dualenc import Embedder, ModelError, Preprocess, load
from dualenc.interop import peers
from dualenc.interop import verify as verify_module
from dualenc.interop.clip_tokens import clip_backend
from dualenc.interop.dual import open_dual
from dualenc.interop.exporting import export
from dualenc.interop.importing import import_model
from dualenc.interop.verify import Inputs
from dualenc.interop.vision import Shape, image_config, shape_of
from dualenc.models import DualConfig, DualEncoder, ImageConfig, ImageEncoder, Projection, TextConfig
from tests.helpers import perturb, tiny_tokenizer

VISION = {"image_size": 16, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 4, "layers": 2}
FILLED = {**TEXT, "context_length": 12, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "openai": {"quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "laion": {"vision_cfg": {**VISION, "mlp_ratio": 3.3}, "text_cfg": {**TEXT, "mlp_ratio": 3.7}},
    "average": {
        "vision_cfg": {
            **VISION, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "ls_init_value": 0.1,
            "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
        },
        "text_cfg": {**TEXT, "proj_type": "none", "width": 16},
        "custom_text": True,
    },
    "timm": {
        "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "timm_proj": "mlp"},
        "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407},
        "custom_text": True,
    },
    "siglip": {
        "embed_dim": 768,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch32_siglip_256", "timm_pool": "map", "timm_proj": "none",
            "image_size": 256,
        },
        "text_cfg": {**FILLED, "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
        "init_logit_bias": -10,
        "custom_text": True,
    },
}  # fmt: skip


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The peer's program without a process of its own, which takes seconds to start."""

    def run(library: str, model: str, inputs: Inputs) -> dict[str, np.ndarray]:
        folder = tmp_path / "between"
        folder.mkdir(exist_ok=True)
        inputs.write(folder)
        peers.main(library, model, str(folder), str(folder))
        with np.load(folder / "outputs.npz") as arrays:
            return dict(arrays)

    monkeypatch.setattr(verify_module, "run", run)


def of_open_clip(folder: Path, name: str, **changes: Any) -> Path:
    """A folder of open_clip's with random weights."""
    config = {"embed_dim": 16, **OPEN_CLIP[name], **changes}
    folder.mkdir(exist_ok=True)
    fields = {"model_cfg": config, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "interpolation": "bilinear"}}
    (folder / "open_clip_config.json").write_text(json.dumps(fields))
    model = perturb(open_clip.create_model(f"local-dir:{folder}"))
    save_file({key: x.contiguous() for key, x in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def same(first: Embedder, second: Embedder) -> bool:
    """Whether two models are alike, weights to the bit."""
    one, other = first.dual_encoder.state_dict(), second.dual_encoder.state_dict()
    assert one.keys() == other.keys()
    return (
        first.dual_encoder.config == second.dual_encoder.config
        and first.preprocess == second.preprocess
        and all(torch.equal(x, other[name]) for name, x in one.items())
    )


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_in_and_out_and_in(name: str, tmp_path: Path, seed: int) -> None:
    folder = of_open_clip(tmp_path / "theirs", name)
    found = import_model(str(folder))
    assert found.verified[0].largest < 2e-5
    assert {"pixels", "ids", "pictures", "texts", "scale"} <= found.verified[0].differences.keys()
    assert ("bias" in found.verified[0].differences) == (name == "siglip")
    assert found.embedder.preprocess.mean == (0.4, 0.5, 0.6)  # type: ignore[union-attr]
    found.embedder.save(tmp_path / "ours")
    export(str(tmp_path / "ours"), tmp_path / "again", "open_clip")
    assert same(found.embedder, import_model(f"open_clip:local-dir:{tmp_path / 'again'}").embedder)
    files = [load_file(tmp_path / one / "open_clip_model.safetensors") for one in ("theirs", "again")]
    theirs, again = ({n.removeprefix("text."): x for n, x in file.items()} for file in files)  # custom_text or not
    assert {n: x.shape for n, x in theirs.items()} == {n: x.shape for n, x in again.items()}
    assert all(torch.equal(x, again[n]) for n, x in theirs.items())


def test_in_processes_of_their_own(tmp_path: Path, seed: int) -> None:
    folder = of_open_clip(tmp_path / "theirs", "openai")
    found = import_model(str(folder))
    found.embedder.save(tmp_path / "ours")
    for form in ("open_clip", "transformers"):
        made = export(str(tmp_path / "ours"), tmp_path / form, form)  # type: ignore[arg-type]
        assert made.verified[0].largest < 1e-5
        again = import_model(str(tmp_path / form)).embedder.dual_encoder.state_dict()
        assert all(torch.equal(x, again[n]) for n, x in found.embedder.dual_encoder.state_dict().items())


def models() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Of transformers, with what makes their pictures and texts."""
    vision: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    text: dict[str, Any] = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    }  # fmt: skip
    clip = {**text, "eos_token_id": 49407, "bos_token_id": 49406}
    siglip = {**text, "vocab_size": 49408, "max_position_embeddings": 12, "projection_size": 32, "pad_token_id": 49407}
    small = {**text, "vocab_size": tiny_tokenizer().vocab_size, "max_position_embeddings": 20}
    timm = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "reg_tokens": 2}
    yield "clip", lambda: hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=clip, projection_dim=16))
    yield "siglip", lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=vision, text_config=siglip))
    for name, of_vision, of_text in (
        ("vit-bert", lambda: hf.ViTConfig(**vision), lambda: hf.BertConfig(**small)),
        ("clip-roberta", lambda: hf.CLIPVisionConfig(**vision), lambda: hf.RobertaConfig(**small, pad_token_id=0)),
        ("siglip-albert", lambda: hf.SiglipVisionConfig(**vision), lambda: hf.AlbertConfig(**small, embedding_size=8)),
        (
            "timm-bert",
            lambda: hf.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=timm, hidden_size=24),
            lambda: hf.BertConfig(**small),
        ),
        ("clip-clip", lambda: hf.CLIPVisionConfig(**vision), lambda: hf.CLIPTextConfig(**clip)),
    ):

        def joined(of_vision: Any = of_vision, of_text: Any = of_text) -> Any:
            config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(of_vision(), of_text(), projection_dim=16)
            return hf.VisionTextDualEncoderModel(config)

        yield name, joined


def of_hugging_face(folder: Path, name: str) -> Path:
    """A folder of transformers' with random weights."""
    perturb(dict(models())[name]()).save_pretrained(folder)
    if "clip" in name.split("-")[-1] or name == "siglip":
        ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=clip_backend(), model_max_length=77, **ends)
    else:
        backend = tiny_tokenizer().backend
        backend.no_truncation()
        ends = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=20, **ends)
    tokenizer.save_pretrained(folder)
    side = {"height": 16, "width": 16}
    squash = name == "siglip"
    processor: Any = (
        hf.SiglipImageProcessor(size=side) if squash else hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side)
    )
    processor.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", [name for name, _ in models()])
def test_hugging_face_in_and_out_and_in(name: str, tmp_path: Path, seed: int) -> None:
    found = import_model(str(of_hugging_face(tmp_path / "theirs", name)))
    assert found.verified[0].largest < 2e-5
    assert found.notes == []
    found.embedder.save(tmp_path / "ours")
    made = export(str(tmp_path / "ours"), tmp_path / "again", "transformers")
    assert [one.library for one in made.verified] == ["transformers", "transformers_text"]
    assert same(found.embedder, import_model(str(tmp_path / "again")).embedder)
    theirs, again = (load_file(tmp_path / one / "model.safetensors") for one in ("theirs", "again"))
    assert theirs.keys() == again.keys()
    assert all(torch.equal(x, again[n]) for n, x in theirs.items())
