"""Dual encoders in Hugging Face's formats: CLIP, SigLIP, and a vision and a text encoder joined by two projections.

As in `families.py` the formats are data: keys of `config.json` and names of tensors. A setting that a `DualEncoder`
cannot compute is refused by name.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.data.images import Preprocess
from dualenc.formats.huggingface.architecture import (
    activation_name,
    expresses,
    family_config,
    family_of,
    fitted,
    text_config,
    unlike,
)
from dualenc.formats.huggingface.families import FAMILIES
from dualenc.formats.huggingface.family import ACTIVATION_NAMES, Config, Family
from dualenc.formats.open_clip.config import moments, projection_rules, text_rules
from dualenc.formats.state_dict import Rule
from dualenc.formats.timm import Shape, check_timm, image_config, shape_of, unfit, vision_rules
from dualenc.models.dual_encoder import DualConfig, Projection
from dualenc.models.image_encoder import ImageConfig, ImageEncoder
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import ModelError, first_failure
from dualenc.utils.files import read_json

JOINED = "vision-text-dual-encoder"  # model_type of two encoders joined by projections
KINDS = ("clip", "siglip", JOINED)
# model_type of the image tower -> layout of `vision_rules`; layout -> keys of its config and the values that missing
# keys mean.
VISION = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "vit": "vit"}
USUAL: dict[str, Config] = {
    "clip": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32},
    "siglip": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "image_size": 224, "patch_size": 16},
    "vit": {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16},
}
# Values that missing keys mean in every layout.
WIDTHS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
WRAPPED = "timm_wrapper"  # model_type of a tower that transformers takes from timm
# BERT's pooler ends in tanh, which is nearly the identity around zero. A tower without a pooler is written with one
# that changes nothing: it multiplies the features by this power of two, and the next layer divides by it. For features
# up to 11 the relative error is below 1e-8, apart from the rounding of single precision (Taylor: x^2 2^-32 / 3).
SMALL = 2.0**-16


@dataclass(frozen=True)
class Format:
    """Format of a dual encoder on Hugging Face.

    Attributes:
        kind: `model_type` of the model.
        vision: `model_type` of the image tower.
        family: family of the text tower.
        text: architecture of the text tower, as one of its family.
        identity_pooler: True if the format requires a pooler and the model has none, so that one that changes nothing
            is added (see `add_identity_pooler`).
    """

    kind: str
    vision: str
    family: Family
    text: TextConfig
    identity_pooler: bool = False

    @property
    def architecture(self) -> str:
        """The class of transformers that reads the format."""
        return {"clip": "CLIPModel", "siglip": "SiglipModel", JOINED: "VisionTextDualEncoderModel"}[self.kind]


def read_config(config: Any, where: str, length: Callable[[int], int]) -> tuple[DualConfig, Format]:
    """Return the architecture and the format that a `config.json` describes.

    Args:
        config: the parsed JSON.
        where: file of the config, for errors.
        length: function that turns the number of positions of the text tower into the length of the longest text in
            tokens, which the tokenizer may limit further.

    Raises:
        ModelError: If the model is not one of `KINDS`, or a key asks for something that dualenc does not compute.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise ModelError(f"{where}: model_type {kind!r} is not a supported dual encoder ({', '.join(KINDS)})")
    vision_fields: Config = {**(config.get("vision_config") or {}), **(config.get("vision_config_dict") or {})}
    text_fields: Config = {**(config.get("text_config") or {}), **(config.get("text_config_dict") or {})}
    vision_kind = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(kind)
    vision_kind = vision_kind or vision_fields.get("model_type")
    if kind == JOINED:
        towers = {"clip": "clip_text_model", "siglip": "siglip_text_model"}
        text_kind = text_fields.get("model_type")
        text_kind = towers.get(text_kind or "", text_kind)
        family, text_fields = family_of({**text_fields, "model_type": text_kind}, where)
    else:
        family = family_of(config, where)[0]
    image = _read_vision(str(vision_kind), vision_fields, f"{where}: vision_config")
    text = text_config(family, text_fields, f"{where}: text_config")
    text = dataclasses.replace(text, context_length=length(text.context_length))
    with torch.device("meta"):
        width = ImageEncoder(image).width
    if kind == "siglip":
        embed_dim = text_fields.get("projection_size") or text.width
        image_projection, text_projection = Projection(bias=()), Projection(bias=(True,))
    else:
        embed_dim = config.get("projection_dim") or 512
        image_projection = Projection((width,), (True, False), "tanh") if vision_kind == "vit" else Projection()
        text_projection = Projection()
    if kind == JOINED and family.name != "clip_text_model":
        if not any(slot.kind == "pooler" for slot in family.slots):
            raise ModelError(f"{where}: text_config.model_type {family.name!r} has no pooler, which {JOINED} requires")
        text_projection = Projection((text.width,), (True, False), "tanh")
    try:
        dual = DualConfig(
            image,
            text,
            embed_dim,
            logit_bias=kind == "siglip",
            image_projection=image_projection,
            text_projection=text_projection,
        )
    except (ValueError, TypeError) as error:
        raise ModelError(f"{where}: {error}") from None
    return dual, Format(kind, str(vision_kind), family, text)


