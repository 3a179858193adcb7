"""What a model costs: parameters, floating-point operations, memory and files, counted on the meta device (no memory,
no GPU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnx_cli import models
from nnx_cli.engine.device import DTYPES
from nnx_cli.engine.loss import chunk_rows
from nnx_cli.layers.adapter import add_adapters
from nnx_cli.layers.quantized import quantizable
from nnx_cli.models._base import LanguageModel, ModelConfig

STATE_BYTES = {"adamw": 8, "adamw8bit": 3, "lion": 4, "muon": 5, "wolf": 4}  # optimizer state per trained parameter
# what the optimizer holds for the moment of its step
STEP_BYTES = {"adamw": 0, "adamw8bit": 0, "lion": 0, "muon": 1, "wolf": 0}
ALLOCATOR_MARGIN = 1.06  # blocks are rounded up and leave gaps
FIXED_GPU_BYTES = 64 * 2**20  # workspaces of the matrix library


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


def activation_bytes(model: LanguageModel, batch_size: int, seq_len: int) -> int:
    """Bytes that autograd keeps of the trunk's forward pass: every distinct tensor it saves, parameters left out."""
    kept: dict[int, Tensor] = {}  # a tensor that is held keeps its storage's address from being used again
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage()._cdata) not in weights:
            kept[address] = tensor
        return tensor

    with WithFusedAttention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.trunk(torch.zeros(batch_size, seq_len, dtype=torch.int64, device="meta"))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs, by part. The peak adds what head and optimizer hold for a moment, and a margin."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    peak_bytes: int


def training_memory(model: LanguageModel, *, batch_size: int, seq_len: int, optimizer: str, precision: str) -> Memory:
    """Predicted memory of training with micro-batches of `batch_size` sequences. An estimate: see
    `activation_bytes`."""
    trainable = count_parameters(model)["trainable"]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.unique_state().values())
    model.compute_dtype = DTYPES[precision]
    activations = activation_bytes(model, batch_size, seq_len)
    config, width = model.config, DTYPES[precision].itemsize
    head_weights = sum(p.numel() for p in model.head.parameters())
    head = chunk_rows(batch_size * seq_len, config.vocab_size) * config.vocab_size * (width + 8) + 4 * head_weights
    head += 2 * batch_size * seq_len * config.dim * width
    gradients, states = 4 * trainable, STATE_BYTES[optimizer] * trainable
    moment = max(activations + head, STEP_BYTES[optimizer] * trainable)
    peak = int((weights + gradients + states + moment) * ALLOCATOR_MARGIN) + FIXED_GPU_BYTES
    return Memory(weights, gradients, states, activations, peak)


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
