"""Where a command with many runs keeps them, the folder that it began or a new one, and the record of them there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from nnx_cli.errors import CheckpointError, OutputError
from nnx_cli.system.files import check_types, new_folder, numbered, to_json, write_synced

ANOTHER = "name another folder with --out"


def find_or_name(place: Path, out: Path | None, kind: str, differs: Callable[[Path], str | None]) -> tuple[Path, bool]:
    """The folder to work in, and whether it has begun: the first of `place`, -2, -3, … that is what is to be done, or a
    free name there; or `out`.

    `differs` says of a folder what makes it another one than that, None where nothing does, and raises CheckpointError
    for one that is no `kind`. Raises OutputError where `out` is something else.
    """
    for folder in numbered(place if out is None else out):
        if not os.path.lexists(folder):
            return folder, False
        try:
            difference = differs(folder)
        except CheckpointError as error:
            if out is not None:
                raise OutputError(f"{out} exists already, and is no {kind}: {error}", fix=ANOTHER) from error
            continue
        if difference is None:
            return folder, True
        if out is not None:
            raise OutputError(f"{out} exists already, and is another {kind}: {difference}", fix=ANOTHER)
    raise AssertionError("names are endless")


def difference(
    record: Mapping[str, Any], settings: Mapping[str, Any], fingerprint: str, device: str | None
) -> str | None:
    """What makes the work of a record another one than that with these settings on this text, and on that device unless
    it is None; None where nothing does."""
    if record["fingerprint"] != fingerprint:
        return "its text differs"
    theirs = record["settings"] or {}
    for name in sorted(theirs.keys() | settings.keys()):
        if theirs.get(name) != settings.get(name):
            return f"its {name} is {theirs.get(name)}, not {settings.get(name)}"
    if device is not None and record["device"] != device:
        return f"its time is that of {record['device']}, and this is {device}"
    return None


def make_folder(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Make a folder that holds a record in a file of that name. Raises OutputError."""
    with new_folder(folder) as temporary:
        write_synced(temporary / name, to_json(dict(record)))


def check_record(part: Any, types: Mapping[str, Any], needed: Set[str], path: Path) -> None:
    """Raise CheckpointError for a part that is not of these types or lacks what is needed; let it lack nothing else."""
    if not isinstance(part, dict):
        raise CheckpointError(f"{path} is damaged: {repr(part)[:40]} is no object")
    check_types(part, types, path)
    if missing := sorted(needed - part.keys()):
        raise CheckpointError(f"{path} is damaged: it lacks {missing[0]}")
    for key, kind in types.items():
        part.setdefault(key, [] if kind is list else None)
