"""Layers whose matrix is stored in 8 or 4 bits, and multiplied with as it is where that pays.

In place of its float matrix a quantized layer has two buffers: `weight`, the codes, and `scale`, fp16.

- 8 bits: codes int8 (N, K) in -127 … 127, one scale a row (N,).
- 4 bits: codes -8 … 7, stored as code + 8, two in a byte, low nibble first: uint8 (N, ⌈K/2⌉), where the last of an odd
  number of columns is paired with code 0. One scale for every `group_size` neighbouring columns (N, ⌈K/group_size⌉);
  the last group may be shorter. A scale may be negative, so that the largest weight of a group can be the one at -8.

A weight is code × scale: there are no zero points. What was a unit vector is made one again.

A module that is none of these may say `stores_int8`: an 8-bit file has its `weight` in codes and scales too, and it is
a float matrix again when it has been loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnx_cli.errors import CheckpointError
from nnx_cli.kernels import quantized_matmul as kernels
from nnx_cli.kernels.quantized_matmul import KERNELS, Matmul
from nnx_cli.layers.linear import Linear, PackedLinear
from nnx_cli.layers.outside_functions import OutsideFunction
from nnx_cli.layers.unit_norm import length, unit

FORMAT = 1
FP16_MAX, FP16_MIN = 65504.0, 2.0**-24  # largest finite and smallest positive number
CLIP_SEARCH = torch.arange(28, 45) / -4  # the largest weight of a group becomes -7 … -11; beyond -8 it is clipped
ROWS_AT_ONCE = 2048  # of a matrix, in that search

SMALL_MATRIX = 2**17  # up to so many weights (512 KiB of float32, which a core keeps in its cache) float is as fast
LARGE_MODEL = 250_000_000  # quantized weights, from which on int8 is the faster one on a GPU


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a model's matrices are stored: the object `quantization` of config.json."""

    format: int = FORMAT
    bits: int
    group_size: int | None  # columns that share a scale; None with 8 bits: all of a row
    kept: list[str]  # modules that stay in floating point, with everything inside them

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Self:
        """From config.json. Raises CheckpointError for a scheme that this version does not have, and TypeError and
        ValueError for what is none."""
        if not isinstance(described, Mapping):
            raise TypeError(f"it is {str(described)[:20]}")
        if (described.get("format"), described.get("bits")) not in ((FORMAT, 8), (FORMAT, 4)):
            raise CheckpointError("this version of nnx does not know this quantization", fix="quantize the run again")
        if odd := described.keys() ^ {field.name for field in fields(cls)}:
            raise ValueError(f"no match for {min(odd)}")
        found = cls(**described)
        group = found.group_size
        if not (group is None if found.bits == 8 else type(group) is int and 2 <= group <= 2**16):
            raise ValueError(f"groups of {str(group)[:20]}")
        if not isinstance(found.kept, list) or not all(isinstance(name, str) for name in found.kept):
            raise ValueError(f"it keeps {str(found.kept)[:20]}")
        return found


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


