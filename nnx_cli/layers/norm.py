"""Normalisation layers. Statistics are taken in float32 whatever the type of the input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from nnx_cli.kernels.one_token import Norm, cpu_rms_norm
from nnx_cli.kernels.precision import in_type


class LayerNorm(nn.Module):
    """Layer normalisation with a gain and no bias. Ba et al. 2016, https://arxiv.org/abs/1607.06450."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), normalised over its last axis, in its own dtype."""
        wide, weight = in_type(x, torch.float32), in_type(self.weight, torch.float32)
        return in_type(torch.layer_norm(wide, weight.shape, weight, None, self.eps), x.dtype)

    def parts(self) -> Norm:
        """What the norm computes."""
        return Norm(self.weight, self.eps, centred=True)

    def direct_attributes(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """As in layers.linear.Linear."""
        gain = self.weight
        norm = partial(torch.layer_norm, normalized_shape=gain.shape, weight=gain, bias=None, eps=self.eps)
        return {"forward": norm} if type(self) is LayerNorm and gain.dtype == torch.float32 else {}


class RMSNorm(nn.Module):
    """Root mean square normalisation with a gain. Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), divided by its root mean square, in its own dtype."""
        wide, weight = in_type(x, torch.float32), in_type(self.weight, torch.float32)
        return in_type(torch.rms_norm(wide, weight.shape, weight, self.eps), x.dtype)

    def parts(self) -> Norm:
        """What the norm computes."""
        return Norm(self.weight, self.eps, centred=False)

    def direct_attributes(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """As in layers.linear.Linear."""
        plain = type(self) is RMSNorm and self.weight.dtype == torch.float32
        return {"forward": cpu_rms_norm(self.weight, self.eps)} if plain else {}
