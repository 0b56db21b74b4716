"""An exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class EMA(Callback):
    """Averages the weights over the steps: average = d * average + (1 - d) * weights, after each step.

    At step t, d is min(decay, (1 + t) / (10 + t)), so that the random first weights are soon forgotten (as in
    TensorFlow's ExponentialMovingAverage with `num_updates`). Steps that are skipped leave the average alone. It is
    part of the checkpoints.

    Args:
        decay: of long runs; the average goes back over some 1 / (1 - decay) steps.
        evaluate: validation, prediction, evaluation sets, `best/` and `last/` take the average; otherwise the weights
            as trained.
    """

    def __init__(self, decay: float = 0.9999, evaluate: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} of EMA must lie in [0, 1)")
        self.decay, self.evaluate = decay, evaluate
        self.average: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # while the average stands in their place

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins with the weights as they are, or with the average of a checkpoint."""
        self._begin(pl_module)

    @torch.no_grad()
    def _begin(self, module: LightningModule) -> None:
        for name, weight in module.named_parameters():
            if name not in self.average:
                # In half precision a small change would be none.
                self.average[name] = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for name, whole in self._loaded.items():
            mine = self.average[name]
            whole = whole.to(mine.device)
            if isinstance(mine, DTensor):
                whole = distribute_tensor(whole, mine.device_mesh, mine.placements)
            mine.copy_(whole)
        self._loaded = {}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes in the weights after a step."""
        step = trainer.global_step
        new = 1 - min(self.decay, (1 + step) / (10 + step))
        skipped = getattr(pl_module, "skip", None)
        pairs = [(_local(self.average[name]), _local(weight)) for name, weight in pl_module.named_parameters()]
        average = [pair[0] for pair in pairs]
        weights = [weight.to(old.dtype) for old, weight in pairs]
        # Zero for a skipped step, which the host need not know of.
        share = torch.tensor(new, dtype=torch.float64) if skipped is None else (~skipped).double() * new
        torch._foreach_lerp_(average, weights, [share.to(old.dtype) for old in average])

    @contextmanager
    def applied(self, module: LightningModule) -> Iterator[None]:
        """The average in place of the weights."""
        self._apply(module)
        try:
            yield
        finally:
            self._restore(module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `evaluate`."""
        if self.evaluate:
            self._begin(pl_module)
            self._apply(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `evaluate`."""
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
        """The average, whole on every rank."""
        whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in self.average.items()}
        return {"average": whole or self._loaded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The average is taken up when the model is where it computes."""
        self._loaded = state_dict["average"]


def _local(x: Tensor) -> Tensor:
    """This rank's part."""
    return x.to_local() if isinstance(x, DTensor) else x.detach()


@contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """The weights that a run shows to others: the average, where there is one for that."""
    own = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    if own and own[0].evaluate and own[0].average and not own[0]._weights:
        with own[0].applied(trainer.lightning_module):
            yield
    else:
        yield
