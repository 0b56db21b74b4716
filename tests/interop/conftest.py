"""What the tests of exchange share."""

from pathlib import Path

import numpy as np
import pytest

from dualenc.interop import references
from dualenc.interop import verify as verify_module
from dualenc.interop.verify import Inputs


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The peer's program without a process of its own, which takes seconds to start."""

    def run(library: str, model: str, inputs: Inputs) -> dict[str, np.ndarray]:
        folder = tmp_path / "between"
        folder.mkdir(exist_ok=True)
        inputs.write(folder)
        references.main(library, model, str(folder), str(folder))
        with np.load(folder / "outputs.npz") as arrays:
            return dict(arrays)

    monkeypatch.setattr(verify_module, "run", run)
