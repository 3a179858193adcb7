"""C code of ours as a shared library: compiled once on a machine, where there is a compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from nnx_cli.system.files import sync_file
from nnx_cli.system.hardware import cpu_flags

COMPILERS = "cc", "gcc", "clang"
PATIENCE_S = 30  # with a compiler, which takes one or two


@cache
def load_threaded(*paths: Path) -> tuple[ctypes.CDLL, int] | None:
    """The library that files of C make together, for the vector instructions of this CPU, and where the OpenMP that
    torch uses begins a parallel region; None where one of the three is missing."""
    flags = cpu_flags()
    library = load_c("".join(path.read_text(encoding="utf-8") for path in paths), flags) if flags else None
    if library is None or not hasattr(process := ctypes.CDLL(None), "GOMP_parallel"):
        return None
    parallel = ctypes.cast(process.GOMP_parallel, ctypes.c_void_p).value
    assert parallel is not None
    return library, parallel


def load_c(source: str, flags: Sequence[str]) -> ctypes.CDLL | None:
    """The library that C code makes, compiled with `flags`; None where nothing compiles it or this system refuses it.

    It is kept in the user's cache folder under a hash of both, so that flags name the instructions that it uses.
    """
    name = hashlib.sha256("\0".join((source, *flags, sys.platform)).encode()).hexdigest()[:24]
    kept = cache_folder() / f"{name}.so"
    try:
        return ctypes.CDLL(str(kept))
    except OSError:  # not there yet, or damaged
        pass
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if os.name != "posix" or compiler is None:
        return None
    try:
        with tempfile.TemporaryDirectory(dir=_made(kept.parent)) as folder:
            library = Path(folder) / kept.name
            _compile(compiler, source, flags, library)
            if library.parent.parent != kept.parent:
                return ctypes.CDLL(str(library))
            os.replace(library, kept)
        return ctypes.CDLL(str(kept))
    except (OSError, subprocess.SubprocessError):
        return None


def cache_folder() -> Path:
    """Where this user keeps what can be made again."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "nnx"


def _made(folder: Path) -> Path | None:
    """The folder, made where it is missing; None where this user has none to write to."""
    if not folder.is_absolute():  # of a user without a home
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _compile(compiler: str, source: str, flags: Sequence[str], library: Path) -> None:
    """Raises OSError and SubprocessError where that does not work."""
    line = [compiler, "-O2", "-shared", "-fPIC", *flags, "-o", str(library), "-x", "c", "-", "-lm"]
    subprocess.run(line, input=source.encode(), capture_output=True, check=True, timeout=PATIENCE_S)
    sync_file(library)
