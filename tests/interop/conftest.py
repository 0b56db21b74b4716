"""Fixtures of the tests of import and export."""

from pathlib import Path

import numpy as np
import pytest

from dualenc.interop import references
from dualenc.interop import verify as verify_module
from dualenc.interop.inputs import Inputs
from dualenc.interop.references import Reference


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run references in this process: a process of their own takes seconds to start."""

    def run(reference: Reference, model: str, inputs: Inputs) -> dict[str, np.ndarray]:
        folder = tmp_path / "between"
        folder.mkdir(exist_ok=True)
        inputs.write(folder)
        references.main(reference.program.__name__, model, str(folder), str(folder))  # type: ignore[union-attr]
        with np.load(folder / "outputs.npz") as arrays:
            return dict(arrays)

    monkeypatch.setattr(verify_module, "run", run)
