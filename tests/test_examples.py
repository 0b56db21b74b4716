"""The examples in the docstrings of the package's public names: each name has one, and it runs."""

import doctest
import inspect
import os
from pathlib import Path

import pytest

import dualenc


@pytest.mark.parametrize("name", [name for name in dualenc.__all__ if not name.startswith("_")])
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    thing = getattr(dualenc, name)
    found = doctest.DocTestFinder(recurse=False).find(thing, name, inspect.getmodule(thing))
    assert any(test.examples for test in found), f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in found:
        runner.run(test)
    assert runner.failures == 0
    assert os.listdir(tmp_path) == []
