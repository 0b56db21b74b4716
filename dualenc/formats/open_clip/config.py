"""Models in the format of open_clip: what `open_clip_config.json` says as a `DualConfig`, and back.

The fields are those of `CLIPVisionCfg` and `CLIPTextCfg` (open_clip 3.3, model.py). What a field asks for and a
`DualEncoder` does not compute is refused by name.
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
# What open_clip takes for a field that is not there.
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
# Of these a value that is not empty changes what is computed.
REFUSED_VISION = ("attentional_pool", "block_type", *CUSTOM)
REFUSED_TEXT = ("embed_cls", "ls_init_value", "final_ln_after_pool", "block_type", *CUSTOM)
HUGGING_FACE = ("bert", "roberta", "xlm-roberta")  # the encoders whose width open_clip finds in their config
EPS = 1e-5  # of LayerNorms, unless norm_kwargs says otherwise


def read_config(model_cfg: Config, where: str, hugging_face: Callable[[str], Config]) -> DualConfig:
    """The architecture that a model's config says.

    Args:
        model_cfg: open_clip's.
        where: its file or name, for errors.
        hugging_face: gives the `config.json` of a text encoder by the name that open_clip calls it by.

    Raises:
        ModelError: it is no config of open_clip, or asks for what dualenc does not compute; names the key.
    """
    if "multimodal_cfg" in model_cfg:
        raise ModelError(f"{where}: multimodal_cfg: CoCa's decoder is none that dualenc computes")
    try:
        vision, text, embed_dim = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"]), model_cfg["embed_dim"]
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{where} is no model of open_clip: it needs embed_dim, vision_cfg and text_cfg") from None
    for name, part, refused in (("vision_cfg", vision, REFUSED_VISION), ("text_cfg", text, REFUSED_TEXT)):
        if wrong := [key for key in refused if part.get(key)]:
            raise ModelError(f"{where}: {name}.{wrong[0]} {part[wrong[0]]!r} is none that dualenc computes")
    vision, text = VISION | vision, TEXT | text
    quick = bool(model_cfg.get("quick_gelu", False))
    try:
        image, image_projection = _read_vision(vision, embed_dim, quick, f"{where}: vision_cfg")
        if text.get("hf_model_name"):
            ours, text_projection = _read_hugging_face(text, embed_dim, hugging_face, f"{where}: text_cfg")
        else:
            ours, text_projection = _read_text(text, quick, f"{where}: text_cfg")
        return DualConfig(
            image,
            ours,
            embed_dim,
            logit_bias=model_cfg.get("init_logit_bias") is not None,
            image_projection=image_projection,
            text_projection=text_projection,
        )
    except (ValueError, TypeError, ArithmeticError, KeyError) as error:
        raise error if isinstance(error, ModelError) else ModelError(f"{where}: {error}") from None


def _activation(part: Config, quick: bool, where: str) -> Any:
    kwargs = part.get("act_kwargs") or {}
    if quick and not kwargs:
        return "quick_gelu"
    if not quick and kwargs in ({}, {"approximate": "none"}):
        return "gelu"
    if not quick and kwargs == {"approximate": "tanh"}:
        return "gelu_tanh"
    raise ModelError(f"{where}.act_kwargs {kwargs} is none that dualenc computes")


def _eps(part: Config, where: str) -> float:
    kwargs = part.get("norm_kwargs") or {}
    if set(kwargs) - {"eps"}:
        raise ModelError(f"{where}.norm_kwargs {kwargs} is none that dualenc computes")
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
        norm_last=average and bool(vision["final_ln_after_pool"]),  # of one token it is all the same
        layer_scale=vision["ls_init_value"] is not None,
    )
    return image_config(shape), Projection()


def _vision_checks(vision: Config) -> Iterator[tuple[bool, str]]:
    """Yield what must hold for a vision transformer of open_clip's own, each with the field that says otherwise."""
    yield isinstance(vision["layers"], int), f"layers {vision['layers']}: a ResNet is not a vision transformer"
    yield vision["pool_type"] in ("tok", "avg"), f"pool_type {vision['pool_type']!r} cannot be computed"
    for key in ("image_size", "patch_size"):
        height, width = _sides(vision[key])
        yield height == width, f"{key} {vision[key]} is not square"


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _read_timm(name: str, vision: Config, embed_dim: int, where: str) -> tuple[ImageConfig, Projection]:
    """A tower of timm by its name; its size is what timm says, whatever `image_size` is."""
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
        if kind in ("linear", "mlp"):  # open_clip changes it after timm has decided where the last LayerNorm stands
            overrides["fc_norm"] = not isinstance(vit.fc_norm, nn.Identity)
    if kind == "none":
        projection = Projection(bias=())
    elif kind == "linear":
        projection = Projection(bias=(bool(vision["timm_proj_bias"]),))
    elif kind == "mlp":
        projection = Projection((2 * embed_dim,), (True, bool(vision["timm_proj_bias"])))
    elif not kind:  # the tower's own classifier
        projection = Projection(bias=(True,))
    else:
        raise ModelError(f"{where}.timm_proj {kind!r} is none that dualenc computes")
    return ImageConfig(name, size, overrides), projection


