"""Packed projections and what follows them: the kernels' path where there is one, else operations of torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels import qkv_swiglu as kernels
from nnx_cli.kernels.qkv_swiglu import rotate
from nnx_cli.layers.linear import PackedLinear


def packed_for_kernel(projections: PackedLinear, x: Tensor, cache: object | None) -> Tensor | None:
    """All projections of x in one tensor, where a kernel takes it from there.

    None where it does not, for a step with a cache, and where the layer was replaced (quantized) or has an adapter.
    """
    if cache is None and isinstance(projections, PackedLinear) and kernels.takes(x):
        return projections.packed_output(x)
    return None


def qkv_rope(projections: PackedLinear, x: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, K), keys and values (B, G, T, K) of x (B, T, D); queries and keys are turned by `tables`."""
    (B, T, _), (cos, sin) = x.shape, tables
    head_dim = 2 * cos.shape[-1]
    if (packed := packed_for_kernel(projections, x, None)) is not None:
        n_heads, n_kv_heads, _ = (width // head_dim for width in projections.splits)
        return kernels.qkv_rope_swiglu(packed, cos, sin, cos, sin, n_heads, n_kv_heads)[:3]
    q, k, v = (y.view(B, T, -1, head_dim).transpose(1, 2) for y in projections(x))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def swiglu(projections: PackedLinear, x: Tensor, cache: object | None) -> Tensor:
    """silu(gate) · up of x, (B, T, F). Shazeer 2020, https://arxiv.org/abs/2002.05202."""
    if (packed := packed_for_kernel(projections, x, cache)) is not None:
        return kernels.swiglu(packed)
    gate, up = projections(x) if cache is None else projections.packed(x).chunk(2, dim=-1)  # (B, T, F) each
    return F.silu(gate) * up
