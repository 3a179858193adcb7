"""What a block does with one token of every sequence: on CUDA in few operations, elsewhere by its own modules."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels import one_token as kernels
from nnx_cli.kernels.one_token import Gate
from nnx_cli.layers.linear import Linear, PackedLinear
from nnx_cli.layers.norm import LayerNorm, RMSNorm

NO_GATE = Gate(0, True)


def norm_linear(norm: LayerNorm | RMSNorm, projections: PackedLinear, x: Tensor) -> Tensor:
    """All projections of normalised x (B, T, D) in one tensor."""
    weight = plain_matrix(projections, x)
    return projections.packed(norm(x)) if weight is None else kernels.project(x, norm.parts(), weight, NO_GATE)[0]


def norm_gated(norm: LayerNorm | RMSNorm, projections: PackedLinear, x: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """Projections of normalised x (B, T, D): those before the gated ones in one tensor, and those, (B, T, n)."""
    weight = plain_matrix(projections, x)
    if weight is not None:
        return kernels.project(x, norm.parts(), weight, gate)
    packed = projections.packed(norm(x))
    plain, first, second = packed.split_with_sizes((packed.shape[-1] - 2 * gate.n, gate.n, gate.n), -1)
    return plain, F.silu(first) * second if gate.first else F.silu(second) * first


def add_linear(x: Tensor, *branches: tuple[Linear, Tensor]) -> Tensor:
    """x (B, T, D) + what each layer makes of its input."""
    weights = [plain_matrix(layer, y) for layer, y in branches]
    factors = [(y, weight) for (_, y), weight in zip(branches, weights, strict=True) if weight is not None]
    if len(factors) == len(branches):
        return kernels.add_products(x, *factors)
    for layer, y in branches:
        x = x + layer(y)
    return x


def plain_matrix(layer: Linear, x: Tensor) -> Tensor | None:
    """What a layer multiplies one token x of every sequence with, on CUDA and where that is all that it does."""
    plain = x.is_cuda and x.shape[1] == 1 and type(layer) in (Linear, PackedLinear) and not layer.has_adapter
    return layer.matrix(x.dtype) if plain else None
