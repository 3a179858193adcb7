"""The learning rate as a pure function of where a run is."""

from __future__ import annotations

import math

COOLDOWN = 0.4  # part of a run, at its end, in which `wsd` lowers the learning rate
ANNEALING = 0.2  # of what a run had done at its best, in which it does the rest of its schedule once it went back there


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


def after_turn(progress: float, turned_at: float, turned_to: float) -> float:
    """Where a run is in its schedule that at `turned_at` went back to where it was at `turned_to`: from there it does
    what is left of the schedule in ANNEALING of what it had done, or in what was left of the run."""
    stretch = max(min(1 - turned_at, ANNEALING * turned_to), 1e-9)
    return turned_to + (1 - turned_to) * (progress - turned_at) / stretch
