"""AdamW, Lion and Wolf of `optimizer_step` as Triton kernels: one launch a parameter, nothing allocated, no host read.

A program works on ROWS blocks of 256 elements. Elements past the end, and all of them where `found_inf` is not 0, are
masked: neither read nor written. Random bits are those of `stochastic_rounding`, bit for bit; 8-bit codes are those of
`log8`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnx_cli.kernels.log8 import BLOCK

ROWS = 4
State = Mapping[str, Tensor]
Group = Mapping[str, Any]

WIDTH = tl.constexpr(BLOCK)


@triton.jit
def scramble(x):
    """Mix the bits of uint32 integers."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_stream(key, step_ptr):
    """Begin a step's random bits."""
    return scramble(tl.load(step_ptr).to(tl.int32).to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32))


@triton.jit
def random_bits(stream, at, word: tl.constexpr):
    """Random uint32 of elements."""
    return scramble(scramble(at.to(tl.uint32) * 2 + word) ^ stream)


@triton.jit
def place(n, found_inf_ptr, ROWS: tl.constexpr):
    """Elements of this program (ROWS, 256), which of them count, and its rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if found_inf_ptr is not None:
        n = tl.where(tl.load(found_inf_ptr) == 0.0, n, 0)
    return at, at < n, rows


@triton.jit
def store_rounded(ptr, at, x, inside, bits):
    """Round at random to bfloat16 where that is what `ptr` points to."""
    if ptr.dtype.element_ty == tl.bfloat16:
        x = ((x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def level(code, top: tl.constexpr):
    """What a code means in units of the scale."""
    return tl.where(code > 0, tl.exp2((code - top) * 0.125), 0.0)


@triton.jit
def load_moment(ptr, scale_ptr, at, inside, rows, sign: tl.constexpr):
    """A moment in float32, decoded where it has scales."""
    x = tl.load(ptr + at, mask=inside, other=0)
    if scale_ptr is None:
        moment = x.to(tl.float32)
    else:
        top: tl.constexpr = 127 if sign else 255
        scale = tl.load(scale_ptr + rows, mask=tl.max(inside.to(tl.int32), axis=1) > 0, other=0.0)
        code = x.to(tl.int32)
        if sign:
            size = level((code & 127).to(tl.float32), top) * scale[:, None]
            moment = tl.where(code > 127, -size, size)
        else:
            moment = level(code.to(tl.float32), top) * scale[:, None]
    return moment


@triton.jit
def store_moment(ptr, scale_ptr, at, x, inside, rows, bits, sign: tl.constexpr):
    """Store a moment, encoded where it has scales. `bits`: random in their lowest 16."""
    if scale_ptr is None:
        store_rounded(ptr, at, x, inside, bits)
    else:
        top: tl.constexpr = 127 if sign else 255
        size = tl.where(inside, tl.abs(x), 0.0)
        scale = tl.max(size, axis=1)
        size = size / tl.where(scale > 0, scale, 1.0)[:, None]
        code = tl.floor(tl.log2(size) * 8.0) + top
        code = tl.minimum(tl.maximum(code, 0.0), top)
        low = level(code, top)
        share = (size - low) / (level(code + 1.0, top) - low)
        code += ((bits & 0xFFFF).to(tl.float32) < share * 65536.0).to(tl.float32)
        code = tl.minimum(code, top)
        if sign:
            code += tl.where(x < 0, 128.0, 0.0)
        else:
            code = tl.maximum(code, tl.where(size > 0, 1.0, 0.0))
        tl.store(ptr + at, code.to(tl.int32).to(tl.uint8), mask=inside)
        tl.store(scale_ptr + rows, scale, mask=tl.max(inside.to(tl.int32), axis=1) > 0)


@triton.jit(do_not_specialize=["key", "weight_decay", "eps", "beta1", "beta2"])
def adamw_kernel(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    m_scale_ptr,
    v_scale_ptr,
    step_ptr,
    lr_ptr,
    found_inf_ptr,
    n,
    key,
    weight_decay,
    eps,
    beta1,
    beta2,
    ROWS: tl.constexpr,
):
    """AdamW's step of some blocks."""
    at, inside, rows = place(n, found_inf_ptr, ROWS)
    step, lr = tl.load(step_ptr) + 1.0, tl.load(lr_ptr)
    correction1 = 1.0 - tl.exp2(step * tl.log2(beta1))
    correction2 = tl.sqrt(1.0 - tl.exp2(step * tl.log2(beta2)))
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = load_moment(m_ptr, m_scale_ptr, at, inside, rows, True)
    v = load_moment(v_ptr, v_scale_ptr, at, inside, rows, False)
    m = m + (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    p = p * (1.0 - lr * weight_decay) - lr * m / ((tl.sqrt(v) / correction2 + eps) * correction1)
    stream = random_stream(key, step_ptr)
    bits = random_bits(stream, at, 0)
    store_rounded(p_ptr, at, p, inside, bits)
    store_moment(m_ptr, m_scale_ptr, at, m, inside, rows, bits >> 16, True)
    store_moment(v_ptr, v_scale_ptr, at, v, inside, rows, random_bits(stream, at, 1), False)


@triton.jit(do_not_specialize=["key", "weight_decay", "beta1", "beta2"])
def lion_kernel(
    p_ptr, g_ptr, m_ptr, step_ptr, lr_ptr, found_inf_ptr, n, key, weight_decay, beta1, beta2, ROWS: tl.constexpr
):
    """Lion's step of some blocks."""
    at, inside, rows = place(n, found_inf_ptr, ROWS)
    lr = tl.load(lr_ptr)
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
    update = m + (1.0 - beta1) * (g - m)
    sign = tl.where(update > 0, 1.0, tl.where(update < 0, -1.0, 0.0))
    p = p * (1.0 - lr * weight_decay) - lr * sign
    m = m + (1.0 - beta2) * (g - m)
    bits = tl.zeros_like(at).to(tl.uint32)
    if step_ptr is not None:
        bits = random_bits(random_stream(key, step_ptr), at, 0)
    store_rounded(p_ptr, at, p, inside, bits)
    store_rounded(m_ptr, at, m, inside, bits >> 16)


@triton.jit(do_not_specialize=["key", "weight_decay", "share"])
def wolf_kernel(p_ptr, g_ptr, m_ptr, step_ptr, lr_ptr, found_inf_ptr, n, key, weight_decay, share, ROWS: tl.constexpr):
    """Wolf's step of some blocks."""
    at, inside, rows = place(n, found_inf_ptr, ROWS)
    lr = tl.load(lr_ptr)
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    update = m + share * (g - m)
    m = m + share * (update - m)
    update = tl.where(((update > 0) & (g > 0)) | ((update < 0) & (g < 0)), update, 0.0)
    p = p * (1.0 - lr * weight_decay) - lr * update
    bits = tl.zeros_like(at).to(tl.uint32)
    if step_ptr is not None:
        bits = random_bits(random_stream(key, step_ptr), at, 0)
    store_rounded(p_ptr, at, p, inside, bits)
    tl.store(m_ptr + at, m, mask=inside)


def launch(
    kernel: Any,
    p: Tensor,
    state: State,
    moments: tuple[str, ...],
    group: Group,
    found_inf: Tensor | None,
    key: int,
    *constants: float,
) -> None:
    """Run a kernel on all elements of a parameter and its gradient, on the parameter's device; `moments` are fields of
    `state`, `constants` those of the rule."""
    assert p.grad is not None
    with torch.cuda.device(p.device) if p.is_cuda else nullcontext():
        kernel[(triton.cdiv(p.numel(), ROWS * BLOCK),)](
            p.detach(),
            p.grad.contiguous(),
            *map(state.get, moments),
            state.get("step"),
            group["lr"],
            found_inf,
            p.numel(),
            key,
            group["weight_decay"],
            *constants,
            ROWS=ROWS,
        )


def adamw(p: Tensor, state: State, group: Group, found_inf: Tensor | None, key: int) -> None:
    """Launch adamw_kernel; arguments as in `optimizer_step`."""
    moments = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    launch(adamw_kernel, p, state, moments, group, found_inf, key, group["eps"], *group["betas"])


def lion(p: Tensor, state: State, group: Group, found_inf: Tensor | None, key: int) -> None:
    """Launch lion_kernel; arguments as in `optimizer_step`."""
    launch(lion_kernel, p, state, ("exp_avg",), group, found_inf, key, *group["betas"])


def wolf(p: Tensor, state: State, group: Group, found_inf: Tensor | None, key: int, share: float) -> None:
    """Launch wolf_kernel; arguments as in `optimizer_step`."""
    launch(wolf_kernel, p, state, ("momentum",), group, found_inf, key, share)
