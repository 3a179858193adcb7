"""The settings of every command: frozen dataclasses that own each default and check themselves. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nnx_cli.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Text to token folder."""

    tokenizer: str = "byte"  # byte, char, bpe, gpt2, cl100k_base, o200k_base, or a tokenizer file
    vocab_size: int | None = None  # of a trained tokenizer (bpe, char); None: the tokenizer's own
    val_fraction: float = 0.1  # part of the text held out for validation
    text_key: str = "text"  # field of a JSONL row, column of a table
    errors: str = "replace"  # invalid bytes: strict refuses, replace counts and reports
    workers: int | None = None  # encoding threads; None: one per core
    max_memory_bytes: int = 256 * 2**20  # bound on what preparing holds at once

    def __post_init__(self) -> None:
        check_range("val-fraction", self.val_fraction, 0.0, 0.5, low_open=True)
        check_choice("errors", self.errors, ("strict", "replace"))
        if self.vocab_size is not None:
            check_range("vocab-size", self.vocab_size, 1, 2**24)
        if self.workers is not None:
            check_range("workers", self.workers, 1, 1024)
        check_range("max-memory", self.max_memory_bytes, 32 * 2**20, 2**50)


def check_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    """Raise UsageError unless `value` is finite and low <= value <= high (low < value with `low_open`)."""
    if not math.isfinite(value) or not (low < value if low_open else low <= value) or value > high:
        above = f"above {low:g}" if low_open else f"at least {low:g}"
        raise UsageError(f"--{name} is {value:g}; it must be {above} and at most {high:g}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f"--{name} is {value!r}; choose from {', '.join(choices)}")
