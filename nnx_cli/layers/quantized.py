"""Layers whose matrix is stored in 8 or 4 bits, and the matmuls that this machine has for them.

In place of its float matrix a quantized layer has two buffers: `weight`, the codes, and `scale`, fp16.

- 8 bits: codes int8 (N, K) in -127 … 127, one scale a row (N,).
- 4 bits: codes -8 … 7, stored as code + 8, two in a byte, low nibble first: uint8 (N, ⌈K/2⌉), where the last of an odd
  number of columns is paired with code 0. One scale for every `group_size` neighbouring columns (N, ⌈K/group_size⌉);
  the last group may be shorter. A scale may be negative, so that the largest weight of a group can be the one at -8.

A weight is code × scale: there are no zero points.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.errors import CheckpointError
from nnx_cli.layers.linear import Linear, PackedLinear
from nnx_cli.system.hardware import cpu_int8_activation_bits

FORMAT = 1
FP16_MAX, FP16_MIN = 65504.0, 2.0**-24  # largest finite and smallest positive number
CLIP_SEARCH = torch.arange(28, 45) / -4  # the largest weight of a group becomes -7 … -11; beyond -8 it is clipped
ROWS_AT_ONCE = 2048  # of a matrix, in that search

SMALL_MATRIX = 2**17  # up to so many weights (512 KiB of float32, which a core keeps in its cache) float is as fast
TOLERANCE = 0.05  # relative error of a matmul; 7-bit activations have 0.03, sums that saturate 0.3 and more
PROBE_SHAPE = 1024, 1024
KERNELS = {
    8: "int8 weights and activations",
    7: "int8 weights, 7-bit activations",
    0: "weights unpacked to floating point",
}  # what multiplies with quantized matrices, by the bits of activations

Matmul = Callable[[Tensor], Tensor]  # x (..., K) to (..., N)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a model's matrices are stored: the object `quantization` of config.json."""

    format: int = FORMAT
    bits: int
    group_size: int | None  # columns that share a scale; None with 8 bits: all of a row
    kept: list[str]  # modules that stay in floating point, with everything inside them

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Self:
        """From config.json. Raises CheckpointError for a scheme that this version does not have."""
        if (described.get("format"), described.get("bits")) not in ((FORMAT, 8), (FORMAT, 4)):
            raise CheckpointError("this version of nnx does not know this quantization", fix="quantize the run again")
        return cls(**described)


