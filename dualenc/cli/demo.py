"""The demo: scenes to shards to a trained dual encoder, measured, with a page to read."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import torch

from dualenc.data import BenchmarkSet
from dualenc.data.prepare.scenes import NAMES, UNSEEN, write_scenes
from dualenc.evaluation import embed_set, score
from dualenc.inference.embedder import load
from dualenc.report import print_table, write_json, write_report

TRAIN = 12_000  # scenes; drawing them takes seconds, and more of them are not seen in minutes


def run(out: Path, config: Path, fit: Callable[[list[str]], None]) -> None:
    """Draws scenes, trains `config` on them, measures, says what came out and what to try next.

    Args:
        out: gets `scenes/`, `run/`, `zeroshot.json`, `retrieval.json` and `report.html`.
        config: a configuration for `fit`.
        fit: the command line of `dualenc fit`.
    """
    scenes, root = out / "scenes", out / "run"
    print(f"Drawing {TRAIN:,} scenes into {scenes}, without {len(UNSEEN)} of {len(NAMES)} pairs of colour and shape.")
    write_scenes(scenes, train=TRAIN)
    sets = [str(scenes / name) for name in ("zeroshot_seen", "zeroshot_unseen", "retrieval")]
    evaluation = {"class_path": "dualenc.training.Evaluation", "init_args": {"data": sets, "every_n_epochs": 2}}
    device = "gpu" if torch.cuda.is_available() else "cpu"
    fit([
        "fit", "--config", str(config),
        "--data.train", str(scenes),
        "--trainer.default_root_dir", str(root),
        "--trainer.callbacks", json.dumps([evaluation]),
        "--trainer.devices", "1", "--trainer.accelerator", device,
        "--trainer.precision", "bf16-mixed" if device == "gpu" or _fast_bf16() else "32-true",
    ])  # fmt: skip
    embedder = load(root)
    sections = [score(data, embed_set(embedder, data), embedder).section for data in map(BenchmarkSet.open, sets)]
    results = [section.result for section in sections]
    print_table(results)
    write_json(out, "zeroshot", results[:2])
    write_json(out, "retrieval", results[2:])
    about = {
        "data": scenes,
        "scenes": f"{TRAIN:,} drawn to train on; never among them: {', '.join(UNSEEN)}",
    }
    report = write_report(out, "The demo: scenes of coloured shapes", sections, about, root / "metrics.csv")
    print(
        f"\nEach picture of the first two sets shows one of {len(NAMES)} pairs of colour and shape: pairs that "
        f"training had,\nand pairs that it never had. In the third, {results[2]['n']} new scenes are told apart.\n\n"
        f"The report is {report}, the model {root / 'best'}. Try next:\n\n"
        f"  dualenc zeroshot {shlex.quote(str(root))} {shlex.quote(str(scenes / 'zeroshot_unseen'))}\n"
        f"  dualenc make-shards your_captions.csv shards\n"
        f"  dualenc configs vit_b32_bert_base > run.yaml\n"
    )


def _fast_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16 itself; torch 2.11 does not tell."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))
