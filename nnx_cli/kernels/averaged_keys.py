"""Averages of keys over all positions so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnx_cli.kernels.custom_op import operator
from nnx_cli.system.hardware import of


def averaged_keys(k: Tensor, share: Tensor, counts: Tensor) -> Tensor:
    """1/j² · Σ_{m≤j} share_m · k_m for positions j = 1, 2, …, summed in float32 and returned in the type of k.

    k (B, T, G, K), share (B, T, G) float32, counts (T, 1): the positions. On CUDA a kernel reads keys and writes
    averages, and the sums, which take twice the memory of keys of 16 bits, are never written.
    """
    if is_one_kernel(k):
        return averaged_keys_op(k, share, counts)
    return averages(weighted_sums(k, share), counts).to(k.dtype)


def is_one_kernel(k: Tensor) -> bool:
    return of(k).triton and k.dtype != torch.float64


def weighted_sums(k: Tensor, share: Tensor) -> Tensor:
    """Σ_{m≤j} share_m · k_m, (B, T, G, K), float32."""
    return (share.unsqueeze(-1) * k).cumsum(1)


def averages(sums: Tensor, counts: Tensor) -> Tensor:
    return sums / counts.square().unsqueeze(-1)


def averaged_by_kernel(k: Tensor, share: Tensor, counts: Tensor) -> Tensor:
    if not of(k).triton:
        return averages(weighted_sums(k, share), counts).to(k.dtype)
    from nnx_cli.kernels import averaged_keys_triton as averaged_keys_kernel

    return averaged_keys_kernel.forward(k, share)


def gradients_by_kernel(grad: Tensor, k: Tensor, share: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of k and share where `grad` (B, T, G, K) is that of the averages."""
    if not of(k).triton:
        sums_grad = averages(grad.float(), counts).flip(1).cumsum(1).flip(1)  # a key is in all averages from its own on
        return (share.unsqueeze(-1) * sums_grad).to(k.dtype), (sums_grad * k).sum(-1)
    from nnx_cli.kernels import averaged_keys_triton as averaged_keys_kernel

    return averaged_keys_kernel.backward(grad, k, share)


def shapes_only(k: Tensor, share: Tensor, counts: Tensor) -> Tensor:
    return k.new_empty(k.shape)


def shapes_of_gradients(grad: Tensor, k: Tensor, share: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), share.new_empty(share.shape)


def keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *averaged_keys_backward(grad, *ctx.saved_tensors), None


averaged_keys_backward = operator("averaged_keys_backward", gradients_by_kernel, shapes_of_gradients)
averaged_keys_op = operator("averaged_keys", averaged_by_kernel, shapes_only, keep=keep, gradients=backward)
