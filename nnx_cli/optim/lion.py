"""Lion: the sign of a momentum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lion_pytorch import foreach
from torch import Tensor, nn

from nnx_cli.kernels import optimizer_step
from nnx_cli.optim._base import BETAS, Defaults, DeviceOptimizer, Group, OptimizerConfig, StateSpec
from nnx_cli.optim._groups import parameter_groups

DEFAULTS = Defaults(lr_share=0.1, weight_decay=False, beta2=False)

STACK_BYTES = 32 * 2**20  # of parameters whose momenta are copied at a time


class Lion(foreach.Lion, DeviceOptimizer):
    """Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675) for float32 weights: the step of lion-pytorch."""

    capturable = False

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = BETAS, weight_decay: float = 0.0
    ) -> None:
        foreach.Lion.__init__(self, params, lr=lr, betas=betas, weight_decay=weight_decay)

    step = DeviceOptimizer.step

    def state_spec(self, p: Tensor, group: Group) -> StateSpec:
        """The momentum."""
        return {"exp_avg": (p.shape, p.dtype)}

    def update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        """Move parameters by the step of lion-pytorch, which looks at `param_groups` and copies momenta."""
        if found_inf is not None and found_inf != 0:
            return
        groups = self.param_groups
        try:
            for some in stacks(parameters):
                self.param_groups = [{**group, "params": some}]
                foreach.Lion.step(self)
        finally:
            self.param_groups = groups


def stacks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in order, in lists of at most STACK_BYTES unless they are of one."""
    stack: list[Tensor] = []
    for p in parameters:
        if stack and sum(q.nbytes for q in (*stack, p)) > STACK_BYTES:
            yield stack
            stack = []
        stack.append(p)
    if stack:
        yield stack


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


def build(model: nn.Module, config: OptimizerConfig) -> Lion | RoundedLion:
    """Lion for the parameters of a model that are trained."""
    groups = parameter_groups(model, config.weight_decay)
    if all(p.dtype == torch.float32 for group in groups for p in group["params"]):
        return Lion(groups, config.lr)
    return RoundedLion(groups, config.lr, seed=config.seed)
