"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Observer(Protocol):
    """Shows a run. Nothing below the commands prints: training knows this protocol alone."""

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """A logged step: a line of metrics.jsonl; `progress` is the part of the run that is done, 0 to 1."""

    def moved(self, progress: float) -> None:
        """A step was taken, logged or not; a GPU may still be at work on it."""

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

    def moved(self, progress: float) -> None:
        """As in Observer."""

    def sampled(self, step: int, text: str) -> None:
        """As in Observer."""

    def saved(self, step: int) -> None:
        """As in Observer."""

    def note(self, text: str) -> None:
        """As in Observer."""


class Several:
    """Tells several observers what it is told; more may join while the run goes on."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = [*observers]

    def step(self, record: Mapping[str, Any], progress: float) -> None:
        """As in Observer."""
        for observer in self.observers:
            observer.step(record, progress)

    def moved(self, progress: float) -> None:
        """As in Observer."""
        for observer in self.observers:
            observer.moved(progress)

    def sampled(self, step: int, text: str) -> None:
        """As in Observer."""
        for observer in self.observers:
            observer.sampled(step, text)

    def saved(self, step: int) -> None:
        """As in Observer."""
        for observer in self.observers:
            observer.saved(step)

    def note(self, text: str) -> None:
        """As in Observer."""
        for observer in self.observers:
            observer.note(text)
