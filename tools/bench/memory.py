"""Memory of a training step by model, micro-batch and precision, counted on tensors without content."""

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


class PeakMemory(TorchDispatchMode):
    """Counter of the bytes of all tensors made within the mode; a storage counts once.

    Attributes:
        now: bytes of the tensors that are alive.
        peak: largest value of `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # storage -> its bytes
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, storage: int) -> None:
        self.now -= self.alive.pop(storage)


def memory(
    image: str = "vit_base_patch32_clip_224",
    img_size: int = 224,
    layers: int = 12,
    width: int = 512,
    embed_dim: int = 512,
    tokens: int = 20,
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed",
) -> None:
    """Print the memory of a step with AdamW: of the parameters, and per pair of a micro-batch and of a rank's batch.

    Args:
        image: timm's name of the image tower.
        img_size: side of the image in pixels.
        layers: layers of the text tower.
        width: width of the text tower.
        embed_dim: width of the embeddings, E.
        tokens: tokens of a caption.
        precision: precision of the trainer.
    """
    text = TextConfig(layers=layers, width=width, heads=width // 64, norm="pre", pool="mean")
    model = DualEncoder(ImageConfig(image, img_size), text, embed_dim)
    number, found = sum(p.numel() for p in model.parameters()), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        # The difference of two batch sizes leaves out memory that does not depend on the batch, such as gradients.
        found.append((_step(model, tokens, precision, 24) - _step(model, tokens, precision, 8)) / 16)
    # An image in uint8, and two embeddings in fp32, each four times: by micro-batch, concatenated, and both gradients.
    kept = 3 * img_size**2 + 2 * 4 * 4 * embed_dim
    print(f"{image} at {img_size} pixels, text tower of {layers} layers of width {width}, {tokens} tokens, {precision}")
    print(f"parameters, gradients, AdamW's state: {16 * number / 1e9:.2f} GB ({number / 1e6:.0f} M parameters)")
    print(f"per pair of a micro-batch:  {found[0] / 1e6:.1f} MB; with grad_checkpointing {found[1] / 1e6:.1f} MB")
    print(f"per pair of a rank's batch: {kept / 1e6:.3f} MB (the image in bytes; embeddings, gradients, the loss)")


def _step(model: DualEncoder, tokens: int, precision: str, pairs: int) -> int:
    """Return the peak memory of forward and backward in bytes, without parameters and inputs."""
    img_size, text = model.config.image.img_size, Tokens.pack([[1] * tokens] * pairs)
    state = model.state_dict()
    with FakeTensorMode() as fake:
        weights = {name: fake.from_tensor(x) for name, x in state.items()}
        for x in weights.values():
            x.requires_grad_()
        pictures = torch.empty(pairs, 3, img_size, img_size)
        text = Tokens(*(fake.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in text))
        mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
        # The parameters stay replaced in backward too: with checkpointing it calls the blocks again.
        with _reparametrize_module(model, weights), PeakMemory() as counter:
            with mixed:
                out = model(pictures, text)
            (out.image.sum() + out.text.sum()).backward()
    return counter.peak
