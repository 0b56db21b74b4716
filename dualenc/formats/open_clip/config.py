"""Models in the format of open_clip: `open_clip_config.json` to a `DualConfig` and back, and the names of tensors.

The fields are those of `CLIPVisionCfg` and `CLIPTextCfg` (open_clip 3.3, model.py). A field that asks for something
that a `DualEncoder` does not compute is refused by name.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.data.images import Preprocess
from dualenc.formats.huggingface.architecture import differences, family_of, fitted, text_config, unlike
from dualenc.formats.huggingface.families import FAMILIES
from dualenc.formats.huggingface.family import Config, Family
from dualenc.formats.state_dict import Rule, family_rules, of_tower
from dualenc.formats.timm import Shape, check_numbers, check_timm, image_config, shape_of, unfit, vision_rules
from dualenc.models.dual_encoder import DualConfig, Projection
from dualenc.models.image_encoder import ImageConfig, ImageEncoder
from dualenc.models.text_encoder import Activation, TextConfig
from dualenc.utils.errors import ModelError, first_failure

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CUSTOM = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
# The defaults of open_clip's fields.
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
# A value of these fields that is not empty changes the computation in a way that dualenc does not support.
REFUSED_VISION = ("attentional_pool", "block_type", *CUSTOM)
REFUSED_TEXT = ("embed_cls", "ls_init_value", "final_ln_after_pool", "block_type", *CUSTOM)
HUGGING_FACE = ("bert", "roberta", "xlm-roberta")  # The encoders whose width open_clip finds in their config.
EPS = 1e-5  # The epsilon of LayerNorms without norm_kwargs.


def read_config(model_cfg: Config, where: str, hugging_face: Callable[[str], Config]) -> DualConfig:
    """Return the architecture of an open_clip config.

    Args:
        model_cfg: `model_cfg` of open_clip.
        where: file or name of the config, for errors.
        hugging_face: function from open_clip's name of a text encoder to its `config.json`.

    Raises:
        ModelError: If the config is not one of open_clip, or a field is not supported; the message names the field.
    """
    if "multimodal_cfg" in model_cfg:
        raise ModelError(f"{where}: multimodal_cfg: CoCa's decoder is not supported")
    try:
        vision, text, embed_dim = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"]), model_cfg["embed_dim"]
    except (KeyError, TypeError, ValueError):
        raise ModelError(
            f"{where} is not a model of open_clip: it must have embed_dim, vision_cfg and text_cfg"
        ) from None
    for name, fields, refused in (("vision_cfg", vision, REFUSED_VISION), ("text_cfg", text, REFUSED_TEXT)):
        if wrong := [key for key in refused if fields.get(key)]:
            raise ModelError(f"{where}: {name}.{wrong[0]} {fields[wrong[0]]!r} is not supported")
    vision, text = VISION | vision, TEXT | text
    quick = bool(model_cfg.get("quick_gelu", False))
    try:
        image, image_projection = _read_vision(vision, embed_dim, quick, f"{where}: vision_cfg")
        if text.get("hf_model_name"):
            encoder, text_projection = _read_hugging_face(text, embed_dim, hugging_face, f"{where}: text_cfg")
        else:
            encoder, text_projection = _read_text(text, quick, f"{where}: text_cfg")
        return DualConfig(
            image,
            encoder,
            embed_dim,
            logit_bias=model_cfg.get("init_logit_bias") is not None,
            image_projection=image_projection,
            text_projection=text_projection,
        )
    except (ValueError, TypeError, ArithmeticError, KeyError) as error:
        raise error if isinstance(error, ModelError) else ModelError(f"{where}: {error}") from None


def _activation(fields: Config, quick: bool, where: str) -> Any:
    kwargs = fields.get("act_kwargs") or {}
    if quick and not kwargs:
        return "quick_gelu"
    if not quick and kwargs in ({}, {"approximate": "none"}):
        return "gelu"
    if not quick and kwargs == {"approximate": "tanh"}:
        return "gelu_tanh"
    raise ModelError(f"{where}.act_kwargs {kwargs} is not supported{' with quick_gelu' if quick else ''}")


def _eps(fields: Config, where: str) -> float:
    kwargs = fields.get("norm_kwargs") or {}
    if unknown := sorted(set(kwargs) - {"eps"}):
        raise ModelError(f"{where}.norm_kwargs {unknown[0]} is not supported")
    return kwargs.get("eps", EPS)


def _read_vision(vision: Config, embed_dim: int, quick: bool, where: str) -> tuple[ImageConfig, Projection]:
    if name := vision.get("timm_model_name"):
        return _read_timm(name, vision, embed_dim, where)
    if reason := first_failure(_vision_checks(vision)):
        raise ModelError(f"{where}.{reason}")
    average = vision["pool_type"] == "avg"
    shape = Shape(
        size=_sides(vision["image_size"])[0],
        patch=_sides(vision["patch_size"])[0],
        width=vision["width"],
        layers=vision["layers"],
        heads=vision["width"] // vision["head_width"],
        mlp_width=int(vision["width"] * vision["mlp_ratio"]),
        activation=_activation(vision, quick, where),
        norm_eps=_eps(vision, where),
        pre_norm=not vision["no_ln_pre"],
        pool="avg" if average else "token",
        norm_last=average and bool(vision["final_ln_after_pool"]),  # The order does not matter for one token.
        layer_scale=vision["ls_init_value"] is not None,
    )
    return image_config(shape), Projection()


def _vision_checks(vision: Config) -> Iterator[tuple[bool, str]]:
    """Yield the conditions for a supported vision transformer of open_clip, each with the field that breaks it."""
    yield isinstance(vision["layers"], int), f"layers {vision['layers']}: a ResNet is not a vision transformer"
    yield vision["pool_type"] in ("tok", "avg"), f"pool_type {vision['pool_type']!r} is not supported"
    for key in ("image_size", "patch_size"):
        height, width = _sides(vision[key])
        yield height == width, f"{key} {vision[key]} is not square"


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _read_timm(name: str, vision: Config, embed_dim: int, where: str) -> tuple[ImageConfig, Projection]:
    """Return a tower of timm by its name. Its size is that of timm's weights, if there are any, as in open_clip."""
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
        if kind in ("linear", "mlp"):  # open_clip changes the pooling after timm has placed the last LayerNorm.
            overrides["fc_norm"] = not isinstance(vit.fc_norm, nn.Identity)
    if kind == "none":
        projection = Projection(bias=())
    elif kind == "linear":
        projection = Projection(bias=(bool(vision["timm_proj_bias"]),))
    elif kind == "mlp":
        projection = Projection((2 * embed_dim,), (True, bool(vision["timm_proj_bias"])))
    elif not kind:  # The projection is the tower's own classifier.
        projection = Projection(bias=(True,))
    else:
        raise ModelError(f"{where}.timm_proj {kind!r} is not supported")
    return ImageConfig(name, size, overrides), projection


