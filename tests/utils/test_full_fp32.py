"""Products in full fp32 in losses and ranks, whatever switch of torch asks for less, and the switches afterwards."""

import pytest
import torch
import torch.nn.functional as F
from fits import SMOKE, small_fit
from torch.utils._python_dispatch import TorchDispatchMode

from dualenc import clip_loss, match_ranks, siglip_loss
from dualenc.metrics.ranking import nearest
from dualenc.metrics.retrieval import retrieval_metrics
from dualenc.utils.precision import full_fp32

CPU = torch.device("cpu")
MATMUL = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def legacy(value):
    return lambda: torch.set_float32_matmul_precision(value)


def switch(owner, value):
    return lambda: setattr(owner, "fp32_precision", value)


def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


def both():
    torch.set_float32_matmul_precision("medium")
    torch.backends.fp32_precision = "tf32"


SWITCHES = {
    "none": lambda: None,
    "high": legacy("high"),
    "medium": legacy("medium"),
    "allow_tf32": allow_tf32,
    "cuda.matmul": switch(torch.backends.cuda.matmul, "tf32"),
    "mkldnn.matmul": switch(torch.backends.mkldnn.matmul, "bf16"),
    "all": switch(torch.backends, "tf32"),
    "both": both,
}


def state():
    """Return all switches of torch that say something about matrix products, and what reading the older ones gives."""
    found = [owner.fp32_precision for owner in (torch.backends, torch.backends.cudnn, torch.backends.mkldnn, *MATMUL)]
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:  # Torch refuses to answer where a newer switch says something else.
            found.append("refused")
    return found


@pytest.fixture(autouse=True)
def restored():
    before = state()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    for owner in MATMUL:
        owner.fp32_precision = "none"
    assert state() == before


class Products(TorchDispatchMode):
    """A mode that records the precision of each product of matrices in fp32."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__ and args[0].dtype == torch.float32:
            self.seen.append(tuple(owner.fp32_precision for owner in MATMUL))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SWITCHES)
def test_the_switches_are_overridden_and_restored(name):
    SWITCHES[name]()
    before = state()
    with torch.autocast("cpu", torch.bfloat16), full_fp32(CPU):
        assert [owner.fp32_precision for owner in MATMUL] == ["ieee", "ieee"]
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert state() == before
    with pytest.raises(KeyError), full_fp32(CPU):
        raise KeyError
    assert state() == before
    with full_fp32(CPU), full_fp32(CPU):  # nested, as a loss in a validation
        pass
    assert state() == before


def test_a_switch_that_follows_the_general_one_still_does():
    torch.backends.fp32_precision = "tf32"
    with full_fp32(CPU):
        pass
    torch.backends.fp32_precision = "ieee"
    assert [owner.fp32_precision for owner in MATMUL] == ["ieee", "ieee"]


def fails(function, *arguments):
    with pytest.raises((RuntimeError, ValueError)):
        function(*arguments)


def draw(count):
    return [F.normalize(torch.randn(count, 16), dim=1).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_losses(name, loss):
    image, text, scale, bias = *draw(12), torch.tensor([20.0]), torch.tensor([-5.0])
    want = torch.autograd.grad(loss(image, text, scale, bias), (image, text))
    SWITCHES[name]()
    before = state()
    with Products() as products:
        got = torch.autograd.grad(loss(image, text, scale, bias), (image, text))
    assert all(map(torch.equal, got, want))
    assert len(products.seen) >= 3
    assert set(products.seen) == {("ieee", "ieee")}
    assert state() == before
    fails(loss, image, text[:, :3], scale, bias)
    assert state() == before


@pytest.mark.parametrize("name", SWITCHES)
def test_ranks(name):
    with torch.no_grad():
        image, text = draw(40)
    positives = torch.arange(40)
    scores = image.double() @ text.double().T
    SWITCHES[name]()
    before = state()
    with Products() as products:
        assert torch.equal(match_ranks(image, text, positives), (scores > scores.diagonal()[:, None]).sum(1))
        assert torch.equal(nearest(image, text, 5)[0], scores.topk(5).indices)
        found = retrieval_metrics(image, text, positives, replicates=0).metrics
    assert found["median_rank"] >= 1
    assert len(products.seen) >= 3
    assert set(products.seen) == {("ieee", "ieee")}
    assert state() == before
    fails(match_ranks, image, text, positives + 1)
    assert state() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["high", "cuda.matmul"])
def test_a_fit_with_validation(tmp_path, seed, name):
    SWITCHES[name]()
    before = state()
    run = small_fit(SMOKE, tmp_path, seed, "--trainer.max_steps", "4")
    assert "val/mrr" in (run / "metrics.csv").read_text()
    assert state() == before