class QuantizedMatrix(nn.Module):
    """The matrix (N, K) of a layer in codes and scales, zero until they are loaded.

    `unit_axis` is the axis along which it has norm 1, where the architecture demands that; what rounding made of it is
    divided by its norm again.
    """

    weight: Tensor
    scale: Tensor
    unit_axis: int | None = None

    def __init__(self, n_rows: int, n_columns: int, quantization: Quantization, device: torch.device) -> None:
        super().__init__()
        self.n_rows, self.n_columns, self.group_size = n_rows, n_columns, quantization.group_size
        if self.group_size is None:
            codes = torch.zeros(n_rows, n_columns, dtype=torch.int8, device=device)
            scale = torch.zeros(n_rows, dtype=torch.float16, device=device)
        else:
            codes = torch.zeros(n_rows, -(-n_columns // 2), dtype=torch.uint8, device=device)
            scale = torch.zeros(n_rows, -(-n_columns // self.group_size), dtype=torch.float16, device=device)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Scales with which rows have norm 1, and factors of the columns (K,), with which those have it; float32."""
        scale = self.scale.float()
        if self.unit_axis is None:
            return scale, None
        norm = length(dequantize(self.weight, scale, self.n_columns, self.group_size), self.unit_axis)
        if self.unit_axis == 0:
            return scale, 1 / norm[0]
        return scale / (norm[:, 0] if self.group_size is None else norm), None

    def matrix(self) -> Tensor:
        """The weights, float32 (N, K)."""
        scale, factors = self.parts()
        weight = dequantize(self.weight, scale, self.n_columns, self.group_size)
        return weight if factors is None else weight.mul_(factors)

    def unpacked(self) -> nn.Module:
        """The floating-point layer that this one stands for, without its matrix."""
        raise NotImplementedError


class QuantizedEmbedding(QuantizedMatrix):
    """Looks rows up and dequantizes those alone."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Float32 rows (..., K) of token ids."""
        rows = dequantize(self.weight[input_ids], self.scale[input_ids], self.n_columns, self.group_size)
        return rows if self.unit_axis is None else unit(rows)

    def unpacked(self) -> nn.Module:
        """As in the base."""
        return nn.Embedding(self.n_rows, self.n_columns)


class QuantizedLinear(QuantizedMatrix):
    """`x @ W.T` by the matmul that suits device and size, made from what is stored at the first call.

    4-bit matrices use the 8-bit matmuls too: their weights are rounded once more, to 127 steps of their row's peak,
    a tenth of the error that they have already.
    """

    direct_method = "forward"
    columns: Tensor | None = None  # which Linear has
    made_for: tuple[Tensor, torch.dtype] | None = None  # codes and type of x that `matmul` belongs to
    matmul: Matmul
    row_scale: Tensor | None = None  # float32 (N,), where codes (N, K) times these are all of the matrix to a GPU

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N), in its dtype."""
        self._prepare(x.dtype)
        return self.matmul(x)

    def scale_of_rows(self, dtype: torch.dtype) -> Tensor | None:
        """Scales (N,), float32, where inputs of `dtype` are multiplied with the codes as they are and rows by these."""
        self._prepare(dtype)
        return self.row_scale

    def _prepare(self, dtype: torch.dtype) -> None:
        """Have `matmul` belong to the present codes and inputs of `dtype`."""
        if self.made_for is None or self.made_for[0] is not self.weight or self.made_for[1] != dtype:
            self._make_matmul(dtype)

    def kernel(self, dtype: torch.dtype) -> int:
        """What multiplies with this matrix for inputs of `dtype`, a key of KERNELS; 0: nothing is faster than float."""
        if self.n_rows * self.n_columns <= SMALL_MATRIX:
            return 0
        return kernels.kernel(self.weight, self.n_rows, self.n_columns, self.group_size, dtype)

    def direct_attributes(self) -> dict[str, Matmul]:
        """As in layers.linear.Linear."""
        self._prepare(torch.float32)
        return {self.direct_method: self.matmul}

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make_matmul(self, dtype: torch.dtype) -> None:
        """Choose and prepare `matmul` for the present codes and inputs of `dtype`."""
        kernel = self.kernel(dtype)
        self.made_for, self.row_scale = (self.weight, dtype), None
        if not kernel:
            self.matmul = partial(F.linear, weight=self.matrix().to(dtype))
            return
        scale, factors = self.parts()
        if kernel == 32:
            matmul = kernels.gpu_int8_matmul(self.weight, scale)
            self.row_scale = scale if factors is None else None
        else:
            make = {16: self._c_matmul, 4: self._int4_matmul}.get(kernel, self._int8_matmul)
            matmul = make(scale)
        self.matmul = matmul if factors is None else lambda x: matmul(x * factors.to(x.dtype))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _int8_matmul(self, scale: Tensor) -> Matmul:
        codes, scale = self._int8_codes(scale)
        return kernels.int8_matmul(dequantize(codes, scale, self.n_columns, None), scale, kernels.activation_bits())

    def _int8_codes(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (N, K) int8 and scales (N,) float32, of 4-bit weights too."""
        if self.group_size is None:
            return self.weight, scale
        codes, scale = quantize_rows(dequantize(self.weight, scale, self.n_columns, self.group_size))
        return codes, scale.float()

    def _c_matmul(self, scale: Tensor) -> Matmul:
        few = kernels.c_matmul(*self._int8_codes(scale))
        return kernels.few_or_many(few, kernels.C_ROWS, partial(self._int8_matmul, scale))

    def _int4_matmul(self, scale: Tensor) -> Matmul:
        codes = torch.stack((self.weight & 15, self.weight >> 4), -1).flatten(-2).int()
        few = kernels.int4_matmul(codes, scale)
        return kernels.few_or_many(few, kernels.INT4_ROWS, partial(self._int8_matmul, scale))

    def unpacked(self) -> nn.Module:
        """As in the base."""
        return Linear(self.n_columns, self.n_rows)


class QuantizedPackedLinear(QuantizedLinear):
    """Several projections of one input; returns one tensor for each of `splits`, as PackedLinear does."""

    direct_method = "packed"
    splits: Sequence[int]

    def packed(self, x: Tensor) -> Tensor:
        """All projections in one tensor, (..., sum of splits)."""
        return super().forward(x)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # more results than its base
        """x (..., K) to one tensor for each of `splits`, (..., width)."""
        return super().forward(x).split(self.splits, dim=-1)

    def unpacked(self) -> nn.Module:
        """As in the base."""
        return PackedLinear(self.n_columns, self.splits)


REPLACEMENTS: dict[type[nn.Module], type[QuantizedMatrix]] = {
    Linear: QuantizedLinear,
    PackedLinear: QuantizedPackedLinear,
    nn.Embedding: QuantizedEmbedding,
}


def quantizable(model: nn.Module, kept: Iterable[str] = ()) -> dict[str, Linear | nn.Embedding]:
    """The modules that quantization replaces, by name.

    Left out are those in `kept` or inside a module in `kept`, functions of the user's, and all that share their matrix
    with one that stays.
    """
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (Linear, nn.Embedding)) and type(module) in REPLACEMENTS
    }
    outside = (name for name, module in model.named_modules() if isinstance(module, OutsideFunction))
    inside = tuple(f"{name}." for name in (*kept, *outside))
    staying: list[nn.Module] = [module for name, module in found.items() if f"{name}.".startswith(inside)]
    staying += [module for module in model.modules() if type(module) not in REPLACEMENTS]
    floats = {id(tensor) for module in staying for tensor in module.parameters(recurse=False)}
    return {name: module for name, module in found.items() if id(module.weight) not in floats}


def quantize_layers(model: nn.Module, quantization: Quantization) -> None:
    """Replace the layers of a float model by quantized ones that wait for their tensors; tied matrices stay tied."""
    first: dict[int, QuantizedMatrix] = {}
    axes = {id(model.get_parameter(name)): axis for name, axis in getattr(model, "unit_axes", tuple)()}
    for name, old in quantizable(model, quantization.kept).items():
        n_rows, n_columns = old.weight.shape
        new = REPLACEMENTS[type(old)](n_rows, n_columns, quantization, old.weight.device)
        if isinstance(old, PackedLinear) and isinstance(new, QuantizedPackedLinear):
            new.splits = old.splits
        tied = first.setdefault(id(old.weight), new)
        new.weight, new.scale, new.unit_axis = tied.weight, tied.scale, axes.get(id(old.weight))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    model.requires_grad_(False)


def stored_in_int8(model: nn.Module, quantization: Quantization) -> list[str]:
    """Modules whose matrix an 8-bit file has in codes, though they compute with a float one."""
    kept = tuple(f"{name}." for name in quantization.kept)
    marked = [name for name, module in model.named_modules() if getattr(module, "stores_int8", False)]
    return [name for name in marked if quantization.bits == 8 and not f"{name}.".startswith(kept)]


def restore_stored(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file with the matrices of `stored_in_int8` in float32; what cannot be one stays as it is."""
    restored = dict(state)
    for name, module in model.named_modules():
        codes, scale = state.get(f"{name}.weight"), state.get(f"{name}.scale")
        if codes is None or scale is None or not getattr(module, "stores_int8", False):
            continue
        if codes.dtype == torch.int8 and scale.is_floating_point() and scale.shape == codes.shape[:1]:
            restored[f"{name}.weight"] = dequantize(codes, scale, codes.shape[-1], None)
            del restored[f"{name}.scale"]
    return restored


@torch.no_grad()
def unpack_slow_layers(model: nn.Module, dtype: torch.dtype, n_sequences: int = 1) -> None:
    """Put floating-point layers in place of the quantized ones that this device computes no faster for inputs of
    `dtype`; a matrix that is only looked up in stays as it is unless it is small. On a GPU these are all layers unless
    the model is large and decodes one sequence: tests/bench/decode.md."""
    found = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantizedMatrix)]
    on_gpu, n_weights = any(m.weight.is_cuda for _, m in found), sum(m.n_rows * m.n_columns for _, m in found)
    gains = not on_gpu or (n_sequences == 1 and n_weights >= LARGE_MODEL)
    multiplied = {id(m.weight): gains and m.kernel(dtype) for _, m in found if isinstance(m, QuantizedLinear)}
    fast = {id(m.weight) for _, m in found if multiplied.get(id(m.weight), m.n_rows * m.n_columns > SMALL_MATRIX)}
    _unpack(model, [(name, m) for name, m in found if id(m.weight) not in fast], dtype)


@torch.no_grad()
def dequantize_layers(model: nn.Module) -> None:
    """Put floating-point layers in place of all quantized ones, in float32."""
    found = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantizedMatrix)]
    _unpack(model, found, torch.float32)


def _unpack(model: nn.Module, layers: Iterable[tuple[str, QuantizedMatrix]], dtype: torch.dtype) -> None:
    """Put floating-point layers in place of quantized ones, given with their names; tied matrices stay tied."""
    floats: dict[int, nn.Parameter] = {}
    for name, old in layers:
        key = id(old.weight)
        if key not in floats:
            floats[key] = nn.Parameter(old.matrix().to(dtype), requires_grad=False)
        with torch.device("meta"):
            new = old.unpacked()
        new.weight = floats[key]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def kernels_in_words(model: nn.Module, n_layers: int, dtype: torch.dtype) -> str:
    """What multiplies with the matrices of `n_layers` quantized layers of a model, whose slow ones are unpacked."""
    used = Counter(layer.kernel(dtype) for layer in model.modules() if isinstance(layer, QuantizedLinear))
    used[0] += n_layers - used.total()
    if not used.total():
        return "none is quantized"
    if not used[0] or used.total() == used[0]:
        return "; ".join(KERNELS[kernel] for kernel in used if used[kernel])
    return "; ".join(f"{KERNELS[kernel]} ({n} of {used.total()} layers)" for kernel, n in used.items() if n)


def widen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with everything in fp16 or bf16 turned to float32, the type that models compute in."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
