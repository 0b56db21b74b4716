"""Conversion between `open_clip_config.json` and `DualConfig`, and the names of open_clip's tensors.

The fields are those of `CLIPVisionCfg` and `CLIPTextCfg` (open_clip 3.3, model.py). A setting that a `DualEncoder`
cannot compute is refused by name.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.data.images import Preprocess
from dualenc.formats.huggingface.architecture import family_of, fitted, text_config
from dualenc.formats.huggingface.families import FAMILIES
from dualenc.formats.huggingface.family import Config, Family
from dualenc.formats.state_dict import Rule, family_rules, of_tower
from dualenc.formats.timm import Shape, check_numbers, check_timm, fits, image_config, shape_of, vision_rules
from dualenc.models.dual_encoder import DualConfig, Projection
from dualenc.models.image_encoder import ImageConfig, ImageEncoder
from dualenc.models.text_encoder import Activation, TextConfig
from dualenc.utils.errors import ModelError

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Settings of open_clip's custom attention blocks.
CUSTOM = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
# Values that open_clip uses for missing fields.
VISION: Config = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
    "no_ln_pre": False, "final_ln_after_pool": False, "pool_type": "tok", "ls_init_value": None,
    "timm_pool": "avg", "timm_proj": "linear", "timm_proj_bias": False,
}  # fmt: skip
TEXT: Config = {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
    "no_causal_mask": False, "pool_type": "argmax", "proj_bias": False, "proj_type": "linear", "pad_id": 0,
    "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler",
}  # fmt: skip
# Fields that change the architecture if they are set. Importing a model without them would give wrong embeddings.
REFUSED_VISION = ("attentional_pool", "block_type", *CUSTOM)
REFUSED_TEXT = ("embed_cls", "ls_init_value", "final_ln_after_pool", "block_type", *CUSTOM)
HUGGING_FACE = ("bert", "roberta", "xlm-roberta")  # families whose width open_clip can read from their config
EPS = 1e-5  # epsilon of a LayerNorm without norm_kwargs, which is the default of torch


def read_config(model_cfg: Config, where: str, hugging_face: Callable[[str], Config]) -> DualConfig:
    """Return the architecture that a config of open_clip describes.

    Args:
        model_cfg: `model_cfg` of `open_clip_config.json`.
        where: file or name of the model, for errors.
        hugging_face: function from `hf_model_name` to the `config.json` of that text encoder.

    Raises:
        ModelError: If this is not a config of open_clip, or a key asks for something that dualenc does not compute;
            names the key.
    """
    if "multimodal_cfg" in model_cfg:
        raise ModelError(f"{where}: multimodal_cfg: CoCa's decoder is not supported")
    try:
        vision, text, embed_dim = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"]), model_cfg["embed_dim"]
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{where} is not a model of open_clip: it needs embed_dim, vision_cfg and text_cfg") from None
    for name, part, refused in (("vision_cfg", vision, REFUSED_VISION), ("text_cfg", text, REFUSED_TEXT)):
        if wrong := [key for key in refused if part.get(key)]:
            raise ModelError(f"{where}: {name}.{wrong[0]} {part[wrong[0]]!r} is not supported")
    vision, text = VISION | vision, TEXT | text
    quick = bool(model_cfg.get("quick_gelu", False))
    try:
        image, image_projection = _read_vision(vision, embed_dim, quick, f"{where}: vision_cfg")
        if text.get("hf_model_name"):
            text_tower, text_projection = _read_hugging_face(text, embed_dim, hugging_face, f"{where}: text_cfg")
        else:
            text_tower, text_projection = _read_text(text, quick, f"{where}: text_cfg")
        return DualConfig(
            image,
            text_tower,
            embed_dim,
            logit_bias=model_cfg.get("init_logit_bias") is not None,
            image_projection=image_projection,
            text_projection=text_projection,
        )
    except (ValueError, TypeError, ArithmeticError, KeyError) as error:
        raise error if isinstance(error, ModelError) else ModelError(f"{where}: {error}") from None


def _activation(part: Config, quick: bool, where: str) -> Any:
    """Return the activation of a tower: QuickGELU, or a GELU with `act_kwargs`."""
    kwargs = part.get("act_kwargs") or {}
    if quick and not kwargs:
        return "quick_gelu"
    if not quick and kwargs in ({}, {"approximate": "none"}):
        return "gelu"
    if not quick and kwargs == {"approximate": "tanh"}:
        return "gelu_tanh"
    raise ModelError(f"{where}.act_kwargs {kwargs} is not supported: only approximate 'none' or 'tanh'")


def _eps(part: Config, where: str) -> float:
    """Return the epsilon of a tower's LayerNorms."""
    kwargs = part.get("norm_kwargs") or {}
    if set(kwargs) - {"eps"}:
        raise ModelError(f"{where}.norm_kwargs {kwargs} is not supported: only eps")
    return kwargs.get("eps", EPS)


