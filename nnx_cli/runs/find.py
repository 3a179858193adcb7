"""How a MODEL on the command line is found, and which there are in weights/."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnx_cli.errors import CheckpointError, NnxError, UsageError, nearest, nearest_file, quoted
from nnx_cli.runs.load import ModelRef
from nnx_cli.runs.manifest import read_verified_config
from nnx_cli.runs.run import is_held, live_status, read_status
from nnx_cli.system.files import check_types, read_json

WEIGHTS = Path("weights")
RACE, SWEEP = "race.json", "sweep.json"  # of a folder whose runs are those of a race, of a sweep
MANY = {RACE: "race", SWEEP: "sweep"}
LOCKS = "locks"  # of a sweep's trials
MADE = ("run.json", "config.json")  # of runs, and of other models
OURS = (
    "run.json",
    "manifest.json",
    *MANY,
)  # without which a folder is none of ours: exported models have a config.json


def find_model(spec: str | None, file: Path | None = None) -> ModelRef:
    """A run folder, its name, RUN@best, RUN@last, RUN@500, a quantized folder; None: the newest run.

    `file` is that of its architecture, for one that needs it. Raises CheckpointError where there is no such thing.
    """
    if spec is None:
        runs = find_runs()
        if not runs:
            raise CheckpointError(f"there is no run in {WEIGHTS}/ yet", fix="train one: nnx train --filepath FILE")
        return ModelRef(runs[0], file=file)
    is_folder = any(os.path.lexists(folder / "config.json") for folder in (Path(spec), WEIGHTS / spec))
    name, _, which = (spec, "", "best") if is_folder or "@" not in spec else spec.rpartition("@")
    if not (which in ("best", "last") or (which.isdecimal() and len(which) <= 18)):
        raise UsageError(f"{spec!r}: after @ comes best, last or a step")
    return ModelRef(find_folder(name), which, file)


def find_folder(name: str) -> Path:
    """A run or model folder by its path or its name in weights/. Raises CheckpointError where there is none."""
    found = [folder for folder in (Path(name), WEIGHTS / name) if name and os.path.lexists(folder / "config.json")]
    for folder in found:
        if not _is_hub(folder):
            return folder
    if found:
        raise CheckpointError(f"{name} is a folder of the Hub's", fix=f"nnx import --model llama {quoted(found[0])}")
    bare = name.rpartition("@")[0]
    if bare and any(os.path.lexists(folder / "config.json") for folder in (Path(bare), WEIGHTS / bare)):
        raise CheckpointError(
            f"{name!r} is a checkpoint; a run resumes from its newest one", fix=f"nnx train --resume {quoted(bare)}"
        )
    for folder in (Path(name), WEIGHTS / name) if name else ():
        if (kind := _kind_of_many(folder)) is not None:
            known = ", ".join(f"{name}/{run.name}" for run in runs_inside(folder)[:3])
            raise CheckpointError(f"{name!r} is a {kind}" + (f" of {known}, …" if known else ""), fix="nnx list --all")
    if name and os.path.isfile(Path(name) / "train.bin"):
        raise CheckpointError(
            f"{name} is a token folder, not a model", fix=f"train one: nnx train --data {quoted(name)}"
        )
    for folder in (Path(name), WEIGHTS / name) if name else ():
        if any(os.path.lexists(folder / part) for part in ("run.json", "model.safetensors")):
            raise CheckpointError(f"{folder} is damaged: it has no config.json", fix="see the runs: nnx list")
    places = [path.parent for depth in ("*", "*/*") for path in WEIGHTS.glob(f"{depth}/config.json")]
    names = [place.relative_to(WEIGHTS).as_posix() for place in places]
    near = nearest(name, [each for each in names if each[0] != "."]) or nearest_file(name)
    known = ", ".join(run.name for run in find_runs()[:5])
    raise CheckpointError(
        f"there is no run or model {name!r}" + (near or (f"; the newest are {known}" if known else "")),
        fix="see the runs: nnx list",
    )


def _is_hub(folder: Path) -> bool:
    """Whether a folder is a Llama in the layout of Hugging Face's Hub, which is imported first."""
    path = folder / "config.json"
    if os.path.lexists(folder / "manifest.json"):
        return False
    return read_json(path, follow_links=True).get("model_type") == "llama"


def find_runs() -> list[Path]:
    """The run folders in weights/, the one that changed last first."""
    found = [path.parent for path in WEIGHTS.glob("*/run.json") if not path.parent.name.startswith(".")]
    return sorted(found, key=lambda folder: (folder / "run.json").stat().st_mtime, reverse=True)


def _kind_of_many(folder: Path) -> str | None:
    """race or sweep, where a folder is one: its runs are inside."""
    return next((kind for name, kind in MANY.items() if os.path.isfile(folder / name)), None)  # no system takes some


def runs_inside(folder: Path) -> list[Path]:
    """The run folders of a race or a sweep, by name."""
    return sorted(path.parent for path in folder.glob("*/run.json") if not path.parent.name.startswith("."))


