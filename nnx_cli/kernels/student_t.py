"""The head of a Student-t kernel: logits from squared distances in place of inner products."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MIN_DISTANCE = 1e-12  # squared: rounding would make some negative


@dataclass(frozen=True)
class StudentT:
    """Logits −(df + D)/2 · ln(1 + d²/df) of d² = |x|² − 2 x·w + |w|², in place of x·w itself."""

    df: float
    dim: int  # D
    x_squares: Tensor  # (N,)
    w_squares: Tensor  # (V,)
