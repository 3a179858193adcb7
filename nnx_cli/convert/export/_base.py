"""What a format is given, and what it promises to `nnx export`.

A format is a file of this folder without a leading underscore, with

- `LIBRARIES`: modules that it needs, which the extra of the format's name installs: `pip install 'nnx-cli[hf]'`;
- `FILE`: the name of the one file that it writes, or None where it writes several;
- `why_not(name, config)`: why it cannot hold this architecture, a clause that follows "for", or None where it can;
- `write(source, folder)`: puts the files into an empty folder;
- `check(source, folder)`: opens them with the format's own library and compares;
- if it has options of its own, a dataclass of literals `Options` beside the sentence of each: `source.options` is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.models._base import LanguageModel, ModelConfig
from nnx_cli.runs.card import Card
from nnx_cli.runs.load import ModelRef


@dataclass(frozen=True)
class Source:
    """A model as it is exported: in float32 on the CPU, adapters merged, nothing quantized."""

    name: str  # of its architecture
    model: LanguageModel
    tokenizer: Tokenizer | None
    card: Card
    ref: ModelRef  # where it comes from: its text, and nothing that goes into an artefact
    ids: Tensor  # (N, T), windows of text to compare on
    options: Any  # `Options` of the format, or None
    tell: Callable[[str, float], None]  # what is at work and how much of it is done, 0 to 1


@dataclass(frozen=True)
class Found:
    """What comparing found: the receipt has these numbers. Over `tolerance`, or with fewer equal tokens than
    `greedy_tokens`, the format's library computes something else."""

    max_logit_difference: float
    tolerance: float
    same_greedy_tokens: int  # from the start
    greedy_tokens: int
    more: dict[str, Any] = field(default_factory=dict)  # further keys of the receipt
    notes: list[str] = field(default_factory=list)  # lines for the user


class Format(Protocol):
    """A module of this folder."""

    LIBRARIES: tuple[str, ...]
    FILE: str | None

    def why_not(self, name: str, config: ModelConfig) -> str | None:
        """Why the format cannot hold a model, or None."""

    def write(self, source: Source, folder: Path) -> None:
        """Fill an empty folder. OSError passes through."""

    def check(self, source: Source, folder: Path) -> Found:
        """Open what was written with the format's own library, and compare. Raises QualityError for what no number
        says."""
