"""Look-ups in sorted arrays: what a dictionary would do, millions at a time."""

from __future__ import annotations

import numpy as np


def places_of(values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where `values` stand in the sorted array `known`, which is not empty, and whether they do."""
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return places, known[places] == values


def run_starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(values) else np.empty(0, np.int64)
