"""A pass over one token of every sequence, where reading matrices and the cache sets the pace: each operation reads its
own once, and does what stands before and after it on the way; Triton kernels on CUDA.

Numbers are rounded to the type of the activations wherever single operations would round them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels.gemm import linear
from nnx_cli.kernels.precision import in_type
from nnx_cli.kernels.qkv_swiglu import turn
from nnx_cli.system.hardware import takes_triton

FEW = 4  # sequences up to which a matrix is read once for each: more are a GEMM's
MAX_HEAD_DIM = 256  # width of a head that a kernel's program holds


class Norm(NamedTuple):
    """x over its root mean square, or over its standard deviation once its mean is off (`centred`), times a gain."""

    gain: Tensor  # (D,)
    eps: float
    centred: bool


class Matrix(NamedTuple):
    """Of a linear layer, (N, K): in the type of the activations, or int8 codes and scales (N,) of rows, float32."""

    weight: Tensor
    scale: Tensor | None = None

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The weights (N, K) in a type."""
        if self.scale is None:
            return self.weight
        return (self.weight.float() * self.scale.unsqueeze(1)).to(dtype)


class Gate(NamedTuple):
    """The last 2 n rows of a matrix: of gates and values (or values and gates), which become silu(gate) · value.

    Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """

    n: int
    first: bool  # gates come first


def project(x: Tensor, norm: Norm, matrix: Matrix, gate: Gate) -> tuple[Tensor, Tensor]:
    """Normalised x (B, 1, D) times a matrix (N + 2 n, D): the first N projections (B, 1, N) and the gated ones
    (B, 1, n)."""
    if takes_triton(x):
        from nnx_cli.kernels import one_token_triton

        if len(x) <= FEW:
            return one_token_triton.project(x, *norm, *matrix, *gate)
        return _gated(linear(one_token_triton.normalise(x, *norm), matrix.plain(x.dtype)), gate)
    return plain_project(x, norm, matrix, gate)


def plain_project(x: Tensor, norm: Norm, matrix: Matrix, gate: Gate) -> tuple[Tensor, Tensor]:
    """`project` by operations of torch."""
    return _gated(linear(plain_normalise(x, norm), matrix.plain(x.dtype)), gate)


def plain_normalise(x: Tensor, norm: Norm) -> Tensor:
    """x (..., D) normalised, in its type."""
    wide, gain = in_type(x, torch.float32), in_type(norm.gain, torch.float32)
    if norm.centred:
        return in_type(torch.layer_norm(wide, gain.shape, gain, None, norm.eps), x.dtype)
    return in_type(torch.rms_norm(wide, gain.shape, gain, norm.eps), x.dtype)


def cpu_rms_norm(gain: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """`torch.rms_norm` of float32 on a CPU, where it is a dozen operations: five for x (B, 1, D)."""
    added = torch.tensor(eps)

    def norm(x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[1] > 1:
            return torch.rms_norm(x, gain.shape, gain, eps)
        inverse = torch.baddbmm(added, x, x.transpose(1, 2), alpha=1 / len(gain)).rsqrt_()
        return (x * inverse).mul_(gain)

    return norm


def _gated(packed: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    plain, first, second = packed.split_with_sizes((packed.shape[-1] - 2 * gate.n, gate.n, gate.n), -1)
    return plain, F.silu(first) * second if gate.first else F.silu(second) * first


def add_products(x: Tensor, *factors: tuple[Tensor, Matrix]) -> Tensor:
    """x (B, 1, D) + y @ matrix.T for each y (B, 1, K) and matrix (D, K): one or two, stored alike."""
    if takes_triton(x) and len(x) <= FEW:
        from nnx_cli.kernels import one_token_triton

        return one_token_triton.add_products(x, *factors)
    for y, matrix in factors:
        x = x + linear(y, matrix.plain(x.dtype))
    return x


def attend(
    qkv: Tensor, tables: Tensor, stored: Tensor, lengths: Tensor, span: int, n_heads: int, scale: float
) -> Tensor:
    """Store the keys and values of new positions `lengths` (B,), and attend from there to the first `span` positions,
    those beyond the new one left out; returns (B, 1, H·K).

    `qkv` (B, 1, (H + 2G)·K) holds queries, keys and values, `stored` (B, 2G, S, K) keys and values. `tables`
    (B, 1, 2, N, K), float32, are cosines and sines of full width for N kinds of heads: the first turns queries, the
    last but one keys, and the last nothing.
    """
    if takes_triton(qkv) and tables.shape[-1] <= MAX_HEAD_DIM:
        from nnx_cli.kernels import one_token_triton

        return one_token_triton.attend(qkv, tables, stored, lengths, span, n_heads, scale)
    return plain_attend(qkv, tables, stored, lengths, span, n_heads, scale)


def plain_attend(
    qkv: Tensor, tables: Tensor, stored: Tensor, lengths: Tensor, span: int, n_heads: int, scale: float
) -> Tensor:
    """`attend` by operations of torch."""
    B, N, G, K = len(qkv), tables.shape[-2], stored.shape[1] // 2, stored.shape[-1]
    (cos, sin), heads = tables[:, 0].unbind(1), qkv.view(B, -1, K)  # (B, N, K) each, (B, H + 2G, K)
    q, k, v = heads.split_with_sizes((n_heads, G, G), 1)
    q, k = turn(q, cos[:, :1], sin[:, :1]), turn(k, cos[:, N - 2 : N - 1], sin[:, N - 2 : N - 1])
    kv = torch.cat((k, v), dim=1).unsqueeze(2)  # (B, 2G, 1, K)
    stored.scatter_(2, lengths[:, None, None, None].expand_as(kv), kv)
    keys, values = stored[:, :, :span].chunk(2, dim=1)
    return plain_attend_stored(q.unsqueeze(2), keys, values, lengths, scale)


def attend_stored(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Attention of q (B, H, 1, K) at positions `lengths` (B,) over k, v (B, G, S, K) up to there, parts of one tensor;
    returns (B, 1, H·K)."""
    if takes_triton(q) and q.shape[-1] <= MAX_HEAD_DIM:
        from nnx_cli.kernels import one_token_triton

        return one_token_triton.attend_stored(q, k, v, lengths, scale)
    return plain_attend_stored(q, k, v, lengths, scale)


def plain_attend_stored(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """`attend_stored` by operations of torch.

    The query heads of a key-value head are as good as so many positions of it: its keys are read once.
    """
    B, H, _, K = q.shape
    hidden = torch.arange(k.shape[2], device=k.device) > lengths[:, None, None, None]
    mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    q = q.reshape(B, k.shape[1], -1, K)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).reshape(B, 1, H * K)
