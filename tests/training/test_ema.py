"""The average of the weights: its formula, where it is used, and that the trained weights are restored."""

import json
from types import SimpleNamespace

import pytest
import torch
from fits import SMOKE, small_fit
from safetensors.torch import load_file

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
