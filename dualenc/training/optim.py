"""Settings of the optimizer: frozen layers, a learning rate for each layer, parameter groups, and the schedule."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dualenc.models.tower import Tower


@dataclass(frozen=True)
class Tuning:
    """Frozen layers and learning rates of a tower. The projection after the tower is not part of the tower.

    A layer's learning rate is the optimizer's times lr_factor * layer_decay ** (layers + 1 - depth). The depth is 0 for
    stem and embeddings, i for block i of `layers`, and `layers` + 1 for what follows the blocks (ELECTRA, Clark et al.
    2020; BEiT, Bao et al. 2022). As in timm, the last norm of a vision transformer belongs to its last block.

    Attributes:
        locked: freeze the whole tower (LiT, Zhai et al. 2022).
        frozen_layers: number of frozen blocks, counted from the first; the stem or embeddings before them are frozen
            too. 0 freezes nothing. Frozen parts have no dropout. Patch dropout stays, unless the tower is locked.
        lr_factor: factor of the tower's learning rate.
        layer_decay: learning rate of a layer divided by that of the layer above.
    """

    locked: bool = False
    frozen_layers: int = 0
    lr_factor: float = 1.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.frozen_layers < 0:
            raise ValueError(f"frozen_layers {self.frozen_layers} of a tuning must be 0 or more")
        if not 0 < self.lr_factor < math.inf:
            raise ValueError(f"lr_factor {self.lr_factor} of a tuning must be positive; locked: true freezes the tower")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay {self.layer_decay} of a tuning must lie in (0, 1]; 1 for no decay")
        if self.locked and (self.frozen_layers, self.lr_factor, self.layer_decay) != (0, 1.0, 1.0):
            raise ValueError("a tuning with locked: true trains nothing of the tower: remove its other settings")

    def freeze(self, tower: Tower, name: str) -> None:
        """Freeze the layers of a tower that `locked` and `frozen_layers` name.

        Args:
            tower: tower to freeze, changed in place.
            name: key of these settings, for the message of the error.

        Raises:
            ValueError: If the tower has fewer blocks than `frozen_layers`.
        """
        if self.frozen_layers > tower.layers:
            raise ValueError(
                f"{name}.frozen_layers {self.frozen_layers}: the tower has {tower.layers} blocks: lower it, or "
                f"set {name}.locked to freeze the whole tower"
            )
        # Depth 0 is the stem, so frozen blocks 1 to n mean all depths below n + 1, and `layers` + 2 means everything.
        if self.locked or self.frozen_layers:
            tower.freeze(tower.layers + 2 if self.locked else self.frozen_layers + 1)


def parameter_groups(model: nn.Module, tunings: Mapping[str, Tuning] | None = None) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: one for each learning-rate factor, with and without weight decay.

    Vectors and scalars (biases, norms, temperature), token and position embeddings, and parameters that a submodule
    names in `no_weight_decay()`, as timm's models do, have no weight decay. Frozen parameters are in no group. The
    groups of factor 1 come first, then those of the other factors, largest first; of one factor, the group with decay
    comes first.

    Args:
        model: module whose parameters are grouped.
        tunings: settings of the towers, by their names in the model.

    Returns:
        Groups with the keys "params" and "factor"; those without decay set "weight_decay" to 0.
    """
    without_decay = set()
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""  # The model itself has an empty prefix.
        if isinstance(module, nn.Embedding):
            without_decay.add(f"{start}weight")
        if callable(named := getattr(module, "no_weight_decay", None)):
            without_decay.update(f"{start}{name}" for name in cast(Iterable[str], named()))
    factors: dict[str, float] = {}
    for prefix, tuning in (tunings or {}).items():
        tower = cast(Tower, model.get_submodule(prefix))
        top = tower.layers + 1
        for name, depth in tower.depths().items():
            factors[f"{prefix}.{name}"] = tuning.lr_factor * tuning.layer_decay ** (top - depth)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.ndim < 2 or name in without_decay
            groups.setdefault((factors.get(name, 1.0), no_decay), []).append(parameter)
    return [
        {"params": groups[factor, no_decay], "factor": factor, **({"weight_decay": 0.0} if no_decay else {})}
        # The order must not change: checkpoints hold the optimizer's state by position.
        for factor, no_decay in sorted(groups, key=lambda key: (key[0] != 1, -key[0], key[1]))
    ]


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], value: float | None, algorithm: str | None, scale: Tensor | None = None
) -> Tensor:
    """Clip gradients in place and return their norm before that, (); all ranks get the norm of the whole gradient.

    Args:
        parameters: parameters; those without a gradient are ignored.
        value: largest norm, or largest absolute value of an element; None or 0 clips nothing.
        algorithm: "norm" or "value"; None for "norm".
        scale: (), factor by which a gradient scaler has multiplied the gradients, which stay scaled; None for none.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    norm = norm if scale is None else norm / scale.to(norm.device)
    own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    if value and algorithm == "value":
        bound = norm.new_full((), value) * (1.0 if scale is None else scale.to(norm.device))
        for gradient in own:
            gradient.clamp_(-bound, bound)
    elif value:
        torch._foreach_mul_(own, (value / (norm + 1e-6)).clamp(max=1.0))  # as torch.nn.utils.clip_grad_norm_ does
    return norm


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine (Loshchilov and Hutter 2017) down to `final` times the learning rate.

    The learning rate is a function of the step and of these settings. A resumed run uses its own settings; of the steps
    of the whole run, the number that the checkpoint has, if it was planned for as many as this run.

    Args:
        optimizer: optimizer whose learning rates are the peaks.
        total_steps: number of steps of the whole run.
        warmup: number of warm-up steps, or their share of all steps if below 1.
        final: learning rate at the last step as a share of the peak.
        last_epoch: see `torch.optim.lr_scheduler.LRScheduler`.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05, final: float = 0.0, last_epoch: int = -1
    ) -> None:
        if warmup < 0 or total_steps < 1:
            raise ValueError(f"warmup {warmup} must not be negative, total_steps {total_steps} must be at least 1")
        self.total_steps = self.planned_steps = total_steps
        self.warmup, self.final = warmup, final
        super().__init__(optimizer, self.factor, last_epoch)

    def factor(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, as a share of the peak."""
        warmup_steps = max(1, round(self.warmup * self.total_steps if self.warmup < 1 else self.warmup))
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, self.total_steps - warmup_steps))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2

    def set_total_steps(self, total_steps: int) -> None:
        """Set the number of steps of the whole run, from the current step on."""
        self.total_steps = total_steps
        self._set_rates()

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the number of steps of the whole run."""
        names = ("last_epoch", "_step_count", "total_steps", "planned_steps")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` has returned; peaks, `warmup` and `final` stay those of this object."""
        # Older versions did not save the number of steps.
        same = state_dict.get("planned_steps") == self.planned_steps
        names = ("last_epoch", "_step_count", *(("total_steps",) if same else ()))
        LRScheduler.load_state_dict(self, {name: state_dict[name] for name in names})
        self._set_rates()

    def _set_rates(self) -> None:
        rates = [peak * self.factor(self.last_epoch) for peak in self.base_lrs]
        LRScheduler.load_state_dict(self, {"_last_lr": rates})
        for group, peak, rate in zip(self.optimizer.param_groups, self.base_lrs, self._last_lr, strict=True):
            group["initial_lr"] = peak
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
