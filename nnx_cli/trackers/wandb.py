"""Weights & Biases, online or offline as its own environment variables say: WANDB_MODE, WANDB_PROJECT, WANDB_API_KEY.

Started by an agent of a W&B sweep, a run is the one that the agent names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnx_cli.errors import quoted
from nnx_cli.reporting.page import charts, page
from nnx_cli.trackers._tracker import PROJECT, STEP, TrackedRun, sample_page

PRIVATE = {  # what the library would send by itself: the machine, its user, paths, the code
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "host": "",
    "save_code": False,
    "symlink": False,
    "username": "",
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


def start(run: TrackedRun) -> WandbRun:
    """Open a run, or the same once more."""
    return WandbRun(run)


class WandbRun:
    """A Tracker of Weights & Biases."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self.wandb: Any = wandb
        self.name = run.name
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.name),
            id=os.environ.get("WANDB_RUN_ID", run.id),
            resume="allow",
            config=dict(run.settings),
            dir=str(run.folder),
            settings=wandb.Settings(silent=True, **PRIVATE),
        )
        self.id = self.run.id
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)
        self.folder = run.folder / "wandb" / Path(self.run.dir).parent.name
        offline = f"offline; send it: wandb sync {quoted(self.folder)}"
        self.place = offline if self.run.offline else str(self.run.url or "disabled by WANDB_MODE")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As in Tracker."""
        self.run.log(dict(values))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """As in Tracker."""
        self.run.log({"samples": self.wandb.Html(sample_page(prompt, text), inject=False), STEP: step})

    def figures(self, step: int, figures: Sequence[str]) -> None:
        """As in Tracker: as one page."""
        self.run.log({"report": self.wandb.Html(page(self.name, [charts(*figures)]), inject=False), STEP: step})

    def rewind(self, step: int) -> None:
        """As in Tracker. What is logged stays; the curve goes back."""

    def finish(self, exit_code: int) -> None:
        """As in Tracker."""
        self.run.finish(exit_code=exit_code)
        shutil.rmtree(self.folder / "logs", ignore_errors=True)  # the library's own, with paths
