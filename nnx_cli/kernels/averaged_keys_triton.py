"""`averaged_keys` as two Triton kernels. Needs Triton, which whoever imports this has looked for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TIMES = 64  # positions that are summed side by side
BLOCK = 32  # channels of a program: there are few heads, and they should spread over the GPU


def forward(k: Tensor, share: Tensor) -> Tensor:
    """The averages (B, T, G, K), contiguous."""
    B, T, G, K = k.shape
    k, share = _dense_channels(k), share.contiguous()
    out = torch.empty(B, T, G, K, dtype=k.dtype, device=k.device)
    with torch.cuda.device_of(k):
        _forward[(B * G, triton.cdiv(K, BLOCK))](
            k, share, out, *k.stride()[:3], T, G, K, TIMES=min(TIMES, triton.next_power_of_2(T)), BLOCK=BLOCK
        )
    return out


def backward(grad: Tensor, k: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of k (B, T, G, K) and share (B, T, G), contiguous. The second is a sum over channels, of which
    every program has its part."""
    B, T, G, K = k.shape
    grad, k, share = _dense_channels(grad), _dense_channels(k), share.contiguous()
    n = triton.cdiv(K, BLOCK)
    grad_k = torch.empty(B, T, G, K, dtype=k.dtype, device=k.device)
    parts = torch.empty(n, B, T, G, dtype=share.dtype, device=k.device)
    with torch.cuda.device_of(k):
        _backward[(B * G, n)](
            grad,
            k,
            share,
            grad_k,
            parts,
            *grad.stride()[:3],
            *k.stride()[:3],
            T,
            G,
            K,
            parts.stride(0),
            TIMES=min(TIMES, triton.next_power_of_2(T)),
            BLOCK=BLOCK,
        )
    return grad_k, parts.sum(0) if n > 1 else parts[0]


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _forward(k, share, out, batch_stride, time_stride, head_stride, T, G, K, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k += b.to(tl.int64) * batch_stride + g * head_stride
    share += b.to(tl.int64) * T * G + g
    out += b.to(tl.int64) * T * G * K + g * K
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, T, TIMES):
        t = start + tl.arange(0, TIMES)
        mask = (t < T)[:, None] & (channel < K)[None, :]
        keys = tl.load(k + t[:, None] * time_stride + channel[None, :], mask, 0.0).to(tl.float32)
        weighted = keys * tl.load(share + t * G, t < T, 0.0)[:, None]
        j = (t + 1).to(tl.float32)
        sums = tl.cumsum(weighted, 0) + total[None, :]
        tl.store(out + t[:, None] * G * K + channel[None, :], (sums / (j * j)[:, None]).to(out.dtype.element_ty), mask)
        total += tl.sum(weighted, 0)


@triton.jit
def _backward(
    grad,
    k,
    share,
    grad_k,
    parts,
    grad_batch,
    grad_time,
    grad_head,
    batch_stride,
    time_stride,
    head_stride,
    T,
    G,
    K,
    part_stride,
    TIMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From the last positions to the first: a key is in all averages from its own on."""
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad += b.to(tl.int64) * grad_batch + g * grad_head
    k += b.to(tl.int64) * batch_stride + g * head_stride
    share += b.to(tl.int64) * T * G + g
    grad_k += b.to(tl.int64) * T * G * K + g * K
    parts += tl.program_id(1).to(tl.int64) * part_stride + b.to(tl.int64) * T * G + g
    total = tl.zeros((BLOCK,), tl.float32)
    n_pieces = tl.cdiv(T, TIMES)
    for piece in range(n_pieces):
        t = (n_pieces - 1 - piece) * TIMES + tl.arange(0, TIMES)
        mask = (t < T)[:, None] & (channel < K)[None, :]
        j = (t + 1).to(tl.float32)
        given = tl.load(grad + t[:, None] * grad_time + channel[None, :], mask, 0.0).to(tl.float32)
        given = given / (j * j)[:, None]
        reaching = tl.cumsum(given, 0, reverse=True) + total[None, :]
        keys = tl.load(k + t[:, None] * time_stride + channel[None, :], mask, 0.0).to(tl.float32)
        weight = tl.load(share + t * G, t < T, 0.0)
        tl.store(
            grad_k + t[:, None] * G * K + channel[None, :],
            (reaching * weight[:, None]).to(grad_k.dtype.element_ty),
            mask,
        )
        tl.store(parts + t * G, tl.sum(tl.where(mask, keys * reaching, 0.0), 1), t < T)
        total += tl.sum(given, 0)
