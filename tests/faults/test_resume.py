"""Runs that are killed by a signal resume bit-equal to an uninterrupted run."""

import json
import os
import re
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


class Uninterrupted(NamedTuple):
    folder: Path
    fit: list[str]  # command-line options of all runs
    seed: int


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Run 27 steps without an interruption."""
    seed = int(os.environ.get("DUALENC_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"DUALENC_TEST_SEED={seed}")
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit = [*data(folder, seed), *everything(folder)]
    assert run(fit, folder) == [0], (folder / "log-0").read_text()
    return Uninterrupted(folder, fit, seed)


def with_callbacks(uninterrupted, *more):
    """Return the options of the run with more callbacks."""
    return [*uninterrupted.fit, *everything(uninterrupted.folder, *more)]


def assert_same(one, other):
    """Compare log, weights, optimizer, average, schedule and progress of two runs."""
    assert logged(one) == logged(other)
    assert end(one) == end(other)


# Validation comes after the steps 4, 8, 13, 17, 22 and 26. The evaluation set comes after 5, 10, ... and the ends of
# epochs, 9, 18 and 27. Checkpoints are saved at even steps and the ends of epochs.
@pytest.mark.parametrize(
    ("step", "where"),
    [
        (1, "step"),  # before the first checkpoint
        (5, "step"),  # after a checkpoint that followed validation
        (9, "batch"),  # after the checkpoint of an epoch's end
        (13, "validation"),
        (27, "step"),
        *(
            pytest.param(step, where, marks=pytest.mark.slow)
            for step, where in ((9, "step"), (10, "batch"), (17, "validation"), (19, "step"), (23, "step"))
        ),
    ],
)
def test_killed_run_resumes_bit_equal(uninterrupted, tmp_path, step, where):
    assert run(with_callbacks(uninterrupted, ("Kill", {"step": step, "where": where})), tmp_path) == [KILLED]
    assert run([*uninterrupted.fit, "--ckpt_path", "auto"], tmp_path) == [0], (tmp_path / "log-0").read_text()
    assert_same(tmp_path, uninterrupted.folder)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["restarts"] == 1
    assert [start["threads"] for start in record["starts"]] == [1, 1]
    assert record["samples_seen"] == 27 * 4
    assert record["step"] == 27


@pytest.mark.slow
def test_run_killed_several_times_with_other_workers(uninterrupted, tmp_path):
    """The kills include one at the first step after a resume."""
    for step, workers in ((7, "2"), (9, "0"), (10, "1"), (16, "2"), (16, "0"), (20, "2")):
        again = ["--ckpt_path", "auto", "--data.workers", workers]
        assert run([*with_callbacks(uninterrupted, ("Kill", {"step": step})), *again], tmp_path) == [KILLED]
    assert run([*uninterrupted.fit, "--ckpt_path", "last", "--data.workers", "2"], tmp_path) == [0]
    assert_same(tmp_path, uninterrupted.folder)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 6, 8, 9, 14, 14, 18]


@pytest.mark.slow
def test_killed_run_with_micro_batches(uninterrupted, tmp_path):
    """Use dropout, masked tokens and duplicates; control: another micro-batch size is another run."""
    more = ["--data.batch_size", "8", "--data.micro_batch_size", "3", "--model.duplicates", "positive"]
    more += ["--model.mlm_weight", "0.3", "--trainer.max_epochs", "4", "--model.image_tuning.layer_decay", "0.7"]
    fit = [*uninterrupted.fit, *more]
    assert run(fit, tmp_path / "whole") == [0], (tmp_path / "whole" / "log-0").read_text()
    part = tmp_path / "part"
    assert run([*with_callbacks(uninterrupted, ("Kill", {"step": 7})), *more], part) == [KILLED]
    assert run([*fit, "--ckpt_path", "auto", "--data.workers", "2"], part) == [0]
    assert_same(part, tmp_path / "whole")
    assert run([*fit, "--data.micro_batch_size", "4"], tmp_path / "other") == [0]
    assert logged(tmp_path / "other") != logged(part)


def test_sums_between_two_logs_are_resumed(uninterrupted, tmp_path):
    """Log every five steps, two of which are before the kill; a callback uses metrics from before the kill."""
    stop = {"monitor": "set/mrr", "patience": 9, "mode": "max", "check_on_train_epoch_end": True}
    sets = {
        "data": [str(uninterrupted.folder / "set")],
        "every_n_epochs": 0,
        "every_n_steps": 8,
    }  # steps 8, 16 and 24: none between 16 and the end of the epoch at 18
    begin = [("dualenc.training.Evaluation", sets), ("lightning.pytorch.callbacks.EarlyStopping", stop)]
    options = ["--trainer.log_every_n_steps", "5"]
    assert run([*uninterrupted.fit, *callbacks(*begin), *options], tmp_path / "whole") == [0]
    part = tmp_path / "part"
    assert run([*uninterrupted.fit, *callbacks(*begin, ("Kill", {"step": 17})), *options], part) == [KILLED]
    assert run([*uninterrupted.fit, *callbacks(*begin), *options, "--ckpt_path", "auto"], part) == [0]
    assert_same(part, tmp_path / "whole")


def test_other_seed_and_fewer_steps_differ(uninterrupted, tmp_path):
    """Control: the comparison finds another seed, and one step less."""
    seed = ["--seed_everything", "12345"]
    assert run([*uninterrupted.fit, *seed], tmp_path / "seed") == [0]
    assert run([*uninterrupted.fit, "--trainer.max_steps", "26"], tmp_path / "step") == [0]
    for folder in ("seed", "step"):
        assert logged(tmp_path / folder) != logged(uninterrupted.folder)
        ended, other = end(tmp_path / folder), end(uninterrupted.folder)
        for name in ("state_dict", "optimizer_states", "callbacks"):
            assert ended[name] != other[name]


def test_resume_of_a_finished_run_changes_nothing(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.folder / "run", tmp_path / "run")
    assert run([*uninterrupted.fit, "--ckpt_path", "auto"], tmp_path) == [0]
    assert_same(tmp_path, uninterrupted.folder)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.slow
def test_run_with_a_killed_rank_resumes_bit_equal(uninterrupted, tmp_path, world):
    """Kill the last rank, then rank 0; the other ranks end by themselves."""
    part, options = tmp_path / "part", ["--data.batch_size", "8", "--trainer.max_epochs", "5"]  # 20 steps
    fit = [*uninterrupted.fit, *options]
    assert run(fit, tmp_path / "whole", world) == [0] * world
    short = [*options, "--run.stall_seconds", "20"]
    for step, rank in ((7, world - 1), (18, 0)):
        kill = with_callbacks(uninterrupted, ("Kill", {"step": step, "rank": rank}))
        statuses = run([*kill, *short, "--ckpt_path", "auto"], part, world)
        assert statuses[rank] == KILLED
        assert all(status == 1 for other, status in enumerate(statuses) if other != rank), statuses
        other = (part / f"log-{(rank + 1) % world}").read_text()
        assert f"rank {rank}" in other
    assert run([*fit, "--ckpt_path", "auto"], part, world) == [0] * world
    assert_same(part, tmp_path / "whole")


FSDP = json.dumps({
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
})  # fmt: skip


def without_key_biases(name, weight):
    """Return a weight without the biases of keys.

    A key's bias adds the same to all scores of a query, which the softmax takes away. Its gradient is rounding alone,
    and Adam makes steps of full size of it.
    """
    return torch.cat([weight.chunk(3)[0], weight.chunk(3)[2]]) if name.endswith("qkv.bias") else weight


@pytest.mark.slow
def test_killed_run_with_sharded_weights(uninterrupted, tmp_path):
    """FSDP2 equals DDP up to rounding, and a killed run resumes bit-equal.

    The run has an average of the weights, micro-batches and gradient checkpointing.
    """
    more = ["--trainer.gradient_clip_val", "1.0", "--run.stall_seconds", "20", "--data.batch_size", "8"]
    more += ["--data.micro_batch_size", "3", "--model.grad_checkpointing", "true", "--trainer.max_epochs", "5"]
    # One rank embeds this set in two batches, the other rank in one.
    many = write_benchmark(tmp_path / "many", uninterrupted.seed, "retrieval", counts=(129,))
    sets = ("dualenc.training.Evaluation", {"data": [str(many)], "every_n_epochs": 1})
    fit = [*with_callbacks(uninterrupted, sets), *more]
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
        one, other = (without_key_biases(name, x) for x in (weight, weights[1][name]))
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)
    kill = [*with_callbacks(uninterrupted, sets, ("Kill", {"step": 7, "rank": 1})), *more]
    assert run(kill, part, 2, FSDP) == [1, KILLED]
    assert run([*fit, "--ckpt_path", "auto"], part, 2, FSDP) == [0, 0], (part / "log-0").read_text()
    assert_same(part, whole)
    weights = [load_file(folder / "run" / "last" / "model.safetensors") for folder in (whole, part)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_resume_on_one_rank_instead_of_two(uninterrupted, tmp_path):
    """The global batches stay the same."""
    rows = [("Rows", {"folder": str(tmp_path / name)}) for name in ("whole", "part")]
    assert run(with_callbacks(uninterrupted, rows[0]), tmp_path / "a") == [0]
    assert run([*with_callbacks(uninterrupted, rows[1]), "--trainer.max_steps", "14"], tmp_path / "b", 2) == [0, 0]
    more = ["--run.accept_changes", "[trainer.max_steps]", "--ckpt_path", "last"]
    assert run([*with_callbacks(uninterrupted, rows[1]), *more], tmp_path / "b") == [0]

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


def losses(folder):
    return [float(line.split(",")[2]) for line in logged(folder) if ",train/loss," in line]


@pytest.mark.slow
def test_configuration_of_many_nodes(tmp_path):
    """Run the shipped configuration with a small model on two ranks, by both of its strategies.

    They are equal in bfloat16, too, since FSDP2 rounds what autocast rounds. The evaluation set has more images for one
    rank than for the other. The model directory is unsharded.
    """
    seed = int.from_bytes(os.urandom(3), "little")
    print(f"DUALENC_TEST_SEED={seed}")
    fit = data(tmp_path, seed)
    fit[2] = str(Path(fit[2]).with_name("many_nodes.yaml"))
    many = write_benchmark(tmp_path / "many", seed, "retrieval", counts=(129,))
    sets = ("dualenc.training.Evaluation", {"data": [str(many)], "every_n_epochs": 1, "at_start": True})
    average = ("dualenc.training.EMA", {"decay": 0.9})
    fit += ["--data.batch_size", "8", "--trainer.num_nodes", "1", *callbacks(average, sets)]
    text = Path(fit[2]).read_text()
    shipped = yaml.safe_load(text)["trainer"]["strategy"]
    variant = yaml.safe_load(re.sub(r"(?m)^  # (?=strategy:|  )", "  ", text.replace("  strategy:", "  x:", 1)))
    variant = variant["trainer"]["strategy"]
    variant["init_args"]["data_parallel_size"] = 2
    for name, strategy in (("ddp", shipped), ("fsdp", variant)):
        assert run(fit, tmp_path / name, 2, json.dumps(strategy)) == [0, 0], (tmp_path / name / "log-0").read_text()
    embedder = load(tmp_path / "fsdp" / "run" / "last", "cpu")
    assert embedder.embed_texts(["a red hat", "two boats"]).norm(dim=1).allclose(torch.ones(2))
    assert len(losses(tmp_path / "fsdp")) == 12
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-4)
    for name in ("val/mrr", "many/mrr"):
        one, other = (
            [float(line.split(",")[2]) for line in logged(tmp_path / folder) if f",{name}," in line]
            for folder in ("ddp", "fsdp")
        )
        assert len(one) == len(other) > 0
        assert one == pytest.approx(other, rel=0.1), name  # A rank may change by rounding.
    # With Lightning's defaults each rank of a machine would train by itself, which is refused.
    bare = json.dumps({"class_path": variant["class_path"]})
    assert set(run(fit, tmp_path / "bare", 2, bare)) <= {1, 2}
    assert "data_parallel_size" in (tmp_path / "bare" / "log-0").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own tensors
def test_killed_run_with_compiled_blocks(uninterrupted, tmp_path, monkeypatch):
    """Dropout is on. The names in checkpoints are those of plain blocks, by which such a run continues too.

    Autograd is traced, and no machine code is made: that takes long, and gives the same code each time.
    """
    real = torch.compile  # The runs are forked from this process.
    monkeypatch.setattr(torch, "compile", lambda call, **how: real(call, **{**how, "backend": "aot_eager"}))
    fit = [*uninterrupted.fit, "--model.compile", "true", "--trainer.max_epochs", "1"]
    assert run(fit, tmp_path / "whole") == [0], (tmp_path / "whole" / "log-0").read_text()
    part = tmp_path / "part"
    kill = [*with_callbacks(uninterrupted, ("Kill", {"step": 5})), *fit[-4:]]
    assert run(kill, part) == [KILLED]
    shutil.copytree(part, tmp_path / "plain")
    assert run([*fit, "--ckpt_path", "auto"], part) == [0], (part / "log-0").read_text()
    assert_same(part, tmp_path / "whole")
    plain = [*fit, "--model.compile", "false", "--ckpt_path", "auto"]
    assert run(plain, tmp_path / "plain") == [0], (tmp_path / "plain" / "log-0").read_text()
    weights = [load_file(tmp_path / name / "run" / "last" / "model.safetensors") for name in ("whole", "plain")]
    assert weights[0].keys() == weights[1].keys()
    assert load(tmp_path / "whole" / "run" / "last", "cpu").embed_texts(["a red hat"]).isfinite().all()
