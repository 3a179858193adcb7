"""What a tracker is: a module here with `start(run)`, named like its library and like the extra that installs it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nnx_cli.errors import MissingFeature, pip_install
from nnx_cli.reporting.page import text

PROJECT = "nnx"  # that runs belong to, where the tracker's own environment variables name none
STEP = "train/global_step"
NAMES = {  # of the lines of metrics.jsonl, as transformers' Trainer has them, and panels made for it
    "step": STEP,
    "tokens": "train/num_input_tokens_seen",
    "train_loss": "train/loss",
    "lr": "train/learning_rate",
    "tokens_per_s": "train/train_tokens_per_second",
    "val_loss": "eval/loss",
    "val_bits_per_byte": "eval/bits_per_byte",
}


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker sees it. `id` stays the same when the run goes on; `settings` are flat, and have no path."""

    name: str
    folder: Path
    id: str
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """One run in a tracker. `place` says where it is to be seen. Any method may fail or take as long as it likes."""

    place: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """What the model wrote."""

    def figures(self, step: int, figures: Sequence[str]) -> None:
        """The figures of the run's page, as HTML."""

    def rewind(self, step: int) -> None:
        """Steps after this one are trained anew: what was told of them does not hold."""

    def finish(self, exit_code: int) -> None:
        """The run has ended with this code."""


def check_installed(names: Iterable[str]) -> None:
    """Raise MissingFeature where the library of one of these trackers is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # the latter: a mere folder of that name, as W&B makes them
            raise MissingFeature(f"--log-to {name} needs {name}", fix=pip_install(f"nnx-cli[{name}]"))


def sample_page(prompt: str, continuation: str) -> str:
    """What a model wrote, as HTML that shows it letter by letter."""
    return f'<pre style="white-space: pre-wrap"><b>{text(prompt)}</b>{text(continuation)}</pre>'


def scalars_of(record: Mapping[str, Any], epoch_tokens: int | None) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl under the names that trackers show them by."""
    values = {
        NAMES.get(name, f"train/{name}"): float(value)
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
    if epoch_tokens and "train/num_input_tokens_seen" in values:
        values["train/epoch"] = values["train/num_input_tokens_seen"] / epoch_tokens
    return values


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a run, flat, without anything that may be a path."""
    model, training, data, tokenizer = (
        value if isinstance(value := config.get(key), dict) else {}
        for key in ("model", "training", "data", "tokenizer")
    )
    values = {
        "model": Path(str(model.get("name") or "")).stem,
        **{name: value for name, value in model.items() if name not in ("name", "file", "sha256")},
        **{name: value for name, value in training.items() if name != "log_to"},
        "parameters": config.get("parameters"),
        "tokenizer": tokenizer.get("kind"),
        "train_tokens": data.get("train_tokens"),
        "data_fingerprint": data.get("fingerprint"),
        "ngram_bits_per_byte": data.get("ngram_bits_per_byte"),
        "machine": config.get("machine"),
        **{f"version_{name}": version for name, version in (config.get("versions") or {}).items()},
    }
    return {name: value for name, value in values.items() if isinstance(value, (int, float)) or _is_no_path(value)}


def _is_no_path(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not any(sign in value for sign in "/\\~")
