"""`qkv_rope_swiglu` and `swiglu` as Triton kernels, a program for each position. Imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # hidden features at a time
WARPS = 4


def forward(
    packed: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, T, heads, K) and the hidden features (B, T, F), contiguous."""
    B, T, W = packed.shape
    K = 2 * q_cos.shape[-1]
    hidden = packed.new_empty(B, T, (W - (n_heads + 2 * n_kv_heads) * K) // 2)
    q = packed.new_empty(B, T, n_heads, K)
    k, v = (packed.new_empty(B, T, n_kv_heads, K) for _ in range(2))
    tables = [table.contiguous() for table in (q_cos, q_sin, k_cos, k_sin)]
    with torch.cuda.device_of(packed):
        _forward[(B * T,)](
            packed.contiguous(), q, k, v, hidden, *tables, T, **_widths(n_heads, n_kv_heads, K, hidden.shape[-1])
        )
    return q, k, v, hidden


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_hidden: Tensor,
    packed: Tensor | None,
    q_cos: Tensor,
    q_sin: Tensor,
    k_cos: Tensor,
    k_sin: Tensor,
) -> Tensor:
    """The gradient of `packed`, which is needed itself where there are gates."""
    B, T, H, K = grad_q.shape
    G, n_hidden = grad_k.shape[2], grad_hidden.shape[-1]
    out = grad_q.new_empty(B, T, (H + 2 * G) * K + 2 * n_hidden)
    grads = [grad.contiguous() for grad in (grad_q, grad_k, grad_v, grad_hidden)]
    tables = [table.contiguous() for table in (q_cos, q_sin, k_cos, k_sin)]
    packed = out if packed is None else packed.contiguous()
    with torch.cuda.device_of(out):
        _backward[(B * T,)](out, packed, *grads, *tables, T, **_widths(H, G, K, n_hidden))
    return out


