"""Tensors of somebody else's checkpoint, by where they stand in it; nothing in it is run.

torch's safe loader builds tensors and plain containers. Any other class or function that a file names is given to it as
a class of this module, which takes whatever arguments and state the file has and does nothing.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnx_cli.errors import CheckpointError, nearest_file, quoted

LEGACY_PICKLES = 4  # before its storages a file of torch < 1.6 has: a magic number, versions, the machine, the content
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # what protocol 2 calls these modules
HEADER_SIZE = struct.Struct("<Q")  # of safetensors
MAX_DEPTH, MAX_NODES = 128, 2**20  # of containers: a file may hold itself, or one list a million times
MODULE_PARTS = ("_parameters", "_buffers", "_modules")  # where a pickled module keeps its tensors: not part of a name
SAVE_WEIGHTS = "save the weights alone, where it was made: torch.save(model.state_dict(), FILE)"
DAMAGE = (
    pickle.UnpicklingError,
    SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    MemoryError,
    AssertionError,
    NotImplementedError,
)
NONSENSE = (ArithmeticError, LookupError, AttributeError, RuntimeError, TypeError, ValueError)  # well formed, unusable


@dataclass
class CheckpointFile:
    """What a file holds: tensors by their place (`model.layers.0.weight`), in the order of the file; those of a kind
    that no original has, and what they are; classes of objects that were passed over."""

    path: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)


class _StandIn:
    """An object of a class that the safe loader does not know: does nothing, and keeps what the file says of it."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> Any:
        """One that keeps its arguments."""
        made = super().__new__(cls)
        made.arguments = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"GLOBAL {type(self).__module__}.{type(self).__name__}"  # as the loader speaks of what it refuses


def read_checkpoint(path: Path) -> CheckpointFile:
    """The tensors of a safetensors file or a torch checkpoint, the latter by the loader that runs nothing.

    Raises CheckpointError for anything else, and where there is no tensor.
    """
    _check_file(path)
    try:
        found = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (*DAMAGE, *NONSENSE) as error:
        raise CheckpointError(_why_refused(path, error), fix=SAVE_WEIGHTS) from error
    if not found.tensors and not found.odd:
        beside = f" beside objects of {', '.join(found.objects[:3])}" if found.objects else ""
        raise CheckpointError(f"{path} holds no tensors{beside}; nothing in it was run", fix=SAVE_WEIGHTS)
    return found


