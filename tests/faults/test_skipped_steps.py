"""Non-finite steps, spikes and failed ranks: all ranks act alike, and name rank, step and samples."""

import json
import math
import os
import re
import signal
import time

import pytest
import torch
from runs import begin, callbacks, data, end, everything, logged, run

from dualenc.training.checkpoint import checkpoint_path, list_checkpoints, newest_checkpoint, read_checkpoint
from dualenc.training.task import skip_step
from tools.soak import exact


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [*data(folder, 13), "--trainer.val_check_interval", "1.0"], folder


def skipped(folder):
    path = folder / "run" / "skipped_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def values(folder, name):
    lines = (folder / "run" / "metrics.csv").read_text().splitlines()
    return [float(line.split(",")[2]) for line in lines if line.split(",")[1] == name]


def broken(fit, *more, **how):
    return [*fit[0], *everything(fit[1], ("Break", how), *more)]


def test_non_finite_loss_on_one_rank_skips_the_step_on_both(fit, tmp_path):
    """Weights, optimizer and average do not change, and the samples of both ranks are listed."""
    rows = ("Rows", {"folder": str(tmp_path / "rows")})
    options = ["--trainer.max_steps", "7", "--run.every_n_steps", "1", "--run.keep", "9"]
    assert run([*broken(fit, rows, step=5, rank=1, how="nan"), *options], tmp_path, 2) == [0, 0]
    states = [exact(read_checkpoint(checkpoint_path(tmp_path / "run" / "checkpoints", step))) for step in (5, 6, 7)]
    for name in ("state_dict", "optimizer_states"):
        before, at, after = (state[name] for state in states)
        if name == "optimizer_states":  # the schedule advances
            for (state,) in (before, at, after):
                for group in state["param_groups"]:
                    del group["lr"]
        assert before == at
        assert at != after
    before, at, after = (
        next(x for name, x in state["callbacks"].items() if name.startswith("EMA")) for state in states
    )
    assert before == at
    assert at != after
    assert values(tmp_path, "train/skipped_steps") == [0, 0, 0, 0, 0, 1, 0]
    losses = values(tmp_path, "train/loss")
    assert math.isnan(losses[5])
    assert all(map(math.isfinite, losses[:5] + losses[6:]))
    lines = skipped(tmp_path)
    assert sorted((line["step"], line["rank"]) for line in lines) == [(6, 0), (6, 1)]
    assert {line["what"] for line in lines} == {"skipped"}
    named = [key for line in lines for keys in line["samples"].values() for key in keys]
    assert len(named) == 4
    seen = [json.loads(line) for path in (tmp_path / "rows").iterdir() for line in path.read_text().splitlines()]
    assert {int(key) for key in named} == {row for step, batch in seen if step == 6 for row in batch}


def test_run_with_skipped_steps_resumes_bit_equal(fit, tmp_path):
    """A run that was killed among skipped steps has the same log, state and samples as an uninterrupted one."""
    options = {"step": 4, "last": 6, "how": "nan"}
    assert run(broken(fit, **options), tmp_path / "whole") == [0]
    assert run(broken(fit, ("Kill", {"step": 6}), **options), tmp_path / "part") == [-9]
    assert run([*broken(fit, **options), "--ckpt_path", "auto"], tmp_path / "part") == [0]
    assert logged(tmp_path / "part") == logged(tmp_path / "whole")
    assert end(tmp_path / "part") == end(tmp_path / "whole")
    assert [line["step"] for line in skipped(tmp_path / "part")] == [5, 6, 7]
    assert [line["samples"] for line in skipped(tmp_path / "part")] == [
        line["samples"] for line in skipped(tmp_path / "whole")
    ]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_too_many_consecutive_skipped_steps_end_the_run(fit, tmp_path, world):
    options = [*broken(fit, step=5, last=99, how="nan"), "--model.max_skipped", "4"]
    assert run(options, tmp_path, world) == [1] * world
    text = (tmp_path / "log-0").read_text()
    assert "in 4 consecutive steps" in text
    assert "step 9" in text
    assert "part-00" in text
    assert "skipped_steps.jsonl" in text
    assert "Traceback" not in text
    assert [line["step"] for line in skipped(tmp_path) if line["rank"] == 0] == [6, 7, 8, 9]
    weights = read_checkpoint(newest_checkpoint(tmp_path / "run" / "checkpoints", pytest.fail))["state_dict"]
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_non_finite_weights_are_not_saved(fit, tmp_path):
    """Their checkpoint would be useless, and would replace a good one."""
    options = [*broken(fit, step=5, how="weights"), "--model.max_skipped", "6", "--run.failed_saves", "9"]
    assert run(options, tmp_path) == [1]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000004.ckpt",
        "step-00000002.ckpt",
    ]
    assert "is not finite" in (tmp_path / "log-0").read_text()


