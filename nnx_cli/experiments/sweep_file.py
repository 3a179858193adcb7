"""sweep.json: a sweep as it stands, which several processes may write. It alone draws the table and the page, and is
what `nnx sweep --json` prints.

format                  1; another number is not read. Keys are added, never renamed
versions, device        as in race.json
settings                what was asked for: a sweep goes on where it is the same
fingerprint, data       of the token folder, and its path
tokenizer               {kind, vocab_size, fingerprint}
state                   running | finished
sampler, n_trials, rungs, eta     halving's rungs are parts of a trial's length; all others have one, the whole
searched                {NAME: {values} or {low, high, log, step}}
length                  {max_steps, max_time, epochs or tokens: of a trial}
judged_tokens           of the validation text that every trial is judged by, the same ones
trials                  the best first; those that did not get as far, then those that failed, stand behind:
    number, trial, out  from 1 on; its name; its run folder, a MODEL as sweep-NAME/TRIAL
    settings            {NAME: value} of those that are searched
    status              waiting | paused | stopped (halving: others were better) | finished | diverged |
                        out of memory | refused (its settings disagree)
    problem             in words, of one that failed; else null
    rungs_reached       bits per byte at each rung that it has reached
    bits_per_byte       of its best weights; of one that paused or was stopped, of those that it had there. Else null
    parameters, steps, tokens, time_s, peak_memory_bytes      of training; null: not known
    command             `nnx train` with its settings and its length
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnx_cli.errors import CheckpointError
from nnx_cli.experiments.folders import check_record
from nnx_cli.experiments.halving import WAITING, stop_losers
from nnx_cli.runs.find import SWEEP as NAME
from nnx_cli.runs.run import hold_lock
from nnx_cli.system.files import read_json, replace_file, to_json

FORMAT = 1
PAGE = "sweep.html"
WAIT_SECONDS = 0.05
NUMBER = (int, float, type(None))
WORDS = (str, type(None))
SWEEP_TYPES = {
    "settings": {},
    "state": str,
    "device": WORDS,
    "fingerprint": WORDS,
    "sampler": str,
    "n_trials": int,
    "rungs": list,
    "eta": int,
    "searched": {},
    "length": {},
    "trials": list,
}
TRIAL_TYPES = {
    "number": int,
    "trial": str,
    "out": str,
    "settings": {},
    "status": str,
    "problem": WORDS,
    "rungs_reached": list,
    "bits_per_byte": NUMBER,
    "parameters": NUMBER,
    "steps": NUMBER,
    "tokens": NUMBER,
    "time_s": NUMBER,
    "peak_memory_bytes": NUMBER,
    "command": WORDS,
}


def read_sweep(folder: Path) -> dict[str, Any]:
    """The sweep of a folder; unknown keys stay. Raises CheckpointError for what is none, damaged or of another
    format."""
    path = folder / NAME
    record = read_json(path)
    version = record.get("format")
    if type(version) is not int or "trials" not in record:
        raise CheckpointError(f"{path} is no sweep: it has no format and no trials")
    if version != FORMAT:
        raise CheckpointError(f"{path} has sweep format {version}; this version of nnx reads {FORMAT}")
    check_record(record, SWEEP_TYPES, SWEEP_TYPES.keys(), path)
    for trial in record["trials"]:
        check_record(trial, TRIAL_TYPES, TRIAL_TYPES.keys(), path)
    return record


@contextmanager
def change_sweep(folder: Path) -> Iterator[dict[str, Any]]:
    """The sweep of a folder, to change; what it is then is written in one step. No other process does so meanwhile.

    Raises OutputError where it cannot be written; then the old one stands.
    """
    while True:
        with hold_lock(folder / "lock") as held:
            if held:
                for leftover in folder.glob(".tmp-sweep.*"):  # of a process that was killed
                    leftover.unlink(missing_ok=True)
                record = read_sweep(folder)
                yield record
                rank(record)
                replace_file(folder / NAME, to_json(record))
                return
        time.sleep(WAIT_SECONDS)


def new_trial(number: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A trial before it begins."""
    blank = dict.fromkeys(TRIAL_TYPES)
    named = {"number": number, "trial": f"{number:03d}", "out": "", "settings": dict(settings)}
    return blank | named | {"status": WAITING, "rungs_reached": []}


def rank(record: dict[str, Any]) -> None:
    """Bring trials in their order, the best first, after halving has stopped those that fall behind."""
    stop_losers(record["trials"], record["eta"])
    record["trials"].sort(key=_rank)


def _rank(trial: Mapping[str, Any]) -> tuple[bool, int, float, int]:
    """Those without a result last; those that got farther before others, whose bits per byte are of shorter runs."""
    bits = trial["bits_per_byte"]
    return bits is None, -len(trial["rungs_reached"]), bits or 0.0, trial["number"]
