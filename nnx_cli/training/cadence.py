"""When a run logs, validates, samples and saves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nnx_cli.config import MILESTONES, TrainConfig

LOG_STEPS = 10
SAVE_SECONDS = 600  # without --save-every: no checkpoint is older than this
BUDGET_SHARE = 0.05  # of the time may go into saving, and as much into samples, unless they were asked for
FIRST_SECONDS = 0.1  # what they are taken to need before the first one: nothing of it in a run's first two seconds
SAVED_PER_SECOND = 1e9  # bytes, at most: disks took 0.6 to 0.9e9


@dataclass
class TimeBudget:
    """Keeps something that a run does beside training to a share of its time."""

    ended_at: float = field(default_factory=lambda: time.monotonic())
    seconds: float = FIRST_SECONDS  # that it took the last time
    share: float = BUDGET_SHARE

    def is_affordable(self) -> bool:
        """Whether enough time has passed since the last one."""
        return time.monotonic() - self.ended_at >= self.seconds / self.share

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Take note of how long it takes."""
        started = time.monotonic()
        yield
        self.ended_at = time.monotonic()
        self.seconds = self.ended_at - started


@dataclass(frozen=True)
class Due:
    """What follows a step."""

    log: bool
    validate: bool
    sample: bool
    save: bool


class Cadence:
    """Says what is due after a step: every so many steps, at milestones of the run while there is time for it, by the
    clock, and at the end."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.saving = TimeBudget()
        self.sampling = TimeBudget()

    def expect_to_save(self, n_bytes: int) -> None:
        """Take a checkpoint to have so many bytes until one was saved: without that, a large one would be saved at the
        first milestone that a resumed run comes to."""
        self.saving.seconds = max(FIRST_SECONDS, n_bytes / SAVED_PER_SECOND)

    def due(self, step: int, before: float, done: float, must_save: bool) -> Due:
        """What is due after `step` steps, of which the last one led from progress `before` to `done`."""
        config = self.config
        validate = self._is_due(config.val_every, step, before, done)
        return Due(
            log=validate or step % LOG_STEPS == 0 or step == 1,
            validate=validate,
            sample=self._is_due(config.sample_every, step, before, done, self.sampling),
            save=must_save or done >= 1.0 or self._is_due(config.save_every, step, before, done, self.saving),
        )

    def is_overdue(self) -> bool:
        """Whether the last checkpoint is too old."""
        return self.config.save_every is None and time.monotonic() - self.saving.ended_at > SAVE_SECONDS

    def _is_due(
        self, every: int | None, step: int, before: float, done: float, budget: TimeBudget | None = None
    ) -> bool:
        """Whether something that happens every so many steps (0: never; None: at MILESTONES, if there is time for it),
        and at the end, happens now."""
        if every == 0:
            return False
        if done >= 1.0:
            return True
        if every is not None:
            return step % every == 0
        at_milestone = any(before < milestone <= done for milestone in MILESTONES)
        return at_milestone and (budget is None or budget.is_affordable())
