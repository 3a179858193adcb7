"""The learning rate as a pure function of where a run is."""

from __future__ import annotations

import math

COOLDOWN = 0.4  # part of a run, at its end, in which `wsd` lowers the learning rate


def lr_at(step: int, progress: float, *, schedule: str, lr: float, min_lr: float, warmup_steps: int) -> float:
    """Learning rate of a step.

    It rises linearly over `warmup_steps`, then follows `schedule` from `lr` at progress 0 to `min_lr` at progress 1,
    where `progress` is the part of the run that is done: of its steps, or of its time. `wsd` (warm-up, stable, decay:
    Hu et al. 2024, https://arxiv.org/abs/2404.06395) stays at `lr` until COOLDOWN of the run is left, then falls
    linearly; `constant` never falls.
    """
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "constant":
        return lr * warm
    if schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        left = 1 - progress if schedule == "linear" else min(1.0, (1 - progress) / COOLDOWN)
    return (min_lr + (lr - min_lr) * left) * warm
