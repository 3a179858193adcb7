"""Wolf, the optimizer that comes with Tape: momentum that acts only where the newest gradient agrees with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nnx_cli.kernels import optimizer_step as elementwise
from nnx_cli.optim._base import DeviceOptimizer, Group, Layout


class Wolf(DeviceOptimizer):
    """With momentum m and gradient g: u = m + (g − m)/e, m ← m + (u − m)/e, p ← p − lr·u where u and g have one sign.

    Smoothed gradient descent with a test of signs: unlike Adam's and Lion's, a step grows with the gradient, so lr is
    large (its author offers 0.3678). One momentum, float32 whatever the type of p. Weight decay acts on p beforehand,
    p ← p·(1 − lr·weight_decay); the original has none.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.3678,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay), seed)

    def layout(self, p: Tensor, group: Group) -> Layout:
        return {"momentum": (p.shape, torch.float32)} | self.rounded(p)

    def update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        for p in parameters:
            elementwise.wolf(p, self.state[p], group, found_inf, self.keys[p])
        self.count_step(parameters, found_inf)
