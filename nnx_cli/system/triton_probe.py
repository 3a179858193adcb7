"""The smallest Triton kernel, launched to see whether Triton runs. Imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def launch(device: torch.device) -> None:
    """Compile a kernel and run it on a CUDA device.

    Raises what Triton, its C compiler or the driver raise where one of them is missing.
    """
    x = torch.zeros(1, device=device)
    with torch.cuda.device(device):
        _add_one[(1,)](x, 1, BLOCK=16)


@triton.jit
def _add_one(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, i < n, 0.0) + 1.0, i < n)
