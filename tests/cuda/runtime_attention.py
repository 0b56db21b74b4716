"""Attention over packed texts, forward and backward, over the CUDA runtime without a device: prints the kernels."""

import json

import torch

from dualenc.models.attention import ragged_attention
from tools import runtime

found = {}
offsets = torch.tensor([0, 100, 220, 300], dtype=torch.int32, device="cuda")
for name, window, causal in (("whole texts", None, False), ("window", 8, False), ("causal", None, True)):
    q, k, v = (torch.empty(300, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))
    runtime.clear()
    ragged_attention(q, k, v, offsets, 120, causal=causal, window=window).backward(torch.empty_like(q))
    asked = runtime.asked()
    found[name] = {"kernels": list(asked.kernels), "waits": asked.waits}
print(json.dumps({"capability": torch.cuda.get_device_capability(), "found": found}))