def _read_vision(vision: Config, embed_dim: int, quick: bool, where: str) -> tuple[ImageConfig, Projection]:
    """Return the architecture of an image tower, and its projection."""
    if name := vision.get("timm_model_name"):
        return _read_timm(name, vision, embed_dim, where)
    if not isinstance(vision["layers"], int):
        raise ModelError(f"{where}.layers {vision['layers']}: a ResNet is not a vision transformer")
    if vision["pool_type"] not in ("tok", "avg"):
        raise ModelError(f"{where}.pool_type {vision['pool_type']!r} is not supported: only tok or avg")
    height, width = _sides(vision["image_size"])
    patch_height, patch_width = _sides(vision["patch_size"])
    if height != width or patch_height != patch_width:
        raise ModelError(
            f"{where}: image_size {vision['image_size']} and patch_size {vision['patch_size']} must be square"
        )
    average = vision["pool_type"] == "avg"
    shape = Shape(
        size=height,
        patch=patch_height,
        width=vision["width"],
        layers=vision["layers"],
        heads=vision["width"] // vision["head_width"],
        mlp_width=int(vision["width"] * vision["mlp_ratio"]),
        activation=_activation(vision, quick, where),
        norm_eps=_eps(vision, where),
        pre_norm=not vision["no_ln_pre"],
        pool="avg" if average else "token",
        norm_last=average and bool(vision["final_ln_after_pool"]),  # LayerNorm treats each token alone.
        layer_scale=vision["ls_init_value"] is not None,
    )
    return image_config(shape), Projection()


def _sides(size: Any) -> tuple[int, int]:
    """Return height and width of a size that is one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _read_timm(name: str, vision: Config, embed_dim: int, where: str) -> tuple[ImageConfig, Projection]:
    """Return a tower by its name in timm; `image_size` counts only if timm has no size for the name."""
    from timm.models import get_pretrained_cfg

    check_timm(name)
    known = get_pretrained_cfg(name)
    size = known.input_size[-1] if known is not None else _sides(vision["image_size"])[0]
    kind, pool = vision["timm_proj"], vision["timm_pool"]
    with torch.device("meta"):
        vit: Any = ImageEncoder(ImageConfig(name, size)).vit
    overrides: Config = {}
    if pool and pool != getattr(vit, "global_pool", None):
        overrides["global_pool"] = pool
        if kind in ("linear", "mlp"):
            # open_clip sets global_pool after timm has built the model, so the last LayerNorm stays where it was.
            overrides["fc_norm"] = not isinstance(vit.fc_norm, nn.Identity)
    if kind == "none":
        projection = Projection(bias=())
    elif kind == "linear":
        projection = Projection(bias=(bool(vision["timm_proj_bias"]),))
    elif kind == "mlp":
        projection = Projection((2 * embed_dim,), (True, bool(vision["timm_proj_bias"])))
    elif not kind:  # An empty string makes timm's own classifier the projection.
        projection = Projection(bias=(True,))
    else:
        raise ModelError(f"{where}.timm_proj {kind!r} is not supported: only none, linear, mlp or an empty string")
    return ImageConfig(name, size, overrides), projection


def _read_text(text: Config, quick: bool, where: str) -> tuple[TextConfig, Projection]:
    """Return the architecture of open_clip's own text tower, and its projection."""
    check_numbers({key: text[key] for key in ("vocab_size", "width", "heads", "context_length")}, text["layers"])
    causal, pool, length = not text["no_causal_mask"], text["pool_type"], text["context_length"]
    # A tower that attends to tokens after the closing one sees the padding, so texts are padded as in open_clip.
    pools = {"argmax": "last", "eos": "last", "last": "last", "first": "cls"}
    if pool not in pools or (not causal and pool in ("argmax", "eos")):
        mask = "with" if causal else "without"
        raise ModelError(f"{where}.pool_type {pool!r} {mask} a causal mask is not supported")
    sees_padding = pool == "last" or (pool == "first" and not causal)
    config = TextConfig(
        vocab_size=text["vocab_size"],
        width=text["width"],
        layers=text["layers"],
        heads=text["heads"],
        mlp_width=int(text["width"] * text["mlp_ratio"]),
        context_length=length,
        norm="pre",
        pool=pools[pool],  # type: ignore[arg-type]
        activation=_activation(text, quick, where),
        norm_eps=_eps(text, where),
        causal=causal,
        pad_to=length if sees_padding else None,
        pad_id=text["pad_id"],
    )
    if text["proj_type"] == "none":
        return config, Projection(bias=())
    return config, Projection(bias=(bool(text["proj_bias"]),))


