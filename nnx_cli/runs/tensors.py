"""Tensors to a safetensors file and back: written through to the disk, read where the SHA-256 is the recorded one."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nnx_cli.errors import CheckpointError
from nnx_cli.models._base import LanguageModel
from nnx_cli.system.files import open_regular

BLOCK_BYTES = 2**22  # between two of which a signal is heard
MAX_HEADER_BYTES = 100 * 2**20  # what the library reads too
MOST_DIMENSIONS = 64  # what NumPy takes
MOST_ELEMENTS = 2**60  # of a tensor, and less than what overflows in torch
SPARE_BYTES = 2**20  # for headers, JSON and logs
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
OF_NAME = {name: dtype for dtype, name in DTYPES.items()}


class Digest:
    """The SHA-256 of blocks, which a thread computes, where one can be had, while the next block is read or written."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Digest:
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def update(self, block: bytes | memoryview) -> None:
        """Take a block, whose bytes have to stay as they are, when the one before it is done."""
        self._wait()
        if self._thread is not None:
            try:
                self._last = self._thread.submit(self._sha256.update, block)
                return
            except RuntimeError:  # as many threads as there may be, or Python is about to end
                self._thread = None
        self._sha256.update(block)

    def hexdigest(self) -> str:
        """Of all blocks."""
        self._wait()
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()
            self._last = None


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    on_progress: Callable[[float], None] = lambda done: None,
) -> str:
    """Write a safetensors file through to the disk, one tensor at a time; returns its SHA-256. OSError passes
    through."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    contents: Iterator[bytes | memoryview] = (block for _, tensor in ordered for block in _raw_blocks(tensor))
    with Digest() as digest, open(path, "wb") as file:
        for block in chain((len(head).to_bytes(8, "little"), head), contents):
            digest.update(block)
            file.write(block)
            on_progress(file.tell() / (8 + len(head) + end))
        file.flush()
        os.fsync(file.fileno())
        return digest.hexdigest()


def _raw_blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in pieces; those of one in the memory of the host are its own."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(raw), BLOCK_BYTES):
        yield raw[start : start + BLOCK_BYTES]


def size_on_disk(*groups: Mapping[str, Tensor]) -> int:
    """Bytes that files of these tensors take, and a little for what stands beside them."""
    return sum(tensor.nbytes for group in groups for tensor in group.values()) + SPARE_BYTES


def read_tensors(path: Path, *sha256: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. Raises CheckpointError unless it is a plain file with one of these
    SHA-256. It is taken of the very bytes that become tensors: the file is read once, and held in memory once. Where
    there is no memory for them, torch's RuntimeError passes through."""
    tensors = {}
    with open_regular(path) as file, Digest() as digest:
        head, header = _read_head(file, path)
        digest.update(head)
        for name, dtype, shape in _layout(header, path):
            tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
            for block in _raw_blocks(tensors[name]):
                file.readinto(block)
                digest.update(block)
        if digest.hexdigest() not in sha256:
            raise CheckpointError(f"{path} is damaged: its checksum is not the recorded one")
    return tensors


def _layout(header: Mapping[str, Any], path: Path) -> list[tuple[str, torch.dtype, list[int]]]:
    """Names, types and shapes in the order of their bytes. Raises CheckpointError unless these follow one another
    without a gap."""
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    found, end = [], 0
    try:
        for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
            dtype, shape, begin = OF_NAME[entry["dtype"]], entry["shape"], end
            if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and 0 <= n <= MOST_ELEMENTS for n in shape):
                raise ValueError
            end += math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [begin, end] or math.prod(max(1, n) for n in shape) > MOST_ELEMENTS:
                raise ValueError
            found.append((name, dtype, shape))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: its header is not that of the tensors behind it") from error
    return found


def read_small(path: Path, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file that nothing depends on, so that no SHA-256 of it is kept. Raises
    CheckpointError where it is damaged, no plain file, or larger."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise CheckpointError(f"{path} is damaged: it has more than {max_bytes >> 20} MiB")
        metadata = read_header(file, path).get("__metadata__")
        data = file.read()
    return _loaded(data, path), metadata if isinstance(metadata, dict) else {}


def _loaded(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError where it is none."""
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # a type or a shape that torch cannot have
        raise CheckpointError(f"{path} is damaged: {error}") from error


def read_header(file: BinaryIO, path: Path) -> dict[str, Any]:
    """Raise CheckpointError where a safetensors file is cut or extended: before all of it is read. Returns its
    header."""
    header = _read_head(file, path)[1]
    file.seek(0)
    return header


def _read_head(file: BinaryIO, path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes before those of the tensors, and the header that they are. Raises CheckpointError as `read_header`."""
    size, head = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(head, "little")
    try:
        raw = file.read(length) if length <= min(size, MAX_HEADER_BYTES) else b""
        header = json.loads(raw)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        whole = 8 + length + end == size
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is damaged: its size is not what its header says")
    return head + raw, header


def check_finite(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise CheckpointError where a tensor holds a number that is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{source} is damaged: {name} has elements that are not finite")


def load_weights(model: LanguageModel, state: Mapping[str, Tensor], source: Path, device: torch.device) -> None:
    """Give a model, built on the meta device or any other, the tensors of `state`, on `device`; tied tensors stay tied.

    Raises CheckpointError where names, shapes or elements cannot belong to this model.
    """
    expected = model.state_without_ties()
    if expected.keys() != state.keys():
        odd = sorted(expected.keys() ^ state.keys())
        more = f" and {len(odd) - 1:,} more" if len(odd) > 1 else ""
        raise CheckpointError(f"{source} belongs to another model: no match for {odd[0]}{more}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            raise CheckpointError(f"{source} belongs to another model: {name} is {shapes}")
        widened = torch.float32 if expected[name].is_floating_point() else None  # stored narrower, computed in fp32
        if tensor.dtype not in (expected[name].dtype, widened):
            raise CheckpointError(
                f"{source} belongs to another model: {name} is {tensor.dtype}, not {expected[name].dtype}"
            )
    check_finite(state, source)
    aliases = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items()) if name in state}
    loaded: dict[str, Tensor] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for key, old in [*parameters, *buffers]:
            if id(old) in aliases:
                name = aliases[id(old)]
                if name not in loaded:
                    value = state[name].to(device)
                    is_parameter = isinstance(old, nn.Parameter)
                    loaded[name] = nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value
                setattr(module, key, loaded[name])
            elif not old.is_meta:  # a buffer that is made, not saved
                setattr(module, key, old.to(device))
