"""AdamW, with its state in float32 or in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import adamw as fused

from nnx_cli.kernels import optimizer_step as elementwise
from nnx_cli.kernels.log8 import n_blocks
from nnx_cli.optim._base import DeviceOptimizer, Group, Layout


class AdamW(DeviceOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101).

    Groups with `eight_bit` keep both averages in 8 bits, 2.03 bytes a number instead of 8 (after Dettmers et al. 2021,
    https://arxiv.org/abs/2110.02861, with another code). float32 weights with float32 state go through torch's fused
    kernel.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        eight_bit: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, eight_bit=eight_bit, **options)
        super().__init__(params, defaults, seed)
        self.divisor: Tensor | None = None  # of all gradients, in the next step

    def clip(self, norm: Tensor, limit: float) -> None:
        """The fused kernel divides on its way, where it takes all parameters."""
        if all(is_fused(p, group) for group in self.param_groups for p in group["params"]):
            self.divisor = ((norm + 1e-6) / limit).clamp(min=1.0)
        else:
            super().clip(norm, limit)

    def step(self) -> None:
        super().step()
        self.divisor = None

    def layout(self, p: Tensor, group: Group) -> Layout:
        layout = {"step": (torch.Size(()), torch.float32)} | self.rounded(p)
        for field in ("exp_avg", "exp_avg_sq"):
            layout[field] = (p.shape, torch.uint8 if group["eight_bit"] else torch.float32)
            if group["eight_bit"]:
                layout[f"{field}_scale"] = (torch.Size((n_blocks(p.numel()),)), torch.float32)
        return layout

    def update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        plain = [p for p in parameters if is_fused(p, group)]
        if plain:
            states = [self.state[p] for p in plain]
            beta1, beta2 = group["betas"]
            fused.adamw(
                plain,
                [p.grad for p in plain],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                fused=True,
                grad_scale=self.divisor,
                found_inf=found_inf,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        if len(plain) < len(parameters):
            others = [p for p in parameters if not is_fused(p, group)]
            for p in others:
                elementwise.adamw(p, self.state[p], group, found_inf, self.keys[p])
            self.count_step(others, found_inf)


def is_fused(p: Tensor, group: Group) -> bool:
    """Whether torch's kernel takes a parameter of a group."""
    return p.dtype == torch.float32 and not group["eight_bit"]
