"""The code on a CUDA device that is not there: tensors without content, whose operations check devices as real ones do.

A step must not mix devices, and the host must not wait for the device: no blocking copy, and no number of a tensor in
Python. The engine of autograd cannot run on such tensors, so the package's backward functions are called directly.
"""

import inspect
import io
import pickle
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fits import write_questions, write_tags
from helpers import WORDS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data._utils.pin_memory import pin_memory

import dualenc.losses as losses
from dualenc.data import Pairs
from dualenc.data.text.masking import Masked
from dualenc.losses import _Clip, _Siglip, clip_loss, siglip_loss
from dualenc.models import DualEncoder, HeadConfig, ImageConfig, TextConfig
from dualenc.tokens import Tokens
from dualenc.training import EMA, ContrastiveTask, ReplacedTokenTask, TextTask, pair_data, text_data
from dualenc.training.optim import clip_gradients
from dualenc.training.pair_data import PairData
from dualenc.training.ranks import mean_over_ranks
from dualenc.training.text_data import TextData

CUDA = torch.device("cuda", 0)
NEEDS_VALUES = DataDependentOutputException, DynamicOutputShapeException
IMAGE = ImageConfig("vit_tiny_patch16_224", 32, {"depth": 2, "embed_dim": 32, "num_heads": 2})
TEXT = TextConfig(vocab_size=60, width=32, layers=2, heads=2, context_length=48, types=2, norm="pre")
TEXTS = {
    "cls": {},
    "mean, post-norm, dropout": {"pool": "mean", "norm": "post", "dropout": 0.1},
    "last, causal": {"pool": "last", "causal": True},
    "rotary, window": {"positions": "rotary", "window": 4, "global_every": 2, "local_theta": 100.0},
    "shared": {"groups": 1, "embed_width": 16},
}
HEADS = {
    "mlm": HeadConfig("mlm"),
    "single_label": HeadConfig("classification", ("0", "1", "2"), class_weights=(0.5, 1.0, 2.0)),
    "multi_label": HeadConfig("classification", ("0", "1", "2"), "multi_label", class_weights=(0.5, 1.0, 2.0)),
    "regression": HeadConfig("classification", ("stars",), "regression"),
    "tags": HeadConfig("token_classification", ("PER", "LOC"), class_weights=(0.5, 1.0, 2.0, 1.0, 1.0)),
    "answers": HeadConfig("question_answering", max_length=32, stride=4, no_answer=True),
    "negatives": HeadConfig("embedding", problem="negatives"),
    "cosine": HeadConfig("embedding", problem="cosine"),
}


class Device(TorchDispatchMode):
    """A mode that records operations, and those for which the host waits for the device.

    Tensors have no content inside of it.
    """

    def __init__(self):
        super().__init__()
        self.names, self.waits = [], []
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        self.names.append(name)
        out = func(*args, **kwargs)
        if name.startswith(("aten._to_copy", "aten.copy_")):
            tensors = [x for x in (*tree_leaves((args, kwargs)), *tree_leaves(out)) if isinstance(x, Tensor)]
            non_blocking = kwargs.get("non_blocking") or (name.startswith("aten.copy_") and args[2:] == (True,))
            if {x.device.type for x in tensors} == {"cpu", "cuda"} and not non_blocking:
                self.waits.append((name, [tuple(x.shape) for x in tensors]))
        return out

    def has(self, word):
        return any(word in name for name in self.names)

    def host(self, batch):
        """Return a batch without content, on the host."""
        return tree_map_only(Tensor, self.fake.from_tensor, batch)

    def module(self, model):
        """Move the parameters and buffers of a module to the device, in place; shared ones stay shared."""
        moved = {}  # by the identity of the tensors, which are kept so that no other one gets it
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, x in own.items():
                    if x is not None and id(x) not in moved:
                        empty = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                        moved[id(x)] = x, nn.Parameter(empty, x.requires_grad) if own is module._parameters else empty
                    own[name] = None if x is None else moved[id(x)][1]
        return model