def quantize(weight: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix (N, K), as stored."""
    if quantization.group_size is None:
        return quantize_rows(weight.float())
    pieces = [quantize_groups(rows.float(), quantization.group_size) for rows in weight.split(ROWS_AT_ONCE)]
    codes, scale = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return codes, scale


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (N, K) and fp16 scales (N,): the largest weight of a row gets 127."""
    scale = to_scale(weight.abs().amax(1) / 127)
    codes = (weight / scale.float()[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale


def quantize_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Nibbles (N, ⌈K/2⌉) and fp16 scales (N, ⌈K/group_size⌉), each the one of CLIP_SEARCH with the least square
    error."""
    N, K = weight.shape
    groups = F.pad(weight, (0, -K % group_size)).view(N, -1, group_size)  # zeros have no error under any scale
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best, codes, least = to_scale(largest), torch.zeros_like(groups), torch.full_like(largest, torch.inf)
    for divisor in CLIP_SEARCH.tolist():
        scale = to_scale(largest / divisor)
        tried = (groups / scale.float()).round_().clamp_(-8, 7)
        error = (tried * scale.float() - groups).square_().sum(2, keepdim=True)
        better = error <= least
        best, codes = torch.where(better, scale, best), torch.where(better, tried, codes)
        least = torch.minimum(error, least)
    nibbles = F.pad(codes.view(N, -1)[:, :K] + 8, (0, K % 2), value=8).to(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, best.squeeze(2)


def to_scale(scale: Tensor) -> Tensor:
    """`scale` in fp16, without the infinities and zeros that very large and very small weights would give."""
    scale = scale.clamp(-FP16_MAX, FP16_MAX).half()
    return torch.where(scale == 0, FP16_MIN, scale)


def dequantize(codes: Tensor, scale: Tensor, n_columns: int, group_size: int | None) -> Tensor:
    """Float32 weights (..., K) of rows of codes, as stored, and their scales (...) or (..., groups)."""
    if group_size is None:
        return codes.float() * scale.float().unsqueeze(-1)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :n_columns]
    return (nibbles.float() - 8) * scale.float().repeat_interleave(group_size, -1)[..., :n_columns]


def int8_matmul(weight: Tensor, scale: Tensor, activation_bits: int) -> Matmul:
    """Matmul on a CPU with int8 weights and activations that are quantized on the fly, to 8 bits or 7.

    `weight` (N, K) is float32, -127 … 127 times `scale` (N,). Without VNNI the 8-bit matmul adds pairs in 16 bits,
    where full-range activations saturate. The kernel has one scale for all rows of x, so each row is brought to the
    same peak first: a row does not depend on its neighbours.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # deprecated in torch 2.13
        codes = torch.quantize_per_channel(weight, scale.double(), torch.zeros(len(scale)).long(), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(codes, None)
    reduce_range = activation_bits == 7

    def matmul(x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return torch.ops.quantized.linear_dynamic(x, packed, reduce_range)
        peak = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30)
        return torch.ops.quantized.linear_dynamic(x / peak, packed, reduce_range) * peak

    return matmul


@cache
def activation_bits() -> int:
    """Bits of activations in this CPU's matmuls with int8 weights, a key of KERNELS, as its instruction set asks for; 0
    also where they would come out wrong."""
    bits = cpu_int8_activation_bits()
    return bits if bits and is_right(partial(int8_matmul, activation_bits=bits)) else 0


def kernel_name(device: torch.device) -> str:
    """What multiplies with quantized matrices on a device, in words."""
    return KERNELS[activation_bits() if device.type == "cpu" else 0]


def is_right(make: Callable[[Tensor, Tensor], Matmul]) -> bool:
    """Whether the matmul that is made for weights (N, K) and their scales (N,) is there, and within TOLERANCE of that
    in floating point: for one row and for several, and for ones that meet weights of 127, the largest sums."""
    generator = torch.Generator().manual_seed(0)
    N, K = PROBE_SHAPE
    codes = torch.randint(-127, 128, (N, K), generator=generator)
    codes[::2] = 127
    scale = torch.rand(N, generator=generator) + 0.5
    weight, several = codes * scale[:, None], torch.randn(5, K, generator=generator)
    inputs = torch.ones(1, K), several[:1], several
    try:
        matmul = make(weight, scale)
        found = [matmul(x) for x in inputs]
    except (AttributeError, RuntimeError):  # this build of torch, or this CPU, has no such operator
        return False
    wanted = [F.linear(x, weight) for x in inputs]
    return all((y - z).norm() <= TOLERANCE * z.norm() for y, z in zip(found, wanted, strict=True))


class QuantizedMatrix(nn.Module):
    """The matrix (N, K) of a layer in codes and scales, zero until they are loaded."""

    weight: Tensor
    scale: Tensor

    def __init__(self, n_rows: int, n_columns: int, quantization: Quantization, device: torch.device) -> None:
        super().__init__()
        self.n_columns, self.group_size = n_columns, quantization.group_size
        if self.group_size is None:
            codes = torch.zeros(n_rows, n_columns, dtype=torch.int8, device=device)
            scale = torch.zeros(n_rows, dtype=torch.float16, device=device)
        else:
            codes = torch.zeros(n_rows, -(-n_columns // 2), dtype=torch.uint8, device=device)
            scale = torch.zeros(n_rows, -(-n_columns // self.group_size), dtype=torch.float16, device=device)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)


class QuantizedEmbedding(QuantizedMatrix):
    """Looks rows up and dequantizes those alone."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Float32 rows (..., K) of token ids."""
        return dequantize(self.weight[input_ids], self.scale[input_ids], self.n_columns, self.group_size)


class QuantizedLinear(QuantizedMatrix):
    """`x @ W.T` by the matmul that suits device and size, made from what is stored at the first call.

    4-bit matrices use the 8-bit matmuls too: their weights are rounded once more, to 127 steps of their row's peak,
    a tenth of the error that they have already.
    """

    made_for: tuple[Tensor, torch.dtype] | None = None  # codes and type of x that `matmul` belongs to
    matmul: Matmul

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N), in its dtype."""
        if self.made_for is None or self.made_for[0] is not self.weight or self.made_for[1] != x.dtype:
            self._make_matmul(x.dtype)
        return self.matmul(x)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make_matmul(self, dtype: torch.dtype) -> None:
        """Choose and prepare `matmul` for the present codes and inputs of `dtype`."""
        weight = dequantize(self.weight, self.scale, self.n_columns, self.group_size)
        bits = 0
        if dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() > SMALL_MATRIX:
            bits = activation_bits()
        if bits:
            scale = self.scale if self.group_size is None else quantize_rows(weight)[1]
            self.matmul = int8_matmul(weight, scale.float(), bits)
        else:
            self.matmul = partial(F.linear, weight=weight.to(dtype))
        self.made_for = self.weight, dtype


class QuantizedPackedLinear(QuantizedLinear):
    """Several projections of one input; returns one tensor for each of `splits`, as PackedLinear does."""

    splits: Sequence[int]

    def packed(self, x: Tensor) -> Tensor:
        """All projections in one tensor, (..., sum of splits)."""
        return super().forward(x)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # more results than its base
        """x (..., K) to one tensor for each of `splits`, (..., width)."""
        return super().forward(x).split(self.splits, dim=-1)


REPLACEMENTS: dict[type[nn.Module], type[QuantizedMatrix]] = {
    Linear: QuantizedLinear,
    PackedLinear: QuantizedPackedLinear,
    nn.Embedding: QuantizedEmbedding,
}


def quantizable(model: nn.Module, kept: Iterable[str] = ()) -> dict[str, Linear | nn.Embedding]:
    """The modules that quantization replaces, by name.

    Left out are those in `kept` or inside a module in `kept`, and all that share their matrix with one that stays.
    """
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (Linear, nn.Embedding)) and type(module) in REPLACEMENTS
    }
    inside = tuple(f"{name}." for name in kept)
    staying: list[nn.Module] = [module for name, module in found.items() if f"{name}.".startswith(inside)]
    staying += [module for module in model.modules() if type(module) not in REPLACEMENTS]
    floats = {id(tensor) for module in staying for tensor in module.parameters(recurse=False)}
    return {name: module for name, module in found.items() if id(module.weight) not in floats}


def quantize_layers(model: nn.Module, quantization: Quantization) -> None:
    """Replace the layers of a float model by quantized ones that wait for their tensors; tied matrices stay tied."""
    first: dict[int, QuantizedMatrix] = {}
    for name, old in quantizable(model, quantization.kept).items():
        n_rows, n_columns = old.weight.shape
        new = REPLACEMENTS[type(old)](n_rows, n_columns, quantization, old.weight.device)
        if isinstance(old, PackedLinear) and isinstance(new, QuantizedPackedLinear):
            new.splits = old.splits
        tied = first.setdefault(id(old.weight), new)
        new.weight, new.scale = tied.weight, tied.scale
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    model.requires_grad_(False)


def widen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with everything in fp16 or bf16 turned to float32, the type that models compute in."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
