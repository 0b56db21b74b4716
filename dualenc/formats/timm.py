"""Vision transformers of other libraries: their architecture as an `ImageConfig`, and the names of their tensors.

A `Shape` describes a plain vision transformer of any library. `shape_of` derives it from a timm model, `image_config`
finds a timm model with it. A layout is a library's table of tensor names. Other image towers have no shape and are
exported by their timm name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import timm
import torch
from timm.layers import GELUTanh, LayerScale, QuickGELU
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from dualenc.formats.state_dict import Rule
from dualenc.models.image_encoder import ImageConfig, ImageEncoder

Act = Literal["gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True)
class Shape:
    """Architecture of a plain vision transformer: pre-norm blocks on patches of a square image, learned positions.

    Attributes:
        size: side of the image in pixels.
        patch: side of a patch in pixels.
        width: features of a token.
        layers: number of blocks.
        heads: attention heads of a block.
        mlp_width: hidden features of a block's MLP.
        activation: activation of the MLPs.
        norm_eps: epsilon of every LayerNorm.
        pre_norm: True for a LayerNorm before the first block and a patch embedding without bias (CLIP).
        class_token: True for a class token with its own position embedding.
        pool: the class token ("token"), the mean of the patches ("avg"), or attention with a learned query ("map").
        norm_last: True if the last LayerNorm comes after pooling.
        layer_scale: True if both branches of a block end in a learned factor per feature.
    """

    size: int
    patch: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Act = "gelu"
    norm_eps: float = 1e-6
    pre_norm: bool = False
    class_token: bool = True
    pool: Literal["token", "avg", "map"] = "token"
    norm_last: bool = False
    layer_scale: bool = False

    def __post_init__(self) -> None:
        numbers = {"size": self.size, "patch": self.patch, "width": self.width, "heads": self.heads}
        check_numbers({**numbers, "mlp_width": self.mlp_width}, self.layers)
        if self.size // self.patch > 1024 or self.width % self.heads:
            raise ValueError(
                f"an image of {self.size} pixels must have at most 1024 patches a side, found patches of {self.patch}; "
                f"the width {self.width} must be a multiple of the {self.heads} heads"
            )


def check_numbers(numbers: Mapping[str, Any], layers: Any) -> None:
    """Refuse sizes that no transformer has, before a model is built: 100,000 layers take minutes even on "meta".

    Args:
        numbers: sizes by name.
        layers: number of layers.

    Raises:
        ValueError: If a size is not a whole number or out of range; names it.
    """
    largest = dict.fromkeys(numbers, 10_000_000) | {"layers": 1000}
    for name, value in {**numbers, "layers": layers}.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest[name]:
            raise ValueError(f"{name} must be a whole number from 1 to {largest[name]:,}, not {value!r}")


def check_timm(name: Any, arguments: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Refuse names that timm would look up outside its own models, and sizes out of range, before a tower is built.

    Args:
        name: timm's name of the model.
        arguments: arguments of the model.

    Raises:
        ValueError: If timm does not have the model, or a size is out of range; names it.
    """
    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        raise ValueError(f"timm has no model {name!r}")
    sizes = {key: arguments[key] for key in ("embed_dim", "num_heads", "patch_size", "img_size") if key in arguments}
    check_numbers(sizes, arguments.get("depth", 1))


# timm's names of published towers. Any other shape is written as the name of a base model with overrides.
PRE_NORM = (
    "vit_base_patch32_clip_224", "vit_base_patch16_clip_224", "vit_base_patch16_plus_clip_240",
    "vit_large_patch14_clip_224", "vit_huge_patch14_clip_224", "vit_giant_patch14_clip_224",
    "vit_gigantic_patch14_clip_224", "vit_medium_patch32_clip_224", "vit_medium_patch16_clip_224",
    "vit_xsmall_patch16_clip_224", "vit_betwixt_patch32_clip_224",
)  # fmt: skip
QUICK = (
    "vit_base_patch32_clip_quickgelu_224", "vit_base_patch16_clip_quickgelu_224",
    "vit_large_patch14_clip_quickgelu_224", "vit_huge_patch14_clip_quickgelu_224",
    "vit_gigantic_patch14_clip_quickgelu_224",
)  # fmt: skip
MAP = (
    "vit_base_patch16_siglip_224", "vit_base_patch32_siglip_256", "vit_large_patch16_siglip_256",
    "vit_so400m_patch14_siglip_224", "vit_so400m_patch16_siglip_256", "vit_giantopt_patch16_siglip_256",
)  # fmt: skip
PLAIN = (
    "vit_base_patch16_224", "vit_base_patch32_224", "vit_large_patch16_224", "vit_small_patch16_224",
    "vit_tiny_patch16_224", "vit_huge_patch14_224",
)  # fmt: skip


def _meta(config: ImageConfig) -> Any:
    with torch.device("meta"):
        return ImageEncoder(config).vit


