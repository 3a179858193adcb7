"""What a model costs: parameters, floating-point operations, memory and files, counted on the meta device (no memory,
no GPU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnx_cli import models
from nnx_cli.engine.device import DTYPES
from nnx_cli.engine.loss import chunk_rows
from nnx_cli.layers.linear import Linear
from nnx_cli.models._base import LanguageModel, ModelConfig

STATE_BYTES = {"adamw": 8, "lion": 4}  # optimizer state per trained parameter
ALLOCATOR_MARGIN = 1.06  # blocks are rounded up and leave gaps
FIXED_GPU_BYTES = 64 * 2**20  # workspaces of the matrix library


def meta_model(name: str, config: ModelConfig) -> LanguageModel:
    """A model without memory behind its tensors."""
    with torch.device("meta"):
        return models.from_config(name, config)


class MatrixProducts(TorchDispatchMode):
    """Counts the multiplications and additions of matrix products: with weights, and of attention (batched)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "mm":
            self.weights += 2 * out.numel() * args[0].shape[1]
        elif name == "bmm":
            self.attention += 2 * out.numel() * args[0].shape[2]
        return out


def flops_per_token(model: LanguageModel, seq_len: int | None = None) -> dict[str, int]:
    """Floating-point operations of matrix products per token: forward, and in training (three times that).

    Attention is counted as causal: a position attends to half of the context on average.
    """
    T = seq_len or model.config.seq_len
    with MatrixProducts() as count, torch.no_grad():
        model(torch.zeros(1, T, dtype=torch.int64, device="meta"))
    forward = (count.weights + count.attention // 2) // T
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


def activation_bytes(model: LanguageModel, seq_len: int) -> int:
    """Bytes that autograd keeps for one sequence, an estimate: every distinct tensor saved by the trunk, parameters
    left out.

    On the meta device attention is written out; its T x T tensors are replaced by the row statistics that the fused
    kernels keep.
    """
    kept: dict[int, tuple[Tensor, int]] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        n_bytes = storage.nbytes()
        if tensor.shape[-2:] == (seq_len, seq_len):
            n_bytes = 4 * tensor.numel() // seq_len
        if storage._cdata not in weights:
            kept[storage._cdata] = (tensor, n_bytes)  # the tensor keeps its storage's address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.trunk(torch.zeros(1, seq_len, dtype=torch.int64, device="meta"))
    return sum(n_bytes for _, n_bytes in kept.values())


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
    activations = batch_size * activation_bytes(model, seq_len)
    config, width = model.config, DTYPES[precision].itemsize
    head_weights = sum(p.numel() for p in model.head.parameters())
    head = chunk_rows(batch_size * seq_len, config.vocab_size) * config.vocab_size * (width + 8) + 4 * head_weights
    head += 2 * batch_size * seq_len * config.dim * width
    gradients, states = 4 * trainable, STATE_BYTES[optimizer] * trainable
    moment = max(activations + head, 4 * head_weights)
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
    matrices = {id(m.weight): m.weight.shape for m in model.modules() if isinstance(m, (Linear, nn.Embedding))}.values()
    quantized = sum(rows * columns for rows, columns in matrices)
    rest = 2 * (total - quantized)
    return {
        "fp32": 4 * total,
        "bf16": 2 * total,
        "int8": rest + sum(rows * columns + 2 * rows for rows, columns in matrices),
        "int4": rest + sum(rows * (-(-columns // 2) + 2 * -(-columns // 32)) for rows, columns in matrices),
    }