def _read_text(text: Config, quick: bool, where: str) -> tuple[TextConfig, Projection]:
    check_numbers({key: text[key] for key in ("vocab_size", "width", "heads", "context_length")}, text["layers"])
    causal, pool, length = not text["no_causal_mask"], text["pool_type"], text["context_length"]
    # Of a tower that sees what follows the closing token the texts are filled up, as there.
    ends = {"argmax": "last", "eos": "last", "last": "last", "first": "cls"}
    checks = [
        (pool in ends, f"pool_type {pool!r} cannot be computed"),
        (causal or pool not in ("argmax", "eos"), f"no_causal_mask true cannot be computed with pool_type {pool!r}"),
    ]
    if reason := first_failure(checks):
        raise ModelError(f"{where}.{reason}")
    filled = pool == "last" or (pool == "first" and not causal)
    config = TextConfig(
        vocab_size=text["vocab_size"],
        width=text["width"],
        layers=text["layers"],
        heads=text["heads"],
        mlp_width=int(text["width"] * text["mlp_ratio"]),
        context_length=length,
        norm="pre",
        pool=ends[pool],  # type: ignore[arg-type]
        activation=_activation(text, quick, where),
        norm_eps=_eps(text, where),
        causal=causal,
        pad_to=length if filled else None,
        pad_id=text["pad_id"],
    )
    if text["proj_type"] == "none":
        return config, Projection(bias=())
    return config, Projection(bias=(bool(text["proj_bias"]),))


