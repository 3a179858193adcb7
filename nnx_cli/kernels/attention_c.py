"""Causal attention in training on a CPU, with dropout, written in C; attention.c says how it computes.

torch's fused kernel on a CPU knows no dropout: without this, scores of all pairs of positions are written out.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnx_cli.kernels.custom_op import operator
from nnx_cli.system.c_library import load_threaded
from nnx_cli.system.hardware import of

SOURCES = Path(__file__).with_name("vectors.h"), Path(__file__).with_name("attention.c")
_answer: list[bool] = []  # of `is_available`; no cache decorator, which the compiler would look through


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` takes these: float32 in training on a CPU with AVX2, where there is a C compiler."""
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return trains and of(q).kind == "cpu" and q.dtype == k.dtype == v.dtype == torch.float32 and is_available()


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    """Causal attention of q (B, H, T, K) over k (B, G, T, K) and v (B, G, T, V), all of `takes`; returns (B, T, H, V).

    `dropout` is the probability at which a probability becomes 0. Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.
    """
    return attention_op(q, k, v, scale, dropout)[0]


def is_available() -> bool:
    """Whether this machine has it; asked before anything is compiled that holds it."""
    if not _answer:
        _answer.append(load_threaded(*SOURCES) is not None)
    return _answer[0]


def _run(
    inputs: tuple[Tensor, Tensor, Tensor], given: tuple[Tensor | None, ...], seed: Tensor, scale: float, dropout: float
) -> None:
    """Call `attend`; `given` are its y, gradient, out, dk, dv and lse."""
    found = load_threaded(*SOURCES)
    assert found is not None
    attend, parallel = found[0].attend, found[1]
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    attend.argtypes = [*[pointer] * 11, ctypes.c_float, ctypes.c_double, number, ctypes.c_uint, pointer]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
    strides = [step for x in (q, k, v) for step in x.stride()[:3]]
    sizes = [*q.shape[:2], k.shape[1], *q.shape[2:], v.shape[-1]]
    pointers = [None if x is None else x.data_ptr() for x in given]
    enough = attend(
        *(x.data_ptr() for x in (q, k, v)),
        (number * len(strides))(*strides),
        *pointers,
        (number * len(sizes))(*sizes),
        scale,
        dropout,
        int(seed),
        torch.get_num_threads(),
        parallel,
    )
    if not enough:
        raise MemoryError("no memory for the scores of some positions")


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the logarithm of every row's sum, and the seed of what is dropped."""
    y, lse, seed = _shapes(q, k, v, scale, dropout)
    if dropout:
        seed.random_()
    else:
        seed.zero_()
    _run((q, k, v), (None, None, y, None, None, lse), seed, scale, dropout)
    return y, lse, seed


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, seed: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v where `grad` (B, T, H, V) is that of y; positions lie before heads in memory."""
    (B, H, T, K), G = q.shape, k.shape[1]
    dq, dk, dv = (q.new_empty(B, T, H, width) for width in (K, K, v.shape[-1]))
    _run((q, k, v), (y, grad.contiguous(), dq, dk, dv, lse), seed, scale, dropout)
    if G != H:
        dk, dv = (x.unflatten(2, (G, -1)).sum(3) for x in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _shapes(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T), q.new_empty((), dtype=torch.int64)


def _backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, seed: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, T, K), (_, G, _, V) = q.shape, v.shape
    shapes = (B, T, H, K), (B, T, G, K), (B, T, G, V)
    dq, dk, dv = (q.new_empty(shape).transpose(1, 2) for shape in shapes)
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.scale, ctx.dropout = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.dropout), None, None


attention_backward = operator("attention_backward", _backward, _backward_shapes)
attention_op = operator(
    "attention",
    _forward,
    _shapes,
    keep=_keep,
    gradients=_gradients,
    tags=(torch.Tag.nondeterministic_seeded,),
)
