"""A run folder: what a run is, how it went, and its weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.errors import CheckpointError, OutputError, quoted
from nnx_cli.runs import logs
from nnx_cli.runs.checkpoint import Checkpoint, check_no_link, load_checkpoint, save_checkpoint, steps_in
from nnx_cli.runs.manifest import (
    BEST,
    FORMAT,
    allowed_digests,
    read_verified_config,
    replace_listed,
    write_model_folder,
)
from nnx_cli.runs.snapshots import cut_snapshots
from nnx_cli.runs.tensors import read_header, size_on_disk, write_tensors
from nnx_cli.system.files import (
    check_types,
    cleared,
    new_folder,
    open_regular,
    plain_opener,
    read_json,
    refuse_existing,
    refused_output,
    replace_file,
    require_space,
    sha256_file,
    to_json,
    write_synced,
)

LOCKED_BYTE = 2**30
NAME_TRIES, NAME_SECONDS = 20, 0.01  # to read who holds a lock
NUMBER = (int, float, type(None))
STATUS_TYPES = {
    "status": str,
    "step": int,
    "max_steps": (int, type(None)),
    "max_time_s": NUMBER,
    "time_s": NUMBER,
    "tokens": NUMBER,
    "train_loss": NUMBER,
    "val_loss": NUMBER,
    "val_bits_per_byte": NUMBER,
    "best_step": NUMBER,
    "best_val_loss": NUMBER,
    "best_val_bits_per_byte": NUMBER,
    "skipped_steps": NUMBER,
    "ended": (str, type(None)),
    "problem": (str, type(None)),
    "events": list,
}
BLANK_STATUS: dict[str, Any] = {"format": FORMAT, **{name: None for name in STATUS_TYPES if name != "events"}}
BLANK_STATUS |= {"status": "interrupted", "step": 0}


class Run:
    """An existing run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.config = read_verified_config(folder)

    @classmethod
    def create(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        tokenizer: Tokenizer | None,
        status: Mapping[str, Any],
        first: Checkpoint,
        file: Path | None = None,
    ) -> Run:
        """Make a run folder in one step, with its first checkpoint, so that a run that exists can be resumed.

        Raises OutputError where the folder exists or cannot be written.
        """
        refuse_taken(folder)
        with new_folder(folder) as temporary:
            (temporary / "checkpoints").mkdir()
            write_model_folder(temporary, config, tokenizer, None, file)
            write_synced(temporary / "run.json", to_json(dict(status)))
            write_synced(temporary / "metrics.jsonl", b"")
            write_synced(temporary / "samples.jsonl", b"")
            save_checkpoint(temporary / "checkpoints", first)
        return cls(folder)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; it is free again when the process ends, however it ends.

        Raises OutputError, naming the other process, where another one holds it. Reads config.json again, which the one
        before may have changed.
        """
        with hold_folder(self.folder):
            for leftover in self.checkpoints.glob(".*-step-*"):
                _remove(leftover)
            self.config = read_verified_config(self.folder)
            yield

    def status(self) -> dict[str, Any]:
        """The contents of run.json. Raises CheckpointError where it is damaged."""
        return read_status(self.folder)

    def has_status(self) -> bool:
        """Whether run.json can be read."""
        with contextlib.suppress(CheckpointError):
            return bool(self.status())
        return False

    def set_status(self, **values: Any) -> dict[str, Any]:
        """Change some values of run.json, whatever it holds; returns all."""
        try:
            status = BLANK_STATUS | self.status() | values
        except CheckpointError:  # it decides nothing
            status = BLANK_STATUS | values
        replace_file(self.folder / "run.json", to_json(status))
        return status

    def set_config(self, config: dict[str, Any]) -> None:
        """Replace config.json."""
        data = to_json(config)
        replace_listed(
            self.folder, "config.json", hashlib.sha256(data).hexdigest(), lambda path: write_synced(path, data)
        )
        self.config = config

    def save_best(self, weights: Mapping[str, Tensor], found: Mapping[str, Any] | None = None) -> None:
        """Replace the weights that the run is known by; `found` (their step and losses) is written into the file.

        Raises OutputError; then the old ones stand.
        """
        temporary = self.folder / f".tmp-best-{os.getpid()}"
        with refused_output(self.folder / BEST), cleared(temporary):
            require_space(self.folder, size_on_disk(weights))
            digest = write_tensors(temporary, weights, found and {"found": json.dumps(dict(found))})
            replace_listed(self.folder, BEST, digest, lambda path: os.replace(temporary, path))

    def best_found(self) -> dict[str, Any] | None:
        """What `save_best` wrote beside the best weights, {} where it wrote nothing, None where they are missing or
        damaged."""
        path = self.folder / BEST
        if not path.is_file() or sha256_file(path) not in allowed_digests(self.folder, BEST):
            return None
        with open_regular(path) as file:
            found = read_header(file, path).get("__metadata__", {}).get("found")
        return {} if found is None else json.loads(found)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl or samples.jsonl. Raises OutputError; then nothing of the line is there."""
        logs.append_line(self.folder / name, record)

    def sync_logs(self) -> None:
        """Wait until the logs are on the disk. Raises OutputError."""
        logs.sync_logs(self.folder)

    def cut_logs(self, step: int) -> list[str]:
        """Drop what is kept of steps after `step`, snapshots too, and damaged lines; returns a note on each log that
        had some."""
        cut_snapshots(self.folder, step)
        return [note for name in logs.LOGS for note in logs.cut_log(self.folder / name, step)]

    def newest_checkpoint(self) -> tuple[Checkpoint, list[str]]:
        """The newest intact checkpoint, and a line for each damaged one that was passed over.

        Raises CheckpointError where there is none.
        """
        problems: list[str] = []
        check_no_link(self.checkpoints)
        for step in reversed(steps_in(self.checkpoints)):
            try:
                checkpoint = load_checkpoint(self.checkpoints, step)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            return checkpoint, [f"{problem}; going back to the checkpoint before it" for problem in problems]
        has_best = (self.folder / BEST).is_file()
        raise CheckpointError(
            "; ".join([f"{self.folder} has no intact checkpoint", *problems[:1]]),
            fix=f"start from its best weights: nnx train --init-from {quoted(self.folder)}" if has_best else None,
        )


