"""Steps of `dualenc fit` on CUDA, over a runtime without a device: waits of the host, launches, and a whole run.

The launches are those of towers of two blocks. A ceiling leaves room for a few kernels that another version of torch
may launch, and none for one kernel a parameter, of which these towers have 61.
"""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fits import SMALL, SMOKE
from helpers import caption, tiny_tokenizer, write_benchmark, write_shards
from runtime_runs import once, run_fits

WARM = 2  # steps before torch has filled its caches and the optimizer has its state
EMA = {"class_path": "dualenc.training.EMA"}
GPU = ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed"]
KINDS = {
    "plain": [],
    "micro-batches": ["--data.micro_batch_size", "6"],
    "ema": ["--trainer.callbacks", json.dumps([EMA])],
    "mlm": ["--model.mlm_weight", "0.5", "--data.mask", "0.15"],
}
CONTROLS = {
    "item": ["--trainer.callbacks", json.dumps([{"class_path": "runtime_fits.Item"}])],
    "unfused": ["--model.optimizer.fused", "false", "--model.optimizer.foreach", "false"],
}
CEILINGS = {"plain": 430, "micro-batches": 1_370, "ema": 440, "mlm": 650}


def data(folder: Path, seed: int) -> list[str]:
    """Write shards and a tokenizer, and return the arguments of a fit on them."""
    write_shards(folder / "shards", [40, 30, 27], seed)
    tiny_tokenizer(24).save(folder / "tokenizer.json")
    where = ["--data.train", str(folder / "shards"), "--data.tokenizer", str(folder / "tokenizer.json")]
    return ["fit", "--config", str(SMOKE), *SMALL, *GPU, *where]


def text_fit(folder: Path, seed: int) -> list[str]:
    """Write texts with labels and the settings of a fit on them, and return its arguments."""
    rng = np.random.default_rng(seed)
    lines = [f"{caption(rng)}\t{number % 2}" for number in range(96)]
    (folder / "texts.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    text = {"vocab_size": 120, "width": 32, "layers": 2, "heads": 2, "context_length": 24, "norm": "pre"}
    source = {"label": {"files": str(folder / "texts.tsv")}}
    model = {"heads": {"label": {"kind": "classification", "labels": ["0", "1"]}}, "text": text}
    settings = {
        "trainer": {"max_steps": 6, "max_epochs": -1, "log_every_n_steps": 0, "default_root_dir": str(folder / "text")},
        "model": {"class_path": "dualenc.training.TextTask", "init_args": model},
        "data": {
            "class_path": "dualenc.training.TextData",
            "init_args": {"train": source, "batch_size": 16, "workers": 0, "val": None},
        },
    }
    (folder / "text.json").write_text(json.dumps(settings))
    return ["fit", "--config", str(folder / "text.json"), *GPU]


def write_steps(library: Path, seed: int, path: Path) -> None:
    """Run a few steps of each kind, and write what they asked of the runtime."""
    folder = path.parent / "steps"
    folder.mkdir()
    few = ["--trainer.max_steps", "6", "--trainer.log_every_n_steps", "0", "--data.val", "null"]
    arguments = data(folder, seed)
    fits = {
        name: [*arguments, *few, "--trainer.default_root_dir", str(folder / name), *more]
        for name, more in {**KINDS, **CONTROLS}.items()
    }
    run_fits(library, path, {**fits, "text": text_fit(folder, seed)})


@pytest.fixture(scope="session")
def steps(library: Path, shared: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what the warm steps of each kind asked of the runtime."""
    path = once(shared, "steps.json", partial(write_steps, library, 1))
    return {name: rows[WARM:] for name, rows in json.loads(path.read_text()).items()}


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS, "text"])
def test_a_step_never_waits_for_the_device(steps, kind):
    assert len(steps[kind]) == 4
    for step in steps[kind]:
        assert step["waits"] == {}, kind
        assert step["copies"]["to the host"] == 1  # the gradient norm, which the next step reads


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_launches_of_a_step_stay_below_their_ceiling(steps, kind):
    found = [step["launches"] for step in steps[kind]]
    print(kind, found)
    assert max(found) <= CEILINGS[kind]
    assert min(found) > 0.8 * CEILINGS[kind]  # A ceiling far above holds nothing.


@pytest.mark.long
def test_a_stray_item_is_found_as_a_wait(steps):
    assert all(step["waits"] == {"stream": 1} for step in steps["item"])


@pytest.mark.long
def test_an_unfused_optimizer_breaks_the_ceiling(steps):
    assert min(step["launches"] for step in steps["unfused"]) > CEILINGS["plain"] + 61


@pytest.mark.long
def test_texts_take_flash_attention(steps):
    """Each of the two layers of the text tower is one kernel, and so is each of the image tower."""
    for step in steps["plain"]:
        assert sum(n for name, n in step["kernels"].items() if "flash_fwd_kernel" in name) == 4


@pytest.mark.long
def test_a_whole_run_with_average_checkpoints_and_evaluation(library, tmp_path, seed):
    """Pin batches in a worker, average, log, validate, evaluate, save, and write the report, to the end."""
    sets = write_benchmark(tmp_path / "set", seed, "retrieval")
    evaluation = {"class_path": "dualenc.training.Evaluation", "init_args": {"data": [str(sets)]}}
    arguments = [
        *data(tmp_path, seed), "--data.workers", "1", "--run.every_n_steps", "4", "--trainer.max_steps", "10",
        "--trainer.log_every_n_steps", "5", "--trainer.callbacks", json.dumps([EMA, evaluation]),
        "--trainer.default_root_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    # New memory holds zeros, so that nothing depends on what a kernel would have overwritten.
    steps = run_fits(library, tmp_path / "whole.json", {"fit": arguments}, PYTORCH_NO_CUDA_MEMORY_CACHING="1")["fit"]
    run = tmp_path / "run"
    assert [path.name for path in sorted((run / "checkpoints").glob("*.ckpt"))][-1] == "step-00000010.ckpt"
    assert {path.name for path in run.iterdir()} >= {"best", "last", "report.html", "run.json"}
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} >= {"train/loss", "val/mrr", "set/image_retrieval_recall@1"}
    assert len(steps) == 10
    # What follows a step counts for the next one: the start, logs, checkpoints, and the validation of an epoch's end.
    busy = {1, 5, 9, 10} | {int(row["step"]) + 1 for row in rows if row["metric"] == "val/mrr"}
    assert len(busy) < 9
    for number in sorted({*range(1, 11)} - busy):
        assert steps[number - 1]["waits"] == {}, number
