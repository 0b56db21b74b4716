import math

import pytest
import torch

from dualenc.losses import clip_loss, siglip_loss
from dualenc.models import DualConfig, DualEncoder, Embeddings, ImageConfig, ImageEncoder, TextConfig
from dualenc.models.dual_encoder import Logits
from dualenc.tokens import Tokens

SIZE, VOCAB, DIM = 16, 30, 20
IMAGE = ImageConfig("vit_tiny_patch16_224", SIZE, {"depth": 1, "patch_size": 8, "embed_dim": 24, "num_heads": 2})
TEXT = TextConfig(VOCAB, 32, layers=1, heads=2, context_length=12, types=2)


def build(**changes):
    model = DualEncoder(IMAGE, TEXT, DIM, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("logits."):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(lengths=(5, 1, 12, 5)):
    texts = [torch.randint(1, VOCAB, (n,)).tolist() for n in lengths]
    types = [torch.randint(0, 2, (n,)).tolist() for n in lengths]
    return torch.randn(len(lengths), 3, SIZE, SIZE), Tokens.pack(texts, types)


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_embeddings_are_unit_vectors_of_the_projected_towers(projection):
    model, (images, tokens) = build(projection=projection), batch()
    out = model(images, tokens)
    assert isinstance(out, Embeddings)
    towers = (
        (out.image, model.image(images), model.image_projection),
        (out.text, model.text.pool(model.text(tokens), tokens), model.text_projection),
    )
    for embedding, x, layers in towers:
        assert embedding.shape == (4, DIM)
        if projection == "mlp":
            x = torch.nn.functional.gelu(x @ layers[0].weight.T + layers[0].bias) @ layers[2].weight.T + layers[2].bias
        else:
            assert layers.bias is None
            x = x @ layers.weight.T
        torch.testing.assert_close(embedding, x / x.square().sum(1, keepdim=True).sqrt())
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))
    assert out.bias is None


def test_unit_length_under_autocast():
    model, (images, tokens) = build(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, tokens)
    for x in (out.image, out.text):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.norm(dim=1), torch.ones(4), rtol=1e-6, atol=1e-6)


