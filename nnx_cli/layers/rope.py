"""Rotary position embedding, half-split: features j and j + K/2 of a head form a pair.

Su et al. 2021, https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (float32) of the angles of `positions`: (T,) gives (T, K/2), (B, T) gives (B, 1, T, K/2)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.float().unsqueeze(-1) * frequencies
    if positions.dim() == 2:
        angles = angles.unsqueeze(1)  # one table for all heads
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of `x` (B, H, T, K) by its angle, in float32; the result has the type of `x`."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
