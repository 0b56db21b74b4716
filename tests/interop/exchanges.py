"""Small models of open_clip, transformers and dualenc, with every tensor random."""

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers as hf
from helpers import perturb, tiny_tokenizer
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from dualenc import Embedder, Preprocess
from dualenc.data import Tokenizer
from dualenc.formats.open_clip.tokenizer import clip_backend
from dualenc.models import DualEncoder, ImageConfig, TextConfig

LONGEST = 12
VOCAB = tiny_tokenizer().vocab_size
VISION = {"image_size": 16, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 4, "layers": 2}
# Only a few models have the vocabulary of CLIP, whose embedding is most of a small model.
FEW = {**TEXT, "context_length": LONGEST, "vocab_size": VOCAB, "pool_type": "eos", "eos_id": 3}
FILLED = {**FEW, "context_length": LONGEST, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
SIGLIP_TEXT = {**FILLED, "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
WIDE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
SMALL = {**WIDE, "vocab_size": VOCAB, "max_position_embeddings": LONGEST}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **SMALL, "pad_token_id": 0},
    # open_clip takes the padding token of the config, that of the tokenizer: positions begin after it.
    "roberta": {"model_type": "roberta", **SMALL, "max_position_embeddings": 13, "pad_token_id": 0},
}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "openai": {"quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "laion": {"vision_cfg": {**VISION, "mlp_ratio": 3.3}, "text_cfg": {**FEW, "mlp_ratio": 3.7}},
    "average": {
        "vision_cfg": {
            **VISION, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "ls_init_value": 0.1,
            "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
        },
        "text_cfg": {**FEW, "proj_type": "none", "width": 16},
        "custom_text": True,
    },
    "timm": {
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "mlp", "image_size": 160},
        "text_cfg": FEW,
        "custom_text": True,
    },
    "siglip": {
        "embed_dim": 96,
        "vision_cfg": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "text_cfg": SIGLIP_TEXT,
        "init_logit_bias": -10,
        "custom_text": True,
    },
    "bert, mean, mlp": {
        "vision_cfg": VISION, "text_cfg": {"hf_model_name": "bert", "hf_pooler_type": "mean_pooler"},
    },
    "roberta, mean, linear": {
        "vision_cfg": VISION,
        "text_cfg": {"hf_model_name": "roberta", "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"},
    },
    "bert, pooler, linear, timm": {
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
        "text_cfg": {"hf_model_name": "bert", "hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"},
    },
    "roberta, first, mlp": {
        "vision_cfg": VISION,
        "text_cfg": {"hf_model_name": "roberta", "hf_pooler_type": "cls_last_hidden_state_pooler"},
    },
    "bert, first, none": {
        "embed_dim": 24,
        "vision_cfg": VISION,
        "text_cfg": {
            "hf_model_name": "bert", "hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": None,
        },
    },
}  # fmt: skip
OF_NAME = {"embed_dim": 768, "vision_cfg": {"timm_model_name": "vit_base_patch32_siglip_256", "timm_pool": "map"}}
OF_NAME["vision_cfg"] |= {"timm_proj": "none", "image_size": 256}  # type: ignore[operator]


