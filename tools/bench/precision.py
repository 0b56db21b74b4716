"""Precision of the losses' gradients compared with float64 at the largest scale, ours and open_clip's."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dualenc.losses import clip_loss, siglip_loss

# Kind of embeddings -> length of the noise that makes a text from its image; None for unrelated texts.
KINDS = {"unrelated": None, "told apart": 1.4, "near duplicates": 0.1}


def precision(batch: int = 2048, dim: int = 512, draws: int = 5) -> None:
    """Print the relative error of the embeddings' gradients at scale 100, the median and the largest of some draws.

    Args:
        batch: pairs in the batch, B.
        dim: width of the embeddings, E.
        draws: draws of embeddings.
    """
    from open_clip.loss import ClipLoss, SigLipLoss

    losses: dict[str, dict[str, Callable[..., Tensor]]] = {
        "clip": {"dualenc": clip_loss, "open_clip": ClipLoss()},
        "siglip": {"dualenc": siglip_loss, "open_clip": SigLipLoss()},
    }
    print("| embeddings | loss | precision | dualenc | open_clip |\n|---|---|---|---|---|")
    for kind in KINDS:
        for name, sides in losses.items():
            for mixed in (False, True):
                found: dict[str, list[float]] = {side: [] for side in sides}
                for draw in range(draws):
                    torch.manual_seed(draw)
                    inputs = [*embeddings(kind, batch, dim), torch.tensor([100.0]), torch.tensor([-10.0])]
                    for side, loss in sides.items():
                        found[side].append(error(loss, EXACT[name], inputs, mixed))
                shown = (f"{median(x):.1e} ({max(x):.1e})" for x in found.values())
                print(f"| {kind} | {name} | {'bf16-mixed' if mixed else '32-true'} | {' | '.join(shown)} |")


class RoundedOperands(TorchDispatchMode):
    """A mode that rounds the operands of fp32 matrix products, as a device does that multiplies in fewer bits.

    Args:
        rounded: function that rounds a tensor.
    """

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rounded, self.products = rounded, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_) and args[-1].dtype == torch.float32:
            self.products += 1
            args = *args[:-2], *(self.rounded(x) for x in args[-2:])
        return func(*args, **(kwargs or {}))


def to_tf32(x: Tensor) -> Tensor:
    """Round to the nearest number with the 10 bits of TF32's mantissa, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "fp32": lambda x: x,
    "TF32": to_tf32,
    "bf16": lambda x: x.bfloat16().float(),
}


def rounding(batch: int = 1024, dim: int = 512, draws: int = 5) -> None:
    """Print the relative error of the embeddings' gradients at scale 100 if products took operands of fewer bits.

    The median and the largest of some draws; sums are in fp32, as on a GPU.

    Args:
        batch: pairs in the batch, B.
        dim: width of the embeddings, E.
        draws: draws of embeddings.
    """
    print(f"| embeddings | loss | {' | '.join(ROUNDED)} |\n|---|---|{'---|' * len(ROUNDED)}")
    for kind in KINDS:
        for name, loss in {"clip": clip_loss, "siglip": siglip_loss}.items():
            shown = []
            for rounded in ROUNDED.values():
                found = []
                for draw in range(draws):
                    torch.manual_seed(draw)
                    inputs = [*embeddings(kind, batch, dim), torch.tensor([100.0]), torch.tensor([-10.0])]
                    with RoundedOperands(rounded) as mode:
                        found.append(error(loss, EXACT[name], inputs))
                    assert mode.products >= 3
                shown.append(f"{median(found):.1e} ({max(found):.1e})")
            print(f"| {kind} | {name} | {' | '.join(shown)} |", flush=True)


def embeddings(kind: str, count: int, dim: int) -> tuple[Tensor, Tensor]:
    """Draw pairs of embeddings (B, E) in fp32.

    Args:
        kind: "unrelated"; "told apart", each text nearest to its image; or "near duplicates", each pair among seven
            others that are nearly the same.
        count: B.
        dim: E.
    """
    image, distance = torch.randn(count, dim), KINDS[kind]
    if kind == "near duplicates":
        image = torch.randn(count // 8, dim).repeat(8, 1) + 0.1 * torch.randn(count, dim)
    image = F.normalize(image, dim=1)
    if distance is None:
        return image, F.normalize(torch.randn(count, dim), dim=1)
    return image, F.normalize(image + distance * torch.randn(count, dim) / dim**0.5, dim=1)


def error(
    loss: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor], mixed: bool = False
) -> float:
    """Compute the relative error in norm of the gradients of image and text, and return the larger.

    Args:
        loss: the loss to test.
        exact: definition of the loss, which is computed in float64.
        inputs: embeddings of images and texts (B, E), scale and bias.
        mixed: True to compute the loss under autocast to bf16.
    """

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> Any:
        own = [x.to(dtype).requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed and dtype == torch.float32):
            value = function(*own)
        return torch.autograd.grad(value, own[:2])

    pairs = zip(gradients(loss, torch.float32), gradients(exact, torch.float64))
    return max(float((x.double() - y).norm() / y.norm()) for x, y in pairs)


def _clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute CLIP's loss without log softmax, which has no correct digits if the loss is near float64's rounding."""
    logits = scale * image @ text.T
    own = logits.diagonal()
    others = logits.masked_fill(torch.eye(len(image), dtype=torch.bool), -torch.inf)
    return (F.softplus(others.logsumexp(0) - own).mean() + F.softplus(others.logsumexp(1) - own).mean()) / 2


def _siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum() / len(image)


EXACT = {"clip": _clip, "siglip": _siglip}
