"""Conversions between floating-point types."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in a type, for the end of an autograd function's forward pass.

    Where nothing is to be converted, `x.to` returns x itself, of which torch 2.11 loses the gradient when the function
    is compiled.
    """
    return x if x.dtype == dtype else x.to(dtype)
