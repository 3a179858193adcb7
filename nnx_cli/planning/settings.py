"""The values of a run while they are filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from nnx_cli.config import TrainConfig


class Derived(NamedTuple):
    """A value, and where it comes from."""

    value: Any
    reason: str


class Settings:
    """What a run was asked for, what was filled in since, and where each value came from."""

    def __init__(self, train: TrainConfig, sources: Mapping[str, str]) -> None:
        self.requested = train
        self.train = train
        self.sources = dict(sources)

    def is_free(self, field: str) -> bool:
        """Whether a field of training was left to be derived."""
        return getattr(self.requested, field) in (None, "auto")

    def note(self, name: str, reason: str) -> None:
        """Remember where a value came from that is no field of training."""
        self.sources[name] = f"derived: {reason}"

    def fill_all(self, values: Mapping[str, Derived]) -> None:
        """Fill in the fields that were left free. Raises UsageError where values disagree."""
        free = {field: derived for field, derived in values.items() if self.is_free(field)}
        self.train = replace(self.train, **{field: derived.value for field, derived in free.items()})
        for field, derived in free.items():
            self.note(field, derived.reason)
