"""Half precision: refused where weights would be kept in it, and clipped rightly where gradients are scaled."""

import pytest
import torch
from fits import fails, fit
from helpers import write_shards

from dualenc.training.optim import clip_gradients


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_in_half_precision_are_refused(tmp_path, seed, capsys, precision):
    write_shards(tmp_path / "shards", [20, 15], seed)
    line = fails(capsys, fit(tmp_path, "--trainer.precision", precision))
    assert f"trainer.precision {precision}" in line
    assert "bf16-mixed" in line


def test_bf16_cannot_hold_the_updates_that_are_refused():
    """The reason for the refusal: a gain of 1 and steps of 1e-3."""
    gain = torch.ones(3, dtype=torch.bfloat16)
    for _ in range(100):
        gain -= 1e-3
    assert torch.equal(gain, torch.ones(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("limit", [0.3, 1e6, None])
def test_clipped_gradients_are_those_of_torch(seed, algorithm, scale, limit):
    """Scaled gradients are clipped as if they were not scaled, and stay scaled."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (5,), (), (3, 2, 2)]
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    own, reference = ([torch.nn.Parameter(torch.zeros_like(x)) for x in gradients] for _ in range(2))
    for parameter, gradient in zip(own, gradients):
        parameter.grad = gradient * (scale or 1.0)
    for parameter, gradient in zip(reference, gradients):
        parameter.grad = gradient.clone()
    norm = clip_gradients([*own, torch.nn.Parameter(torch.zeros(2))], limit, algorithm, scale and torch.tensor(scale))
    expected = torch.nn.utils.get_total_norm(gradients)
    if limit is not None and algorithm == "value":
        torch.nn.utils.clip_grad_value_(reference, limit)
    elif limit is not None:
        torch.nn.utils.clip_grad_norm_(reference, limit)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for parameter, other in zip(own, reference):
        assert parameter.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(parameter.grad / (scale or 1.0), other.grad, rtol=1e-12, atol=0)


def test_fused_optimizer_under_a_gradient_scaler_takes_the_step_of_clipped_gradients(seed):
    """A real scaler and a fused AdamW, against a plain AdamW on gradients that torch clips."""
    generator = torch.Generator().manual_seed(seed)
    weights, gradient = (torch.randn(6, 4, generator=generator) for _ in range(2))
    own, reference = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.clone())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fused = torch.optim.AdamW([own], lr=0.1, fused=True)
    scaler.scale((own * gradient).sum()).backward()
    clip_gradients([own], 0.5, "norm", scaler._scale)
    scaler.step(fused)
    reference.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([reference], 0.5)
    torch.optim.AdamW([reference], lr=0.1).step()
    torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-6)
    scaler.update()
    # Non-finite gradients stay non-finite, so that the scaler skips the step.
    before = own.detach().clone()
    own.grad = torch.full_like(own, float("inf"))
    clip_gradients([own], 0.5, "norm", scaler._scale)
    scaler.step(fused)
    assert torch.equal(own, before)
