"""Heads that are one GEMM and little else, so that the loss can be fused with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Logits of x (N, D) are scale · (x @ weight.T) + bias, in the type of x, `wide` at least in float32.

    With `df`, the ν of a Student-t kernel, they are −(ν + D)/2 · ln(1 + d²/ν) instead, up to a constant for each row,
    with d the distance of x to a row of the weight; at least float32.

    Tensors are parameters or made from parameters, so that gradients flow back from them.
    """

    weight: Tensor  # (V, D)
    scale: Tensor | None = None  # (V,)
    bias: Tensor | None = None  # (V,)
    df: float | None = None
    wide: bool = False


def as_linear_head(head: nn.Module) -> LinearHead | None:
    """What the head's method `linear_head` says that it computes; None without one, or where it is not linear now."""
    linear_head = getattr(head, "linear_head", None)
    return None if linear_head is None else linear_head()
