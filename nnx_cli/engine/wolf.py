"""Wolf, the optimizer that comes with Tape: momentum that acts only where the newest gradient agrees with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

SHARE = 1 / math.e  # of the new in every average; the original has no option for it


class Wolf(torch.optim.Optimizer):
    """With momentum m and gradient g: u = m + (g − m)/e, m ← m + (u − m)/e, p ← p − lr·u where u and g have one sign.

    Smoothed gradient descent with a test of signs: unlike Adam's and Lion's, a step grows with the gradient, so lr is
    large (its author offers 0.3678). One momentum, float32 whatever the type of p. Weight decay acts on p beforehand,
    p ← p·(1 − lr·weight_decay); the original has none.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.3678, weight_decay: float = 0.0) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p, dtype=torch.float32)
            momenta = [self.state[p]["momentum"] for p in parameters]
            gradients = [p.grad.float() for p in parameters]
            updates = torch._foreach_lerp(momenta, gradients, SHARE)
            torch._foreach_lerp_(momenta, updates, SHARE)
            agree = torch._foreach_sign(updates)
            torch._foreach_mul_(agree, gradients)
            torch._foreach_sign_(agree)
            torch._foreach_clamp_min_(agree, 0.0)  # 1 where the signs are one, else 0
            torch._foreach_mul_(updates, agree)
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        return loss
