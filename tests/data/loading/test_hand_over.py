"""Batches that workers hand over: equal in every respect, large tensors in shared memory and small ones copied."""

import torch
from torch import Tensor

from dualenc.data.workers import SMALL, item_loader

DTYPES = [torch.uint8, torch.bool, torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16]


class Batches:
    """Data set of batches of tensors of many kinds, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + number)
        found = {}
        for dtype in DTYPES:
            for name, shape in {"scalar": (), "empty": (0, 3), "small": (3, 5, 7, 2), "large": (3, 40, 60, 3)}.items():
                found[f"{name} {dtype}"] = torch.randint(0, 100, shape, generator=generator).to(dtype)
        channels_last = torch.randint(0, 256, (2, 6, 6, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
        return {**found, "strided": channels_last, "part": found["large torch.int64"].clone()[1, :4, :5]}


def test_batches_arrive_as_they_were_made(seed: int) -> None:
    data = Batches(seed)
    for number, batch in enumerate(item_loader(data, range(5), 2)):
        expected = data[number]
        assert batch.keys() == expected.keys()
        for name, x in batch.items():
            other = expected[name]
            assert torch.equal(x, other), name
            assert (x.dtype, x.stride()) == (other.dtype, other.stride()), name
            copied = not x.numel() or (x.nbytes <= SMALL and other.is_contiguous() and x.dtype != torch.bfloat16)
            assert x.is_shared() != copied, name
            x.zero_()  # the batch is writable
    assert any(x.nbytes > SMALL for x in data[0].values())
