"""Launches, waits and host time of a training step by phase, over a CUDA runtime without a device.

Run as `python -m tools.bench.launches SETTINGS`, where SETTINGS are JSON, this file is one side of the comparison: it
runs a round for each line of its input and answers by a line of JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tools import runtime
from tools.bench.runner import Spread, machine, versions

ROOT = Path(__file__).parents[2]


def launches(
    before: str | None = None,
    image: str = "vit_base_patch32_clip_224",
    layers: int = 12,
    pairs: int = 256,
    micro_batches: int = 1,
    ema: bool = False,
    rounds: int = 7,
    steps: int = 3,
) -> None:
    """Print launches, waits and milliseconds of the host of a step in bf16-mixed by phase, without a GPU.

    Kernels do nothing, so the time is that of Python, torch's dispatcher and autograd alone: a step on a device cannot
    take less. It is CPU time of all threads, the least of the steps of a round.

    Args:
        before: another checkout of dualenc to compare with, whose rounds alternate with this one's.
        image: timm's name of the image tower.
        layers: layers of the text tower, of width 512.
        pairs: pairs of a batch.
        micro_batches: micro-batches of a batch.
        ema: average the weights too.
        rounds: rounds of each checkout.
        steps: steps of a round.
    """
    if reason := runtime.reason_against():
        sys.exit(f"launches: {reason}")
    settings = {"image": image, "layers": layers, "pairs": pairs, "pieces": micro_batches, "ema": ema, "steps": steps}
    checkouts = {"before": Path(before)} if before else {}
    checkouts["this" if before else "launches"] = ROOT
    with tempfile.TemporaryDirectory() as folder:
        library = runtime.build(Path(folder) / "runtime")
        sides = {name: _Side(Path(folder) / name, path, library, settings) for name, path in checkouts.items()}
        try:
            found = {name: [] for name in sides}
            for _ in range(rounds + 1):
                for name, side in sides.items():
                    found[name].append(side.round())
        finally:
            for side in sides.values():
                side.process.kill()
                side.process.wait()
    _print(settings, {name: rows[1:] for name, rows in found.items()})  # The first round warms up.


class _Side:
    """Process that runs the steps of a checkout."""

    def __init__(self, folder: Path, checkout: Path, library: Path, settings: dict[str, Any]) -> None:
        # The package of that checkout, but these tools.
        folder.mkdir()
        (folder / "dualenc").symlink_to(checkout.resolve() / "dualenc")
        path = os.pathsep.join([str(folder), str(ROOT)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench.launches", json.dumps(settings)],
            env={**runtime.environment(library), "PYTHONPATH": path},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def round(self) -> dict[str, list[float]]:
        """Run a round and return launches, waits and milliseconds by phase."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def _print(settings: dict[str, Any], found: dict[str, list[dict[str, list[float]]]]) -> None:
    """Print a table of the medians by phase, and ratios of the rounds."""
    names = list(found)
    print("| phase |" + "".join(f" {name}: launches | waits | host ms |" for name in names))
    print("|---" * (1 + 3 * len(names)) + "|")
    phases = list(dict.fromkeys(phase for name in names for phase in found[name][0]))
    totals: dict[str, list[float]] = {}
    for name in names:
        totals[name] = [sum(cells[2] for cells in one.values()) for one in found[name]]
        for one in found[name]:
            one["step"] = [sum(cells[i] for cells in one.values()) for i in range(3)]
    for phase in [*phases, "step"]:
        cells = ""
        for name in names:
            rows = [one[phase] for one in found[name]]
            cells += f" {rows[0][0]:,.0f} | {rows[0][1]:.0f} | {Spread.of([row[2] for row in rows]).show('.1f')} |"
        print(f"| {phase} |{cells}")
    print()
    if len(names) > 1:
        before, this = (totals[name] for name in names)
        ratio = Spread.of([b / a for a, b in zip(before, this)]).show(".2f")
        print(f"Host time of this checkout relative to the other: {ratio}, of rounds in turns.")
    print(f"Median (quartiles) of {len(totals[names[0]])} rounds. {settings}")
    print(f"{machine()['cpu']}; {', '.join(f'{name} {value}' for name, value in versions().items())}")


