"""`cross_entropy_rows` as one Triton kernel: two passes over a row, the second of which writes the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnx_cli.kernels.student_t import MIN_DISTANCE, StudentT

BLOCKS = ((1024, 4), (4096, 8), (16_384, 16), (65_536, 32))  # logits in registers at a time, and warps to hold them
WIDE_BLOCKS = (*BLOCKS[:2], (32_768, 32))  # where a logit takes 4 bytes; both as measured at 32,000 and 50,304 logits
AMD_BLOCKS = BLOCKS[:2]  # 64 lanes to a warp, and 1024 to a program


@triton.jit
def _squared_distance(logit, x_square, w_square, min_distance):
    distance = x_square - 2 * logit + w_square
    return tl.where(distance < min_distance, min_distance, distance)  # tl.maximum would lose NaN


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    targets,
    losses,
    x_squares,
    w_squares,
    ignore_index,
    factor,
    df,
    power,
    min_distance,
    V: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK: tl.constexpr,
    STUDENT_T: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """One program for each row, of which it reads and writes PITCH elements, whole vectors: V itself may not be a
    multiple of 16 bytes."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * PITCH
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    wanted = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    if STUDENT_T:
        x_square = tl.load(x_squares + row)
        distance_to_wanted = _squared_distance(wanted, x_square, tl.load(w_squares + target, mask=inside), min_distance)
        wanted = -power * tl.log(1 + distance_to_wanted / df)

    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)  # of exp(logit - top)
    for start in range(0, V, BLOCK):
        column = start + columns
        logits = tl.load(logits_ptr + column, mask=column < PITCH, other=0.0).to(tl.float32)
        if STUDENT_T:
            w_square = tl.load(w_squares + column, mask=column < V, other=0.0)
            logits = -power * tl.log(1 + _squared_distance(logits, x_square, w_square, min_distance) / df)
        logits = tl.where(column < V, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top), 0)
        top = new_top
    log_sum = top + tl.log(total)
    counts = target != ignore_index
    tl.store(losses + row, tl.where(counts, log_sum - wanted, 0.0))

    if GRADIENT:
        for start in range(0, V, BLOCK):
            column = start + columns
            logits = tl.load(logits_ptr + column, mask=column < PITCH, other=0.0).to(tl.float32)
            slope = factor
            if STUDENT_T:
                w_square = tl.load(w_squares + column, mask=column < V, other=0.0)
                distance = _squared_distance(logits, x_square, w_square, min_distance)
                logits = -power * tl.log(1 + distance / df)
                slope = factor * 2 * power / (distance + df)
            gradient = (tl.exp(logits - log_sum) - tl.where(column == target, 1.0, 0.0)) * slope
            gradient = tl.where(counts & (column < V), gradient, 0.0)
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < PITCH)


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, ignore_index: int, student_t: StudentT | None, factor: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """`cross_entropy_rows`; the gradient takes the place of `logits`. Targets outside of the vocabulary give NaN."""
    n_rows, V = logits.shape
    assert logits.stride(1) == 1 and targets.stride(0) == 1, (logits.stride(), targets.stride())
    losses = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
    x_squares, w_squares = (losses, losses) if student_t is None else (student_t.x_squares, student_t.w_squares)
    df, power = (1.0, 1.0) if student_t is None else (student_t.df, (student_t.df + student_t.dim) / 2)
    blocks = AMD_BLOCKS if torch.version.hip else BLOCKS if logits.element_size() == 2 else WIDE_BLOCKS
    block, warps = next((pair for pair in blocks if pair[0] >= V), blocks[-1])
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(n_rows,)](
            logits,
            targets,
            losses,
            x_squares,
            w_squares,
            ignore_index,
            factor,
            df,
            power,
            MIN_DISTANCE,
            V=V,
            PITCH=logits.stride(0),
            BLOCK=min(block, triton.next_power_of_2(V)),
            STUDENT_T=student_t is not None,
            GRADIENT=gradient,
            num_warps=warps,
        )
    return losses, logits if gradient else None
