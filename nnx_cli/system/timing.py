"""How long a device takes for a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from nnx_cli.system.device import synchronize


def call_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(call: Callable[[], Any], device: torch.device, max_calls: int, max_seconds: float) -> float:
    """Median seconds of up to `max_calls` calls within about `max_seconds`, after one that warms up and compiles."""
    call_seconds(call, device)
    times = [call_seconds(call, device)]
    while len(times) < max_calls and sum(times) < max_seconds:
        times.append(call_seconds(call, device))
    return statistics.median(times)
