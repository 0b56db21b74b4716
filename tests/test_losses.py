import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dualenc.losses import clip_loss, siglip_loss

BATCH, DIM, FEATURES = 12, 8, 6
LOSSES = {"clip": clip_loss, "siglip": siglip_loss}


def reference(name):
    from open_clip.loss import ClipLoss, SigLipLoss

    return {"clip": ClipLoss, "siglip": SigLipLoss}[name]()


def inputs(dtype=torch.float64, count=BATCH):
    image, text = (F.normalize(torch.randn(count, DIM, dtype=dtype), dim=1) for _ in range(2))
    scale, bias = 5 + 10 * torch.rand(1, dtype=dtype), -5 * torch.rand(1, dtype=dtype)
    return [x.requires_grad_() for x in (image, text, scale, bias)]


def evaluate(loss, arguments, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # around the forward alone, as torch says
        value = loss(*arguments)
    return [value.detach(), *torch.autograd.grad(value, arguments, materialize_grads=True)]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_open_clip(name, shape):
    image, text, scale, bias = inputs()
    arguments = [image, text, *(x.detach().reshape(shape).requires_grad_() for x in (scale, bias))]
    got, want = evaluate(LOSSES[name], arguments), evaluate(reference(name), arguments)
    assert got[0].shape == ()
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    assert abs(evaluate(LOSSES[name], [image, text.roll(1, 0), *arguments[2:]])[0] - want[0]) > 1e-4  # control


@pytest.mark.parametrize("name", LOSSES)
def test_single_precision(name):
    arguments = inputs(torch.float32, count=64)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    for x, y in zip(evaluate(LOSSES[name], arguments), evaluate(reference(name), exact), strict=True):
        assert x.dtype == torch.float32
        # A softmax does not see the bias: what is left of its gradient is rounding, about 0.
        assert (x.double() - y).norm() <= 1e-5 * y.norm() + 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name):
    arguments = inputs(torch.float32)
    want = evaluate(LOSSES[name], arguments)
    got = evaluate(LOSSES[name], arguments, autocast=True)
    plain = evaluate(reference(name), arguments, autocast=True)
    assert all(map(torch.equal, got, want))
    assert not any(map(torch.equal, plain[:3], want[:3]))  # control: autocast is at work


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_embeddings_are_computed_wide(name):
    image, text, scale, bias = inputs(torch.float32)
    narrow = [x.detach().bfloat16() for x in (image, text)]
    got = LOSSES[name](*narrow, scale, bias)
    assert got.dtype == torch.float32
    assert torch.equal(got, LOSSES[name](*(x.float() for x in narrow), scale, bias))


def test_clip_takes_a_bias_and_ignores_it():
    image, text, scale, bias = inputs()
    assert torch.equal(clip_loss(image, text, scale, bias), clip_loss(image, text, scale))


def test_siglip_needs_a_bias():
    image, text, scale, _ = inputs()
    with pytest.raises(ValueError, match="logit_bias"):
        siglip_loss(image, text, scale)


@pytest.mark.parametrize("count", [1024, 1025, 2048 + 317])
@pytest.mark.parametrize("name", LOSSES)
def test_many_rows_equal_the_dense_matrix(name, count):
    """More rows than are computed at a time, and rows that fill the last block or are its only one."""
    arguments = inputs(count=count)
    image, text, scale, bias = arguments
    got = evaluate(LOSSES[name], arguments)
    logits = scale * image @ text.T
    if name == "clip":
        own = logits.diagonal()
        dense = (logits.logsumexp(0) + logits.logsumexp(1) - 2 * own).sum() / (2 * count)
    else:
        dense = -F.logsigmoid((2 * torch.eye(count, dtype=torch.float64) - 1) * (logits + bias)).sum() / count
    want = [dense.detach(), *torch.autograd.grad(dense, arguments, materialize_grads=True)]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(LOSSES[name](*arguments), want[0], rtol=1e-10, atol=1e-10)
        assert abs(LOSSES[name](image, text.roll(1, 0), scale, bias) - want[0]) > 1e-4  # control


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("name", LOSSES)
def test_without_gradients_no_square_is_held(name):
    count = 6000
    arguments = [x.detach() for x in inputs(torch.float32, count)]
    with torch.no_grad(), Largest() as ours:
        LOSSES[name](*arguments)
    with torch.no_grad(), Largest() as plain:
        reference(name)(*arguments)
    assert plain.elements == count * count  # control: the mode sees it
    assert ours.elements <= count * count / 5


# Several processes: this file again, as a program that forks into its ranks (one import of torch for all of them).


class Towers(nn.Module):
    """Two small towers with the scale and, where the loss uses it, the bias: parameters like the others."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(FEATURES, 10), nn.GELU(), nn.Linear(10, DIM))
        self.text = nn.Linear(FEATURES, DIM)
        self.scale = nn.Parameter(torch.tensor([7.0]))
        self.bias = nn.Parameter(torch.tensor([-3.0])) if bias else None

    def forward(self, x, y):
        # Views, as a model gives them: DDP must see these parameters used in its forward.
        bias = None if self.bias is None else self.bias.view(1)
        return F.normalize(self.image(x), dim=1), F.normalize(self.text(y), dim=1), self.scale.view(1), bias


def rank_main(folder, rank, world):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    saved, results = torch.load(f"{folder}/inputs.pt", weights_only=True), {}
    x, y = (saved[key].chunk(world)[rank] for key in "xy")
    for name, loss in LOSSES.items():
        for grouped in (True, False):
            model = Towers(name == "siglip").double()
            model.load_state_dict(saved[name])
            model = DistributedDataParallel(model)
            value = loss(*model(x, y), group=dist.group.WORLD if grouped else None)
            value.backward()
            grads = {key: parameter.grad for key, parameter in model.module.named_parameters()}
            results[f"{name} {'grouped' if grouped else 'alone'}"] = {"loss": value.detach(), **grads}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_split_batch_equals_whole_batch(world, tmp_path):
    x, y = torch.randn(2, BATCH, FEATURES, dtype=torch.float64)
    models = {name: Towers(name == "siglip").double() for name in LOSSES}
    with torch.no_grad():
        for model in models.values():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"x": x, "y": y, **{name: model.state_dict() for name, model in models.items()}}, tmp_path / "inputs.pt")

    command = [sys.executable, __file__, str(tmp_path), str(world)]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]

    for name, model in models.items():
        value = reference(name)(*model(x, y))  # open_clip, one process, the whole batch
        value.backward()
        want = {"loss": value.detach(), **{key: parameter.grad for key, parameter in model.named_parameters()}}
        assert want["scale"].abs() > 1e-6
        for result in results:
            got = result[f"{name} grouped"]
            assert got.keys() == want.keys()
            for key in want:
                label = f"{name} {key}: "
                torch.testing.assert_close(
                    got[key], want[key], rtol=1e-10, atol=1e-10, msg=lambda m, label=label: label + m
                )
            alone = result[f"{name} alone"]  # control: each rank for itself
            for key in want:
                assert (alone[key] - want[key]).abs().max() > 1e-6, f"{name} {key}"


if __name__ == "__main__":
    folder, world = sys.argv[1], int(sys.argv[2])
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank_main, args=(folder, rank, world), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    sys.exit(any(process.exitcode != 0 for process in ranks))
