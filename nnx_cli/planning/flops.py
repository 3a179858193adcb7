"""What a model costs: parameters, floating-point operations and files, counted on the meta device (no memory, no
GPU)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from nnx_cli import models
from nnx_cli.kernels.attention_c import attention_op
from nnx_cli.kernels.gemm import onednn_linear
from nnx_cli.layers.lora import add_adapters
from nnx_cli.layers.quantized import Quantization, quantizable, stored_in_int8
from nnx_cli.layers.segment_attention import attention_with_lse
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.system.device import DTYPES


class _Undrawn(TorchFunctionMode):
    """Leaves out the first values of weights on the meta device: torch works out the shape of each draw in Python, and
    that would take most of the time. Functions of a user's bank are made elsewhere meanwhile, and have theirs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = func in (torch.Tensor.normal_, torch.Tensor.uniform_)
        if draws or getattr(func, "__module__", None) == "torch.nn.init":
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def meta_model(name: str, config: ModelConfig, lora_rank: int | None = None) -> LanguageModel:
    """A model without memory behind its tensors, with adapters where a rank is given."""
    with torch.device("meta"), _Undrawn():
        model = models.from_config(name, config)
        if lora_rank is not None:
            add_adapters(model, lora_rank)
        return model


def _linear_flops(x: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of x (..., K) @ weight.T with weight (M, K)."""
    return 2 * x.numel() * weight[0]


def _attention_with_lse_flops(q: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of causal attention of q (B, T, H, K): half of all pairs of positions."""
    B, T, H, K = q
    return 2 * B * H * T * T * K


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Of causal attention of q (B, H, T, K) over values v (B, G, T, V)."""
    B, H, T, K = q
    return B * H * T * T * (K + v[-1])


FORMULAS = {  # FLOPs of the project's operators that hold matmuls; the others are elementwise or sums
    onednn_linear.overloadpacket: _linear_flops,
    attention_op.overloadpacket: _attention_flops,
    attention_with_lse.overloadpacket: _attention_with_lse_flops,
}


class FlopCounter(TorchFunctionMode):
    """Counts the FLOPs of matmuls with torch's FlopCounterMode, of attention the half that a causal mask leaves."""

    def __init__(self) -> None:
        super().__init__()
        self._counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self._masked = 0

    @property
    def flops(self) -> int:
        """FLOPs counted so far."""
        return self._counter.get_total_flops() - self._masked

    def __enter__(self) -> FlopCounter:
        self._counter.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._counter.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        self._masked += (self._counter.get_total_flops() - before) // 2
        return out


def over_blocks(model: LanguageModel, measure: Callable[[], int]) -> int:
    """What `measure` returns of a model, told from models of one and two blocks where all blocks are built in one loop:
    each adds the same."""
    blocks = model.blocks
    n = len(blocks)
    if n < 3 or n != model.config.n_layers:
        return measure()
    try:
        model.blocks = blocks[:1]
        one = measure()
        model.blocks = blocks[:2]
        return one + (n - 1) * (measure() - one)
    finally:
        model.blocks = blocks


@torch.no_grad()
def count_flops(model: LanguageModel, seq_len: int | None = None) -> int:
    """FLOPs of the matmuls of one sequence forward, in the mode the model is in; the model is on the meta device.

    Attention counts as causal: a position attends to half of the context on average.
    """
    ids = torch.zeros(1, seq_len or model.config.seq_len, dtype=torch.int64, device="meta")

    def measure() -> int:
        with FlopCounter() as counter:
            model(ids)
        return counter.flops

    return over_blocks(model, measure)


def flops_per_token(model: LanguageModel, seq_len: int | None = None) -> dict[str, int]:
    """FLOPs of matmuls per token: forward, and in training (three times that)."""
    forward = count_flops(model, seq_len) // (seq_len or model.config.seq_len)
    return {"forward": forward, "train": 3 * forward}


@cache
def training_flops(name: str, config: ModelConfig) -> int:
    """FLOPs of matmuls per token in training a model of that architecture and shape, counted once."""
    return flops_per_token(meta_model(name, config))["train"]


def count_parameters(model: LanguageModel) -> dict[str, int]:
    """Parameters, each tensor once: total, trainable, embedding (the tables of token ids), active (that one token may
    use in evaluation)."""
    unique = {id(p): p for p in model.parameters()}.values()
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        "total": sum(p.numel() for p in unique),
        "trainable": sum(p.numel() for p in unique if p.requires_grad),
        "embedding": sum(p.numel() for p in tables.values()),
        "active": model.active_parameters(),
    }


def sampling_bytes(model: LanguageModel, precision: str = "fp32") -> tuple[int, int]:
    """Bytes of weights, and of cache per token and row."""
    with torch.device("meta"):
        model.compute_dtype = DTYPES[precision]
        cache = model.make_cache(1, 16)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_without_ties().values())
    return weights, cache.n_bytes // 16


def file_bytes(model: LanguageModel) -> dict[str, int]:
    """Size of the weights in a file: fp32, bf16, and as `nnx quantize` writes them."""
    total = count_parameters(model)["total"]
    matrices = {id(module.weight): module.weight.shape for module in quantizable(model).values()}.values()
    quantized = sum(rows * columns for rows, columns in matrices)
    rest = 2 * (total - quantized)
    int8 = Quantization(bits=8, group_size=None, kept=[])
    stored = [model.get_parameter(f"{name}.weight").shape for name in stored_in_int8(model, int8)]
    return {
        "fp32": 4 * total,
        "bf16": 2 * total,
        "int8": rest
        + sum(rows * columns + 2 * rows for rows, columns in matrices)
        - sum(rows * columns - 2 * rows for rows, columns in stored),
        "int4": rest + sum(rows * (-(-columns // 2) + 2 * -(-columns // 32)) for rows, columns in matrices),
    }
