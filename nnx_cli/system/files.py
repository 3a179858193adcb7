"""Writing files so that a crash, a full disk or a power cut leaves either the old content or the new, never half of
one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from nnx_cli.errors import CheckpointError, NnxError, OutputError, nearest_file
from nnx_cli.system.signals import half_made
from nnx_cli.system.text import well_formed

OURS = {
    "checkpoints",
    "config.json",
    "manifest.json",
    "meta.json",
    "metrics.jsonl",
    "model.safetensors",
    "optimizer.safetensors",
    "run.json",
    "samples.jsonl",
    "state.json",
    "tokenizer.json",
    "train.bin",
    "train.documents",
    "train.mask",
    "val.bin",
    "val.documents",
    "val.mask",
}
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT}  # the last in a folder such as /proc
MAX_JSON_BYTES = 64 * 2**20


@contextlib.contextmanager
def refused_output(path: Path, fix: str | None = None) -> Iterator[None]:
    """Turn the operating system's refusal to write at `path` into OutputError; `fix` is what helps where this place is
    not to be written to."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OutputError(
                f"disk full while writing {path}", fix="free some space and run the command again"
            ) from error
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another process was faster
            refuse_existing(path)
        raise OutputError(f"cannot write {path}: {error.strerror or error}", fix=fix) from error


def is_forbidden(error: OutputError) -> bool:
    """Whether a place was refused because this process may not write there at all, be it full or not."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_PLACE


def numbered(path: Path) -> Iterator[Path]:
    """`path`, then with -2, -3, … behind it, without an end."""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")


def free_name(path: Path) -> Path:
    """`path`, or with -2, -3, … behind it where that exists."""
    return next(name for name in numbered(path) if not os.path.lexists(name))


def plain_opener(path: str, flags: int) -> int:
    """For `open`, to write to a file of a run: a link leads to somebody else's file, and a pipe may block."""
    flags |= sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK"))
    return os.open(path, flags, 0o666)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (Windows has no such call and needs none)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until a file that was just closed is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise OutputError unless the disk of `folder` has room for `n_bytes` more."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise OutputError(
            f"disk full: {folder} needs {n_bytes / 2**20:,.1f} MiB more, {free / 2**20:,.1f} MiB are free",
            fix="free some space and run the command again",
        )


@contextlib.contextmanager
def cleared(temporary: Path) -> Iterator[None]:
    """Remove a temporary file where what was to be done with it fails."""
    with half_made():
        try:
            yield
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file in one step. Raises OutputError; then the old content stands."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with refused_output(path), cleared(temporary):
        write_synced(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)


def refuse_existing(path: Path, otherwise: str = "remove it") -> None:
    """Raise OutputError where `path` exists already, be it a link to nothing; `otherwise` is what else may be done."""
    if os.path.lexists(path):
        raise OutputError(f"{path} exists already", fix=f"name another folder with --out, or {otherwise}")


