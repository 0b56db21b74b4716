"""Parameter groups, frozen towers, layer decay, and the learning-rate schedule."""

import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm.optim
import torch
from fits import SMOKE, fails, fit, metrics, small_fit
from helpers import write_shards
from runs import callbacks, data
from runs import run as run_ranks
from safetensors.torch import load_file

from dualenc.models import DualEncoder, ImageConfig, ImageEncoder, TextConfig
from dualenc.training import ContrastiveTask, Tuning, WarmupCosine, parameter_groups

VIT = {"patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2}
IMAGE = ImageConfig("vit_tiny_patch16_224", 32, VIT)
TEXT = TextConfig(50, 16, 2, 2, types=2, norm="pre")
EMA = '[{"class_path": "dualenc.training.EMA", "init_args": {"decay": 0.9}}]'


def test_vectors_and_embeddings_have_no_weight_decay() -> None:
    model = DualEncoder(IMAGE, TEXT, 8, logit_bias=True)
    decay, no_decay = parameter_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    with_decay = {names[id(p)] for p in decay["params"]}
    without = {names[id(p)] for p in no_decay["params"]}
    assert with_decay | without == set(names.values())
    assert not with_decay & without
    assert "weight_decay" not in decay
    assert no_decay["weight_decay"] == 0.0
    assert all(name.endswith("weight") and dict(model.named_parameters())[name].ndim >= 2 for name in with_decay)
    assert {
        "text.embeddings.token_embeddings.weight",
        "text.embeddings.position_embeddings.weight",
        "image.vit.pos_embed",
    } <= without
    assert {"logits.logit_scale", "logits.logit_bias", "image.vit.cls_token"} <= without
    assert {"text.blocks.0.attention.qkv.weight", "image_projection.weight"} <= with_decay


def factor_of(name: str, image: Tuning, text: Tuning) -> float:
    """Return the learning-rate factor of a parameter of `IMAGE` or `TEXT`, computed independently."""
    tuning, layers, rest = {
        "image": (image, 3, name.removeprefix("image.vit.")),
        "text": (text, 2, name.removeprefix("text.")),
    }.get(name.split(".")[0], (Tuning(), 0, ""))
    if block := re.match(r"blocks\.(\d+)", rest):
        depth = int(block[1]) + 1
    elif rest.startswith(("cls_token", "pos_embed", "patch_embed", "embeddings")):
        depth = 0
    else:
        depth = 3 if name.startswith("image.vit.norm") else layers + 1
    return tuning.lr_factor * tuning.layer_decay ** (layers + 1 - depth)


def random_tunings() -> tuple[Tuning, Tuning]:
    """Draw different settings for both towers; the factors of the text tower are above 1."""
    first, second, decay, other = (0.5 + torch.rand(4) / 3).tolist()
    return Tuning(lr_factor=first / 5, layer_decay=decay), Tuning(lr_factor=3 * second, layer_decay=other)


def test_factors_equal_the_formula() -> None:
    image, text = random_tunings()
    model = DualEncoder(IMAGE, TEXT, 8)
    groups = parameter_groups(model, {"image": image, "text": text})
    of = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of) == len(list(model.parameters()))
    decayed = {id(p) for p in parameter_groups(model)[0]["params"]}
    for name, parameter in model.named_parameters():
        group = of[id(parameter)]
        assert group["factor"] == pytest.approx(factor_of(name, image, text), rel=1e-12), name
        assert ("weight_decay" not in group) == (id(parameter) in decayed), name
    # Factor 1: projections with decay, temperature without. Image depths 0 to 3: two each. Text: the embeddings, all
    # without decay; depths 1 and 2, two each; and the last norm.
    assert len(groups) == 2 + 2 * 4 + 1 + 2 * 2 + 1
    assert all(group["params"] for group in groups)
    first = {name for name, p in model.named_parameters() if of[id(p)] is groups[0]}
    assert first == {"image_projection.weight", "text_projection.weight"}
    again = parameter_groups(model, {"text": text, "image": image})
    assert [list(map(id, g["params"])) for g in groups] == [list(map(id, g["params"])) for g in again]


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_layer_decay_equals_that_of_timm(pool: str) -> None:
    """Compare with timm on a model that has a classifier where the dual encoder has its projection."""
    decay = 0.5 + torch.rand(()).item() / 3
    config = ImageConfig(IMAGE.name, 32, {**VIT, "global_pool": pool})
    peer = timm.create_model(config.name, img_size=32, num_classes=5, **config.overrides)
    theirs = timm.optim.param_groups_layer_decay(
        peer, 0.1, no_weight_decay_list=peer.no_weight_decay(), layer_decay=decay
    )
    names = {id(p): name for name, p in peer.named_parameters()}
    expected = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"] > 0) for group in theirs for p in group["params"]
    }
    holder = torch.nn.ModuleDict({"image": ImageEncoder(config)})
    mine = {name.removeprefix("image.vit."): p for name, p in holder.named_parameters()}
    found = {
        id(p): (group["factor"], "weight_decay" not in group)
        for group in parameter_groups(holder, {"image": Tuning(layer_decay=decay)})
        for p in group["params"]
    }
    assert set(mine) == {name for name in expected if not name.startswith("head.")}
    for name, parameter in mine.items():
        assert found[id(parameter)] == pytest.approx(expected[name], rel=1e-12), name
    assert len({factor for factor, _ in found.values()}) >= 4  # control: the factors differ