def of_open_clip(folder: Path, name: str, size: float = 0.3, **changes: Any) -> Path:
    """Write a folder of open_clip with random weights; `size` is the standard deviation of the noise on each tensor."""
    config = {"embed_dim": 16, **OPEN_CLIP[name], **changes}
    folder.mkdir(exist_ok=True)
    text = dict(config["text_cfg"])
    if "hf_model_name" in text:
        (folder / "config.json").write_text(json.dumps(ENCODERS[text["hf_model_name"]]))
        text |= {"hf_model_name": str(folder), "context_length": LONGEST, "vocab_size": VOCAB}
    if name != "openai":
        text |= {"hf_tokenizer_name": "tokenizer.json", "tokenizer_kwargs": {"clean": "whitespace"}}
        save_tokenizer(folder)
    fields = {
        "model_cfg": {**config, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "interpolation": "bilinear"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(fields))
    model = perturb(open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_hf=False), size)
    save_file({key: x.contiguous() for key, x in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def save_tokenizer(folder: Path, length: int = LONGEST) -> None:
    """Save a tokenizer of a few words as transformers does."""
    backend = tiny_tokenizer().backend
    backend.no_truncation()
    ends = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **ends).save_pretrained(folder)


HF_VISION: dict[str, Any] = {**WIDE, "hidden_size": 32, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
HF_CLIP = {**WIDE, "eos_token_id": 49407, "bos_token_id": 49406}
HF_SIGLIP = {"vocab_size": VOCAB, "max_position_embeddings": LONGEST, "projection_size": 32, "pad_token_id": 0}
HF_TIMM = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "reg_tokens": 2}


def joined(vision: Any, text: Any) -> Any:
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    return hf.VisionTextDualEncoderModel(config)


HUGGING_FACE: dict[str, Callable[[], Any]] = {
    "clip": lambda: hf.CLIPModel(hf.CLIPConfig(vision_config=HF_VISION, text_config=HF_CLIP, projection_dim=16)),
    "siglip": lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=HF_VISION, text_config={**WIDE, **HF_SIGLIP})),
    "vit-bert": lambda: joined(hf.ViTConfig(**HF_VISION), hf.BertConfig(**SMALL)),
    "clip-roberta": lambda: joined(
        hf.CLIPVisionConfig(**HF_VISION), hf.RobertaConfig(**{**SMALL, "max_position_embeddings": 13}, pad_token_id=0)
    ),
    "siglip-albert": lambda: joined(hf.SiglipVisionConfig(**HF_VISION), hf.AlbertConfig(**SMALL, embedding_size=8)),
    "timm-bert": lambda: joined(
        hf.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=HF_TIMM, hidden_size=24),
        hf.BertConfig(**SMALL),
    ),
    "clip-clip": lambda: joined(
        hf.CLIPVisionConfig(**HF_VISION), hf.CLIPTextConfig(**SMALL, bos_token_id=2, eos_token_id=3)
    ),
}


def of_hugging_face(folder: Path, name: str) -> Path:
    """Write a folder of transformers with random weights."""
    perturb(HUGGING_FACE[name](), 0.3).save_pretrained(folder)
    if name == "clip":
        ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=clip_backend(), model_max_length=77, **ends)
        tokenizer.save_pretrained(folder)
    else:
        save_tokenizer(folder, 20)  # longer than the tower takes, as often on the hub
    side = {"height": 16, "width": 16}
    processor: Any = hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side)
    processor = hf.SiglipImageProcessor(size=side) if name == "siglip" else processor
    processor.save_pretrained(folder)
    return folder


def same(first: Embedder, second: Embedder) -> bool:
    """Return whether two models have equal configurations, weights to the bit and ids of texts."""
    one, other = first.dual_encoder.state_dict(), second.dual_encoder.state_dict()
    assert one.keys() == other.keys()
    texts = ["a cat sits on the red mat", "Two DOGS, 12 boats & a tree!", "", "hat " * 90]
    tokenizers = [model.tokenizer for model in (first, second)]
    ids = [tokenizer.encode(texts) for tokenizer in tokenizers if isinstance(tokenizer, Tokenizer)]
    return (
        first.dual_encoder.config == second.dual_encoder.config
        and first.preprocess == second.preprocess
        and ids[0] == ids[1]
        and all(torch.equal(x, other[name]) for name, x in one.items())
    )


VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def of_ours(image: dict[str, Any], text: dict[str, Any], dual: dict[str, Any], size: float = 0.15) -> Embedder:
    """Build a dual encoder of dualenc with every tensor random.

    Args:
        image: overrides of the tower; with "name" and "img_size" one by its name, with "norm_eps" also that.
        text: of a small tower.
        dual: further arguments.
        size: of what is added to each tensor.
    """
    image = dict(image)
    eps = image.pop("norm_eps", None)
    tower = ImageConfig("vit_tiny_patch16_224", 16, {**VIT, **image}, eps)
    tower = ImageConfig(image["name"], image["img_size"]) if "name" in image else tower
    tokenizer = tiny_tokenizer()
    if "pad_to" in text:
        tokenizer = Tokenizer(tokenizer.backend, LONGEST, text["pad_to"], text.get("pad_id", 0))
    usual = {"vocab_size": VOCAB, "width": 16, "layers": 2, "heads": 2, "context_length": LONGEST}
    model = perturb(DualEncoder(tower, TextConfig(**{**usual, **text}), **{"embed_dim": 8, **dual}), size)
    preprocess = Preprocess(tower.img_size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "bicubic", "shortest")
    return Embedder(model.eval(), tokenizer, preprocess, "it")


def all_but(few: Collection[str], names: Iterable[str]) -> list[Any]:
    """Return all names as parameters of a test, those not in `few` marked as slow."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]
