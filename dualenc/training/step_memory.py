"""Memory of a training step on a GPU, counted on tensors without content: no GPU is needed.

The step is the task's own: its forward pass runs on fake tensors of device "cuda", so that it takes the kernels that a
GPU would take. Torch's engine refuses the backward pass of a device that does not exist. So `_backward` calls the
functions of the graph itself, in the order of the engine, and frees what they have saved, as the engine does.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dualenc.data import images
from dualenc.training.task import Task

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # by `trainer.precision`; others compute in fp32
ROUND = 512  # bytes to whose multiples torch's allocator rounds a tensor on a GPU


class PeakMemory(TorchDispatchMode):
    """Counter of the bytes on a device of all tensors made within the mode; a storage counts once.

    Args:
        device: type of the device.

    Attributes:
        now: bytes of the tensors that are alive.
        peak: largest value of `now` so far.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = device
        self.alive: dict[int, int] = {}  # storage -> its bytes
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) and x.device.type == self.device else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive[storage._cdata] = -(-storage.nbytes() // ROUND) * ROUND
                self.now += self.alive[storage._cdata]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, storage: int) -> None:
        self.now -= self.alive.pop(storage)


class StepMemory(NamedTuple):
    """Memory of a training step in bytes, next to that of weights, gradients of the step before and optimizer state."""

    inputs: int  # the batch
    forward: int  # peak of the forward pass, with the batch
    backward: int  # peak of the backward pass, with the batch and the new gradients


class OptimizerMemory(NamedTuple):
    """Memory of an optimizer in bytes."""

    state: int
    workspace: int  # peak of a step beyond weights, gradients and state


def step_memory(task: Task, batch: Any, precision: str) -> StepMemory:
    """Return the memory of `training_step` and its backward pass on one GPU.

    Args:
        task: task whose parameters may be on any device, "meta" too.
        batch: what `training_step` takes; the contents of its tensors are not read.
        precision: precision of the trainer.
    """
    task.train()
    with fake_gpu() as memory, _fake_parameters(task):
        weights = memory.now
        given = tree_map(_on_gpu, batch)
        inputs = memory.now - weights
        dtype = AUTOCAST.get(precision, torch.bfloat16)
        with torch.autocast("cuda", dtype, enabled=precision in AUTOCAST):
            losses = [task.training_step(given, 0)]
        forward, memory.peak = memory.peak - weights, 0
        _backward(losses)
        task._batch = None  # which keeps the embeddings
        return StepMemory(inputs, forward, memory.peak - weights)


def optimizer_memory(task: Task) -> OptimizerMemory:
    """Return the memory of a task's optimizer on one GPU."""
    with fake_gpu() as memory, _fake_parameters(task):
        weights = memory.now
        optimizer = task.configure_optimizers()["optimizer"]  # Some optimizers make their state here.
        before = memory.now
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            parameter.grad = torch.empty_like(parameter)
        gradients = memory.now - before
        optimizer.step()
        state = memory.now - weights - gradients
        memory.peak = memory.now
        optimizer.step()  # The first step has made the state.
        return OptimizerMemory(state, memory.peak - memory.now)


@contextmanager
def fake_gpu() -> Iterator[PeakMemory]:
    """Make all tensors inside the block fake, with a Hopper GPU for those of device "cuda", and count their memory."""
    with (
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        # Checkpointing keeps what it has computed again until the end of a call of the engine, which has this number.
        patch.object(torch._C, "_current_graph_task_id", lambda: 1),
        # The cache would keep fake tensors.
        patch.object(images, "_channels", images._channels.__wrapped__),
        FakeTensorMode(),
        PeakMemory() as memory,
        _GPUAttention(),
    ):
        yield memory


class _GPUAttention(TorchFunctionMode):
    """Mode in which attention takes the kernels of a GPU, which torch looks for on the real device only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_attention if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute F.scaled_dot_product_attention by the flash kernel, or with a mask or in fp32 by the efficient one."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        mask = torch.zeros_like(attn_mask, dtype=q.dtype) if attn_mask.dtype == torch.bool else attn_mask
        attn_mask = mask.expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def _fake_parameters(task: nn.Module) -> Iterator[None]:
    """Replace parameters and buffers by fake ones of a GPU inside the block."""
    tensors = dict(task.named_parameters()) | dict(task.named_buffers())
    made = {
        name: torch.empty(x.shape, dtype=x.dtype, device="cuda", requires_grad=x.requires_grad)
        for name, x in tensors.items()
    }
    # They stay replaced in the backward pass too, in which checkpointing calls the blocks again.
    with _reparametrize_module(task, made):
        yield


def _on_gpu(x: Any) -> Any:
    """Return a fake tensor of a GPU like a tensor of the host; anything else unchanged."""
    return torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x


@torch.no_grad()
def _backward(losses: list[Any]) -> None:
    """Backpropagate a loss, and leave the gradients in `grad` of the parameters.

    Args:
        losses: the loss alone, taken out of the list: whoever keeps the loss keeps the graph and all it has saved.
    """
    loss = losses.pop()
    root: Any = loss.grad_fn
    waiting = _consumers(root)
    given: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready = [root]
    del root, loss
    while ready:
        # The engine takes the function that the forward pass called last.
        node = ready.pop(max(range(len(ready)), key=lambda i: ready[i]._sequence_nr()))
        out = _call(node, given.pop(node, {}))
        edges = node.next_functions
        del node  # The next function runs without what this one has saved.
        for i, (after, number) in enumerate(edges):
            if after is None:
                continue
            grad, out[i] = out[i], None
            if grad is not None:
                grad, own = _fitting(grad, after._input_metadata[number]), given.setdefault(after, {})
                own[number] = own[number] + grad if number in own else grad
            del grad
            waiting[after] -= 1
            if not waiting[after]:
                del waiting[after]
                ready.append(after)
        after = edges = None


def _call(node: Any, given: dict[int, Tensor]) -> list[Tensor | None]:
    """Return the gradients of the inputs of a function, given those of its outputs by their numbers.

    Functions of Python return a gradient for other arguments too: those must come after the tensors.
    """
    if not given:
        return [None] * len(node.next_functions)
    grads = [given.pop(i, None) for i in range(len(node._input_metadata))]
    if hasattr(node, "variable"):
        node.variable.grad = grads[0] if node.variable.grad is None else node.variable.grad + grads[0]
        return []
    function: Callable[..., Any] = getattr(node, "apply", node)
    out = function(*grads)
    return list(out) if isinstance(out, tuple) else [out]


def _consumers(root: Any) -> dict[Any, int]:
    """Return the number of functions that give a gradient to each function of a graph."""
    counts: dict[Any, int] = {}
    left, seen = [root], {root}
    while left:
        for after, _ in left.pop().next_functions:
            if after is not None:
                counts[after] = counts.get(after, 0) + 1
                if after not in seen:
                    seen.add(after)
                    left.append(after)
    return counts


def _fitting(grad: Tensor, like: Any) -> Tensor:
    """Return a gradient in the shape and dtype of what it belongs to: the engine undoes broadcasting."""
    grad = grad if grad.shape == like.shape else grad.sum_to_size(like.shape)
    return grad if grad.dtype == like.dtype else grad.to(like.dtype)