def _read_vision(kind: str, config: Config, where: str) -> ImageConfig:
    """Return the architecture of an image tower from its part of a `config.json`."""
    if kind == WRAPPED:
        arguments = dict(config.get("model_args") or {})
        size = arguments.pop("img_size", None)
        from timm.models import get_pretrained_cfg

        known = get_pretrained_cfg(str(config.get("architecture")))
        size = size or (known.input_size[-1] if known is not None else 224)
        try:
            check_timm(config.get("architecture"), {**arguments, "img_size": size})
            return ImageConfig(str(config.get("architecture")), size, arguments)
        except (ValueError, TypeError) as error:
            raise ModelError(f"{where}: {error}") from None
    if kind not in VISION:
        raise ModelError(f"{where}.model_type {kind!r} is not supported ({', '.join(VISION)}, {WRAPPED})")
    layout = VISION[kind]
    fields = {**WIDTHS, **USUAL[layout], **{key: value for key, value in config.items() if value is not None}}
    if fields["hidden_act"] not in ACTIVATION_NAMES:
        raise ModelError(f"{where}.hidden_act {fields['hidden_act']!r} is not supported")
    required: dict[str, Any] = {"num_channels": 3, "qkv_bias": True, "vision_use_head": True, "pooler_act": "tanh"}
    if wrong := [key for key, value in required.items() if fields.get(key, value) != value]:
        raise ModelError(f"{where}.{wrong[0]} {fields[wrong[0]]!r} is not supported: it must be {required[wrong[0]]!r}")
    if layout == "vit" and (fields.get("pooler_output_size") or fields["hidden_size"]) != fields["hidden_size"]:
        raise ModelError(
            f"{where}.pooler_output_size {fields['pooler_output_size']} must equal hidden_size {fields['hidden_size']}"
        )
    try:
        shape = Shape(
            size=int(fields["image_size"]),
            patch=int(fields["patch_size"]),
            width=int(fields["hidden_size"]),
            layers=int(fields["num_hidden_layers"]),
            heads=int(fields["num_attention_heads"]),
            mlp_width=int(fields["intermediate_size"]),
            activation=ACTIVATION_NAMES[fields["hidden_act"]],  # type: ignore[arg-type]
            norm_eps=float(fields["layer_norm_eps"]),
            pre_norm=layout == "clip",
            class_token=layout != "siglip",
            pool="map" if layout == "siglip" else "token",
        )
        return image_config(shape)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ModelError(f"{where}: {error}") from None


