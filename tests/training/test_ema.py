"""The average of the weights: its formula, where it is used, and that the trained weights are restored."""

import json
from types import SimpleNamespace

import pytest
import torch
from fits import SMOKE, small_fit
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import dualenc.training.ema as ema_module
from dualenc.training import EMA
from dualenc.training.checkpoint import list_checkpoints, read_checkpoint


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_average_equals_the_formula(seed, dtype, decay):
    """Compare with the definition in float64: skipped steps do not count, half precision is averaged in fp32."""
    module = torch.nn.Linear(7, 5).to(dtype)
    ema, trainer = EMA(decay), SimpleNamespace(global_step=0, callbacks=[])
    ema.on_train_start(trainer, module)
    expected = {name: p.detach().double().clone() for name, p in module.named_parameters()}
    for step in range(1, 30):
        previous = {name: average.clone() for name, average in ema.average.items()}
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        trainer.global_step, module.skip = step, torch.tensor(step % 7 == 0)
        ema.on_train_batch_end(trainer, module, None, None, 0)
        assert (step % 7 == 0) == all(torch.equal(ema.average[name], previous[name]) for name in previous)
        if step % 7:
            d = min(decay, (1 + step) / (10 + step))
            for name, p in module.named_parameters():
                expected[name] = d * expected[name] + (1 - d) * p.detach().double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name, average in ema.average.items():
        assert average.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(average.double(), expected[name], rtol=tolerance, atol=tolerance)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with ema.applied(module):
        assert all(torch.equal(p, ema.average[name].to(dtype)) for name, p in module.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


class Operations(TorchDispatchMode):
    """A mode that records operations, and how many elements each of them returns or changes in lists."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func).removeprefix("aten.").split(".")[0])
        if isinstance(out, list | tuple):
            self.largest = max(self.largest, sum(x.numel() for x in out))
        return out


@pytest.mark.parametrize("skipped", [False, None])
def test_a_step_takes_a_few_operations_on_lists_of_bounded_size(seed, monkeypatch, skipped):
    """Not one for each tensor; the tensors are of all sizes, also larger than a list may be."""
    monkeypatch.setattr(ema_module, "PART", 500)
    sizes = [*torch.randint(1, 200, (30,)).tolist(), 700, 1, 650]
    module = torch.nn.ParameterList(torch.randn(size) for size in sizes)
    ema, trainer = EMA(0.9), SimpleNamespace(global_step=100, callbacks=[])
    ema.on_train_start(trainer, module)
    expected = [0.9 * p.detach() for p in module]
    with torch.no_grad():
        for p, value in zip(module, expected):
            p.add_(torch.randn_like(p))
            value += 0.1 * p
    module.skip = None if skipped is None else torch.tensor(skipped)
    with Operations() as seen:
        ema.on_train_batch_end(trainer, module, None, None, 0)
    torch.testing.assert_close(list(ema.average.values()), expected)
    lists = [name for name in seen.names if name.startswith("_foreach")]
    parts = len(lists) // 3
    assert lists == ["_foreach_sub", "_foreach_mul_", "_foreach_add_"] * parts
    assert sum(sizes) / 500 <= parts < 2 * sum(sizes) / 500 + 2
    assert len([name for name in seen.names if name != "detach"]) <= len(lists) + 5
    assert seen.largest <= 700


@pytest.mark.slow
@pytest.mark.parametrize("evaluate", [True, False])
def test_saved_models_have_the_average_if_evaluate(tmp_path, seed, evaluate):
    callback = [{"class_path": "dualenc.training.EMA", "init_args": {"decay": 0.9, "evaluate": evaluate}}]
    run = small_fit(SMOKE, tmp_path, seed, "--trainer.callbacks", json.dumps(callback))
    content = read_checkpoint(list_checkpoints(run / "checkpoints")[0])
    weights = {name.removeprefix("model."): x for name, x in content["state_dict"].items()}
    average = {name.removeprefix("model."): x for name, x in content["callbacks"]["EMA"]["average"].items()}
    saved = load_file(run / "last" / "model.safetensors")
    expected, other = (average, weights) if evaluate else (weights, average)
    assert all(torch.equal(saved[name], x) for name, x in expected.items())
    assert not all(torch.equal(saved[name], x) for name, x in other.items())


def test_decay_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="decay 1"):
        EMA(1)
