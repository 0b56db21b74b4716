"""An exponential moving average of the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

PART = 1 << 24  # weights that are averaged at a time, whose differences take 64 MiB


class EMA(Callback):
    """Exponential moving average of the weights: average = d * average + (1 - d) * weights, after each step.

    At step t, d is min(decay, (1 + t) / (10 + t)), so that the random initial weights are soon forgotten (as in
    TensorFlow's ExponentialMovingAverage with `num_updates`). Skipped steps do not change the average. Checkpoints
    contain it.

    Args:
        decay: decay late in a run; the average covers about the last 1 / (1 - decay) steps.
        evaluate: use the average in validation, prediction, evaluation sets, `best/` and `last/`; otherwise they use
            the trained weights.
    """

    def __init__(self, decay: float = 0.9999, evaluate: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} of EMA must lie in [0, 1)")
        self.decay, self.evaluate = decay, evaluate
        self.average: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}  # from a checkpoint, until the model is on its device
        self._pairs: list[tuple[Tensor, Tensor]] = []  # averages and weights, since their names take long to look up
        self._weights: dict[str, Tensor] = {}  # copy of the trained weights while the average is in the model

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the average from the current weights, or from a checkpoint's average."""
        self._initialize(pl_module)

    @torch.no_grad()
    def _initialize(self, module: LightningModule) -> None:
        for name, weight in module.named_parameters():
            if name not in self.average:
                # In half precision small changes would be rounded away.
                self.average[name] = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for name, whole in self._loaded.items():
            average = self.average[name]
            whole = whole.to(average.device)
            if isinstance(average, DTensor):
                whole = distribute_tensor(whole, average.device_mesh, average.placements)
            average.copy_(whole)
        self._loaded = {}
        self._pairs = [(self.average[name], weight) for name, weight in module.named_parameters()]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average with the weights after a step."""
        step = trainer.global_step
        new = 1 - min(self.decay, (1 + step) / (10 + step))
        skipped = getattr(pl_module, "skip", None)
        averages = [_local(average) for average, _ in self._pairs]
        weights = [_local(weight).to(average.dtype) for average, weight in self._pairs]
        # A skipped step has the factor 0, computed on the device: the host need not wait to know whether it was.
        factor: Any = new if skipped is None else ((~skipped).double() * new).to(averages[0].dtype)
        for part in _parts(averages):
            # One kernel for many tensors each. torch._foreach_lerp_ would take one kernel for each tensor, since the
            # factor is a tensor on the device and does not have the shape of the weights.
            changes = torch._foreach_sub(weights[part], averages[part])
            torch._foreach_mul_(changes, factor if skipped is None else factor.to(changes[0].dtype))
            torch._foreach_add_(averages[part], changes)

    @property
    def has_average(self) -> bool:
        """True if training has begun, or a checkpoint has been loaded."""
        return bool(self.average or self._loaded)

    @contextmanager
    def applied(self, module: LightningModule) -> Iterator[None]:
        """Use the average in place of the trained weights inside the block."""
        self._initialize(module)
        self._apply(module)
        try:
            yield
        finally:
            self._restore(module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the model if `evaluate` says so."""
        if self.evaluate:
            self._initialize(pl_module)
            self._apply(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the trained weights."""
        self._restore(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @torch.no_grad()
    def _apply(self, module: LightningModule) -> None:
        if not self._weights:
            self._weights = {name: weight.detach().clone() for name, weight in module.named_parameters()}
            for name, weight in module.named_parameters():
                _local(weight).copy_(_local(self.average[name]))

    @torch.no_grad()
    def _restore(self, module: LightningModule) -> None:
        for name, weight in module.named_parameters() if self._weights else ():
            _local(weight).copy_(_local(self._weights[name]))
        self._weights = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the average, unsharded on every rank."""
        whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in self.average.items()}
        return {"average": whole or self._loaded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the average of a checkpoint until training starts, when the model is on its device."""
        self._loaded = state_dict["average"]


def _local(x: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x.detach()


def _parts(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Yield the slices of a list that have about `PART` elements each, or one tensor."""
    start, size = 0, 0
    for i, tensor in enumerate(tensors):
        if size and size + tensor.numel() > PART:
            yield slice(start, i)
            start, size = i, 0
        size += tensor.numel()
    yield slice(start, len(tensors))


@contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """Use the averaged weights inside the block if the run has an `EMA` with `evaluate`; else the trained weights."""
    own = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    if own and own[0].evaluate and own[0].has_average and not own[0]._weights:
        with own[0].applied(trainer.lightning_module):
            yield
    else:
        yield