@pytest.fixture
def device(monkeypatch):
    """Return a device of compute capability 9.0 that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for data in (pair_data, text_data):  # A stream needs a driver.
        monkeypatch.setattr(data, "copy_beside", lambda copy, device: copy())
    return Device()


@contextmanager
def autocast(half):
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        yield


def all_on_device(tree):
    tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
    return bool(tensors) and all(x.device == CUDA for x in tensors)


def draw_texts(count, tokens=None):
    return [torch.randint(5, 60, (n,)).tolist() for n in (tokens or torch.randint(1, 20, (count,)).tolist())]


def pairs(count, masked=True):
    """Return a batch of pairs as the data set makes it, on the host."""
    texts = draw_texts(count)
    tokens = Tokens.pack(texts, [[0] * len(text) for text in texts])
    hidden = torch.arange(0, len(tokens.ids), 3)
    return Pairs(
        torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8).contiguous(memory_format=torch.channels_last),
        tokens,
        torch.arange(count),
        torch.randint(2**60, (count, 2)),
        Masked(tokens.ids.clone(), hidden, tokens.ids[hidden]) if masked else None,
    )


def text_batch(folder, name, head):
    """Return a batch of texts for a head as the loader makes it, and the data module that moves it."""
    rng = np.random.default_rng(torch.initial_seed())
    path = folder / "lines.tsv"
    source = {"files": str(path)}
    if name == "tags":
        source = {"files": str(write_tags(folder / "lines.conll", ["PER", "LOC"], rng))}
    elif name == "answers":
        source = {"files": write_questions(folder / "lines.jsonl", rng)}
    else:
        texts = [[" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 12, 3)] for _ in range(40)]
        lines = ["\t".join([*row, str(rng.integers(3))]) for row in texts]
        path.write_text("\n".join(["text\tother\tfar\tlabel", *lines]))
        source |= {"pair": "other"} if name in ("negatives", "cosine") else {}
        source |= {"negatives": "far"} if name == "negatives" else {}
    data = TextData(text=TEXT, heads={name: head}, train={name: source}, workers=0, batch_size=8)
    data.trainer = SimpleNamespace(
        default_root_dir=str(folder / "run"), state=SimpleNamespace(fn="fit"), world_size=1, global_rank=0,
        lightning_module=SimpleNamespace(text_checkpoint=None), limit_val_batches=1.0,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    return next(iter(data.train_dataloader())), data


class Trainer(SimpleNamespace):
    """A trainer with the attributes that a step reads."""

    __hash__ = object.__hash__


def attach(task):
    trainer = Trainer(world_size=1, global_rank=0, global_step=0, precision="bf16-mixed")
    task._trainer = trainer
    return task


# The mode itself


def test_what_waits_is_found(device):
    with device:
        _what_waits(device)


def _what_waits(device):
    x, y = torch.empty(3, device="cuda"), torch.empty(3)
    y.to("cuda", non_blocking=True)
    x.to("cpu", non_blocking=True)
    x.copy_(y, non_blocking=True)
    x.new_full((), 2.0)
    assert device.waits == []
    for number, wait in enumerate(
        [
            lambda: y.to("cuda"),
            lambda: x.cpu(),
            lambda: x.copy_(y),
            lambda: torch.tensor(1.0, device="cuda"),
            lambda: x.new_tensor(1.0),
            lambda: torch.as_tensor([1, 2], device="cuda"),
        ]
    ):
        wait()
        assert len(device.waits) == number + 1
    for wait in (lambda: x[0].item(), lambda: x.tolist(), lambda: x.nonzero(), lambda: x[x > 0], lambda: bool(x[0])):
        with pytest.raises(NEEDS_VALUES):
            wait()
    with pytest.raises(RuntimeError, match="device"):
        x + y


# Towers and losses


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("name", TEXTS)
def test_towers_and_losses_stay_on_the_device(device, name, half):
    """Packed attention is that of the device in half precision, and padded otherwise."""
    model, tokens = DualEncoder(IMAGE, replace(TEXT, **TEXTS[name]), 16, logit_bias=True), pairs(6).tokens
    with device, autocast(half):
        device.module(model)
        tokens = device.host(tokens).to("cuda", non_blocking=True)
        out = model(torch.empty(6, 3, 32, 32, device="cuda"), tokens)
        found = [loss(*out) for loss in (clip_loss, siglip_loss)]
    assert all_on_device([out, found])
    assert device.waits == []
    assert device.has("_flash_attention_forward") == half
    assert device.has("grouped_attention") is False


class Context:
    """The tensors and attributes that a function keeps for its backward pass."""

    needs_input_grad = (True,) * 10

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("duplicates", ["ignore", "mask", "positive"])
@pytest.mark.parametrize("function", [_Clip, _Siglip])
def test_both_passes_of_the_losses_stay_on_the_device(device, monkeypatch, function, duplicates, blocks):
    monkeypatch.setattr(losses, "GPU_SCORES", -(-(6 * 9) // blocks))
    with device, CUDA:
        image, text, negatives = (F.normalize(torch.empty(n, 8), dim=1) for n in (6, 6, 3))
        scale, bias = torch.empty(1), torch.empty(1)
        ids, own = torch.empty(6, 2, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        context, group = Context(), None
        if function is _Clip:
            arguments = image, text, scale, bias, negatives, group, ids, duplicates, own
        else:
            arguments = image, text, scale, bias, group, ids, duplicates, True
        loss = function.forward(context, *arguments)
        grads = inspect.unwrap(function.backward)(context, torch.ones_like(loss))
    assert [None if x is None else x.shape for x in grads[:4]] == [x.shape for x in arguments[:4]]
    assert all_on_device([loss, *grads])
    assert device.waits == []


# Steps of the tasks


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_contrastive_step_stays_on_the_device(device, micro_batches):
    host = [pairs(6) for _ in range(micro_batches)]
    task = attach(ContrastiveTask(IMAGE, TEXT, 16, duplicates="mask", mlm_weight=0.5))
    task.on_train_batch_start(host, 0)
    with device, autocast(True):
        device.module(task)
        batch = PairData("shards", task.preprocess, TEXT).transfer_batch_to_device(device.host(host), CUDA, 0)
        assert device.waits == []
        task.preprocess.normalize(batch[0].images, torch.float32)  # Mean and deviation are copied once.
        device.waits.clear()
        loss = task.training_step(batch, 0)
    assert all_on_device(loss)
    assert device.waits == []
    assert device.has("_flash_attention_forward")


@pytest.mark.parametrize("name", [*HEADS, "rtd"])
def test_a_step_on_texts_stays_on_the_device(device, tmp_path, name):
    heads = {name: HEADS.get(name, HeadConfig("rtd"))}
    host, data = text_batch(tmp_path, name, heads[name])
    task = attach(ReplacedTokenTask(TEXT) if name == "rtd" else TextTask(heads, TEXT))
    task.on_train_batch_start(host, 0)
    with device, autocast(True):
        device.module(task)
        batch = data.transfer_batch_to_device(device.host(host), CUDA, 0)
        assert device.waits == []
        task.training_step(batch, 0)  # Weights of the labels are copied once.
        device.waits.clear()
        loss = task.training_step(batch, 0)
    assert all_on_device(loss)
    assert device.waits == []
    assert device.has("_flash_attention_forward")


def test_dropout_of_a_step_is_seeded_on_host_and_device(device, monkeypatch):
    """Both generators have the seed that torch.manual_seed would give them, another one in each step."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    task, drawn = attach(TextTask({"mlm": HEADS["mlm"]}, TEXT)), []
    monkeypatch.setattr(type(task), "device", CUDA)
    for step in (0, 1, 0):
        task.trainer.global_step = step
        task.on_train_batch_start(SimpleNamespace(rows=torch.arange(2)), 0)
        drawn.append(torch.rand(3))
        torch.manual_seed(seeds[-1])
        assert torch.equal(torch.rand(3), drawn[-1])
        seeds[:] = [*dict.fromkeys(seeds)]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert len(seeds) == 2


