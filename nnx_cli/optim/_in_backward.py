"""The optimizer's step inside the backward pass: a weight moves as soon as its gradient is complete, and the gradient
is freed, so that the gradients of a model never exist together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnx_cli.optim._base import DeviceOptimizer


class InBackward:
    """Lets every backward pass through a model take the step of an optimizer, parameter by parameter.

    Between `begin` and `finish` there is one backward pass: one micro-batch to a step, and no loss scale. A parameter
    that is used in several places moves once all of them have given their part. Clipping and the test for what is
    not finite are a parameter's own: the norm of all gradients is known only when none of them is left. `frozen`,
    float32 (), keeps weights and state as they are where it is not 0, whatever the gradients.
    """

    def __init__(self, model: nn.Module, optimizer: DeviceOptimizer, grad_clip: float) -> None:
        self.optimizer = optimizer
        self.grad_clip = grad_clip
        self.groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        device = next(iter(self.groups)).device
        self.frozen = torch.zeros((), device=device)
        self.squares = torch.zeros((), device=device)  # of all gradients, summed
        self.bad = torch.zeros((), device=device)
        for p in model.parameters():
            if p in self.groups:
                p.register_post_accumulate_grad_hook(self._take)

    def begin(self) -> None:
        """Forget the step before."""
        self.squares.zero_()
        self.bad.zero_()

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        """Move a parameter by its gradient, clipped to a norm of `grad_clip` (0: not), and free that."""
        assert p.grad is not None
        self.optimizer.ranks.add_up([p.grad])
        norm = torch.linalg.vector_norm(p.grad, dtype=torch.float32)
        bad = 1 - norm.isfinite().float()
        self.squares += norm.square()
        torch.maximum(self.bad, bad, out=self.bad)
        if self.grad_clip:
            p.grad.mul_((self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step_on([p], self.groups[p], torch.maximum(bad, self.frozen))
        p.grad = None

    def finish(self) -> tuple[Tensor, Tensor]:
        """Norm of all gradients before clipping, and 1.0 where some were not finite, else 0.0: both float32 ().

        Gradients that were not accumulated by autograd are taken now.
        """
        for p in self.groups:
            if p.grad is not None:
                self._take(p)
        return self.squares.sqrt(), self.bad
