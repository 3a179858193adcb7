"""A step of the soft XOR's recurrence as one kernel. Needs Triton, which whoever imports this has looked for."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # states that one program computes: a batch has few, and they should spread over the GPU


def cell(sums: Tensor, state: Tensor) -> None:
    """What `soft_xor.cell` does: sums (B, 2 P) become derivatives, `state` (B, P) is written; both contiguous."""
    _cell[(triton.cdiv(state.numel(), BLOCK),)](sums, state, state.shape[1], state.numel(), BLOCK)


@triton.jit
def _cell(sums, state, P, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    left = sums + (i // P) * 2 * P + i % P
    right = left + P
    a, a_slope = _twice(tl.load(left, mask, 0.0).to(tl.float32))
    b, b_slope = _twice(tl.load(right, mask, 0.0).to(tl.float32))
    tl.store(state + i, (a + b) / 2 - a * b, mask)
    tl.store(left, a_slope * (0.5 - b), mask)
    tl.store(right, b_slope * (0.5 - a), mask)


@triton.jit
def _twice(x):
    """The activation applied twice, and its derivative; errors are absolute, some 1e-7."""
    e = tl.exp(-tl.abs(x))
    s = 2 * (1 - e) / (1 + e)
    above = 1 - s * s / 4
    under = 1.0
    for _ in tl.static_range(2):
        log = tl.log(1 + s)
        root = 1 / tl.sqrt(1 + 24 * log * log)
        above = above * (root * root * root)
        under = under * (1 + s)
        s = log * root
    square = s * s
    y = s * (1 + square * (1 / 12 + square * (1 / 80 + square / 448)))
    return tl.where(x < 0, -y, y), above / (under * (1 - square / 4))