@contextlib.contextmanager
def new_folder(path: Path, only: str | None = None) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `path` in one step at the end, or leaves nothing behind. Where a file
    in it is named with `only`, that file alone becomes `path`.

    Folders above it that had to be made go too. Raises OutputError where `path` exists already or cannot be written.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    missing = [folder for folder in path.parents if not folder.exists()]
    with refused_output(path, "name a folder that can be made: --out FOLDER"), half_made():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            with locked_folder(temporary):
                yield temporary
                refuse_existing(path)
                sync_folder(temporary)
                os.rename(temporary if only is None else temporary / only, path)
                sync_folder(path.parent)
            if only is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder itself, where the system has one; yields whether nobody else holds it."""
    if os.name != "posix":
        yield False
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Delete what processes that no longer live left half made or half deleted of `path` and, as far as it is certainly
    ours, of its neighbours."""
    for leftover in [*path.parent.glob(".tmp-*"), *path.parent.glob(".del-*")]:
        name = re.fullmatch(r"\.(?:tmp|del)-(.+)-(\d+)", leftover.name)
        if name is None or leftover.is_symlink() or not leftover.is_dir() or is_alive(int(name[2])):
            continue
        with contextlib.suppress(OSError):
            if name[1] == path.name or OURS.issuperset(os.listdir(leftover)):
                with locked_folder(leftover) as free:  # in another container, process numbers say nothing
                    if free:
                        shutil.rmtree(leftover, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether there may be a process of that number."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def discard_folder(folder: Path) -> None:
    """Delete a folder, whole or not at all. Raises OSError where it cannot: on Windows, while somebody uses it."""
    doomed = folder.with_name(f".del-{folder.name}-{os.getpid()}")
    folder.rename(doomed)  # it loses its name first, so that half of it never passes for all
    shutil.rmtree(doomed, ignore_errors=True)


def relative(folder: Path, start: Path) -> str:
    """The way from one folder to another, with forward slashes, as JSON can hold it: `follow` reads it.

    A byte of a name that is no UTF-8 is written as NUL, which no name has, and two hexadecimal digits.
    """
    try:
        way = Path(os.path.relpath(folder.resolve(), start.resolve())).as_posix()
    except ValueError:  # another drive: Windows has no way there
        way = folder.resolve().as_posix()
    return re.sub("[\udc80-\udcff]", lambda byte: f"\0{ord(byte[0]) - 0xDC00:02x}", way)


def follow(start: Path, way: str) -> Path:
    """The folder that a way of `relative` leads to, by the shorter of its names."""
    found = start / re.sub("\0([89a-f][0-9a-f])", lambda byte: chr(0xDC00 + int(byte[1], 16)), way)
    with contextlib.suppress(ValueError):  # no file has such a name
        short = Path(os.path.normpath(found))
        return short if os.path.realpath(short) == os.path.realpath(found) else found
    return found


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path, error: type[NnxError] = CheckpointError, follow_links: bool = False) -> io.BufferedReader:
    """Open a file to read it. Raises `error` where there is none, or a link (which may lead out of a folder) unless
    `follow_links`, a pipe or a device (which may never end)."""
    names = ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC") + (() if follow_links else ("O_NOFOLLOW",))
    flags = sum(getattr(os, name, 0) for name in names)
    try:
        descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError as refusal:
        why = "it is a link" if path.is_symlink() and not follow_links else refusal.strerror
        raise error(f"{path} cannot be read: {why}") from refusal
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path} cannot be read: it is no regular file")
    return os.fdopen(descriptor, "rb")


def sha256_regular(path: Path) -> str:
    """Hexadecimal SHA-256 of a JSON file of a model or run folder. Raises CheckpointError where it is missing, no file
    or much too large."""
    with open_regular(path) as file:
        _check_size(file, path, MAX_JSON_BYTES, CheckpointError)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(file: BinaryIO, path: Path, max_bytes: int, error: type[NnxError]) -> None:
    if os.fstat(file.fileno()).st_size > max_bytes:
        raise error(f"{path} is damaged: it has more than {max_bytes >> 20} MiB")


def why_not_opened(error: OSError | ValueError) -> str:
    """The system's words, and the file that may be meant; or what Python does not ask it: a name with a NUL, or letters
    that it has no bytes for."""
    if not isinstance(error, OSError):
        return "no file has such a name"
    missing = isinstance(error, FileNotFoundError) and isinstance(error.filename, (str, os.PathLike))
    return (error.strerror or str(error)) + (nearest_file(error.filename) if missing else "")


def to_json(value: Any) -> bytes:
    """JSON for people and programs: indented, UTF-8, a final newline; not-a-number is refused."""
    return well_formed(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def check_types(value: Any, shape: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError unless the keys of `shape` that `value` has hold what it says: a type, a tuple of types, or
    a further shape (or null)."""
    for key, kinds in shape.items():
        if not isinstance(value, Mapping) or key not in value:
            continue
        found = value[key]
        if isinstance(kinds, Mapping):
            check_types(found, kinds, path)
            kinds = (dict, type(None))
        wrong = isinstance(found, bool) and kinds is not bool
        wrong |= isinstance(found, (int, float)) and not abs(found) < 2**62  # nor not a number
        if wrong or not isinstance(found, kinds):
            raise CheckpointError(f"{path} is damaged: its {key} is {repr(found)[:40]}")


def _finite(text: str) -> float:
    """A number of JSON, which has no NaN and nothing infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


def read_json(
    path: Path, *, error: type[NnxError] = CheckpointError, max_bytes: int = MAX_JSON_BYTES, follow_links: bool = False
) -> dict[str, Any]:
    """A JSON object from a file. Raises `error` where it is missing, too large, damaged or no object."""
    with open_regular(path, error, follow_links) as file:
        _check_size(file, path, max_bytes, error)
        data = file.read()
    try:
        value = json.loads(data, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as nonsense:
        raise error(f"{path} is damaged: it is not JSON") from nonsense
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: it is not a JSON object")
    return value
