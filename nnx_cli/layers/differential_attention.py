"""Differences of two softmax maps: Differential Transformer, Ye et al. 2024, https://arxiv.org/abs/2410.05258."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.layers.attention import causal_attention
from nnx_cli.layers.kv_cache import KVCache


class Lambda(nn.Module):
    """exp(q1 · k1) - exp(q2 · k2) + start: the weight of what is subtracted, one float32 number for a layer."""

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.q1, self.k1, self.q2, self.k2 = (nn.Parameter(torch.zeros(width)) for _ in range(4))

    def forward(self, start: Tensor) -> Tensor:
        """The weight as a float32 scalar; `start` is where it starts without the vectors."""
        return self._learned() + start

    def _learned(self) -> Tensor:
        first, second = ((q.float() * k.float()).sum() for q, k in ((self.q1, self.k1), (self.q2, self.k2)))
        return first.exp() - second.exp()

    def constant_attributes(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Attributes, some in place of methods, for a while in which no parameter changes."""
        return {"forward": partial(torch.add, self._learned().detach())}


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    cache: KVCache | None,
    layer: int,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """(S1 - weight S2) v of causal maps S1 and S2: q (B, H, T, 2, K), k (B, G, T, 2, K), v (B, G, T, 2K) to
    (B, T, H, 2K).

    Both maps are one call of grouped-query attention. A key holds the keys of both maps side by side and is as wide as
    the value, so that any kernel takes it and a cache stores it; a query becomes two, (q1, 0) and (0, q2), which see
    their own map's half of it. Dropout acts on each map alone.
    """
    B, H, T, _, K = q.shape
    q1, q2 = q.unbind(-2)
    q = torch.stack((F.pad(q1, (0, K)), F.pad(q2, (K, 0))), dim=2).flatten(1, 2)  # (B, 2H, T, 2K)
    y = causal_attention(q, k.flatten(-2), v, cache, layer, scale=scale, dropout=dropout)
    y1, y2 = y.view(B, T, H, 2, 2 * K).unbind(-2)
    return y1 - weight * y2


def repeat_as_original(k: Tensor, v: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """One key and value for every query head, as the original's eager code repeats them: its 2G key maps are numbered
    through, so that both maps of a query may read one map. k (B, G, T, M, K), v (B, G, T, M·K)."""
    n = n_heads // k.shape[1]
    k = k.transpose(2, 3).flatten(1, 2).repeat_interleave(n, dim=1)  # (B, M·H, T, K)
    return k.unflatten(1, (n_heads, -1)).transpose(2, 3), v.repeat_interleave(n, dim=1)
