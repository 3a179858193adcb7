"""`qkv_swiglu` on a CPU in float32, written in C: one pass over what a projection wrote, and one over its gradient."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from nnx_cli.system.c_library import load_threaded
from nnx_cli.system.hardware import of

SOURCES = Path(__file__).with_name("vectors.h"), Path(__file__).with_name("qkv_swiglu.c")
LEAST_SHARE = 2**14  # numbers that are worth another thread
_answer: list[bool] = []  # of `is_available`; no cache decorator, which the compiler would look through

Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # queries (B, T, H, K), keys and values (B, T, G, K), hidden (B, T, F)


def takes(x: Tensor) -> bool:
    """Whether x is float32 on a CPU with AVX2, where there is a C compiler."""
    return of(x).kind == "cpu" and x.dtype == torch.float32 and is_available()


def is_available() -> bool:
    """Whether this machine has it; asked before anything is compiled that holds it."""
    if not _answer:
        _answer.append(load_threaded(*SOURCES) is not None)
    return _answer[0]


def forward(packed: Tensor, tables: tuple[Tensor, ...], n_heads: int, n_kv_heads: int) -> Parts:
    """The parts of `packed` (B, T, W); queries and keys are turned by cosines and sines of `tables` (T, K/2)."""
    (B, T, W), K = packed.shape, 2 * tables[0].shape[-1]
    q, k, v = (packed.new_empty(B, T, n, K) for n in (n_heads, n_kv_heads, n_kv_heads))
    hidden = packed.new_empty(B, T, (W - (n_heads + 2 * n_kv_heads) * K) // 2)
    _run(packed, tables, None, (q, k, v, hidden), (B * T, T, n_heads, n_kv_heads, K, hidden.shape[-1]), False)
    return q, k, v, hidden


def backward(grads: Parts, packed: Tensor | None, tables: tuple[Tensor, ...]) -> Tensor:
    """The gradient of `packed`, which is needed itself where there are hidden features, from those of its parts."""
    q, k, _, hidden = grads
    (B, T, H, K), G, n_hidden = q.shape, k.shape[2], hidden.shape[-1]
    out = q.new_empty(B, T, (H + 2 * G) * K + 2 * n_hidden)
    _run(packed, tables, out, grads, (B * T, T, H, G, K, n_hidden), False)
    return out


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) · up of gates and ups, (..., 2F)."""
    n = packed.shape[-1] // 2
    hidden = packed.new_empty(*packed.shape[:-1], n)
    _run(packed, (None,) * 4, None, (None, None, None, hidden), (packed.numel() // (2 * n), 1, 0, 0, 0, n), True)
    return hidden


def swiglu_backward(grad: Tensor, packed: Tensor) -> Tensor:
    """The gradient of `packed` (..., 2F)."""
    out, n = torch.empty_like(packed, memory_format=torch.contiguous_format), grad.shape[-1]
    _run(packed, (None,) * 4, out, (None, None, None, grad), (grad.numel() // n, 1, 0, 0, 0, n), True)
    return out


def _run(
    packed: Tensor | None,
    tables: tuple[Tensor | None, ...],
    out: Tensor | None,
    parts: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    gate_first: bool,
) -> None:
    """Call `split`, which fills `out` where it is given, else `parts`; `sizes`: rows, T, H, G, K, F."""
    found = load_threaded(*SOURCES)
    assert found is not None
    split, parallel = found[0].split, found[1]
    pointer = ctypes.c_void_p
    split.argtypes, split.restype = [*[pointer] * 11, ctypes.c_int, ctypes.c_uint, pointer], None
    given = [None if x is None else x.contiguous() for x in (packed, *tables, out, *parts)]
    work = sum(0 if x is None else x.numel() for x in parts)
    threads = min(torch.get_num_threads(), 1 + work // LEAST_SHARE)
    pointers = [None if x is None else x.data_ptr() for x in given]
    split(*pointers, (ctypes.c_int64 * len(sizes))(*sizes), gate_first, threads, parallel)
