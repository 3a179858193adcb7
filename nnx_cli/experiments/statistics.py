"""Which differences between competitors are more than chance: paired by seed, for they saw the same batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

CONFIDENCE = 0.95


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which a single value has not."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def t_probability(t: float, df: int) -> float:
    """P(|T| < t) of Student's t with a whole number of degrees of freedom: the finite sums of Abramowitz and Stegun,
    26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(df))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = df % 2
    term = sine * (math.cos(angle) if odd else 1.0)
    total = 0.0
    for k in range(df // 2):
        total += term
        term *= square * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return 2 / math.pi * (angle + total) if odd else total


def t_quantile(df: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = `confidence`, to the last digits of a float."""
    low, high = 0.0, 1.0
    while t_probability(high, df) < confidence:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_probability(middle, df) < confidence else (low, middle)
    return high


@dataclass(frozen=True)
class Difference:
    """The mean difference of two competitors over the seeds that both have, and the interval that holds the true one
    with 95 % confidence."""

    mean: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Whether it may as well be none."""
        return self.low <= 0 <= self.high


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """`first` less `second`, each a number by seed; None with fewer than two seeds in both: no verdict."""
    seeds = sorted(first.keys() & second.keys())
    mean, error = mean_and_error([first[seed] - second[seed] for seed in seeds]) if seeds else (0.0, None)
    if error is None:
        return None
    margin = t_quantile(len(seeds) - 1) * error
    return Difference(mean, mean - margin, mean + margin)


def ties(results: Mapping[str, Mapping[int, float]]) -> tuple[dict[str, list[str] | None], int]:
    """For each competitor, by its numbers by seed, those that it ties with, None where there is no verdict about it;
    and how many comparisons that took."""
    found: dict[str, list[str] | None] = dict.fromkeys(results)
    n_comparisons = 0
    for first, second in combinations(results, 2):
        difference = paired_difference(results[first], results[second])
        if difference is None:
            continue
        n_comparisons += 1
        for name, other in ((first, second), (second, first)):
            tied = found[name] or []
            found[name] = [*tied, other] if difference.is_tie else tied
    return found, n_comparisons
