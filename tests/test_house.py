"""The laws of the house."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_rest_needs_no_trainer() -> None:
    """Everything but training, cli and demo imports without lightning, transformers and what would import them."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "dualenc").rglob("*.py")
        if path.stem not in ("__init__", "__main__", "cli", "demo") and "training" not in path.parts
    ]
    assert "dualenc.models.text_encoder" in modules
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}]; "
        "print([m for m in ('lightning', 'transformers', 'torchmetrics', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["weights_only=False", "allow_pickle=True", "shell=True", "extractall("])
def test_nothing_unsafe(name: str) -> None:
    assert not [path for path in (ROOT / "dualenc").rglob("*.py") if name in path.read_text()]