def rules_of(form: Format, config: DualConfig, names: Collection[str] | None = None) -> list[Rule]:
    """Return the rules between a model's tensors and those of its format.

    Args:
        form: format of the model.
        config: architecture of the model.
        names: names of a checkpoint's tensors, from which the prefixes are found; None for the prefixes that are
            written.
    """
    with torch.device("meta"):
        tower = ImageEncoder(config.image)
    vision = _prefix("vision_model.", VISION_MARK[form.vision], names)
    rules = [Rule(("logits.logit_scale",), ("logit_scale",), flat=form.kind != "siglip")]
    rules += [Rule(("logits.logit_bias",), ("logit_bias",))] if form.kind == "siglip" else []
    if form.vision == WRAPPED:
        rules += [Rule((f"image.vit.{name}",), (f"{vision}timm_model.{name}",)) for name in tower.vit.state_dict()]
    else:
        shape = shape_of(tower.vit)
        assert shape is not None  # since `read_config` or `choose_format` has made the tower from a shape
        # timm's tensors of these two have leading dimensions of size 1, which transformers' tensors lack.
        flat = (f"{vision}embeddings.class_embedding", f"{vision}embeddings.position_embedding.weight")
        found = vision_rules(VISION[form.vision], shape, vision)
        rules += [rule._replace(flat=rule.theirs[0] in flat) for rule in found]
    image_projection = config.projection_of(config.image_projection, tower.width)
    text_projection = config.projection_of(config.text_projection, config.text.width)
    # The pooler is the first layer of a projection with a hidden layer.
    rules += projection_rules(
        "image_projection",
        image_projection,
        (f"{vision}pooler.dense", "visual_projection")[not image_projection.hidden :],
    )
    text = _prefix("text_model.", f"{form.family.token_embeddings}.weight", names)
    rules += text_rules(form.family, form.text, text)
    head = (f"{text}head",) if form.kind == "siglip" else ("text_projection",)
    if text_projection.hidden:  # As above, the pooler is the first layer of the projection.
        slot = next(slot for slot in form.family.slots if slot.kind == "pooler")
        head = (text + slot.modules["dense"][1:], *head)
    return rules + projection_rules("text_projection", text_projection, head)


# model_type of the image tower -> a tensor by which its prefix is found.
VISION_MARK = {
    "clip_vision_model": "embeddings.patch_embedding.weight",
    "siglip_vision_model": "embeddings.patch_embedding.weight",
    "vit": "embeddings.patch_embeddings.projection.weight",
    WRAPPED: "timm_model.pos_embed",
}


# Image processor -> the meaning of a single number as size, and the resampling filter of Pillow by number, if its file
# does not say them.
PROCESSORS = {"CLIP": ("shortest", 3), "ViT": ("squash", 2), "Siglip": ("squash", 3)}


def _prefix(usual: str, mark: str, names: Collection[str] | None) -> str:
    """Return the prefix of a tower's tensors; some checkpoints of transformers before version 5 have it twice."""
    repeated = f"{usual}{usual}"
    return repeated if names is not None and f"{repeated}{mark}" in names else usual


