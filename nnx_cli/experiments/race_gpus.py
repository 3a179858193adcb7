"""A race on several GPUs: each competitor in a process of its own, as many at a time as there are GPUs.

A process writes how its competitor stands into FOLDER/MODEL.part.json; the one that started it adds that to race.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from nnx_cli.config import RaceConfig, TrainConfig
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.errors import NnxError
from nnx_cli.experiments import race_file
from nnx_cli.experiments.entrants import Entrant, Field, enter
from nnx_cli.experiments.one_run import Stopped
from nnx_cli.experiments.race import Race, told
from nnx_cli.system.files import read_json, replace_file, to_json
from nnx_cli.system.signals import stop_signals
from nnx_cli.training.observer import Silent
from nnx_cli.training.session import configure_device

LOOK_SECONDS = 0.5
RACE_SETTINGS = ("models", "parameters", "equal", "budget", "seeds", "task", "seq_len", "sha256")


class _Quiet(Silent):
    """Watches a race and says nothing."""

    def begins(self, what: str, done: float, share: float) -> None:
        """As in Spectator."""


def gather(race: Race) -> None:
    """Add what the processes of a race wrote that was killed before it read that. Raises OutputError."""
    written = [entrant for entrant in race.racing if _part(race.folder, entrant.name).is_file()]
    for entrant in written:
        _merge(race, entrant)
    if written:
        race.set_state("running")
    for entrant in written:
        _part(race.folder, entrant.name).unlink()


def run_on_gpus(race: Race, gpus: Sequence[Mapping[str, str]], should_stop: Callable[[], bool]) -> None:
    """Run a race with a process for each competitor. `gpus` are environments in which a process sees one GPU alone.

    Raises Stopped where it was asked to stop, NnxError where a process failed; then the others have saved.
    """
    race.set_state("running")
    stopped, failed = _run_all(race, gpus, should_stop)
    race.set_state("interrupted" if stopped else "finished")
    if failed:
        raise NnxError(f"a process of the race failed: {failed}", fix="run the command again: it resumes where it was")
    if stopped:
        raise Stopped(f"interrupted {race.folder}")
    for entrant in race.racing:
        _part(race.folder, entrant.name).unlink(missing_ok=True)
    race.changed(race.record)


def _run_all(race: Race, gpus: Sequence[Mapping[str, str]], should_stop: Callable[[], bool]) -> tuple[bool, str]:
    """Start a process for each competitor, as GPUs become free, until all are done. Returns whether it was stopped
    before, and why a process failed."""
    waiting = [entrant for entrant in race.racing if len(race.entry(entrant)["runs"]) < len(race.seeds)]
    running: dict[int, _Process] = {}
    stopped, failed = False, ""
    with ExitStack() as files:
        while waiting or running:
            for gpu in set(range(len(gpus))) - running.keys():
                if waiting:
                    errors = files.enter_context(tempfile.TemporaryFile())
                    running[gpu] = _Process(race, waiting.pop(0), gpus[gpu], errors)
            time.sleep(LOOK_SECONDS)
            if not stopped and (failed or should_stop()):
                stopped = True
                waiting.clear()
                for process in running.values():
                    process.handle.terminate()
            for gpu, process in [*running.items()]:
                code = process.handle.poll()
                if _merge(race, process.entrant):
                    race.set_state("running")
                    race.changed(race.record)
                if code is not None:
                    del running[gpu]
                    failed = process.said() if code and not stopped else failed
    return stopped, failed


class _Process:
    """The process of a competitor. Signals of the terminal do not reach it: it is stopped by the one that began it."""

    def __init__(self, race: Race, entrant: Entrant, environment: Mapping[str, str], errors: IO[bytes]) -> None:
        self.entrant = entrant
        self.errors = errors
        words = ["--out", str(race.folder), "--competitor", entrant.name, "--parent", str(os.getpid())]
        self.handle = subprocess.Popen(
            [sys.executable, "-m", "nnx_cli", "compare", *words, "--keep", race.field.config.keep, "--quiet"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,
        )

    def said(self) -> str:
        """What it said last."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        found = next((line.removeprefix("nnx: ") for line in lines if line.startswith("nnx: ")), "")
        return found or (lines[-1] if lines else f"{self.entrant.name} ended without a word")


def _part(folder: Path, name: str) -> Path:
    return folder / f"{name}.part.json"


def _merge(race: Race, entrant: Entrant) -> bool:
    """Add what a competitor's process wrote; returns whether a run more is done."""
    path = _part(race.folder, entrant.name)
    if not path.is_file():
        return False
    part, entry = read_json(path), race.entry(entrant)
    known = {run["seed"] for run in entry["runs"]}
    new = [run for run in part["entry"]["runs"] if run["seed"] not in known]
    entry.update(part["entry"])
    race.record["learning_rate_search"]["rates"][entrant.name] = part["rates"]
    for run in new:
        race.view.note(told(entrant.name, run))
    done = sum(len(each["runs"]) for each in race.record["competitors"])
    total = len(race.racing) * len(race.seeds)
    race.view.begins(f"{done} of {total} runs done", min(1.0, done / total), 0.0)
    return bool(new)


def _again(record: Mapping[str, Any], keep: str) -> Field:
    """The field of a race, by what race.json says of it."""
    settings = record["settings"]
    amount = f"{settings['budget']:f}s" if settings["equal"] == "time" else f"{settings['budget']:.0f}"
    config = RaceConfig(
        models=",".join(settings["models"]),
        parameters=str(settings["parameters"]),
        equal=settings["equal"],
        budget=amount,
        seeds=settings["seeds"],
        task=settings["task"],
        keep=keep,
    )
    train = TrainConfig(**{name: value for name, value in settings.items() if name not in RACE_SETTINGS})
    device, precision = configure_device(train)
    data = open_token_folder(record["data"])
    return enter(config, train, settings["parameters"], settings["seq_len"], data, device, precision)


def work(folder: Path, name: str, parent: int, keep: str) -> None:
    """Run one competitor of a race that process `parent` holds, from where it is. Raises Stopped."""
    record = race_file.read_race(folder / race_file.NAME)
    field = _again(record, keep)
    entrant = next(entrant for entrant in field.entrants if entrant.name == name)

    def write(folder: Path, record: dict[str, Any]) -> None:
        entry = next(each for each in record["competitors"] if each["model"] == name)
        rates = record["learning_rate_search"]["rates"].get(name, [])
        replace_file(_part(folder, name), to_json({"entry": entry, "rates": rates}))

    with stop_signals() as asked:
        race = Race(field, folder, record, _Quiet(), "nnx compare", lambda: asked() or _is_orphan(parent), write=write)
        if entrant in race.racing:
            race.search(entrant)
            for seed in race.seeds:
                race.race(entrant, seed)


def _is_orphan(parent: int) -> bool:
    """Whether the process that started this one is gone, where the system tells."""
    return os.name == "posix" and os.getppid() != parent