def _read_text(text: Config, quick: bool, where: str) -> tuple[TextConfig, Projection]:
    check_numbers({key: text[key] for key in ("vocab_size", "width", "heads", "context_length")}, text["layers"])
    causal, pool, length = not text["no_causal_mask"], text["pool_type"], text["context_length"]
    # Texts are padded, as in open_clip, for a tower that sees the tokens after the closing token.
    pools = {"argmax": "last", "eos": "last", "last": "last", "first": "cls"}
    checks = [
        (pool in pools, f"pool_type {pool!r} is not supported"),
        (causal or pool not in ("argmax", "eos"), f"no_causal_mask true is not supported with pool_type {pool!r}"),
    ]
    if reason := first_failure(checks):
        raise ModelError(f"{where}.{reason}")
    padded = pool == "last" or (pool == "first" and not causal)
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
        pad_to=length if padded else None,
        pad_id=text["pad_id"],
    )
    if text["proj_type"] == "none":
        return config, Projection(bias=())
    return config, Projection(bias=(bool(text["proj_bias"]),))


def _read_hugging_face(
    text: Config, embed_dim: int, hugging_face: Callable[[str], Config], where: str
) -> tuple[TextConfig, Projection]:
    name = text["hf_model_name"]
    family, fields = family_of(hugging_face(name), f"{where}.hf_model_name {name}")
    pools = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "cls", "cls_pooler": "cls"}
    pooler, kind = text["hf_pooler_type"], text["hf_proj_type"]
    if pooler not in pools:
        raise ModelError(f"{where}.hf_pooler_type {pooler!r} is not supported")
    config = text_config(family, fields, f"{where}.hf_model_name {name}")
    length = min(text["context_length"], config.context_length)  # Later positions are never used and are left out.
    config = dataclasses.replace(config, pool=pools[pooler], context_length=length)  # type: ignore[arg-type]
    projection = {
        None: Projection(bias=()),
        "linear": Projection(),
        "mlp": Projection(((config.width + embed_dim) // 2,), (False, False)),
    }.get(kind)
    if projection is None:
        raise ModelError(f"{where}.hf_proj_type {kind!r} is not supported")
    if pooler == "cls_pooler" and any(slot.kind == "pooler" for slot in family.slots):
        if kind == "mlp":
            raise ModelError(f"{where}.hf_proj_type 'mlp' is not supported with hf_pooler_type 'cls_pooler'")
        projection = Projection((config.width,), (True, False), "tanh")
    return config, projection


def read_preprocess(fields: Config, size: int, where: str) -> Preprocess:
    """Return the evaluation transform of a `preprocess_cfg`.

    Args:
        fields: fields of `preprocess_cfg`; missing ones have open_clip's defaults.
        size: image size of the image tower in pixels.
        where: the file, for errors.

    Raises:
        ModelError: If a field is not supported; the message names the field.
    """
    mode, fill = fields.get("resize_mode") or "shortest", fields.get("fill_color", 0)
    interpolation = fields.get("interpolation") or "bicubic"
    checks = [
        (mode in ("shortest", "squash", "longest"), f"resize_mode {mode!r} is not shortest, squash or longest"),
        (mode != "longest" or not fill, f"fill_color {fill} is not 0 with resize_mode 'longest'"),
        (interpolation in ("bicubic", "bilinear"), f"interpolation {interpolation!r} is not bicubic or bilinear"),
    ]
    if reason := first_failure(checks):
        raise ModelError(f"{where}: preprocess_cfg.{reason}")
    mean, std = moments(fields.get("mean") or OPENAI_MEAN, fields.get("std") or OPENAI_STD, where)
    return Preprocess(size, mean, std, interpolation, mode)  # type: ignore[arg-type]


def moments(mean: Any, std: Any, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the pixels by channel, as floats.

    Raises:
        ModelError: If they are not three finite numbers each, or a standard deviation is not positive.
    """
    try:
        pair = tuple(map(float, mean)), tuple(map(float, std))
        valid = all(len(x) == 3 and all(map(math.isfinite, x)) for x in pair) and min(pair[1]) > 0
    except (TypeError, ValueError):
        valid, pair = False, ((), ())
    if not valid:
        raise ModelError(f"{where}: mean {mean} and std {std} must be three numbers each, those of std above 0")
    return pair


def rules_of(model_cfg: Config, config: DualConfig) -> list[Rule]:
    """Return the rules for the names of an open_clip model's tensors.

    Args:
        model_cfg: `model_cfg` of open_clip.
        config: the architecture that `read_config` returns for it.
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
    """Return the rules for a projection whose linear layers are the modules `theirs`."""
    names = [ours] if len(projection.bias) == 1 else [f"{ours}.{2 * i}" for i in range(len(projection.bias))]
    return [
        Rule((f"{name}.{kind}",), (f"{there}.{kind}",))
        for name, there, bias in zip(names, theirs, projection.bias)
        for kind in (("weight", "bias") if bias else ("weight",))
    ]


def text_rules(family: Family, text: TextConfig, prefix: str) -> list[Rule]:
    """Return the rules for a family's text encoder, with our names as in the state of a `DualEncoder`."""
    from dualenc.models.text_encoder import TextEncoder

    with torch.device("meta"):
        names = [f"encoder.{name}" for name in TextEncoder(text).state_dict()]
    return of_tower(family_rules(family, text, {}, names, prefix))


def complete(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Add the patch embedding's bias as zeros, because open_clip's towers do not have it."""
    name = "image.vit.patch_embed.proj.bias"
    return {**state, **({name: torch.zeros(shapes[name])} if name in shapes and name not in state else {})}


def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the patch embedding's bias to the position embeddings, because open_clip's towers do not have the bias."""
    bias = state.get("image.vit.patch_embed.proj.bias")
    if bias is None:
        return dict(state)
    positions = state["image.vit.pos_embed"].clone()
    positions[:, 1:] += bias
    return {**state, "image.vit.pos_embed": positions}


def write_config(config: DualConfig, eos_id: int | None, name: str) -> Config:
    """Return the `model_cfg` of an architecture.

    Args:
        config: the architecture.
        eos_id: id of the token that closes a text.
        name: name under which open_clip finds the `config.json` of a text encoder of Hugging Face.

    Raises:
        ModelError: If open_clip does not have such a model; the message names the field.
    """
    with torch.device("meta"):
        tower = ImageEncoder(config.image)
    shape = shape_of(tower.vit)
    image_projection = config.projection_of(config.image_projection, tower.width)
    text_projection = config.projection_of(config.text_projection, config.text.width)
    quick: dict[str, bool] = {}
    reason = unfit("open_clip", tower.vit) or (None if image_projection == Projection() else str(image_projection))
    vision = _write_timm(config.image, tower, image_projection, config.embed_dim)
    if shape is not None and reason is None and (shape.pre_norm or vision is None):
        vision, quick["image"] = _write_vision(shape), shape.activation == "quick_gelu"
    if vision is None:
        raise ModelError(
            f"open_clip has no image tower like this one: its own towers differ in {reason}, and timm's "
            f"{config.image.name} is another tower"
        )
    try:
        text = _write_text(config.text, text_projection, eos_id)
        quick["text"] = config.text.activation == "quick_gelu"
    except ModelError as own:
        try:
            text = _write_hugging_face(config.text, text_projection, config.embed_dim, name)
        except ModelError as theirs:
            raise ModelError(
                f"open_clip has no text tower like this one: CLIP's and SigLIP's differ in {own}, BERT's and RoBERTa's "
                f"in {theirs}"
            ) from None
    if len(set(quick.values())) > 1:
        raise ModelError("open_clip has quick_gelu in both towers or in neither")
    model_cfg: Config = {"embed_dim": config.embed_dim, "quick_gelu": any(quick.values())}
    model_cfg |= {"custom_text": True} if config.logit_bias or "timm_model_name" in vision else {}
    model_cfg |= {"init_logit_bias": -10.0} if config.logit_bias else {}
    return {**model_cfg, "vision_cfg": vision, "text_cfg": text}


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
    ratio = hidden / width
    ratio = ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
    return {"mlp_ratio": ratio} if ratio != 4 else {}


def _kwargs(activation: Activation, eps: float) -> Config:
    kwargs: Config = {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}
    return kwargs | ({"norm_kwargs": {"eps": eps}} if eps != EPS else {})


def _write_timm(image: ImageConfig, tower: ImageEncoder, projection: Projection, embed_dim: int) -> Config | None:
    """Return the `vision_cfg` of a tower that timm's name describes completely; None if the name does not."""
    from timm.models import get_pretrained_cfg

    name = image.name.split(".")[0]
    if get_pretrained_cfg(name) is None:
        return None
    kind = "mlp" if projection.hidden else "linear" if projection.bias else "none"
    vision: Config = {"timm_model_name": name, "timm_pool": tower.vit.global_pool, "timm_proj": kind}
    vision |= {"image_size": image.img_size, **({"timm_proj_bias": True} if any(projection.bias[-1:]) else {})}
    again = _read_timm(name, VISION | vision, embed_dim, "")
    return vision if again == (dataclasses.replace(image, name=name), projection) else None


def _write_text(text: TextConfig, projection: Projection, eos_id: int | None) -> Config:
    """Return the `text_cfg` of open_clip's own text transformer.

    Raises:
        ModelError: If open_clip does not have such a transformer; the message is the field.
    """
    padded, closed = text.pad_to == text.context_length, eos_id is not None
    checks = [
        (text.pool in ("last", "cls"), f"pool {text.pool!r}"),
        (text.causal or padded, f"causal False with pad_to {text.pad_to}"),
        (text.pool == "cls" or padded or text.pad_to is None, f"pad_to {text.pad_to}"),
        (text.pool == "cls" or padded or closed, "pool 'last' without a closing token"),
        (not projection.hidden, str(projection)),
        (text.activation in ("gelu", "gelu_tanh", "quick_gelu"), f"activation {text.activation!r}"),
    ]
    if reason := first_failure(checks):
        raise ModelError(reason)
    ends: Config = {"pool_type": "first" if text.pool == "cls" else "last"}
    if text.pool == "last" and not padded:
        # Without an eos_id, open_clip takes the largest id of a text for the closing token, as in CLIP.
        ends = {} if eos_id == text.vocab_size - 1 else {"pool_type": "eos", "eos_id": eos_id}
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
    if differing := differences(_plain(text), _plain(again)):
        raise ModelError(", ".join(differing))
    return written


def _plain(text: TextConfig) -> TextConfig:
    """Return an architecture with equivalent values written in one way and without dropout."""
    hidden = text.mlp_width or 4 * text.width
    return dataclasses.replace(text, mlp_width=hidden, dropout=0.0, family=None, embed_norm=text.normalizes_embeddings)


def _write_hugging_face(text: TextConfig, projection: Projection, embed_dim: int, name: str) -> Config:
    """Return the `text_cfg` of an encoder that open_clip takes from transformers.

    Raises:
        ModelError: If open_clip does not take such an encoder; the message is the field.
    """
    pools = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
    kinds = {
        Projection(): "linear",
        Projection(((text.width + embed_dim) // 2,), (False, False)): "mlp",
        Projection(bias=()): None,
    }
    pooled = projection == Projection((text.width,), (True, False), "tanh") and text.pool == "cls"
    checks: list[tuple[object, str]] = [
        (text.pool in pools, f"pool {text.pool!r}"),
        (fitted(text, HUGGING_FACE), unlike(text, HUGGING_FACE)),
        (pooled or projection in kinds, str(projection)),
    ]
    if reason := first_failure(checks):
        raise ModelError(reason)
    written: Config = {
        "hf_model_name": name,
        "hf_pooler_type": pools[text.pool],
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
    }
    if pooled:
        return written | {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}
    return written | {"hf_proj_type": kinds[projection]}
