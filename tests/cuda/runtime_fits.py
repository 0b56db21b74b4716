"""Runs of `dualenc fit` over the CUDA runtime without a device, in a process of their own.

`python runtime_fits.py OUT NAME=ARGUMENTS...`, where ARGUMENTS are JSON, runs the command once for each name, and
writes to OUT, as JSON, what each step asked of the runtime.
"""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

import dualenc.training.contrastive as contrastive
import dualenc.training.run_directory as run_directory
from dualenc.cli import main
from dualenc.training.metrics import PairEmbeddings
from tools import runtime

STEPS: list[dict[str, Any]] = []


class Record(Callback):
    """Callback that keeps what each step asked of the runtime: from the end of the step before to its own end."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        runtime.clear()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        asked = runtime.asked()
        STEPS.append({**dataclasses.asdict(asked), "launches": asked.launches})
        runtime.clear()


class Item(Callback):
    """Callback that reads a number from the device in each step, as careless code does."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        next(module.parameters()).grad.norm().item()


def objects_over_gloo() -> None:
    """Send objects over gloo: torch packs them by kernels on the device, which do nothing here."""

    group = functools.cache(lambda: dist.new_group(backend="gloo"))

    def over_gloo(function: Any) -> Any:
        def call(*args: Any, device: Any = None, **options: Any) -> Any:
            return function(*args, **{**options, "group": group()})

        return call

    for name in ("broadcast_object_list", "all_gather_object"):
        replaced = over_gloo(getattr(dist, name))
        setattr(dist, name, replaced)
        setattr(dist.distributed_c10d, name, replaced)


def values_from_the_host() -> None:
    """Compute the values that a run depends on from host copies, because the kernels compute nothing."""
    check, ranked = run_directory.check_finite, contrastive.retrieval_metrics

    def check_finite(weights: dict[str, Any]) -> None:
        check({name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in weights.items()})

    def compute(self: PairEmbeddings) -> tuple[torch.Tensor, ...]:
        states = [torch.cat([part.cpu() for part in x]) for x in (self.rows, self.image, self.text, self.ids)]
        order = torch.argsort(states[0])
        return tuple(x[order].to(self.device) for x in states)

    def retrieval_metrics(image: torch.Tensor, text: torch.Tensor, own: torch.Tensor, **options: Any) -> Any:
        return ranked(image.cpu(), text.cpu(), torch.arange(len(own)), **options)

    run_directory.check_finite, contrastive.retrieval_metrics = check_finite, retrieval_metrics
    PairEmbeddings.compute = compute  # type: ignore[method-assign]


def run(arguments: list[str]) -> list[dict[str, Any]]:
    """Run the command and return what each step asked."""
    STEPS.clear()
    main(arguments)
    return list(STEPS)


if __name__ == "__main__":
    sys.modules["runtime_fits"] = sys.modules["__main__"]  # The callbacks are named by this module.
    runtime.prepare_torch()
    init = Trainer.__init__

    @functools.wraps(init)
    def recorded(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "callbacks": [*(options.get("callbacks") or []), Record()]})

    Trainer.__init__ = recorded  # type: ignore[method-assign]
    values_from_the_host()
    if int(os.environ["RUNTIME_DEVICES"]) > 1:
        objects_over_gloo()
    found = {}
    for argument in sys.argv[2:]:
        name, _, arguments = argument.partition("=")
        found[name] = run(json.loads(arguments))
    Path(sys.argv[1]).write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # NCCL's threads would wait for each other.
