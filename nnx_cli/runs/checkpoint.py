"""What a run needs to go on, in a folder of its own: every file with its SHA-256, complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nnx_cli.errors import CheckpointError
from nnx_cli.runs.manifest import FORMAT, check_format, read_digests
from nnx_cli.runs.tensors import check_finite, read_tensors, size_on_disk, write_tensors
from nnx_cli.system.files import (
    check_types,
    discard_folder,
    new_folder,
    read_json,
    require_space,
    sha256_regular,
    to_json,
    write_synced,
)

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
STATE_TYPES = {  # of what state.json holds
    **dict.fromkeys(("step", "tokens", "best_step", "worse_validations", "skipped_steps", "bad_steps"), int),
    **dict.fromkeys(("time_s", "lr_factor", "turned_to"), (int, float)),
    "scaler": {},
    "best_losses": list,
    "random": {},
    **dict.fromkeys(("best_val_loss", "best_val_bits_per_byte", "turned_at"), (int, float, type(None))),
}
ALWAYS_THERE = ("tokens", "time_s", "scaler")  # besides the step


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: weights, the optimizer's state, and counters."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def step_folder(folder: Path, step: int) -> Path:
    """Where `folder` keeps the checkpoint of a step."""
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


def load_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Read a checkpoint and check every file of it. Raises CheckpointError."""
    path = step_folder(folder, step)
    check_no_link(path)
    digests = read_digests(path, FILES)
    if sha256_regular(path / "state.json") != digests["state.json"]:
        raise CheckpointError(f"{path / 'state.json'} is damaged: its checksum is not the recorded one")
    state = read_json(path / "state.json")
    check_format(state, path / "state.json")
    check_types(state, STATE_TYPES, path / "state.json")
    if missing := [key for key in ALWAYS_THERE if key not in state]:
        raise CheckpointError(f"{path / 'state.json'} is damaged: it lacks {missing[0]!r}")
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