def _widths(H: int, G: int, K: int, F: int) -> dict[str, int]:
    """What the kernels are compiled for: numbers of heads, their width and that of the hidden layer, and the powers of
    two that hold them."""
    power = triton.next_power_of_2
    return {
        "H": H,
        "G": G,
        "K": K,
        "F": F,
        "HEADS": power(H),
        "KV_HEADS": power(G),
        "HALF": power(K // 2),
        "BLOCK": min(BLOCK, power(max(F, 16))),
        "num_warps": WARPS,
    }


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) · up (..., F) of gates and ups (..., 2F)."""
    F = packed.shape[-1] // 2
    out = packed.new_empty(*packed.shape[:-1], F)
    with torch.cuda.device_of(packed):
        _swiglu[(packed.numel() // (2 * F), triton.cdiv(F, BLOCK))](
            packed.contiguous(), out, F, BLOCK=min(BLOCK, triton.next_power_of_2(F)), num_warps=WARPS
        )
    return out


def swiglu_backward(grad: Tensor, packed: Tensor) -> Tensor:
    """The gradient of `packed`."""
    F, packed = grad.shape[-1], packed.contiguous()
    out = torch.empty_like(packed)
    with torch.cuda.device_of(packed):
        _swiglu_backward[(packed.numel() // (2 * F), triton.cdiv(F, BLOCK))](
            out, packed, grad.contiguous(), F, BLOCK=min(BLOCK, triton.next_power_of_2(F)), num_warps=WARPS
        )
    return out


@triton.jit
def _gated(value, gate):
    """silu(gate) · value, rounded where separate operations would round; float32."""
    gate = gate.to(tl.float32)
    passed = (gate / (1 + tl.exp(-gate))).to(value.dtype)
    return passed.to(tl.float32) * value.to(tl.float32)


@triton.jit
def _gated_backward(grad, value, gate):
    """Gradients of value and gate, float32."""
    grad, value, gate = grad.to(tl.float32), value.to(tl.float32), gate.to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    return grad * gate * sigmoid, grad * value * sigmoid * (1 + gate * (1 - sigmoid))


@triton.jit
def _turn(
    source,
    target,
    cos,
    sin,
    K: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
):
    """Every pair of N heads by its angle, or back."""
    pair = tl.arange(0, HALF)
    head = tl.arange(0, HEADS)
    inside = pair < K // 2
    cosine, sine = tl.load(cos + pair, inside, 0.0)[None, :], tl.load(sin + pair, inside, 0.0)[None, :]
    if BACK:
        sine = -sine
    at = head[:, None] * K + pair[None, :]
    mask = (head < N)[:, None] & inside[None, :]
    first = tl.load(source + at, mask, 0.0).to(tl.float32)
    second = tl.load(source + at + K // 2, mask, 0.0).to(tl.float32)
    tl.store(target + at, (first * cosine - second * sine).to(target.dtype.element_ty), mask)
    tl.store(target + at + K // 2, (second * cosine + first * sine).to(target.dtype.element_ty), mask)


@triton.jit
def _copy(source, target, K: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    at = tl.arange(0, HEADS * HALF * 2)
    mask = at < N * K
    tl.store(target + at, tl.load(source + at, mask, 0.0), mask)


@triton.jit
def _forward(
    packed,
    q,
    k,
    v,
    hidden,
    q_cos,
    q_sin,
    k_cos,
    k_sin,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    table = (row % T) * (K // 2)
    packed += row * ((H + 2 * G) * K + 2 * F)
    _turn(packed, q + row * H * K, q_cos + table, q_sin + table, K, H, HEADS, HALF, False)
    _turn(packed + H * K, k + row * G * K, k_cos + table, k_sin + table, K, G, KV_HEADS, HALF, False)
    _copy(packed + (H + G) * K, v + row * G * K, K, G, KV_HEADS, HALF)
    packed += (H + 2 * G) * K
    hidden += row * F
    for start in range(0, F, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value, gate = tl.load(packed + at, at < F, 0.0), tl.load(packed + F + at, at < F, 0.0)
        tl.store(hidden + at, _gated(value, gate).to(hidden.dtype.element_ty), at < F)


@triton.jit
def _backward(
    out,
    packed,
    grad_q,
    grad_k,
    grad_v,
    grad_hidden,
    q_cos,
    q_sin,
    k_cos,
    k_sin,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    table = (row % T) * (K // 2)
    out += row * ((H + 2 * G) * K + 2 * F)
    _turn(grad_q + row * H * K, out, q_cos + table, q_sin + table, K, H, HEADS, HALF, True)
    _turn(grad_k + row * G * K, out + H * K, k_cos + table, k_sin + table, K, G, KV_HEADS, HALF, True)
    _copy(grad_v + row * G * K, out + (H + G) * K, K, G, KV_HEADS, HALF)
    out += (H + 2 * G) * K
    packed += row * ((H + 2 * G) * K + 2 * F) + (H + 2 * G) * K
    grad_hidden += row * F
    for start in range(0, F, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value, gate = tl.load(packed + at, at < F, 0.0), tl.load(packed + F + at, at < F, 0.0)
        grad_value, grad_gate = _gated_backward(tl.load(grad_hidden + at, at < F, 0.0), value, gate)
        tl.store(out + at, grad_value.to(out.dtype.element_ty), at < F)
        tl.store(out + F + at, grad_gate.to(out.dtype.element_ty), at < F)


@triton.jit
def _swiglu(packed, out, F, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    packed += row * 2 * F
    gate, up = tl.load(packed + at, at < F, 0.0), tl.load(packed + F + at, at < F, 0.0)
    tl.store(out + row * F + at, _gated(up, gate).to(out.dtype.element_ty), at < F)


@triton.jit
def _swiglu_backward(out, packed, grad, F, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    packed += row * 2 * F
    out += row * 2 * F
    gate, up = tl.load(packed + at, at < F, 0.0), tl.load(packed + F + at, at < F, 0.0)
    grad_up, grad_gate = _gated_backward(tl.load(grad + row * F + at, at < F, 0.0), up, gate)
    tl.store(out + at, grad_gate.to(out.dtype.element_ty), at < F)
    tl.store(out + F + at, grad_up.to(out.dtype.element_ty), at < F)
