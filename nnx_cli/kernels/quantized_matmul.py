"""Matmuls with matrices in 8 or 4 bits; `layers.quantized` says how those are stored.

On a GPU int8 weights are read as they are, and activations stay in floating point.

On an x86 CPU up to eight rows of x are multiplied by C code of ours, where a C compiler makes a library of it: 3 to 4.5
times the speed of float32, for 4 bits too, whose weights become int8. What torch has is for more rows, and for where
there is no compiler. tests/bench/decode.md has all that was measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels.quantized_matmul_c import c_matmul
from nnx_cli.system.hardware import cpu_int4_kernel, cpu_int8_activation_bits, takes_triton

Matmul = Callable[[Tensor], Tensor]  # x (..., K) to (..., N)

TOLERANCE = 0.05  # relative error of a matmul; 7-bit activations have 0.03, sums that saturate 0.3 and more
TOLERANCE_16 = 1e-4  # that of one with 16-bit activations, which have 3e-5
PROBE_SHAPE = 1024, 1024
INT4_GROUPS = 32, 64, 128, 256  # columns that share a scale, as the 4-bit matmul takes them
INT4_ROWS = 2  # of x, up to which it is faster than that with int8 activations
C_ROWS = 8  # of x, up to which the matmul in C is the fastest
GPU_ROWS = 64  # of x, up to which reading the weights sets the pace of a GPU
KERNELS = {
    32: "int8 weights, floating-point activations",
    16: "int8 weights, 16-bit activations; for many tokens at once fewer bits",
    8: "int8 weights and activations",
    7: "int8 weights, 7-bit activations",
    4: "4-bit weights, bfloat16 activations; for many tokens at once int8",
    0: "weights unpacked to floating point",
}  # what multiplies with quantized matrices, by the bits of activations, or of weights that stay in 4

aten: Any = torch.ops.aten
INT4_PACK: Any = getattr(aten, "_convert_weight_to_int4pack_for_cpu", None)  # private: None where torch lacks it
INT4_MATMUL: Any = getattr(aten, "_weight_int4pack_mm_for_cpu", None)


def int8_matmul(weight: Tensor, scale: Tensor, activation_bits: int) -> Matmul:
    """Matmul with int8 weights and activations that are quantized on the fly, to 8 bits or 7.

    `weight` (N, K) is float32, -127 … 127 times `scale` (N,). Without VNNI the 8-bit matmul adds pairs in 16 bits,
    where full-range activations saturate. The kernel has one scale for all rows of x, so each row is brought to the
    same peak first: a row does not depend on its neighbours.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # deprecated in torch 2.13
        codes = torch.quantize_per_channel(weight, scale.double(), torch.zeros(len(scale)).long(), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(codes, None)
    multiply, reduce_range = torch.ops.quantized.linear_dynamic.default, activation_bits == 7

    def matmul(x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return multiply(x, packed, reduce_range)
        peak = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp_min_(1e-30)
        return multiply(x / peak, packed, reduce_range).mul_(peak)

    return matmul


def int4_matmul(codes: Tensor, scale: Tensor) -> Matmul:
    """Matmul with 4-bit weights (codes - 8) × scale, of codes (N, K) in int32 and scales (N, groups).

    Activations and scales are rounded to bfloat16, which costs a fifth of what quantizing activations to 8 bits does.
    """
    group_size = codes.shape[1] // scale.shape[1]
    packed = INT4_PACK(codes, 1)
    scales = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous().bfloat16()  # and offsets

    def matmul(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        return INT4_MATMUL(rows, packed, group_size, scales).float().view(*x.shape[:-1], -1)

    return matmul


def gpu_int8_matmul(codes: Tensor, scale: Tensor) -> Matmul:
    """Matmul on a GPU with int8 weights codes (N, K) × scale (N,) float32; activations stay as they are."""

    def matmul(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > GPU_ROWS:
            return F.linear(x, codes.to(x.dtype) * scale[:, None].to(x.dtype))
        from nnx_cli.kernels import quantized_matmul_triton

        return quantized_matmul_triton.matmul(rows, codes, scale).view(*x.shape[:-1], -1)

    return matmul


def few_or_many(few: Matmul, most: int, make_many: Callable[[], Matmul]) -> Matmul:
    """Matmul of up to `most` rows by `few`, of more by what `make_many` makes where it is needed first."""
    many = cache(make_many)

    def matmul(x: Tensor) -> Tensor:
        return few(x) if x.numel() <= most * x.shape[-1] else many()(x)

    return matmul


def kernel(codes: Tensor, n_rows: int, n_columns: int, group_size: int | None, dtype: torch.dtype) -> int:
    """What multiplies with a large matrix (N, K) for inputs of `dtype`, a key of KERNELS; 0: float is as fast."""
    if codes.is_cuda:
        return 32 if group_size is None and dtype != torch.float64 and takes_triton(codes) else 0
    if dtype != torch.float32 or codes.device.type != "cpu":
        return 0
    bits = activation_bits()
    if bits and has_c_matmul():
        return 16
    return 4 if bits and takes_int4(n_rows, n_columns, group_size) else bits


@cache
def has_c_matmul() -> bool:
    """Whether this machine has the matmul in C, and it is right."""

    def make(weight: Tensor, scale: Tensor) -> Matmul:
        return c_matmul((weight / scale[:, None]).round().to(torch.int8), scale)

    return is_right(make, tolerance=TOLERANCE_16)


@cache
def activation_bits() -> int:
    """Bits of activations in this CPU's matmuls with int8 weights, a key of KERNELS, as its instruction set asks for; 0
    also where they would come out wrong."""
    bits = cpu_int8_activation_bits()
    return bits if bits and is_right(partial(int8_matmul, activation_bits=bits)) else 0


@cache
def has_int4_matmul() -> bool:
    """Whether this CPU has a fast matmul with 4-bit weights, and torch one that is right."""
    return None not in (INT4_PACK, INT4_MATMUL) and cpu_int4_kernel() and is_right(_int4_probe, largest=7)


def takes_int4(n_rows: int, n_columns: int, group_size: int | None) -> bool:
    """Whether `int4_matmul` takes a matrix (N, K) on this CPU, whose instructions work on 16 rows at a time."""
    fits = group_size in INT4_GROUPS and n_rows % 16 == 0 and n_columns % group_size == 0
    return fits and has_int4_matmul()


def _int4_probe(weight: Tensor, scale: Tensor) -> Matmul:
    """`int4_matmul` of weights (N, K), -7 … 7 times `scale` (N,)."""
    group_size = INT4_GROUPS[0]
    groups = scale[:, None].expand(-1, weight.shape[1] // group_size)
    return int4_matmul((weight / scale[:, None]).round().int() + 8, groups)


def is_right(make: Callable[[Tensor, Tensor], Matmul], largest: int = 127, tolerance: float = TOLERANCE) -> bool:
    """Whether the matmul that is made for weights (N, K) and their scales (N,) is there, and within `tolerance` of that
    in floating point: for one row and for several, and for ones that meet the largest codes, the largest sums."""
    generator = torch.Generator().manual_seed(0)
    N, K = PROBE_SHAPE
    codes = torch.randint(-largest, largest + 1, (N, K), generator=generator)
    codes[::2] = largest
    scale = torch.rand(N, generator=generator) + 0.5
    weight, several = codes * scale[:, None], torch.randn(5, K, generator=generator)
    inputs = torch.ones(1, K), several[:1], several
    try:
        matmul = make(weight, scale)
        found = [matmul(x) for x in inputs]
    except (AttributeError, RuntimeError):  # this build of torch, or this CPU, has no such operator
        return False
    wanted = [F.linear(x, weight) for x in inputs]
    return all((y - z).norm() <= tolerance * z.norm() for y, z in zip(found, wanted, strict=True))
