"""GEMMs of float32 on a CPU, by the library that uses its widest vector units.

torch hands them to MKL, which keeps to half the width of the vector units of an AMD CPU with AVX-512. oneDNN, which
torch brings along for other dtypes and for what it compiles for inference, uses all of it: 240 instead of 105 billion
operations a second on one core of a Zen 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels.custom_op import keep_inputs, operator
from nnx_cli.system.hardware import of
from nnx_cli.system.torch_private import ONEDNN_LINEAR

MIN_ROWS = 16  # of x, below which reading the weight sets the pace
MIN_MULTIPLICATIONS = 2**22  # below which a call takes longer than is won


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) @ weight.T of weight (M, K), both of one dtype."""
    if torch.compiler.is_exporting() or x.numel() < MIN_ROWS * weight.shape[1]:
        return F.linear(x, weight)
    return onednn_linear(x, weight) if prefers_onednn(x, weight) else F.linear(x, weight)


def linear_by(weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """`linear` by a weight as one call of torch; None where it may be something else."""
    return None if of(weight).onednn else partial(F.linear, weight=weight)


def prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `onednn_linear` takes x: a CPU's float32, and a GEMM large enough for a call."""
    return _is_large(x, weight) and of(x).kind == "cpu" and x.dtype == torch.float32


def _is_large(x: Tensor, weight: Tensor) -> bool:
    M, K = weight.shape
    return x.numel() >= MIN_ROWS * K and x.numel() * M >= MIN_MULTIPLICATIONS


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    """`linear`, contiguous, by oneDNN where it is the faster library.

    oneDNN copies x unless it is contiguous, and reads the weight or its transpose as it lies.
    """
    if not of(x).onednn:
        return F.linear(x, weight)
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    assert ONEDNN_LINEAR is not None
    return ONEDNN_LINEAR(x, weight, None, "none", [], "")


def _shapes(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight = ctx.needs_input_grad
    return (
        onednn_linear(grad, weight.t()) if wants_x else None,
        transposed_matmul(grad.flatten(0, -2), x.flatten(0, -2)) if wants_weight else None,
    )


def transposed_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b of a (N, M) and b (N, K), contiguous.

    The narrower is copied. Copies are left to the compiler, whose are twice as fast as torch's, and which makes one for
    several GEMMs.
    """
    a, b = a.t(), b.t()
    if not of(a).onednn:
        return onednn_linear(a, b)
    if len(a) > len(b):
        return onednn_linear(b.contiguous(), a).t().contiguous()
    return onednn_linear(a.contiguous(), b)


# an operator, for the compiler stumbles over that of oneDNN
onednn_linear = operator("linear", _forward, _shapes, keep=keep_inputs, gradients=_gradients, device="cpu")
