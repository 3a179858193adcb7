"""What a run folder tells about its run, and that as CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnx_cli.errors import CheckpointError, OutputError
from nnx_cli.reporting.charts import Point
from nnx_cli.reporting.foreign import mapping, number
from nnx_cli.runs.logs import read_intact
from nnx_cli.runs.manifest import read_verified_config
from nnx_cli.runs.run import live_status, read_status
from nnx_cli.runs.snapshots import Snapshot, read_snapshots
from nnx_cli.system.files import open_regular
from nnx_cli.system.text import well_formed

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what begins a text that a spreadsheet would compute
NGRAM, ABOUT_NGRAM = (
    "a byte 5-gram",
    "A byte 5-gram only counts which bytes follow four others: a model that learned more ends below it.",
)
OWN_CSV = (b"step", b"run,step")


@dataclass(frozen=True)
class RunRecord:
    """A run by its files: config.json, run.json, the whole lines of metrics.jsonl and samples.jsonl, and how many lines
    of each log are damaged. `state` is running, finished, interrupted or diverged."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    status: Mapping[str, Any]
    state: str
    metrics: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    damaged: Mapping[str, int]

    @cached_property
    def snapshots(self) -> tuple[list[Snapshot], list[str]]:
        """What happened inside the model, step by step, and a line for each file of that which is damaged."""
        return read_snapshots(self.folder)

    @property
    def ngram_bits_per_byte(self) -> float | None:
        """What a byte 5-gram gets on the run's validation text, where config.json has it."""
        return number(mapping(self.config.get("data")).get("ngram_bits_per_byte"))

    def series(self, name: str, x: str = "step") -> list[Point]:
        """What was logged under a name, against another one: a point a line that has both."""
        pairs = ((number(line.get(x)), number(line.get(name))) for line in self.metrics)
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def best(self, name: str, x: str = "step") -> Point | None:
        """The lowest point of a series."""
        return min(self.series(name, x), key=lambda point: point[1], default=None)

    def last(self, name: str) -> float | None:
        """The last value that was logged under a name."""
        return next((value for line in reversed(self.metrics) if (value := number(line.get(name))) is not None), None)

    @property
    def speed(self) -> float | None:
        """Tokens a second of the whole run."""
        tokens, seconds = self.reached("tokens"), self.reached("time_s")
        return tokens / seconds if tokens and seconds else None

    def reached(self, name: str) -> float | None:
        """How far it is by run.json or, where that is older, by the log: its step, tokens or time_s."""
        values = [value for value in (number(self.status.get(name)), self.last(name)) if value is not None]
        return max(values, default=None)


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Read a run folder. Raises CheckpointError where it is none, or damaged."""
    config = read_verified_config(folder)
    if not os.path.lexists(folder / "run.json"):
        raise CheckpointError(f"{folder} is a model, but no run: it has no run.json", fix="see the runs: nnx list")
    status = read_status(folder)
    metrics, damaged_metrics = read_intact(folder / "metrics.jsonl")
    samples, damaged_samples = read_intact(folder / "samples.jsonl")
    damaged = {"metrics.jsonl": damaged_metrics, "samples.jsonl": damaged_samples}
    state = live_status(folder, status)
    return RunRecord(name or folder.resolve().name, folder, config, status, state, metrics, samples, damaged)


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read several runs, each once. They go by their folders' names, by their paths where those are the same."""
    once = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in once]
    return [read_run(f, n if names.count(n) == 1 else str(f)) for f, n in zip(once, names, strict=True)]


def to_csv(records: Sequence[RunRecord]) -> str:
    """metrics.jsonl as CSV, of several runs with their names in front."""
    several = len(records) > 1
    columns = list(dict.fromkeys(name for record in records for line in record.metrics for name in line))
    columns = ["step", *(name for name in columns if name != "step")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(["run"] if several else []), *map(_cell, columns)])
    for record in records:
        before = [_cell(record.name)] if several else []
        writer.writerows([*before, *(_cell(line.get(name)) for name in columns)] for line in record.metrics)
    return well_formed(text.getvalue())


def _cell(value: Any) -> Any:
    """A value as a spreadsheet takes it: what is no number never computes."""
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return f"'{text}" if text.startswith(FORMULA) else text


def refuse_foreign(path: Path, marks: Sequence[bytes], fix: str) -> None:
    """Raise OutputError where there is a file at `path` that does not begin with one of our `marks`: it is not ours to
    replace. `fix` is what to do then."""
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise OutputError(f"{path} is a folder, not a file", fix=fix)
    with open_regular(path, OutputError) as file:
        if not file.read(max(map(len, marks))).startswith(tuple(marks)):
            raise OutputError(f"{path} exists already, and was not written by this command", fix=fix)
