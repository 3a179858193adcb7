"""What the axes of charts measure: how their numbers are written, where they lie, and their ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MOST_TICKS = 6


def short(value: float) -> str:
    """A number as an axis has room for it: 0.25, 1,500, 12k, 2.5M, 3e15."""
    size = abs(value)
    if size and not 1e-3 <= size < 1e12:
        return scientific(value)
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= max(scale, 1e4):
            return f"{value / scale:.4g}{unit}"
    return f"{value:,.5g}" if size >= 1000 else f"{value:.4g}"


def scientific(value: float) -> str:
    """A number as FLOPs are counted: 7.32e10."""
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}" if value else "0"


def spans(values: Iterable[float], times: float) -> bool:
    """Whether values go over so wide a range that a logarithmic axis shows them better."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    return bool(positive) and max(positive) > times * min(positive)


def time_unit(longest_s: float) -> tuple[str, float]:
    """The unit that suits times of up to so many seconds, and its seconds."""
    units = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
    return next(((name, seconds) for name, seconds in units if longest_s >= 3 * seconds), ("seconds", 1.0))


def memory_unit(most_bytes: float) -> tuple[str, float]:
    """The unit that suits amounts of up to so many bytes, and its bytes."""
    return ("GiB", 2.0**30) if most_bytes >= 2**30 else ("MiB", 2.0**20)


@dataclass(frozen=True)
class Axis:
    """What an axis measures, with its unit; `from_zero` makes it begin there."""

    title: str
    log: bool = False
    from_zero: bool = False
    write: Callable[[float], str] = short

    def takes(self, value: float) -> bool:
        """Whether a value has a place on it."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def at(self, value: float) -> float:
        """A value as what lengths on the axis are proportional to."""
        return math.log10(value) if self.log else value


class Scale:
    """Where values of an axis lie, in thousandths of its length, and its ticks."""

    def __init__(self, axis: Axis, values: Sequence[float]) -> None:
        self.axis = axis
        low, high = min(values), max(values)
        if axis.from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        a, b = axis.at(low), axis.at(high)
        if b - a <= 1e-9 * max(abs(a), abs(b)):
            room = 0.5 if axis.log else 0.1 * abs(a) or 1.0
            a, b = a - room, b + room
        self.low, self.high = a, b

    def padded(self, below: float, above: float) -> Scale:
        """With so much of its length more at both ends; nothing below zero where it begins there."""
        length = self.high - self.low
        if not (self.axis.from_zero and self.low == 0.0):
            self.low -= below * length
        self.high += above * length
        return self

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        return 1000 * (self.axis.at(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers between the ends."""
        if not self.axis.log:
            return _round_numbers(self.low, self.high)
        low, high = 10**self.low, 10**self.high
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        whole = [10.0**power for power in decades if low <= 10.0**power <= high]
        if len(whole) > 2:
            return whole[:: math.ceil(len(whole) / MOST_TICKS)]
        finer = [digit * 10.0**power for power in decades for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
        return finer if len(finer) > 2 else _round_numbers(low, high)


def _round_numbers(low: float, high: float) -> list[float]:
    """At most MOST_TICKS numbers from `low` to `high` that people count by."""
    rough = (high - low) / (MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 2.5, 5, 10) if times * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
