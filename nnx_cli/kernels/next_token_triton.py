"""`append_next` as a Triton kernel, a program for every sequence. Needs Triton, which whoever imports this has looked
for.

Thresholds are found bit by bit: floating-point numbers, as integers, have an order in which the largest number that
leaves enough tokens, or enough of their probability, takes 32 comparisons of all. Of tokens that are equally likely at
a threshold all stay.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOGITS_PER_WARP = 2048


def append_next(
    logits: Tensor,
    stages: Any,
    max_penalised: float,
    values: Tensor,
    top_k: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    newest: Tensor,
    occurred: Tensor,
    uniforms: Tensor,
    step: Tensor,
) -> None:
    """As `next_token.append_next`."""
    R, V = logits.shape
    block = max(128, triton.next_power_of_2(V))
    with torch.cuda.device_of(logits):
        _append_next[(R,)](
            logits,
            values,
            top_k,
            tokens,
            lengths,
            newest,
            occurred,
            uniforms,
            step,
            V,
            R,
            tokens.shape[1],
            logits.stride(0),
            GREEDY=stages.greedy,
            PENALTY=stages.repetition_penalty,
            TOP_K=stages.top_k > 0,
            TOP_P=stages.top_p,
            MIN_P=stages.min_p,
            MAX_PENALISED=max_penalised,
            BLOCK=block,
            num_warps=min(32, max(4, block // LOGITS_PER_WARP)),
        )


@triton.jit
def _kth_largest(x, inside, k):
    """The k-th largest of x as an integer in the order of floating-point numbers, and all of x as such."""
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    order = tl.where(inside, order, 0)
    found = tl.zeros((), tl.uint32)
    for i in tl.static_range(32):
        higher = found | (1 << (31 - i))
        found = tl.where(tl.sum((order >= higher).to(tl.int32)) >= k, higher, found)
    return found, order


@triton.jit
def _within_top_p(p, top_p):
    """Whether the mass of all that is likelier than a token is below `top_p`."""
    bits = p.to(tl.int32, bitcast=True)
    found = tl.where(tl.sum(tl.where(bits > 0, p, 0.0)) >= top_p, 0, -1)  # largest number with as much mass above it
    for i in tl.static_range(31):
        higher = found | (1 << (30 - i))
        found = tl.where((found >= 0) & (tl.sum(tl.where(bits > higher, p, 0.0)) >= top_p), higher, found)
    return bits > found


@triton.jit
def _drawn(p, v, uniform):
    """The token where the cumulated probabilities pass a share of their sum; one that has some itself."""
    cumulated = tl.cumsum(p, 0)
    total = tl.max(cumulated)
    n_below = tl.sum((cumulated <= uniform * total).to(tl.int32))
    return tl.minimum(n_below, tl.max(tl.where(p > 0, v, 0)))


@triton.jit
def _append_next(
    logits,
    values,
    top_k,
    tokens,
    lengths,
    newest,
    occurred,
    uniforms,
    step,
    V,
    R,
    S,
    stride,
    GREEDY: tl.constexpr,
    PENALTY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    MAX_PENALISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK)
    inside = v < V
    x = tl.load(logits + row * stride + v, inside, float("-inf")).to(tl.float32)
    if PENALTY:
        penalty = tl.load(values + 3)
        changed = tl.where(x > 0, x / penalty, x * penalty)
        changed = tl.minimum(tl.maximum(changed, -MAX_PENALISED), MAX_PENALISED)
        x = tl.where(tl.load(occurred + row * V + v, inside, 0) != 0, changed, x)
    if GREEDY:
        token = tl.argmax(x, 0)
    else:
        x = x / tl.load(values)
        if TOP_K:
            least, order = _kth_largest(x, inside, tl.load(top_k).to(tl.int32))
            x = tl.where(order >= least, x, float("-inf"))
        p = tl.exp(x - tl.max(x))
        p = p / tl.sum(p)
        if TOP_P:
            p = tl.where(_within_top_p(p, tl.load(values + 1)), p, 0.0)
        if MIN_P:
            p = tl.where(p < tl.load(values + 2) * tl.max(p), 0.0, p)
        n_drawn = tl.load(step + row)
        token = _drawn(p, v, tl.load(uniforms + n_drawn * R + row))
        tl.store(step + row, n_drawn + 1)
    length = tl.load(lengths + row)
    tl.store(newest + row, token.to(tl.int64))
    tl.store(tokens + row * S + length, token.to(tl.int64))
    tl.store(lengths + row, length + 1)
    if PENALTY:
        tl.store(occurred + row * V + token, 1)