def _read_hugging_face(
    text: Config, embed_dim: int, hugging_face: Callable[[str], Config], where: str
) -> tuple[TextConfig, Projection]:
    """Return the architecture of a text tower that open_clip takes from transformers, and its projection."""
    name = text["hf_model_name"]
    family, inside = family_of(hugging_face(name), f"{where}.hf_model_name {name}")
    pools = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "cls", "cls_pooler": "cls"}
    pooler, kind = text["hf_pooler_type"], text["hf_proj_type"]
    if pooler not in pools:
        raise ModelError(f"{where}.hf_pooler_type {pooler!r} is not supported: only {', '.join(pools)}")
    config = text_config(family, inside, f"{where}.hf_model_name {name}")
    # open_clip truncates texts at context_length, so later positions are never used.
    length = min(text["context_length"], config.context_length)
    config = dataclasses.replace(config, pool=pools[pooler], context_length=length)  # type: ignore[arg-type]
    projection = {
        None: Projection(bias=()),
        "linear": Projection(),
        "mlp": Projection(((config.width + embed_dim) // 2,), (False, False)),
    }.get(kind)
    if projection is None:
        raise ModelError(f"{where}.hf_proj_type {kind!r} is not supported: only null, linear or mlp")
    if pooler == "cls_pooler" and any(slot.kind == "pooler" for slot in family.slots):
        if kind == "mlp":
            raise ModelError(f"{where}: hf_pooler_type 'cls_pooler' before hf_proj_type 'mlp' is not supported")
        projection = Projection((config.width,), (True, False), "tanh")
    return config, projection


def read_preprocess(fields: Config, size: int, where: str) -> Preprocess:
    """Return the evaluation transform that `preprocess_cfg` describes.

    Args:
        fields: fields of the config; missing ones have open_clip's defaults.
        size: side of the image tower's input in pixels.
        where: file of the config, for errors.

    Raises:
        ModelError: If dualenc cannot compute the transform.
    """
    mode, fill = fields.get("resize_mode") or "shortest", fields.get("fill_color", 0)
    interpolation = fields.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash", "longest") or (mode == "longest" and fill):
        raise ModelError(f"{where}: preprocess_cfg.resize_mode {mode!r} with fill_color {fill} is not supported")
    if interpolation not in ("bicubic", "bilinear"):
        raise ModelError(f"{where}: preprocess_cfg.interpolation {interpolation!r} must be bicubic or bilinear")
    found = {key: fields.get(key) or usual for key, usual in MOMENTS.items()}
    mean, std = moments(found["mean"], found["std"], where)
    return Preprocess(size, mean, std, interpolation, mode)  # type: ignore[arg-type]


def moments(mean: Any, std: Any, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation that normalize pixels, one number for each color channel.

    Raises:
        ModelError: If they are not three finite numbers each, or a standard deviation is not positive.
    """
    try:
        found = tuple(map(float, mean)), tuple(map(float, std))
        fine = all(len(x) == 3 and all(map(math.isfinite, x)) for x in found) and min(found[1]) > 0
    except (TypeError, ValueError):
        fine, found = False, ((), ())
    if not fine:
        raise ModelError(f"{where}: mean {mean} and std {std} must be three numbers each, those of std above 0")
    return found


# Normalization of a model without `mean` and `std`: that of OpenAI's CLIP.
MOMENTS = {"mean": OPENAI_MEAN, "std": OPENAI_STD}


def rules_of(model_cfg: Config, config: DualConfig) -> list[Rule]:
    """Return the rules between a model's tensors and those of open_clip.

    Args:
        model_cfg: `model_cfg` of `open_clip_config.json`.
        config: the architecture that it describes, see `read_config`.
    """
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    with torch.device("meta"):
        tower = ImageEncoder(config.image)
    scalar = not model_cfg.get("nonscalar_logit_scale")
    rules = [Rule(("logits.logit_scale",), ("logit_scale",), flat=scalar)]
    rules += [Rule(("logits.logit_bias",), ("logit_bias",), flat=scalar)] if config.logit_bias else []
    if vision.get("timm_model_name"):
        rules += [Rule((f"image.vit.{name}",), (f"visual.trunk.{name}",)) for name in tower.vit.state_dict()]
        projection = config.projection_of(config.image_projection, tower.width)
        there = ("visual.head.mlp.fc1", "visual.head.mlp.fc2") if projection.hidden else ("visual.head.proj",)
        there = there if vision.get("timm_proj", VISION["timm_proj"]) else ("visual.trunk.head",)
        rules += projection_rules("image_projection", projection, there)
    else:
        shape = shape_of(tower.vit)
        assert shape is not None
        rules += [
            rule._replace(flat=rule.theirs[0] in ("visual.class_embedding", "visual.positional_embedding"))
            for rule in vision_rules("open_clip", shape, "visual.")
            if rule.ours != ("image.vit.patch_embed.proj.bias",)
        ]
        rules.append(Rule(("image_projection.weight",), ("visual.proj",), transposed=True))
    custom = bool(model_cfg.get("custom_text") or text.get("hf_model_name"))
    projection = config.projection_of(config.text_projection, config.text.width)
    if text.get("hf_model_name"):
        rules += text_rules(FAMILIES[str(config.text.family)], config.text, "text.transformer.")
        there = ("text.proj.0", "text.proj.2") if projection.hidden else ("text.proj",)
        there = ("text.transformer.pooler.dense", "text.proj") if projection.activation == "tanh" else there
        return rules + projection_rules("text_projection", projection, there)
    prefix = "text." if custom else ""
    rules += [
        Rule((f"text.{ours}",), (f"{prefix}{theirs}",)) for ours, theirs in NATIVE_TEXT.items() if "{i}" not in ours
    ]
    rules += [
        Rule((f"text.{ours.format(i=i)}",), (f"{prefix}{theirs.format(i=i)}",))
        for i in range(config.text.layers)
        for ours, theirs in NATIVE_TEXT.items()
        if "{i}" in ours
    ]
    if projection.bias == (False,):
        rules.append(Rule(("text_projection.weight",), (f"{prefix}text_projection",), transposed=True))
    else:
        rules += projection_rules("text_projection", projection, (f"{prefix}text_projection",))
    return rules


# Our names in a text tower -> open_clip's names in its own text transformer; i is the number of a block.
NATIVE_TEXT = {
    "embeddings.token_embeddings.weight": "token_embedding.weight",
    "embeddings.position_embeddings.weight": "positional_embedding",
    "blocks.{i}.attention.qkv.weight": "transformer.resblocks.{i}.attn.in_proj_weight",
    "blocks.{i}.attention.qkv.bias": "transformer.resblocks.{i}.attn.in_proj_bias",
    **{
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in {
            "blocks.{i}.attention.out": "transformer.resblocks.{i}.attn.out_proj",
            "blocks.{i}.attention_norm": "transformer.resblocks.{i}.ln_1",
            "blocks.{i}.mlp_norm": "transformer.resblocks.{i}.ln_2",
            "blocks.{i}.mlp.0": "transformer.resblocks.{i}.mlp.c_fc",
            "blocks.{i}.mlp.2": "transformer.resblocks.{i}.mlp.c_proj",
            "norm": "ln_final",
        }.items()
        for kind in ("weight", "bias")
    },
}


def projection_rules(ours: str, projection: Projection, theirs: tuple[str, ...]) -> list[Rule]:
    """Return the rules between the linear layers of our projection and the layers `theirs`, in order."""
    names = [ours] if len(projection.bias) == 1 else [f"{ours}.{2 * i}" for i in range(len(projection.bias))]
    return [
        Rule((f"{name}.{kind}",), (f"{there}.{kind}",))
        for name, there, bias in zip(names, theirs, projection.bias)
        for kind in (("weight", "bias") if bias else ("weight",))
    ]


def text_rules(family: Family, text: TextConfig, prefix: str) -> list[Rule]:
    """Return the rules between the text tower of a `DualEncoder` and an encoder of a Hugging Face family."""
    from dualenc.models.text_encoder import TextEncoder

    with torch.device("meta"):
        names = [f"encoder.{name}" for name in TextEncoder(text).state_dict()]
    return of_tower(family_rules(family, text, {}, names, prefix))


def complete(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return a state with a bias of zeros in the patch embedding, if only our model has a bias there."""
    name = "image.vit.patch_embed.proj.bias"
    return {**state, **({name: torch.zeros(shapes[name])} if name in shapes and name not in state else {})}


def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state without the bias of the patch embedding, which open_clip does not have.

    The bias is added to the position embeddings of the patches instead, which gives the same sums. This undoes
    `complete`.
    """
    bias, positions = state.get("image.vit.patch_embed.proj.bias"), state["image.vit.pos_embed"]
    if bias is None:
        return dict(state)
    positions = positions.clone()
    positions[:, 1:] += bias  # The class token comes first and does not pass through the patch embedding.
    return {**state, "image.vit.pos_embed": positions}


def write_config(config: DualConfig, eos_id: int | None, name: str) -> Config:
    """Return the `model_cfg` of `open_clip_config.json` for a model.

    Args:
        config: architecture of the model.
        eos_id: id of the token that closes a text; None if there is none.
        name: `hf_model_name`, under which open_clip finds the `config.json` of a text encoder of transformers.

    Raises:
        ModelError: If open_clip cannot express the model; names the part.
    """
    with torch.device("meta"):
        tower = ImageEncoder(config.image)
    shape = shape_of(tower.vit)
    image_projection = config.projection_of(config.image_projection, tower.width)
    text_projection = config.projection_of(config.text_projection, config.text.width)
    quick: dict[str, bool] = {}
    vision: Config | None = None
    plain = shape is not None and fits("open_clip", shape) and image_projection == Projection()
    timm = _write_timm(config.image, tower, image_projection, config.embed_dim)
    if shape is not None and plain and (shape.pre_norm or timm is None):
        vision, quick["image"] = _write_vision(shape), shape.activation == "quick_gelu"
    vision = vision or timm
    if vision is None:
        raise ModelError(
            f"open_clip has no image tower like this one ({config.image.name} with {config.image.overrides or 'its'} "
            f"settings at {config.image.img_size} pixels and the projection {image_projection}): it takes timm's "
            "by name only, and plain ones with a class token; export to transformers or onnx"
        )
    text = _write_text(config.text, text_projection, eos_id)
    if text is not None:
        quick["text"] = config.text.activation == "quick_gelu"
    else:
        text = _write_hugging_face(config.text, text_projection, config.embed_dim, name)
    if text is None:
        raise ModelError(
            f"open_clip has no text tower like this one ({in_words(config.text)}, projection {text_projection}): it "
            "takes CLIP's and SigLIP's, and BERT's and RoBERTa's; export to onnx"
        )
    if len(set(quick.values())) > 1:
        raise ModelError("open_clip has quick_gelu in both towers or in none: export to onnx")
    model_cfg: Config = {"embed_dim": config.embed_dim, "quick_gelu": any(quick.values())}
    model_cfg |= {"custom_text": True} if config.logit_bias or "timm_model_name" in vision else {}
    model_cfg |= {"init_logit_bias": -10.0} if config.logit_bias else {}
    return {**model_cfg, "vision_cfg": vision, "text_cfg": text}


def in_words(text: TextConfig) -> str:
    """Return the settings of a text tower that other libraries often lack, as text for an error."""
    parts = [f"{text.norm}-norm", f"{text.positions} positions", f"pool {text.pool}"]
    parts += ["causal"] if text.causal else []
    parts += [f"padded to {text.pad_to}"] if text.pad_to else []
    return ", ".join(parts)


def _write_vision(shape: Shape) -> Config:
    """Return the `vision_cfg` of open_clip's own vision transformer."""
    vision: Config = {
        "image_size": shape.size,
        "layers": shape.layers,
        "width": shape.width,
        "head_width": shape.width // shape.heads,
        "patch_size": shape.patch,
        **_ratio(shape.mlp_width, shape.width),
        **_kwargs(shape.activation, shape.norm_eps),
    }
    vision |= {} if shape.pre_norm else {"no_ln_pre": True}
    vision |= {"pool_type": "avg", "final_ln_after_pool": shape.norm_last} if shape.pool == "avg" else {}
    return vision | ({"ls_init_value": 1.0} if shape.layer_scale else {})


def _ratio(hidden: int, width: int) -> Config:
    """Return `mlp_ratio`, from which open_clip computes the hidden width as int(width * ratio)."""
    ratio = hidden / width
    # If the product rounds to just below the hidden width, half a feature more gives the right integer.
    ratio = ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
    return {"mlp_ratio": ratio} if ratio != 4 else {}


def _kwargs(activation: Activation, eps: float) -> Config:
    """Return `act_kwargs` and `norm_kwargs`, if they differ from open_clip's defaults."""
    kwargs: Config = {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}
    return kwargs | ({"norm_kwargs": {"eps": eps}} if eps != EPS else {})


def _write_timm(image: ImageConfig, tower: ImageEncoder, projection: Projection, embed_dim: int) -> Config | None:
    """Return the `vision_cfg` of a timm model, or None if its name and pooling do not determine the architecture."""
    from timm.models import get_pretrained_cfg

    name = image.name.split(".")[0]
    if get_pretrained_cfg(name) is None:
        return None
    kind = "mlp" if projection.hidden else "linear" if projection.bias else "none"
    vision: Config = {"timm_model_name": name, "timm_pool": tower.vit.global_pool, "timm_proj": kind}
    vision |= {"image_size": image.img_size, **({"timm_proj_bias": True} if any(projection.bias[-1:]) else {})}
    again = _read_timm(name, VISION | vision, embed_dim, "")
    return vision if again == (dataclasses.replace(image, name=name), projection) else None


def _write_text(text: TextConfig, projection: Projection, eos_id: int | None) -> Config | None:
    """Return the `text_cfg` of open_clip's own text transformer; None if it cannot express the text tower."""
    padded = text.pad_to is not None and text.pad_to == text.context_length
    if text.causal and text.pool == "last" and text.pad_to is None and eos_id is not None:
        # By default open_clip pools at the largest id of a text, which in CLIP's vocabulary closes it.
        ends: Config = {} if eos_id == text.vocab_size - 1 else {"pool_type": "eos", "eos_id": eos_id}
    elif padded and text.pool == "last":
        ends = {"pool_type": "last"}
    elif (padded or text.causal) and text.pool == "cls":
        ends = {"pool_type": "first"}
    else:
        return None
    if projection.hidden or text.activation not in ("gelu", "gelu_tanh", "quick_gelu"):
        return None
    written: Config = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        **_ratio(text.mlp_width or 4 * text.width, text.width),
        **ends,
        **_kwargs(text.activation, text.norm_eps),
    }
    written |= {} if text.causal else {"no_causal_mask": True}
    written |= {"pad_id": text.pad_id} if text.pad_id else {}
    written |= {} if projection.bias else {"proj_type": "none"}
    written |= {"proj_bias": True} if any(projection.bias) else {}
    again, _ = _read_text(TEXT | written, text.activation == "quick_gelu", "")
    return written if same(again, text) else None


def same(first: TextConfig, second: TextConfig) -> bool:
    """Return whether two configs describe the same computation, with defaults filled in."""

    def plain(text: TextConfig) -> TextConfig:
        hidden = text.mlp_width or 4 * text.width
        return dataclasses.replace(
            text, mlp_width=hidden, dropout=0.0, family=None, embed_norm=text.normalizes_embeddings
        )

    return plain(first) == plain(second)


def _write_hugging_face(text: TextConfig, projection: Projection, embed_dim: int, name: str) -> Config | None:
    """Return the `text_cfg` of an encoder of transformers; None if open_clip cannot express the text tower."""
    pools = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
    kinds = {
        Projection(): "linear",
        Projection(((text.width + embed_dim) // 2,), (False, False)): "mlp",
        Projection(bias=()): None,
    }
    if fitted(text, HUGGING_FACE) is None or text.pool not in pools:
        return None
    written: Config = {
        "hf_model_name": name,
        "hf_pooler_type": pools[text.pool],
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
    }
    if projection == Projection((text.width,), (True, False), "tanh") and text.pool == "cls":
        return written | {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}
    return written | {"hf_proj_type": kinds[projection]} if projection in kinds else None
