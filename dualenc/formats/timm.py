"""Vision transformers of other libraries: their architecture as an `ImageConfig`, and the names of their tensors.

A `Shape` describes a plain vision transformer of any library. `shape_of` derives it from a timm model, `image_config`
finds a timm model with it. A layout is a library's table of tensor names. Other image towers have no shape and are
exported by their timm name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import timm
import torch
from timm.layers import GELUTanh, LayerScale, PatchEmbed, QuickGELU
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from dualenc.formats.download import hub_or_cache
from dualenc.formats.state_dict import Rule, plain_copy
from dualenc.models.image_encoder import ImageConfig, ImageEncoder
from dualenc.utils.errors import first_failure

Act = Literal["gelu", "gelu_tanh", "quick_gelu"]
ACTS: dict[type[nn.Module], Act] = {nn.GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}


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
    return None if first_failure(_plain(vit)) else _shape(vit)


def _shape(vit: Any) -> Shape:
    first, patches = vit.blocks[0], vit.patch_embed
    act = first.mlp.act
    tanh = isinstance(act, nn.GELU) and act.approximate == "tanh"
    return Shape(
        size=patches.img_size[0],
        patch=patches.patch_size[0],
        width=vit.embed_dim,
        layers=len(vit.blocks),
        heads=first.attn.num_heads,
        mlp_width=first.mlp.fc1.out_features,
        activation="gelu_tanh" if tanh else ACTS[type(act)],
        norm_eps=_norms(vit)[0].eps,
        pre_norm=not isinstance(vit.norm_pre, nn.Identity),
        class_token=vit.has_class_token,
        pool=vit.global_pool,
        norm_last=not isinstance(vit.fc_norm, nn.Identity),
        layer_scale=isinstance(first.ls1, LayerScale),
    )


def _norms(vit: nn.Module) -> list[nn.LayerNorm]:
    return [module for module in vit.modules() if isinstance(module, nn.LayerNorm)]


def _plain(vit: Any) -> Iterator[tuple[bool, str]]:
    """Yield what must hold for a plain vision transformer, each with what the model has instead."""
    yield type(vit) is VisionTransformer, f"class {type(vit).__name__}"
    yield all(type(block) is Block for block in vit.blocks), f"blocks of class {type(vit.blocks[0]).__name__}"
    first, patches, norms, pool = vit.blocks[0], vit.patch_embed, _norms(vit), vit.attn_pool
    yield type(first.mlp.act) in ACTS, f"activation {type(first.mlp.act).__name__}"
    yield vit.global_pool in ("token", "avg", "map"), f"global_pool {vit.global_pool!r}"
    yield len({norm.eps for norm in norms}) == 1, "LayerNorms with different epsilons"
    yield all(norm.elementwise_affine for norm in norms), "LayerNorms without weights"
    yield isinstance(patches, PatchEmbed), f"patch_embed {type(patches).__name__}"
    yield len(set(patches.img_size)) == 1, f"img_size {patches.img_size}"
    yield len(set(patches.patch_size)) == 1, f"patch_size {patches.patch_size}"
    yield isinstance(patches.norm, nn.Identity), "a LayerNorm of the patches"
    pre_norm = not isinstance(vit.norm_pre, nn.Identity)
    yield (
        (patches.proj.bias is None) == pre_norm,
        f"pre_norm {pre_norm} {'with' if pre_norm else 'without'} a patch bias",
    )
    yield vit.num_reg_tokens == 0, f"reg_tokens {vit.num_reg_tokens}"
    yield not vit.no_embed_class, "no_embed_class True"
    yield not vit.pool_include_prefix, "pool_include_prefix True"
    yield isinstance(vit.pos_embed, nn.Parameter), "no learned positions"
    yield (
        isinstance(vit.norm, nn.Identity) != isinstance(vit.fc_norm, nn.Identity),
        "not exactly one of norm and fc_norm",
    )
    yield all(type(block.attn) is Attention for block in vit.blocks), f"attention {type(first.attn).__name__}"
    yield len({block.attn.num_heads for block in vit.blocks}) == 1, "blocks with different numbers of heads"
    yield first.attn.qkv.bias is not None, "qkv_bias False"
    yield first.attn.proj.bias is not None, "proj_bias False"
    yield isinstance(first.attn.q_norm, nn.Identity), "qk_norm True"
    yield isinstance(getattr(first.attn, "norm", nn.Identity()), nn.Identity), "scale_attn_norm True"
    yield isinstance(getattr(first.mlp, "norm", nn.Identity()), nn.Identity), "scale_mlp_norm True"
    yield isinstance(first.ls1, LayerScale) == isinstance(first.ls2, LayerScale), "a layer scale in one branch only"
    yield (vit.global_pool == "map") == (pool is not None), f"global_pool {vit.global_pool!r} and attn_pool {pool}"
    if pool is not None:
        yield from _plain_pool(pool, _shape(vit))


def _plain_pool(pool: Any, shape: Shape) -> Iterator[tuple[bool, str]]:
    """Yield what must hold for SigLIP's pooling: one query, maps with a bias, heads and hidden width of the blocks."""
    yield pool.num_heads == shape.heads, f"attn_pool.num_heads {pool.num_heads}"
    yield pool.latent_len == 1, f"attn_pool.latent_len {pool.latent_len}"
    yield pool.mlp is not None, "attn_pool.mlp None"
    yield pool.mlp.fc1.out_features == shape.mlp_width, f"attn_pool.mlp of width {pool.mlp.fc1.out_features}"
    act = type(pool.mlp.act).__name__
    yield act.lower().replace("_", "") == shape.activation.replace("_", ""), f"attn_pool.mlp.act {act}"
    yield isinstance(pool.q, nn.Linear) and pool.q.bias is not None, "attn_pool.q without a bias"
    yield isinstance(pool.q_norm, nn.Identity), "attn_pool.q_norm"
    yield pool.pos_embed is None, "attn_pool.pos_embed"


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


def unfit(layout: str, vit: nn.Module) -> str | None:
    """Return what a timm model has that towers of a layout do not have; None if the layout can express it."""
    if reason := first_failure(_plain(vit)):
        return reason
    shape, siglip = _shape(vit), layout == "siglip"
    if layout == "open_clip":
        # open_clip's patch embedding has no bias; the export adds the bias to the position embeddings.
        return first_failure([(shape.class_token, "class_token False"), (shape.pool != "map", "global_pool 'map'")])
    checks = [
        (shape.class_token != siglip, f"class_token {shape.class_token}"),
        (shape.pool == ("map" if siglip else "token"), f"global_pool {shape.pool!r}"),
        (shape.pre_norm == (layout == "clip"), f"pre_norm {shape.pre_norm}"),
        (layout != "vit" or shape.activation != "quick_gelu", f"activation {shape.activation!r}"),
        (not shape.layer_scale, "a layer scale"),
        (not shape.norm_last, "fc_norm True"),
    ]
    return first_failure(checks)


def load_image_weights(tower: ImageEncoder, source: str | None) -> None:
    """Load pretrained weights into an image tower, see `ImageEncoder.load_pretrained`.

    Args:
        tower: the image tower.
        source: file of weights by timm's names, whatever a program of training has put around them; None for timm's
            weights of the tower's name.

    Raises:
        ValueError: If they cannot be read or downloaded, or do not fit.
    """
    if source is None or not Path(source).is_file():
        with hub_or_cache(f"timm's weights of {tower.config.name}"):
            tower.load_pretrained(source)
        return
    with plain_copy(Path(source), known=("state_dict_ema", "model_ema", "state_dict", "model", "module.")) as file:
        tower.load_pretrained(str(file))
