"""What a model costs: parameters, floating-point operations, memory and files, counted on the meta device (no memory,
no GPU)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnx_cli import models
from nnx_cli.engine.device import DTYPES
from nnx_cli.layers.adapter import add_adapters
from nnx_cli.layers.quantized import quantizable
from nnx_cli.models._base import LanguageModel, ModelConfig


def meta_model(name: str, config: ModelConfig, lora_rank: int | None = None) -> LanguageModel:
    """A model without memory behind its tensors, with adapters where a rank is given."""
    with torch.device("meta"):
        model = models.from_config(name, config)
        if lora_rank is not None:
            add_adapters(model, lora_rank)
        return model


class FusedAttention(torch.autograd.Function):
    """Stands for a fused attention kernel on the meta device: keeps queries, keys, values, output and row
    statistics."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class WithFusedAttention(TorchFunctionMode):
    """Replaces attention by `FusedAttention`, and counts its multiplications and additions, all pairs of positions."""

    flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        self.flops += 2 * q.shape[:-1].numel() * k.shape[2] * (q.shape[-1] + v.shape[-1])
        return FusedAttention.apply(q, k, v)


class MatrixProducts(TorchDispatchMode):
    """Counts the multiplications and additions of matrix products."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "bmm"):
            self.flops += 2 * out.numel() * args[0].shape[-1]
        return out


def flops_per_token(model: LanguageModel, seq_len: int | None = None) -> dict[str, int]:
    """Floating-point operations of matrix products per token: forward, and in training (three times that).

    Attention is counted as causal: a position attends to half of the context on average.
    """
    T = seq_len or model.config.seq_len
    with MatrixProducts() as products, WithFusedAttention() as attention, torch.no_grad():
        model(torch.zeros(1, T, dtype=torch.int64, device="meta"))
    forward = (products.flops + attention.flops // 2) // T
    return {"forward": forward, "train": 3 * forward}


def count_parameters(model: LanguageModel) -> dict[str, int]:
    """Parameters, each tensor once: total, trainable, embedding (the tables of token ids), active (used for a
    token)."""
    unique = {id(p): p for p in model.parameters()}.values()
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    total = sum(p.numel() for p in unique)
    return {
        "total": total,
        "trainable": sum(p.numel() for p in unique if p.requires_grad),
        "embedding": sum(p.numel() for p in tables.values()),
        "active": total,
    }


def sampling_bytes(model: LanguageModel, precision: str = "fp32") -> tuple[int, int]:
    """Bytes of weights, and of cache per token and row."""
    with torch.device("meta"):
        model.compute_dtype = DTYPES[precision]
        cache = model.make_cache(1, 16)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.unique_state().values())
    return weights, cache.n_bytes // 16


def file_bytes(model: LanguageModel) -> dict[str, int]:
    """Size of the weights in a file: fp32, bf16, and as `nnx quantize` writes them."""
    total = count_parameters(model)["total"]
    matrices = {id(module.weight): module.weight.shape for module in quantizable(model).values()}.values()
    quantized = sum(rows * columns for rows, columns in matrices)
    rest = 2 * (total - quantized)
    return {
        "fp32": 4 * total,
        "bf16": 2 * total,
        "int8": rest + sum(rows * columns + 2 * rows for rows, columns in matrices),
        "int4": rest + sum(rows * (-(-columns // 2) + 2 * -(-columns // 32)) for rows, columns in matrices),
    }
