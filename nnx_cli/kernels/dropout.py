"""Dropout whose mask a CPU draws fast. Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html.

torch draws from its generator for every element, one after the other: a quarter of a training step of a small
model. Here 16 bits of it decide for an element, so that a draw of 64 is enough for four.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnx_cli.kernels.custom_op import operator
from nnx_cli.system.hardware import of

LEVELS = 2**16  # a probability is a multiple of one in so many


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`x`, in training with each element 0 with probability p, else divided by 1 - p."""
    if not training:
        return x
    return x * noise(x.detach(), p) if p and draws_own_mask(x) else F.dropout(x, p, training)


def draws_own_mask(x: Tensor) -> bool:
    """Whether the mask is `noise`, as on a CPU."""
    return of(x).kind == "cpu"


def _draw(x: Tensor, p: float) -> Tensor:
    """Factors of dropout in the shape and type of x."""
    dropped = round(p * LEVELS)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.ge(bits, dropped - LEVELS // 2, out=torch.empty(x.shape, dtype=x.dtype))
    return kept.mul_(LEVELS / max(1, LEVELS - dropped))


def _drawn_shape(x: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)


noise = operator("dropout_noise", _draw, _drawn_shape, tags=(torch.Tag.nondeterministic_seeded,))
