"""What a training step holds, by model, micro-batch and precision: counted on tensors without content."""

import weakref
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch._subclasses import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dualenc.models import DualEncoder, ImageConfig, TextConfig
from dualenc.tokens import Tokens


class Live(TorchDispatchMode):
    """Bytes of all tensors made within it that live at one time, at their most; a storage counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, which: int) -> None:
        self.now -= self.held.pop(which)


def memory(
    image: str = "vit_base_patch32_clip_224",
    img_size: int = 224,
    layers: int = 12,
    width: int = 512,
    embed_dim: int = 512,
    tokens: int = 20,
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed",
) -> None:
    """Memory of a step with AdamW in GB, of parameters, and for each pair of a micro-batch and of a batch.

    Args:
        image: timm name of the image tower.
        img_size: in pixels.
        layers: of the text tower.
        width: of the text tower.
        embed_dim: E.
        tokens: of a caption.
        precision: of the trainer.
    """
    text = TextConfig(layers=layers, width=width, heads=width // 64, norm="pre", pool="mean")
    model = DualEncoder(ImageConfig(image, img_size), text, embed_dim)
    number, found = sum(p.numel() for p in model.parameters()), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        # What does not grow with the batch, such as gradients, is in both.
        found.append((_step(model, tokens, precision, 24) - _step(model, tokens, precision, 8)) / 16)
    kept = 3 * img_size**2 + 2 * 4 * 4 * embed_dim  # two embeddings: in pieces, in one, and a gradient of each
    print(f"{image} at {img_size} pixels, text tower of {layers} layers of width {width}, {tokens} tokens, {precision}")
    print(f"parameters, gradients, AdamW's state: {16 * number / 1e9:.2f} GB ({number / 1e6:.0f} M parameters)")
    print(f"for each pair of a micro-batch:  {found[0] / 1e6:.1f} MB; with grad_checkpointing {found[1] / 1e6:.1f} MB")
    print(
        f"for each pair of a rank's batch: {kept / 1e6:.3f} MB (the picture in bytes; embeddings, gradients, the loss)"
    )


def _step(model: DualEncoder, tokens: int, precision: str, pairs: int) -> int:
    """Bytes at the most of forward and backward, beyond parameters and inputs."""
    img_size, text = model.config.image.img_size, Tokens.pack([[1] * tokens] * pairs)
    state = model.state_dict()
    with FakeTensorMode() as fake:
        weights = {name: fake.from_tensor(x) for name, x in state.items()}
        for x in weights.values():
            x.requires_grad_()
        pictures = torch.empty(pairs, 3, img_size, img_size)
        text = Tokens(*(fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in text))
        mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
        with _reparametrize_module(model, weights), Live() as live:  # in backward too, which calls blocks again
            with mixed:
                out = model(pictures, text)
            (out.image.sum() + out.text.sum()).backward()
    return live.most
