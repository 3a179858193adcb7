"""How long each rank works at a step, without what it waits for the others; one that holds them up is named."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nnx_cli.system.ranks import Ranks

SLOWER = 1.1  # times as long as the others at the same work
READING_S = 2.0  # of work that are compared at a time, at least
READINGS = 3  # in a row that have to say so: a machine may be busy for a moment


class WorkClock:
    """Adds up the time that this rank works, between two moments in which it waits for others; on a GPU by events in
    its stream, for the host is ahead of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stretches: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._begun: Any = None

    def start(self, *unused: Any) -> None:
        """Work begins."""
        self._begun = self._now()

    def stop(self, *unused: Any) -> None:
        """Work is done."""
        if self.device.type == "cuda":
            self._stretches.append((self._begun, self._now()))
        else:
            self._seconds += self._now() - self._begun

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is done inside is work, unless it fails."""
        self.start()
        yield
        self.stop()

    def follow(self, blocks: Iterable[nn.Module]) -> None:
        """Time the forward passes of blocks in training: where a model is divided, ranks wait for one another before
        each of them and all through the backward pass. To be called once hooks gather the weights of blocks."""
        for block in blocks:
            block.register_forward_pre_hook(lambda block, inputs: self.start() if block.training else None)
            block.register_forward_hook(
                lambda block, inputs, output: self.stop() if block.training else None, prepend=True
            )

    def read(self) -> float:
        """Seconds of work since the last time; synchronizes."""
        seconds, self._seconds = self._seconds, 0.0
        if self._stretches:
            self._stretches[-1][1].synchronize()
        seconds += sum(begin.elapsed_time(end) for begin, end in self._stretches) / 1000
        self._stretches.clear()
        return seconds

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class SlowRankDetector:
    """Compares how long ranks work at the same, and names those that take longer, once."""

    def __init__(self) -> None:
        self.seconds: list[float] = []  # of each rank, since they were compared the last time
        self.in_a_row: list[int] = []  # comparisons that had a rank among the slower ones
        self.has_told = False

    def update(self, seconds: Sequence[float]) -> dict[int, float]:
        """Take the seconds of all ranks since the last time. Returns how many times as long as the others those work
        that do so for a while, unless it did before."""
        none = [0] * len(seconds)
        self.seconds = [a + b for a, b in zip(self.seconds or none, seconds, strict=True)]
        if max(self.seconds) < READING_S:
            return {}
        times = [_relative(self.seconds, rank) for rank in range(len(seconds))]
        before, self.seconds = self.in_a_row or none, []
        self.in_a_row = [n + 1 if many >= SLOWER else 0 for n, many in zip(before, times, strict=True)]
        slow = {rank: times[rank] for rank, n in enumerate(self.in_a_row) if n >= READINGS and not self.has_told}
        self.has_told |= bool(slow)
        return slow

    def line(self, clock: WorkClock, ranks: Ranks) -> str | None:
        """What there is to say, on all ranks, after work that all have timed."""
        where = f"{clock.device} of {socket.gethostname()}"
        told = ranks.gather((clock.read(), where))
        slow = self.update([seconds for seconds, _ in told])
        if not slow:
            return None
        named = [
            f"rank {rank} ({told[rank][1]}) takes {100 * times - 100:.0f} % longer" for rank, times in slow.items()
        ]
        return f"{', '.join(named)} for its part of a step than the others, which wait for it"


def _relative(seconds: Sequence[float], rank: int) -> float:
    """The time of a rank beside the median of the others."""
    others = statistics.median(s for i, s in enumerate(seconds) if i != rank)
    return seconds[rank] / others if others > 0 else 1.0
