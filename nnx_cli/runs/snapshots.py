"""insides/step-N.safetensors of a run: what its model did inside at a few steps, small enough to keep."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from nnx_cli.errors import CheckpointError
from nnx_cli.layers.insides import Insides, Kind, Panel
from nnx_cli.runs.checkpoint import check_no_link
from nnx_cli.runs.tensors import read_small, write_tensors
from nnx_cli.system.files import cleared, refused_output, sync_folder

FORMAT = 1
FOLDER = "insides"
MOST_FILES = 20
MOST_BYTES = 2**20  # of a file
HEADER_BYTES = 200  # of a tensor
MOST_ROWS, MOST_COLUMNS = 128, 128  # that are kept of a panel that is not over the text
MOST_HALF = 65504.0  # in float16


@dataclass(frozen=True)
class Snapshot:
    """What a model did inside after a step: with a short prompt, whose `tokens` are as code would write them, and with
    a longer text, by layer (`norms`) and by piece of it (`surprise`: one row, whose columns are the pieces)."""

    step: int
    tokens: Sequence[str]
    insides: Insides
    norms: Panel
    surprise: Panel


def save_snapshot(run: Path, snapshot: Snapshot) -> None:
    """Write a snapshot into a run folder, where it appears whole. Of more than MOST_FILES, the ones that tell least go.

    What a file has no room for is left out: attention of every second layer, then panels from the last on. Raises
    OutputError; then nothing of it is there.
    """
    folder = run / FOLDER
    check_no_link(folder)
    tensors, described = _fitting(snapshot)
    path, temporary = _path(run, snapshot.step), run / f".tmp-{FOLDER}-{os.getpid()}"
    with refused_output(path), cleared(temporary):
        folder.mkdir(exist_ok=True)
        write_tensors(temporary, tensors, {"insides": described})
        os.replace(temporary, path)
        sync_folder(folder)
        steps = steps_of(run)
        while len(steps) > MOST_FILES:
            gaps = [later - earlier for earlier, later in zip(steps, steps[2:], strict=False)]
            _path(run, steps.pop(1 + gaps.index(min(gaps)))).unlink(missing_ok=True)


def steps_of(run: Path) -> list[int]:
    """Steps that a run has a snapshot of, ascending."""
    found = (re.fullmatch(r"step-(\d{8,18})\.safetensors", path.name) for path in (run / FOLDER).glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def cut_snapshots(run: Path, step: int) -> None:
    """Drop the snapshots of steps after `step`, as far as the system allows."""
    for later in [] if (run / FOLDER).is_symlink() else steps_of(run):
        if later > step:
            with suppress(OSError):
                _path(run, later).unlink()


def read_snapshots(run: Path) -> tuple[list[Snapshot], list[str]]:
    """The snapshots of a run in the order of their steps, and a line for each that is damaged."""
    found: list[Snapshot] = []
    damaged = []
    if not (run / FOLDER).is_symlink():
        for step in steps_of(run)[-MOST_FILES:]:
            try:
                found.append(_read(_path(run, step), step))
            except CheckpointError as error:
                damaged.append(str(error))
    return found, damaged


def _path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}.safetensors"


def _fitting(snapshot: Snapshot) -> tuple[dict[str, Tensor], str]:
    """The tensors and the description of as much of a snapshot as a file has room for."""
    insides = replace(
        snapshot.insides, panels=[_cropped(panel) for panel in snapshot.insides.panels if panel.values.numel()]
    )
    while True:
        tensors, described = _as_file(replace(snapshot, insides=insides))
        header = len(json.dumps(described)) + HEADER_BYTES * (1 + len(tensors))
        if header + sum(tensor.nbytes for tensor in tensors.values()) <= MOST_BYTES:
            return tensors, described
        if len(insides.attention) > 1:
            insides = replace(insides, attention=insides.attention[::2], layers=insides.layers[::2])
        elif insides.panels:
            insides = replace(insides, panels=insides.panels[:-1])
        else:
            insides = replace(insides, attention=(), layers=())


def _cropped(panel: Panel) -> Panel:
    """The first rows and columns of a panel that is not over the text."""
    rows, columns = panel.values.shape
    if panel.columns is None or (rows <= MOST_ROWS and columns <= MOST_COLUMNS):
        return panel
    values = panel.values[:MOST_ROWS, :MOST_COLUMNS]
    kept = f" Kept are the first {values.shape[0]} x {values.shape[1]} of {rows} x {columns} values."
    return Panel(
        panel.title, panel.about + kept, values, panel.rows[:MOST_ROWS], panel.kind, panel.columns[:MOST_COLUMNS]
    )


def _as_file(snapshot: Snapshot) -> tuple[dict[str, Tensor], str]:
    """A snapshot as tensors by name, and all else of it as JSON."""
    insides, panels = snapshot.insides, [*snapshot.insides.panels, snapshot.norms, snapshot.surprise]
    tensors = {f"attention.{n}": weights.nan_to_num(0, 0, 0).half() for n, weights in enumerate(insides.attention)}
    tensors |= {f"panel.{n}": _stored(panel) for n, panel in enumerate(panels)}
    described = {
        "format": FORMAT,
        "step": snapshot.step,
        "tokens": list(snapshot.tokens),
        "about": insides.about,
        "layers": list(insides.layers),
        "panels": [_words(panel) for panel in panels],
    }
    return tensors, json.dumps(described)


def _stored(panel: Panel) -> Tensor:
    """The values of a panel in a type that suits; what is infinite, in a model that diverges, is no value."""
    if panel.kind == "choice":
        return panel.values.int()
    values = panel.values.float().masked_fill(panel.values.isinf(), math.nan)
    return values if panel.kind == "number" else values.clamp(-MOST_HALF, MOST_HALF).half()


def _words(panel: Panel) -> dict[str, Any]:
    """All of a panel but its values."""
    columns = None if panel.columns is None else list(panel.columns)
    named = {"title": panel.title, "about": panel.about, "kind": panel.kind}
    return {**named, "rows": list(panel.rows), "columns": columns}


def _read(path: Path, step: int) -> Snapshot:
    """A snapshot from its file. Raises CheckpointError where it is not what `save_snapshot` writes."""
    tensors, metadata = read_small(path, 2 * MOST_BYTES)
    try:
        described = json.loads(metadata["insides"])
        tokens = _strings(described["tokens"])
        layers = _strings(described["layers"])
        attention = [tensors[f"attention.{n}"].float() for n in range(len(layers))]
        panels = [_panel(words, tensors[f"panel.{n}"], len(tokens)) for n, words in enumerate(described["panels"])]
        *inside, norms, surprise = panels
        shapes = {weights.shape[1:] for weights in attention}
        if described["format"] != FORMAT or described["step"] != step or shapes - {(len(tokens), len(tokens))}:
            raise ValueError("another step, format or shape")
        if norms.columns is None or surprise.columns is None or len(surprise.values) != 1:
            raise ValueError("no norms, or no surprise")
        if not all(weights.isfinite().all() for weights in attention):
            raise ValueError("not finite")
        return Snapshot(step, tokens, Insides(attention, layers, inside, str(described["about"])), norms, surprise)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not what a run writes there") from error


def _panel(words: Mapping[str, Any], values: Tensor, n_tokens: int) -> Panel:
    """A panel from its parts. Raises ValueError, TypeError or KeyError where they do not fit together."""
    kind, rows = words["kind"], _strings(words["rows"])
    columns = None if words["columns"] is None else _strings(words["columns"])
    if kind not in get_args(Kind) or values.shape != (len(rows), n_tokens if columns is None else len(columns)):
        raise ValueError("another kind or shape")
    whole = kind == "choice"
    if not values.numel() or values.is_floating_point() == whole or values.isinf().any():
        raise ValueError("no values, or of another type")
    values = values.long() if whole else values.float()
    return Panel(str(words["title"]), str(words["about"]), values, rows, kind, columns)


def _strings(value: Any) -> list[str]:
    """A list of strings. Raises TypeError where it is none."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise TypeError("no list of strings")
    return value
