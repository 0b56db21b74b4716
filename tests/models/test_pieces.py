"""A batch embedded in pieces: gradients of the pieces with their graphs kept, with the memory of one."""

import pytest
import torch
from helpers import SIZE
from ranks import in_ranks
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

import dualenc.losses as losses
from dualenc.losses import clip_loss, siglip_loss
from dualenc.models import DualEncoder, ImageConfig, TextConfig, embed_pieces
from dualenc.tokens import Tokens
from tools.bench.memory import Live

LOSSES = {"clip": clip_loss, "siglip": siglip_loss}
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def model_of(dropout: float, dtype: torch.dtype = torch.float64) -> DualEncoder:
    model = DualEncoder(
        ImageConfig("vit_tiny_patch16_224", SIZE, VIT),
        TextConfig(60, width=16, layers=2, heads=2, context_length=12, dropout=dropout),
        embed_dim=8,
        logit_bias=True,
        patch_dropout=dropout,
    ).to(dtype)
    with torch.no_grad():
        for parameter in [*model.image.parameters(), *model.text.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def pairs(count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, list[list[int]]]:
    texts = [torch.randint(60, (int(n),)).tolist() for n in torch.randint(1, 12, (count,))]
    return torch.randn(count, 3, SIZE, SIZE, dtype=dtype), texts


def cut(images, texts, size):
    """Pieces of `size` pairs, the last one smaller."""
    starts = range(0, len(texts), size)
    return [(images[i : i + size], Tokens.pack(texts[i : i + size])) for i in starts]


def kept(model, pieces):
    """The same with all graphs kept."""
    parts = [model(*piece) for piece in pieces]
    return torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts]), *parts[0][2:]


