"""Successive halving: all trials get a part of their length, the best of them more (Jamieson and Talwalkar 2016,
https://arxiv.org/abs/1502.07943).

A rung is a part of a trial's length. Each trial is one run of the whole length that pauses there, so nothing is trained
twice, and all of a rung are equally far on the same schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnx_cli.experiments.one_run import PAUSED

WAITING, STOPPED = "waiting", "stopped"


def rungs(trials: int, eta: int) -> list[float]:
    """Parts of the length at which 1/`eta` of the trials go on, up to the whole one that at least one trial gets."""
    n_cuts = 0
    while eta ** (n_cuts + 1) <= trials:
        n_cuts += 1
    return [float(eta) ** -cut for cut in range(n_cuts, -1, -1)]


def lengths(trials: int, shares: Sequence[float], eta: int) -> float:
    """Whole lengths that all trials together take."""
    parts = [high - low for low, high in zip([0.0, *shares], shares, strict=False)]
    return sum(part * max(1, trials // eta**rung) for rung, part in enumerate(parts))


def is_over(trial: Mapping[str, Any]) -> bool:
    """Whether nothing is left to do for a trial."""
    return trial["status"] not in (WAITING, PAUSED)


def open_trials(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that may go on to their next rung: the ones that are least far."""
    left = [trial for trial in trials if not is_over(trial)]
    lowest = min((len(trial["rungs_reached"]) for trial in left), default=0)
    return sorted((trial for trial in left if len(trial["rungs_reached"]) == lowest), key=lambda trial: trial["number"])


def stop_losers(trials: Sequence[dict[str, Any]], eta: int) -> None:
    """Where all have reached a rung, stop those that are worse there than the ones that go on."""
    reached = open_trials(trials)
    rung = len(reached[0]["rungs_reached"]) if reached else 0
    if rung == 0:
        return
    go_on = max(1, len(trials) // eta**rung)
    for trial in sorted(reached, key=lambda trial: (trial["bits_per_byte"], trial["number"]))[go_on:]:
        trial["status"] = STOPPED
