"""Lion: the sign of a momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from nnx_cli.kernels import optimizer_step as elementwise
from nnx_cli.optim._base import DeviceOptimizer, Group, Layout


class Lion(DeviceOptimizer):
    """Chen et al. 2023, https://arxiv.org/abs/2302.06675. The momentum has the type of the weights."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), seed)

    def layout(self, p: Tensor, group: Group) -> Layout:
        return {"exp_avg": (p.shape, p.dtype)} | self.rounded(p)

    def update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        for p in parameters:
            elementwise.lion(p, self.state[p], group, found_inf, self.keys[p])
        self.count_step(parameters, found_inf)
