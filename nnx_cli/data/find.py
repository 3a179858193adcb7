"""Which files are meant by paths, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from nnx_cli.data.formats import FORMATS, format_of
from nnx_cli.data.sources import Source
from nnx_cli.errors import DataError, UsageError

STDIN = "-"


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """The files behind paths, folders (all text files in them, sorted), globs, and `-` for standard input.

    DataError where a path leads to nothing.
    """
    found: dict[str, Source] = {}
    for path in map(str, paths):
        if path == STDIN:
            found[STDIN] = Source("standard input")
            continue
        files = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
        if not files:
            raise DataError(f"there is no {path}")
        for name in files:
            for file in _text_files(name) if os.path.isdir(name) else [name]:
                found.setdefault(os.path.abspath(file), Source(file, Path(file), of_many=file != path))
    if not found:
        raise UsageError("no text was named", fix="nnx prepare FILE")
    return list(found.values())


def _text_files(folder: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    files = []
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        texts = (name for name in sorted(names) if format_of(name) and not name.startswith("."))
        files += [os.path.join(here, name) for name in texts if os.path.isfile(os.path.join(here, name))]
    if not files:
        raise DataError(f"{folder} holds no {' '.join(FORMATS)} file, compressed or not")
    return files
