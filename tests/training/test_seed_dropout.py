"""The seed of dropout: the same numbers as after `torch.manual_seed`, on the device in use alone."""

import pytest
import torch

from dualenc.training.task import seed_dropout


def test_the_numbers_are_those_of_manual_seed(seed: int) -> None:
    torch.manual_seed(seed)
    expected = torch.rand(5), torch.nn.functional.dropout(torch.ones(40), 0.5)
    seed_dropout(seed, torch.device("cpu"))
    found = torch.rand(5), torch.nn.functional.dropout(torch.ones(40), 0.5)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert not torch.equal(torch.rand(5), found[0])


def test_the_generator_of_the_device_is_seeded_too(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, int]] = []
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(torch.get_device_module(kind), "manual_seed", lambda x, kind=kind: given.append((kind, x)))
    seed_dropout(seed, torch.device("cpu"))
    assert given == []
    seed_dropout(seed, torch.device("cuda", 0))
    assert given == [("cuda", seed)]
