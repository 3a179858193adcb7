"""Tensors and training state to disk and back: safetensors and JSON, every file with its SHA-256, complete or
absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nnx_cli.errors import CheckpointError
from nnx_cli.system.files import (
    check_types,
    discard_folder,
    new_folder,
    open_regular,
    read_json,
    require_space,
    sha256_regular,
    to_json,
    write_synced,
)

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
BLOCK_BYTES = 2**22  # between two of which a signal is heard
STATE_TYPES = {  # of what state.json holds
    **dict.fromkeys(("step", "tokens", "best_step", "worse_validations", "skipped_steps", "bad_steps"), int),
    **dict.fromkeys(("time_s", "lr_factor"), (int, float)),
    "scaler": {},
    "random": {},
    **dict.fromkeys(("best_val_loss", "best_val_bits_per_byte"), (int, float, type(None))),
}
MAX_HEADER_BYTES = 100 * 2**20  # what the library reads too
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
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
    digest = hashlib.sha256()
    contents = (block for _, tensor in ordered for block in raw_blocks(tensor))
    with open(path, "wb") as file:
        for block in chain((len(head).to_bytes(8, "little"), head), contents):
            file.write(block)
            digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def raw_blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in pieces."""
    raw = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for start in range(0, len(raw), BLOCK_BYTES):
        yield raw[start : start + BLOCK_BYTES]


def size_on_disk(*groups: Mapping[str, Tensor]) -> int:
    """Bytes that files of these tensors take, and a little for what stands beside them."""
    return sum(tensor.nbytes for group in groups for tensor in group.values()) + SPARE_BYTES


def read_tensors(path: Path, *sha256: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises CheckpointError unless it is a plain file with one of these SHA-256.

    It is held in memory only after that.
    """
    with open_regular(path) as file:
        check_size(file, path)
        if hashlib.file_digest(file, "sha256").hexdigest() not in sha256:
            raise CheckpointError(f"{path} is damaged: its checksum is not the recorded one")
        file.seek(0)
        data = file.read()
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # a type or a shape that torch cannot have
        raise CheckpointError(f"{path} is damaged: {error}") from error


def check_size(file: BinaryIO, path: Path) -> dict[str, Any]:
    """Raise CheckpointError where a safetensors file is cut or extended: before all of it is read. Returns its
    header."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length) if length <= min(size, MAX_HEADER_BYTES) else b"")
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        whole = 8 + length + end == size
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is damaged: its size is not what its header says")
    file.seek(0)
    return header


def check_finite(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise CheckpointError where a tensor holds a number that is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{source} is damaged: {name} holds numbers that are not finite")


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: Path, device: torch.device) -> None:
    """Give a model, built on the meta device or any other, the tensors of `state`, on `device`; tied tensors stay tied.

    Raises CheckpointError where names, shapes or numbers cannot belong to this model.
    """
    expected = model.state_without_ties()
    if expected.keys() != state.keys():
        odd = sorted(expected.keys() ^ state.keys())
        raise CheckpointError(f"{source} belongs to another model: {odd[0]} and {len(odd) - 1} more do not match")
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
        for store in (module._parameters, module._buffers):
            for key, old in store.items():
                if old is not None and id(old) in aliases:
                    name = aliases[id(old)]
                    if name not in loaded:
                        value = state[name].to(device)
                        is_parameter = isinstance(old, nn.Parameter)
                        loaded[name] = nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value
                    store[key] = loaded[name]


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: weights, the optimizer's state, and numbers."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Steps that have a checkpoint in `folder`, ascending."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into `folder`; it appears whole, by a rename, after everything in it is on the disk.

    Raises OutputError; then there is no trace of it.
    """
    target = step_folder(folder, checkpoint.step)
    with new_folder(target) as temporary:
        require_space(folder, size_on_disk(checkpoint.model, checkpoint.optimizer))
        state = to_json(checkpoint.state)
        write_synced(temporary / "state.json", state)
        digests = {
            "model.safetensors": write_tensors(temporary / "model.safetensors", checkpoint.model),
            "optimizer.safetensors": write_tensors(temporary / "optimizer.safetensors", checkpoint.optimizer),
            "state.json": hashlib.sha256(state).hexdigest(),
        }
        write_synced(temporary / "manifest.json", to_json({"format": FORMAT, "files": digests}))
        if target.exists():
            discard_folder(target)  # an abandoned future of this run: it was resumed from an earlier step


def read_manifest(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of each of `names` in a folder. Raises CheckpointError where the manifest is damaged or from the
    future."""
    manifest = read_json(folder / "manifest.json")
    check_format(manifest, folder / "manifest.json")
    files = manifest.get("files")
    if not isinstance(files, dict) or any(not isinstance(files.get(name), str) for name in names):
        raise CheckpointError(f"{folder / 'manifest.json'} is damaged: it does not list {', '.join(names)}")
    return files


def check_format(content: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError unless a file says that it has the format this version reads."""
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {str(content.get('format'))[:20]}; this version of nnx reads format {FORMAT}"
        )


def load_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Read a checkpoint and check every file of it. Raises CheckpointError."""
    path = step_folder(folder, step)
    check_no_link(path)
    digests = read_manifest(path, FILES)
    if sha256_regular(path / "state.json") != digests["state.json"]:
        raise CheckpointError(f"{path / 'state.json'} is damaged: its checksum is not the recorded one")
    state = read_json(path / "state.json")
    check_format(state, path / "state.json")
    check_types(state, STATE_TYPES, path / "state.json")
    if state.get("step") != step:
        raise CheckpointError(f"{path} is damaged: it holds step {str(state.get('step'))[:20]}")
    model = read_tensors(path / "model.safetensors", digests["model.safetensors"])
    optimizer = read_tensors(path / "optimizer.safetensors", digests["optimizer.safetensors"])
    check_finite(model, path / "model.safetensors")
    check_finite(optimizer, path / "optimizer.safetensors")
    return Checkpoint(step, model, optimizer, state)


def check_no_link(folder: Path) -> None:
    """Raise CheckpointError where a folder of a run is a link: what it leads to is not the run's to read or delete."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link; a run holds its own files")


def prune_checkpoints(folder: Path, keep: int, newest: int) -> None:
    """Delete all but the last `keep` checkpoints up to step `newest`. Later ones are damaged: the run was resumed from
    before them."""
    steps = steps_in(folder)
    kept = [step for step in steps if step <= newest][-keep:]
    for step in set(steps) - set(kept):
        with contextlib.suppress(OSError):  # it takes room, no more
            discard_folder(step_folder(folder, step))