def _read_hugging_face(
    text: Config, embed_dim: int, hugging_face: Callable[[str], Config], where: str
) -> tuple[TextConfig, Projection]:
    name = text["hf_model_name"]
    family, inside = family_of(hugging_face(name), f"{where}.hf_model_name {name}")
    pools = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "cls", "cls_pooler": "cls"}
    pooler, kind = text["hf_pooler_type"], text["hf_proj_type"]
    if pooler not in pools:
        raise ModelError(f"{where}.hf_pooler_type {pooler!r} is none that dualenc computes")
    config = text_config(family, inside, f"{where}.hf_model_name {name}")
    length = min(text["context_length"], config.context_length)  # later positions are never used, and not taken
    config = dataclasses.replace(config, pool=pools[pooler], context_length=length)  # type: ignore[arg-type]
    projection = {
        None: Projection(bias=()),
        "linear": Projection(),
        "mlp": Projection(((config.width + embed_dim) // 2,), (False, False)),
    }.get(kind)
    if projection is None:
        raise ModelError(f"{where}.hf_proj_type {kind!r} is none that dualenc computes")
    if pooler == "cls_pooler" and any(slot.kind == "pooler" for slot in family.slots):
        if kind == "mlp":
            raise ModelError(f"{where}: hf_pooler_type 'cls_pooler' before hf_proj_type 'mlp' is not computed")
        projection = Projection((config.width,), (True, False), "tanh")
    return config, projection


def read_preprocess(fields: Config, size: int, where: str) -> Preprocess:
    """The evaluation transform that `preprocess_cfg` says.

    Args:
        fields: of the config; what is missing is as open_clip has it.
        size: of the image tower.
        where: the file, for errors.

    Raises:
        ModelError: it is none that dualenc does.
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
    found = {key: fields.get(key) or usual for key, usual in MOMENTS.items()}
    mean, std = moments(found["mean"], found["std"], where)
    return Preprocess(size, mean, std, interpolation, mode)  # type: ignore[arg-type]


def moments(mean: Any, std: Any, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """By which pixels are normalized, three numbers each.

    Raises:
        ModelError: they are not.
    """
    try:
        found = tuple(map(float, mean)), tuple(map(float, std))
        fine = all(len(x) == 3 and all(map(math.isfinite, x)) for x in found) and min(found[1]) > 0
    except (TypeError, ValueError):
        fine, found = False, ((), ())
    if not fine:
        raise ModelError(f"{where}: mean {mean} and std {std} must be three numbers each, those of std above 0")
    return found


MOMENTS = {"mean": OPENAI_MEAN, "std": OPENAI_STD}


def rules_of(model_cfg: Config, config: DualConfig) -> list[Rule]:
    """Names of the tensors of a model of open_clip.

    Args:
        model_cfg: open_clip's config.
        config: what it says, by `read_config`.
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
    """Names of a projection's linear maps, each a module of theirs."""
    names = [ours] if len(projection.bias) == 1 else [f"{ours}.{2 * i}" for i in range(len(projection.bias))]
    return [
        Rule((f"{name}.{kind}",), (f"{there}.{kind}",))
        for name, there, bias in zip(names, theirs, projection.bias)
        for kind in (("weight", "bias") if bias else ("weight",))
    ]


def text_rules(family: Family, text: TextConfig, prefix: str) -> list[Rule]:
    """Names of a text encoder's tensors by a family, ours as in the state of a `DualEncoder`."""
    from dualenc.models.text_encoder import TextEncoder

    with torch.device("meta"):
        names = [f"encoder.{name}" for name in TextEncoder(text).state_dict()]
    return of_tower(family_rules(family, text, {}, names, prefix))


def complete(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What open_clip's towers have not and ours have: a bias of zeros in the map of the patches."""
    name = "image.vit.patch_embed.proj.bias"
    return {**state, **({name: torch.zeros(shapes[name])} if name in shapes and name not in state else {})}


def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way: the bias of the patches' map is added to their positions, where open_clip has none for it."""
    bias, places = state.get("image.vit.patch_embed.proj.bias"), state["image.vit.pos_embed"]
    if bias is None:
        return dict(state)
    moved = places.clone()
    moved[:, 1:] += bias
    return {**state, "image.vit.pos_embed": moved}


def write_config(config: DualConfig, eos_id: int | None, name: str) -> Config:
    """What `model_cfg` says of a model, where open_clip has its like.

    Args:
        config: the architecture.
        eos_id: of the token that closes a text.
        name: under which open_clip finds the text encoder's `config.json`, where it is one of Hugging Face's.

    Raises:
        ModelError: open_clip has no such model; says which part.
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
            f"open_clip has no image tower like this one: its own differ in {reason}, and the name {config.image.name} "
            "alone does not give this one in timm; export to transformers or onnx"
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
                f"in {theirs}; export to onnx"
            ) from None
    if len(set(quick.values())) > 1:
        raise ModelError("open_clip has quick_gelu in both towers or in none: export to onnx")
    model_cfg: Config = {"embed_dim": config.embed_dim, "quick_gelu": any(quick.values())}
    model_cfg |= {"custom_text": True} if config.logit_bias or "timm_model_name" in vision else {}
    model_cfg |= {"init_logit_bias": -10.0} if config.logit_bias else {}
    return {**model_cfg, "vision_cfg": vision, "text_cfg": text}


def _write_vision(shape: Shape) -> Config:
    """Of open_clip's own vision transformer."""
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
    """By the name that timm has for it, if that says all."""
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
    """Return what open_clip says of its own text transformer.

    Raises:
        ModelError: It has no such text transformer; the message is the field.
    """
    filled, ended = text.pad_to == text.context_length, eos_id is not None
    checks = [
        (text.pool in ("last", "cls"), f"pool {text.pool!r}"),
        (text.causal or filled, f"causal False with pad_to {text.pad_to}"),
        (text.pool == "cls" or filled or text.pad_to is None, f"pad_to {text.pad_to}"),
        (text.pool == "cls" or filled or ended, "pool 'last' without a token that closes a text"),
        (not projection.hidden, str(projection)),
        (text.activation in ("gelu", "gelu_tanh", "quick_gelu"), f"activation {text.activation!r}"),
    ]
    if reason := first_failure(checks):
        raise ModelError(reason)
    ends: Config = {"pool_type": "first" if text.pool == "cls" else "last"}
    if text.pool == "last" and not filled:
        # The largest id is the closing one's where it is CLIP's; the name of any other is said.
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
    """Return an architecture in which what can be said in several ways is said in one, without training choices."""
    hidden = text.mlp_width or 4 * text.width
    return dataclasses.replace(text, mlp_width=hidden, dropout=0.0, family=None, embed_norm=text.normalizes_embeddings)


def _write_hugging_face(text: TextConfig, projection: Projection, embed_dim: int, name: str) -> Config:
    """Return what open_clip says of an encoder that it takes from transformers.

    Raises:
        ModelError: It takes no such encoder; the message is the field.
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