def _serve(settings: dict[str, Any]) -> None:
    """Run a round for each line of the input."""
    phases = _phases(settings)
    for _ in sys.stdin:
        rows = [phases() for _ in range(settings["steps"])]
        last = rows[-1]
        # Other work on the machine only ever adds time.
        found = {phase: [*last[phase][:2], min(row[phase][2] for row in rows)] for phase in last}
        print(json.dumps(found), flush=True)


def _phases(settings: dict[str, Any]) -> Callable[[], dict[str, list[float]]]:
    """Build a model and its optimizer, and return a function that runs a step and returns its figures by phase."""
    import torch
    from torch import Tensor

    from dualenc.data import Preprocess
    from dualenc.losses import clip_loss
    from dualenc.models import DualEncoder, Embeddings, ImageConfig, TextConfig, embed_micro_batches
    from dualenc.tokens import Tokens
    from dualenc.training import EMA
    from dualenc.training.optim import clip_gradients, parameter_groups
    from dualenc.training.task import skip_step

    runtime.prepare_torch()
    pairs, count = settings["pairs"], settings["pieces"]
    text = TextConfig(layers=settings["layers"], width=512, heads=8, norm="pre", pool="mean")
    with torch.device("meta"):
        model = DualEncoder(ImageConfig(settings["image"], 224), text, 512)
    model.to_empty(device="cuda").train()
    optimizer = torch.optim.AdamW(parameter_groups(model), fused=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    preprocess = Preprocess(224)
    lengths = (torch.randn(pairs) * 3 + 13).clamp(7, 30).int().tolist()
    images = torch.zeros(pairs, 3, 224, 224, dtype=torch.uint8).pin_memory().split(pairs // count)
    texts = [Tokens.pack([[5] * length for length in lengths[i::count]]) for i in range(count)]
    texts = [Tokens(*(x.pin_memory() if isinstance(x, Tensor) else x for x in one)) for one in texts]
    average, trainer, module = EMA(), SimpleNamespace(global_step=1), SimpleNamespace(skip=None)
    module.named_parameters = model.named_parameters
    average.on_train_start(trainer, module)  # type: ignore[arg-type]

    cast = _weight_cast(model)

    def step() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}

        def phase(name: str, function: Callable[..., Any], *args: Any) -> Any:
            runtime.clear()
            start = time.process_time()
            value = function(*args)
            spent = 1e3 * (time.process_time() - start)
            asked = runtime.asked()
            row = found.setdefault(name, [0, 0, 0.0])
            row[:] = row[0] + asked.launches, row[1] + sum(asked.waits.values()), row[2] + spent
            return value

        def move() -> list[tuple[Tensor, Tokens]]:
            return [(x.to("cuda", non_blocking=True), t.to("cuda", non_blocking=True)) for x, t in zip(images, texts)]

        def embed(x: Tensor, tokens: Tokens) -> Embeddings:
            with cast():
                return model(preprocess.normalize(x), tokens)

        def finish() -> Tensor:
            norm = clip_gradients(parameters, 1.0, None)
            module.skip = ~norm.isfinite()
            skip_step(optimizer, module.skip)
            return norm

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()
            model.logits.clamp_scale()

        batch = phase("copy of the batch", move)
        with torch.autocast("cuda", torch.bfloat16):
            if count > 1:
                out = phase("forward of both towers", embed_micro_batches, embed, batch)
            else:
                ((x, tokens),) = batch
                weights = cast()
                phase("weights to bf16", weights.__enter__)
                image = phase("forward, images", lambda: model.encode_image(preprocess.normalize(x)))
                out = Embeddings(image, phase("forward, texts", model.encode_text, tokens), *model.logits())
                phase("weights to bf16", weights.__exit__, None, None, None)
            loss = phase("loss", lambda: clip_loss(*out))
        phase("backward", loss.backward)
        phase("gradient norm", finish)
        phase("optimizer", update)
        if settings["ema"]:
            phase("average", average.on_train_batch_end, trainer, module, None, None, 0)
        return found

    return step


def _weight_cast(model: Any) -> Callable[[], Any]:
    """Return a function that makes the context of the model's forward pass in training."""
    try:
        from dualenc.models.tower import WeightCast
    except ImportError:  # An earlier checkout leaves all weights to autocast.
        return nullcontext
    return partial(WeightCast(model).applied, "cuda")


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
