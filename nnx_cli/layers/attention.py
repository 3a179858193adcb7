"""Softmax attention over the new and the cached positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels import dropout as dropping
from nnx_cli.layers.kv_cache import KVCache
from nnx_cli.system.hardware import of


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, layer: int, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Causal attention of q (B, H, T, K) over k, v (B, G, T, K), where G divides H; returns (B, T, H·K).

    With a cache, k and v are stored as `layer`'s and attention covers everything stored. `dropout` acts on the
    probabilities.
    """
    B, H, T, K = q.shape
    if cache is None and dropout and dropping.draws_own_mask(q):
        return attention_with_dropout(q, k, v, scale, dropout)
    if cache is None:
        mask, is_causal = None, True
    else:
        mask, is_causal = cache.mask(T), cache.is_causal(T)
        k, v = cache.update(layer, k, v)
    grouped = k.shape[1] != H
    if grouped and not groups_are_fused(q):
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    q, k, v = (aligned(x) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal and T > 1, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2).reshape(B, T, H * K)


def attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, scale: float, p: float) -> Tensor:
    """Causal attention by plain operations, for torch's fused kernel on a CPU knows no dropout."""
    B, H, T, K = q.shape
    together = B, k.shape[1], -1  # query heads of one key-value head
    scores = (q * scale).reshape(*together, K) @ k.transpose(-1, -2)
    scores = scores.view(B, H, T, T).add_(q.new_full((T, T), -torch.inf).triu_(1))
    shares = dropping.dropout(
        scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype), p, True
    )
    y = shares.view(*together, T) @ v
    return y.view(B, H, T, -1).transpose(1, 2).reshape(B, T, -1)


def aligned(x: Tensor) -> Tensor:
    """`x` with rows that begin at multiples of 16 bytes, as fused kernels on CUDA load them: parts of a packed
    projection need not be."""
    if of(x).kind != "cuda":
        return x
    step = 16 // x.element_size()
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()  # which no graph can ask for
    return x if all(n % step == 0 for n in (offset, *x.stride()[:-1])) else x.contiguous()


def groups_are_fused(q: Tensor) -> bool:
    """Whether a fused kernel takes fewer key-value heads than query heads; without one, T x T scores would be written
    out.

    On CUDA only flash attention does.
    """
    hardware = of(q)
    return hardware.kind != "cuda" or (hardware.flash and q.dtype != torch.float32)