def shape_of(vit: Any) -> Shape | None:
    """Return the shape of a timm model, or None if it is not a plain vision transformer."""
    if type(vit) is not VisionTransformer or not all(type(block) is Block for block in vit.blocks):
        return None
    norms = [module for module in vit.modules() if isinstance(module, nn.LayerNorm)]
    blocks: Any = vit.blocks
    first, patches = blocks[0], vit.patch_embed
    acts: dict[type[nn.Module], Act] = {nn.GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}
    pre_norm, scaled = not isinstance(vit.norm_pre, nn.Identity), isinstance(first.ls1, LayerScale)
    act = first.mlp.act
    tanh = isinstance(act, nn.GELU) and act.approximate == "tanh"
    shape = Shape(
        size=patches.img_size[0],
        patch=patches.patch_size[0],
        width=vit.embed_dim,
        layers=len(vit.blocks),
        heads=first.attn.num_heads,
        mlp_width=first.mlp.fc1.out_features,
        activation="gelu_tanh" if tanh else acts.get(type(act), "gelu"),
        norm_eps=norms[0].eps,
        pre_norm=pre_norm,
        class_token=vit.has_class_token,
        pool=vit.global_pool,  # type: ignore[arg-type]
        norm_last=not isinstance(vit.fc_norm, nn.Identity),
        layer_scale=scaled,
    )
    attention = vit.attn_pool
    plain = (
        type(act) in acts
        and shape.pool in ("token", "avg", "map")
        and len({norm.eps for norm in norms}) == 1
        and all(norm.elementwise_affine for norm in norms)
        and len(set(patches.img_size)) == len(set(patches.patch_size)) == 1
        and isinstance(patches.norm, nn.Identity)
        and (patches.proj.bias is None) == pre_norm
        and vit.num_reg_tokens == 0
        and not vit.no_embed_class
        and not vit.pool_include_prefix
        and isinstance(vit.pos_embed, nn.Parameter)
        and isinstance(vit.norm, nn.Identity) != isinstance(vit.fc_norm, nn.Identity)
        and all(type(block.attn) is Attention and block.attn.num_heads == shape.heads for block in blocks)
        and first.attn.qkv.bias is not None
        and first.attn.proj.bias is not None
        and isinstance(first.attn.q_norm, nn.Identity)
        and isinstance(getattr(first.attn, "norm", nn.Identity()), nn.Identity)
        and isinstance(getattr(first.mlp, "norm", nn.Identity()), nn.Identity)
        and isinstance(first.ls2, LayerScale) == scaled
        and (shape.pool == "map") == (attention is not None)
        and (attention is None or _plain_pool(attention, shape))
    )
    return shape if plain else None


def _plain_pool(attention: Any, shape: Shape) -> bool:
    """Return True if attention pooling is SigLIP's: one query, biases, and the blocks' heads and hidden width."""
    return (
        attention.num_heads == shape.heads
        and attention.latent_len == 1
        and attention.mlp is not None
        and attention.mlp.fc1.out_features == shape.mlp_width
        and type(attention.mlp.act).__name__.lower().replace("_", "") == shape.activation.replace("_", "")
        and isinstance(attention.q, nn.Linear)
        and attention.q.bias is not None
        and isinstance(attention.q_norm, nn.Identity)
        and attention.pos_embed is None
    )


@lru_cache(maxsize=64)
def _published_name(shape: Shape) -> str | None:
    """Return timm's name of a published tower with this shape, any `norm_eps` aside, or None."""
    names = MAP if shape.pool == "map" else PLAIN
    if shape.pre_norm:
        names = QUICK if shape.activation == "quick_gelu" else PRE_NORM
    for name in (name for name in names if f"_patch{shape.patch}_" in name):
        found = shape_of(_meta(ImageConfig(name, shape.size)))
        if found is not None and replace(found, norm_eps=shape.norm_eps) == shape:
            return name
    return None


def image_config(shape: Shape) -> ImageConfig:
    """Return an `ImageConfig` whose timm model has this shape.

    Raises:
        ValueError: If timm cannot build such a model.
    """
    name = _published_name(shape) or "vit_base_patch16_224"
    config = ImageConfig(name, shape.size)
    if _published_name(shape) is None:
        overrides: dict[str, Any] = {
            "patch_size": shape.patch,
            "embed_dim": shape.width,
            "depth": shape.layers,
            "num_heads": shape.heads,
            "mlp_ratio": _mlp_ratio(shape),
        }
        overrides |= {"act_layer": shape.activation} if shape.activation != "gelu" else {}
        overrides |= {"pre_norm": True} if shape.pre_norm else {}
        overrides |= {"class_token": False} if not shape.class_token else {}
        overrides |= {"global_pool": shape.pool} if shape.pool != "token" else {}
        overrides |= {"fc_norm": shape.norm_last} if shape.norm_last != (shape.pool == "avg") else {}
        overrides |= {"init_values": 1.0} if shape.layer_scale else {}
        config = ImageConfig(name, shape.size, overrides)
    found = shape_of(_meta(config))
    if found is not None and found.norm_eps != shape.norm_eps:
        config = replace(config, norm_eps=shape.norm_eps)
        found = shape_of(_meta(config))
    if found != shape:
        raise ValueError(f"timm cannot build a vision transformer with {shape}")
    return config


