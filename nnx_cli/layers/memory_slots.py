"""A sub-layer that reads learned memory slots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnx_cli.layers.linear import PackedLinear


class Memory(nn.Module):
    """Slots that a token reads by a softmax over its own scores: some shared by all layers, some of this one.

    Where there are both, a softmax of two numbers mixes them. Nothing is written to them in a forward pass.
    """

    def __init__(self, dim: int, n_global: int, n_layer: int) -> None:
        super().__init__()
        self.query = PackedLinear(dim, (n_global, n_layer))
        self.slots = nn.Parameter(torch.zeros(n_layer, dim)) if n_layer else None
        self.mix = nn.Parameter(torch.full((2,), 0.5)) if n_global and n_layer else None

    def forward(self, h: Tensor, slots: Tensor | None) -> Tensor:
        """h (B, T, D) to (B, T, D). `slots` (n, D) are the shared ones."""
        read = [
            scores.float().softmax(-1).to(h.dtype) @ own.to(h.dtype)
            for scores, own in zip(self.query(h), (slots, self.slots), strict=True)
            if own is not None
        ]
        if self.mix is None:
            return read[0]
        first, second = self.mix.float().softmax(0).to(h.dtype)
        return first * read[0] + second * read[1]
