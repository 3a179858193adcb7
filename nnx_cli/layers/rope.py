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