def _mlp_ratio(shape: Shape) -> float:
    """Return the `mlp_ratio` from which timm computes the hidden width, which it truncates to a whole number."""
    ratio = shape.mlp_width / shape.width
    return ratio if int(shape.width * ratio) == shape.mlp_width else (shape.mlp_width + 0.5) / shape.width


def vision_rules(layout: str, shape: Shape, prefix: str) -> list[Rule]:
    """Return the rules between the image tower of a `DualEncoder` and the tensors of a layout.

    Args:
        layout: "open_clip", or Hugging Face's "clip", "siglip" or "vit".
        shape: shape of the tower.
        prefix: prefix of the layout's tensors.
    """
    outside, block, inside = LAYOUTS[layout]
    last = "fc_norm" if shape.norm_last else "norm"
    rules = []
    for ours, theirs in outside.items():
        ours = ours.replace("norm.", f"{last}.") if ours.startswith("norm.") else ours
        wanted = {
            "cls_token": shape.class_token,
            "norm_pre.": shape.pre_norm,
            "patch_embed.proj.bias": not shape.pre_norm,
            "attn_pool.": shape.pool == "map",
        }
        if all(on for start, on in wanted.items() if ours.startswith(start)):
            rules.append(_rule((ours,), (theirs,), prefix))
    if shape.pool == "map":
        for kind in ("weight", "bias"):
            joined = (f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}")
            rules.append(_rule(joined, (f"head.attention.in_proj_{kind}",), prefix))
    for i in range(shape.layers):
        for ours, theirs in inside.items():
            if ours.startswith("ls") and not shape.layer_scale:
                continue
            parts = (theirs,) if isinstance(theirs, str) else theirs
            rules.append(_rule((f"blocks.{i}.{ours}",), tuple(f"{block.format(i=i)}.{part}" for part in parts), prefix))
    return rules


def _rule(ours: tuple[str, ...], theirs: tuple[str, ...], prefix: str) -> Rule:
    return Rule(tuple(f"image.vit.{name}" for name in ours), tuple(prefix + name for name in theirs))


def _weight_and_bias(modules: dict[str, str | tuple[str, ...]]) -> dict[str, str | tuple[str, ...]]:
    """Return the names of weights and biases from the names of modules."""
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}" if isinstance(theirs, str) else tuple(f"{part}.{kind}" for part in theirs)
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
CLIP_BLOCK = _weight_and_bias(
    {
        "norm1": "layer_norm1", "attn.qkv": QKV, "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }
)  # fmt: skip
PATCHES = "embeddings.patch_embedding"
LAYOUTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "open_clip": (
        {
            "cls_token": "class_embedding",
            "pos_embed": "positional_embedding",
            "patch_embed.proj.weight": "conv1.weight",
            **_weight_and_bias({"norm_pre": "ln_pre", "norm": "ln_post"}),
        },
        "transformer.resblocks.{i}",
        {
            "attn.qkv.weight": "attn.in_proj_weight",
            "attn.qkv.bias": "attn.in_proj_bias",
            "ls1.gamma": "ls_1.gamma",
            "ls2.gamma": "ls_2.gamma",
            **_weight_and_bias(
                {
                    "norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj",
                    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                }
            ),
        },
    ),
    "clip": (
        {
            "cls_token": "embeddings.class_embedding",
            "pos_embed": "embeddings.position_embedding.weight",
            "patch_embed.proj.weight": f"{PATCHES}.weight",
            **_weight_and_bias({"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}),
        },
        "encoder.layers.{i}",
        CLIP_BLOCK,
    ),
    "siglip": (
        {
            "pos_embed": "embeddings.position_embedding.weight",
            "attn_pool.latent": "head.probe",
            **_weight_and_bias(
                {
                    "patch_embed.proj": PATCHES, "norm": "post_layernorm", "attn_pool.proj": "head.attention.out_proj",
                    "attn_pool.norm": "head.layernorm", "attn_pool.mlp.fc1": "head.mlp.fc1",
                    "attn_pool.mlp.fc2": "head.mlp.fc2",
                }
            ),
        },
        "encoder.layers.{i}",
        CLIP_BLOCK,
    ),
    "vit": (
        {
            "cls_token": "embeddings.cls_token",
            "pos_embed": "embeddings.position_embeddings",
            **_weight_and_bias({"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}),
        },
        "encoder.layer.{i}",
        _weight_and_bias(
            {
                "norm1": "layernorm_before", "norm2": "layernorm_after",
                "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
                "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
            }
        ),
    ),
}  # fmt: skip


def fits(layout: str, shape: Shape) -> bool:
    """Return True if a layout can express towers of this shape."""
    if layout == "open_clip":
        # open_clip's patch embedding has no bias; the export adds the bias to the position embeddings.
        return shape.class_token and shape.pool != "map"
    if layout == "clip":
        plain = shape.class_token and shape.pool == "token" and shape.pre_norm
    elif layout == "siglip":
        plain = not shape.class_token and shape.pool == "map" and not shape.pre_norm
    else:
        plain = shape.class_token and shape.pool == "token" and not shape.pre_norm and shape.activation != "quick_gelu"
    return plain and not shape.layer_scale and not shape.norm_last
