"""metrics.jsonl and samples.jsonl of a run: one JSON object a line, each with its step."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnx_cli.errors import CheckpointError, counted
from nnx_cli.system.files import cleared, open_regular, plain_opener, refused_output, sync_file, sync_folder

LOGS = ("metrics.jsonl", "samples.jsonl")
MAX_LINE_BYTES = 2**24


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a log; numbers that are not finite become null.

    Raises OutputError; then nothing of the line is there.
    """
    clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    line = (json.dumps(clean, ensure_ascii=True) + "\n").encode()
    with refused_output(path), open(path, "ab", buffering=0, opener=plain_opener) as file:
        end = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def sync_logs(folder: Path) -> None:
    """Wait until the logs of a run are on the disk. Raises OutputError."""
    for name in LOGS:
        with refused_output(folder / name), contextlib.suppress(FileNotFoundError):
            sync_file(folder / name)


def cut_log(path: Path, step: int) -> list[str]:
    """Drop the lines of steps after `step`, and damaged ones; returns a note where there were such."""
    if not path.is_symlink() and not path.exists():
        return []
    try:
        steps = [logged_step(line) for line in _lines(path)]
    except CheckpointError as error:
        with refused_output(path):
            os.replace(path, path.with_name(f"{path.name}.damaged"))
        return [f"{error}; it begins anew"]
    kept = [logged is not None and logged <= step for logged in steps]
    if not all(kept):
        _keep_lines(path, kept)
    damaged = [number for number, logged in enumerate(steps, 1) if logged is None]
    if not damaged:
        return []
    more = f", and {counted(len(damaged) - 1, 'more line')}" if len(damaged) > 1 else ""
    return [f"{path}: line {damaged[0]:,} is damaged{more}; left out"]


def _keep_lines(path: Path, kept: Sequence[bool]) -> None:
    """Replace a log by some of its lines."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with refused_output(path), cleared(temporary):
        with open(temporary, "wb") as file:
            file.writelines(line for line, keep in zip(_lines(path), kept, strict=True) if keep)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a log, of a very long one only the beginning. Raises CheckpointError where it is no file."""
    with open_regular(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            rest = line
            while len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES)
            yield line


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log that are whole. Raises CheckpointError where it is no file."""
    yield from (record for line in _lines(path) if (record := parse_line(line)) is not None)


def read_intact(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a log that are whole, and how many are not; none where there is no log. Raises CheckpointError where
    it is no file."""
    if not os.path.lexists(path):
        return [], 0
    records = [parse_line(line) for line in _lines(path)]
    return [record for record in records if record is not None], records.count(None)


def logged_step(line: bytes) -> int | None:
    """The step of a line of a log; None where the line is damaged."""
    record = parse_line(line)
    return None if record is None else record["step"]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A line of a log; None where it is damaged."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and step >= 0 else None
