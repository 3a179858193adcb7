"""Softmax attention over the new and the cached positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels import attention_c
from nnx_cli.kernels import dropout as dropping
from nnx_cli.kernels.one_token import attend, attend_stored
from nnx_cli.kernels.qkv_swiglu import turn
from nnx_cli.layers.kv_cache import KVCache
from nnx_cli.layers.linear import PackedLinear
from nnx_cli.layers.qkv_swiglu import qkv_rope
from nnx_cli.system.hardware import of


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, layer: int, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Causal attention of q (B, H, T, K) over k, v (B, G, T, K), where G divides H; returns (B, T, H·K).

    With a cache, k and v are stored as `layer`'s and attention covers everything stored. `dropout` acts on the
    probabilities.
    """
    if cache is not None:
        return cached_attention(q, cache.update(layer, k, v), cache, scale)
    if attention_c.takes(q, k, v):
        return attention_c.attention(q, k, v, scale, dropout).flatten(2)
    if dropout and dropping.draws_own_mask(q):
        return attention_with_dropout(q, k, v, scale, dropout)
    return fused_attention(q, k, v, None, q.shape[2] > 1, scale, dropout)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, dropout: float = 0.0
) -> Tensor:
    """torch's attention of q (B, H, T, K) over k, v (B, G, S, K), to (B, T, H·K)."""
    B, H, T, K = q.shape
    grouped = k.shape[1] != H
    if grouped and not groups_are_fused(q):
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    q, k, v = (aligned(x) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2).reshape(B, T, H * K)


def rotary_attention(
    projections: PackedLinear,
    x: Tensor,
    tables: Sequence[Tensor],
    cache: KVCache | None,
    layer: int,
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    """Causal attention with rotary positions of x (B, T, D), which is projected to queries, keys and values; returns
    (B, T, H·K). `tables` are those of `tables_of`, with a cache for queries and keys, and values."""
    if cache is not None:
        n_heads = projections.splits[0] // tables[0].shape[-1]
        return cached_rotary_attention(projections.packed(x), tables, cache, layer, n_heads, scale=scale)
    return causal_attention(*qkv_rope(projections, x, tables), cache, layer, scale=scale, dropout=dropout)


def cached_rotary_attention(
    qkv: Tensor, tables: Sequence[Tensor], cache: KVCache, layer: int, n_heads: int, *, scale: float
) -> Tensor:
    """Attention over everything stored and the new positions, whose queries, keys and values lie side by side in `qkv`
    (B, T, (H + 2G)·K); returns (B, T, H·K)."""
    if len(tables) == 1:
        assert cache.span is not None and cache.window is None
        return attend(qkv, tables[0], cache.layer(layer), cache.lengths, cache.span, n_heads, scale)
    (B, T, _), (cos, sin) = qkv.shape, tables
    heads = turn(qkv.view(B, T, *cos.shape[-2:]), cos, sin).transpose(1, 2)  # (B, H + 2G, T, K)
    q, kv = heads.split_with_sizes((n_heads, heads.shape[1] - n_heads), 1)
    return cached_attention(q, cache.extend(layer, kv), cache, scale)


def cached_attention(q: Tensor, stored: Sequence[Tensor], cache: KVCache, scale: float) -> Tensor:
    """Attention of the new positions, q (B, H, T, K), over keys and values as the cache has them `stored`, (B, G, S, K)
    each; returns (B, T, H·K).

    Of one position, the query heads of a key-value head are as good as so many positions of it: its keys are read once.
    """
    (B, H, T, K), (k, v) = q.shape, stored
    if T > 1:
        return fused_attention(q, k, v, cache.mask(T), cache.is_causal(T), scale)
    if q.is_cuda and cache.span is not None and cache.window is None:
        return attend_stored(q, k, v, cache.lengths, scale)
    q = q.reshape(B, k.shape[1], -1, K)
    if q.is_cuda:
        q, k, v = (aligned(x) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, cache.mask(T), scale=scale).reshape(B, T, H * K)


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
