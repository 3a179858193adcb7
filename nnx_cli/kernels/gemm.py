"""Matrix products of float32 on a processor, by the library that uses its widest units.

torch hands them to MKL, which keeps to half the width of the vector units of an AMD processor with AVX-512. oneDNN,
which torch brings along for other types and for what it compiles for inference, uses all of it: 240 instead of 105
billion operations a second on one core of a Zen 5.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels.custom_op import operator
from nnx_cli.system.hardware import of

LEAST_ROWS = 16  # of x, below which reading the weight sets the pace
LEAST_PRODUCTS = 2**22  # multiplications, below which starting takes longer than is won


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) @ weight.T of weight (M, K), both of one type."""
    return product(x, weight) if pays(x, weight) else F.linear(x, weight)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether another library than torch's first choice may be worth a call."""
    return of(x).kind == "cpu" and x.dtype == torch.float32 and is_large(x, weight)


def is_large(x: Tensor, weight: Tensor) -> bool:
    M, K = weight.shape
    return x.numel() >= LEAST_ROWS * K and x.numel() * M >= LEAST_PRODUCTS


def fastest_product(x: Tensor, weight: Tensor) -> Tensor:
    """`multiply`, contiguous. oneDNN copies x unless it is contiguous and reads the weight or its transpose as it
    lies."""
    if not of(x).onednn:
        return F.linear(x, weight)
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def shape_only(x: Tensor, weight: Tensor) -> Tensor:
    """What the compiler knows of the result."""
    return x.new_empty(*x.shape[:-1], len(weight))


def keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of x and weight, as far as they are asked for; products again."""
    x, weight = ctx.saved_tensors
    wants_x, wants_weight = ctx.needs_input_grad
    return (
        product(grad, weight.t()) if wants_x else None,
        transposed_product(grad.flatten(0, -2), x.flatten(0, -2)) if wants_weight else None,
    )


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b of a (N, M) and b (N, K), contiguous; the narrower is copied. Copies are left to the compiler, whose are
    twice as fast as torch's, and which makes one for several products."""
    a, b = a.t(), b.t()
    if not of(a).onednn:
        return product(a, b)
    if len(a) > len(b):
        return product(b.contiguous(), a).t().contiguous()
    return product(a.contiguous(), b)


# an operator, for the compiler stumbles over that of oneDNN
product = operator("product", fastest_product, shape_only, keep=keep_factors, gradients=gradients, device="cpu")
