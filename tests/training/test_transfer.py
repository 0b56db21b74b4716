"""Batches are copied to a GPU on a stream of their own: here with fake tensors, and streams that only record."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dualenc.data.pairs import Pairs
from dualenc.data.text.dataset import Part, Texts
from dualenc.data.text.masking import Masked
from dualenc.tokens import Tokens
from dualenc.training import PairData, TextData
from dualenc.training.transfer import _stream_beside

GPU = torch.device("cuda", 0)


class Stream:
    """Stream that records what is done on it and with it."""

    def __init__(self, name: str, log: list[tuple[Any, ...]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(("wait", self.name, other.name))


class Streams(TorchDispatchMode):
    """Streams of a GPU that is not there; `log` has copies, waits and records in their order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.log: list[tuple[Any, ...]] = []
        self.current = Stream("compute", self.log)
        patch.setattr(torch.cuda, "Stream", lambda device: Stream("beside", self.log))
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(Tensor, "record_stream", lambda x, stream: self.log.append(("record", x.numel(), stream.name)))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.log.append(("copy", args[0].numel(), self.current.name, (kwargs or {}).get("non_blocking", False)))
        return func(*args, **(kwargs or {}))


def pairs() -> Pairs:
    tokens = Tokens.pack([[5, 6, 7], [8]])
    masked = Masked(tokens.ids.clone(), torch.tensor([1]), torch.tensor([5]))
    return Pairs(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), tokens, torch.arange(2), torch.zeros(2, 2), masked)


def texts() -> Texts:
    batch = pairs()
    part = Part(torch.arange(2), None, torch.zeros(2))
    return Texts(batch.tokens, batch.rows, {"words": part}, batch.masked)


def on_gpu(batch: Any) -> list[Tensor]:
    return [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.device.type == "cuda"]


@pytest.mark.parametrize("kind", ["pairs", "micro-batches", "texts"])
def test_the_copy_is_on_its_own_stream_and_the_step_waits_for_it(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    made: dict[str, Any] = {"pairs": pairs(), "micro-batches": [pairs(), pairs()], "texts": texts()}
    batch, data = made[kind], TextData if kind == "texts" else PairData
    transfer = data.transfer_batch_to_device
    _stream_beside.cache_clear()
    module: Any = SimpleNamespace()
    module._copied = lambda *args: PairData._copied(module, *args)
    with FakeTensorMode(allow_non_fake_inputs=True), Streams(monkeypatch) as streams:
        moved = transfer(module, batch, GPU, 0)
    _stream_beside.cache_clear()
    copies = [entry for entry in streams.log if entry[0] == "copy"]
    records = [entry for entry in streams.log if entry[0] == "record"]
    assert len(copies) == len(records) == len(on_gpu(moved)) >= 8
    assert {entry[2:] for entry in copies} == {("beside", True)}
    assert {entry[2] for entry in records} == {"compute"}
    assert streams.log == [*copies, ("wait", "compute", "beside"), *records]
    assert streams.current.name == "compute"
    hosts = moved if isinstance(moved, list) else [moved]
    assert all(one.rows.device.type == "cpu" for one in hosts)


def test_nothing_of_this_happens_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, None)
    batch: Any = texts()
    moved = TextData.transfer_batch_to_device(SimpleNamespace(), batch, torch.device("cpu"), 0)  # type: ignore[arg-type]
    assert all(a is b for a, b in zip(tree_leaves(moved), tree_leaves(batch), strict=True))
