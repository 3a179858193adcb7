"""Stochastic rounding: from float32 to bfloat16 up or down at random, so that the mean is exact.

Rounded to the nearest, an update below 2^-9 of a weight is lost, and training stalls; rounded at random, it arrives on
average (https://arxiv.org/abs/2502.20566). The random bits are a function of (seed, parameter, step, element), the same
on every device, so that a resumed run draws the same ones and a CUDA graph draws new ones whenever it is replayed.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: neighbouring steps become distant integers


def scramble(x: Tensor) -> Tensor:
    """Mix the bits of int32 elements, in place: the hash `lowbias32` of Wellons' hash prospector (2018)."""
    x ^= (x >> 16) & 0xFFFF
    x *= signed(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def signed(x: int) -> int:
    """The int32 with the lowest 32 bits of `x`."""
    return (x + 2**31) % 2**32 - 2**31


def random_key(seed: int, index: int) -> int:
    """The int32 that tells the random bits of a run's parameter number `index` from those of others."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:4], "little", signed=True)


def random_stream(key: int, step: Tensor) -> Tensor:
    """What a step's random bits begin with, int32 (): `step` () counts the steps of the parameter."""
    return scramble(step.to(torch.int32) * signed(GOLDEN) + key)


def random_bits(stream: Tensor, first: int, n: int, word: int) -> Tensor:
    """Random int32 of the elements `first` to `first + n` of a parameter; `word` 0 or 1: each element has two."""
    index = torch.arange(2 * first + word, 2 * (first + n) + word, 2, dtype=torch.int32, device=stream.device)
    return scramble(scramble(index) ^ stream)


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 `x` to bfloat16: one of its two neighbours, the nearer with the greater chance. `bits` int32: their
    lowest 16 decide. Zero and what bfloat16 holds exactly stay; x must be finite."""
    return ((x.view(torch.int32) + (bits & 0xFFFF)) & ~0xFFFF).view(torch.float32).bfloat16()
