"""The image encoder: one class for all vision transformers of timm."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from torch import Tensor, nn

from dualenc.models.tower import Tower
from dualenc.utils.text import did_you_mean


@dataclass(frozen=True)
class ImageConfig:
    """Architecture of an `ImageEncoder`.

    Attributes:
        name: a timm model name, with or without the tag of its weights (`vit_base_patch32_224.augreg_in21k`).
        img_size: input height and width in pixels.
        overrides: further arguments of `timm.create_model` that shape the network (`patch_size`, `depth`,
            `embed_dim`, `num_heads`, `global_pool`, ...).
        norm_eps: epsilon of every LayerNorm; absent, timm's own.

    Example:
        >>> from dualenc import ImageConfig
        >>> ImageConfig("vit_tiny_patch16_224", img_size=64, overrides={"patch_size": 8})
        ImageConfig(name='vit_tiny_patch16_224', img_size=64, overrides={'patch_size': 8}, norm_eps=None)
    """

    REQUIRED: ClassVar = ("name", "img_size", "overrides")  # the keys of the first files

    name: str = "vit_base_patch32_224"
    img_size: int = 224
    overrides: dict[str, Any] = field(default_factory=dict)
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        weights = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
        if wrong := [name for name in weights if name in self.overrides]:
            raise ValueError(f"image.overrides cannot hold {wrong[0]!r}, which names weights: load them separately")


class ImageEncoder(Tower):
    """A timm ViT without classifier, from images to pooled features.

    Args:
        config: the architecture.
        patch_dropout: share of the patches that are dropped in training (FLIP, Li et al. 2023, section 3). They are
            removed before the blocks, which saves their computation.

    Raises:
        ValueError: If timm does not have the model, or it is not a vision transformer that takes these arguments.
    """

    def __init__(self, config: ImageConfig, patch_dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.vit = _create(config, patch_drop_rate=patch_dropout) if patch_dropout else _create(config)
        if config.norm_eps is not None:
            for module in self.vit.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = config.norm_eps
        for module in self.vit.modules():
            if getattr(module, "fused_attn", False):
                module.register_forward_pre_hook(_choose_attention)
        self.width: int = self.vit.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Compute pooled features (B, D) of normalized images (B, 3, S, S)."""
        return self.vit(images)

    @property
    def blocks(self) -> Any:
        """The blocks of the vision transformer; None where timm names its layers otherwise."""
        return getattr(self.vit, "blocks", None)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self._timm_depths()["above"] - 1

    def depths(self) -> dict[str, int]:
        """See `Tower.depths`; from timm's `group_matcher`, which counts a ViT's last norm as part of the last block."""
        depths = self._timm_depths()
        return {f"vit.{name}": depths[name] for name, _ in self.vit.named_parameters()}

    def _timm_depths(self) -> dict[str, int]:
        """Return the depths by timm's names, and as "above" the depth of all else, such as a classifier."""
        module: Any = SimpleNamespace(named_parameters=lambda: [*self.vit.named_parameters(), ("above", None)])
        return group_parameters(module, self.vit.group_matcher(), reverse=True)  # type: ignore[return-value]

    def train(self, mode: bool = True) -> Self:
        """See `Tower.train`."""
        super().train(mode)
        # The dropout of the stem has no parameters that would show that it is frozen.
        if self._frozen_below and hasattr(self.vit, "pos_drop"):
            self.vit.pos_drop.eval()
        return self

    @property
    def data_config(self) -> dict[str, Any]:
        """The model's preprocessing by timm: `mean`, `std`, `interpolation`."""
        data = resolve_model_data_config(self.vit)
        return {"mean": tuple(data["mean"]), "std": tuple(data["std"]), "interpolation": data["interpolation"]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for the backward pass, and recompute the rest."""
        self.vit.set_grad_checkpointing(enable)

    def load_pretrained(self, source: str | dict[str, Tensor] | None = None) -> None:
        """Load weights, with position embeddings resampled to `img_size`.

        Args:
            source: a local file of weights in timm's format, or the tensors by timm's names; absent, timm's weights for
                this model name.

        Raises:
            ValueError: If timm has no weights for the name, or the tensors do not fit.
        """
        known = self.vit.pretrained_cfg
        classes = known["num_classes"]
        weights: dict[str, Any] = {}
        if source:
            key, tensors = ("file", {}) if isinstance(source, str) else ("state_dict", source)
            if isinstance(source, str) and Path(source).is_file():
                tensors = timm.models.load_state_dict(source, weights_only=True)
            head = tensors.get(f"{known['classifier']}.weight")
            classes = 0 if head is None else len(head)
            # An empty "source" keeps timm from loading the weights that belong to a hub or folder name.
            weights = {"source": "", key: source, "num_classes": classes}
        # timm resamples position embeddings only while it builds a model, so a second one is built. It has the
        # classifier of the weights: otherwise timm loads without strictness, and tensors that do not fit stay random.
        state = _create(self.config, weights, num_classes=classes, pretrained=True).state_dict()
        self.vit.load_state_dict({name: state[name] for name in self.vit.state_dict()})


def _choose_attention(attention: Any, inputs: tuple[Any, ...]) -> None:
    """Set the implementation of a module of timm for its inputs: plain products for bf16 on a CPU, otherwise SDPA.

    This is a hook before the module's forward pass, so that a pass that is computed again chooses the same.
    """
    x: Tensor = inputs[0]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    # torch's fused kernel for CPUs is the slower one in bf16, above all in its backward pass.
    fused = x.device.type != "cpu" or dtype != torch.bfloat16
    if attention.fused_attn != fused:  # Without a change torch.compile has no side effect to trace.
        attention.fused_attn = fused


def _create(config: ImageConfig, weights: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Call `timm.create_model`, with errors that name what to change; `weights` overrides timm's `pretrained_cfg`."""
    name = config.name
    base = name.split(".")[0].removeprefix("hf-hub:")
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models("*vit*"), "`timm.list_models('vit*')` lists them")
        raise ValueError(f"timm does not know a model {name!r}: {hint}")
    try:
        vit = timm.create_model(
            name,
            img_size=config.img_size,
            pretrained_cfg_overlay=weights or None,
            **{"num_classes": 0, **config.overrides, **kwargs},
        )
    except TypeError as error:
        raise ValueError(f"{name!r} is not a vision transformer that takes these image arguments: {error}") from None
    except (RuntimeError, OSError, AssertionError) as error:
        given = {**kwargs, "weights": weights.get("file", "of a model")} if weights else kwargs
        raise ValueError(f"timm cannot build {name!r} (img_size {config.img_size}, {given or ''}): {error}") from None
    if not hasattr(vit, "patch_embed"):
        raise ValueError(f"{name!r} is not a vision transformer: it has no patch embedding")
    return vit
