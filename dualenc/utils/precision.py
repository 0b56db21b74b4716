"""Matrix products in full fp32, whatever the caller has chosen for the others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """Disable autocast and, outside of a compiled graph, TF32 and its like on a CPU, and restore both.

    Args:
        device: device of the products.
    """
    with torch.autocast(device.type, enabled=False):
        if torch.compiler.is_compiling():  # A compiled graph uses one setting of TF32 for all of its products.
            yield
            return
        # These switches decide, also where the caller has used an older one, such as set_float32_matmul_precision.
        # The older ones raise an error when they are read after these have been set.
        backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before):
                backend.fp32_precision = "none"  # the value of the more general switch, torch.backends.fp32_precision
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision
