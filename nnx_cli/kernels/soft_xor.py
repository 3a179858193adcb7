"""The recurrence of two-argument activations: soft XOR of a pair of cells behind a saturating activation.

Yoon et al. 2021, https://arxiv.org/abs/2110.06871, after the network of one layer that follows an input by feeding its
state back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnx_cli.kernels.precision import in_type, widened
from nnx_cli.system.hardware import takes_triton

CACHED = 2**16  # elements that a CPU's cache still holds when the next operation comes to them


def activation_and_slope(x: Tensor, repeats: int = 1) -> tuple[Tensor, Tensor]:
    """The odd, saturating activation, slope 1 at 0 and limits ±0.2014, or its `repeats`-fold composition, and its
    derivative, which needs the same logarithms and roots; at least float32.

    With s = 2 tanh(x/2), l = ±ln(1 + |s|), p = l / sqrt(1 + 24 l²) it is 2 atanh(p/2). Applied again, s is the p of
    before.
    """
    x = widened(x)
    below = torch.expm1(-x.abs())  # exp(-|x|) - 1
    s = -2 * below / (2 + below)  # 2 tanh(|x|/2), by a function that takes a third of tanh's time
    above = 1 - s * s / 4
    under: Tensor | float = 1.0  # of the derivative's fraction
    for _ in range(repeats):
        log = torch.log1p(s)
        root = torch.rsqrt(1 + 24 * log * log)
        above, under = above * (root * root * root), under * (1 + s)
        s = log * root
    square = s * s
    series = 1 + square * (1 / 12 + square * (1 / 80 + square / 448))  # 2 atanh(s/2) / s up to 1.3e-9: |s| < 0.205
    return (s * series).copysign(x), above / (under * (1 - square / 4))


class Activation(torch.autograd.Function):
    """The activation, which keeps its slope alone for the backward pass, in place of a dozen intermediate results.

    A CPU takes all operations on one piece before the next, or its memory would set the pace.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """`activation_and_slope(x)[0]`."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            y, slope = (in_type(part, x.dtype) for part in activation_and_slope(x))
        else:
            x = x.contiguous()
            y, slope = torch.empty_like(x), torch.empty_like(x)
            pieces = (tensor.view(-1).split(CACHED) for tensor in (x, y, slope))
            for piece, y_piece, slope_piece in zip(*pieces, strict=True):
                y_piece[:], slope_piece[:] = activation_and_slope(piece)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The gradient of x."""
        (slope,) = ctx.saved_tensors
        return grad * slope


def soft_xor(a: Tensor, b: Tensor) -> Tensor:
    """a(1 − b)/2 + b(1 − a)/2: half the probability that exactly one of two events holds."""
    return (a + b) / 2 - a * b


def cell(sums: Tensor, state: Tensor) -> None:
    """A step of the recurrence behind its GEMM: sums (B, 2 P) are replaced by the derivatives of what is written to
    `state` (B, P), soft_xor(act(act(left)), act(act(right)))."""
    y, slope = activation_and_slope(sums, repeats=2)
    left, right = y.chunk(2, dim=-1)
    state.copy_(soft_xor(left, right))
    torch.mul(slope, 0.5 - torch.cat((right, left), dim=-1), out=slope)
    sums.copy_(slope)


def fastest_cell(x: Tensor) -> Callable[[Tensor, Tensor], None]:
    """`cell`, or one kernel that does the same where `x` lies and Triton runs."""
    if not takes_triton(x):
        return cell
    from nnx_cli.kernels import soft_xor_triton

    return soft_xor_triton.cell


class Recurrence(torch.autograd.Function):
    """A layer of the prophet: s_t = soft_xor(act(act(x_t + U s_{t-1}))), the two halves of the vector being the cells.

    inputs x (T, B, 2 P), weight U (2 P, P), first state (B, P); returns the states (T, B, P). A step is one GEMM and
    one run of pointwise operations, a single kernel on CUDA, forward; one GEMM and one multiplication backward. The
    gradient of U is taken for all steps at once. Keeps (T, B, 3 P) elements.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, state: Tensor) -> Tensor:
        """The states (T, B, P)."""
        if inputs.is_meta:  # to be counted, not run: one GEMM with as many operations as all steps have
            slopes, states = torch.empty_like(inputs), torch.cat((state[None], inputs @ weight))
        else:
            slopes, states = (
                inputs.clone(memory_format=torch.contiguous_format),
                inputs.new_empty(len(inputs) + 1, *state.shape),
            )
            states[0] = state
            step, steps, transposed = fastest_cell(inputs), states.unbind(), weight.t()
            for t, sums in enumerate(slopes.unbind()):
                sums.addmm_(steps[t], transposed)
                step(sums, steps[t + 1])
        ctx.save_for_backward(slopes, states, weight)
        return states[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of inputs, weight and first state."""
        slopes, states, weight = ctx.saved_tensors
        T, B, P = grad.shape
        sums_grad = torch.empty_like(slopes)
        if slopes.is_meta:  # to be counted, not run: the loop below is long and works in place
            grad_states = torch.empty_like(states)
            return sums_grad, sums_grad.flatten(0, 1).t() @ states[:-1].flatten(0, 1), grad_states[0]
        grad_states = torch.cat((torch.zeros_like(grad[:1]), grad))  # (T + 1, B, P), the first state's included
        before, pairs = grad_states.unbind(), (x.view(T, B, 2, P).unbind() for x in (slopes, sums_grad))
        for t, (slope, pair) in reversed([*enumerate(zip(*pairs, strict=True))]):
            torch.mul(slope, before[t + 1][:, None], out=pair)
            before[t].addmm_(pair.view(B, 2 * P), weight)
        return sums_grad, sums_grad.flatten(0, 1).t() @ states[:-1].flatten(0, 1), grad_states[0]


def recurrence(inputs: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """`Recurrence`; in a graph that is exported, the same as a scan."""
    if not torch.compiler.is_exporting():
        return Recurrence.apply(inputs, weight, state)
    from torch._higher_order_ops.scan import scan

    def step(before: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = activation_and_slope(torch.addmm(x, before, weight.t()), repeats=2)[0]
        after = soft_xor(*y.chunk(2, dim=-1))
        return after, after.clone()  # a scan returns no tensor twice

    return scan(step, state, inputs)[1]
