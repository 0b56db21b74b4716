"""The command `demo`: draw scenes, train a dual encoder on them, evaluate it, and write a report."""

import json
import shlex
from pathlib import Path
from typing import Any

from dualenc.cli.common import UsageError, config_folder

TRAIN = 12_000  # scenes; drawn in seconds, and as many as a run of minutes can see


def demo(out: Path = Path("demo")) -> None:
    """Draw scenes, train on them and evaluate the model, in minutes on two CPU cores.

    Args:
        out: folder for shards, run and results; must not exist yet.
    """
    import torch

    from dualenc.cli.fit import trainer_command
    from dualenc.data.prepare.scenes import NAMES, UNSEEN, write_scenes

    if out.exists():
        raise UsageError(f"{out} exists already: choose another folder, or remove it")
    scenes, root = out / "scenes", out / "run"
    print(f"Drawing {TRAIN:,} scenes into {scenes}, without {len(UNSEEN)} of {len(NAMES)} pairs of color and shape.")
    write_scenes(scenes, train=TRAIN)
    sets = [str(scenes / name) for name in ("zeroshot_seen", "zeroshot_unseen", "retrieval")]
    evaluation = {"class_path": "dualenc.training.Evaluation", "init_args": {"data": sets, "every_n_epochs": 2}}
    device = "gpu" if torch.cuda.is_available() else "cpu"
    trainer_command([
        "fit", "--config", str(config_folder() / "smoke.yaml"),
        "--data.train", str(scenes),
        "--trainer.default_root_dir", str(root),
        "--trainer.callbacks", json.dumps([evaluation]),
        "--trainer.devices", "1", "--trainer.accelerator", device,
        "--trainer.precision", "bf16-mixed" if device == "gpu" or _fast_bf16() else "32-true",
    ])  # fmt: skip
    note = f"{TRAIN:,} drawn for training; left out of them: {', '.join(UNSEEN)}"
    report, images = _evaluate(out, root, sets, note)
    index = shlex.quote(str(out / "search"))
    build = f"dualenc build-search {shlex.quote(str(root))} {shlex.quote(str(scenes))} {index}"
    print(
        f"\nEach image of the first two sets shows one of {len(NAMES)} pairs of color and shape: pairs of the "
        f"training data,\nand pairs that it does not have. The third set matches {images} new scenes with captions.\n\n"
        f"The report is {report}, the model {root / 'best'}. Next steps:\n\n"
        f"  dualenc zeroshot {shlex.quote(str(root))} {shlex.quote(str(scenes / 'zeroshot_unseen'))}\n"
        f"  dualenc make-shards your_captions.csv shards\n"
        f"  dualenc configs vit_b32_bert_base > run.yaml\n\n"
        f"To search the scenes on a page:\n\n"
        f"  {build} && dualenc serve {index}\n"
    )


def _evaluate(out: Path, root: Path, sets: list[str], note: str) -> tuple[Path, int]:
    """Evaluate the model on all sets; return the path of the report and the number of images in the last set."""
    from dualenc import BenchmarkSet, load
    from dualenc.evaluation import embed_set, score
    from dualenc.report import print_table, write_report
    from dualenc.utils.files import write_json

    embedder = load(root)
    sections = [score(data, embed_set(embedder, data), embedder).section for data in map(BenchmarkSet.open, sets)]
    results: list[dict[str, Any]] = [section.result for section in sections]
    print_table(results)
    write_json(out / "zeroshot.json", results[:2])
    write_json(out / "retrieval.json", results[2:])
    about = {"data": out / "scenes", "scenes": note}
    title = "The demo: scenes of colored shapes"
    return write_report(out, title, sections, about, root / "metrics.csv"), results[2]["n"]


def _fast_bf16() -> bool:
    """Return whether this CPU has instructions for bfloat16; false with torch 2.11, which does not say."""
    import torch

    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))
