"""Averages of keys over all positions so far."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnx_cli.kernels.custom_op import keep_inputs, operator
from nnx_cli.system.hardware import of, takes_triton


def plain_averaged_keys(k: Tensor, share: Tensor, counts: Tensor) -> Tensor:
    """`averaged_keys` by operations of torch."""
    return averages(weighted_sums(k, share), counts).to(k.dtype)


def weighted_sums(k: Tensor, share: Tensor) -> Tensor:
    """Σ_{m≤j} share_m · k_m, (B, T, G, K), float32."""
    return (share.unsqueeze(-1) * k).cumsum(1)


def averages(sums: Tensor, counts: Tensor) -> Tensor:
    """Sums (B, T, G, K) divided by the squares of their positions `counts` (T, 1)."""
    return sums / counts.square().unsqueeze(-1)


def averaged_keys(k: Tensor, share: Tensor, counts: Tensor) -> Tensor:
    """1/j² · Σ_{m≤j} share_m · k_m for positions j = 1, 2, …, summed in float32 and returned in the dtype of k.

    k (B, T, G, K), share (B, T, G) float32, counts (T, 1): the positions. A Triton kernel reads keys and writes
    averages, and the sums, which take twice the memory of keys of 16 bits, are never written.
    """
    return averaged_keys_op(k, share, counts) if takes_triton(k) else plain_averaged_keys(k, share, counts)


def _forward(k: Tensor, share: Tensor, counts: Tensor) -> Tensor:
    if not of(k).triton:
        return plain_averaged_keys(k, share, counts)
    from nnx_cli.kernels import averaged_keys_triton

    return averaged_keys_triton.forward(k, share)


def _backward(grad: Tensor, k: Tensor, share: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of k and share where `grad` (B, T, G, K) is that of the averages."""
    if not of(k).triton:
        sums_grad = averages(grad.float(), counts).flip(1).cumsum(1).flip(1)  # a key is in all averages from its own on
        return (share.unsqueeze(-1) * sums_grad).to(k.dtype), (sums_grad * k).sum(-1)
    from nnx_cli.kernels import averaged_keys_triton

    return averaged_keys_triton.backward(grad, k, share)


def _shapes(k: Tensor, share: Tensor, counts: Tensor) -> Tensor:
    return k.new_empty(k.shape)


def _backward_shapes(grad: Tensor, k: Tensor, share: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), share.new_empty(share.shape)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *averaged_keys_backward(grad, *ctx.saved_tensors), None


averaged_keys_backward = operator("averaged_keys_backward", _backward, _backward_shapes)
averaged_keys_op = operator("averaged_keys", _forward, _shapes, keep=keep_inputs, gradients=_gradients)