def gradients(model, out, loss):
    model.zero_grad()
    value = loss(*out)
    value.backward()
    return {"loss": value.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def close(one, other, tolerance=1e-10):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_to_the_pieces_with_their_graphs_kept(name, seed):
    """With dropout and patches left out; another draw of them is another gradient."""
    model, pieces = model_of(0.3), cut(*pairs(11), 3)
    found = []
    for embed, start in ((embed_pieces, seed), (kept, seed), (kept, seed + 1)):
        torch.manual_seed(start)
        found.append(gradients(model, embed(model, pieces), LOSSES[name]))
    close(found[0], found[1])
    assert not torch.allclose(found[1]["text_projection.weight"], found[2]["text_projection.weight"])


@pytest.mark.parametrize("size", [1, 4, 11])
@pytest.mark.parametrize("name", LOSSES)
def test_equal_to_the_whole_batch(name, size):
    model, (images, texts) = model_of(0.0), pairs(11)
    whole = gradients(model, model(images, Tokens.pack(texts)), LOSSES[name])
    close(gradients(model, embed_pieces(model, cut(images, texts, size)), LOSSES[name]), whole)


@pytest.mark.long
def test_nothing_is_added_up_in_half_precision():
    """Beside gradient caching by hand (Gao et al. 2021), which runs backward piece by piece."""
    model, pieces = model_of(0.0, torch.float32), cut(*pairs(192, torch.float32), 2)

    def by_hand():
        model.zero_grad()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts = [model(*piece) for piece in pieces]
        image, text = (torch.cat(x).requires_grad_() for x in ([p.image for p in parts], [p.text for p in parts]))
        clip_loss(image, text, *parts[0][2:]).backward()
        wanted = zip(image.grad.split(2), text.grad.split(2))
        for piece, (for_image, for_text) in zip(pieces, wanted):
            with torch.autocast("cpu", torch.bfloat16):
                part = model(*piece)
            torch.autograd.backward([part.image, part.text], [for_image, for_text])
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def in_autocast(embed):
        with torch.autocast("cpu", torch.bfloat16):
            out = embed(model, pieces)
        return gradients(model, out, clip_loss)

    want, ours, cached = by_hand(), in_autocast(embed_pieces), in_autocast(kept)

    def error(found, name):
        return float((found[name] - want[name]).norm() / want[name].norm())

    weights = [name for name in want if name.endswith("qkv.weight")]
    assert len(weights) == 4
    for name in weights:
        assert error(ours, name) < 1e-5
        assert error(cached, name) > 1e-3  # control


@pytest.mark.parametrize("count", [96, pytest.param(384, marks=pytest.mark.slow)])
def test_memory_of_one_piece(count, monkeypatch):
    """At most 1.2 times what one piece takes, embeddings, and the gradients that are summed up, whatever the batch."""
    monkeypatch.setattr(losses, "CPU_SCORES", 200)  # or a small batch has all of its scores at once
    model = model_of(0.1, torch.float32)
    pieces = cut(*pairs(count, torch.float32), 8)

    def most(embed, some):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with Live() as live:
            clip_loss(*embed(model, some)).backward()
        return live.most

    one = max(most(kept, [piece]) for piece in pieces)
    embeddings = 2 * count * 8 * 4  # bytes; in pieces, in one, their gradients, and those once more in the loss
    gradients = sum(4 * parameter.numel() for parameter in model.parameters())
    assert most(embed_pieces, pieces) <= 1.2 * one + 4 * embeddings + gradients
    assert most(kept, pieces) > 5 * one  # control


def ranks(folder, rank, world):
    """Gradients after DDP, in pieces and with graphs kept, and how often gradients were summed over the ranks."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    saved = torch.load(folder / "inputs.pt", weights_only=True)
    texts, images = saved["texts"][rank::world], saved["images"][rank::world]
    results = {}

    class Step(torch.nn.Module):
        def __init__(self, model, embed, loss):
            super().__init__()
            self.model, self.embed, self.loss = model, embed, loss

        def forward(self, pieces):
            return self.loss(*self.embed(self.model, pieces), group=dist.group.WORLD)

    for name, loss in LOSSES.items():
        for dropout in (0.3, 0.0):
            for embed in (embed_pieces, kept):
                torch.manual_seed(rank)
                model = model_of(dropout)
                model.load_state_dict(saved["model"])
                step, sums = DistributedDataParallel(Step(model, embed, loss)), []

                def hook(state, bucket, sums=sums):
                    sums.append(bucket.index())
                    return allreduce_hook(state, bucket)

                step.register_comm_hook(None, hook)
                torch.manual_seed(rank)
                value = step(cut(images, texts, 3))
                value.backward()
                found = {"loss": value.detach(), **{key: p.grad for key, p in model.named_parameters()}}
                results[f"{name} {dropout} {embed.__name__}"] = {**found, "sums": torch.tensor(len(sums))}
    return results


@pytest.mark.slow
def test_over_ranks(tmp_path):
    model, (images, texts) = model_of(0.0), pairs(22)
    torch.save({"model": model.state_dict(), "images": images, "texts": texts}, tmp_path / "inputs.pt")
    results = in_ranks(ranks, tmp_path, 2)
    for name, loss in LOSSES.items():
        order = [*range(0, 22, 2), *range(1, 22, 2)]  # the first rank's pairs, then the second's
        whole = model(images[order], Tokens.pack([texts[i] for i in order]))
        want = gradients(model, whole, loss)
        for result in results:
            for dropout in (0.3, 0.0):
                ours = result[f"{name} {dropout} embed_pieces"]
                assert ours.pop("sums") == 1  # of all of its four pieces, in one bucket
                close(ours, {key: x for key, x in result[f"{name} {dropout} kept"].items() if key != "sums"})
            close(result[f"{name} 0.0 embed_pieces"], want)


@pytest.mark.long
def test_one_graph():
    """torch.compile sees pieces and loss as one graph without a break."""
    model, pieces = model_of(0.0, torch.float32), cut(*pairs(6, torch.float32), 3)
    want = gradients(model, embed_pieces(model, pieces), clip_loss)
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(lambda *some: clip_loss(*embed_pieces(model, some)), fullgraph=True, backend=counter)
    model.zero_grad()
    value = step(*pieces)
    value.backward()
    got = {"loss": value.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}
    close(got, want, 1e-5)
    assert counter.frame_count == 1
