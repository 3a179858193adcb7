"""Moments of an optimizer in 8 bits: a logarithmic code with one float32 scale for every 256 elements.

A block's scale is its largest magnitude. Code c > 0 means scale · 2^((c - top) / 8), 0 means zero: eight levels an
octave, 127 of them beside a sign bit (16 octaves), or 255 for second moments, never negative (32 octaves: squares span
twice as many). Between two levels it is rounded at random with an exact mean, so that a moment that changes by less
than a level a step still follows (https://arxiv.org/abs/2505.00347). The error is less than 2^(1/8) - 1 = 9.05 % of the
element, 3.7 % at a level's middle in the root mean square, and below the lowest level less than that level: 2^-15.75 of
the scale, and 2^-31.75 without a sign, where no positive element becomes zero (it is what Adam divides by).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # elements that share a scale
PER_OCTAVE = 8
TOP = {True: 127, False: 255}  # highest code, with a sign bit and without


def n_blocks(n: int) -> int:
    """Number of scales of `n` elements."""
    return -(-n // BLOCK)


def encode(x: Tensor, bits: Tensor, sign: bool) -> tuple[Tensor, Tensor]:
    """Quantize float32 (N,) to codes uint8 (N,) and scales float32 (blocks,). `bits` int32 (N,): random in
    their lowest 16."""
    n, top = len(x), TOP[sign]
    rows = F.pad(x, (0, -n % BLOCK)).view(-1, BLOCK)
    magnitude = rows.abs()
    scale = magnitude.amax(1)
    magnitude /= torch.where(scale > 0, scale, 1.0)[:, None]
    code = (magnitude.log2() * PER_OCTAVE).floor_().add_(top).clamp_(0, top)
    low = level(code, top)
    share = (magnitude - low) / (level(code + 1, top) - low)
    code += F.pad(bits & 0xFFFF, (0, -n % BLOCK)).view(-1, BLOCK) < share * 65536
    code.clamp_(max=top)
    if sign:
        code += 128 * (rows < 0)
    else:
        code.clamp_(min=(magnitude > 0).float())
    return code.to(torch.uint8).view(-1)[:n], scale


def decode(codes: Tensor, scale: Tensor, sign: bool) -> Tensor:
    """Undo `encode`: float32 (N,)."""
    n, top = len(codes), TOP[sign]
    rows = F.pad(codes, (0, -n % BLOCK)).view(-1, BLOCK)
    x = level((rows & 127 if sign else rows).float(), top) * scale[:, None]
    if sign:
        x = torch.where(rows > 127, -x, x)
    return x.view(-1)[:n]


def level(code: Tensor, top: int) -> Tensor:
    """What a code means in units of the scale."""
    return torch.where(code > 0, torch.exp2((code - top) / PER_OCTAVE), 0.0)
