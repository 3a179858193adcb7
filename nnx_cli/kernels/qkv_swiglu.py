"""What follows a packed projection: heads turned by rotary tables, SwiGLU; one kernel on CUDA, and in training on a
CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels import qkv_swiglu_c
from nnx_cli.kernels.custom_op import keep_inputs, operator
from nnx_cli.kernels.precision import in_type
from nnx_cli.system.hardware import of, takes_triton


def takes(x: Tensor) -> bool:
    """Whether there is a kernel for a projection of x: Triton's, or that in C where a CPU trains."""
    return takes_triton(x) or (torch.is_grad_enabled() and x.requires_grad and qkv_swiglu_c.takes(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of `x` (B, H, T, K) by its angle, in float32; the result has the dtype of `x`."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` by tables of full width: three operations for all heads of x (..., K), and the same numbers."""
    if x.dtype == torch.float32:
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
    wide = in_type(x, torch.float32)
    return in_type(torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin), x.dtype)


def full_width(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables (..., K/2) as (..., K): what a feature and its partner are multiplied by."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def plain_qkv_rope_swiglu(
    packed: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`qkv_rope_swiglu` by operations of torch."""
    q, k, v, value, gate = _split(packed, n_heads, n_kv_heads, 2 * q_cos.shape[-1])
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return rotate(q, q_cos, q_sin), rotate(k, k_cos, k_sin), v, F.silu(gate) * value


def plain_swiglu(packed: Tensor) -> Tensor:
    """`swiglu` by operations of torch."""
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


def qkv_rope_swiglu(
    packed: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (B, H, T, K) and keys (B, G, T, K), both turned by their tables (T, K/2), values (B, G, T, K), and the
    hidden features silu(gate) · value (B, T, F).

    `packed` (B, T, (H + 2G)·K + 2F) holds queries, keys, values, feed-forward values and gates in this order; F may be
    0. Its gradient is written once, in one piece, where autograd would fill it from five.
    """
    q, k, v, hidden = qkv_rope_swiglu_op(packed, q_cos, q_sin, k_cos, k_sin, n_heads, n_kv_heads)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), hidden


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) · up, (..., F), of `packed` (..., 2F), which holds gates and ups in this order."""
    return swiglu_op(packed)


def _split(packed: Tensor, n_heads: int, n_kv_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Queries (B, T, H, K), keys and values (B, T, G, K), feed-forward values and gates (B, T, F): views."""
    widths = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim]
    hidden = (packed.shape[-1] - sum(widths)) // 2
    q, k, v, value, gate = packed.split([*widths, hidden, hidden], dim=-1)
    return *(y.unflatten(-1, (-1, head_dim)) for y in (q, k, v)), value, gate


def _gate_backward(grad: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of value and gate."""
    return grad * F.silu(gate), torch.ops.aten.silu_backward(grad * value, gate)


def _forward(
    packed: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads are (B, T, H, K), contiguous."""
    if of(packed).triton:
        from nnx_cli.kernels import qkv_swiglu_triton

        return qkv_swiglu_triton.forward(packed, q_cos, q_sin, k_cos, k_sin, n_heads, n_kv_heads)
    if qkv_swiglu_c.takes(packed):
        return qkv_swiglu_c.forward(packed, (q_cos, q_sin, k_cos, k_sin), n_heads, n_kv_heads)
    *heads, hidden = plain_qkv_rope_swiglu(packed, q_cos, q_sin, k_cos, k_sin, n_heads, n_kv_heads)
    q, k, v = (y.transpose(1, 2).clone(memory_format=torch.contiguous_format) for y in heads)
    return q, k, v, hidden


def _backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_hidden: Tensor,
    packed: Tensor | None,
    q_cos: Tensor,
    q_sin: Tensor,
    k_cos: Tensor,
    k_sin: Tensor,
) -> Tensor:
    """The gradient of `packed`, which is needed itself where there are gates."""
    if of(grad_q).triton:
        from nnx_cli.kernels import qkv_swiglu_triton

        return qkv_swiglu_triton.backward(grad_q, grad_k, grad_v, grad_hidden, packed, q_cos, q_sin, k_cos, k_sin)
    if qkv_swiglu_c.takes(grad_q):
        return qkv_swiglu_c.backward((grad_q, grad_k, grad_v, grad_hidden), packed, (q_cos, q_sin, k_cos, k_sin))
    q, k = (
        rotate(grad.transpose(1, 2), cos, -sin).transpose(1, 2)
        for grad, cos, sin in ((grad_q, q_cos, q_sin), (grad_k, k_cos, k_sin))
    )
    pieces = [q.flatten(2), k.flatten(2), grad_v.flatten(2)]
    if packed is not None:
        *_, value, gate = _split(packed, q.shape[2], k.shape[2], q.shape[3])
        pieces += _gate_backward(grad_hidden, value, gate)
    return torch.cat(pieces, dim=-1)


def _swiglu_forward(packed: Tensor) -> Tensor:
    if of(packed).triton:
        from nnx_cli.kernels import qkv_swiglu_triton

        return qkv_swiglu_triton.swiglu(packed)
    return qkv_swiglu_c.swiglu(packed) if qkv_swiglu_c.takes(packed) else plain_swiglu(packed)


def _swiglu_backward(grad: Tensor, packed: Tensor) -> Tensor:
    if of(packed).triton:
        from nnx_cli.kernels import qkv_swiglu_triton

        return qkv_swiglu_triton.swiglu_backward(grad, packed)
    if qkv_swiglu_c.takes(packed):
        return qkv_swiglu_c.swiglu_backward(grad, packed)
    gate, up = packed.chunk(2, dim=-1)
    return torch.cat(_gate_backward(grad, up, gate)[::-1], dim=-1)


def _forward_shapes(
    packed: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, W = packed.shape
    K = 2 * q_cos.shape[-1]
    hidden = (W - (n_heads + 2 * n_kv_heads) * K) // 2
    kv = packed.new_empty(B, T, n_kv_heads, K)
    return packed.new_empty(B, T, n_heads, K), kv, torch.empty_like(kv), packed.new_empty(B, T, hidden)


def _backward_shapes(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, grad_hidden: Tensor, *_: Tensor | None) -> Tensor:
    B, T, H, K = grad_q.shape
    return grad_q.new_empty(B, T, (H + 2 * grad_k.shape[2]) * K + 2 * grad_hidden.shape[-1])


def _swiglu_shapes(packed: Tensor) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


def _swiglu_backward_shapes(grad: Tensor, packed: Tensor) -> Tensor:
    return torch.empty_like(packed)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    packed, *tables, _, _ = inputs
    ctx.save_for_backward(packed if output[-1].shape[-1] else None, *tables)


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return qkv_rope_swiglu_backward(*grads, *ctx.saved_tensors), None, None, None, None, None, None


def _swiglu_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return swiglu_backward(grad, *ctx.saved_tensors)


qkv_rope_swiglu_backward = operator("qkv_rope_swiglu_backward", _backward, _backward_shapes)
qkv_rope_swiglu_op = operator("qkv_rope_swiglu", _forward, _forward_shapes, keep=_keep, gradients=_gradients)
swiglu_backward = operator("swiglu_backward", _swiglu_backward, _swiglu_backward_shapes)
swiglu_op = operator("swiglu", _swiglu_forward, _swiglu_shapes, keep=keep_inputs, gradients=_swiglu_gradient)
