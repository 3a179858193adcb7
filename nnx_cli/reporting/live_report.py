"""report.html while a run goes on: an observer that writes it now and then, and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from nnx_cli.errors import NnxError
from nnx_cli.reporting.run_page import write_run_page
from nnx_cli.training.cadence import TimeBudget
from nnx_cli.training.observer import Silent

SHARE = 0.01  # of a run's time that may go into its page
LEAST_SECONDS = 15  # between two pages


class LiveReport(Silent):
    """Observes a run and keeps its page up to date; a page that cannot be written never ends a run.

    As a context it writes the page once more at the end, however that comes. `note` shows a line.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder = folder
        self.show_note = note
        self.budget = TimeBudget(share=SHARE)
        self.has_begun = False
        self.has_failed = False

    def __enter__(self) -> LiveReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.write()

    def write(self) -> None:
        """Write the page; say once where that cannot be done."""
        self.has_begun = True
        try:
            with self.budget.timed():
                write_run_page(self.folder)
        except (NnxError, OSError) as error:
            if not self.has_failed:
                self.show_note(f"no report: {error}")
            self.has_failed = True

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """As in Observer: the first one brings the first page, so that a crash leaves one."""
        waited = time.monotonic() - self.budget.ended_at
        if not self.has_begun or (waited >= LEAST_SECONDS and self.budget.is_affordable()):
            self.write()
