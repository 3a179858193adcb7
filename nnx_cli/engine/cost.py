"""What a model costs: parameters, floating-point operations, memory and files, counted on the meta device (no memory,
no GPU)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnx_cli import models
from nnx_cli.engine.device import DTYPES
from nnx_cli.layers import attention_in_rows, dropout, soft_xor
from nnx_cli.layers.adapter import add_adapters
from nnx_cli.layers.quantized import quantizable
from nnx_cli.models._base import LanguageModel, ModelConfig

LIGHT = 1.5e11  # parameters x positions up to which a sequence takes less than importing the compiler, 1 s


@contextmanager
def replaced(functions: Mapping[tuple[Any, str], Callable[..., Any]]) -> Iterator[None]:
    """Have functions take the place of those of modules and classes, given as (owner, name)."""
    before = {(owner, name): getattr(owner, name) for owner, name in functions}
    for (owner, name), function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Operations on the meta device import the compiler, a second and on some machines six, to keep it from looking at
    them. Meanwhile they find one in its place that never looks; who asks it for more gets the real one."""
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    kept: list[Any] = []

    def disable(function: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(function)
        return function

    def the_real_one(attribute: str) -> Any:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
        import torch._dynamo as compiler

        return getattr(compiler, attribute)

    stand_in, settings = ModuleType(name), ModuleType(f"{name}.config")
    settings.error_on_nested_fx_trace = True  # read by every checkpoint, and of no use outside of a trace
    settings.__getattr__ = lambda attribute: getattr(the_real_one("config"), attribute)
    stand_in.disable, stand_in.config, stand_in.__getattr__ = disable, settings, the_real_one
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
        for function in kept:
            vars(function).pop("__dynamo_disable", None)  # where torch notes what it got


class LightMode(TorchDispatchMode):
    """A mode that does not import the compiler, which takes longer than all the rest of a plan. None of ours is used
    while something compiles."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class WithoutNumbers(LightMode):
    """Leaves weights as they are where random numbers would fill them or norms divide them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("normal_", "uniform_", "div_"):
            return args[0]
        return func(*args, **(kwargs or {}))


def meta_model(name: str, config: ModelConfig, lora_rank: int | None = None) -> LanguageModel:
    """A model without memory behind its tensors, with adapters where a rank is given."""
    with torch.device("meta"), WithoutNumbers():
        model = models.from_config(name, config)
        if lora_rank is not None:
            add_adapters(model, lora_rank)
        return model


def light_model(name: str, config: ModelConfig) -> LanguageModel:
    """A model for `dry_run` where that is quickest: on the CPU with weights that nobody has written, which take no
    memory yet; or, if it is large, on the meta device, whose operations import the compiler."""
    model = meta_model(name, config)
    if count_parameters(model)["total"] * config.seq_len > LIGHT:
        return model
    with WithoutNumbers():
        return models.from_config(name, config)


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


class WithoutProducts(LightMode):
    """Counts the multiplications and additions of matrix products, which it does not take, and the bytes of all
    results."""

    NAMES = ("mm", "bmm", "addmm", "addmm_", "baddbmm")
    flops = n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
            out = args[0] if name.endswith("_") else a.new_empty(*a.shape[:-1], b.shape[-1])
        elif name == "product":
            x, weight = args
            self.flops += 2 * x.numel() * len(weight)
            out = x.new_empty(*x.shape[:-1], len(weight))
        elif name == "attention_and_sums":  # of q (B, T, H, K), causal
            B, T, H, K = args[0].shape
            self.flops += 2 * B * H * T * T * K
            out = torch.empty_like(args[0]), args[0].new_empty(B, H, T)
        elif name == "attention_in_rows":  # of q (B, H, T, K), causal
            self.flops += 2 * args[0].numel() * args[0].shape[2]
            out = attention_in_rows.shapes_only(*args)
        else:
            out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        self.n_bytes += sum(x.nbytes for x in results if isinstance(x, Tensor))
        return out


@without_compiler()
def dry_run(model: LanguageModel, seq_len: int | None = None) -> tuple[int, int]:
    """Floating-point operations of matrix products of one sequence forward, and the bytes of all that is computed, some
    of it counted several times. No product is taken: what the model returns means nothing.

    Attention is counted as causal: a position attends to half of the context on average.
    """
    T = seq_len or model.config.seq_len
    plain = {
        (soft_xor, "fastest_cell"): lambda x: lambda sums, state: None,  # a recurrence's products are enough
        (dropout, "is_own"): lambda x: False,
    }
    with WithoutProducts() as products, WithFusedAttention() as attention, torch.no_grad(), replaced(plain):
        model(torch.zeros(1, T, dtype=torch.int64, device=model.device))
    return products.flops + attention.flops // 2, products.n_bytes


def flops_per_token(model: LanguageModel, seq_len: int | None = None) -> dict[str, int]:
    """Floating-point operations of matrix products per token: forward, and in training (three times that)."""
    forward = dry_run(model, seq_len)[0] // (seq_len or model.config.seq_len)
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
