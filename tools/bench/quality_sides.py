"""The two sides of `tools.bench.quality`, each run as a program of its own: `dualenc fit`, and open_clip's trainer.

A side trains, keeps its weights at equal distances together with the CPU seconds up to there, and measures them after
the training. The last line that it prints is the curve as JSON.
"""

import csv
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.pytorch import Callback
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from dualenc.cli.fit import trainer_command
from dualenc.data import BenchmarkSet, ShardIndex
from dualenc.data.pairs import captions_of, decode_sample, only_pairs
from dualenc.evaluation import embed_set, score
from dualenc.inference.embedder import Embedder
from dualenc.inference.open_clip import OpenClip, OpenClipTokenizer, OpenClipTransform
from dualenc.models import ImageConfig, ImageEncoder
from dualenc.training.ema import averaged
from tools.bench.runner import cpu_seconds

RECALLS = ("image_retrieval_recall@10", "text_retrieval_recall@10")
PEER_VOCABULARY = 49_408  # entries of open_clip's own tokenizer


class Curve:
    """Curve of a run: its weights at equal distances, with the time up to there.

    Args:
        steps: steps of the run.
        batch: samples of a step.
        measurements: number of times that the weights are kept, the last time at the end.
    """

    def __init__(self, steps: int, batch: int, measurements: int) -> None:
        self.steps, self.batch = steps, batch
        self.at = {round(steps * (i + 1) / measurements) for i in range(measurements)} - {0}
        self.kept: list[tuple[dict[str, float], dict[str, Tensor]]] = []
        self.start = 0.0, 0.0

    def begin(self) -> None:
        """Start the clocks."""
        self.start = time.perf_counter(), cpu_seconds()

    def note(self, step: int, model: nn.Module) -> None:
        """Keep the weights after a step, if it is one of the distances."""
        if step in self.at and (not self.kept or self.kept[-1][0]["step"] < step):
            facts = {
                "step": step,
                "samples": step * self.batch,
                "seconds": time.perf_counter() - self.start[0],
                "cpu": cpu_seconds() - self.start[1],
            }
            self.kept.append((facts, {name: x.detach().clone() for name, x in model.state_dict().items()}))

    def measure(self, model: nn.Module, embedder: Embedder, evaluation: str) -> None:
        """Measure the weights that were kept, and print the curve as JSON."""
        data, points = BenchmarkSet.open(evaluation), []
        model.eval()
        for facts, weights in self.kept:
            model.load_state_dict(weights)
            metrics = score(data, embed_set(embedder, data), embedder).section.result["metrics"]
            points.append({**facts, "recall": sum(metrics[name] for name in RECALLS) / len(RECALLS)})
            print(f"step {facts['step']:,}: recall@10 {points[-1]['recall']:.4f}", file=sys.stderr)
        print(json.dumps({"threads": torch.get_num_threads(), "points": points}), flush=True)


class KeepWeights(Callback):
    """Callback that fills a `Curve`, with the averaged weights if the run has an `EMA` before this callback.

    Args:
        steps: see `Curve`.
        batch: see `Curve`.
        measurements: see `Curve`.
        evaluation: evaluation set that is measured after the training.
    """

    def __init__(self, steps: int, batch: int, measurements: int, evaluation: str) -> None:
        self.curve, self.evaluation = Curve(steps, batch, measurements), evaluation

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clocks."""
        self.curve.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the weights at some steps."""
        if trainer.global_step in self.curve.at:
            with averaged(trainer):
                self.curve.note(trainer.global_step, pl_module.model)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the weights."""
        self.curve.measure(pl_module.model, pl_module.embedder(), self.evaluation)


def run_ours(plan: dict[str, Any], folder: Path) -> None:
    """Train by `dualenc fit`, without evaluation in between."""
    overrides = dict(item.split("=", 1) for item in plan["set"])
    curve = {name: plan[name] for name in ("steps", "batch", "measurements", "evaluation")}
    callbacks = yaml.safe_load(overrides.pop("trainer.callbacks", "[]"))
    callbacks.append({"class_path": "tools.bench.quality_sides.KeepWeights", "init_args": curve})
    trainer_command([
        "fit", "--config", plan["settings"], "--data.val", "null", "--run.monitor", "val/mrr",
        *(word for key, value in overrides.items() for word in (f"--{key}", value)),
        "--data.batch_size", str(plan["batch"]), "--seed_everything", str(plan["seed"]),
        "--trainer.max_steps", str(plan["steps"]), "--trainer.max_epochs", "-1",
        "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.callbacks", json.dumps(callbacks),
        "--trainer.default_root_dir", str(folder / "run"),
    ])  # fmt: skip


class _End(Exception):
    """The end of the peer's last step, which may lie within an epoch of its data."""