def test_texts_in_the_callers_order():
    model = build().double()
    texts = [torch.randint(1, VOCAB, (n,)).tolist() for n in (9, 2, 12, 1, 5, 5)]
    together = model.encode_text(Tokens.pack(texts))
    alone = torch.cat([model.encode_text(Tokens.pack([text])) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert torch.pdist(alone).min() > 1e-3  # control: different texts differ


def spread(model: torch.nn.Module, *ends: str) -> list[float]:
    """The standard deviation of each weight whose name has one of these ends."""
    return [float(x.detach().std()) for name, x in model.named_parameters() if name.endswith(ends)]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_relpos_small_patch16_224"])
def test_blocks_begin_as_those_of_open_clip(name):
    from open_clip.transformer import TextTransformer

    width, layers = 96, 3
    image = ImageConfig(name, 16, {"depth": layers, "patch_size": 8, "embed_dim": width, "num_heads": 2})
    model = DualEncoder(image, TextConfig(VOCAB, width, layers, 2, norm="pre"), DIM)
    peer = TextTransformer(context_length=12, vocab_size=VOCAB, width=width, heads=2, layers=layers)
    same = {
        ".attn.in_proj_weight": (".attn.qkv.weight", ".attention.qkv.weight"),
        ".attn.out_proj.weight": (".attn.proj.weight", ".attention.out.weight"),
        ".mlp.c_fc.weight": ("0.mlp.fc1.weight", "1.mlp.fc1.weight", ".mlp.0.weight"),
        ".mlp.c_proj.weight": ("0.mlp.fc2.weight", "1.mlp.fc2.weight", ".mlp.2.weight"),
    }
    for theirs, ours in same.items():
        found = [one for tower in (model.image.vit, model.text) for one in spread(tower, *ours)]
        assert len(found) >= 5
        assert found == pytest.approx([spread(peer, theirs)[0]] * len(found), rel=0.05), theirs


def test_what_is_outside_of_blocks_begins_as_before():
    usual = {"depth": 1, "patch_size": 8, "embed_dim": 24, "num_heads": 2}
    model = DualEncoder(ImageConfig("vit_relpos_small_patch16_224", SIZE, usual), TEXT, DIM)
    alone = ImageEncoder(model.config.image)
    # The network that computes relative positions has an MLP, too.
    for end in (".rel_pos.mlp.fc2.weight", "patch_embed.proj.weight"):
        assert spread(model.image, end) == pytest.approx(spread(alone, end), rel=0.2)
    assert spread(model.text, "token_embeddings.weight") == pytest.approx([0.02], rel=0.1)
    own = DualEncoder(ImageConfig("vit_tiny_patch16_224", SIZE, {**usual, "weight_init": "jax"}), TEXT, DIM)
    torch.testing.assert_close(spread(own.image, ".qkv.weight"), [(2 / (24 + 3 * 24)) ** 0.5], rtol=0.1, atol=0)


@pytest.mark.parametrize(("bias", "scale"), [(False, 1 / 0.07), (True, 10.0)])
def test_initial_scale_and_bias(bias, scale):
    out = build(logit_bias=bias)(*batch())
    torch.testing.assert_close(out.scale, torch.tensor([scale]))
    if bias:
        torch.testing.assert_close(out.bias, torch.tensor([-10.0]))
    model = build(logit_bias=bias, init_scale=3.0, init_bias=-2.0)
    torch.testing.assert_close(model.logits()[0], torch.tensor([3.0]))
    shapes = {name: parameter.shape for name, parameter in model.logits.named_parameters()}
    assert shapes == {"logit_scale": (1,), "logit_bias": (1,)} if bias else {"logit_scale": (1,)}


def test_scale_is_clamped_and_can_decrease_again():
    logits = Logits(False, 1000.0, 0.0)
    scale, _ = logits()
    torch.testing.assert_close(scale, torch.tensor([100.0]))
    # Past the bound there is no gradient; without `clamp_scale` the scale would stay there.
    assert torch.autograd.grad(scale.sum(), logits.logit_scale)[0] == 0
    logits.clamp_scale()
    assert logits.logit_scale.requires_grad
    scale, _ = logits()
    torch.testing.assert_close(scale, torch.tensor([100.0]), rtol=1e-4, atol=0)
    gradient = torch.autograd.grad(scale.sum(), logits.logit_scale)[0]  # 0 at the bound with clamp (torch 2.15)
    torch.testing.assert_close(gradient, torch.tensor([100.0]), rtol=1e-4, atol=0)

    logits = Logits(True, 1000.0, -10.0)  # With a bias there is no bound.
    logits.clamp_scale()
    scale, bias = logits()
    torch.testing.assert_close(scale, torch.tensor([1000.0]), rtol=1e-5, atol=0)
    assert bias == -10

    logits = Logits(False, 99.0, 0.0)  # Below the bound nothing changes.
    before = logits.logit_scale.clone()
    logits.clamp_scale()
    assert torch.equal(logits.logit_scale, before)
    torch.testing.assert_close(logits()[0], torch.tensor([99.0]))
    assert math.isclose(before.item(), math.log(99), rel_tol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_every_module_is_called_and_every_parameter_gets_a_gradient(loss, projection, norm, pool):
    text = TextConfig(VOCAB, 32, layers=1, heads=2, context_length=12, types=2, norm=norm, pool=pool)
    model = DualEncoder(IMAGE, text, DIM, projection, logit_bias=loss is siglip_loss)
    called = set()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: called.add(module))
    images, tokens = batch()
    loss(*model(images, tokens)).backward()
    # FSDP2 gathers a module's own parameters only when that module is called.
    owners = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert [name for name, module in owners.items() if module not in called] == []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_from_config():
    model = build(projection="mlp", logit_bias=True)
    assert model.config == DualConfig(IMAGE, TEXT, DIM, "mlp", True)
    again = DualEncoder.from_config(model.config)
    again.load_state_dict(model.state_dict())
    images, tokens = batch()
    for x, y in zip(model.eval()(images, tokens), again.eval()(images, tokens), strict=True):
        assert torch.equal(x, y)


def test_patch_dropout_reaches_the_tower():
    model, (images, _) = build(patch_dropout=0.5), batch()
    assert not torch.equal(model.train().encode_image(images), model.eval().encode_image(images))


def test_grad_checkpointing_reaches_both_towers():
    model, (images, tokens) = build(), batch()

    def step(enable):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        kept = []
        for encode, x in ((model.encode_image, images), (model.encode_text, tokens)):
            kept.append(0)

            def pack(t, kept=kept):
                kept[-1] += t.numel()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = encode(x)
            (out * torch.arange(DIM)).sum().backward()
        return kept, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (plain_image, plain_text), plain = step(False)
    (image, text), grads = step(True)
    assert image < plain_image
    assert text < plain_text
    assert grads.keys() == plain.keys()
    assert all(torch.equal(grads[name], plain[name]) for name in plain)


def test_unknown_projection():
    with pytest.raises(ValueError, match="'cubic'"):
        build(projection="cubic")
