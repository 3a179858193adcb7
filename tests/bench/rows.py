"""Measurements of a benchmark, kept in a file, so that a second call goes on where a first one ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Rows:
    """Rows by their keys: those of a file, one JSON object a line, and those measured since, appended to it."""

    def __init__(self, file: Path | None, limit_s: float | None, **common: Any) -> None:
        """`common` are parts of every key; nothing is begun that would end more than `limit_s` from here, going by what
        took longest so far."""
        self.file, self.common = file, common
        self.end = None if limit_s is None else time.monotonic() + limit_s
        self.missing = 0  # rows that there was no time for
        lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else []
        rows = [json.loads(line) for line in lines]
        self.rows = [row for row in rows if common.items() <= row["key"].items()]

    def get(self, measure: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any] | None:
        """What `measure` returns, or returned when it was asked for this key; None where time will not do."""
        key = self.common | key
        kept = next((row for row in self.rows if row["key"] == key), None)
        if kept is None and self._has_time():
            started = time.monotonic()
            measured = measure()
            kept = {"key": key, "measured": measured, "seconds": round(time.monotonic() - started, 1)}
            self._keep(kept)
        self.missing += kept is None
        return None if kept is None else kept["measured"]

    def _has_time(self) -> bool:
        longest = max((row["seconds"] for row in self.rows), default=0.0)
        return self.end is None or time.monotonic() + longest <= self.end

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
