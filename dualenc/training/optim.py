"""How much of a tower is trained, parameter groups, the learning-rate schedule."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dualenc.models.tower import Tower


@dataclass(frozen=True)
class Tuning:
    """How a tower is trained; its projection is no part of it.

    A layer's learning rate is that of the optimizer times lr_factor * layer_decay ** (layers + 1 - depth), where the
    depth is 0 for stem and embeddings, i for block i of `layers`, `layers` + 1 above them (ELECTRA, Clark et al. 2020;
    BEiT, Bao et al. 2022). Of a vision transformer timm counts the last norm to the last block.

    Attributes:
        locked: the whole tower is frozen (LiT, Zhai et al. 2022).
        frozen_layers: stem or embeddings and the first so many blocks are frozen; 0 for nothing. Frozen parts have no
            dropout; patch dropout stays, unless the tower is locked.
        lr_factor: of the tower.
        layer_decay: learning rate of a layer over that of the next one above.
    """

    locked: bool = False
    frozen_layers: int = 0
    lr_factor: float = 1.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.frozen_layers < 0:
            raise ValueError(f"frozen_layers {self.frozen_layers} of a tuning must be 0 or more")
        if not 0 < self.lr_factor < math.inf:
            raise ValueError(f"lr_factor {self.lr_factor} of a tuning must be positive; locked: true trains nothing")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay {self.layer_decay} of a tuning must lie in (0, 1]; 1 is none")
        if self.locked and (self.frozen_layers, self.lr_factor, self.layer_decay) != (0, 1.0, 1.0):
            raise ValueError("a tuning that is locked trains nothing of the tower: leave its other settings away")

    def freeze(self, tower: Tower, name: str) -> None:
        """Freezes what this says of a tower.

        Raises:
            ValueError: it has fewer blocks; called by the name.
        """
        if self.frozen_layers > tower.layers:
            raise ValueError(
                f"{name}.frozen_layers {self.frozen_layers}: the tower has {tower.layers} blocks; {name}.locked "
                "freezes all of it"
            )
        if self.locked or self.frozen_layers:
            tower.freeze(tower.layers + 2 if self.locked else self.frozen_layers + 1)


def parameter_groups(model: nn.Module, tunings: Mapping[str, Tuning] | None = None) -> list[dict[str, Any]]:
    """Groups for an optimizer: by weight decay, its own or none, and by `factor`, what its learning rate is times.

    Without decay are vectors and scalars (biases, norms, temperature), embeddings of words and positions, and what a
    submodule names in `no_weight_decay()`, as timm's models do. Frozen parameters are in no group. Factor 1 comes
    first, then the larger ones; of each, the group with decay.

    Args:
        model: whose parameters.
        tunings: of its towers, by their names in it.
    """
    spared = set()
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        if isinstance(module, nn.Embedding):
            spared.add(f"{start}weight")
        if callable(named := getattr(module, "no_weight_decay", None)):
            spared.update(f"{start}{name}" for name in cast(Iterable[str], named()))
    factors: dict[str, float] = {}
    for prefix, tuning in (tunings or {}).items():
        tower = cast(Tower, model.get_submodule(prefix))
        top = tower.layers + 1
        for name, depth in tower.depths().items():
            factors[f"{prefix}.{name}"] = tuning.lr_factor * tuning.layer_decay ** (top - depth)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name in spared
            groups.setdefault((factors.get(name, 1.0), plain), []).append(parameter)
    return [
        {"params": groups[factor, plain], "factor": factor, **({"weight_decay": 0.0} if plain else {})}
        # Always the same order: checkpoints hold the optimizer's state by position.
        for factor, plain in sorted(groups, key=lambda key: (key[0] != 1, -key[0], key[1]))
    ]


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine (Loshchilov and Hutter 2017) down to `final` times the learning rate.

    Args:
        optimizer: whose learning rates are the peaks.
        total_steps: of the whole run.
        warmup: share of the steps, if below 1; else their number.
        final: factor at the last step.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05, final: float = 0.0, last_epoch: int = -1
    ) -> None:
        if warmup < 0 or total_steps < 1:
            raise ValueError(f"warmup {warmup} must not be negative, total_steps {total_steps} must be at least 1")
        rising = max(1, round(warmup * total_steps if warmup < 1 else warmup))

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            done = min(1.0, (step - rising) / max(1, total_steps - rising))
            return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

        super().__init__(optimizer, factor, last_epoch)
