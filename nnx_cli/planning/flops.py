"""What a model costs: parameters, floating-point operations, memory and files, counted on the meta device (no memory,
no GPU)."""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnx_cli import models
from nnx_cli.layers.lora import add_adapters
from nnx_cli.layers.quantized import quantizable
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.system.device import DTYPES


def is_known(x: Any) -> bool:
    """Whether this is a number or truth, or some of them in a row, and not a symbol for one."""
    return all(map(is_known, x)) if isinstance(x, tuple) else type(x) in (bool, int)


def decided(name: str, decide: Callable[..., Any]) -> Callable[..., Any]:
    """The function of that name in SYMBOLS where its arguments are known, and the real one for all others; so it does
    no harm to who keeps it."""

    def function(*args: Any, **kwargs: Any) -> Any:
        if not kwargs and is_known(args):
            return decide(*args)
        return getattr(real_module(SYMBOLS), name)(*args, **kwargs)

    return function


def disable(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Of the compiler: to keep it from looking at a function."""
    kept_from_compiler.append(function)
    return function


def real_module(name: str) -> ModuleType:
    """The module that has a stand-in."""
    if isinstance(found := sys.modules.get(name), StandIn):
        found.leave()
    return REAL[name]()


class StandIn(ModuleType):
    """Takes a module's place until it leaves, or somebody asks for more than it has. Who still holds it then gets
    everything from the real one."""

    def __init__(self, name: str, **attributes: Any) -> None:
        super().__init__(name)
        self.own = [*attributes]
        self.__dict__.update(attributes)

    def leave(self) -> None:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        for attribute in self.own:
            self.__dict__.pop(attribute, None)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # the import system asks for a path
            raise AttributeError(attribute)
        module, _, part = self.__name__.partition(":")
        found = real_module(module)
        return getattr(getattr(found, part) if part else found, attribute)


COMPILER, SYMBOLS = "torch._dynamo", "torch.fx.experimental.symbolic_shapes"
ALGEBRA, ALGEBRA_OF_TORCH = "sympy", "torch.utils._sympy.functions"
REAL: dict[str, Callable[[], ModuleType]] = {
    COMPILER: lambda: importlib.import_module("torch._dynamo"),
    SYMBOLS: lambda: importlib.import_module("torch.fx.experimental.symbolic_shapes"),
    ALGEBRA: lambda: importlib.import_module("sympy"),
    ALGEBRA_OF_TORCH: lambda: importlib.import_module("torch.utils._sympy.functions"),
}
KNOWN: dict[str, Callable[..., Any]] = {  # what functions of SYMBOLS return of numbers and truths
    "guard_or_false": bool,
    "guard_or_true": bool,
    "guard_size_oblivious": bool,
    "expect_true": bool,
    "statically_known_true": bool,
    "sym_and": lambda *parts: all(parts),
    "sym_or": lambda *parts: any(parts),
    "sym_eq": operator.eq,
    "is_nested_int": lambda size: False,
    "has_guarding_hint": lambda size: True,
    "guarding_hint_or_throw": lambda size: size,
    "has_hint": lambda size: True,
    "size_hint": lambda size: size,
}
kept_from_compiler: list[Any] = []


@contextmanager
def without_compiler() -> Iterator[None]:
    """Operations on the meta device import the compiler, a second and on some machines six, to keep it from looking at
    them, and a package for algebra, a third of a second, to compare sizes. Meanwhile they find a compiler that never
    looks, and sizes that are numbers."""
    settings = StandIn(f"{COMPILER}:config", error_on_nested_fx_trace=True)  # read by every checkpoint
    stand_ins = [
        StandIn(COMPILER, disable=disable, config=settings),
        StandIn(SYMBOLS, **{name: decided(name, decide) for name, decide in KNOWN.items()}),
        StandIn(ALGEBRA, Basic=type("Basic", (), {})),  # for isinstance
        StandIn(ALGEBRA_OF_TORCH, Max=None),  # imported, not used
    ]
    used = [module for module in stand_ins if module.__name__ not in sys.modules]
    sys.modules.update({module.__name__: module for module in used})
    try:
        yield
    finally:
        for module in (*used, settings):
            module.leave()
        for function in kept_from_compiler:
            vars(function).pop("__dynamo_disable", None)  # where torch notes what it got
        kept_from_compiler.clear()


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
    with without_compiler(), torch.device("meta"), WithoutNumbers():
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


@cache
def makes_new(func: Any) -> bool:
    """Whether what an operator returns are new tensors, each one by one, whatever it is given."""
    schema = func._schema
    if func.namespace not in ("aten", "nnx"):
        return False
    aliases = [x.alias_info for x in (*schema.arguments, *schema.returns)]
    return not schema.is_mutable and not any(aliases) and all(x.type.kind() != "ListType" for x in schema.returns)


def described(x: Any) -> Any:
    """An operator's argument, as far as shapes and types of what it returns depend on it."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.is_meta
    return tuple(map(described, x)) if isinstance(x, (list, tuple)) else (type(x), x)


KNOWN_OUTPUTS: dict[Any, list[Any]] = {}  # shape, stride and type of what an operator returned before, or value


def outputs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator returns on the meta device. Working out its shapes takes it many times as long as looking them
    up."""
    if not makes_new(func):
        return func(*args, **kwargs)
    key = (id(func), *map(described, args), *[(name, described(x)) for name, x in kwargs.items()])
    found = KNOWN_OUTPUTS.get(key)
    if found is None:
        out = func(*args, **kwargs)
        each = out if isinstance(out, tuple) else (out,)
        tensors = [x for x in each if isinstance(x, Tensor)]
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        is_view = any(x.untyped_storage()._cdata in given for x in tensors)  # whatever the schema says
        if tensors and not is_view and all(x.is_meta for x in tensors):
            KNOWN_OUTPUTS[key] = [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in each]
        return out
    new = [torch.empty_strided(x[0], x[1], dtype=x[2], device="meta") if isinstance(x, tuple) else x for x in found]
    return tuple(new) if len(new) > 1 else new[0]


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
        elif name == "attention_with_lse":  # of q (B, T, H, K), causal
            B, T, H, K = args[0].shape
            self.flops += 2 * B * H * T * T * K
            out = torch.empty_like(args[0]), args[0].new_empty(B, H, T)
        else:
            out = outputs(func, args, kwargs or {})
        results = out if isinstance(out, (tuple, list)) else (out,)
        self.n_bytes += sum(x.nbytes for x in results if isinstance(x, Tensor))
        return out


@without_compiler()
def dry_run(model: LanguageModel, seq_len: int | None = None) -> tuple[int, int]:
    """Floating-point operations of matrix products of one sequence forward, and the bytes of all that is computed, some
    of it counted several times, by a model of the meta device.

    Attention is counted as causal: a position attends to half of the context on average.
    """
    T = seq_len or model.config.seq_len
    with WithoutProducts() as products, WithFusedAttention() as attention, torch.no_grad():
        model(torch.zeros(1, T, dtype=torch.int64, device="meta"))
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
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_without_ties().values())
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
