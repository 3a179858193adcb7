"""Steps on the unit sphere: nGPT, Loshchilov et al. 2024, https://arxiv.org/abs/2410.01131."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.layers.head import HeadFormula, formula_of
from nnx_cli.layers.linear import Linear

ALPHA = 0.05  # how far a step goes at the start: section 2.2.2 of the paper


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` over its L2 norm, in float32."""
    return F.normalize(x.float(), dim=dim, eps=1e-12)


class Interpolation(nn.Module):
    """The unit stream x, moved towards the direction of u by a learned share alpha of the way, in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((dim,), dim**-0.5))
        self.gain = ALPHA * dim**0.5

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        start = x.float()
        return unit(start + self.alpha * self.gain * (unit(u) - start)).to(x.dtype)


class ScaledHead(nn.Module):
    """Cosines of x with every token's unit vector, times a learned scale for each token, float32."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.linear = Linear(dim, vocab_size)
        self.scale = nn.Parameter(torch.full((vocab_size,), dim**-0.5))
        self.gain = dim**0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (self.scale * self.gain)

    def formula(self) -> HeadFormula | None:
        linear = formula_of(self.linear)
        return None if linear is None else replace(linear, scale=self.scale * self.gain)
