"""Rotary position embedding, half-split: features j and j + K/2 of a head form a pair.

Su et al. 2021, https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nnx_cli.kernels.qkv_swiglu import full_width
from nnx_cli.layers.kv_cache import KVCache


def rotary_tables(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (float32) of the angles of `positions` (T,), (T, K/2)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.float().unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


Make = Callable[[Tensor], Sequence[Tensor]]  # positions (S,) to cosines and sines by turns, (S, K/2) each


@dataclass(frozen=True)
class FullWidth:
    """What `make` says of positions, at the full width of a head, and side by side for kinds of heads: those of every
    pair of cosines and sines, and last those that are not turned."""

    make: Make

    def __call__(self, positions: Tensor) -> tuple[Tensor]:
        """Cosines and sines (S, 2, N, K) of positions (S,), for N kinds of heads."""
        tables = self.make(positions)
        pairs = [torch.stack(full_width(*pair), dim=1) for pair in zip(tables[::2], tables[1::2], strict=True)]
        nothing = torch.stack((torch.ones_like(pairs[0][:, 0]), torch.zeros_like(pairs[0][:, 0])), dim=1)
        return (torch.stack((*pairs, nothing), dim=2),)


def tables_of(make: Make, input_ids: Tensor, cache: KVCache | None, *n_heads: int) -> Sequence[Tensor]:
    """What turns the heads of tokens (B, T). Without a cache it is what `make` says of their positions, for `rotate`.

    With one they are tables for `turn`, out of those of all positions that the cache keeps: for `n_heads` neighbouring
    heads of each kind in turn (T, H, K) where all sequences have the same positions, else (B, T, H, K); without such
    numbers (1, T, K) or (B, 1, T, K). Where the cache has a span, one token of every sequence gets a single table of
    all kinds, (B, 1, 2, N, K), if there are numbers.
    """
    T = input_ids.shape[1]
    if cache is None:
        return make(torch.arange(T, device=input_ids.device))
    found = cache.lookup(FullWidth(make), T)
    cos, sin = found[0].unbind(-3)
    if not n_heads:
        return cos.narrow(-2, 0, 1).transpose(-3, -2), sin.narrow(-2, 0, 1).transpose(-3, -2)
    if cache.has_span(T):
        return found
    kinds = head_kinds(n_heads, input_ids.device)
    return cos.index_select(-2, kinds), sin.index_select(-2, kinds)


@cache
@torch.inference_mode(False)
def head_kinds(n_heads: tuple[int, ...], device: torch.device) -> Tensor:
    """The kind of every head, where there are so many of each."""
    return torch.tensor([kind for kind, n in enumerate(n_heads) for _ in range(n)], device=device)
