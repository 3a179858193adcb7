"""Wolf, the optimizer that comes with Tape: momentum that acts only where the newest gradient agrees with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nnx_cli.kernels import optimizer_step
from nnx_cli.optim._base import Defaults, DeviceOptimizer, Group, OptimizerConfig, StateSpec
from nnx_cli.optim._groups import parameter_groups

DEFAULTS = Defaults(lr=0.3678, weight_decay=False, beta2=False)  # the rate its author gives


class Wolf(DeviceOptimizer):
    """Wolf: u = m + (g − m)/e, m ← m + (u − m)/e, p ← p − lr·u where u and the gradient g have one sign.

    Smoothed gradient descent with a test of signs: unlike Adam's and Lion's, a step grows with the gradient, so lr is
    large (its author offers 0.3678). One momentum, float32 whatever the type of p. Weight decay acts on p beforehand,
    p ← p·(1 − lr·weight_decay); the original has none.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.3678, weight_decay: float = 0.0, *, seed: int = 0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, seed)

    def state_spec(self, p: Tensor, group: Group) -> StateSpec:
        """The momentum."""
        return {"momentum": (p.shape, torch.float32)} | self.rounding_spec(p)

    def update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        """Move parameters by their momentum, where the gradient has its sign."""
        for p in parameters:
            optimizer_step.wolf(p, self.state[p], group, found_inf, self.keys[p])
        self.count_step(parameters, found_inf)


def build(model: nn.Module, config: OptimizerConfig) -> Wolf:
    """Wolf for the parameters of a model that are trained."""
    return Wolf(parameter_groups(model, config.weight_decay), config.lr, seed=config.seed)
