"""Micro-batches: the gradients equal those with all graphs kept, with the memory of one micro-batch."""

import pytest
import torch
from helpers import SIZE
from ranks import in_ranks
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

import dualenc.losses as losses
from dualenc.losses import clip_loss, siglip_loss
from dualenc.models import DualEncoder, ImageConfig, TextConfig, embed_micro_batches
from dualenc.tokens import Tokens
from dualenc.training.step_memory import PeakMemory

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


def split(images, texts, size):
    """Split pairs into micro-batches of `size` pairs, the last one smaller."""
    starts = range(0, len(texts), size)
    return [(images[i : i + size], Tokens.pack(texts[i : i + size])) for i in starts]


def keep_graphs(model, micro_batches):
    """Embed micro-batches with all graphs kept."""
    parts = [model(*args) for args in micro_batches]
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
def test_equals_keeping_all_graphs(name, seed):
    """Dropout and patch dropout are the same in both passes; another draw gives another gradient."""
    model, micro_batches = model_of(0.3), split(*pairs(11), 3)
    found = []
    for embed, start in ((embed_micro_batches, seed), (keep_graphs, seed), (keep_graphs, seed + 1)):
        torch.manual_seed(start)
        found.append(gradients(model, embed(model, micro_batches), LOSSES[name]))
    close(found[0], found[1])
    assert not torch.allclose(found[1]["text_projection.weight"], found[2]["text_projection.weight"])


@pytest.mark.parametrize("size", [1, 4, 11])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_whole_batch(name, size):
    model, (images, texts) = model_of(0.0), pairs(11)
    whole = gradients(model, model(images, Tokens.pack(texts)), LOSSES[name])
    close(gradients(model, embed_micro_batches(model, split(images, texts, size)), LOSSES[name]), whole)


@pytest.mark.long
def test_gradients_are_not_summed_in_half_precision():
    """The gradients equal gradient caching by hand (Gao et al. 2021), with one backward pass for each micro-batch."""
    model, micro_batches = model_of(0.0, torch.float32), split(*pairs(192, torch.float32), 2)

    def by_hand():
        model.zero_grad()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts = [model(*args) for args in micro_batches]
        image, text = (torch.cat(x).requires_grad_() for x in ([p.image for p in parts], [p.text for p in parts]))
        clip_loss(image, text, *parts[0][2:]).backward()
        grads = zip(image.grad.split(2), text.grad.split(2))
        for args, (grad_image, grad_text) in zip(micro_batches, grads):
            with torch.autocast("cpu", torch.bfloat16):
                part = model(*args)
            torch.autograd.backward([part.image, part.text], [grad_image, grad_text])
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def in_autocast(embed):
        with torch.autocast("cpu", torch.bfloat16):
            out = embed(model, micro_batches)
        return gradients(model, out, clip_loss)

    want, ours, cached = by_hand(), in_autocast(embed_micro_batches), in_autocast(keep_graphs)

    def error(found, name):
        return float((found[name] - want[name]).norm() / want[name].norm())

    weights = [name for name in want if name.endswith("qkv.weight")]
    assert len(weights) == 4
    for name in weights:
        assert error(ours, name) < 1e-5
        assert error(cached, name) > 1e-3  # control


@pytest.mark.parametrize("count", [96, pytest.param(384, marks=pytest.mark.slow)])
def test_memory_of_one_micro_batch(count, monkeypatch):
    """The memory is at most 1.2 times that of one micro-batch, plus embeddings and gradients, whatever the batch."""
    monkeypatch.setattr(losses, "CPU_SCORES", 200)  # Otherwise a small batch has a single block of scores.
    model = model_of(0.1, torch.float32)
    micro_batches = split(*pairs(count, torch.float32), 8)

    def peak(embed, micro_batches):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with PeakMemory("cpu") as live:
            clip_loss(*embed(model, micro_batches)).backward()
        return live.peak

    one = max(peak(keep_graphs, [args]) for args in micro_batches)
    embeddings = 2 * count * 8 * 4  # bytes; held four times: in parts, concatenated, and twice as gradients
    gradients = sum(4 * parameter.numel() for parameter in model.parameters())
    assert peak(embed_micro_batches, micro_batches) <= 1.2 * one + 4 * embeddings + gradients
    assert peak(keep_graphs, micro_batches) > 5 * one  # control


def run_rank(folder, rank, world):
    """Compute gradients with DDP, with micro-batches and with graphs kept, and count the reductions over the ranks."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    saved = torch.load(folder / "inputs.pt", weights_only=True)
    texts, images = saved["texts"][rank::world], saved["images"][rank::world]
    results = {}

    class Step(torch.nn.Module):
        def __init__(self, model, embed, loss):
            super().__init__()
            self.model, self.embed, self.loss = model, embed, loss

        def forward(self, micro_batches):
            return self.loss(*self.embed(self.model, micro_batches), group=dist.group.WORLD)

    for name, loss in LOSSES.items():
        for dropout in (0.3, 0.0):
            for embed in (embed_micro_batches, keep_graphs):
                torch.manual_seed(rank)
                model = model_of(dropout)
                model.load_state_dict(saved["model"])
                step, reductions = DistributedDataParallel(Step(model, embed, loss)), []

                def hook(state, bucket, reductions=reductions):
                    reductions.append(bucket.index())
                    return allreduce_hook(state, bucket)

                step.register_comm_hook(None, hook)
                torch.manual_seed(rank)
                value = step(split(images, texts, 3))
                value.backward()
                found = {"loss": value.detach(), **{key: p.grad for key, p in model.named_parameters()}}
                found["reductions"] = torch.tensor(len(reductions))
                results[f"{name} {dropout} {embed.__name__}"] = found
    return results


@pytest.mark.slow
def test_two_ranks_equal_the_whole_batch(tmp_path):
    model, (images, texts) = model_of(0.0), pairs(22)
    torch.save({"model": model.state_dict(), "images": images, "texts": texts}, tmp_path / "inputs.pt")
    results = in_ranks(run_rank, tmp_path, 2)
    for name, loss in LOSSES.items():
        order = [*range(0, 22, 2), *range(1, 22, 2)]  # the first rank's pairs, then the second's
        whole = model(images[order], Tokens.pack([texts[i] for i in order]))
        want = gradients(model, whole, loss)
        for result in results:
            for dropout in (0.3, 0.0):
                ours, other = (result[f"{name} {dropout} {embed}"] for embed in ("embed_micro_batches", "keep_graphs"))
                assert ours.pop("reductions") == 1  # one bucket for all of its four micro-batches
                close(ours, {key: x for key, x in other.items() if key != "reductions"})
            close(result[f"{name} 0.0 embed_micro_batches"], want)


@pytest.mark.long
def test_compiles_to_one_graph():
    """torch.compile sees the micro-batches and the loss as one graph without a break."""
    model, micro_batches = model_of(0.0, torch.float32), split(*pairs(6, torch.float32), 3)
    want = gradients(model, embed_micro_batches(model, micro_batches), clip_loss)
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(lambda *args: clip_loss(*embed_micro_batches(model, args)), fullgraph=True, backend=counter)
    model.zero_grad()
    value = step(*micro_batches)
    value.backward()
    got = {"loss": value.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}
    close(got, want, 1e-5)
    assert counter.frame_count == 1
