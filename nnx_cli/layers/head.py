"""What a head computes, in terms of one matrix product, so that a loss can take its gradient by formula."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class HeadFormula:
    """Logits of x (N, D) are scale · (x @ weight.T) + bias, in the type of x.

    With `df`, the ν of a Student-t kernel, they are −(ν + D)/2 · ln(1 + d²/ν) instead, up to a constant for each row,
    with d the distance of x to a row of the weight; at least float32.

    Tensors are parameters or made from parameters, so that gradients flow back from them.
    """

    weight: Tensor  # (V, D)
    scale: Tensor | None = None  # (V,)
    bias: Tensor | None = None  # (V,)
    df: float | None = None


def formula_of(head: nn.Module) -> HeadFormula | None:
    """What the head's method `formula` says that it computes; None if it has no such method, or no formula now."""
    formula = getattr(head, "formula", None)
    return None if formula is None else formula()
