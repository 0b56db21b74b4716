"""The plan of a run: its memory compared with real models, optimizers and graphs, and its arithmetic."""

import random
from types import SimpleNamespace

import pytest
import torch
from helpers import write_shards
from torch import nn
from torch.utils._pytree import tree_leaves

from dualenc.data import Preprocess
from dualenc.data.loading.epoch_plan import EpochPlan
from dualenc.models import HeadConfig, ImageConfig, TextConfig
from dualenc.training import ContrastiveTask, PairData, TextData, TextTask
from dualenc.training.fake_batches import fake_batch
from dualenc.training.optim import Tuning
from dualenc.training.plan import Peak, Plan, PlanOptions, total_steps
from dualenc.training.step_memory import ROUND, StepMemory, _backward, fake_gpu, optimizer_memory, step_memory

IMAGE = ImageConfig("vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 48, "num_heads": 2, "patch_size": 8})
TEXT = TextConfig(vocab_size=300, width=32, layers=2, heads=2, context_length=16)


def contrastive(device: str = "meta", **more) -> ContrastiveTask:
    with torch.device(device):
        return ContrastiveTask(IMAGE, TEXT, 24, **more)


def pair_data(**more) -> PairData:
    return PairData("shards", Preprocess(32), TEXT, **{"batch_size": 64, "workers": 0, **more})


def rounded(size: int) -> int:
    return -(-size // ROUND) * ROUND


class Linear(nn.Module):
    """A task of one product and a square, of which every byte is known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)
        self._batch = None

    def training_step(self, batch, _):
        return self.layer(batch).square().sum()


def test_bytes_of_a_linear_model_are_those_of_arithmetic(seed):
    width, rows = random.Random(seed).choice([32, 64, 96]), 128
    found = step_memory(Linear(width), torch.empty(rows, width), "32-true")  # type: ignore[arg-type]
    activation, weight, scalar = 4 * rows * width, 4 * width * width, rounded(4)
    assert found.inputs == activation
    assert found.forward == 3 * activation + scalar  # the input, the product and its square; then the sum
    # In the backward pass: input and product, and two gradients at a time, or one and that of the weight.
    assert found.backward >= 3 * activation + min(activation, weight)
    assert found.backward <= 5 * activation + weight + 3 * scalar


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_without_the_engine_are_those_of_the_engine(seed, checkpointing):
    torch.manual_seed(seed)
    task = contrastive("cpu", grad_checkpointing=checkpointing).double()
    trainer = type("Trainer", (SimpleNamespace,), {"world_size": 1})()
    task.trainer = trainer
    batch = fake_batch(task, pair_data(), 6, 5)
    batch = batch._replace(images=torch.randint(0, 255, batch.images.shape, dtype=torch.uint8))
    batch = batch._replace(tokens=batch.tokens._replace(ids=torch.randint(0, 300, batch.tokens.ids.shape)))
    grads = []
    for own in (False, True):
        task.zero_grad()
        losses = [task.training_step(batch, 0)]
        _backward(losses) if own else losses[0].backward()
        grads.append({name: p.grad.clone() for name, p in task.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[0].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], expected, rtol=1e-10, atol=1e-12)


def test_saved_activations_are_those_of_a_real_graph(seed):
    """Compare the slope of the forward pass with the tensors that a graph on the CPU saves, in fp32."""
    sizes = (32, 64)
    task = contrastive("cpu")
    plan = Plan(task, pair_data(), PlanOptions())
    assert plan.tokens == 16
    saved = []
    for size in sizes:
        kept: dict[int, int] = {}
        batch = fake_batch(task, plan.data, size, 16)
        parameters = {p.untyped_storage()._cdata for p in task.parameters()}

        def keep(x: torch.Tensor, kept=kept, parameters=parameters) -> torch.Tensor:
            if x.untyped_storage()._cdata not in parameters:
                kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = task.training_step(batch, 0)
        saved.append(sum(kept.values()))
        del loss
    real = (saved[1] - saved[0]) / (sizes[1] - sizes[0])
    found = [step_memory(task, fake_batch(task, plan.data, n, 16), "32-true").forward for n in sizes]
    counted = (found[1] - found[0]) / (sizes[1] - sizes[0])
    # The GPU pads texts around attention in fp32, which the CPU does not: queries, keys and values once more.
    assert real < counted < 1.25 * real


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_optimizer_memory_is_that_of_a_real_optimizer(name):
    kind = getattr(torch.optim, name)
    task = contrastive("cpu", optimizer=lambda groups: kind(groups, lr=0.1))
    plan = Plan(task, pair_data(), PlanOptions())
    optimizer = task.configure_optimizers()["optimizer"]
    for parameter in task.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [x for x in tree_leaves(dict(optimizer.state)) if isinstance(x, torch.Tensor) and x.dim()]
    real = sum(rounded(x.nbytes) for x in tensors)
    found = optimizer_memory(plan.task).state
    assert real <= found <= real + ROUND * len(list(task.parameters()))  # numbers of steps
    assert (found > 1e5) == (name != "SGD")


def test_parameters_and_weights_are_those_of_the_built_model():
    plan = Plan(contrastive(), pair_data(), PlanOptions(averaged=True))
    real = contrastive("cpu")
    parts = plan.parameters()
    assert parts["image tower"] == sum(p.numel() for p in real.model.image.parameters())
    assert parts["text tower"] == sum(p.numel() for p in real.model.text.parameters())
    assert sum(parts.values()) == sum(p.numel() for p in real.parameters())
    size = sum(p.nbytes for p in real.parameters())
    assert {plan.fixed[name] for name in ("weights", "gradients", "moving average")} == {size}


def test_frozen_weights_have_no_gradients():
    plan = Plan(contrastive(image_tuning=Tuning(locked=True)), pair_data(), PlanOptions())
    image = plan.parameters()["image tower"] * 4
    assert plan.fixed["weights"] - plan.fixed["gradients"] == image
    everything = Plan(contrastive(), pair_data(), PlanOptions())
    assert plan.planned.at(64) < everything.planned.at(64) - image


@pytest.mark.parametrize("micro", [None, 16])
def test_the_largest_batch_fits_and_one_more_does_not(micro, seed):
    plan = Plan(contrastive(), pair_data(micro_batch_size=micro), PlanOptions(precision="bf16-mixed"))
    peak, rng, before = plan.planned, random.Random(seed), 0
    for memory in sorted(rng.uniform(2, 500) * peak.at(1) for _ in range(20)):
        most = peak.fitting(memory)
        assert peak.at(most) <= memory < peak.at(most + 1)
        assert most >= before
        before = most
    assert before > 0


def test_other_sizes_are_on_the_line_of_the_two_that_were_counted():
    plan = Plan(contrastive(), pair_data(), PlanOptions(precision="bf16-mixed"))
    for size in (96, 256, 512):
        again = plan.peak(size, whole=True)
        assert plan.planned.at(size) == pytest.approx(again.at(size), rel=0.02)


def test_micro_batches_take_less_and_their_parts_add_up():
    whole = Plan(contrastive(), pair_data(batch_size=256), PlanOptions())
    parts = Plan(contrastive(), pair_data(batch_size=256, micro_batch_size=32), PlanOptions())
    assert parts.micro_batch == 32
    assert parts.planned.at(32) < whole.planned.at(256) / 3
    # Eight real micro-batches, where the plan has counted two.
    batch = fake_batch(parts.task, parts.data, 32, 16)
    step = step_memory(parts.task, [batch] * 8, "32-true")
    real = parts.fixed["weights"] + parts.fixed["optimizer state"] + max(parts.fixed["gradients"] + step[1], step[2])
    following = 256 * parts.inputs_of_sample
    assert parts.planned.at(32) == pytest.approx(real + following, rel=0.05)


def test_checkpointing_takes_less():
    sizes = {
        flag: Plan(contrastive(grad_checkpointing=flag), pair_data(), PlanOptions()).planned for flag in (False, True)
    }
    assert sizes[True].per_sample < 0.8 * sizes[False].per_sample


def test_sharding_divides_and_buckets_add():
    one, many = (Plan(contrastive(), pair_data(), PlanOptions(devices=n, sharded=n > 1)) for n in (1, 4))
    assert many.fixed["optimizer state"] == one.fixed["optimizer state"] // 4
    assert many.fixed["gathered weights"] > 0
    ddp, views = (Plan(contrastive(), pair_data(), PlanOptions(devices=2, bucket_views=flag)) for flag in (False, True))
    assert sum(ddp.fixed.values()) - sum(views.fixed.values()) == ddp.fixed["gradients"]


@pytest.mark.parametrize("kind", ["classification", "token_classification", "question_answering", "mlm", "embedding"])
def test_text_heads_have_a_plan(kind):
    more = {"labels": ("a", "b")} if kind.endswith("classification") else {}
    more |= {"max_length": 16, "stride": 4} if kind == "question_answering" else {}
    more |= {"problem": "negatives"} if kind == "embedding" else {}
    heads = {"head": HeadConfig(kind, **more)}
    text = TextConfig(vocab_size=300, width=32, layers=2, heads=2, context_length=16, types=2)
    with torch.device("meta"):
        task = TextTask(heads, text)
    source = {"files": "x.tsv"} | ({"pair": "other"} if kind == "embedding" else {})
    data = TextData({"head": source}, text, heads, batch_size=32)  # type: ignore[dict-item]
    plan = Plan(task, data, PlanOptions(device_memory=80))
    assert plan.planned.at(32) > sum(plan.fixed.values())
    assert plan.planned.per_sample > 16 * 32 * 4 * task.model.encoder.layers  # more than one activation a layer
    assert [title for title, _ in plan.sections()][-1] == "Run"


def test_steps_are_those_of_the_epoch_plan(seed, tmp_path):
    write_shards(tmp_path / "shards", [20, 15, 13], seed)
    data = PairData(str(tmp_path / "shards"), Preprocess(32), TEXT, val=None, batch_size=8, workers=0)
    plan = Plan(contrastive(), data, PlanOptions(max_epochs=3, samples_per_second=2.0))
    lines = {line.name: line for _, lines in plan.sections() for line in lines}
    epoch = len(EpochPlan([20, 15, 13], 0, 0, 8))
    assert lines["steps of an epoch"].value == str(epoch)
    assert lines["steps"].value == str(3 * epoch)
    assert lines["time"].value == "0:01:12"  # 144 pairs, 2 a second
    size = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar"))
    assert lines["shards"].value == f"{size / 1e6:,.1f} MB"


def test_total_steps():
    assert total_steps(10, 3, -1) == 30
    assert total_steps(10, 3, 7) == 7
    assert total_steps(10, -1, 50) == 50
    assert total_steps(None, 3, -1) is None
    assert total_steps(10, None, -1) is None


def test_the_peak_is_the_larger_one_of_both_passes():
    steps = {10: StepMemory(1, 100, 150), 20: StepMemory(2, 200, 300)}
    assert Peak(steps, always=1000, gradients=20).at(20) == 1300
    assert Peak(steps, always=1000, gradients=500).at(20) == 1700  # of the step before, during the forward pass


def test_wrong_settings():
    with pytest.raises(ValueError, match="multiple of the 3 ranks"):
        Plan(contrastive(), pair_data(), PlanOptions(devices=3))
    with pytest.raises(ValueError, match="context_length 16"):
        Plan(contrastive(), pair_data(), PlanOptions(tokens=17))
    with pytest.raises(ValueError, match="bf16-true"):
        PlanOptions(precision="bf16-true")


def test_fake_gpu_leaves_nothing_behind():
    before = torch.cuda.get_device_capability, torch._C._current_graph_task_id
    with fake_gpu() as memory:
        x = torch.empty(1000, device="cuda")
        assert memory.now == rounded(x.nbytes)
        del x
        assert memory.now == 0
        assert memory.peak == rounded(4000)
    assert (torch.cuda.get_device_capability, torch._C._current_graph_task_id) == before
    assert not isinstance(torch.empty(2), torch._subclasses.FakeTensor)