def read_preprocess(folder: Path, size: int) -> Preprocess:
    """Return the evaluation transform of a folder's image processor.

    Args:
        folder: folder with preprocessor_config.json or processor_config.json.
        size: side of the image tower's input in pixels.

    Raises:
        ModelError: If the folder has no image processor, or dualenc cannot compute the same.
    """
    files = [
        folder / name for name in ("preprocessor_config.json", "processor_config.json") if (folder / name).is_file()
    ]
    fields: Any = None
    for path in files:
        fields = read_json(path)
        fields = fields.get("image_processor", fields) if isinstance(fields, dict) else fields
        if isinstance(fields, dict) and "image_mean" in fields:
            break
    else:
        raise ModelError(f"{folder} has no preprocessor_config.json with image_mean, which the image processor needs")
    name = str(fields.get("image_processor_type") or fields.get("feature_extractor_type"))
    family = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name)
    resized = fields.get("size")
    if family not in PROCESSORS and not (isinstance(resized, dict) and "resample" in fields):
        raise ModelError(f"{path}: image_processor_type {name} has no known way to resize: add size and resample")
    usual = PROCESSORS.get(family, ("", 3))
    kind = {2: "bilinear", 3: "bicubic"}.get(fields.get("resample", usual[1]))
    scale = fields.get("rescale_factor", 1 / 255)
    checks: list[tuple[object, str]] = [
        (fields.get(key, True), f"{key} must be true") for key in ("do_resize", "do_rescale", "do_normalize")
    ]
    checks.append((kind is not None, f"resample {fields.get('resample')} must be 2 (bilinear) or 3 (bicubic)"))
    checks.append((abs(scale * 255 - 1) <= 1e-6, f"rescale_factor {scale} must be 1/255"))
    if isinstance(resized, int):
        resized = {"shortest_edge": resized} if usual[0] == "shortest" else {"height": resized, "width": resized}
    resized = resized or {}
    if "shortest_edge" in resized:
        mode = "shortest"
        crop, shortest = fields.get("crop_size") or size, resized["shortest_edge"]
        differs = (
            f"shortest_edge {shortest} differs from the crop of {size}: dualenc has one size for both and would see "
            f"more of an image; set shortest_edge to {size} if you want that"
        )
        checks += [
            (fields.get("do_center_crop", family == "CLIP"), "do_center_crop must be true with a shortest_edge"),
            (crop in (size, {"height": size, "width": size}), f"crop_size {crop} is not the image tower's {size}"),
            (shortest == size, differs),
        ]
    else:
        mode = "squash"
        square = resized.get("height") == resized.get("width") == size
        checks.append((square, f"size {resized} is not the image tower's {size}"))
    if reason := first_failure(checks):
        raise ModelError(f"{path}: {reason}")
    mean, std = moments(fields["image_mean"], fields.get("image_std"), str(path))
    return Preprocess(size, mean, std, kind, mode)  # type: ignore[arg-type]


def write_preprocess(preprocess: Preprocess) -> Config:
    """Return the `preprocessor_config.json` of an evaluation transform.

    Raises:
        ModelError: If no image processor of transformers computes the same.
    """
    if preprocess.resize == "longest":
        raise ModelError("transformers has no image processor for preprocess.resize longest, which pads with black")
    size, squash = preprocess.size, preprocess.resize == "squash"
    sides = {"height": size, "width": size}
    fields: Config = {
        "image_processor_type": "SiglipImageProcessor" if squash else "CLIPImageProcessor",
        "do_resize": True,
        "size": sides if squash else {"shortest_edge": size},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_convert_rgb": True,
    }
    fields |= {} if squash else {"do_center_crop": True, "crop_size": sides}
    return fields


