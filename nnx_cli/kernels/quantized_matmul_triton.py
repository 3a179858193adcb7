"""Matmuls with int8 weights as Triton kernels: activations stay as they are, in fp32, bf16 or fp16.

Needs Triton, which whoever imports this has looked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 4  # rows of x up to which the weights are read once for each
BYTES = 8192  # of weights that a program holds at a time
PROGRAMS = 512  # at least, where that leaves rows enough: a GPU's processors should all have some
WIDTH = 1024  # columns at a time, where there are so many
TILE = 128  # columns at a time where there are more rows


def matmul(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (R, K) times codes (N, K) int8 and their scales (N,) float32: (R, N) in the type of x, summed in float32."""
    R, K = x.shape
    N = len(codes)
    x, out = x.contiguous(), torch.empty(R, N, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        if R <= FEW:
            width = min(WIDTH, triton.next_power_of_2(K))
            rows = _fewer(BYTES // width, N)
            _few[(triton.cdiv(N, rows), R)](x, codes, scale, out, N, K, ROWS=rows, WIDTH=width, num_warps=4)
        else:
            height = max(16, min(64, triton.next_power_of_2(R)))
            rows = max(16, _fewer(64, N))
            grid = triton.cdiv(N, rows), triton.cdiv(R, height)
            _many[grid](x, codes, scale, out, R, N, K, HEIGHT=height, ROWS=rows, WIDTH=TILE, num_warps=4, num_stages=4)
    return out


def _fewer(rows: int, n: int) -> int:
    """Rows of a matrix for a program, of n: `rows`, fewer where there would be few programs."""
    while rows > 1 and n // rows < PROGRAMS:
        rows //= 2
    return rows


@triton.jit
def _few(x, codes, scale, out, N, K, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r = tl.program_id(1)
    k = tl.arange(0, WIDTH)
    at = codes + row.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, K, WIDTH):
        inside = k + start < K
        w = tl.load(at + start, (row < N)[:, None] & inside[None, :], 0)
        total += w.to(tl.float32) * tl.load(x + r * K + start + k, inside, 0.0).to(tl.float32)[None, :]
    y = tl.sum(total, 1) * tl.load(scale + row, row < N, 0.0)
    tl.store(out + r * N + row, y.to(out.dtype.element_ty), row < N)


@triton.jit
def _many(x, codes, scale, out, R, N, K, HEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
    k = tl.arange(0, WIDTH)
    weights = codes + n.to(tl.int64)[None, :] * K + k[:, None]
    inputs = x + r.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros((HEIGHT, ROWS), tl.float32)
    for start in range(0, K, WIDTH):
        inside = k + start < K
        a = tl.load(inputs + start, (r < R)[:, None] & inside[None, :], 0.0)
        w = tl.load(weights + start, inside[:, None] & (n < N)[None, :], 0)
        total += tl.dot(a, w.to(a.dtype), input_precision="ieee")
    y = total * tl.load(scale + n, n < N, 0.0)[None, :]
    at = out + r.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, y.to(out.dtype.element_ty), (r < R)[:, None] & (n < N)[None, :])
