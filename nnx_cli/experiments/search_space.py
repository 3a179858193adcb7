"""What a sweep chooses from: for each setting some values or a range, as `--set` writes them."""

from __future__ import annotations

import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nnx_cli.config import Field
from nnx_cli.errors import UsageError, nearest

Value = bool | int | float | str
BRIEF = 40  # letters
DIGITS = 4  # of a number that is drawn
LIKE = "write it like --set lr=1e-4..1e-2:log or --set dim=128,256"
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def brief(value: Any) -> str:
    """What a file has for a value, in a message: lists of lists, a few bytes of YAML, are endless in words."""
    return reprlib.repr(value)[:BRIEF]


def shown(value: Value) -> str:
    """A value as people read it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Value, ...]

    @property
    def count(self) -> int:
        """How many values there are."""
        return len(self.values)

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that all others are allowed with: here all."""
        return self.values

    def at(self, number: int) -> Value:
        """The value of that number, from 0 on."""
        return self.values[number]

    def draw(self, u: float) -> Value:
        """The value at `u`, from 0 to below 1."""
        return self.at(int(u * self.count))

    def described(self) -> dict[str, Any]:
        """It as sweep.json has it."""
        return {"values": list(self.values)}

    def __str__(self) -> str:
        return ", ".join(map(shown, self.values))


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included: `whole`, in steps, or any; `log`: of its logarithm evenly."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    @property
    def count(self) -> int | None:
        """How many values there are; None where they are endless."""
        if self.step is None and not self.whole:
            return None
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9) + 1

    @property
    def ends(self) -> tuple[Value, ...]:
        """Values that all others are allowed with."""
        return self.rounded(self.low), self.rounded(self.high)

    def at(self, number: int) -> Value:
        """The value of that number, from 0 on."""
        return self.rounded(self.low + number * (self.step or 1))

    def draw(self, u: float) -> Value:
        """The value at `u`, from 0 to below 1."""
        if not self.log and self.count is not None:
            return self.at(int(u * self.count))
        if not self.log:
            return self.rounded(self.low + u * (self.high - self.low))
        above = self.high + 1 if self.whole else self.high
        found = self.low * (above / self.low) ** u
        return self.rounded(math.floor(found) if self.whole else found)

    def rounded(self, value: float) -> Value:
        """A number as trials have it, to a few digits and inside the range."""
        digits = DIGITS if self.count is None else 12
        value = min(max(float(f"{value:.{digits}g}"), self.low), self.high)
        return round(value) if self.whole else value

    def described(self) -> dict[str, Any]:
        """It as sweep.json has it."""
        kind = int if self.whole else float
        step = None if self.step is None else kind(self.step)
        return {"low": kind(self.low), "high": kind(self.high), "log": self.log, "step": step}

    def __str__(self) -> str:
        step = f" in steps of {self.step:g}" if self.step is not None else ""
        return f"{self.low:g} to {self.high:g}{step}" + (", logarithmic" if self.log else "")


Space = Mapping[str, Choice | Range]


def combinations(space: Space) -> int | None:
    """How many combinations of settings there are; None where they are endless."""
    counts = [each.count for each in space.values()]
    known = [count for count in counts if count is not None]
    return math.prod(known) if len(known) == len(counts) else None


def parse_setting(text: str, fields: Mapping[str, Field | None]) -> tuple[str, Choice | Range]:
    """A setting and what it is chosen from, of `NAME=VALUES`. Raises UsageError, with the nearest name."""
    name, found, values = text.partition("=")
    if not found or not name.strip():
        raise UsageError(f"--set {text!r} has no NAME=VALUES", fix=LIKE)
    field = find_field(name, fields, "--set")
    origin = f"--set {field.name}"
    span = re.fullmatch(rf"\s*({NUMBER})\s*\.\.\s*({NUMBER})\s*(?::\s*(\S+)\s*)?", values)
    if span is None or field.type == "str":
        return field.name, choice(origin, [word.strip() for word in values.split(",")], field)
    low, high, how = span.groups()
    if how not in (None, "log") and not re.fullmatch(NUMBER, how):
        raise UsageError(f"{origin}: after the range comes log or a step, not {how!r}", fix=LIKE)
    step = None if how in (None, "log") else how
    return field.name, make_range(origin, low, high, field, log=how == "log", step=step)


def find_field(name: str, fields: Mapping[str, Field | None], origin: str) -> Field:
    """The setting of that name, however it is spelled. Raises UsageError, with the nearest one, and for one without a
    field, which is the same for all trials."""
    plain = name.strip().lstrip("-").replace("-", "_")
    if plain in fields and (field := fields[plain]) is not None:
        return field
    if plain in fields:
        raise UsageError(
            f"{origin}: {plain} is the same for all trials", fix=f"give it as an option: --{plain.replace('_', '-')}"
        )
    near = nearest(plain, fields)
    raise UsageError(f"{origin}: there is no setting {plain!r}{near}", fix="see: nnx sweep --help")


def choice(origin: str, values: Iterable[Any], field: Field) -> Choice:
    """Some values of a setting. Raises UsageError for one that is none, or is there twice."""
    found = [convert(value, field, origin) for value in values]
    if not found:
        raise UsageError(f"{origin} has no values", fix=LIKE)
    if twice := [value for value, times in Counter(found).items() if times > 1]:
        raise UsageError(f"{origin} names {twice[0]} twice", fix="name each value once")
    return Choice(tuple(found))


def make_range(origin: str, low: Any, high: Any, field: Field, *, log: bool = False, step: Any = None) -> Range:
    """A range of a setting. Raises UsageError for one that is upside down, the logarithm of what has none, or a step
    that does not fit into it."""
    if field.type not in ("int", "float"):
        raise UsageError(f"{origin} is no number: it has no range", fix=LIKE)
    bottom, top = (float(convert(end, field, origin)) for end in (low, high))
    if bottom >= top:
        what, fix = ("upside down", f"write {high}..{low}") if bottom > top else ("a single value", f"write {low}")
        raise UsageError(f"{origin}: the range {low}..{high} is {what}", fix=fix)
    if log and bottom <= 0:
        raise UsageError(f"{origin}: a logarithmic range begins above 0, not at {low}", fix=LIKE)
    width = None if step is None else float(convert(step, field, origin))
    if width is not None and not 0 < width <= top - bottom:
        raise UsageError(f"{origin}: a step of {step} does not fit into {low}..{high}", fix=LIKE)
    return Range(bottom, top, log, width, field.type == "int")


def convert(value: Any, field: Field, origin: str) -> Value:
    """A value of text or of a file in the type of its setting. Raises UsageError where it is none."""
    found: Value | None = None
    text = str(value).strip() if isinstance(value, (bool, int, float, str)) else ""
    if field.type == "bool":
        found = value if isinstance(value, bool) else WORDS.get(text.lower())
    elif field.type == "str":
        found = ("off", "on")[value] if isinstance(value, bool) else text or None  # what YAML makes of on and off
    elif not isinstance(value, bool) and re.fullmatch(NUMBER, text) and abs(float(text)) < 2**63:
        number = float(text)
        found = number if field.type == "float" else int(number) if number == int(number) else None
    if found is None:
        raise UsageError(
            f"{origin}: {brief(value)} is no {'whole number' if field.type == 'int' else KINDS[field.type]}"
        )
    return found


KINDS = {"float": "number", "bool": "yes or no", "str": "value"}
