"""Which kernel attention over packed texts takes, by architecture, over a CUDA runtime without a device."""

import json
from pathlib import Path

import pytest
from runtime_runs import begin, finish

from tools import runtime


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_packed_texts_take_flash_attention_on_every_architecture(library, tmp_path, capability):
    """cuDNN's kernel would be planned anew for every number of tokens; it is available here, as on a GPU."""
    log = tmp_path / "log"
    environment = runtime.environment(library, capability=capability)
    finish([begin([str(Path(__file__).parent / "runtime_attention.py")], environment, log)], [log])
    answer = json.loads(log.read_text().splitlines()[-1])
    assert answer["capability"] == [capability // 10, capability % 10]
    for name, asked in answer["found"].items():
        for part in ("flash_fwd", "flash_bwd"):
            assert any(part in kernel for kernel in asked["kernels"]), (name, asked)
        assert not any("cudnn" in kernel for kernel in asked["kernels"])
        assert asked["waits"] == {}