def list_models(every: bool = False) -> list[dict[str, Any]]:
    """What `nnx list` shows of every model folder, race and sweep in weights/, the one that changed last first. Runs
    inside follow if `every` one is to be shown."""
    folders = {path.parent for name in (*MADE, *MANY) for path in WEIGHTS.glob(f"*/{name}")}
    folders = {folder for folder in folders if any(os.path.lexists(folder / name) for name in OURS)}
    changed = {folder: _changed(folder) for folder in folders if not folder.name.startswith(".")}
    rows = []
    for folder in sorted(changed, key=lambda folder: changed[folder], reverse=True):
        describe = {"race": _describe_race, "sweep": _describe_sweep}.get(_kind_of_many(folder) or "")
        described = describe(folder) if describe else _describe(folder, folder.name)
        rows.append(described | {"age_s": round(time.time() - changed[folder])})
        for run in runs_inside(folder) if describe and every else []:
            age = round(time.time() - _changed(run))
            rows.append(_describe(run, f"{folder.name}/{run.name}") | {"age_s": age})
    return rows


def _changed(folder: Path) -> float:
    """When a race, a sweep, a run, or else a model, was last written."""
    name = next(name for name in (*MANY, *MADE) if os.path.lexists(folder / name))
    return (folder / name).lstat().st_mtime


def _describe_race(folder: Path) -> dict[str, Any]:
    """A race in one row: its best architecture's mean bits per byte."""
    row: dict[str, Any] = {"name": folder.name, "out": str(folder), "kind": "race"}
    try:
        race = read_json(folder / RACE)
        check_types(race, {"state": str, "competitors": list}, folder / RACE)
        competitors = [each for each in race.get("competitors", []) if isinstance(each, dict)]
        means = [(each.get("bits_per_byte") or {}).get("mean") for each in competitors]
        row |= {
            "model": ", ".join(str(each.get("model")) for each in competitors),
            "size": None,
            "status": live_status(folder, {"status": race.get("state")}),
            "steps": None,
            "best_val_bits_per_byte": min((mean for mean in means if isinstance(mean, float)), default=None),
            "best_val_loss": None,
        }
    except NnxError as error:
        row |= {"status": "damaged", "error": str(error)}
    return row


def _describe_sweep(folder: Path) -> dict[str, Any]:
    """A sweep in one row: the bits per byte of its best trial."""
    row: dict[str, Any] = {"name": folder.name, "out": str(folder), "kind": "sweep"}
    try:
        sweep = read_json(folder / SWEEP)
        check_types(sweep, {"state": str, "trials": list, "settings": {}}, folder / SWEEP)
        trials = [each for each in sweep.get("trials", []) if isinstance(each, dict)]
        for each in trials:
            check_types(each, {"settings": {}}, folder / SWEEP)
        bits = [each.get("bits_per_byte") for each in trials if each.get("status") == "finished"]
        settings = [(sweep.get("settings") or {}) | (each.get("settings") or {}) for each in trials]
        row |= {
            "model": ", ".join(sorted({str(each.get("model")) for each in settings})),
            "size": None,
            "status": sweep_status(folder, sweep.get("state")),
            "steps": None,
            "best_val_bits_per_byte": min((each for each in bits if isinstance(each, float)), default=None),
            "best_val_loss": None,
        }
    except NnxError as error:
        row |= {"status": "damaged", "error": str(error)}
    return row


def sweep_status(folder: Path, state: Any) -> str:
    """A sweep's state; one that is "running" while no process is at a trial was killed or stopped: "interrupted"."""
    if state == "running" and not any(is_held(lock) for lock in (folder / LOCKS).glob("*")):
        return "interrupted"
    return str(state)


def _describe(folder: Path, name: str) -> dict[str, Any]:
    """A model in one row. What is damaged has status "damaged" and an error."""
    is_run = os.path.lexists(folder / "run.json")
    row: dict[str, Any] = {"name": name, "out": str(folder), "kind": "run"}
    try:
        config = read_verified_config(folder)
        row |= {
            "kind": "run" if is_run else _kind(config),
            "model": config["model"]["name"],
            "size": config["model"].get("size"),
            "status": None,
            "steps": None,
            "best_val_bits_per_byte": None,
            "best_val_loss": None,
        }
        if row["kind"] == "run":
            status = read_status(folder)
            row |= {
                "status": live_status(folder, status),
                "steps": status.get("step"),
                "best_val_bits_per_byte": status.get("best_val_bits_per_byte"),
                "best_val_loss": status.get("best_val_loss"),
            }
    except NnxError as error:
        row |= {"status": "damaged", "error": str(error)}
    return row


def _kind(config: Mapping[str, Any]) -> str:
    """How a model came to be, by what its config.json was given then; the last step counts."""
    made = {"quantized_from": "quantized", "merged_from": "merged", "imported_from": "imported"}
    return next((kind for key, kind in made.items() if config.get(key)), "run")
