"""Compiled blocks: one graph for all shapes, without a break, equal to the plain blocks, under the same names."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import SIZE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import dualenc.models.tower as tower
from dualenc.models import DualEncoder, ImageConfig, TextConfig, embed_micro_batches
from dualenc.tokens import Tokens

# Torch looks at the gradients of its own fake tensors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "clip": {"norm": "pre", "pool": "last", "causal": True},
    "bert": {"types": 2},
    "modernbert": {
        "positions": "rotary", "window": 4, "global_every": 2, "gated": True, "bias": False, "embed_norm": True,
        "norm": "pre",
    },
}  # fmt: skip


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Yield a counter of the compiled graphs; autograd is traced, and no machine code is made."""
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    real = torch.compile
    monkeypatch.setattr(tower.torch, "compile", lambda model, **how: real(model, **{**how, "backend": counter}))
    yield counter
    torch._dynamo.reset()


def model_of(family: str = "clip", dropout: float = 0.0, stochastic_depth: float = 0.0) -> DualEncoder:
    """Return a model whose parameters are all perturbed."""
    text = TextConfig(60, width=16, layers=3, heads=2, context_length=24, dropout=dropout, **FAMILIES[family])
    image = ImageConfig("vit_tiny_patch16_224", SIZE, {**VIT, "drop_path_rate": stochastic_depth})
    model = DualEncoder(image, text, embed_dim=8, patch_dropout=dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def pairs_of(number: int, longest: int) -> tuple[Tensor, Tokens]:
    texts = [torch.randint(60, (int(n),)).tolist() for n in torch.randint(1, longest, (number,))]
    return torch.randn(number, 3, SIZE, SIZE), Tokens.pack([*texts[1:], [1] * longest])


def gradients_of(model: Any, *micro_batches: tuple[Tensor, Tokens]) -> dict[str, Tensor]:
    model.zero_grad()
    out = embed_micro_batches(model, micro_batches)
    (out.image @ out.text.T).square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"image": out.image.detach(), "text": out.text.detach(), **found}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_serves_all_shapes(graphs: CompileCounterWithBackend, family: str, seed: int) -> None:
    """Dropout, patch dropout and stochastic depth, whose rates differ between the blocks, are on."""
    model = model_of(family, dropout=0.1, stochastic_depth=0.2)
    names = list(model.state_dict())
    tower.compile_blocks(model)
    gradients_of(model, pairs_of(6, 9))
    first = graphs.frame_count
    assert first
    shapes = ((3, 12), (8, 24), (5, 7), (11, 18))
    for number, longest in shapes:
        gradients_of(model, pairs_of(number, longest))
    assert graphs.frame_count == first
    gradients_of(model, pairs_of(4, 8), pairs_of(3, 11))
    first = graphs.frame_count  # Micro-batches have other settings of autocast.
    for number, longest in shapes:
        gradients_of(model, pairs_of(number, longest), pairs_of(number + 1, longest))
    assert graphs.frame_count == first
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names
    model.eval()
    with torch.no_grad():
        model(*pairs_of(7, 13))
    assert graphs.frame_count == first  # evaluation runs the plain blocks


@pytest.mark.long
def test_equals_the_plain_blocks(graphs: CompileCounterWithBackend, seed: int) -> None:
    """In float64, for a whole batch and for micro-batches with gradient checkpointing."""
    model, batches = model_of("modernbert").double(), [pairs_of(5, 9), pairs_of(4, 12)]
    batches = [(images.double(), tokens) for images, tokens in batches]
    whole, parts = gradients_of(model, batches[0]), gradients_of(model, *batches)
    tower.compile_blocks(model)
    assert_close(gradients_of(model, batches[0]), whole, 1e-10)
    model.set_grad_checkpointing()
    assert_close(gradients_of(model, *batches), parts, 1e-10)
    assert graphs.frame_count


def test_dropped_samples_have_the_rate_and_scale_of_timm(graphs: CompileCounterWithBackend, seed: int) -> None:
    model = model_of(stochastic_depth=0.5)
    plain = model.image.blocks[-1].drop_path1
    torch.manual_seed(seed)
    theirs = plain(torch.ones(4000, 1))
    tower.compile_blocks(model)
    ours = plain(torch.ones(4000, 1))
    assert set(ours.unique().tolist()) == set(theirs.unique().tolist()) == {0.0, 2.0}
    assert abs(ours.mean() - 1) < 0.1  # more than six standard errors
    plain.eval()
    assert torch.equal(plain(torch.ones(3, 1)), torch.ones(3, 1))


def test_other_towers_than_those_of_plain_blocks_are_refused() -> None:
    model = DualEncoder(ImageConfig("swin_tiny_patch4_window7_224", 224), TextConfig(60, 16, 1, 2), embed_dim=8)
    with pytest.raises(ValueError, match=r"model\.compile"):
        tower.compile_blocks(model)


@pytest.mark.slow
def test_machine_code_equals_the_plain_blocks(seed: int) -> None:
    """Inductor orders sums otherwise: in fp32 the gradients agree to 1e-4."""
    torch._dynamo.reset()
    model, batches = model_of("modernbert"), [pairs_of(6, 9), pairs_of(5, 15)]
    plain = [gradients_of(model, batch) for batch in batches]
    tower.compile_blocks(model)
    found = [gradients_of(model, batch) for batch in batches]
    errors = [float((a[n] - b[n]).norm() / a[n].norm()) for a, b in zip(plain, found) for n in a if a[n].any()]
    print(f"largest relative difference {max(errors):.2g}")
    for one, other in zip(plain, found):
        assert_close(other, one, 1e-4)
    torch._dynamo.reset()
