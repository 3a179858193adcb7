"""What a block does with one token of every sequence, in few operations; on CUDA kernels of ours read matrices once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels import one_token as kernels
from nnx_cli.kernels.one_token import Gate, Matrix
from nnx_cli.layers.linear import Linear, PackedLinear
from nnx_cli.layers.norm import LayerNorm, RMSNorm
from nnx_cli.layers.quantized import QuantizedLinear, QuantizedPackedLinear

NO_GATE = Gate(0, True)
Packed = PackedLinear | QuantizedPackedLinear


def norm_linear(norm: LayerNorm | RMSNorm, projections: Packed, x: Tensor) -> Tensor:
    """All projections of normalised x (B, T, D) in one tensor."""
    columns = projections.columns
    if columns is not None and x.numel() == columns.size(1):
        return torch.bmm(norm(x), columns)
    matrix = read_once(projections, x)
    return projections.packed(norm(x)) if matrix is None else kernels.project(x, norm.parts(), matrix, NO_GATE)[0]


def norm_gated(norm: LayerNorm | RMSNorm, projections: Packed, x: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """Projections of normalised x (B, T, D): those before the gated ones in one tensor, and those, (B, T, n)."""
    columns = projections.columns
    if columns is not None and x.numel() == columns.size(1):
        packed = torch.bmm(norm(x), columns)
    elif (matrix := read_once(projections, x)) is not None:
        return kernels.project(x, norm.parts(), matrix, gate)
    else:
        packed = projections.packed(norm(x))
    plain, first, second = packed.split_with_sizes((packed.shape[-1] - 2 * gate.n, gate.n, gate.n), -1)
    return plain, F.silu(first) * second if gate.first else F.silu(second) * first


def add_linear(x: Tensor, *branches: tuple[Linear | QuantizedLinear, Tensor]) -> Tensor:
    """x (B, T, D) + what each layer makes of its input."""
    if branches[0][0].columns is None:
        matrices = [read_once(layer, y) for layer, y in branches]
        factors = [(y, matrix) for (_, y), matrix in zip(branches, matrices, strict=True) if matrix is not None]
        if len(factors) == len(branches) and len({matrix.scale is None for _, matrix in factors}) == 1:
            return kernels.add_products(x, *factors)
    for layer, y in branches:
        columns = layer.columns
        x = torch.baddbmm(x, y, columns) if columns is not None and y.numel() == columns.size(1) else x + layer(y)
    return x


def read_once(layer: Linear | QuantizedLinear, x: Tensor) -> Matrix | None:
    """What a layer multiplies one token x of every sequence with, on CUDA and where that is all that it does."""
    if not x.is_cuda or x.shape[1] > 1:
        return None
    if isinstance(layer, QuantizedLinear):
        scale = layer.scale_of_rows(x.dtype) if len(x) <= kernels.FEW else None
        return None if scale is None else Matrix(layer.weight, scale)
    plain = type(layer) in (Linear, PackedLinear) and not layer.has_adapter
    lasts = layer.cast is not None or layer.weight.dtype == x.dtype  # a kernel may read it before the last one is done
    return Matrix(layer.matrix(x.dtype)) if plain and lasts else None
