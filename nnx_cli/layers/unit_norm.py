"""Unit vectors, and steps on the unit sphere: nGPT, Loshchilov et al. 2024, https://arxiv.org/abs/2410.01131."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nnx_cli.layers.head import LinearHead, as_linear_head
from nnx_cli.layers.linear import Linear

ALPHA = 0.05  # how far a step goes at the start: section 2.2.2 of the paper
GROUP_BYTES = 2**25  # of small matrices that are normalised side by side, in a copy


def length(x: Tensor, axis: int = -1) -> Tensor:
    """L2 norm along an axis, which is kept; float32."""
    return torch.linalg.vector_norm(x, dim=axis, keepdim=True, dtype=torch.float32).clamp_min(1e-12)


def tangent(grad: Tensor, unit: Tensor, norm: Tensor, axis: int = -1) -> Tensor:
    """Gradient of x where `grad` is that of unit = x / norm: the part along the sphere, divided by the norm."""
    return (grad - unit * (unit * grad).sum(axis, keepdim=True)) / norm


class Normalize(torch.autograd.Function):
    """N(x) = x / |x| along an axis, in float32. Keeps x as it came, and |x|."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> Tensor:
        """x / |x|, float32."""
        norm = length(x, axis)
        ctx.axis = axis
        ctx.save_for_backward(x, norm)
        return x / norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The part of `grad` along the sphere, over |x|."""
        x, norm = ctx.saved_tensors
        return tangent(grad, x / norm, norm, ctx.axis).to(x.dtype), None


def unit(x: Tensor, axis: int = -1) -> Tensor:
    """x over its L2 norm along an axis, float32."""
    return Normalize.apply(x, axis)


@torch.no_grad()
def normalize_matrices(matrices: Iterable[tuple[Tensor, int]]) -> None:
    """Divide matrices by their L2 norms along an axis each, in place; norms in float32.

    On CUDA small ones of one shape are stacked, up to GROUP_BYTES of them: a few kernels for all instead of for each.
    Those of the meta device have no elements to divide.
    """
    groups = defaultdict(list)
    for matrix, axis in matrices:
        if hasattr(matrix, "placements"):  # divided among ranks
            _normalize_divided(matrix, axis)
        elif not matrix.is_meta:
            groups[matrix.shape, matrix.dtype, axis].append(matrix)
    for (_, _, axis), group in groups.items():
        n = max(1, GROUP_BYTES // (group[0].numel() * group[0].element_size())) if group[0].is_cuda else 1
        for start in range(0, len(group), n):
            normalize_stacked(group[start : start + n], axis)


def _normalize_divided(matrix: Any, axis: int) -> None:
    """Divide a matrix by its L2 norms along an axis, in place, where ranks have rows of it each."""
    from torch.distributed.tensor import Replicate

    lengths = torch.linalg.vector_norm(matrix, dim=axis, keepdim=True, dtype=torch.float32)
    whole = [place if place.is_shard() else Replicate() for place in lengths.placements]
    matrix.div_(lengths.redistribute(placements=whole).clamp_(min=1e-12))


def normalize_stacked(matrices: list[Tensor], axis: int) -> None:
    """Divide matrices of one shape by their L2 norms along an axis, in place."""
    stack = torch.stack(matrices) if len(matrices) > 1 else matrices[0].unsqueeze(0)
    lengths = torch.linalg.vector_norm(stack, dim=axis + 1, keepdim=True, dtype=torch.float32)
    stack.div_(lengths.clamp_(min=1e-12))
    if len(matrices) > 1:
        torch._foreach_copy_(matrices, stack.unbind())


class Interpolation(nn.Module):
    """The unit stream x, moved towards the direction of u by a learned share alpha of the way, in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((dim,), dim**-0.5))
        self.gain = ALPHA * dim**0.5

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """x and u (..., D) to a unit vector between them, in the dtype of x."""
        start = x.float()
        return unit(start + self.alpha * self.gain * (unit(u) - start)).to(x.dtype)


class ScaledHead(nn.Module):
    """Cosines of x with every token's unit vector, times a learned scale for each token, float32."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.linear = Linear(dim, vocab_size)
        self.scale = nn.Parameter(torch.full((vocab_size,), dim**-0.5))
        self.gain = dim**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Unit vectors (..., D) to logits (..., V)."""
        return self.linear(x) * (self.scale * self.gain)

    def linear_head(self) -> LinearHead | None:
        """The head as the fused loss takes it; None where its matrix is no plain one."""
        linear = as_linear_head(self.linear)
        return None if linear is None else replace(linear, scale=self.scale * self.gain)
