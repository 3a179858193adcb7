"""The one linear layer of the project, and its packed sibling."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`x @ weight.T`, without a bias; the weight is cast to the type of `x`, so that no autocast is needed.

    Weights stay in the type they are stored in (float32 when training) and the type of the activations decides the
    arithmetic.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class PackedLinear(Linear):
    """Several projections of one input in a single matrix product.

    `splits` are their output widths, in the order of the rows of `weight`; forward returns one tensor for each.
    """

    def __init__(self, in_features: int, splits: Sequence[int]) -> None:
        super().__init__(in_features, sum(splits))
        self.splits = tuple(splits)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x).split(self.splits, dim=-1)
