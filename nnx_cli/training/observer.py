"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Observer(Protocol):
    """Shows a run. Nothing below the commands prints: training knows this protocol alone."""

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """A logged step: a line of metrics.jsonl; `progress` is the part of the run that is done, 0 to 1."""

    def sampled(self, step: int, text: str) -> None:
        """A sample was drawn."""

    def saved(self, step: int) -> None:
        """A checkpoint is on the disk."""

    def note(self, text: str) -> None:
        """Something worth a line happened."""


class Silent:
    """Shows nothing."""

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """As in Observer."""

    def sampled(self, step: int, text: str) -> None:
        """As in Observer."""

    def saved(self, step: int) -> None:
        """As in Observer."""

    def note(self, text: str) -> None:
        """As in Observer."""
