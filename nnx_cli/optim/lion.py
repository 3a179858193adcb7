"""Lion: the sign of a momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lion_pytorch import foreach
from torch import Tensor, nn

from nnx_cli.config import TrainConfig
from nnx_cli.kernels import optimizer_step
from nnx_cli.optim._base import DeviceOptimizer, Group, StateSpec
from nnx_cli.optim._groups import BETAS, parameter_groups


class Lion(foreach.Lion, DeviceOptimizer):
    """Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675) for float32 weights: the step of lion-pytorch."""

    capturable = False

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = BETAS, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

    step = DeviceOptimizer.step

    def state_spec(self, p: Tensor, group: Group) -> StateSpec:
        """The momentum."""
        return {"exp_avg": (p.shape, p.dtype)}

    def update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        """Move parameters by the step of lion-pytorch, which looks at `param_groups`."""
        if found_inf is not None and found_inf != 0:
            return
        groups, self.param_groups = self.param_groups, [{**group, "params": parameters}]
        try:
            foreach.Lion.step(self)
        finally:
            self.param_groups = groups


class RoundedLion(DeviceOptimizer):
    """Lion for bfloat16 weights, rounded stochastically. The momentum has the type of the weights."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = BETAS,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, seed)

    def state_spec(self, p: Tensor, group: Group) -> StateSpec:
        """The momentum."""
        return {"exp_avg": (p.shape, p.dtype)} | self.rounding_spec(p)

    def update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        """Move parameters by the sign of a momentum."""
        for p in parameters:
            optimizer_step.lion(p, self.state[p], group, found_inf, self.keys[p])
        self.count_step(parameters, found_inf)


def build(model: nn.Module, config: TrainConfig) -> Lion | RoundedLion:
    """Lion for the parameters of a model that are trained."""
    groups = parameter_groups(model, config.weight_decay)
    if all(p.dtype == torch.float32 for group in groups for p in group["params"]):
        return Lion(groups, config.lr)
    return RoundedLion(groups, config.lr, seed=config.seed)
