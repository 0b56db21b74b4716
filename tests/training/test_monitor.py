"""The monitored metric: known before the first step, and never replaced by a value that is not finite."""

import json
import math

import pytest
import torch
from fits import SMOKE, TEXTS, fails, fit, small_fit, small_texts
from helpers import tiny_embedder, write_benchmark, write_choices, write_shards
from lightning.pytorch import Callback

from dualenc.cli import main
from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet
from dualenc.evaluation import KINDS
from dualenc.hub.card import measured_in_training
from dualenc.training import RunDirectory
from dualenc.training.checkpoint import RunState, list_checkpoints, read_checkpoint

NOT_FINITE = [math.nan, math.inf, -math.inf]


def logged(run):
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    return {name for _, name, _ in lines if not name.startswith("train/")}


class Known(Callback):
    """Callback that keeps the names that the task declares."""

    names: set[str] | None = None

    def on_train_start(self, trainer, module):
        Known.names = set(module.metric_names())


KNOWN = {"class_path": "test_monitor.Known"}


def test_names_of_held_out_pairs_are_those_that_are_measured(tmp_path, seed):
    sets = tmp_path / "set"
    run = small_fit(SMOKE, tmp_path, seed, "--trainer.callbacks+", json.dumps(KNOWN))
    assert sets.exists()
    assert {name for name in logged(run) if name.startswith("val/")} == Known.names


@pytest.mark.parametrize("config", TEXTS, ids=lambda path: path.stem)
def test_names_of_heads_are_those_that_are_measured(tmp_path, seed, config, monkeypatch):
    import fits

    real = fits.yaml.safe_load

    def with_callback(text):
        settings = real(text)
        settings["trainer"].setdefault("callbacks", []).append(KNOWN)
        return settings

    monkeypatch.setattr(fits.yaml, "safe_load", with_callback)
    run = small_texts(config, tmp_path, seed)
    assert {name for name in logged(run) if name.startswith("val/")} == Known.names


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_names_of_evaluation_kinds_are_those_that_are_measured(tmp_path, seed, kind):
    one = KINDS[kind]
    source = tmp_path / "set"
    if one.sets[0] == "choice":
        write_choices(source, seed)
    else:
        write_benchmark(source, seed, one.sets[0])
    embedder = tiny_embedder(seed)
    if kind == "probe":
        write_benchmark(tmp_path / "set", seed + 1, one.sets[0], split="train")
    data = one.prepare(BenchmarkSet.open(source), source)
    before = torch.get_rng_state()
    names = one.metric_names(data, embedder)
    assert torch.equal(before, torch.get_rng_state())
    assert names == list(one.evaluate(embedder, data).section.result["metrics"])


def test_monitor_that_is_never_measured_is_refused_before_the_first_step(tmp_path, seed, capsys):
    write_shards(tmp_path / "shards", [20, 15], seed)
    line = fails(capsys, fit(tmp_path, "--run.monitor", "val/mr"))
    assert "run.monitor val/mr is never measured: did you mean val/mrr?" in line
    assert "val/mrr" in line
    assert not (tmp_path / "run" / "run.json").exists()
    sets = write_benchmark(tmp_path / "set", seed, "retrieval")
    evaluation = json.dumps([{"class_path": "dualenc.training.Evaluation", "init_args": {"data": [str(sets)]}}])
    for monitor in ("set/mr", "other/mrr"):
        line = fails(capsys, fit(tmp_path, "--run.monitor", monitor, "--trainer.callbacks", evaluation))
        assert f"run.monitor {monitor} is never measured" in line
        assert "set/mrr" in line
    line = fails(capsys, fit(tmp_path, "--run.monitor", "val/acc1", "--data.val", "null"))
    assert "measures nothing" in line


def test_run_without_a_monitor_has_no_best(tmp_path, seed, capsys):
    write_shards(tmp_path / "shards", [20, 15], seed)
    main(fit(tmp_path, "--run.monitor", "null", "--trainer.max_steps", "3"))
    assert "best/ is missing, since run.monitor is null" in capsys.readouterr().err
    assert (tmp_path / "run" / "last").exists()
    assert not (tmp_path / "run" / "best").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["best"] is None


class Spoil(Callback):
    """Callback that gives the monitored metric a value after some steps."""

    def __init__(self, values: dict[str, str]) -> None:
        self.values = {int(step): float(value) for step, value in values.items()}

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step in self.values:
            module.publish({"val/mrr": self.values[trainer.global_step]})


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_value_that_is_not_finite_never_becomes_the_best(tmp_path, seed, bad):
    write_shards(tmp_path / "shards", [20, 15], seed)
    values = {"2": "0.5", "3": "0.869", "4": str(bad), "5": "0.4"}
    spoil = json.dumps([{"class_path": "test_monitor.Spoil", "init_args": {"values": values}}])
    main(fit(tmp_path, "--trainer.callbacks", spoil, "--trainer.max_steps", "6", "--trainer.limit_val_batches", "0",
             "--run.every_n_steps", "3", "--run.keep", "9"))  # fmt: skip
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["best"] == {"metric": "val/mrr", "value": 0.869, "step": 3}
    step, found = measured_in_training(run, "best")
    assert (step, found["val/mrr"]) == (3, 0.869)
    # The folder holds the weights of that step.
    from dualenc import load

    content = read_checkpoint(next(path for path in list_checkpoints(run / "checkpoints") if path.stem.endswith("3")))
    for name, weight in load(str(run / "best"), "cpu").dual_encoder.state_dict().items():
        assert torch.equal(weight, content["state_dict"][f"model.{name}"]), name


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_best_value_of_a_checkpoint_that_is_not_finite_counts_for_nothing(bad):
    directory = RunDirectory()
    directory.load_state_dict({"best_value": bad, "samples": 3, "metrics": {}})
    assert directory._state.best is None
    assert directory._state.is_better(-5.0)


def test_best_value_of_another_metric_counts_for_nothing():
    directory = RunDirectory(monitor="set/acc1")
    saved = {"best_value": 0.9, "best_step": 4, "samples": 3, "metrics": {}}
    directory.load_state_dict({"monitor": "val/mrr", **saved})
    assert directory._state.best is None
    directory.load_state_dict({"monitor": "set/acc1", **saved})
    assert directory._state.best_value == 0.9


def test_comparison_of_metrics():
    state = RunState()
    assert not any(map(state.is_better, NOT_FINITE))
    assert state.is_better(-1.0)
    state.best_value = 0.25
    assert state.is_better(0.5)
    assert not any(map(state.is_better, [*NOT_FINITE, 0.25, 0.0]))