def _check_file(path: Path) -> None:
    """Raise CheckpointError, saying what it is, for what is no file of tensors."""
    if path.is_dir():
        inside = sorted(p for suffix in ("pth", "pt", "bin", "safetensors") for p in path.glob(f"*.{suffix}"))
        fix = f"name the file in it, such as {inside[0]}" if inside else SAVE_WEIGHTS
        if (path / "config.json").is_file() and (path / "manifest.json").is_file():
            fix = f"it is a MODEL of nnx already: nnx sample {quoted(path)}"
        raise CheckpointError(f"{path} is a folder, not the file of a checkpoint", fix=fix)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}{nearest_file(path)}")
    if path.name.endswith(".index.json"):
        raise CheckpointError(f"{path} is the index of a checkpoint in several files", fix=SAVE_WEIGHTS)
    with suppress(OSError), open(path, "rb") as file:
        if file.read(64).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a pointer of Git LFS, not the file itself", fix="get it: git lfs pull")


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors does, whatever its name says: with the size of a header, and its brace."""
    with open(path, "rb") as file:
        head = file.read(HEADER_SIZE.size + 1)
    if len(head) <= HEADER_SIZE.size or head[-1:] != b"{":
        return path.suffix == ".safetensors" and not zipfile.is_zipfile(path)
    return HEADER_SIZE.unpack_from(head)[0] <= path.stat().st_size


def _read_safetensors(path: Path) -> CheckpointFile:
    """Each tensor by itself, so that one of a type that torch lacks does not hide the others."""
    found = CheckpointFile(path)
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            try:
                found.tensors[name] = file.get_tensor(name)
            except (SafetensorError, *NONSENSE):
                found.odd[name] = f"of type {file.get_slice(name).get_dtype()}"
    return found


def _read_torch(path: Path) -> CheckpointFile:
    found = CheckpointFile(path)
    content, stand_ins = _load(path)
    for name, value in _walk(content, "", MAX_DEPTH, iter(range(MAX_NODES))):
        if isinstance(value, Tensor):
            kind = _oddity(value)
            if kind is None:
                found.tensors[name] = value
            else:
                found.odd[name] = kind
        elif (label := next((label for label, cls in stand_ins.items() if type(value) is cls), None)) is not None:
            found.objects += [] if label in found.objects else [label]
    return found


def _load(path: Path) -> tuple[Any, dict[str, type]]:
    """The content of a torch checkpoint, and what stands in for the classes and functions that it names.

    The safe loader fills nothing but its own containers; what it refuses to fill is built as one of them.
    """
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        _check_archive(path)
    stand_ins = {name: _stand_in(name) for name in _names_in(path, is_archive)}
    containers: set[str] = set()
    while True:
        try:
            with (
                warnings.catch_warnings(action="ignore"),
                torch.serialization.safe_globals([(cls, name) for name, cls in stand_ins.items()]),
            ):
                if path.suffix != ".safetensors":
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive), stand_ins
                with open(path, "rb") as file:  # whose name torch would go by
                    return torch.load(file, map_location="cpu", weights_only=True), stand_ins
        except pickle.UnpicklingError as error:
            refused = {name for name, cls in stand_ins.items() if repr(cls) in str(error)} - containers
            if not refused:
                raise
            containers |= refused
            kind = OrderedDict if "SETITEM" in str(error) else list
            stand_ins |= {name: _stand_in(name, kind) for name in refused}


def _stand_in(name: str, container: type | None = None) -> type:
    """A class under the name of another one that makes stand-ins, or empty containers."""
    module, _, own = name.rpartition(".")
    members: dict[str, Any] = {"__module__": module}
    if container is not None:
        members["__new__"] = lambda cls, *args: container()
    return type(own, (_StandIn,), members)


def _names_in(path: Path, is_archive: bool) -> set[str]:
    """Classes and functions that the pickles of a checkpoint name, as far as they are pickles."""
    with suppress(ValueError, pickle.UnpicklingError):  # the loader has more to say about it
        if is_archive:
            return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        with open(path, "rb") as file:
            operations = [list(pickletools.genops(file)) for _ in range(LEGACY_PICKLES)]
        named = [str(argument).split(" ") for part in operations for code, argument, _ in part if code.name == "GLOBAL"]
        return {f"{PYTHON_2.get(module, module)}.{name}" for module, name in named}
    return set()


def _check_archive(path: Path) -> None:
    """Raise CheckpointError where the zip archive that torch writes would unpack to more than it is, or where what it
    holds is not what was written (torch itself does not look at the checksums)."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise CheckpointError(f"{path} is a TorchScript program; nothing in it was run", fix=SAVE_WEIGHTS)
        if not any(name.endswith("/data.pkl") for name in names):
            raise CheckpointError(f"{path} is a zip archive, no checkpoint of tensors; nothing in it was run")
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise CheckpointError(f"{path} is damaged: it unpacks to more than its size")
        if damaged := archive.testzip():
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is not the recorded one")


def _walk(node: Any, name: str, depth: int, budget: Iterator[int]) -> Iterator[tuple[str, Any]]:
    """Tensors and stand-ins inside of `node` by their place. Raises RuntimeError where it holds itself too often."""
    if isinstance(node, Tensor):
        yield name, node
    elif depth and isinstance(node, (dict, list, tuple, _StandIn)):
        if next(budget, None) is None:
            raise RuntimeError("it has no end")
        if isinstance(node, _StandIn):
            yield name, node
        for key, child in _children(node):
            own = "" if key in MODULE_PARTS else key
            yield from _walk(child, f"{name}.{own}".strip("."), depth - 1, budget)


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, _StandIn):
        yield from (("", part) for part in (node.arguments, node.state))
    elif isinstance(node, dict):
        yield from ((str(key) if isinstance(key, (str, int)) else "", value) for key, value in node.items())
    else:
        yield from ((str(number), value) for number, value in enumerate(node))


def _oddity(tensor: Tensor) -> str | None:
    """What a tensor is that no original has; None for an ordinary one."""
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided:
        return f"of layout {str(tensor.layout).removeprefix('torch.')}"
    return None if tensor.device.type == "cpu" else f"on the device {tensor.device.type}, without elements"


def _why_refused(path: Path, error: BaseException) -> str:
    """One line on what the loaders said."""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return f"{path} holds {named[1]}, which the safe loader refuses; nothing in it was run"
    what = f"{path} is no checkpoint of tensors, or is damaged; nothing in it was run"
    if zipfile.is_zipfile(path) and (operand := re.search(r"Unsupported operand (\d+)", str(error))):
        return f"{what} (instruction {operand[1]} is none of pickle protocol 2, which torch.save writes)"
    return what
