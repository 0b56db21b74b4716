"""Runs that are killed for real go on as if nothing had happened: every number equal to the bit."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from helpers import write_benchmark
from runs import callbacks, data, end, everything, logged, run
from safetensors.torch import load_file

from dualenc import load

KILLED = -9


class Unbroken(NamedTuple):
    folder: Path
    fit: list[str]  # the options of all runs
    seed: int


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of 27 steps that nothing happens to."""
    seed = int(os.environ.get("DUALENC_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"DUALENC_TEST_SEED={seed}")
    folder = tmp_path_factory.mktemp("unbroken")
    fit = [*data(folder, seed), *everything(folder)]
    assert run(fit, folder) == [0], (folder / "log-0").read_text()
    return Unbroken(folder, fit, seed)


def with_(unbroken, *more):
    """The options, with more callbacks."""
    return [*unbroken.fit, *everything(unbroken.folder, *more)]


def same(one, other):
    """Log, weights, optimizer, average, schedule, progress."""
    assert logged(one) == logged(other)
    assert end(one) == end(other)


# Validation follows steps 4, 8, 13, 17, 22 and 26, the evaluation set 5, 10, ... and the epochs' ends 9, 18 and 27;
# checkpoints are of the even steps and the epochs' ends.
@pytest.mark.parametrize(
    ("step", "where"),
    [
        (1, "step"),  # before there is a checkpoint
        (5, "step"),  # after one that followed validation
        (9, "batch"),  # after one at an epoch's end
        (13, "validation"),
        (27, "step"),
        *(
            pytest.param(step, where, marks=pytest.mark.slow)
            for step, where in ((9, "step"), (10, "batch"), (17, "validation"), (19, "step"), (23, "step"))
        ),
    ],
)
def test_killed_and_continued(unbroken, tmp_path, step, where):
    assert run(with_(unbroken, ("Kill", {"step": step, "where": where})), tmp_path) == [KILLED]
    assert run([*unbroken.fit, "--ckpt_path", "auto"], tmp_path) == [0], (tmp_path / "log-0").read_text()
    same(tmp_path, unbroken.folder)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["restarts"] == 1
    assert record["samples_seen"] == 27 * 4
    assert record["step"] == 27


@pytest.mark.slow
def test_killed_again_and_again_with_other_workers(unbroken, tmp_path):
    """Also where a run is killed at the first step after it was continued."""
    for step, workers in ((7, "2"), (9, "0"), (10, "1"), (16, "2"), (16, "0"), (20, "2")):
        again = ["--ckpt_path", "auto", "--data.workers", workers]
        assert run([*with_(unbroken, ("Kill", {"step": step})), *again], tmp_path) == [KILLED]
    assert run([*unbroken.fit, "--ckpt_path", "last", "--data.workers", "2"], tmp_path) == [0]
    same(tmp_path, unbroken.folder)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 6, 8, 9, 14, 14, 18]


@pytest.mark.slow
def test_a_batch_in_pieces_killed_and_continued(unbroken, tmp_path):
    """With dropout in each piece, hidden words, pairs that share a caption; other pieces are another run."""
    more = ["--data.batch_size", "8", "--data.micro_batch_size", "3", "--model.duplicates", "positive"]
    more += ["--model.mlm_weight", "0.3", "--trainer.max_epochs", "4", "--model.image_tuning.layer_decay", "0.7"]
    fit = [*unbroken.fit, *more]
    assert run(fit, tmp_path / "whole") == [0], (tmp_path / "whole" / "log-0").read_text()
    part = tmp_path / "part"
    assert run([*with_(unbroken, ("Kill", {"step": 7})), *more], part) == [KILLED]
    assert run([*fit, "--ckpt_path", "auto", "--data.workers", "2"], part) == [0]
    same(part, tmp_path / "whole")
    assert run([*fit, "--data.micro_batch_size", "4"], tmp_path / "other") == [0]
    assert logged(tmp_path / "other") != logged(part)


def test_what_has_summed_up_for_the_log_goes_on(unbroken, tmp_path):
    """A line for five steps, two of which were before the kill; a callback looks at figures measured before it."""
    stop = {"monitor": "set/mrr", "patience": 9, "mode": "max", "check_on_train_epoch_end": True}
    sets = {
        "data": [str(unbroken.folder / "set")],
        "every_n_epochs": 0,
        "every_n_steps": 8,
    }  # 8, 16, 24: none between 16 and the epoch's end at 18
    begin = [("dualenc.training.Evaluation", sets), ("lightning.pytorch.callbacks.EarlyStopping", stop)]
    options = ["--trainer.log_every_n_steps", "5"]
    assert run([*unbroken.fit, *callbacks(*begin), *options], tmp_path / "whole") == [0]
    part = tmp_path / "part"
    assert run([*unbroken.fit, *callbacks(*begin, ("Kill", {"step": 17})), *options], part) == [KILLED]
    assert run([*unbroken.fit, *callbacks(*begin), *options, "--ckpt_path", "auto"], part) == [0]
    same(part, tmp_path / "whole")


def test_the_controls(unbroken, tmp_path):
    """Another seed, or a step more, is another end: the comparison sees it."""
    seed = ["--seed_everything", "12345"]
    assert run([*unbroken.fit, *seed], tmp_path / "seed") == [0]
    assert run([*unbroken.fit, "--trainer.max_steps", "26"], tmp_path / "step") == [0]
    for folder in ("seed", "step"):
        assert logged(tmp_path / folder) != logged(unbroken.folder)
        ended, other = end(tmp_path / folder), end(unbroken.folder)
        for name in ("state_dict", "optimizer_states", "callbacks"):
            assert ended[name] != other[name]


def test_a_continued_run_that_is_done_stays_as_it_is(unbroken, tmp_path):
    shutil.copytree(unbroken.folder / "run", tmp_path / "run")
    assert run([*unbroken.fit, "--ckpt_path", "auto"], tmp_path) == [0]
    same(tmp_path, unbroken.folder)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.slow
def test_ranks_killed_and_continued(unbroken, tmp_path, world):
    """The first rank or the last one is killed; the others end by themselves."""
    part, options = tmp_path / "part", ["--data.batch_size", "8", "--trainer.max_epochs", "5"]  # 20 steps
    fit = [*unbroken.fit, *options]
    assert run(fit, tmp_path / "whole", world) == [0] * world
    short = [*options, "--run.stall_seconds", "20"]
    for step, rank in ((7, world - 1), (18, 0)):
        kill = with_(unbroken, ("Kill", {"step": step, "rank": rank}))
        statuses = run([*kill, *short, "--ckpt_path", "auto"], part, world)
        assert statuses[rank] == KILLED
        assert all(status == 1 for other, status in enumerate(statuses) if other != rank), statuses
        other = (part / f"log-{(rank + 1) % world}").read_text()
        assert f"rank {rank}" in other
    assert run([*fit, "--ckpt_path", "auto"], part, world) == [0] * world
    same(part, tmp_path / "whole")


FSDP = json.dumps({
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
})  # fmt: skip


@pytest.mark.slow
def test_sharded_weights_killed_and_continued(unbroken, tmp_path):
    """FSDP2, with an average of the weights, in pieces, with blocks computed again: the numbers of DDP and the weights,
    but for rounding; after a kill the same to the bit."""
    more = ["--trainer.gradient_clip_val", "1.0", "--run.stall_seconds", "20", "--data.batch_size", "8"]
    more += ["--data.micro_batch_size", "3", "--model.grad_checkpointing", "true", "--trainer.max_epochs", "5"]
    # One rank embeds it in two batches, the other one in one.
    many = write_benchmark(tmp_path / "many", unbroken.seed, "retrieval", counts=(129,))
    sets = ("dualenc.training.Evaluation", {"data": [str(many)], "every_n_epochs": 1})
    fit = [*with_(unbroken, sets), *more]
    assert run(fit, tmp_path / "ddp", 2) == [0, 0]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(fit, whole, 2, FSDP) == [0, 0], (whole / "log-0").read_text()
    for name in ("train/loss", "train/grad_norm", "val/loss", "set/mrr", "many/mrr"):
        one, other = (
            [float(line.split(",")[2]) for line in logged(x) if f",{name}," in line] for x in (tmp_path / "ddp", whole)
        )
        assert len(one) == len(other) > 0
        assert one == pytest.approx(other, rel=1e-3), name
    weights = [load_file(folder / "run" / "last" / "model.safetensors") for folder in (tmp_path / "ddp", whole)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)
    kill = [*with_(unbroken, sets, ("Kill", {"step": 7, "rank": 1})), *more]
    assert run(kill, part, 2, FSDP) == [1, KILLED]
    assert run([*fit, "--ckpt_path", "auto"], part, 2, FSDP) == [0, 0], (part / "log-0").read_text()
    same(part, whole)
    weights = [load_file(folder / "run" / "last" / "model.safetensors") for folder in (whole, part)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_from_two_ranks_to_one(unbroken, tmp_path):
    """The same global batches, and the same losses but for dropout and rounding."""
    rows = [("Rows", {"folder": str(tmp_path / name)}) for name in ("whole", "part")]
    assert run(with_(unbroken, rows[0]), tmp_path / "a") == [0]
    assert run([*with_(unbroken, rows[1]), "--trainer.max_steps", "14"], tmp_path / "b", 2) == [0, 0]
    assert run([*with_(unbroken, rows[1]), "--ckpt_path", "last"], tmp_path / "b") == [0]

    def batches(folder):
        found = {}
        for rank in sorted(folder.glob("*.jsonl")):
            for line in rank.read_text().splitlines():
                step, rows = json.loads(line)
                found.setdefault(step, []).extend(rows)
        return found

    whole, part = batches(tmp_path / "whole"), batches(tmp_path / "part")
    assert sorted(part) == list(range(1, 28))
    assert part == whole


@pytest.mark.slow
def test_the_configuration_for_many_nodes(tmp_path):
    """As it is shipped, but small and on two ranks of one machine; its model directory is a whole one."""
    seed = int.from_bytes(os.urandom(3), "little")
    print(f"DUALENC_TEST_SEED={seed}")
    fit = data(tmp_path, seed)
    fit[2] = str(Path(fit[2]).with_name("many_nodes.yaml"))
    fit += ["--data.batch_size", "8", "--data.micro_batch_size", "3", "--trainer.num_nodes", "1"]
    small = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}
    with open(fit[2]) as file:
        options = yaml.safe_load(file)["trainer"]["strategy"]["init_args"]
    strategy = json.dumps({**small, "init_args": {**options, "data_parallel_size": 2}})
    assert run(fit, tmp_path, 2, strategy) == [0, 0], (tmp_path / "log-0").read_text()
    embedder = load(tmp_path / "run" / "last", "cpu")
    assert embedder.embed_texts(["a red hat", "two boats"]).norm(dim=1).allclose(torch.ones(2))
    assert run(fit, tmp_path / "ddp", 2) == [0, 0]

    def losses(folder):
        return [float(line.split(",")[2]) for line in logged(folder) if ",train/loss," in line]

    assert len(losses(tmp_path)) == 12
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "ddp"), rel=1e-2)  # in bfloat16
    # Lightning's own defaults would let each rank of a machine train by itself.
    bare = json.dumps(small)
    assert set(run(fit, tmp_path / "bare", 2, bare)) <= {1, 2}
    assert "data_parallel_size" in (tmp_path / "bare" / "log-0").read_text()
