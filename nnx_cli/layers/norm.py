"""Normalisation layers. Statistics are taken in float32 whatever the type of the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """Layer normalisation with a gain and no bias. Ba et al. 2016, https://arxiv.org/abs/1607.06450."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), normalised over its last axis, in its own dtype."""
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), None, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Root mean square normalisation with a gain. Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), divided by its root mean square, in its own dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
