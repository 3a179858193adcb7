"""Trackio: a local dashboard, or one on a server or Space that its own environment variables name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from nnx_cli.reporting.page import charts, page
from nnx_cli.trackers._tracker import PROJECT, TrackedRun, sample_page


def start(run: TrackedRun) -> TrackioRun:
    """Open a run, or the same once more."""
    return TrackioRun(run)


class TrackioRun:
    """A Tracker of Trackio, which tells runs apart by their names."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.trackio: Any = trackio
        self.name = f"{run.name}-{run.id}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run = trackio.init(
            project=project,
            name=self.name,
            resume="allow",
            config=dict(run.settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.place = f"trackio show --project {project}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As in Tracker."""
        self.run.log(dict(values), step=step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """As in Tracker."""
        self.run.log({"samples": self.trackio.Html(sample_page(prompt, text))}, step=step)

    def figures(self, step: int, figures: Sequence[str]) -> None:
        """As in Tracker: as one page."""
        self.run.log({"report": self.trackio.Html(page(self.name, [charts(*figures)]))}, step=step)

    def rewind(self, step: int) -> None:
        """As in Tracker. What is logged stays; the curve goes back."""

    def finish(self, exit_code: int) -> None:
        """As in Tracker."""
        self.run.finish()
