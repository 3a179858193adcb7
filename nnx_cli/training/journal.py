"""What a run writes down besides weights: its logs, run.json, events. Where the disk refuses, it waits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from nnx_cli.errors import OutputError
from nnx_cli.runs.run import Run
from nnx_cli.training.observer import Observer
from nnx_cli.training.state import TrainState

RETRY_SECONDS = 60  # after which a refused write is tried again


class Journal:
    """Keeps what the run folder should say until the disk takes it."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.events: list[str] = []  # what happened and was not reported yet
        self.status: dict[str, Any] = {}  # what run.json should say
        self.pending_lines: list[tuple[str, dict[str, Any]]] = []  # of logs, which the disk refused
        self.refused_at: float | None = None  # when the disk last refused a write
        self.has_shown_steps = False
        self._logged_tokens = 0
        self._logged_s = 0.0

    def event(self, text: str) -> None:
        """Something happened that belongs in run.json."""
        self.events.append(text)

    def report_events(self, run: Run) -> None:
        """Show what happened, and keep it in run.json."""
        for text in self.events:
            self.observer.note(text)
        if self.events:
            reported = self.status.get("events") or run.status().get("events", [])
            events, self.events = [*reported, *self.events], []
            self.set_status(run, events=events)

    def set_status(self, run: Run, **values: Any) -> None:
        """Change some values of run.json, now or when the disk has room again."""
        self.status |= values
        self.try_write(lambda: run.set_status(**self.status))

    def mark(self, state: TrainState) -> None:
        """Measure the speed of training from here on."""
        self._logged_tokens, self._logged_s = state.tokens, state.time_s

    def seconds(self, state: TrainState) -> float:
        """Training time since the last `mark`."""
        return state.time_s - self._logged_s

    def tokens_per_s(self, state: TrainState) -> float:
        """Speed of training since the last `mark`."""
        return round((state.tokens - self._logged_tokens) / self.seconds(state), 1)

    def log_step(self, run: Run, record: dict[str, Any], progress: float) -> None:
        """Add a step to metrics.jsonl, and show it."""
        self.log(run, "metrics.jsonl", record)
        self.observer.step(record, progress)
        self.has_shown_steps = True

    def log(self, run: Run, name: str, record: dict[str, Any]) -> None:
        """Add a line to a log, now or when the disk has room again."""
        self.pending_lines.append((name, record))
        self.try_write(lambda: self.write_lines(run))

    def write_lines(self, run: Run) -> None:
        """Write what the logs lack. Raises OutputError."""
        while self.pending_lines:
            run.append(*self.pending_lines[0])
            del self.pending_lines[0]

    def cut(self, run: Run, step: int) -> None:
        """Forget what the logs say of steps after `step`."""
        self.pending_lines = [(name, record) for name, record in self.pending_lines if record["step"] <= step]
        run.cut_logs(step)

    def try_write(self, write: Callable[[], object]) -> None:
        """Write something that the run can do without for now: where the disk refuses, say so once and go on."""
        try:
            write()
        except OutputError as error:
            if self.refused_at is None:
                self.observer.note(f"{error}; training goes on, and tries again every {RETRY_SECONDS} s")
            self.refused_at = time.monotonic()

    def should_retry(self) -> bool:
        """Whether the disk refused something a while ago."""
        return self.refused_at is not None and time.monotonic() - self.refused_at > RETRY_SECONDS

    def saved(self, step: int) -> None:
        """A checkpoint and all that was pending is on the disk."""
        if self.refused_at is not None:
            self.observer.note(f"the disk takes what is written again: saved step {step}")
        self.refused_at = None
        self.observer.saved(step)


def finite(value: float | None) -> float | None:
    """A number that JSON has a word for, or None."""
    return value if value is not None and math.isfinite(value) else None