def test_clipping_and_averaging_stay_on_the_device(device):
    model, average = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), EMA()
    with device:
        device.module(model)
        for algorithm in ("norm", "value"):
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            assert all_on_device(clip_gradients(model.parameters(), 1.0, algorithm))
        average.on_train_start(None, model)
        model.skip = torch.empty((), dtype=torch.bool, device="cuda")
        average.on_train_batch_end(SimpleNamespace(global_step=3), model, None, None, 0)
        assert all_on_device(average.average)
        assert all_on_device(mean_over_ranks(torch.empty(2, device="cuda"), [5, torch.empty((), device="cuda")], 1))
    assert device.waits == []


# Pinned memory


class Finder(pickle.Pickler):
    """Finder of all tensors in an object, wherever they are in it."""

    def __init__(self, content):
        super().__init__(io.BytesIO())
        self.found = []
        self.dump(content)

    def persistent_id(self, value):
        if isinstance(value, Tensor):
            self.found.append(value)
            return len(self.found)
        return None


@pytest.mark.parametrize("name", ["pairs", *HEADS, "rtd"])
def test_all_tensors_of_a_batch_are_pinned(monkeypatch, tmp_path, name):
    """The walk through a batch by which torch's loader pins reaches every tensor, and keeps the types."""
    batch = pairs(5) if name == "pairs" else text_batch(tmp_path, name, HEADS.get(name, HeadConfig("rtd")))[0]
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, *args: pinned.append(self) or self.clone())
    copy = pin_memory([batch], None)[0]
    assert type(copy) is type(batch)
    tensors, copies = Finder(batch).found, Finder(copy).found
    assert len(tensors) == len(copies) == len(pinned) >= 5
    assert {id(x) for x in pinned} == {id(x) for x in tensors}
    assert all(map(torch.equal, copies, tensors))
    assert copy.tokens.max_len == batch.tokens.max_len
    pinned.clear()
    hidden = SimpleNamespace(batch=batch)  # control: an object that the walk does not enter
    pin_memory([hidden], None)
    assert pinned == []
    assert len(Finder(hidden).found) == len(tensors)
