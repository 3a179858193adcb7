"""Attention over positions that hold several keys and values each, their segments, without a mask of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nnx_cli.kernels.custom_op import operator
from nnx_cli.kernels.precision import in_type
from nnx_cli.layers.kv_cache import KVCache
from nnx_cli.system import torch_private
from nnx_cli.system.hardware import of

ENTROPY_ROWS = 128  # queries whose attention weights exist at once where their entropy is asked for
LSE_ROWS = 32  # memory-efficient attention pads its lse to a multiple of these


def attend(
    q: Tensor, kv: Tensor, repeats: Sequence[int], store: KVCache | None, layer: int, *, causal: bool, dropout: float
) -> Tensor:
    """Attention of q (B, T, H, K) over kv (G, B, T, 2, H, K), the keys and values of G segments, each of which occurs
    as often as `repeats` says; returns (B, T, H, K).

    A position sees all segments of the positions up to its own: attention to one segment after the other, merged. Where
    no kernel gives the lse that merging takes, and for a cache, segments lie side by side in every position, and that
    is plain causal attention of as many queries a position, of which the last one counts: no mask, which no fused
    kernel takes.
    """
    T, K, mask = q.shape[1], q.shape[-1], None
    if store is not None:
        mask, causal = store.mask(T), store.is_causal(T)
        beside = repeat_segments(kv, repeats)  # (B, T, N, 2, H, K)
        n = beside.shape[2]
        k, v = (x.permute(0, 3, 1, 2, 4).flatten(3) for x in beside.unbind(3))  # (B, H, T, N·K)
        k, v = (x.unflatten(-1, (n, K)).flatten(2, 3) for x in store.update(layer, k, v))  # (B, H, S·N, K)
    if len(kv) > 1 and causal and not dropout and has_lse_kernel(q):
        return merged_attention(q, kv, repeats)
    if store is None:
        beside = repeat_segments(kv, repeats)
        n = beside.shape[2]
        k, v = (x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in beside.unbind(3))  # (B, H, T·N, K)
    q = q.transpose(1, 2)  # (B, H, T, K)
    if causal:
        q = q.repeat_interleave(n, dim=2)  # (B, H, T·N, K)
    elif mask is not None:
        mask = mask.repeat_interleave(n, dim=3)  # (B, 1, T, S·N)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=K**-0.5)
    return (y[:, :, n - 1 :: n] if causal else y).transpose(1, 2)


def repeat_segments(kv: Tensor, repeats: Sequence[int]) -> Tensor:
    """Segments (G, ...) as they occur in a position, (B, T, N, ...) with N the sum of `repeats`."""
    return torch.stack([x for x, n in zip(kv, repeats, strict=True) for _ in range(n)], dim=2)


def has_lse_kernel(q: Tensor) -> bool:
    """Whether `attention_with_lse` has a kernel for q (B, T, H, K)."""
    hardware = of(q)
    if not torch_private.HAS_ATTENTION:
        return False
    if hardware.kind != "cuda":
        return hardware.kind in ("cpu", "meta")
    if hardware.hip or q.dtype == torch.float64 or q.shape[-1] % 8 or q.shape[-1] > 128:
        return False
    return q.dtype != torch.bfloat16 or hardware.bf16_matmul


def is_flash(q: Tensor) -> bool:
    """Whether flash attention takes q, which lies on CUDA."""
    return of(q).flash and q.dtype != torch.float32


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of q, k, v (B, T, H, K), and the logsumexp (lse) of a query's scores, (B, H, T)."""
    T, scale = q.shape[1], q.shape[-1] ** -0.5
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not q.is_cuda:
        y, lse = torch_private.FLASH_CPU(q, k, v, 0.0, True, scale=scale)
    elif is_flash(q):
        y, lse = torch_private.FLASH(q, k, v, 0.0, True, scale=scale)[:2]
    else:
        y, lse = torch_private.EFFICIENT(q, k, v, None, True, 0.0, True, scale=scale)[:2]
    return y.transpose(1, 2).contiguous(), lse[..., :T].contiguous()


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (B, T, H, K) whose scores are part of `lse` (B, H, T) and whose output is part of
    y (B, T, H, K), where `grad` is that of y."""
    T, scale = q.shape[1], q.shape[-1] ** -0.5
    grad, q, k, v, y = (x.transpose(1, 2) for x in (grad, q, k, v, y))
    if not q.is_cuda:
        grads = torch_private.FLASH_CPU_BACKWARD(grad, q, k, v, y, lse, 0.0, True, scale=scale)
    else:
        none = torch.empty(2, dtype=torch.int64, device=q.device)  # the state of a generator that nothing is drawn from
        if is_flash(q):
            grads = torch_private.FLASH_BACKWARD(
                grad, q, k, v, y, lse, None, None, T, T, 0.0, True, none, none, scale=scale
            )
        else:
            padded = F.pad(lse, (0, -T % LSE_ROWS), value=math.inf)
            grads = torch_private.EFFICIENT_BACKWARD(
                grad, q, k, v, None, y, padded, none[0], none[1], 0.0, [True, True, True, False], True, scale=scale
            )[:3]
    return tuple(x.transpose(1, 2).contiguous() for x in grads)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))


def _backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


attention_with_lse = operator("attention_with_lse", _forward, _shapes)
attention_with_lse_backward = operator("attention_with_lse_backward", _backward, _backward_shapes)


def merged_attention(q: Tensor, kv: Tensor, repeats: Sequence[int]) -> Tensor:
    """Causal attention of q (B, T, H, K) over kv (G, B, T, 2, H, K), segment by segment."""
    if of(q).kind == "meta":  # to be counted, not run: a call with as many matmuls that keeps as much
        k, v = kv.permute(3, 1, 4, 0, 2, 5).flatten(3, 4)  # (B, H, G·T, K)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)
    return MergedAttention.apply(q, kv, tuple(repeats))


class MergedAttention(torch.autograd.Function):
    """Attention to segments one by one, each weighted by its share of the exponentials; a segment that occurs n times
    has n times its own. Keeps what attention to one segment would, and the other segments."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, repeats: tuple[int, ...]) -> Tensor:
        """Attention (B, T, H, K) of q (B, T, H, K) over kv (G, B, T, 2, H, K)."""
        found = [attention_with_lse(q, *segment.unbind(2)) for segment in kv]
        logs = torch.stack([lse + math.log(n) for (_, lse), n in zip(found, repeats, strict=True)])  # (G, B, H, T)
        lse = logs.logsumexp(0)
        shares = (logs - lse).exp().transpose(2, 3).unsqueeze(-1)  # (G, B, T, H, 1)
        y = in_type(sum(share * y for (y, _), share in zip(found, shares, strict=True)), q.dtype)
        ctx.repeats = repeats
        ctx.save_for_backward(q, kv, y, lse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of q and kv."""
        q, kv, y, lse = ctx.saved_tensors
        parts = [
            attention_with_lse_backward(grad, q, *segment.unbind(2), y, lse - math.log(n))
            for segment, n in zip(kv, ctx.repeats, strict=True)
        ]
        q_grad = sum(part[0] for part in parts)
        return q_grad, torch.stack([torch.stack(part[1:], dim=2) for part in parts]), None


def attention_entropy(q: Tensor, kv: Tensor, repeats: Sequence[int], causal: bool) -> Tensor:
    """Mean entropy in nats, float32, of the attention that `attend` computes of q over kv.

    Weights exist for ENTROPY_ROWS queries at a time and are computed again in the backward pass.
    """
    k = repeat_segments(kv[:, :, :, 0], repeats)  # (B, T, N, H, K)
    T, N = k.shape[1:3]
    k = k.flatten(1, 2)  # (B, T·N, H, K)

    def summed(q: Tensor, k: Tensor, start: int) -> Tensor:
        scores = torch.einsum("bthk,bshk->bhts", q, k).float() * q.shape[-1] ** -0.5
        queries = torch.arange(start, start + q.shape[1], device=q.device)
        keys = torch.arange(k.shape[1], device=q.device) // N
        hidden = (keys > queries[:, None]) & causal
        logs = scores.masked_fill(hidden, -torch.inf).log_softmax(-1)
        return -(logs.exp() * logs.masked_fill(hidden, 0.0)).sum()

    total = torch.zeros((), device=q.device)
    for start in range(0, T, ENTROPY_ROWS):
        end = min(start + ENTROPY_ROWS, T)
        seen = k[:, : end * N] if causal else k
        total = total + checkpoint(summed, q[:, start:end], seen, start, use_reentrant=False, preserve_rng_state=False)
    return total / (q.shape[0] * T * q.shape[2])
