"""The base class of both towers: a depth for each parameter, frozen layers, and compiled blocks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Self, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.fx.experimental import _config as shapes

CAST_TOGETHER = 1 << 25  # largest number of weights that are converted at once: 128 MiB of gradients in fp32


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode without gradients, and restore its mode at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class _Cast(torch.autograd.Function):
    """Conversion of several tensors to one dtype, and of their gradients back, by one kernel each way."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, dtype = arguments  # Tensors are first, as the count of memory relies on.
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        out = [torch.empty_like(x, dtype=dtype) for x in tensors]
        torch._foreach_copy_(out, tensors)
        # Otherwise the backward pass would reach down to frozen weights.
        ctx.mark_non_differentiable(*(half for half, x in zip(out, ctx.needs_input_grad) if not x))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        known = [grad for grad in grads if grad is not None]
        out = [torch.empty_like(grad, dtype=ctx.dtype) for grad in known]
        torch._foreach_copy_(out, known)
        left = iter(out)
        return *(None if grad is None else next(left) for grad in grads), None


class WeightCast:
    """Conversion of the weights of all linear layers for autocast together, instead of each where it is used.

    Values and gradients are those of autocast. A GPU takes longer to launch the small kernels that convert one tensor
    than to run them, and a dual encoder has about 200 such tensors, forward and backward. Weights of FSDP2 are left to
    it. The gradients of weights that are converted together come together, so there are several groups: the all-reduce
    of one overlaps with the backward pass of the next.

    Args:
        model: module whose linear layers are converted.
    """

    def __init__(self, model: nn.Module) -> None:
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.groups: list[list[tuple[nn.Module, str]]] = []
        room = 0
        for module in linears:
            for name, weight in module.named_parameters(recurse=False):
                if weight.numel() > room:
                    self.groups.append([])
                    room = CAST_TOGETHER
                self.groups[-1].append((module, name))
                room -= weight.numel()

    @contextmanager
    def applied(self, device: str) -> Iterator[None]:
        """Convert the weights inside the block if autocast is enabled.

        Args:
            device: type of the device of the weights.
        """
        if not torch.is_autocast_enabled(device):
            yield
            return
        dtype = torch.get_autocast_dtype(device)
        try:
            for group in self.groups:
                weights = [cast(Tensor, module._parameters[name]) for module, name in group]
                if any(isinstance(weight, DTensor) or weight.dtype != torch.float32 for weight in weights):
                    continue  # Autocast converts what FSDP2 gathers, and leaves float64 alone.
                for (module, name), half in zip(group, _Cast.apply(*weights, dtype), strict=True):
                    module.__dict__[name] = half  # An attribute of the object itself is found before its parameter.
            yield
        finally:
            for module, name in (one for group in self.groups for one in group):
                module.__dict__.pop(name, None)


class Tower(nn.Module, ABC):
    """An encoder of a stem and blocks, whose lower part can be frozen."""

    _frozen_below = 0  # parameters of a smaller depth are frozen

    @property
    @abstractmethod
    def layers(self) -> int:
        """Number of blocks."""

    @abstractmethod
    def depths(self) -> dict[str, int]:
        """Return the depth of each parameter: 0 in the stem, i in block i from 1, `layers` + 1 above the blocks."""

    def freeze(self, below: int) -> None:
        """Freeze the parameters whose depth is less than `below`; `layers` + 2 freezes all.

        Frozen parameters get no gradient. Their modules stay in eval mode whatever `train` sets, without dropout and
        drop path. Patch dropout comes after the stem but belongs to the blocks: it stays active while any is trained.
        """
        self._frozen_below = below
        depths = self.depths()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(depths[name] >= below)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules except the frozen ones."""
        super().train(mode)
        for module in self.modules() if self._frozen_below else ():
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                for part in module.modules():
                    part.training = False
        return self


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks of all towers of a model by `torch.compile`, for training.

    Blocks of one tower share their compiled code, which serves all numbers of samples, tokens and positions. It is
    compiled by the first step. Names of parameters stay. Without gradients, as in evaluation, nothing is compiled.

    Args:
        model: model, changed in place.
        backend: see `torch.compile`.

    Raises:
        ValueError: If a tower has no blocks, as some models of timm.
    """
    # Otherwise dimensions that are equal in the first batch share one symbol, and another batch needs a second code,
    # which fits the first batch too. A checkpoint that computes a block again could then take the other one.
    shapes.use_duck_shape = False
    for tower in model.modules():
        if not isinstance(tower, Tower):
            continue
        blocks = getattr(tower, "blocks", None)
        if blocks is None:
            raise ValueError("model.compile needs towers of plain blocks, which this one lacks: set it to false")
        for block in blocks:
            for part in block.modules():
                if isinstance(part, DropPath):
                    part.forward = MethodType(_drop_path, part)  # type: ignore[method-assign]
            # Not `block.compile()`, which would compile the hooks of FSDP2 with it.
            block.forward = _InTraining(block.forward, torch.compile(block.forward, dynamic=True, backend=backend))


class _InTraining:
    """A forward method that is compiled where gradients are computed."""

    def __init__(self, plain: Any, compiled: Any) -> None:
        self.plain, self.compiled = plain, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.plain)(*args, **kwargs)


def _drop_path(self: DropPath, x: Tensor) -> Tensor:
    """Drop samples as timm does, by code that does not depend on the rate, which each block has for itself."""
    if not self.training or not self.drop_prob:
        return x
    keep = 1 - self.drop_prob
    kept = (torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) < keep).to(x.dtype)
    return x * (kept / keep if self.scale_by_keep else kept)
