"""Causal attention on a CPU, some rows of scores at a time, so that torch's kernel computes fewer that are masked.

The kernel takes 512 keys at a time, all of them as soon as a query sees one: 75 % of all pairs where there are 1024
positions, all where there are 512. Called with fewer queries, and no key beyond the last of them, it takes 59 and 67 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nnx_cli.kernels.custom_op import operator

ROWS = 192  # queries of a call: the kernel takes blocks of 64 of them from 192 on (32 before, 256 from 768 on)
LENGTHS = range(384, 1025)  # positions from which on, and up to which, that was measured to be no slower

aten = torch.ops.aten


def pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether causal attention of q (B, H, T, K) to k, v (B, G, T, K) is faster in rows."""
    fits = q.device.type == "cpu" and q.dtype == torch.float32 and q.shape[2] in LENGTHS
    return fits and k.shape == v.shape and k.shape[2:] == q.shape[2:]


def pieces(q: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries of a call, last ones first, the keys they see, and what is added to their scores."""
    T = q.shape[2]
    mask = q.new_full((ROWS, T), -torch.inf).triu_(T - ROWS + 1)  # of the last queries
    for end in range(T, 0, -ROWS):
        start = max(0, end - ROWS)
        yield slice(start, end), slice(end), mask[start - end :, T - end :]


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q (B, H, T, K) to k, v (B, G, T, K), (B, T, H, K), and the logarithm of what a query's exponentials
    sum to, (B, T, H)."""
    out = shapes_only(q, k, v, scale)
    for rows, seen, mask in pieces(q):
        part = aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, rows], k[:, :, seen], v[:, :, seen], attn_mask=mask, scale=scale
        )
        for whole, some in zip(out, part, strict=True):
            whole[:, rows] = some.transpose(1, 2)
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (B, T, H, K) and of k, v (B, T, G, K) where `grad` is that of y."""
    grad, y, sums = (x.transpose(1, 2) for x in (grad, y, sums))
    q_grad, kv_grads = torch.empty_like(y), ()
    for rows, seen, mask in pieces(q):
        q_grad[:, :, rows], *parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[:, :, rows],
            q[:, :, rows],
            k[:, :, seen],
            v[:, :, seen],
            y[:, :, rows],
            sums[:, :, rows],
            0.0,
            False,
            attn_mask=mask,
            scale=scale,
        )
        kv_grads = kv_grads or parts  # the first ones are of all keys
        if kv_grads is not parts:
            for whole, part in zip(kv_grads, parts, strict=True):
                whole[:, :, seen] += part
    return tuple(x.transpose(1, 2).contiguous() for x in (q_grad, *kv_grads))


def shapes_only(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, T, K = q.shape
    return q.new_empty(B, T, H, K), q.new_empty(B, T, H, dtype=torch.promote_types(q.dtype, torch.float32))


def shapes_of_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.transpose(1, 2).shape) for x in (q, k, v))


def keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    *qkv, ctx.scale = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.mark_non_differentiable(output[1])


def gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    grads = attention_in_rows_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *(x.transpose(1, 2) for x in grads), None


attention_in_rows_backward = operator("attention_in_rows_backward", backward, shapes_of_gradients, device="cpu")
attention_in_rows = operator("attention_in_rows", forward, shapes_only, keep=keep, gradients=gradients, device="cpu")
