import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dualenc.models.image_encoder import ImageConfig, ImageEncoder

NAME, SIZE, PATCH, WIDTH = "vit_tiny_patch16_224", 32, 8, 192
PATCHES = (SIZE // PATCH) ** 2
SHAPE = {"depth": 1, "patch_size": PATCH}


def config(size=SIZE, **changes):
    return ImageConfig(NAME, size, {**SHAPE, **changes})


def build(size=SIZE, patch_dropout=0.0, **changes):
    model = ImageEncoder(config(size, **changes), patch_dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(count=3, dtype=torch.float32):
    return torch.randn(count, 3, SIZE, SIZE, dtype=dtype)


def test_features_equal_timm():
    model, x = build().double().eval(), images(dtype=torch.float64)
    peer = timm.create_model(NAME, num_classes=0, img_size=SIZE, **SHAPE).double().eval()
    assert model(x).shape == (3, model.width) == (3, WIDTH)
    assert (model(x) - peer(x)).abs().max() > 1e-2  # control: with other weights
    peer.load_state_dict(model.vit.state_dict())
    torch.testing.assert_close(model(x), peer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_patch_dropout_saves_flops(share):
    model, plain, x = build(patch_dropout=share), build(), images()
    plain.load_state_dict(model.state_dict())

    def flops(module):
        with FlopCounterMode(display=False) as counter:
            module(x)
        return counter.get_total_flops()

    def by_hand(patches):
        tokens = patches + 1
        block = 2 * tokens * 12 * WIDTH**2 + 4 * tokens**2 * WIDTH
        return len(x) * (2 * PATCHES * 3 * PATCH**2 * WIDTH + block)

    assert flops(model.train()) == pytest.approx(by_hand(PATCHES * (1 - share)), rel=0.02)
    assert flops(plain.train()) == pytest.approx(by_hand(PATCHES), rel=0.02)
    assert not torch.equal(model(x), plain(x))  # control: patches are dropped in training
    assert flops(model.eval()) == flops(plain.eval())
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_grad_checkpointing_is_bit_equal(share, seed):
    model, x = build(patch_dropout=share, depth=2), images()

    def step(enable):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(seed)  # the same patches
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            out = model(x)
        out.square().sum().backward()
        return out, [parameter.grad.clone() for parameter in model.parameters()], sum(kept)

    out, grads, kept = step(False)
    again, again_grads, again_kept = step(True)
    assert torch.equal(out, again)
    assert all(map(torch.equal, grads, again_grads))
    assert again_kept < kept / 2  # control


def test_load_pretrained_resamples_positions(tmp_path):
    big = timm.create_model(NAME, img_size=2 * SIZE, **SHAPE)  # with its classifier
    with torch.no_grad():
        big.pos_embed.normal_()
    save_file(big.state_dict(), tmp_path / "weights.safetensors")
    model = build()
    before = {name: value.clone() for name, value in model.vit.state_dict().items()}
    model.load_pretrained(str(tmp_path / "weights.safetensors"))
    state, source = model.vit.state_dict(), big.state_dict()
    for name, value in state.items():
        assert not torch.equal(value, before[name]), name
        if name != "pos_embed":
            assert torch.equal(value, source[name]), name
    token, grid = source["pos_embed"][:, :1], source["pos_embed"][:, 1:]
    grid = grid.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True, align_corners=False)
    want = torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    torch.testing.assert_close(state["pos_embed"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["tensors", "file"])
def test_given_weights_replace_those_of_the_name(kind, tmp_path):
    folder = tmp_path / "timm"
    save_for_hf(timm.create_model(NAME, img_size=SIZE, num_classes=0, **SHAPE), folder, safe_serialization=True)
    model = ImageEncoder(ImageConfig(f"local-dir:{folder}", SIZE, SHAPE))
    state = build().vit.state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    model.load_pretrained()
    assert not torch.equal(model.vit.pos_embed, state["pos_embed"])  # control: the weights of the name
    model.load_pretrained(state if kind == "tensors" else str(tmp_path / "weights.safetensors"))
    assert all(torch.equal(x, state[name]) for name, x in model.vit.state_dict().items())


def test_load_pretrained_with_patch_dropout(tmp_path):
    source = build()
    save_file(source.vit.state_dict(), tmp_path / "weights.safetensors")
    model = build(patch_dropout=0.5)
    model.load_pretrained(str(tmp_path / "weights.safetensors"))
    x = images()
    assert torch.equal(model.eval()(x), source.eval()(x))


@pytest.mark.parametrize("fault", ["shallower", "foreign", "wider", "absent"])
def test_load_pretrained_refuses_weights_that_do_not_fit(fault, tmp_path):
    model, file = build(depth=2), tmp_path / "weights.safetensors"
    fits = model.vit.state_dict()
    tensors = {
        "shallower": build(depth=1).vit.state_dict(),  # One block would keep its random weights.
        "foreign": {f"model.visual.{name}": value for name, value in fits.items()},  # All blocks would.
        "wider": {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in fits.items()},
    }
    if fault != "absent":
        save_file(tensors[fault], file)
    before = model.vit.pos_embed.clone()
    with pytest.raises(ValueError, match=rf"{NAME}.*weights\.safetensors"):
        model.load_pretrained(str(file))
    assert torch.equal(model.vit.pos_embed, before)


def test_load_pretrained_where_timm_has_no_weights():
    name = "vit_base_patch16_18x2_224"
    assert not timm.list_pretrained(name)
    model = ImageEncoder(ImageConfig(name, SIZE, {"depth": 1, "embed_dim": 48, "num_heads": 2}))
    with pytest.raises(ValueError, match=name):
        model.load_pretrained()


@pytest.mark.parametrize(
    ("name", "mean"),
    [(NAME, (0.5, 0.5, 0.5)), ("vit_base_patch32_clip_224.openai", (0.48145466, 0.4578275, 0.40821073))],
)
def test_data_config(name, mean):
    model = ImageEncoder(ImageConfig(name, SIZE, {"depth": 1, "embed_dim": 48, "num_heads": 2, "patch_size": 8}))
    assert model.data_config["mean"] == mean
    assert len(model.data_config["std"]) == 3
    assert model.data_config["interpolation"] == "bicubic"


def test_the_error_of_an_unknown_name_lists_close_names():
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_242'.*vit_tiny_patch16_224"):
        ImageEncoder(ImageConfig("vit_tiny_patch16_242"))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_models_that_are_not_vision_transformers_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is not a vision transformer"):
        ImageEncoder(ImageConfig(name, SIZE))


def test_the_error_of_an_unknown_override_names_it():
    with pytest.raises(ValueError, match="dept"):
        ImageEncoder(ImageConfig(NAME, SIZE, {"dept": 1}))


@pytest.fixture
def fused_calls(monkeypatch):
    """Return a list that grows with each call of torch's fused attention."""
    calls, fused = [], F.scaled_dot_product_attention

    def counted(query, *args, **options):
        calls.append(query.device.type)
        return fused(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("name", [NAME, "vit_relpos_small_patch16_224", "vit_base_patch16_siglip_224"])
def test_fused_attention_is_left_out_in_bf16_on_a_cpu_only(name, fused_calls):
    model, x = ImageEncoder(ImageConfig(name, SIZE, {"depth": 2})).eval(), images()

    def embed(**autocast):
        fused_calls.clear()
        with torch.no_grad(), torch.autocast("cpu", **autocast):
            return model(x).float(), len(fused_calls)

    exact, calls = embed(enabled=False)
    assert calls >= 2  # a block has one call, and pooling may have another
    rounded, calls_in_bf16 = embed(dtype=torch.bfloat16)
    assert not calls_in_bf16
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.03
    again, calls_after = embed(enabled=False)
    assert calls_after == calls
    assert torch.equal(again, exact)
    assert embed(dtype=torch.float16)[1] == calls  # which the measurement was not about


def test_fused_attention_stays_in_bf16_on_cuda(fused_calls):
    model, x = ImageEncoder(config(depth=2)).bfloat16(), images(dtype=torch.bfloat16)
    model(x)
    assert not fused_calls  # control
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.cuda()(x.cuda())
    assert fused_calls == ["cuda"] * 2


def test_a_block_that_is_computed_again_has_the_same_attention(fused_calls):
    model, x = build(depth=2), images()
    model.set_grad_checkpointing()

    def gradients(between):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        between()
        fused_calls.clear()
        out.float().square().sum().backward()
        assert not fused_calls
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients(lambda: None)
    assert all(map(torch.equal, gradients(lambda: model(x)), plain))  # an fp32 pass before the backward pass


def test_the_choice_of_attention_compiles_without_a_break(fused_calls):
    model, x = build(depth=1).eval(), images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            expected = model(x)
            assert torch.equal(compiled(x), expected)
    torch.compiler.reset()