def test_updates_are_scaled_by_the_factors() -> None:
    """Each update is learning rate times factor times gradient, with the task's optimizer and schedule, in float64."""
    image, text = random_tunings()
    lr = 0.1 + torch.rand(()).item()
    task = ContrastiveTask(
        IMAGE,
        TEXT,
        8,
        optimizer=partial(torch.optim.SGD, lr=lr),
        scheduler=partial(WarmupCosine, warmup=0.5),
        image_tuning=image,
        text_tuning=text,
    ).double()
    task._trainer = SimpleNamespace(estimated_stepping_batches=8)  # type: ignore[assignment]
    made = task.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for step in range(3):
        rate = lr * (step + 1) / 4  # during warm-up
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)  # the value of train/lr
        before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
        for parameter in task.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        scheduler.step()
        for name, p in task.model.named_parameters():
            expected = before[name] - rate * factor_of(name, image, text) * p.grad
            torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frozen_layers": -1}, "frozen_layers -1 .* 0 or more"),
        ({"lr_factor": 0.0}, "lr_factor 0.0 .* locked"),
        ({"lr_factor": math.nan}, "lr_factor nan"),
        ({"lr_factor": math.inf}, "lr_factor inf"),
        ({"layer_decay": 0.0}, "layer_decay 0.0"),
        ({"layer_decay": 1.5}, "layer_decay 1.5"),
        ({"locked": True, "lr_factor": 0.1}, "locked: true trains nothing"),
        ({"locked": True, "frozen_layers": 1}, "locked: true trains nothing"),
    ],
)
def test_invalid_tunings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tuning(**values)


def test_more_frozen_layers_than_blocks_are_refused(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "shards", [12, 12], seed)
    line = fails(capsys, fit(tmp_path, "--model.image_tuning.frozen_layers", "3"))
    assert "model.image_tuning.frozen_layers 3" in line
    assert "2 blocks" in line
    assert "layer_decay 2" in fails(capsys, fit(tmp_path, "--model.text_tuning.layer_decay", "2"))
    ContrastiveTask(IMAGE, TEXT, 8, image_tuning=Tuning(frozen_layers=3))  # control: as many as there are blocks


