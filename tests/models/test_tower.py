"""Depths of parameters, and towers that are frozen in whole or in part."""

import re
from contextlib import nullcontext

import pytest
import torch

import dualenc.models.tower as tower_module
from dualenc import Tokens
from dualenc.models import ImageConfig, ImageEncoder, TextConfig, TextEncoder
from dualenc.models.tower import WeightCast

SIZE, LAYERS = 32, 3
VIT = {"patch_size": 8, "embed_dim": 16, "depth": LAYERS, "num_heads": 2}
DROPS = {"proj_drop_rate": 0.5, "drop_path_rate": 0.5, "pos_drop_rate": 0.5}


def image(patch_dropout=0.0, name="vit_tiny_patch16_224", **changes):
    return ImageEncoder(ImageConfig(name, SIZE, {**VIT, **changes}), patch_dropout)


def text(**changes):
    return TextEncoder(TextConfig(30, width=16, layers=LAYERS, heads=2, context_length=9, **changes))


def run(tower):
    """Run a tower on random inputs, the same in each call."""
    draw = torch.Generator().manual_seed(torch.initial_seed())
    if isinstance(tower, ImageEncoder):
        return tower(torch.randn(4, 3, SIZE, SIZE, generator=draw))
    texts = [torch.randint(30, (length,), generator=draw).tolist() for length in (3, 9, 5, 5)]
    return tower(Tokens.pack(texts))


def blocks(tower):
    return tower.vit.blocks if isinstance(tower, ImageEncoder) else tower.blocks


def output_of_block(tower, number):
    """Return the output of a block, counted from 1."""
    kept = []
    hook = blocks(tower)[number - 1].register_forward_hook(lambda module, inputs, out: kept.append(out.detach()))
    run(tower)
    hook.remove()
    return kept[0]


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224"]
)
def test_depths_of_timms_transformers(name):
    tower = image(name=name)
    assert tower.layers == LAYERS
    depths = tower.depths()
    assert set(depths) == {name for name, _ in tower.named_parameters()}
    for name, depth in depths.items():
        if block := re.match(r"vit\.blocks\.(\d+)\.", name):
            assert depth == int(block[1]) + 1
        else:
            top = LAYERS if name.startswith("vit.norm.") else LAYERS + 1  # timm's last norm belongs to the last block
            stem = re.match(r"vit\.(patch_embed|cls_token|pos_embed|rel_pos_bias)", name)
            assert depth == (0 if stem else top), name
    assert depths["vit.patch_embed.proj.weight"] == 0


@pytest.mark.parametrize(("changes", "above"), [({}, set()), ({"global_pool": "avg"}, {"vit.fc_norm.weight"})])
def test_depths_above_the_blocks_of_timms_transformers(changes, above):
    found = {name for name, depth in image(**changes).depths().items() if depth == LAYERS + 1}
    assert found == above | {name.replace("weight", "bias") for name in above}


@pytest.mark.parametrize(("norm", "above"), [("post", set()), ("pre", {"norm.weight", "norm.bias"})])
def test_depths_of_the_text_encoder(norm, above):
    tower = text(norm=norm, types=2)
    assert tower.layers == LAYERS
    for name, depth in tower.depths().items():
        block = re.match(r"blocks\.(\d+)\.", name)
        assert depth == (int(block[1]) + 1 if block else LAYERS + 1 if name in above else 0), name
    assert set(tower.depths()) == {name for name, _ in tower.named_parameters()} > above


def test_a_shared_block_has_the_depth_of_its_highest_layer():
    tower = TextEncoder(TextConfig(30, width=16, layers=6, heads=2, context_length=9, groups=2, embed_width=8))
    assert tower.layers == 6
    found = {name.split(".")[1]: depth for name, depth in tower.depths().items() if name.startswith("blocks")}
    assert found == {"0": 3, "1": 6}
    tower.freeze(3)  # embeddings and two layers; the third layer still trains the first block
    assert all(p.requires_grad for p in tower.blocks.parameters())
    assert not any(p.requires_grad for p in tower.embeddings.parameters())
    tower.freeze(4)
    assert not any(p.requires_grad for p in tower.blocks[0].parameters())
    assert all(p.requires_grad for p in tower.blocks[1].parameters())


TOWERS = {
    "image": lambda: image(**DROPS),
    "text": lambda: text(dropout=0.5),
    "pre-norm text": lambda: text(dropout=0.5, norm="pre"),
}


