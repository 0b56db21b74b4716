"""The demo: scenes to shards to a trained dual encoder, measured."""

from collections.abc import Callable
from pathlib import Path

import torch

from dualenc.data.scenes import write_scenes
from dualenc.embedder import load
from dualenc.report import print_table, write_json, write_report


def run(out: Path, config: Path, fit: Callable[[list[str]], None]) -> None:
    """Draws scenes, trains `config` on them, measures, says what came out.

    Args:
        out: gets `scenes/`, `run/`, `zeroshot.json`, `retrieval.json` and `report.html`.
        config: a configuration for `fit`.
        fit: the command line of `dualenc fit`.
    """
    print(f"drawing scenes into {out / 'scenes'}")
    write_scenes(out / "scenes", train=8000)
    fit([
        "fit", "--config", str(config),
        "--data.train", str(out / "scenes"),
        "--trainer.default_root_dir", str(out / "run"),
        "--trainer.devices", "1", "--trainer.accelerator", "gpu" if torch.cuda.is_available() else "cpu",
    ])  # fmt: skip
    embedder = load(out / "run")
    results = {name: embedder.evaluate(out / "scenes" / name) for name in ("zeroshot", "retrieval")}
    print_table(list(results.values()))
    for name, result in results.items():
        write_json(out, name, [result])
    write_report(out, "demo", list(results.values()))
    print(
        f"\nBy chance, acc1 would be {1 / 48:.3f} and image_retrieval_recall@10 {10 / results['retrieval']['n']:.3f}.\n"
        f"The model is in {out / 'run' / 'best'}, the report in {out / 'report.html'}."
    )