CASES = {
    "image locked": ({"image": "locked true"}, r"image\."),
    "text locked": ({"text": "locked true"}, r"text\."),
    "both locked": ({"image": "locked true", "text": "locked true"}, r"(image|text)\."),
    "layers": (
        {"image": "frozen_layers 1", "text": "frozen_layers 1"},
        r"image\.vit\.(cls_token|pos_embed|patch_embed\.|blocks\.0\.)|text\.(embeddings|blocks\.0)\.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_frozen_parts_stay_and_all_other_parts_change(
    case: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train with dropout, gradient checkpointing and EMA, whose average is in `last/`."""
    chosen, frozen = CASES[case]
    options = [part for side, words in chosen.items() for part in f"--model.{side}_tuning.{words}".split()]
    before: dict[str, torch.Tensor] = {}
    wrong: set[str] = set()

    def check(self: ContrastiveTask, optimizer: torch.optim.Optimizer) -> None:
        if not before:
            before.update({name: x.detach().clone() for name, x in self.model.state_dict().items()})
        for name, p in self.model.named_parameters():
            if (p.grad is None) != bool(re.match(frozen, name)):
                wrong.add(name)
        for name, module in self.model.named_modules():
            owned = [f"{name}.{rest}".lstrip(".") for rest, _ in module.named_parameters()]
            if owned and module.training == all(re.match(frozen, part) for part in owned):
                wrong.add(name)

    monkeypatch.setattr(ContrastiveTask, "on_before_optimizer_step", check, raising=False)
    dropout = ["--model.text.dropout", "0.2", "--model.patch_dropout", "0.5", "--model.grad_checkpointing", "true"]
    run = small_fit(SMOKE, tmp_path, seed, *options, *dropout, "--trainer.callbacks", EMA, "--trainer.max_steps", "4")
    assert not wrong
    after = load_file(run / "last" / "model.safetensors")
    for name, x in before.items():
        assert torch.equal(x, after[name]) == bool(re.match(frozen, name)), name
    assert metrics(run, "train/lr")[2] == 0.003


@pytest.mark.slow
def test_frozen_towers_on_several_ranks(tmp_path: Path, seed: int) -> None:
    """DDP and FSDP2 on two ranks equal one process, and the same parts stay frozen."""
    more = [
        "--model.image_tuning.locked", "true", "--model.text.layers", "2", "--model.text_tuning.frozen_layers", "1",
        "--model.text_tuning.layer_decay", "0.5", "--model.text.dropout", "0", "--trainer.max_steps", "6",
        "--trainer.gradient_clip_val", "1.0", "--model.grad_checkpointing", "true", "--run.stall_seconds", "20",
    ]  # fmt: skip
    fit = [*data(tmp_path, seed), *callbacks(("dualenc.training.EMA", {"decay": 0.9})), *more]
    sharded = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    fsdp = json.dumps({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": sharded})
    ended = []
    for name, world, strategy in (("one", 1, ""), ("ddp", 2, "ddp"), ("fsdp", 2, fsdp)):
        statuses = run_ranks(fit, tmp_path / name, world, strategy)
        assert statuses == [0] * world, (tmp_path / name / "log-0").read_text()
        ended.append(load_file(tmp_path / name / "run" / "last" / "model.safetensors"))
        for metric in ("train/loss", "train/grad_norm", "val/loss"):
            one, other = (metrics(tmp_path / folder / "run", metric) for folder in ("one", name))
            assert len(one) == len(other) > 0
            assert one == pytest.approx(other, rel=1e-3), (name, metric)
    for name, x in ended[0].items():
        if re.match(r"image\.|text\.(embeddings|blocks\.0)\.", name):
            assert all(torch.equal(x, other[name]) for other in ended), name
        else:
            assert all((x - other[name]).abs().max() < 1e-3 for other in ended), name


@pytest.mark.parametrize(("warmup", "warmup_steps"), [(0.25, 10), (4, 4), (0, 1)])
def test_warmup_cosine(warmup: float, warmup_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, 40, warmup=warmup, final=0.1)
    rates = []
    for _ in range(41):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [
        2 * (k + 1) / warmup_steps
        if k < warmup_steps
        else 2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (k - warmup_steps) / (40 - warmup_steps))))
        for k in range(41)
    ]
    assert rates == pytest.approx(expected)


def test_schedule_of_a_longer_run_continues_on_its_own_curve(seed: int) -> None:
    """In plain torch: what is restored is the step, and of the number of steps what the run was planned for."""
    steps = torch.randint(5, 40, (2,), generator=torch.Generator().manual_seed(seed)).tolist()

    def made(total: int) -> tuple[torch.optim.Optimizer, WarmupCosine]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, WarmupCosine(optimizer, total, warmup=2)

    first, schedule = made(steps[0])
    for _ in range(3):
        first.step()
        schedule.step()
    for total in (steps[0], steps[0] + steps[1]):
        second, restored = made(total)
        second.load_state_dict(first.state_dict())
        restored.load_state_dict(schedule.state_dict())
        whole, expected = made(total)
        for _ in range(3):
            whole.step()
            expected.step()
        while expected.last_epoch < total:
            assert restored.get_last_lr() == expected.get_last_lr() == [group["lr"] for group in second.param_groups]
            for optimizer, one in ((second, restored), (whole, expected)):
                optimizer.step()
                one.step()
    # A run whose length has been changed keeps that.
    schedule.set_total_steps(77)
    _, restored = made(steps[0])
    restored.load_state_dict(schedule.state_dict())
    assert restored.total_steps == 77
