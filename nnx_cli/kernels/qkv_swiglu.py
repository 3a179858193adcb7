"""What comes right after a packed product, in one kernel: heads are taken out and turned, gates are closed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels.custom_op import operator
from nnx_cli.layers.linear import PackedLinear
from nnx_cli.layers.rope import rotate
from nnx_cli.system.hardware import of


def is_one_kernel(x: Tensor) -> bool:
    return of(x).triton and x.dtype != torch.float64


def product_to_unpack(projections: PackedLinear, x: Tensor) -> Tensor | None:
    """The packed product of x, where kernels can take it from there: not where a layer was put in the place of the
    projections, as by quantizing."""
    return projections.side_by_side(x) if is_one_kernel(x) and isinstance(projections, PackedLinear) else None


def unpack(
    packed: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (B, H, T, K) and keys (B, G, T, K), both turned by their tables (T, K/2), values (B, G, T, K), and the
    hidden layer silu(gate) · value (B, T, F), of a product (B, T, (H + 2G)·K + 2F) that holds queries, keys, values,
    feed-forward values and gates in this order. F may be 0.

    The gradient of the product is written once, in one piece, where autograd would fill it from five.
    """
    q, k, v, hidden = unpack_op(packed, q_cos, q_sin, k_cos, k_sin, n_heads, n_kv_heads)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), hidden


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) · up, (..., F), of a product (..., 2F) that holds gates and ups in this order."""
    return swiglu_op(packed)


def parts(packed: Tensor, n_heads: int, n_kv_heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Queries (B, T, H, K), keys and values (B, T, G, K), feed-forward values and gates (B, T, F): views."""
    widths = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim]
    hidden = (packed.shape[-1] - sum(widths)) // 2
    q, k, v, value, gate = packed.split([*widths, hidden, hidden], dim=-1)
    return *(y.unflatten(-1, (-1, head_dim)) for y in (q, k, v)), value, gate


def gate_backward(grad: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of value and gate."""
    return grad * F.silu(gate), torch.ops.aten.silu_backward(grad * value, gate)


def unpacked(
    packed: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads lie side by side: (B, T, H, K)."""
    if of(packed).triton:
        from nnx_cli.kernels import qkv_swiglu_triton as unpack_kernel

        return unpack_kernel.forward(packed, q_cos, q_sin, k_cos, k_sin, n_heads, n_kv_heads)
    q, k, v, value, gate = parts(packed, n_heads, n_kv_heads, 2 * q_cos.shape[-1])
    q, k = rotate(q.transpose(1, 2), q_cos, q_sin), rotate(k.transpose(1, 2), k_cos, k_sin)
    q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()
    return q, k, v.clone(memory_format=torch.contiguous_format), F.silu(gate) * value


def unpacked_backward(
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
    """The gradient of the product, which is needed itself where there are gates."""
    if of(grad_q).triton:
        from nnx_cli.kernels import qkv_swiglu_triton as unpack_kernel

        return unpack_kernel.backward(grad_q, grad_k, grad_v, grad_hidden, packed, q_cos, q_sin, k_cos, k_sin)
    q, k = (
        rotate(grad.transpose(1, 2), cos, -sin).transpose(1, 2)
        for grad, cos, sin in ((grad_q, q_cos, q_sin), (grad_k, k_cos, k_sin))
    )
    pieces = [q.flatten(2), k.flatten(2), grad_v.flatten(2)]
    if packed is not None:
        *_, value, gate = parts(packed, q.shape[2], k.shape[2], q.shape[3])
        pieces += gate_backward(grad_hidden, value, gate)
    return torch.cat(pieces, dim=-1)


def gated(packed: Tensor) -> Tensor:
    if of(packed).triton:
        from nnx_cli.kernels import qkv_swiglu_triton as unpack_kernel

        return unpack_kernel.swiglu(packed)
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_backward(grad: Tensor, packed: Tensor) -> Tensor:
    if of(packed).triton:
        from nnx_cli.kernels import qkv_swiglu_triton as unpack_kernel

        return unpack_kernel.swiglu_backward(grad, packed)
    gate, up = packed.chunk(2, dim=-1)
    return torch.cat(gate_backward(grad, up, gate)[::-1], dim=-1)


def unpacked_shapes(
    packed: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, W = packed.shape
    K = 2 * q_cos.shape[-1]
    hidden = (W - (n_heads + 2 * n_kv_heads) * K) // 2
    kv = packed.new_empty(B, T, n_kv_heads, K)
    return packed.new_empty(B, T, n_heads, K), kv, torch.empty_like(kv), packed.new_empty(B, T, hidden)


def unpacked_gradient(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, grad_hidden: Tensor, *_: Tensor | None) -> Tensor:
    B, T, H, K = grad_q.shape
    return grad_q.new_empty(B, T, (H + 2 * grad_k.shape[2]) * K + 2 * grad_hidden.shape[-1])


def gated_shape(packed: Tensor) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


def gated_gradient(grad: Tensor, packed: Tensor) -> Tensor:
    return torch.empty_like(packed)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    packed, *tables, _, _ = inputs
    ctx.save_for_backward(packed if output[-1].shape[-1] else None, *tables)


def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return unpack_backward(*grads, *ctx.saved_tensors), None, None, None, None, None, None


def keep_product(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def product_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return swiglu_backward(grad, *ctx.saved_tensors)


unpack_backward = operator("unpack_backward", unpacked_backward, unpacked_gradient)
unpack_op = operator("unpack", unpacked, unpacked_shapes, keep=keep, gradients=backward)
swiglu_backward = operator("swiglu_backward", gated_backward, gated_gradient)
swiglu_op = operator("swiglu", gated, gated_shape, keep=keep_product, gradients=product_gradient)