def refuse_taken(folder: Path) -> None:
    """Raise OutputError where the folder of a new run exists."""
    refuse_existing(folder, "resume it with --resume")


def read_status(folder: Path) -> dict[str, Any]:
    """The contents of a run's run.json. Raises CheckpointError where it is missing or damaged."""
    path = folder / "run.json"
    status = read_json(path)
    check_types(status, STATUS_TYPES, path)
    return status


def live_status(folder: Path, status: Mapping[str, Any]) -> str:
    """A run's status, or a race's; one that says "running" while nobody holds its lock was killed: "interrupted"."""
    stated = str(status.get("status"))
    if stated != "running":
        return stated
    return "running" if is_held(folder / "lock") else "interrupted"


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock."""
    if not lock.is_file():
        return False
    with open(lock, "rb") as file:
        return not _try_lock(file)


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; it is free again when the process ends, however it ends. What another one left
    half written there goes.

    Raises OutputError, naming the other process, where another one holds it.
    """
    with hold_lock(folder / "lock") as held:
        if not held:
            raise OutputError(f"{folder} is in use by {_holder(folder / 'lock')}", fix="wait for it or stop it")
        for leftover in folder.glob(".tmp-*"):
            _remove(leftover)
        yield


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[bool]:
    """Hold the lock that is a file, for this process; yields whether no other one holds it."""
    with _open_lock(path) as file:
        held = _try_lock(file)
        if held:
            with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
                file.truncate(0)
                os.write(file.fileno(), str(os.getpid()).encode())
        yield held
        if held:
            file.truncate(0)


def _holder(lock: Path) -> str:
    """The process that holds a lock, which it writes down a moment after it took it."""
    for _ in range(NAME_TRIES):
        with open(lock, "rb") as file:
            if name := file.read(40).decode("ascii", "replace").strip():
                return f"process {name}"
        time.sleep(NAME_SECONDS)
    return "another process"


def _open_lock(path: Path) -> BinaryIO:
    """Raises OutputError where the file cannot be made."""
    with refused_output(path):
        return open(path, "a+b", opener=plain_opener)


def _try_lock(file: BinaryIO) -> bool:
    """Take an exclusive lock on an open file, unless somebody has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(LOCKED_BYTE)  # Windows locks bytes: one beyond what is written, so that the rest can be read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
