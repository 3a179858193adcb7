"""Values of JSON that may come from anywhere: each is what it should be, or as good as not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def number(value: Any) -> float | None:
    """A finite number, or None."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if right and math.isfinite(value) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """An object, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list."""
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def written(value: Any, form: str | Callable[[float], str]) -> str | None:
    """A number in a format or as a function writes it, None where it is none."""
    found = number(value)
    return None if found is None else format(found, form) if isinstance(form, str) else form(found)