@pytest.mark.parametrize("frozen", [1, 2])
@pytest.mark.parametrize("kind", TOWERS)
def test_frozen_layers_have_neither_gradients_nor_dropout(kind, frozen):
    tower = TOWERS[kind]()
    tower.train()
    assert not torch.equal(output_of_block(tower, 1), output_of_block(tower, 1))  # control
    tower.freeze(frozen + 1)
    depths = tower.depths()
    for mode in (True, False, True):  # as a trainer switches between training and validation
        tower.train(mode)
        assert tower.training == mode
    first = output_of_block(tower, frozen)
    assert torch.equal(first, output_of_block(tower, frozen))
    # Trained blocks have dropout.
    assert not torch.equal(output_of_block(tower, frozen + 1), output_of_block(tower, frozen + 1))
    run(tower).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.requires_grad == (depths[name] > frozen) == (parameter.grad is not None), name
    tower.eval()
    assert torch.equal(first, output_of_block(tower, frozen))


@pytest.mark.parametrize("kind", [*TOWERS, "patches"])
def test_a_frozen_tower_equals_eval_mode(kind):
    tower = image(0.5) if kind == "patches" else TOWERS[kind]()
    whole = run(tower.eval())
    tower.train()
    assert not torch.equal(run(tower), whole)  # control
    tower.freeze(LAYERS + 2)
    tower.train()
    found = run(tower)
    assert torch.equal(found, whole)
    assert found.grad_fn is None
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_patch_dropout_stays_active_above_frozen_layers():
    tower = image(0.5)
    tower.freeze(2)
    tower.train()
    patches = (SIZE // VIT["patch_size"]) ** 2
    assert output_of_block(tower, 1).shape[1] == 1 + patches // 2
    tower.freeze(LAYERS + 2)
    assert output_of_block(tower, 1).shape[1] == 1 + patches


@pytest.mark.parametrize("below", [2, LAYERS + 2])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_gradient_checkpointing_of_frozen_layers(kind, below, seed):
    tower = image() if kind == "image" else text()
    tower.freeze(below)
    tower.train()
    head = torch.nn.Linear(16, 1)

    def gradients(enable):
        if isinstance(tower, ImageEncoder):
            tower.set_grad_checkpointing(enable)
        else:
            tower.grad_checkpointing = enable
        tower.zero_grad()
        head.zero_grad()
        head(run(tower)).square().sum().backward()
        return [p.grad.clone() for p in (*tower.parameters(), *head.parameters()) if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) >= 2
    assert all(map(torch.equal, plain, again))


class Both(torch.nn.Module):
    """Both towers with random weights, the text tower with frozen blocks or none."""

    def __init__(self, frozen):
        super().__init__()
        self.image, self.text = image(), text()
        self.text.freeze(frozen + 1 if frozen else 0)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.2)


def half_gradients(model, together):
    """Return outputs under bf16 autocast, and the gradients of their cosines."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), WeightCast(model).applied("cpu") if together else nullcontext():
        out = run(model.image), run(model.text)
    sum(x.float().cos().sum() for x in out).backward()
    return [*out, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("frozen", [0, 2])
def test_weights_that_are_cast_together_give_the_same_gradients(seed, monkeypatch, frozen):
    monkeypatch.setattr(tower_module, "CAST_TOGETHER", 2_000)
    model = Both(frozen)
    assert len(WeightCast(model).groups) > 3
    for ours, autocast in zip(half_gradients(model, True), half_gradients(model, False), strict=True):
        assert (ours is None) == (autocast is None)
        assert ours is None or torch.equal(ours, autocast)


def test_weights_are_cast_under_autocast_only_and_restored_after_an_error(seed):
    model = Both(0)
    linear = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    weight = linear.weight
    with WeightCast(model).applied("cpu"):
        assert linear.weight is weight

    def fail():
        assert linear.weight.dtype == torch.bfloat16
        assert dict(linear.named_parameters())["weight"] is weight
        raise KeyError

    with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError), WeightCast(model).applied("cpu"):
        fail()
    assert linear.weight is weight


def test_frozen_weights_need_no_gradient_when_they_are_cast():
    """Otherwise the backward pass would compute gradients down to the first block for nothing."""
    model = Both(2)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    trained = [linear.weight.requires_grad for linear in linears]
    assert {True, False} == set(trained)
    with torch.autocast("cpu", torch.bfloat16), WeightCast(model).applied("cpu"):
        assert [linear.weight.requires_grad for linear in linears] == trained
