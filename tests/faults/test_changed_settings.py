"""Resuming with other settings: refused by name, or really used from the next step on."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from fits import fails
from runs import begin, callbacks, data, end, logged, run

from dualenc.training.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from dualenc.training.resume import check_changes, compared_settings, find_changes

STEPS = 27  # of the whole run
TRAINER = SimpleNamespace(precision="32-true")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Run until step 7 and kill the run; the checkpoints are those of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("stopped")
    fit = data(folder, 7)
    assert run([*fit, *callbacks(("Kill", {"step": 7}))], folder) == [-9]
    return folder, fit


@pytest.fixture
def part(stopped, tmp_path):
    shutil.copytree(stopped[0] / "run", tmp_path / "run")
    return tmp_path


def again(stopped, part, *more):
    return [*stopped[1], "--trainer.default_root_dir", str(part / "run"), "--ckpt_path", "last", *more]


def logged_rates(folder):
    lines = [line.split(",") for line in (folder / "run" / "metrics.csv").read_text().splitlines()[1:]]
    return {int(step): float(value) for step, name, value in lines if name == "train/lr"}


def rate(step, peak, total=STEPS, warmup=2):
    """Return the learning rate of a step, counted from 1."""
    if step - 1 < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - 1 - warmup) / (total - warmup))) / 2


def final_optimizer(folder):
    newest = list_checkpoints(folder / "run" / "checkpoints")[0]
    return read_checkpoint(newest)["optimizer_states"][0]


@pytest.mark.parametrize(
    ("options", "name", "values"),
    [
        (["--data.batch_size", "8"], "data.batch_size", ("4", "8")),
        (["--seed_everything", "8"], "seed_everything", ("7", "8")),
        (["--data.window", "2"], "data.window", ("64", "2")),
        (["--data.captions", "txt"], "data.captions", ("json.captions", "txt")),
        (["--data.select", "number > 3"], "data.train", ()),
        (["--model.optimizer.lr", "0.004"], "model.optimizer.lr", ("0.003", "0.004")),
        (["--model.text.dropout", "0.2"], "model.text.dropout", ("0.1", "0.2")),
        (["--model.optimizer", "torch.optim.SGD"], "model.optimizer", ("torch.optim.AdamW", "torch.optim.SGD")),
        (["--trainer.precision", "bf16-mixed"], "trainer.precision", ("32", "bf16-mixed")),
    ],
)
def test_changed_settings_are_refused_by_name(stopped, part, capsys, options, name, values):
    line = fails(capsys, again(stopped, part, *options))
    assert name in line
    for value in values:
        assert value in line
    assert "--run.accept_changes" in line
    # Accepting something else does not help.
    other = fails(capsys, again(stopped, part, *options, "--run.accept_changes", "[trainer.max_steps]"))
    assert other == line


@pytest.mark.parametrize(
    "options",
    [
        ["--model.text.layers", "2"],
        ["--model.logit_bias", "true", "--model.loss", "dualenc.losses.siglip_loss"],
        ["--model.embed_dim", "8"],
        ["--model.init_scale", "5.0"],
    ],
)
def test_settings_that_no_resumed_run_can_use_are_refused_whatever_is_accepted(stopped, part, capsys, options):
    line = fails(capsys, again(stopped, part, *options, "--run.accept_changes", "[model]"))
    assert options[0].removeprefix("--") in line
    assert "start a new run" in line


def test_unknown_name_of_an_accepted_change_is_refused(stopped, part, capsys):
    line = fails(capsys, again(stopped, part, "--data.batch_size", "6", "--run.accept_changes", "[batch_size]"))
    assert "run.accept_changes names batch_size" in line


def test_paths_workers_and_the_run_section_may_change_without_a_word(stopped, part, tmp_path):
    """Shards at another place, with other workers and another monitor: the end is bit-equal."""
    whole = tmp_path / "whole"
    assert run(stopped[1], whole) == [0]
    shutil.copytree(stopped[0] / "shards", tmp_path / "moved")
    options = ["--data.train", str(tmp_path / "moved"), "--data.workers", "1", "--run.keep", "3", "--ckpt_path", "last"]
    assert run([*stopped[1], *options], part) == [0], (part / "log-0").read_text()
    assert "changed" not in (part / "log-0").read_text()
    assert logged(part) == logged(whole)
    assert end(part) == end(whole)


def test_checkpoint_of_an_older_version_has_no_settings_and_resumes(stopped, part):
    newest = list_checkpoints(part / "run" / "checkpoints")[0]
    content = read_checkpoint(newest)
    for name in ("settings", "optimizer"):
        del content[name]
    write_checkpoint(newest, content)
    options = ["--model.optimizer.lr", "0.004", "--model.optimizer.weight_decay", "0.03"]
    assert run([*stopped[1], *options, "--ckpt_path", "last"], part) == [0]
    # What is recorded is used.
    assert logged_rates(part)[7] == pytest.approx(rate(7, 0.004), rel=1e-12)
    assert {group["weight_decay"] for group in final_optimizer(part)["param_groups"]} == {0.03, 0.0}


@pytest.mark.parametrize(("size", "steps"), [(6, 6), (12, 3)])
def test_accepted_order_of_the_data(stopped, part, size, steps):
    """The run resumes at the beginning of the next epoch, with all of its samples; the schedule ends with the run."""
    rows = callbacks(("Rows", {"folder": str(part / "rows")}))
    change = ["--data.batch_size", str(size), "--run.accept_changes", "[data.batch_size]", *rows]
    change += ["--trainer.val_check_interval", "1.0"]
    assert run([*stopped[1], *change, "--ckpt_path", "last"], part) == [0], (part / "log-0").read_text()
    lines = [json.loads(line) for line in (part / "rows" / "0.jsonl").read_text().splitlines()]
    total = 6 + 2 * steps  # 6 steps, then two epochs
    assert [step for step, _ in lines] == list(range(7, total + 1))
    for epoch in (lines[:steps], lines[steps:]):
        seen = [row for _, rows in epoch for row in rows]
        assert len(set(seen)) == 36
    record = json.loads((part / "run" / "run.json").read_text())
    assert record["samples_seen"] == 6 * 4 + 2 * steps * size
    rates = logged_rates(part)
    for step in range(7, total + 1):
        assert rates[step] == pytest.approx(rate(step, 0.003, total=total), rel=1e-12)


def test_accepted_settings_of_the_optimizer_are_used_and_recorded(stopped, part):
    options = ["--model.optimizer.lr", "0.001", "--model.optimizer.weight_decay", "0.05"]
    options += ["--model.optimizer.betas", "[0.8,0.9]", "--model.text.dropout", "0.0"]
    accept = ["--run.accept_changes", "[model.optimizer,model.text.dropout]"]
    killed = [*stopped[1], *options, "--ckpt_path", "last", *callbacks(("Kill", {"step": 13}))]
    assert run([*killed, *accept], part) == [-9], (part / "log-0").read_text()
    # From here on these are the settings of the run, and need not be accepted again.
    assert run([*stopped[1], *options, "--ckpt_path", "last"], part) == [0], (part / "log-0").read_text()
    rates = logged_rates(part)
    for step in range(1, STEPS + 1):
        assert rates[step] == pytest.approx(rate(step, 0.003 if step <= 6 else 0.001), rel=1e-12)
    groups = final_optimizer(part)["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}
    assert {group["weight_decay"] for group in groups} == {0.05, 0.0}
    record = json.loads((part / "run" / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 6, 12]
    (change,) = record["changes"]
    assert change["step"] == 6
    assert change["settings"]["model.optimizer.lr"] == [0.003, 0.001]
    assert "model.text.dropout" in change["settings"]


def test_accepted_settings_give_the_run_that_a_changed_checkpoint_gives(stopped, part, tmp_path):
    """Betas that are accepted train as if the checkpoint had them, which is a reference without an accepted change."""
    other = tmp_path / "other"
    shutil.copytree(part / "run", other / "run")
    betas = ["--model.optimizer.betas", "[0.5,0.9]", "--ckpt_path", "last"]
    accept = ["--run.accept_changes", "[model.optimizer.betas]"]
    assert run([*stopped[1], *betas, *accept], part) == [0], (part / "log-0").read_text()
    newest = list_checkpoints(other / "run" / "checkpoints")[0]
    content = read_checkpoint(newest)
    for group in content["optimizer_states"][0]["param_groups"]:
        group["betas"] = (0.5, 0.9)
    content["settings"]["model"]["optimizer"]["betas"] = [0.5, 0.9]
    write_checkpoint(newest, content)
    assert run([*stopped[1], *betas], other) == [0], (other / "log-0").read_text()
    assert logged(part) == logged(other)
    ends = end(part), end(other)
    assert ends[0]["callbacks"]["RunDirectory"].pop("changes")
    assert not ends[1]["callbacks"]["RunDirectory"].pop("changes")
    assert ends[0] == ends[1]


def test_best_of_other_held_out_data_is_chosen_again(stopped, part):
    """The value of the checkpoint, of step 4, says nothing about the new data, which are first measured at step 8."""
    before = json.loads((part / "run" / "run.json").read_text())["best"]
    assert before["step"] == 4
    change = ["--data.val", str(stopped[0] / "shards"), "--run.accept_changes", "[data.val]", "--ckpt_path", "last"]
    assert run([*stopped[1], *change, *callbacks(("Kill", {"step": 7}))], part) == [-9], (part / "log-0").read_text()
    assert json.loads((part / "run" / "run.json").read_text())["best"] is None
    assert run([*stopped[1], *change], part) == [0], (part / "log-0").read_text()
    assert json.loads((part / "run" / "run.json").read_text())["best"]["step"] >= 8


def test_more_epochs_continue_on_the_curve_of_the_longer_run(stopped, tmp_path, capsys):
    assert run(stopped[1], tmp_path) == [0]
    longer = ["--trainer.max_epochs", "5", "--ckpt_path", "last"]
    assert "trainer.max_epochs 3, this one has 5" in fails(
        capsys, [*stopped[1], "--trainer.default_root_dir", str(tmp_path / "run"), *longer]
    )
    assert run([*stopped[1], *longer, "--run.accept_changes", "[trainer.max_epochs]"], tmp_path) == [0]
    rates = logged_rates(tmp_path)
    for step in range(1, 46):
        assert rates[step] == pytest.approx(rate(step, 0.003, total=STEPS if step <= STEPS else 45), rel=1e-12)
    # The run is done, so it changes nothing more, whatever is accepted.
    assert run([*stopped[1], *longer, "--run.accept_changes", "[trainer.max_epochs]"], tmp_path) == [0]
    assert "was done already" in (tmp_path / "log-0").read_text()


def test_accepted_optimizer_of_another_class_starts_without_a_state(stopped, part):
    options = [
        "--model.optimizer",
        "torch.optim.SGD",
        "--model.optimizer.lr",
        "0.01",
        "--model.optimizer.momentum",
        "0.9",
    ]
    accept = ["--run.accept_changes", "[model.optimizer]", "--ckpt_path", "last"]
    assert run([*stopped[1], *options, *accept], part) == [0], (part / "log-0").read_text()
    state = final_optimizer(part)
    assert {name for one in state["state"].values() for name in one} == {"momentum_buffer"}
    assert logged_rates(part)[STEPS] == pytest.approx(rate(STEPS, 0.01), rel=1e-12)


def test_accepted_tuning_keeps_the_state_of_each_parameter(stopped, part):
    """Other parameter groups: AdamW counts the steps of each parameter, so a state that moved to another one shows."""
    options = ["--model.image_tuning.layer_decay", "0.5", "--model.text_tuning.locked", "true", "--ckpt_path", "last"]
    assert run([*stopped[1], *options, "--run.accept_changes", "[model]"], part) == [0], (part / "log-0").read_text()
    newest = list_checkpoints(part / "run" / "checkpoints")[0]
    content = read_checkpoint(newest)
    names, state = content["optimizer"]["parameters"], content["optimizer_states"][0]["state"]
    assert {float(one["step"]) for one in state.values()} == {float(STEPS)}
    for number, name in enumerate(names):
        assert not name.startswith("model.text."), name
        assert state[number]["exp_avg"].shape == content["state_dict"][name].shape
    assert "without a state" not in (part / "log-0").read_text()


def test_unlocked_layers_start_without_a_state(stopped, tmp_path):
    locked = [*stopped[1], "--model.image_tuning.locked", "true"]
    assert run([*locked, *callbacks(("Kill", {"step": 7}))], tmp_path) == [-9]
    accept = ["--run.accept_changes", "[model.image_tuning]", "--ckpt_path", "last"]
    assert run([*stopped[1], *accept], tmp_path) == [0], (tmp_path / "log-0").read_text()
    content = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[0])
    for number, name in enumerate(content["optimizer"]["parameters"]):
        steps = STEPS - 6 if name.startswith("model.image.") else STEPS
        assert float(content["optimizer_states"][0]["state"][number]["step"]) == steps, name


def test_optimizer_of_the_same_class_keeps_its_state_whatever_names_it(stopped, part):
    """The configuration names a class, this command a function that returns an object of it."""
    change = ["--model.optimizer", "dualenc.training.contrastive.adamw", "--ckpt_path", "last"]
    assert run([*stopped[1], *change, "--run.accept_changes", "[model.optimizer]"], part) == [0]
    assert {float(one["step"]) for one in final_optimizer(part)["state"].values()} == {float(STEPS)}
    assert "without a state" not in (part / "log-0").read_text()


def test_longer_run_of_limited_epochs_ends_at_rate_zero(stopped, tmp_path):
    """Epochs of 3 of the 9 batches: the data are not passed over as often as there are epochs."""
    limit = [*stopped[1], "--trainer.limit_train_batches", "3", "--trainer.val_check_interval", "3"]
    assert run([*limit, *callbacks(("Kill", {"step": 5}))], tmp_path) == [-9]
    longer = ["--trainer.max_epochs", "5", "--run.accept_changes", "[trainer.max_epochs]", "--ckpt_path", "last"]
    assert run([*limit, *longer], tmp_path) == [0], (tmp_path / "log-0").read_text()
    rates = logged_rates(tmp_path)
    assert max(rates) == 15
    for step in range(5, 16):
        assert rates[step] == pytest.approx(rate(step, 0.003, total=15), rel=1e-12)


def test_rates_of_another_schedule_cannot_change(stopped, tmp_path, capsys):
    straight = ["--model.scheduler", "torch.optim.lr_scheduler.PolynomialLR"]
    assert run([*stopped[1], *straight, *callbacks(("Kill", {"step": 5}))], tmp_path) == [-9]
    root = ["--trainer.default_root_dir", str(tmp_path / "run"), "--ckpt_path", "last"]
    change = ["--model.optimizer.lr", "0.001", "--run.accept_changes", "[model.optimizer.lr]"]
    line = fails(capsys, [*stopped[1], *straight, *root, *change])
    assert "model.optimizer.lr" in line
    assert "WarmupCosine" in line


def test_two_ranks_refuse_and_accept_together(stopped, tmp_path):
    assert run([*stopped[1], *callbacks(("Kill", {"step": 7, "rank": 1}))], tmp_path, 2) != [0, 0]
    change = [*stopped[1], "--model.optimizer.lr", "0.001", "--ckpt_path", "last"]
    for process in begin(change, tmp_path, 2):
        assert process.wait() == 2, process.text()
        assert "Traceback" not in process.text()
    assert run([*change, "--run.accept_changes", "[model.optimizer.lr]"], tmp_path, 2) == [0, 0]
    assert logged_rates(tmp_path)[STEPS] == pytest.approx(rate(STEPS, 0.001), rel=1e-12)


# The comparison by itself


def config(seed):
    rng = torch.Generator().manual_seed(seed)
    number = float(torch.rand((), generator=rng))
    return {
        "seed_everything": seed,
        "model": {
            "class_path": "dualenc.training.ContrastiveTask",
            "init_args": {
                "image": {"name": "vit", "overrides": {"depth": 2}},
                "loss": "dualenc.losses.clip_loss",
                "pretrained": False,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": number, "betas": [0.9, 0.98]}},
            },
        },
        "data": {"class_path": "dualenc.training.PairData", "init_args": {"train": "a", "workers": 2, "window": 3}},
        "trainer": {
            "precision": "32-true",
            "devices": 1,
            "callbacks": [{"class_path": "dualenc.training.EMA", "init_args": {"decay": 0.9}}],
        },
    }


def changed(settings, keys, value):
    *parents, last = keys
    copy = json.loads(json.dumps(settings))
    found = copy
    for key in parents:
        found = found[key]
    found[last] = value
    return copy


@pytest.mark.parametrize(
    ("keys", "value", "name"),
    [
        (("model", "init_args", "optimizer", "init_args", "betas"), [0.9, 0.9], "model.optimizer.betas"),
        (("model", "init_args", "image", "overrides"), {"depth": 2, "drop_path_rate": 0.1}, "model.image.overrides"),
        (("model", "init_args", "image"), None, "model.image"),
        (("model", "init_args", "loss"), "my.loss", "model.loss"),
        (("model", "init_args", "optimizer"), "my.adamw", "model.optimizer"),
        (("data", "class_path"), "my.Data", "data"),
        (("trainer", "max_epochs"), 7, "trainer.max_epochs"),
        (("trainer", "callbacks"), [], "trainer.callbacks"),
        (("model", "init_args", "pretrained"), "vit.safetensors", None),
        (("data", "init_args", "train"), "b", None),
        (("data", "init_args", "workers"), 7, None),
        (("trainer", "devices"), 8, None),
    ],
)
def test_compared_settings(seed, keys, value, name):
    before, after = (
        compared_settings(config(seed), TRAINER),
        compared_settings(changed(config(seed), keys, value), TRAINER),
    )
    found = find_changes(before, after, {})
    assert [key for key in found if not (name and key.startswith(name))] == []
    assert bool(found) == (name is not None)
    assert find_changes(before, before, {}) == find_changes({}, after, {}) == {}
    # A version with more options does not refuse the run of a version without them.
    older = {**before, "dualenc": "0.0.1"}
    newer = {**before, "data": {**before["data"], "new_option": 3}}
    assert find_changes(older, newer, {}) == {}
    assert list(find_changes(before, newer, {})) == ["data.new_option"]


def test_names_of_accepted_changes_cover_what_is_below_them(seed):
    settings = compared_settings(config(seed), TRAINER)
    changes = {"model.optimizer.lr": (1, 2), "model.optimizer.betas": (3, 4)}
    check_changes(changes, ["model.optimizer"], settings, "")
    with pytest.raises(ValueError, match=r"model\.optimizer\.betas 3, this one has 4"):
        check_changes(changes, ["model.optimizer.lr"], settings, "")