def choose_format(config: DualConfig) -> Format:
    """Choose the format of a model: CLIP or SigLIP if it is one of them, else two encoders joined.

    Raises:
        ModelError: If no format can express the model; names the part.
    """
    with torch.device("meta"):
        tower = ImageEncoder(config.image)
    text = config.text
    image_projection = config.projection_of(config.image_projection, tower.width)
    text_projection = config.projection_of(config.text_projection, text.width)
    misfits = {kind: unfit(layout, tower.vit) for kind, layout in VISION.items()}
    layouts = [kind for kind, reason in misfits.items() if reason is None]
    clip, siglip = FAMILIES["clip_text_model"], FAMILIES["siglip_text_model"]
    is_clip = expresses(clip, text) and text.pool == "last"
    projections = (image_projection, text_projection)
    as_clip = projections == (Projection(), Projection())
    if "clip_vision_model" in layouts and is_clip and as_clip and not config.logit_bias:
        return Format("clip", "clip_vision_model", clip, text)
    is_siglip = expresses(siglip, text) and text.pool == "last"
    as_siglip = projections == (Projection(bias=()), Projection(bias=(True,)))
    if "siglip_vision_model" in layouts and is_siglip and as_siglip and config.logit_bias:
        return Format("siglip", "siglip_vision_model", siglip, text)
    tanh = Projection((tower.width,), (True, False), "tanh")
    pooler = image_projection == tanh
    named = [kind for kind in layouts if kind != "vit"]
    others = ", ".join(f"{reason} ({kind})" for kind, reason in misfits.items() if kind != "vit")
    checks: list[tuple[object, str]] = [
        (image_projection in (Projection(), tanh), f"{image_projection} is not one linear map without bias"),
        (not pooler or "vit" in layouts, f"{misfits['vit']} (vit) with a pooler"),
        (pooler or named or config.image.norm_eps is None, f"norm_eps {config.image.norm_eps} with {others}"),
    ]
    if reason := first_failure(checks):
        raise ModelError(f"transformers has no image tower like {config.image.name}: {reason}")
    vision = "vit" if pooler else [*named, WRAPPED][0]
    if is_clip and text_projection == Projection():
        return Format(JOINED, vision, clip, text)
    found = fitted(text, POOLED)
    pooled = text_projection == Projection((text.width,), (True, False), "tanh")
    checks = [
        (text.pool == "cls", f"pool {text.pool!r}"),
        (pooled or text_projection == Projection(), str(text_projection)),
        (found, unlike(text, POOLED)),
    ]
    if (reason := first_failure(checks)) or found is None:
        raise ModelError(
            f"transformers' joined models have no text tower like this one: {reason}; they take the first token of "
            "BERT, RoBERTa or ALBERT, or CLIP's text encoder"
        )
    return Format(JOINED, vision, *found, identity_pooler=not pooled)


POOLED = tuple(name for name, family in FAMILIES.items() if any(slot.kind == "pooler" for slot in family.slots))


def write_config(form: Format, config: DualConfig) -> Config:
    """Return the `config.json` of a model."""
    with torch.device("meta"):
        tower = ImageEncoder(config.image)
    shape = shape_of(tower.vit)
    text = family_config(form.family, form.text)
    if form.vision == WRAPPED:
        image = config.image
        vision: Config = {
            "model_type": WRAPPED,
            "architecture": image.name.split(".")[0],
            "model_args": {**image.overrides, "img_size": image.img_size},
            "hidden_size": tower.width,
            "num_classes": 0,
            "label_names": [],
        }
    else:
        assert shape is not None
        usual = USUAL[VISION[form.vision]]["hidden_act"]
        vision = {
            "model_type": form.vision,
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "intermediate_size": shape.mlp_width,
            "hidden_act": activation_name(shape.activation, usual),
            "layer_norm_eps": shape.norm_eps,
            "image_size": shape.size,
            "patch_size": shape.patch,
        }
    written: Config = {"architectures": [form.architecture], "model_type": form.kind, "dtype": "float32"}
    if form.kind == "siglip":
        text["projection_size"] = config.embed_dim
    else:
        written["projection_dim"] = config.embed_dim
    if form.kind == "clip":
        vision["projection_dim"] = text["projection_dim"] = config.embed_dim
    return {**written, "vision_config": vision, "text_config": text}


def add_identity_pooler(
    state: Mapping[str, Tensor], form: Format, config: DualConfig
) -> tuple[dict[str, Tensor], DualConfig]:
    """Add a pooler that changes nothing to a model without one, if its format requires a pooler.

    Args:
        state: state of the `DualEncoder`.
        form: format of the model.
        config: architecture of the model.

    Returns:
        The state and the architecture, with the pooler as part of the text projection.
    """
    if not form.identity_pooler:
        return dict(state), config
    width = config.text.width
    state = {name: x for name, x in state.items() if name != "text_projection.weight"} | {
        "text_projection.0.weight": SMALL * torch.eye(width),
        "text_projection.0.bias": torch.zeros(width),
        "text_projection.2.weight": state["text_projection.weight"] / SMALL,
    }
    return state, dataclasses.replace(config, text_projection=Projection((width,), (True, False), "tanh"))
