"""The coach while a run goes on: what its numbers ask for is told as soon as they do, each thing once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnx_cli.errors import CheckpointError
from nnx_cli.reporting.coach import findings
from nnx_cli.reporting.run_record import read_run
from nnx_cli.training.cadence import TimeBudget
from nnx_cli.training.observer import Silent

SHARE = 0.002  # of a run's time that may go into looking at its numbers


class LiveCoach(Silent):
    """Observes a run. `tell` shows a line; `named` stands beside the run in commands on it."""

    def __init__(self, folder: Path, named: str, tell: Callable[[str], None]) -> None:
        self.folder = folder
        self.named = named
        self.tell = tell
        self.budget = TimeBudget(share=SHARE)
        self.told: set[str] = set()

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """As in Observer: the log has this step by now. At the end of a run its verdict says the same."""
        if progress < 1.0 and self.budget.is_affordable():
            with self.budget.timed(), suppress(CheckpointError):
                self._look()

    def _look(self) -> None:
        for found in findings(read_run(self.folder), self.named):
            if found.rule not in self.told:
                self.told.add(found.rule)
                self.tell(f"coach: {found}")
