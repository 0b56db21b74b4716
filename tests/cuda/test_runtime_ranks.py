"""Collectives of a training step on two ranks, over a CUDA runtime without a device."""

import json
import os
from pathlib import Path

import pytest
from fits import SMALL, SMOKE
from helpers import tiny_tokenizer, write_shards
from runs import free_port
from runtime_runs import FITS, begin, finish

from tools import runtime

EMBEDDINGS = 8 * 32  # numbers of a rank's embeddings: half of 16 pairs, 32 dimensions
FSDP = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
}


def collectives(library: Path, folder: Path, seed: int, strategy: str) -> list[str]:
    """Train for a few steps on two ranks, and return the collectives of a warm step, which are those of both ranks."""
    write_shards(folder / "shards", [40, 30, 27], seed)
    tiny_tokenizer(24).save(folder / "tokenizer.json")
    arguments = [
        "fit", "--config", str(SMOKE), *SMALL, "--trainer.accelerator", "gpu", "--trainer.devices", "2",
        "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "4", "--trainer.log_every_n_steps", "0",
        "--data.train", str(folder / "shards"), "--data.val", "null", "--trainer.strategy", strategy,
        "--data.tokenizer", str(folder / "tokenizer.json"), "--trainer.default_root_dir", str(folder / "run"),
    ]  # fmt: skip
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torchrun = {**ranks, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    outs, logs, processes = [], [], []
    for rank in ("0", "1"):
        outs.append(folder / f"rank-{rank}.json")
        logs.append(folder / f"rank-{rank}.log")
        environment = {**runtime.environment(library, devices=2), **torchrun, "RANK": rank, "LOCAL_RANK": rank}
        program = [str(FITS), str(outs[-1]), f"fit={json.dumps(arguments)}"]
        processes.append(begin(program, environment, logs[-1]))
    finish(processes, logs)
    first, second = ([step["collectives"] for step in json.loads(out.read_text())["fit"]] for out in outs)
    assert first == second  # Ranks with other collectives, or another order, would wait for each other for ever.
    assert first[2] == first[3]
    print(os.linesep.join(first[2]))
    return first[2]


# Of 8 pairs a rank in 32 dimensions; the statistics of the softmax are in float64.
FORWARD = [
    f"all_gather float32 {4 * 2 * EMBEDDINGS}",  # the texts
    f"all_reduce float64 {8 * 16}",  # of each text, the largest log-sum-exp of a rank
    f"all_reduce float64 {8 * 4 * 16}",  # and the sums: its own score, its other positives, their number, the others
    "all_reduce float64 8",  # the loss
]
BACKWARD = f"reduce_scatter float32 {4 * 2 * EMBEDDINGS}"  # the gradient of the texts


@pytest.mark.long
def test_collectives_of_ddp(library, tmp_path, seed):
    """The loss has its own collectives, and all gradients fit one bucket."""
    *loss, gradients = collectives(library, tmp_path, seed, "ddp")
    assert loss == [*FORWARD, BACKWARD]
    assert gradients.startswith("all_reduce float32 ")


@pytest.mark.long
def test_collectives_of_fsdp2(library, tmp_path, seed):
    """Weights are gathered for each block, forward and backward, before gradients are reduced in fp32."""
    found = collectives(library, tmp_path, seed, json.dumps(FSDP))
    assert found[-1].startswith("all_reduce float32 ")  # the gradient norm
    start = next(i for i in range(len(found)) if found[i : i + len(FORWARD)] == FORWARD)
    before, after = found[:start], found[start + len(FORWARD) :]
    assert after[0] == BACKWARD
    halves = [one for one in before if one.startswith("all_gather uint8 ")]  # matrices in bf16, vectors in fp32
    assert len(halves) == 4  # of two blocks in each tower
    assert all(one.startswith("all_gather ") for one in before)
    assert [one for one in after if one.startswith("all_gather uint8 ")] == halves
    reduced = [one for one in after[1:] if one.startswith("reduce_scatter ")]
    assert all(one.startswith("reduce_scatter float32 ") for one in reduced)
    # The bytes of a block's gradients are those of its weights in fp32, of which the gather had the matrices in half.
    assert len([one for one in reduced if int(one.split()[-1]) > 1.9 * int(halves[0].split()[-1])]) == 4
