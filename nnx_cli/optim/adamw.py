"""AdamW: torch's fused step for float32 weights, our own for bfloat16 ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nnx_cli.kernels import optimizer_step
from nnx_cli.optim._base import BETAS, DeviceOptimizer, Group, OptimizerConfig, StateSpec
from nnx_cli.optim._groups import parameter_groups


class AdamW(DeviceOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101).

    Both moments are float32. float32 weights go through `torch.optim.AdamW`, fused; bfloat16 ones are rounded
    stochastically.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = BETAS,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | options, seed)
        first = self.param_groups[0]["params"][0]
        on_meta = first.is_meta  # where torch has no fused step, and nothing to move
        self._torch = None if on_meta else torch.optim.AdamW([first], fused=True, capturable=first.is_cuda)
        self.grad_scale: Tensor | None = None  # divides all gradients in the next step

    def is_fused(self, p: Tensor, group: Group) -> bool:
        """Whether torch's kernel takes a parameter of a group."""
        return p.dtype == torch.float32

    def clip(self, norm: Tensor, limit: float) -> None:
        """Clip gradients to a norm of `limit`: the fused kernel does it on its way, where it takes all parameters."""
        if all(self.is_fused(p, group) for group in self.param_groups for p in group["params"]):
            self.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0)
        else:
            super().clip(norm, limit)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters that have a gradient; what `clip` said holds for this step alone."""
        loss = super().step(closure)
        self.grad_scale = None
        return loss

    def state_spec(self, p: Tensor, group: Group) -> StateSpec:
        """A count of steps, and the first and second moments."""
        moment = p.shape, torch.float32
        return {"step": (torch.Size(()), torch.float32), "exp_avg": moment, "exp_avg_sq": moment}

    def update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        """Move parameters, float32 ones by torch's step."""
        fused = [p for p in parameters if self.is_fused(p, group)]
        if fused:
            self._fused_update(fused, group, found_inf)
        if len(fused) < len(parameters):
            others = [p for p in parameters if not self.is_fused(p, group)]
            for p in others:
                optimizer_step.adamw(p, self.state[p], group, found_inf, self.keys[p])
            self.count_step(others, found_inf)

    def _fused_update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        """The step of `torch.optim.AdamW` on these parameters and their state; it allocates nothing."""
        if self._torch is None:
            return
        captured = parameters[0].is_cuda and torch.cuda.is_current_stream_capturing()
        inner = self._torch
        inner.state = self.state
        inner.param_groups = [{**inner.defaults, **group, "params": parameters, "capturable": captured}]
        for name, value in (("found_inf", found_inf), ("grad_scale", self.grad_scale)):
            setattr(inner, name, value)  # what torch's fused optimizers read; it declares neither
        inner.step()


def build(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW for the parameters of a model that are trained."""
    groups = parameter_groups(model, config.weight_decay)
    return AdamW(groups, config.lr, config.betas, seed=config.seed)
