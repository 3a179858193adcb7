"""The recurrence of two-argument activations: soft XOR of a pair of cells behind a saturating activation.

Yoon et al. 2021, https://arxiv.org/abs/2110.06871, after the network of one layer that follows an input by feeding its
state back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def activation(x: Tensor, times: int = 1) -> Tensor:
    """The odd, saturating activation, slope 1 at 0 and limits ±0.2014, or its `times`-fold composition; at least
    float32.

    With s = 2 tanh(x/2), l = ±ln(1 + |s|), p = l / sqrt(1 + 24 l²) it is 2 atanh(p/2). Applied again, s is the p of
    before.
    """
    s = 2 * torch.tanh(widened(x) / 2)
    for _ in range(times):
        log = torch.log1p(s.abs()).copysign(s)
        s = log * torch.rsqrt(1 + 24 * log * log)
    return 2 * torch.atanh(s / 2)


def slope(x: Tensor, times: int = 1) -> Tensor:
    """Derivative of `activation`."""
    s = 2 * torch.tanh(widened(x) / 2)
    product = 1 - s * s / 4
    for _ in range(times):
        log = torch.log1p(s.abs()).copysign(s)
        root = torch.rsqrt(1 + 24 * log * log)
        product = product * root**3 / (1 + s.abs())
        s = log * root
    return product / (1 - s * s / 4)


class Activation(torch.autograd.Function):
    """`activation` that keeps its input alone for the backward pass, in place of eight intermediate results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return activation(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * slope(x).to(grad.dtype)


def soft_xor(a: Tensor, b: Tensor) -> Tensor:
    """a(1 − b)/2 + b(1 − a)/2: half the probability that exactly one of two events holds."""
    return (a + b) / 2 - a * b


class Recurrence(torch.autograd.Function):
    """A layer of the prophet: s_t = soft_xor(act(act(x_t + U s_{t-1}))), the two halves of the vector being the cells.

    inputs x (T, B, 2 P), weight U (2 P, P), first state (B, P); returns the states (T, B, P). A step is one product and
    one run of pointwise operations forward, one product and one multiplication backward; derivatives and the gradient
    of U are taken for all steps at once. Keeps (T, B, 3 P) numbers.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, state: Tensor) -> Tensor:
        T, B, _ = inputs.shape
        if inputs.is_meta:  # to be counted, not run: one product with as many operations as all steps have
            sums, states = torch.empty_like(inputs), torch.cat((state[None], inputs @ weight))
        else:
            sums, states = torch.empty_like(inputs), inputs.new_empty(T + 1, *state.shape)
            states[0] = state
            for t in range(T):
                torch.addmm(inputs[t], states[t], weight.t(), out=sums[t])
                states[t + 1] = soft_xor(*activation(sums[t], times=2).chunk(2, dim=-1))
        ctx.save_for_backward(sums, states, weight)
        return states[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums, states, weight = ctx.saved_tensors
        T, B, P = grad.shape
        left, right = activation(sums, times=2).chunk(2, dim=-1)
        through = (torch.cat((0.5 - right, 0.5 - left), dim=-1) * slope(sums, times=2)).to(sums.dtype)
        through, sums_grad = through.view(T, B, 2, P), torch.empty(T, B, 2, P, dtype=sums.dtype, device=sums.device)
        carried = torch.zeros_like(grad[0])
        for t in reversed(range(T)):
            torch.mul(through[t], (grad[t] + carried)[:, None], out=sums_grad[t])
            carried = sums_grad[t].view(B, 2 * P) @ weight
        sums_grad = sums_grad.view(T, B, 2 * P)
        return sums_grad, sums_grad.flatten(0, 1).t() @ states[:-1].flatten(0, 1), carried