def test_infinite_loss_with_a_finite_gradient_is_skipped(fit, tmp_path):
    assert run([*broken(fit, step=5, how="infinite loss"), "--trainer.max_steps", "7"], tmp_path) == [0]
    assert values(tmp_path, "train/skipped_steps") == [0, 0, 0, 0, 0, 1, 0]
    assert [line["loss"] for line in skipped(tmp_path)] == ["inf"]


def test_gradient_norm_spikes_are_logged(fit, tmp_path):
    """A resumed run detects the spike too: the norms before it are in the checkpoint."""
    spike = {"step": 24, "how": "spike"}
    assert run(broken(fit, ("Kill", {"step": 21}), **spike), tmp_path) == [-9]
    assert run([*broken(fit, **spike), "--ckpt_path", "last"], tmp_path) == [0]
    assert values(tmp_path, "train/grad_spikes") == [0] * 24 + [1, 0, 0]
    (line,) = skipped(tmp_path)
    assert (line["step"], line["what"]) == (25, "spike")
    assert line["grad_norm"] > 5 * line["median"]
    assert sum(map(len, line["samples"].values())) == 4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_skipped_step_changes_nothing(seed, kind, fused):
    """The following steps equal those of an optimizer without the skipped step."""
    ends = []
    for bad_step in (None, 2):
        torch.manual_seed(seed)
        weight = torch.nn.Parameter(torch.randn(7))
        optimizer = kind(
            [weight], lr=0.1, weight_decay=0.1, fused=fused, **({"momentum": 0.9} if kind is torch.optim.SGD else {})
        )
        for step in range(5):
            if step == 2 and bad_step is None:
                continue
            weight.grad = torch.full((7,), torch.nan) if step == bad_step else torch.ones(7) * (step + 1)
            skip_step(optimizer, torch.tensor(step == bad_step))
            optimizer.step()
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)


def test_fused_optimizer_skips_a_step_by_a_flag(seed):
    """Test the flag `found_inf`, which is used on GPUs, with the fused AdamW of the CPU."""
    weight = torch.nn.Parameter(torch.randn(7))
    optimizer = torch.optim.AdamW([weight], fused=True)
    before = weight.detach().clone()
    weight.grad = torch.full((7,), torch.nan)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(weight, before)
    weight.grad = torch.ones(7)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(weight, before)
    assert optimizer.state[weight]["step"].item() == 1


def test_error_on_one_rank_is_named_by_the_others(fit, tmp_path):
    """The rank that fails prints the whole error; the other one names it, and not its own network error."""
    assert run([*broken(fit, step=5, rank=1, how="error"), "--run.stall_seconds", "30"], tmp_path, 2) == [1, 1]
    own, other = ((tmp_path / f"log-{rank}").read_text() for rank in (1, 0))
    assert "something of the user's own" in own
    assert "Traceback" in own
    assert "rank 1 failed after step 5" in own
    assert "rank 1 failed after step 5" in other
    assert "KeyError" in other
    assert "Traceback" not in other


def test_stalled_rank_is_named(fit, tmp_path):
    began = time.monotonic()
    assert run([*broken(fit, step=5, rank=1, how="stall"), "--run.stall_seconds", "4"], tmp_path, 2) == [1, 1]
    assert time.monotonic() - began < 60
    own, other = ((tmp_path / f"log-{rank}").read_text() for rank in (1, 0))
    assert "time.sleep(600)" in own  # its stack
    assert "rank 1 stalled after step 5" in other + own


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_suspended_rank_is_named(fit, tmp_path, rank):
    """Suspend either rank; rank 0 holds the store of the heartbeats."""
    suspended = [*fit[0], *callbacks(("Kill", {"step": 5, "rank": rank, "signals": [int(signal.SIGSTOP)]}))]
    ranks = begin([*suspended, "--run.stall_seconds", "4"], tmp_path, 2)
    try:
        assert ranks[1 - rank].wait(60) == 1
        text = ranks[1 - rank].text()
        # Both timeouts are 4 s here, so either may come first. The last steps may not have been reported.
        assert re.search(f"rank {rank}(, last seen| stalled) after step [0-5]", text)
    finally:
        os.kill(ranks[rank].pid, signal.SIGKILL)
        ranks[rank].wait()