def run_peer(plan: dict[str, Any], folder: Path) -> None:
    """Train by the functions of open_clip's trainer as its `main` calls them, with our sizes and schedule."""
    content = yaml.safe_load(Path(plan["settings"]).read_text("utf-8"))
    model_args, data_args = content["model"]["init_args"], content["data"]["init_args"]
    optimizer_args = model_args["optimizer"]["init_args"]
    _stand_in_for_pandas()
    import open_clip
    from open_clip_train import data as theirs
    from open_clip_train.params import parse_args
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    table = _write_table(data_args, folder)
    _write_model(model_args, folder)
    open_clip.add_model_config(folder / "peer.json")
    (beta1, beta2), clip = optimizer_args["betas"], content["trainer"].get("gradient_clip_val")
    bf16 = str(content["trainer"].get("precision", "32-true")).startswith("bf16")
    args: Any = parse_args([
        "--model", "peer", "--train-data", str(table), "--dataset-type", "csv", "--device", "cpu",
        "--batch-size", str(plan["batch"]), "--workers", str(data_args.get("workers", 2)), "--seed", str(plan["seed"]),
        "--lr", str(optimizer_args["lr"]), "--wd", str(optimizer_args["weight_decay"]), "--beta1", str(beta1),
        "--beta2", str(beta2), "--precision", "amp_bf16" if bf16 else "fp32",
        *(["--grad-clip-norm", str(clip)] if clip else []),
    ])  # fmt: skip
    args.rank, args.world_size, args.distributed, args.distill, args.wandb = 0, 1, False, False, False
    torch.manual_seed(plan["seed"])
    model, train_transform, transform = open_clip.create_model_and_transforms(
        args.model, precision=args.precision, device="cpu", output_dict=True, aug_cfg=_augmentation(data_args)
    )
    # These groups are those of open_clip's `main`, which has no function for them.
    excluded = [p.ndim < 2 or any(x in n for x in ("bn", "ln", "bias", "logit_scale")) for n, p in _named(model)]
    groups = [
        {"params": [p for (_, p), out in zip(_named(model), excluded) if out], "weight_decay": 0.0},
        {"params": [p for (_, p), out in zip(_named(model), excluded) if not out], "weight_decay": args.wd},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps)
    tokenizer = open_clip.get_tokenizer(args.model)
    data = theirs.get_data(args, (train_transform, transform), epoch=0, tokenizer=tokenizer)
    warmup = model_args["scheduler"]["init_args"].get("warmup", 0.05)
    set_rate = cosine_lr(optimizer, args.lr, round(warmup * plan["steps"]), plan["steps"])
    curve = Curve(plan["steps"], plan["batch"], plan["measurements"])

    def schedule(step: int) -> None:  # open_clip calls it before each step
        curve.note(step, model)
        if step == plan["steps"]:
            raise _End
        set_rate(step)

    curve.begin()
    try:
        for epoch in range(plan["steps"]):
            train_one_epoch(model, data, open_clip.create_loss(args), epoch, optimizer, None, schedule, None, args)
        schedule(plan["steps"])
    except _End:
        pass
    wrapped = OpenClip(model, "peer")
    found: dict[str, Any] = cast(Any, model).visual.preprocess_cfg
    values: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in found.items()}
    embedder = Embedder(wrapped, OpenClipTokenizer(tokenizer, wrapped.trims), OpenClipTransform(**values))
    curve.measure(model, embedder, plan["evaluation"])


def _named(model: Any) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def _augmentation(data_args: dict[str, Any]) -> dict[str, Any]:
    """Return open_clip's settings for our augmentation, as far as it has them; it has neither flips nor rotation."""
    given = (data_args.get("augment") or {}).get("init_args", {})
    low, high = given.get("scale", (0.9, 1.0))
    found: dict[str, Any] = {"scale": (low, min(1.0, high))}  # it does not pad
    if given.get("color") or given.get("hue"):
        color = given.get("color", 0.0)
        found |= {"color_jitter": (color, color, color, given.get("hue", 0.0)), "color_jitter_prob": 1.0}
        found |= {"gray_scale_prob": given.get("gray", 0.0)}
    return found


def _write_model(model_args: dict[str, Any], folder: Path) -> None:
    """Write open_clip's description of a model of our sizes, with its own tokenizer."""
    image, text = model_args["image"], model_args["text"]
    vit: Any = ImageEncoder(ImageConfig(**image)).vit
    width, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
    vision = {
        "image_size": image["img_size"],
        "layers": len(vit.blocks),
        "width": width,
        "head_width": width // heads,
        "patch_size": vit.patch_embed.patch_size[0],
    }
    own = {name: text[name] for name in ("context_length", "width", "heads", "layers")}
    content = {
        "embed_dim": model_args["embed_dim"],
        "vision_cfg": vision,
        "text_cfg": {**own, "vocab_size": PEER_VOCABULARY},
    }
    (folder / "peer.json").write_text(json.dumps(content), "utf-8")


def _write_table(data_args: dict[str, Any], folder: Path) -> Path:
    """Write the training pairs as files and a table with a line for each caption, and return the path of the table."""
    captions, index = data_args.get("captions", "auto"), ShardIndex.build(data_args["train"])
    index, _ = only_pairs(index, captions)
    table = folder / "train.csv"
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for number, sample in enumerate(index):
            path = folder / f"{number}.{sample.image}"
            if sample.image == "png":  # open_clip puts transparent images on black, and the measured ones are on white
                to_pil_image(decode_sample(sample)).save(path)
            else:
                path.write_bytes(sample.read(str(sample.image)))
            writer.writerows([str(path), caption] for caption in captions_of(sample, captions))
    return table


class _Column(list[str]):
    """Column of a table, with the one method of pandas that open_clip calls."""

    def tolist(self) -> list[str]:
        return list(self)


def _stand_in_for_pandas() -> None:
    """Let open_clip read its table where pandas, which it imports for that alone, is not installed."""

    def read_csv(path: str, sep: str) -> dict[str, _Column]:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, delimiter=sep)
        return {name: _Column(row[i] for row in rows) for i, name in enumerate(header)}

    module: Any = types.ModuleType("pandas")
    module.read_csv = read_csv
    sys.modules.setdefault("pandas", module)


SIDES: dict[str, Callable[[dict[str, Any], Path], None]] = {"open_clip": run_peer, "dualenc": run_ours}

if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-2:])
    SIDES[sys.argv[1]](json.loads(sys.argv[2]), Path(sys.argv[3]))
