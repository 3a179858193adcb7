"""Where a command with many runs keeps them: the folder that it began, or a new one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from nnx_cli.errors import CheckpointError, OutputError
from nnx_cli.system.files import numbered

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
